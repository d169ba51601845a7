package dockerrunner

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

// Prepared is a call that was checked as far as that takes no engine: its configuration, and what
// both policies say of it. Every backend of docker services begins with it.
type Prepared struct {
	Config    Config
	Operation Operation
	// Limits are the smaller of each bound of both policies.
	Limits ResourceLimits
	// Input is a JSON object, never empty.
	Input json.RawMessage

	job      *runner.Job
	name     imageName
	policies *policies
	checks   *runner.Checks
}

// Prepare reads and checks a call. The ceiling is the operator's policy; nil for none. What is
// returned beside an error has what was read until then, and is nil where that is nothing.
func Prepare(job *runner.Job, ceiling *Policy, checks *runner.Checks) (*Prepared, error) {
	return prepare(job, ceiling, nil, checks)
}

func prepare(job *runner.Job, ceiling *Policy, denied deniedPaths, checks *runner.Checks) (*Prepared, error) {
	p := &Prepared{job: job, checks: checks, Input: job.Input}
	if len(bytes.TrimSpace(p.Input)) == 0 {
		p.Input = json.RawMessage("{}")
	}
	var err error
	if p.Config, err = runner.Decode[Config](job.Service.Config); err != nil {
		return p, at("runner_config", err)
	}
	if p.Operation, err = runner.Decode[Operation](job.Operation.Config); err != nil {
		return p, at("operation "+job.Operation.Name, err)
	}
	policy, err := runner.Decode[Policy](job.Service.Policy)
	if err != nil {
		return p, at("security_policy", err)
	}
	p.policies = newPolicies(policy, ceiling, denied, checks)
	p.Limits = p.policies.limits()
	if p.name, err = parseImage(p.Config.Image); err != nil {
		return p, fault.New(fault.Validation, "runner_config.image: %q is not an image: %v", clip(p.Config.Image), err)
	}
	// What a policy forbids is to be told as that, not as a mistake.
	if err := p.policies.imageName(p.name); err != nil {
		return p, err
	}
	if err := p.policies.network(p.Config.network()); err != nil {
		return p, err
	}
	for _, v := range p.Config.Volumes {
		if why := denied.why(path.Clean(v.HostPath)); why != "" {
			return p, checks.Deny("volumes", v.HostPath, "it must never be mounted: "+why)
		}
	}
	if auth := p.Config.RegistryAuth; auth != nil {
		for _, name := range []string{auth.UsernameEnvVar, auth.PasswordEnvVar} {
			if err := p.policies.envVar(name); err != nil {
				return p, err
			}
		}
	}
	for _, found := range append(p.Config.check(denied), policy.check(denied)...) {
		if !found.Warning {
			return p, fault.New(fault.Validation, "%s: %s; %s", found.Path, found.Message, found.Mend)
		}
	}
	for _, found := range p.Operation.check(&p.Config) {
		return p, fault.New(fault.Validation, "operation %s: %s: %s; %s", job.Operation.Name, found.Path, found.Message, found.Mend)
	}
	return p, nil
}

// Digest of the policies in force; empty where they could not be read.
func (p *Prepared) Digest() string {
	if p.policies == nil {
		return ""
	}
	return p.policies.digest()
}

// Networks that [Prepared.Network] may give.
const (
	NetworkNone   = networkNone
	NetworkBridge = networkBridge
)

// Network is [NetworkNone], [NetworkBridge] or the name of another network, which the policies allow.
func (p *Prepared) Network() string { return p.Config.network() }

// Image is the full name of the image, and the host of its registry.
func (p *Prepared) Image() (name, registry string) { return p.name.String(), p.name.registry() }

// Pinned is the name by which something else than this runner may pull the image and get nothing
// but what the policies allow: by the digest that they pin where no name is enough for them.
func (p *Prepared) Pinned() (string, error) {
	if p.name.repo == "" {
		return "", fault.New(fault.Validation, "runner_config.image: an image ID is known on one engine alone; name the image by a tag or a digest")
	}
	candidates := []imageName{p.name}
	for _, s := range p.policies.sources {
		for _, text := range s.policy.AllowedImages {
			if pattern, err := parsePattern(text); err == nil && pattern.pinned() && pattern.name.repo == p.name.repo && pattern.mayMatch(p.name) {
				candidates = append(candidates, imageName{repo: p.name.repo, digest: pattern.name.digest})
			}
		}
	}
	for _, candidate := range candidates {
		if p.policies.holds(p.name, candidate) {
			// What runs is what this name says, which is what is checked.
			return candidate.String(), p.policies.image(p.name, candidate.String(), func(pattern imagePattern) bool { return pattern.holds(p.name, candidate) })
		}
	}
	return "", p.policies.image(p.name, "", func(pattern imagePattern) bool { return pattern.holds(p.name, p.name) })
}

// holds says whether every policy allows n where it is run by the name of by.
func (p *policies) holds(n, by imageName) bool {
	return !slices.ContainsFunc(p.sources, func(s source) bool {
		return !slices.ContainsFunc(s.policy.AllowedImages, func(text string) bool {
			pattern, err := parsePattern(text)
			return err == nil && pattern.holds(n, by)
		})
	})
}

// holds says whether the entry allows n where it is run by the name of by.
func (p imagePattern) holds(n, by imageName) bool {
	return p.mayMatch(n) && (!p.pinned() || p.name.repo == by.repo && p.name.digest == by.digest)
}

// Arguments fills the arguments from the input. The entrypoint is the configuration's own, empty
// where it has none.
func (p *Prepared) Arguments() (entrypoint, args []string, err error) {
	return p.arguments(p.Config.Entrypoint)
}

// arguments fills the arguments of an image whose entrypoint is known.
func (p *Prepared) arguments(entrypoint []string) ([]string, []string, error) {
	written := p.Config.Command
	if p.Operation.Command != nil {
		written = p.Operation.Command
	}
	args, err := fillArguments(written, p.Input)
	if err != nil {
		return nil, nil, err
	}
	if at := inputInCode(entrypoint, written, args); len(at) > 0 {
		return nil, nil, fault.New(fault.Validation, "command[%d]: %s; %s", at[0], inputInCodeText, inputInCodeMend)
	}
	return entrypoint, args, nil
}

// InputVariable says whether SPECQL_INPUT holds the input: one that is larger than the system
// lets a variable be is on stdin alone.
func (p *Prepared) InputVariable() bool { return len(p.Input) <= maxInputVariable }

// Environment is what a container gets besides what its image brings: the service's variables,
// those of the contract and the trace, each as NAME=VALUE.
func (p *Prepared) Environment(ctx context.Context) []string {
	return environment(ctx, &p.Config, p.job, p.Input)
}

// LeftError says that something of a job could not be taken away.
type LeftError struct{ Err error }

func (e *LeftError) Error() string { return e.Err.Error() }
func (e *LeftError) Unwrap() error { return e.Err }

// Run carries the call out within the time that bounds it. Whatever fails once the time is over, or someone has asked for the
// end, failed because of that, but for what could not be taken away: a [LeftError] is told as it is.
func (p *Prepared) Run(ctx context.Context, call func(context.Context) (json.RawMessage, error)) (json.RawMessage, error) {
	ctx, cancel := p.bound(ctx)
	defer cancel()
	output, err := call(ctx)
	if err != nil && ctx.Err() != nil {
		if left, ok := errors.AsType[*LeftError](err); ok {
			return nil, left.Err
		}
		return nil, fault.From(context.Cause(ctx))
	}
	return output, err
}

// bound holds the call to the policies' time, and to the service's where the job brings none.
func (p *Prepared) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	limit, what := p.Limits.timeout(), "resource_limits.timeout_seconds"
	if own := seconds(p.Config.Timeout); own > 0 && p.job.Timeout == 0 && (limit == 0 || own < limit) {
		limit, what = own, "runner_config.timeout"
	}
	if limit <= 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeoutCause(ctx, limit, fault.New(fault.Timeout, "the attempt took longer than its %s of %s", what, limit))
}

// LimitRule is the first policy that sets a limit such as processes, for denials; empty where none does.
func (p *Prepared) LimitRule(limit string) (rule, where string) {
	for _, s := range p.policies.sources {
		l := s.policy.ResourceLimits
		if l == nil {
			continue
		}
		if value := map[string]float64{"cpu_cores": l.CPUCores, "memory_mb": l.MemoryMB, "disk_mb": l.DiskMB, "processes": float64(l.Processes)}[limit]; value > 0 {
			return s.prefix + "resource_limits." + limit, s.where
		}
	}
	return "", ""
}

// Verdict says why a container that ended by itself failed; nil where it did not. It denies what
// went over the limit of memory.
func (p *Prepared) Verdict(exitCode int, oom bool, peakMB *float64, stderr string) error {
	if oom { // whatever the status: a parent may not notice that its child is gone
		text := "the kernel ended the container for its memory"
		if exitCode == 0 {
			text = "the kernel ended a process of the container for its memory"
		}
		if p.Limits.MemoryMB > 0 {
			text += fmt.Sprintf(": its limit is %g MiB", p.Limits.MemoryMB)
		}
		if peakMB != nil {
			text += fmt.Sprintf(", its peak was %.1f MiB", *peakMB)
		}
		err := fault.New(fault.ResourceExceeded, "%s; raise resource_limits.memory_mb, or use less", text)
		_ = p.checks.Deny("resource_limits.memory_mb", fmt.Sprintf("more than %g MiB", p.Limits.MemoryMB), err.Message, p.raising()...)
		return err
	}
	if exitCode == 0 {
		return nil
	}
	text := fmt.Sprintf("the container exited with status %d", exitCode)
	if signal := exitCode - 128; signal > 0 && signal < 65 {
		text += fmt.Sprintf(" (signal %d)", signal)
	}
	if stderr != "" {
		text += ": " + stderr
	}
	return fault.New(fault.RemoteError, "%s", text)
}

// raising are the changes that raise the limit of memory that holds.
func (p *Prepared) raising() []*runnerv1.PolicyChange {
	limit := p.Limits.MemoryMB
	if limit <= 0 {
		return nil
	}
	return p.policies.changing(func(policy *Policy, ceiling bool) *runnerv1.PolicyChange {
		if policy.ResourceLimits == nil || policy.ResourceLimits.MemoryMB != limit {
			return nil
		}
		return runner.RaiseAbove(ceiling, "resource_limits.memory_mb", limit)
	})
}

// IsReadOnly says whether the root file system cannot be written.
func (c *Config) IsReadOnly() bool { return c.readOnly() }

// Directory is an in-memory directory of a service.
type Directory struct {
	Path  string
	Bytes int64
	// Exec says whether programs there may be executed.
	Exec bool
}

// Directories are the in-memory directories: those of the service, and /tmp where the root
// cannot be written.
func (p *Prepared) Directories() ([]Directory, error) {
	a := &attempt{cfg: p.Config, limits: p.Limits, name: p.name}
	list, err := a.directories(image{}, nil)
	if err != nil {
		return nil, err
	}
	found := make([]Directory, 0, len(list))
	for _, t := range list {
		found = append(found, Directory{Path: path.Clean(t.target), Bytes: t.bytes, Exec: t.exec})
	}
	return found, nil
}

// Capture takes what a container writes: as log lines, and as the output.
type Capture struct {
	stdout *head
	stderr *tail
	out    *stream
	err    *stream
}

// NewCapture begins a capture that passes lines on to the sink.
func NewCapture(sink runner.Sink) *Capture {
	c := &Capture{stdout: newHead(), stderr: &tail{}}
	c.out = &stream{name: "stdout", sink: sink, keep: c.stdout.add}
	c.err = &stream{name: "stderr", sink: sink, keep: c.stderr.add}
	return c
}

// Stdout takes a part of stdout.
func (c *Capture) Stdout(part []byte) { _, _ = c.out.Write(part) }

// Stderr takes a part of stderr.
func (c *Capture) Stderr(part []byte) { _, _ = c.err.Write(part) }

// Flush passes on lines without an end. Nothing is to be taken after it.
func (c *Capture) Flush() {
	c.out.flush()
	c.err.flush()
}

// Full says whether stdout has become larger than an output may be: a RESOURCE_EXCEEDED error then.
func (c *Capture) Full() error {
	select {
	case <-c.stdout.full:
		return fault.New(fault.ResourceExceeded, "the container wrote more than the %d MiB to stdout that an output may have; write large results to a volume and give their place", maxOutput>>20)
	default:
		return nil
	}
}

// ErrorTail is the end of stderr, for an error.
func (c *Capture) ErrorTail() string {
	return string(bytes.TrimSpace([]byte(c.stderr.last(errorTail))))
}

// Output makes the output: of output.json where the container wrote something into it, else of stdout.
func (c *Capture) Output(file []byte, exitCode int) (json.RawMessage, error) {
	if len(bytes.TrimSpace(file)) > 0 {
		if len(file) > maxOutput {
			return nil, tooLarge()
		}
		return fileOutput(file)
	}
	return streamOutput(c.stdout.bytes(), c.stderr.last(maxErrorTail), exitCode)
}

// PullFault tells an image that there is not, which stays so, from a registry that is away.
func (p *Prepared) PullFault(ctx context.Context, err error) error {
	return pullFault(ctx, p.name, err, nil)
}

// Validate checks a service as far as that takes no engine. The ceiling is the operator's policy; nil for none.
func Validate(s *runner.Service, ceiling *Policy) []runner.Problem {
	return checkService(s, ceiling, nil)
}

func checkService(s *runner.Service, ceiling *Policy, denied deniedPaths) []runner.Problem {
	found := runner.CheckService[Config, Operation, Policy](s)
	cfg, policy := runner.Lenient[Config](s.Config), runner.Lenient[Policy](s.Policy)
	later := append(cfg.check(denied), policy.check(denied)...)
	for _, op := range s.Operations {
		o := runner.Lenient[Operation](op.Config)
		for _, p := range o.check(&cfg) {
			p.Path = "operations." + op.Name + "." + p.Path
			later = append(later, p)
		}
	}
	return runner.AppendProblems(found, append(later, foresee(&cfg, &policy, ceiling, denied)...)...)
}

// CheckCeiling says what is wrong with an operator's policy; nil for nothing.
func CheckCeiling(ceiling *Policy) error { return checkCeiling(ceiling, nil) }

func checkCeiling(ceiling *Policy, denied deniedPaths) error {
	if ceiling == nil {
		return nil
	}
	for _, p := range ceiling.check(denied) {
		if !p.Warning {
			return fmt.Errorf("the runner's policy: %s: %s", p.Path, p.Message)
		}
	}
	return nil
}

// DescribeType is the execution type with its schemas.
func DescribeType() runner.Type {
	return runner.Type{Name: ExecutionType, ConfigSchema: schemas().config, PolicySchema: schemas().policy, OperationSchema: schemas().operation}
}
