package httprunner

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/idna"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

// effective is the policy in force for a service: the registry's narrowed by the operator's
// ceiling. Both must allow what is allowed, of limits the smaller holds.
type effective struct {
	digest       string
	rules        []ruleSet
	allowPrivate bool
	// privateBy names the policy that forbids private networks.
	privateBy        string
	maxRequest       int64
	maxResponse      int64
	ratePerMinute    int // of the service, by its own policy
	ceilingPerMinute int // of the origin, by the operator's
	breakerThreshold int // 0: no breaker
	breakerRecovery  time.Duration
	// service and ceiling are the two policies; ceiling may be nil.
	service, ceiling *Policy
}

// ruleSet is what one of the two policies says of targets.
type ruleSet struct {
	name string // where to mend: security_policy or the runner's policy
	// ceiling: it is the operator's.
	ceiling bool
	// envVars nil: any.
	envVars []string
	// domains nil: any for the ceiling, the target's own host for the registry's policy.
	domains []string
	ownHost bool
	ports   []int
}

// ReadPolicy reads a policy from JSON, such as the operator's ceiling; nil for none.
func ReadPolicy(raw json.RawMessage) (*Policy, error) {
	if len(raw) == 0 {
		return nil, nil // no ceiling is not an error
	}
	p, err := runner.Decode[Policy](raw)
	if err != nil {
		return nil, err // says the place already
	}
	wrong := problems{list: runner.CheckSchema(runner.SchemaOf[Policy](), raw, "")}
	wrong.checkPolicy("", &p)
	if len(wrong.list) > 0 {
		w := wrong.list[0]
		return nil, fault.New(fault.Validation, "%s: %s; %s", strings.TrimPrefix(w.Path, "."), w.Message, w.Mend)
	}
	return &p, nil
}

const (
	registryName = "security_policy"
	ceilingName  = "the runner's own policy (--policy)"
)

// narrow joins the two policies; ceiling may be nil. All lists are taken as checked by
// [checkPolicy].
func narrow(p, ceiling *Policy) *effective {
	e := &effective{
		digest:       digestOf(p, ceiling),
		allowPrivate: p.AllowPrivateNetworks,
		privateBy:    registryName,
		maxRequest:   defaultMaxBytes,
		maxResponse:  defaultMaxBytes,
		service:      p,
		ceiling:      ceiling,
	}
	e.rules = append(e.rules, ruleSet{name: registryName, domains: p.AllowedDomains, ownHost: p.AllowedDomains == nil, ports: p.AllowedPorts, envVars: p.AllowedEnvVars})
	if p.MaxRequestSize > 0 {
		e.maxRequest = min(p.MaxRequestSize, maxRequestBytes)
	}
	if p.MaxResponseSize > 0 {
		e.maxResponse = min(p.MaxResponseSize, maxResponseBytes)
	}
	e.ratePerMinute = p.RateLimitPerMinute
	e.breaker(p.CircuitBreaker)
	if ceiling == nil {
		return e
	}
	e.rules = append(e.rules, ruleSet{name: ceilingName, ceiling: true, domains: ceiling.AllowedDomains, ports: ceiling.AllowedPorts, envVars: ceiling.AllowedEnvVars})
	if e.allowPrivate && !ceiling.AllowPrivateNetworks {
		e.allowPrivate, e.privateBy = false, ceilingName
	}
	if ceiling.MaxRequestSize > 0 {
		e.maxRequest = min(e.maxRequest, ceiling.MaxRequestSize)
	}
	if ceiling.MaxResponseSize > 0 {
		e.maxResponse = min(e.maxResponse, ceiling.MaxResponseSize)
	}
	e.ceilingPerMinute = ceiling.RateLimitPerMinute
	e.breaker(ceiling.CircuitBreaker)
	return e
}

// digestOf names a pair of policies. A list that allows nothing differs from one that is absent.
func digestOf(p, ceiling *Policy) string {
	type listed struct {
		*Policy
		Domains *[]string `json:"allowed_domains,omitempty"`
		Ports   *[]int    `json:"allowed_ports,omitempty"`
	}
	shown := func(p *Policy) *listed {
		if p == nil {
			return nil
		}
		l := &listed{Policy: p}
		if p.AllowedDomains != nil {
			l.Domains = &p.AllowedDomains
		}
		if p.AllowedPorts != nil {
			l.Ports = &p.AllowedPorts
		}
		return l
	}
	return runner.Digest(struct {
		Policy  *listed `json:"security_policy"`
		Ceiling *listed `json:"ceiling,omitempty"`
	}{shown(p), shown(ceiling)})
}

func (e *effective) breaker(b *CircuitBreaker) {
	if b == nil {
		return
	}
	threshold, recovery := b.FailureThreshold, time.Duration(b.RecoveryTimeout*float64(time.Second))
	if threshold <= 0 {
		threshold = 5
	}
	if recovery <= 0 {
		recovery = 30 * time.Second
	}
	if e.breakerThreshold == 0 || threshold < e.breakerThreshold {
		e.breakerThreshold = threshold
	}
	e.breakerRecovery = max(e.breakerRecovery, recovery)
}

// target is a checked place to connect to.
type target struct {
	scheme, host string // host as normalised by [normalHost]
	port         int
}

func (t target) origin() string {
	host := t.host
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	return t.scheme + "://" + host + ":" + strconv.Itoa(t.port)
}

// targetOf reads the target of a URL and writes the normalised host back into it, so that what
// is checked is what is dialled.
func targetOf(u *url.URL) (target, *fault.Error) {
	t := target{scheme: strings.ToLower(u.Scheme)}
	switch t.scheme {
	case "http":
		t.port = 80
	case "https":
		t.port = 443
	default:
		return t, fault.New(fault.Validation, "%q is not an http or https URL", clip(withoutSecrets(u)))
	}
	if u.User != nil {
		return t, fault.New(fault.Validation, "the URL of %s holds a user name or password; use auth_type basic", clip(u.Hostname()))
	}
	if u.Opaque != "" {
		return t, fault.New(fault.Validation, "the URL has no host; write %s://host/path", t.scheme)
	}
	host, err := normalHost(u.Hostname())
	if err != nil {
		return t, err
	}
	t.host = host
	hostport := host
	if strings.Contains(host, ":") {
		hostport = "[" + host + "]"
	}
	if p := u.Port(); p != "" {
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil || n == 0 {
			return t, fault.New(fault.Validation, "%q is not a port; write one of 1 to 65535", clip(p))
		}
		t.port = int(n)
		hostport += ":" + strconv.FormatUint(n, 10)
	}
	u.Scheme, u.Host = t.scheme, hostport
	return t, nil
}

// hostProfile maps names to their ASCII form as browsers do, but lets underscores pass, which
// container networks use.
var hostProfile = idna.New(idna.MapForLookup(), idna.BidiRule(), idna.StrictDomainName(false))

// normalHost gives the lower-case ASCII form of a host name without the final dot, or the
// shortest form of an IP address.
func normalHost(host string) (string, *fault.Error) {
	if host == "" {
		return "", fault.New(fault.Validation, "the URL has no host")
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		if addr.Zone() != "" {
			return "", fault.New(fault.Validation, "the address %q has a zone; zones are not allowed", clip(host))
		}
		return addr.Unmap().String(), nil
	}
	ascii, err := hostProfile.ToASCII(host)
	if err == nil { // some forms are not accepted when they are read again, or become others: no name is
		again := ""
		if again, err = hostProfile.ToASCII(ascii); err == nil && !strings.EqualFold(again, ascii) {
			err = fmt.Errorf("it is also read as %q", clip(again))
		}
	}
	if err != nil {
		return "", fault.Wrap(err, fault.Validation, "%q is not a host name", clip(host))
	}
	ascii = strings.TrimSuffix(strings.ToLower(ascii), ".")
	if ascii == "" || len(ascii) > 253 || strings.Contains(ascii, "..") {
		return "", fault.New(fault.Validation, "%q is not a host name", clip(host))
	}
	for _, c := range []byte(ascii) {
		switch {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '.', c == '-', c == '_':
		default:
			return "", fault.New(fault.Validation, "%q is not a host name", clip(host))
		}
	}
	if addr, err := netip.ParseAddr(ascii); err == nil { // full-width digits and the like
		return addr.Unmap().String(), nil
	}
	if numeric(ascii[strings.LastIndexByte(ascii, '.')+1:]) {
		return "", fault.New(fault.Validation, "%q is an IPv4 address in a form that resolvers read in different ways; write four decimal numbers, such as 192.0.2.1", clip(host))
	}
	return ascii, nil
}

// numeric says whether the last label of a host makes it an IPv4 address to some resolvers:
// 2130706433, 0x7f.1, 0177.0.0.1, 127.1. No name ends so.
func numeric(label string) bool {
	if digits, ok := strings.CutPrefix(label, "0x"); ok {
		return strings.Trim(digits, "0123456789abcdef") == ""
	}
	return strings.Trim(label, "0123456789") == ""
}

// normalDomain is [normalHost] for an entry of allowed_domains.
func normalDomain(entry string) (string, error) {
	host, wild := strings.CutPrefix(entry, "*.")
	if strings.ContainsAny(host, "*/:@?# ") {
		if _, err := netip.ParseAddr(host); err != nil || wild {
			return "", fmt.Errorf("%q is not a domain", clip(entry))
		}
	}
	host, ferr := normalHost(host)
	if ferr != nil {
		return "", fmt.Errorf("%q is not a domain", clip(entry))
	}
	if !wild {
		return host, nil
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return "", fmt.Errorf("%q: an address has no subdomains", clip(entry))
	}
	return "*." + host, nil
}

// domainMatches says whether an entry in normal form covers a host in normal form.
func domainMatches(entry, host string) bool {
	if suffix, wild := strings.CutPrefix(entry, "*"); wild {
		return len(host) > len(suffix) && strings.HasSuffix(host, suffix)
	}
	return entry == host
}

// check asks both policies whether a target may be called. own is the host that the service
// itself names, which is allowed where the registry lists no domains.
func (e *effective) check(checks *runner.Checks, t target, own string) *fault.Error {
	port := strconv.Itoa(t.port)
	addr, _ := netip.ParseAddr(t.host)
	for _, r := range e.rules {
		switch {
		case e.allowPrivate && r.domains == nil && metadataAddress(addr):
			return checks.Deny("allowed_domains", t.host, fmt.Sprintf("it is a link-local or metadata address; where it is meant, list it in allowed_domains of %s", r.name), e.allowing(t, own)...)
		case r.ownHost && t.host != own:
			return checks.Deny("allowed_domains", t.host, fmt.Sprintf("without allowed_domains only the service's own host %s may be called; list both in %s.allowed_domains", own, r.name), e.allowing(t, own)...)
		case r.domains != nil && !slices.ContainsFunc(r.domains, func(d string) bool { return domainMatches(d, t.host) }):
			return checks.Deny("allowed_domains", t.host, fmt.Sprintf("allowed is %s; add %q to allowed_domains of %s", list(r.domains), t.host, r.name), e.allowing(t, own)...)
		case r.ports != nil && !slices.Contains(r.ports, t.port):
			return checks.Deny("allowed_ports", t.host+":"+port, fmt.Sprintf("allowed is %s; add %s to allowed_ports of %s", list(r.ports), port, r.name), e.allowing(t, own)...)
		}
	}
	checks.Allow("allowed_domains", t.host)
	if slices.ContainsFunc(e.rules, func(r ruleSet) bool { return r.ports != nil }) {
		checks.Allow("allowed_ports", t.host+":"+port)
	}
	return nil
}

// allowing are the changes of both policies that together allow a target.
func (e *effective) allowing(t target, own string) []*runnerv1.PolicyChange {
	var changes []*runnerv1.PolicyChange
	addr, _ := netip.ParseAddr(t.host)
	for _, r := range e.rules {
		switch {
		case e.allowPrivate && r.domains == nil && metadataAddress(addr), r.ownHost && t.host != own:
			entries := []any{t.host}
			if r.ownHost && own != t.host {
				entries = []any{own, t.host} // a list takes the place of the service's own host
			}
			changes = append(changes, runner.AddTo(r.ceiling, "allowed_domains", entries...))
		case r.domains != nil && !slices.ContainsFunc(r.domains, func(d string) bool { return domainMatches(d, t.host) }):
			changes = append(changes, runner.AddTo(r.ceiling, "allowed_domains", t.host))
		}
		if r.ports != nil && !slices.Contains(r.ports, t.port) {
			changes = append(changes, runner.AddTo(r.ceiling, "allowed_ports", t.port))
		}
	}
	return changes
}

// allowingPrivate are the changes that allow private networks.
func (e *effective) allowingPrivate() []*runnerv1.PolicyChange {
	return e.changing(func(p *Policy, ceiling bool) *runnerv1.PolicyChange {
		if p.AllowPrivateNetworks {
			return nil
		}
		return runner.SetTo(ceiling, "allow_private_networks", true)
	})
}

// allowingSize are the changes that allow a body of so many bytes; 0 is more than now, nobody
// knows by how much. None where it is more than any policy may allow.
func (e *effective) allowingSize(key string, size, most int64) []*runnerv1.PolicyChange {
	limit := func(p *Policy) int64 {
		if key == "max_request_size" {
			return p.MaxRequestSize
		}
		return p.MaxResponseSize
	}
	now := e.maxRequest
	if key == "max_response_size" {
		now = e.maxResponse
	}
	if size > most || now >= most {
		return nil
	}
	return e.changing(func(p *Policy, ceiling bool) *runnerv1.PolicyChange {
		own := limit(p)
		if own == 0 && !ceiling {
			own = defaultMaxBytes
		}
		switch {
		case own == 0, size > 0 && own >= size, size == 0 && own > now:
			return nil
		case size > 0:
			return runner.SetTo(ceiling, key, size)
		}
		return runner.RaiseAbove(ceiling, key, float64(own))
	})
}

// changing collects what has to change of each policy.
func (e *effective) changing(of func(p *Policy, ceiling bool) *runnerv1.PolicyChange) []*runnerv1.PolicyChange {
	var changes []*runnerv1.PolicyChange
	for _, p := range []*Policy{e.service, e.ceiling} {
		if p == nil {
			continue
		}
		if change := of(p, p == e.ceiling); change != nil {
			changes = append(changes, change)
		}
	}
	return changes
}

// checkEnvVar asks both policies whether a variable of the runner may be read.
func (e *effective) checkEnvVar(checks *runner.Checks, variable string) *fault.Error {
	listed := false
	for _, r := range e.rules {
		if r.envVars == nil {
			continue
		}
		listed = true
		if !slices.ContainsFunc(r.envVars, func(entry string) bool { return envVarMatches(entry, variable) }) {
			changes := e.changing(func(p *Policy, ceiling bool) *runnerv1.PolicyChange {
				if runner.EnvVarAllowed(p.AllowedEnvVars, variable) {
					return nil
				}
				return runner.AddTo(ceiling, "allowed_env_vars", variable)
			})
			return checks.Deny("allowed_env_vars", variable, fmt.Sprintf("allowed is %s; add %q to allowed_env_vars of %s", list(r.envVars), variable, r.name), changes...)
		}
	}
	if listed {
		checks.Allow("allowed_env_vars", variable)
	}
	return nil
}

// envVarMatches says whether an entry of allowed_env_vars, a name or PREFIX_*, covers a variable.
func envVarMatches(entry, variable string) bool {
	if prefix, wild := strings.CutSuffix(entry, "*"); wild {
		return strings.HasPrefix(variable, prefix)
	}
	return entry == variable
}

// list writes the first entries of a list.
func list[T any](entries []T) string {
	if len(entries) == 0 {
		return "nothing"
	}
	var b strings.Builder
	for i, x := range entries {
		if i == 10 {
			fmt.Fprintf(&b, " and %d more", len(entries)-i)
			break
		}
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprint(&b, x)
	}
	return b.String()
}

// withoutSecrets writes a URL without user name, query and fragment.
func withoutSecrets(u *url.URL) string {
	plain := url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath}
	return plain.String()
}

// clip shortens hostile text for a message.
func clip(s string) string {
	const most = 200
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}
