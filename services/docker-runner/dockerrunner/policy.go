package dockerrunner

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

// source is one policy and where it stands.
type source struct {
	policy *Policy
	// prefix of a rule's name in the checks.
	prefix string
	// where to make a change.
	where string
}

// policies are the registry's policy and the operator's ceiling; both must allow.
type policies struct {
	sources []source
	// denied are the paths that no policy can allow.
	denied deniedPaths
	checks *runner.Checks
}

func newPolicies(registry Policy, ceiling *Policy, denied deniedPaths, checks *runner.Checks) *policies {
	p := &policies{checks: checks, denied: denied, sources: []source{{policy: &registry, prefix: "", where: "the service's security_policy"}}}
	if ceiling != nil {
		p.sources = append(p.sources, source{policy: ceiling, prefix: "ceiling.", where: "the runner's --policy file"})
	}
	return p
}

// changing collects what has to change of each policy.
func (p *policies) changing(of func(policy *Policy, ceiling bool) *runnerv1.PolicyChange) []*runnerv1.PolicyChange {
	var changes []*runnerv1.PolicyChange
	for i, s := range p.sources {
		if change := of(s.policy, i > 0); change != nil {
			changes = append(changes, change)
		}
	}
	return changes
}

func (p *policies) digest() string {
	all := make(map[string]*Policy, len(p.sources))
	for _, s := range p.sources {
		all[s.where] = s.policy
	}
	return runner.Digest(all)
}

// imageName checks by name alone, before anything is pulled.
func (p *policies) imageName(n imageName) error {
	return p.image(n, "", func(pattern imagePattern) bool { return pattern.mayMatch(n) })
}

// imageContent checks what the name stands for.
func (p *policies) imageContent(n imageName, id string, repoDigests []string) error {
	return p.image(n, id, func(pattern imagePattern) bool { return pattern.matches(n, id, repoDigests) })
}

// image checks an image by match; id is what it stands for, or empty while that is not known.
func (p *policies) image(n imageName, id string, match func(imagePattern) bool) error {
	final := id != ""
	for _, s := range p.sources {
		rule := s.prefix + "allowed_images"
		allowed, pinned := false, false
		for _, text := range s.policy.AllowedImages {
			pattern, err := parsePattern(text)
			if err != nil {
				return fault.New(fault.Validation, "%s of %s: %q is not an image: %v", rule, s.where, clip(text), err)
			}
			allowed = allowed || match(pattern)
			pinned = pinned || final && pattern.mayMatch(n)
		}
		switch {
		case !allowed && pinned:
			return p.checks.Deny(rule, n.String(), fmt.Sprintf("the image on the engine has another digest than the one pinned in %s; pull the pinned one, or change the pin", s.where))
		case !allowed:
			return p.checks.Deny(rule, n.String(), fmt.Sprintf("the image is not listed; add %q to allowed_images of %s", n, s.where), p.changing(func(policy *Policy, ceiling bool) *runnerv1.PolicyChange {
				if slices.ContainsFunc(policy.AllowedImages, func(text string) bool {
					pattern, err := parsePattern(text)
					return err == nil && match(pattern)
				}) {
					return nil
				}
				return runner.AddTo(ceiling, "allowed_images", n.String())
			})...)
		case final:
			p.checks.Allow(rule, n.String()+" = "+id)
		}
	}
	return nil
}

// forbiddenNetwork says why a network mode is never allowed; empty where it may be.
func forbiddenNetwork(mode string) string {
	kind, _, shared := strings.Cut(mode, ":")
	switch {
	case mode == "host":
		return "the host's network namespace is never shared with a container"
	case shared:
		return fmt.Sprintf("the network namespace of another %s is never shared", clip(kind))
	case strings.ContainsAny(mode, "/\x00 "):
		return "not the name of a network"
	}
	return ""
}

func (p *policies) network(mode string) error {
	if mode == networkNone {
		p.checks.Allow("allowed_networks", networkNone)
		return nil
	}
	if why := forbiddenNetwork(mode); why != "" {
		return p.checks.Deny("network_mode", mode, why)
	}
	for _, s := range p.sources {
		rule := s.prefix + "allowed_networks"
		if !slices.Contains(s.policy.AllowedNetworks, mode) {
			return p.checks.Deny(rule, mode, fmt.Sprintf("the network is not listed; add %q to allowed_networks of %s", mode, s.where), p.changing(func(policy *Policy, ceiling bool) *runnerv1.PolicyChange {
				if slices.Contains(policy.AllowedNetworks, mode) {
					return nil
				}
				return runner.AddTo(ceiling, "allowed_networks", mode)
			})...)
		}
		p.checks.Allow(rule, mode)
	}
	return nil
}

// envVar checks the name of a variable that holds a secret.
func (p *policies) envVar(name string) error {
	if runner.OwnVariable(name) {
		return p.checks.Deny("env_vars", name, "the variable belongs to the mesh itself and is given to no service")
	}
	for _, s := range p.sources {
		rule := s.prefix + "allowed_env_vars"
		if !runner.EnvVarAllowed(s.policy.AllowedEnvVars, name) {
			return p.checks.Deny(rule, name, fmt.Sprintf("the variable is not listed; add %q to allowed_env_vars of %s", name, s.where), p.changing(func(policy *Policy, ceiling bool) *runnerv1.PolicyChange {
				if runner.EnvVarAllowed(policy.AllowedEnvVars, name) {
					return nil
				}
				return runner.AddTo(ceiling, "allowed_env_vars", name)
			})...)
		}
		if s.policy.AllowedEnvVars != nil {
			p.checks.Allow(rule, name)
		}
	}
	return nil
}

// defaultProcesses bounds processes and threads where no policy does.
const defaultProcesses = 512

// limits are the smaller of each bound; zero means none.
func (p *policies) limits() ResourceLimits {
	var l ResourceLimits
	for _, s := range p.sources {
		r := s.policy.ResourceLimits
		if r == nil {
			continue
		}
		l.CPUCores = smaller(l.CPUCores, r.CPUCores)
		l.MemoryMB = smaller(l.MemoryMB, r.MemoryMB)
		l.DiskMB = smaller(l.DiskMB, r.DiskMB)
		l.Processes = smaller(l.Processes, r.Processes)
		l.TimeoutSeconds = smaller(l.TimeoutSeconds, r.TimeoutSeconds)
	}
	if l.Processes == 0 {
		l.Processes = defaultProcesses
	}
	return l
}

func smaller[N int64 | float64](a, b N) N {
	if a <= 0 || b > 0 && b < a {
		return b
	}
	return a
}

func (l ResourceLimits) timeout() time.Duration {
	return seconds(l.TimeoutSeconds)
}

// seconds gives a duration; what is absurdly long stays one.
func seconds(s float64) time.Duration {
	const most = 1e9
	return time.Duration(min(s, most) * float64(time.Second))
}

// enforceable refuses limits that the engine would drop with nothing but a warning.
func (p *policies) enforceable(e *engine) error {
	for _, s := range p.sources {
		l := s.policy.ResourceLimits
		if l == nil {
			continue
		}
		for _, limit := range []struct {
			name string
			want float64
			held bool
		}{
			{"cpu_cores", l.CPUCores, e.info.CPUCfsQuota},
			{"memory_mb", l.MemoryMB, e.info.MemoryLimit},
			{"processes", float64(l.Processes), e.info.PidsLimit},
		} {
			rule, subject := s.prefix+"resource_limits."+limit.name, strconv.FormatFloat(limit.want, 'g', -1, 64)
			switch {
			case limit.want <= 0:
			case !limit.held:
				return p.checks.Deny(rule, subject, "the engine cannot hold a container to it: its host has no control group for that; use another engine, or take the limit out of "+s.where)
			default:
				p.checks.Allow(rule, subject)
			}
		}
	}
	return nil
}

var envPattern = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*\*?$|^\*$`)

// check finds what the schema cannot.
func (p *Policy) check(denied deniedPaths) []runner.Problem {
	var found []runner.Problem
	add := func(path, mend, format string, args ...any) {
		found = append(found, runner.Problem{Path: "security_policy." + path, Message: fmt.Sprintf(format, args...), Mend: mend})
	}
	for i, text := range p.AllowedImages {
		if _, err := parsePattern(text); err != nil {
			add(fmt.Sprintf("allowed_images[%d]", i), "write name:tag, name@sha256:…, an image ID or repo/*", "%q is not an image: %v", clip(text), err)
		}
	}
	for i, mode := range p.AllowedNetworks {
		if why := forbiddenNetwork(mode); why != "" {
			add(fmt.Sprintf("allowed_networks[%d]", i), "take it out", "%s", why)
		}
	}
	for i, name := range p.AllowedEnvVars {
		if !envPattern.MatchString(name) {
			add(fmt.Sprintf("allowed_env_vars[%d]", i), "write NAME or PREFIX_*", "%q is not the name of a variable", clip(name))
		}
	}
	if p.VolumeRestrictions != nil {
		for i, dir := range p.VolumeRestrictions.AllowedHostPaths {
			at := fmt.Sprintf("volume_restrictions.allowed_host_paths[%d]", i)
			switch {
			case !path.IsAbs(dir):
				add(at, "write the absolute path on the host", "%q is not an absolute path", clip(dir))
			case denied.why(path.Clean(dir)) != "":
				found = append(found, runner.Problem{
					Path: "security_policy." + at, Warning: true, Mend: "list a directory made for this",
					Message: fmt.Sprintf("%q allows nothing by itself: %s", clip(dir), denied.why(path.Clean(dir))),
				})
			}
		}
	}
	return found
}
