package serverlessrunner

import (
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/require"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

// TestCheck: what a policy says of invocations of the past, and what would allow them.
func TestCheck(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		policy, ceiling string
		checks          []*runnerv1.PolicyCheck
		rule            string
		change          string
		ceilings        bool
		unknown         string
	}{
		"allowed":          {policy: `{}`},
		"another provider": {policy: `{"allowed_providers": ["gcp"]}`, rule: "allowed_providers", change: `"aws"`},
		"another region":   {policy: `{"allowed_regions": ["us-east-1"]}`, rule: "allowed_regions", change: `"eu-west-1"`},
		"the operator's":   {policy: `{}`, ceiling: `{"allowed_regions": ["us-east-1"]}`, rule: "allowed_regions", change: `"eu-west-1"`, ceilings: true},
		"too much memory": {
			policy: `{"resource_limits": {"memory_mb": 256}}`, checks: []*runnerv1.PolicyCheck{{Rule: "resource_limits.memory_mb", Subject: "512 MB", Allowed: true}},
			rule: "resource_limits.memory_mb", change: "512",
		},
		"memory that nobody looked at": {policy: `{"resource_limits": {"memory_mb": 256}}`, unknown: "the function's memory is not recorded"},
		"a timeout":                    {policy: `{"resource_limits": {"timeout_seconds": 5}}`, unknown: "the function's own timeout is not recorded"},
		"a budget":                     {policy: `{"cost_limits": {"max_cost_per_hour": 1}}`, unknown: "not at what an hour cost"},
		"no policy":                    {policy: `{"allowed_regions": 1}`, unknown: "cannot be made as it was then"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ceiling, err := ParseCeiling(json.RawMessage(c.ceiling))
			require.NoError(t, err)
			r, err := New(Options{Ceiling: ceiling})
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, r.Close()) })
			job := &runner.RecordedJob{Checks: c.checks, Usage: &runnerv1.ResourceUsage{}}
			job.Service = runner.Service{
				Name: "fn", ExecutionType: "serverless", Policy: json.RawMessage(c.policy), Config: json.RawMessage(`{"provider": "aws", "function_name": "f", "region": "eu-west-1"}`),
			}
			job.Operation, job.Input = runner.Operation{Name: "call", Config: json.RawMessage(`{}`)}, json.RawMessage(`{}`)
			res, err := r.Check(t.Context(), job)
			require.NoError(t, err)
			if c.unknown != "" {
				require.Len(t, res.Unknown, 1)
				require.Contains(t, res.Unknown[0], c.unknown)
			}
			if c.rule == "" {
				require.NoError(t, res.Err)
				return
			}
			require.Equal(t, fault.PolicyViolation, fault.From(res.Err).Code)
			denied := res.Checks[len(res.Checks)-1]
			require.Equal(t, c.rule, denied.GetRule())
			require.Len(t, denied.GetAllowedBy(), 1)
			change := denied.GetAllowedBy()[0]
			value := change.GetSet()
			if len(change.GetAdd()) > 0 {
				value = change.GetAdd()[0]
			}
			raw, err := value.MarshalJSON()
			require.NoError(t, err)
			require.Equal(t, c.change, string(raw))
			require.Equal(t, c.ceilings, change.GetCeiling())
		})
	}
}
