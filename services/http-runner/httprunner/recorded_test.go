package httprunner

import (
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/require"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

// TestCheck: what a policy says of calls of the past, and which changes of both policies would allow them.
func TestCheck(t *testing.T) {
	t.Parallel()
	dialled := func(address string) []*runnerv1.PolicyCheck {
		return []*runnerv1.PolicyCheck{{Rule: "allow_private_networks", Subject: address, Allowed: true}}
	}
	public := dialled("93.184.216.34:443")
	for name, c := range map[string]struct {
		policy, ceiling, operation, input string
		checks                            []*runnerv1.PolicyCheck
		usage                             *runnerv1.ResourceUsage
		code                              fault.Code
		rule                              string
		allowedBy                         []*runnerv1.PolicyChange
		unknown                           string
	}{
		"allowed": {policy: `{}`, checks: public, usage: &runnerv1.ResourceUsage{ResponseBytes: new(10.0)}},
		"another host": {
			policy: `{"allowed_domains": ["a.example"]}`, checks: public, code: fault.PolicyViolation, rule: "allowed_domains",
			allowedBy: []*runnerv1.PolicyChange{runner.AddTo(false, "allowed_domains", "api.example.com")},
		},
		"another host and port, of both": {
			policy: `{"allowed_domains": ["a.example"], "allowed_ports": [8443]}`, ceiling: `{"allowed_domains": ["b.example"]}`, checks: public,
			code: fault.PolicyViolation, rule: "allowed_domains",
			allowedBy: []*runnerv1.PolicyChange{
				runner.AddTo(false, "allowed_domains", "api.example.com"), runner.AddTo(false, "allowed_ports", 443), runner.AddTo(true, "allowed_domains", "api.example.com"),
			},
		},
		"a redirect": {
			policy: `{}`, checks: append(public, &runnerv1.PolicyCheck{Rule: "allowed_domains", Subject: "cdn.example.net", Allowed: true}),
			code: fault.PolicyViolation, rule: "allowed_domains", allowedBy: []*runnerv1.PolicyChange{runner.AddTo(false, "allowed_domains", "api.example.com", "cdn.example.net")},
		},
		"a redirect's port": {
			policy: `{"allowed_domains": ["*.example.com", "cdn.example.net"], "allowed_ports": [443]}`,
			checks: append(public, &runnerv1.PolicyCheck{Rule: "allowed_domains", Subject: "cdn.example.net", Allowed: true}), unknown: "the port of the redirect to cdn.example.net",
		},
		"a private address": {
			policy: `{}`, checks: dialled("10.0.0.7:443"), code: fault.PolicyViolation, rule: "allow_private_networks",
			allowedBy: []*runnerv1.PolicyChange{runner.SetTo(false, "allow_private_networks", true)},
		},
		"a private address, of both": {
			policy: `{}`, ceiling: `{}`, checks: dialled("10.0.0.7:443"), code: fault.PolicyViolation, rule: "allow_private_networks",
			allowedBy: []*runnerv1.PolicyChange{runner.SetTo(false, "allow_private_networks", true), runner.SetTo(true, "allow_private_networks", true)},
		},
		"a private address that is allowed": {policy: `{"allow_private_networks": true}`, checks: dialled("10.0.0.7:443")},
		"one that was refused then": {
			policy: `{"allow_private_networks": true}`, checks: []*runnerv1.PolicyCheck{{Rule: "allow_private_networks", Subject: "api.example.com at 10.0.0.7:443"}},
			unknown: "the call was not made then",
		},
		"no address":         {policy: `{}`, unknown: "the address that api.example.com leads to"},
		"a metadata address": {policy: `{"allow_private_networks": true}`, checks: dialled("169.254.169.254:80"), code: fault.PolicyViolation, rule: "allow_private_networks"},
		"a large request": {
			policy: `{"max_request_size": 10}`, input: `{"text": "more than ten bytes"}`, code: fault.PolicyViolation, rule: "max_request_size",
			allowedBy: []*runnerv1.PolicyChange{runner.SetTo(false, "max_request_size", 31)},
		},
		"a large answer": {
			policy: `{"max_response_size": 10}`, ceiling: `{"max_response_size": 20, "allow_private_networks": true}`, checks: public, usage: &runnerv1.ResourceUsage{ResponseBytes: new(30.0)},
			code: fault.ResourceExceeded, rule: "max_response_size",
			allowedBy: []*runnerv1.PolicyChange{runner.SetTo(false, "max_response_size", 30), runner.SetTo(true, "max_response_size", 30)},
		},
		"a rate":            {policy: `{"rate_limit_per_minute": 1}`, checks: public, unknown: "rate_limit_per_minute"},
		"a variable":        {policy: `{}`, ceiling: `{"allowed_env_vars": ["A_*"]}`, checks: public, code: fault.PolicyViolation, rule: "allowed_env_vars", allowedBy: []*runnerv1.PolicyChange{runner.AddTo(true, "allowed_env_vars", "TOKEN")}},
		"an impossible one": {policy: `{}`, operation: `{"path": "/{id}"}`, unknown: "the request cannot be made as it was then"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ceiling, err := ReadPolicy(json.RawMessage(c.ceiling))
			require.NoError(t, err)
			r, err := New(Options{Ceiling: ceiling})
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, r.Close()) })
			job := &runner.RecordedJob{Checks: c.checks, Usage: &runnerv1.ResourceUsage{}}
			if c.usage != nil {
				job.Usage = c.usage
			}
			for _, check := range c.checks {
				if !check.GetAllowed() {
					job.ErrorCode = fault.PolicyViolation
				}
			}
			job.Service = runner.Service{
				Name: "api", ExecutionType: "http", Policy: json.RawMessage(c.policy),
				Config: json.RawMessage(`{"base_url": "https://api.example.com", "auth_type": "bearer", "auth_config": {"token_env_var": "TOKEN"}}`),
			}
			job.Operation = runner.Operation{Name: "op", Config: json.RawMessage(`{}`)}
			if c.operation != "" {
				job.Operation.Config = json.RawMessage(c.operation)
			}
			if job.Input = json.RawMessage(c.input); c.input == "" {
				job.Input = json.RawMessage(`{}`)
			}
			res, err := r.Check(t.Context(), job)
			require.NoError(t, err)
			if c.unknown != "" {
				require.Contains(t, join(res.Unknown), c.unknown)
			}
			if c.code == "" {
				require.NoError(t, res.Err)
				return
			}
			require.Equal(t, c.code, fault.From(res.Err).Code, res.Err)
			denied := res.Checks[len(res.Checks)-1]
			require.Equal(t, c.rule, denied.GetRule())
			require.Equal(t, text(c.allowedBy), text(denied.GetAllowedBy()))
		})
	}
}

func join(texts []string) (all string) {
	for _, t := range texts {
		all += t + "\n"
	}
	return all
}

// text writes changes so that they compare whatever the kinds of their numbers were.
func text(changes []*runnerv1.PolicyChange) []string {
	var out []string
	for _, c := range changes {
		line := c.GetKey()
		if c.GetCeiling() {
			line = "ceiling " + line
		}
		for _, v := range c.GetAdd() {
			line += " +" + v.String()
		}
		if c.GetSet() != nil {
			line += " =" + c.GetSet().String()
		}
		out = append(out, line)
	}
	return out
}
