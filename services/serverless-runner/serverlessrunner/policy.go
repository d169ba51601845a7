package serverlessrunner

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/runner"
)

// Policy is the security_policy of a serverless service, and of the operator's ceiling.
//
// A list that is absent allows what the same registry entry configures (in a ceiling:
// anything); an empty list allows nothing.
type Policy struct {
	AllowedProviders []string       `json:"allowed_providers,omitzero" jsonschema:"description=Providers that may be called; absent: the configured one"`
	AllowedRegions   []string       `json:"allowed_regions,omitzero" jsonschema:"description=Regions that may be called; absent: the configured one"`
	AllowedEndpoints []string       `json:"allowed_endpoints,omitzero" jsonschema:"description=Hosts that may be called as host or *.domain with :port where it matters; absent: the provider's own and the configured endpoint"`
	AllowedEnvVars   []string       `json:"allowed_env_vars,omitzero" jsonschema:"description=Variables of the runner that the *_env_var keys may name: exact or PREFIX_*; absent: any. Meant for the operator's policy"`
	AllowedRoles     []string       `json:"allowed_roles,omitzero" jsonschema:"description=AWS roles that role_arn may name: the ARN or its beginning and a *; absent: any. Meant for the operator's policy"`
	ResourceLimits   ResourceLimits `json:"resource_limits,omitzero" jsonschema:"description=Largest function and longest attempt"`
	CostLimits       CostLimits     `json:"cost_limits,omitzero" jsonschema:"description=Spend of the service in any hour as this runner counts it; in the operator's policy that of all services together"`
}

// ResourceLimits bound one attempt.
type ResourceLimits struct {
	MemoryMB       int64   `json:"memory_mb,omitempty" jsonschema:"minimum=1,description=Memory of the function in MB"`
	TimeoutSeconds float64 `json:"timeout_seconds,omitempty" jsonschema:"exclusiveMinimum=0,description=Longest time of one attempt in seconds"`
}

// CostLimits bound the spend of a service in any hour.
type CostLimits struct {
	MaxInvocationsPerHour int64   `json:"max_invocations_per_hour,omitempty" jsonschema:"minimum=1,description=Invocations in any hour"`
	MaxCostPerHour        float64 `json:"max_cost_per_hour,omitempty" jsonschema:"exclusiveMinimum=0,description=US dollars in any hour by the price table"`
}

// effective is a service's policy held under the operator's ceiling: both must allow, and
// the smaller limit counts.
type effective struct {
	Service Policy  `json:"service"`
	Ceiling *Policy `json:"ceiling,omitempty"`
}

// digest is that of the effective policy.
func (e effective) digest() string { return runner.Digest(e) }

// smaller of two limits, where zero is no limit.
func smaller[T int64 | float64](a, b T) T {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}

func (e effective) resourceLimits() ResourceLimits {
	l := e.Service.ResourceLimits
	if e.Ceiling != nil {
		l.MemoryMB = smaller(l.MemoryMB, e.Ceiling.ResourceLimits.MemoryMB)
		l.TimeoutSeconds = smaller(l.TimeoutSeconds, e.Ceiling.ResourceLimits.TimeoutSeconds)
	}
	return l
}

// raisingMemory are the changes that allow a function of so many MB.
func (e effective) raisingMemory(size int64) []*runnerv1.PolicyChange {
	var changes []*runnerv1.PolicyChange
	_ = e.each(func(p *Policy, whose string) error {
		if limit := p.ResourceLimits.MemoryMB; limit > 0 && limit < size {
			changes = append(changes, runner.SetTo(whose == ceilingWhose, "resource_limits.memory_mb", size))
		}
		return nil
	})
	return changes
}

// capped says whether a policy bounds what may be spent.
func (e effective) capped() bool {
	return e.Service.CostLimits.MaxCostPerHour > 0 || e.Ceiling != nil && e.Ceiling.CostLimits.MaxCostPerHour > 0
}

// asksProvider says whether a policy limits what only the provider knows of a function.
func (e effective) asksProvider() bool {
	regions := e.Service.AllowedRegions != nil || e.Ceiling != nil && e.Ceiling.AllowedRegions != nil
	return regions || e.capped() || e.resourceLimits() != ResourceLimits{}
}

// authorizeDeployed checks what the function really is, as the provider tells it.
func (e effective) authorizeDeployed(d deployed, checks *runner.Checks) error {
	return e.each(func(p *Policy, whose string) error {
		if d.region != "" && p.AllowedRegions != nil {
			if err := allowed(checks, "allowed_regions", d.region, whose, p.AllowedRegions, nil); err != nil {
				return err
			}
		}
		if err := p.authorizeMemory(d.memoryMB, whose, checks); err != nil {
			return err
		}
		limit := seconds(p.ResourceLimits.TimeoutSeconds)
		if limit == 0 || d.timeout == 0 {
			return nil
		}
		subject := "the function's timeout of " + d.timeout.String()
		if d.timeout > limit {
			return checks.Deny("resource_limits.timeout_seconds", subject,
				fmt.Sprintf("%s allows %s, and the provider lets it run on when the attempt has ended; lower the function's timeout or raise the limit", whose, limit),
				runner.SetTo(whose == ceilingWhose, "resource_limits.timeout_seconds", d.timeout.Seconds()))
		}
		checks.Allow("resource_limits.timeout_seconds", subject)
		return nil
	})
}

// timeout is the longest time of one attempt, zero for no limit.
func (e effective) timeout() time.Duration {
	return seconds(e.resourceLimits().TimeoutSeconds)
}

// Whose a policy is, in messages.
const (
	serviceWhose = "the service's security_policy"
	ceilingWhose = "the operator's ceiling (--policy of the runner)"
)

// each calls f for the service's policy and for the ceiling, until an error.
func (e effective) each(f func(p *Policy, whose string) error) error {
	if err := f(&e.Service, serviceWhose); err != nil {
		return err
	}
	if e.Ceiling == nil {
		return nil
	}
	return f(e.Ceiling, ceilingWhose)
}

// authorize checks what is about to be called, where.
func (e effective) authorize(c Config, target endpoint, checks *runner.Checks) error {
	err := e.each(func(p *Policy, whose string) error {
		if err := allowed(checks, "allowed_providers", c.Provider, whose, p.AllowedProviders, nil); err != nil {
			return err
		}
		if err := p.authorizeRegion(c, whose, checks); err != nil {
			return err
		}
		host, port := target.hostPort()
		match := func(entry string) bool { return matchHost(entry, host, port) }
		if err := allowed(checks, "allowed_endpoints", net.JoinHostPort(host, port), whose, p.AllowedEndpoints, match); err != nil {
			return err
		}
		if role := c.AuthConfig.RoleARN; role != "" && p.AllowedRoles != nil {
			if err := allowed(checks, "allowed_roles", role, whose, p.AllowedRoles, func(entry string) bool {
				prefix, wild := strings.CutSuffix(entry, "*")
				return entry == role || wild && strings.HasPrefix(role, prefix)
			}); err != nil {
				return err
			}
		}
		return p.authorizeMemory(c.MemoryMB, whose, checks)
	})
	if err != nil {
		return err
	}
	if err := e.authorizeInside(c, target, checks); err != nil {
		return err
	}
	return e.authorizeScope(c, target, checks)
}

// publicOnly: the operator has a ceiling and names no endpoint in it, so that no registry leads
// the runner to what is only reached from where it stands.
func (e effective) publicOnly() bool { return e.Ceiling != nil && e.Ceiling.AllowedEndpoints == nil }

// authorizeInside holds endpoints at loopback and private addresses against the ceiling. Names
// that lead there are found when they are connected to.
func (e effective) authorizeInside(c Config, target endpoint, checks *runner.Checks) error {
	if c.Endpoint == "" {
		return nil
	}
	host, port := target.hostPort()
	inside := target.loopback
	addr, err := netip.ParseAddr(host)
	if !e.publicOnly() {
		if err != nil || target.loopback {
			return nil
		}
		if refused := reachEndpoint.checkAddr(addr); refused != nil {
			return checks.Deny("allowed_endpoints", net.JoinHostPort(host, port), refused.Error()+", to which no endpoint may lead")
		}
		return nil
	}
	if err == nil {
		inside = inside || reachPublic.checkAddr(addr) != nil
	}
	if !inside {
		return nil
	}
	return checks.Deny("allowed_endpoints", net.JoinHostPort(host, port), "it is not a public address; "+mendCeiling(host), runner.AddTo(true, "allowed_endpoints", host))
}

// mendCeiling is what allows an endpoint inside.
func mendCeiling(host string) string {
	return fmt.Sprintf("where that is meant, the operator adds %q to allowed_endpoints of the ceiling (--policy of the runner)", host)
}

// authorizeScope keeps the token for an application of one's own from hosts that anybody may have
// written into a registry: it goes to Azure's function apps and to hosts that the operator names.
func (e effective) authorizeScope(c Config, target endpoint, checks *runner.Checks) error {
	if !asksEntra(c, target) || !strings.HasPrefix(c.AuthConfig.Scope, "api://") {
		return nil
	}
	host, port := target.hostPort()
	named := e.Ceiling != nil && e.Ceiling.AllowedEndpoints != nil // and authorize has found the host in it
	if strings.HasSuffix(host, ".azurewebsites.net") || named {
		return nil
	}
	return checks.Deny("allowed_endpoints", net.JoinHostPort(host, port),
		fmt.Sprintf("a token for %s goes to *.azurewebsites.net alone; %s", clip(c.AuthConfig.Scope, 200), mendCeiling(host)), runner.AddTo(true, "allowed_endpoints", host))
}

// authorizeEnvVar checks that a variable of the runner may be read.
func (e effective) authorizeEnvVar(variable string, checks *runner.Checks) error {
	return e.each(func(p *Policy, whose string) error {
		if p.AllowedEnvVars == nil {
			return nil
		}
		return allowed(checks, "allowed_env_vars", variable, whose, p.AllowedEnvVars, func(entry string) bool {
			if prefix, wild := strings.CutSuffix(entry, "*"); wild {
				return strings.HasPrefix(variable, prefix)
			}
			return entry == variable
		})
	})
}

func (p *Policy) authorizeRegion(c Config, whose string, checks *runner.Checks) error {
	if c.Region == "" && p.AllowedRegions != nil {
		// Without the name nothing can be compared, so nothing is allowed.
		return checks.Deny("allowed_regions", "a function without a region", "write region: in runner_config, one of "+strings.Join(p.AllowedRegions, ", "))
	}
	if c.Region == "" {
		return nil
	}
	return allowed(checks, "allowed_regions", c.Region, whose, p.AllowedRegions, nil)
}

func (p *Policy) authorizeMemory(memoryMB int64, whose string, checks *runner.Checks) error {
	limit := p.ResourceLimits.MemoryMB
	if limit == 0 || memoryMB == 0 {
		return nil
	}
	subject := fmt.Sprintf("%d MB", memoryMB)
	if memoryMB > limit {
		return checks.Deny("resource_limits.memory_mb", subject, fmt.Sprintf("%s allows %d MB; lower memory_mb or raise the limit", whose, limit), runner.SetTo(whose == ceilingWhose, "resource_limits.memory_mb", memoryMB))
	}
	checks.Allow("resource_limits.memory_mb", subject)
	return nil
}

// allowed checks a subject against a list; a nil list allows. match is == where nil.
func allowed(checks *runner.Checks, rule, subject, whose string, list []string, match func(string) bool) error {
	if match == nil {
		match = func(entry string) bool { return entry == subject }
	}
	if list == nil || slices.ContainsFunc(list, match) {
		checks.Allow(rule, subject)
		return nil
	}
	return checks.Deny(rule, subject, fmt.Sprintf("%s allows %s; add %q", whose, listing(list), subject), runner.AddTo(whose == ceilingWhose, rule, subject))
}

func listing(list []string) string {
	if len(list) == 0 {
		return "nothing"
	}
	return clip(strings.Join(list, ", "), 300)
}

// seconds turns seconds into a duration, without overflow.
func seconds(s float64) time.Duration {
	const most = 24 * time.Hour
	if s >= most.Seconds() {
		return most
	}
	return time.Duration(s * float64(time.Second))
}

// ParseCeiling reads the operator's ceiling; nil for no text. Everything wrong in it is
// reported at once.
func ParseCeiling(raw json.RawMessage) (*Policy, error) {
	if len(raw) == 0 {
		return nil, nil
	}
	var errs []error
	for _, p := range runner.CheckSchema(runner.SchemaOf[Policy](), raw, "") {
		errs = append(errs, fmt.Errorf("%s: %s; %s", p.Path, p.Message, p.Mend))
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	p, err := runner.Decode[Policy](raw)
	if err != nil {
		return nil, fmt.Errorf("decode: %w", err)
	}
	for _, problem := range p.faults("") {
		errs = append(errs, fmt.Errorf("%s: %s; %s", problem.Path, problem.Message, problem.Mend))
	}
	return &p, errors.Join(errs...)
}

// faults lists what is wrong with a policy beyond its schema.
func (p *Policy) faults(at string) []runner.Problem {
	f := faultList{}
	for i, provider := range p.AllowedProviders {
		if !knownProvider(provider) {
			f.add(fmt.Sprintf("%sallowed_providers[%d]", at, i), fmt.Sprintf("%q is not a provider", clip(provider, 40)), "write one of "+strings.Join(providers(), ", "))
		}
	}
	for i, entry := range p.AllowedEnvVars {
		if !envEntry.MatchString(entry) {
			f.add(fmt.Sprintf("%sallowed_env_vars[%d]", at, i), fmt.Sprintf("%q is not the name of a variable", clip(entry, 40)), "write a name such as NOTIFY_KEY, or the beginning of names such as NOTIFY_*")
		}
	}
	return f.list
}
