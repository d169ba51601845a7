package httprunner

import (
	"context"
	"errors"
	"net/netip"
	"net/url"
	"strconv"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

var _ runner.Checker = (*Runner)(nil)

// Check implements [runner.Checker]. The request is made of the recorded input; the addresses are
// those that were connected to, the hosts of redirects those that were followed.
func (r *Runner) Check(_ context.Context, job *runner.RecordedJob) (*runner.CheckResult, error) {
	c := &call{runner: r, job: &job.Job, checks: &runner.Checks{}}
	res := &runner.CheckResult{}
	err := c.checkRecorded(job, res)
	if err != nil {
		if err.Code == fault.Validation {
			res.Unknown = append(res.Unknown, "the request cannot be made as it was then: "+err.Message)
		} else {
			res.Err = err
		}
	}
	res.Checks = c.checks.Context("").GetChecks()
	return res, nil
}

func (c *call) checkRecorded(job *runner.RecordedJob, res *runner.CheckResult) *fault.Error {
	p, err := c.runner.planFor(&job.Service, &job.Operation)
	if err != nil {
		return err
	}
	c.plan = p
	in, err := readInput(job.Input)
	if err != nil {
		return err
	}
	m, err := c.compose(in)
	if err != nil {
		return err
	}
	if err := p.policy.check(c.checks, m.target, p.base.target.host); err != nil {
		return err
	}
	for _, name := range c.envVars() {
		if err := p.policy.checkEnvVar(c.checks, name); err != nil {
			return err
		}
	}
	if err := c.checkRedirects(job, m.target, res); err != nil {
		return err
	}
	if err := c.checkDialled(job, m.target, res); err != nil {
		return err
	}
	if p.policy.ratePerMinute > 0 || p.policy.ceilingPerMinute > 0 {
		res.Unknown = append(res.Unknown, "rate_limit_per_minute: jobs are looked at one by one, not at how many came within a minute")
	}
	return c.checkAnswer(job, res)
}

// envVars are the variables that the call's credentials and CAs are in.
func (c *call) envVars() []string {
	a := c.plan.auth
	var used []string
	for _, name := range []string{
		c.plan.config.CAEnvVar, a.TokenEnvVar, a.UsernameEnvVar, a.PasswordEnvVar, a.APIKeyEnvVar, a.ClientIDEnvVar, a.ClientSecretEnvVar,
		a.AccessKeyIDEnvVar, a.SecretAccessKeyEnvVar, a.SessionTokenEnvVar,
	} {
		if name != "" {
			used = append(used, name)
		}
	}
	return used
}

// checkRedirects checks the hosts that the call was sent on to. The ports are recorded where the policy
// of then looked at them.
func (c *call) checkRedirects(job *runner.RecordedJob, first target, res *runner.CheckResult) *fault.Error {
	seen := map[string]bool{first.host: true}
	for _, at := range job.Subjects("allowed_ports") {
		if u, err := url.Parse("http://" + at); err == nil {
			if t, ferr := targetOf(u); ferr == nil && !seen[t.host] {
				seen[t.host] = true
				if err := c.plan.policy.check(c.checks, t, c.plan.base.target.host); err != nil {
					return err
				}
			}
		}
	}
	hosts := *c.plan.policy
	ports := false
	hosts.rules = nil
	for _, r := range c.plan.policy.rules {
		ports = ports || r.ports != nil
		r.ports = nil
		hosts.rules = append(hosts.rules, r)
	}
	for _, host := range job.Subjects("allowed_domains") {
		if seen[host] {
			continue
		}
		seen[host] = true
		if ports {
			res.Unknown = append(res.Unknown, "allowed_ports: the port of the redirect to "+clip(host)+" is not recorded")
		}
		if err := hosts.check(c.checks, target{host: host}, c.plan.base.target.host); err != nil {
			return err
		}
	}
	return nil
}

// checkDialled checks the addresses that were connected to, or that the policy of then kept from it.
func (c *call) checkDialled(job *runner.RecordedJob, first target, res *runner.CheckResult) *fault.Error {
	_, err := netip.ParseAddr(first.host)
	literal := err == nil
	known := false
	for _, check := range job.Checks {
		if check.GetRule() != "allow_private_networks" {
			continue
		}
		address := dialled(check)
		if address == "" {
			continue
		}
		known = true
		refused := checkAddress(address, c.plan.policy.allowPrivate, literal)
		if e, ok := errors.AsType[*addressError](refused); ok {
			return c.refuseAddress(e, first.host+" at "+e.address)
		}
		c.checks.Allow("allow_private_networks", address)
	}
	if !known {
		res.Unknown = append(res.Unknown, "allow_private_networks: the address that "+clip(first.host)+" leads to is not recorded, as no new connection was made")
	}
	return nil
}

// dialled is the address in a check: the whole subject, or what follows the host of one that was refused.
func dialled(check *runnerv1.PolicyCheck) string {
	text := check.GetSubject()
	for i := range len(text) {
		if i == 0 || text[i-1] == ' ' {
			if _, err := netip.ParseAddrPort(text[i:]); err == nil {
				return text[i:]
			}
		}
	}
	return ""
}

// checkAnswer compares the size of the recorded answer.
func (c *call) checkAnswer(job *runner.RecordedJob, res *runner.CheckResult) *fault.Error {
	const rule = "max_response_size"
	size := job.Usage.ResponseBytes
	if size == nil {
		if job.ErrorCode == "" || job.DeniedBy(rule) {
			res.Unknown = append(res.Unknown, rule+": the size of the answer is not recorded")
		} else if job.DeniedBy("allowed_domains") || job.DeniedBy("allow_private_networks") || job.DeniedBy("allowed_ports") {
			res.Unknown = append(res.Unknown, "the call was not made then: where it is sent on to, and how large the answer is, is not known")
		}
		return nil
	}
	if int64(*size) > c.plan.policy.maxResponse {
		return c.tooLarge(&message{method: c.plan.method, url: c.plan.base.url}, sizeText(*size), int64(*size))
	}
	c.checks.Allow(rule, sizeText(*size))
	return nil
}

func sizeText(bytes float64) string { return strconv.FormatFloat(bytes, 'f', 0, 64) + " bytes" }
