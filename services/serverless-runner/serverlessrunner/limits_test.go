package serverlessrunner

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/runner"
)

func limitsOf(t *testing.T, r *Runner, config, policy object) []runner.Limit {
	t.Helper()
	j := newJob(t, config, policy, nil)
	s := j.Service
	s.Operations = []runner.Operation{j.Operation}
	limits, err := r.Limits(t.Context(), &s)
	require.NoError(t, err)
	return limits
}

// TestLimits: what a call can cost at most is what Lambda says of the function, or the most of any.
func TestLimits(t *testing.T) {
	awsKeys(t)
	url := toldLambda(t, `{"MemorySize":1024,"Timeout":50}`, 200, nil, `{}`)
	untold := toldLambda(t, "", 200, nil, `{}`)
	caps := object{"cost_limits": object{"max_cost_per_hour": 3, "max_invocations_per_hour": 100}}
	r := newRunner(t, Options{})
	require.Empty(t, limitsOf(t, r, lambdaConfig(url), nil))
	require.Empty(t, limitsOf(t, r, object{"provider": "nobody"}, caps), "it cannot be called")

	limits := limitsOf(t, r, lambdaConfig(url), caps)
	require.Len(t, limits, 1)
	require.InDelta(t, 0.0000002+0.0000166667*60, limits[0].Cost, 1e-9)
	limits[0].Cost = 0
	require.Equal(t, runner.Limit{
		Key: "service/images", Window: time.Hour, MaxAttempts: 100, MaxCost: 3, Budget: true, Rule: "cost_limits of images in its security_policy",
		AttemptsKey: "cost_limits.max_invocations_per_hour", CostKey: "cost_limits.max_cost_per_hour",
	}, limits[0])
	require.InDelta(t, 0.0000002+0.0000166667*910*10, limitsOf(t, r, lambdaConfig(untold), caps)[0].Cost, 1e-9)

	ceiling := newRunner(t, Options{Ceiling: &Policy{AllowedEndpoints: []string{"127.0.0.1"}, CostLimits: CostLimits{MaxInvocationsPerHour: 7}}})
	both := limitsOf(t, ceiling, lambdaConfig(url), caps)
	require.Len(t, both, 2)
	require.Equal(t, "all", both[1].Key)
	require.EqualValues(t, 7, both[1].MaxAttempts)
}

// TestReservedForLess: a function that grew since its cost was reserved is not called.
func TestReservedForLess(t *testing.T) {
	awsKeys(t)
	url := toldLambda(t, `{"MemorySize":10240,"Timeout":50}`, 200, nil, `{}`)
	r := newRunner(t, Options{})
	j := newJob(t, lambdaConfig(url), object{"cost_limits": object{"max_cost_per_hour": 3}}, nil)
	j.ReservedCost = new(0.001)
	result, _ := execute(t, r, j)
	require.True(t, result.LimitsChanged)
	require.True(t, result.Unused)
	require.Nil(t, result.Usage.StatusCode, "nothing was called")
	j.ReservedCost = new(0.02)
	result, _ = execute(t, r, j)
	require.NoError(t, result.Err)
	require.False(t, result.Unused || result.LimitsChanged)
}
