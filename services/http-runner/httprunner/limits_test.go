package httprunner

import (
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

// TestLimits: the registry's rate is the service's, the operator's is the origin's.
func TestLimits(t *testing.T) {
	t.Parallel()
	rec := record(t, nil)
	limits := func(r *Runner, a attempt) []runner.Limit {
		j := a.job(t)
		s := j.Service
		s.Operations = []runner.Operation{j.Operation}
		got, err := r.Limits(t.Context(), &s)
		require.NoError(t, err)
		return got
	}
	plain := newRunner(t, Options{})
	require.Empty(t, limits(plain, attempt{config: object{"base_url": rec.URL}}))
	require.Empty(t, limits(plain, attempt{config: object{"base_url": "ftp://x"}, policy: open(object{"rate_limit_per_minute": 5})}), "it cannot be called")
	rated := attempt{config: object{"base_url": rec.URL}, policy: open(object{"rate_limit_per_minute": 5})}
	want := runner.Limit{Key: "service/svc", Window: time.Minute, MaxAttempts: 5, Rule: "rate_limit_per_minute of svc in security_policy", AttemptsKey: "rate_limit_per_minute"}
	require.Equal(t, []runner.Limit{want}, limits(plain, rated))
	held := newRunner(t, Options{Ceiling: &Policy{AllowPrivateNetworks: true, RateLimitPerMinute: 3}})
	got := limits(held, rated)
	require.Len(t, got, 2)
	require.Equal(t, "origin/"+rec.URL, got[1].Key)
	require.EqualValues(t, 3, got[1].MaxAttempts)
}

// TestUnusedAndCloses: what the attempt says of its slots.
func TestUnusedAndCloses(t *testing.T) {
	t.Parallel()
	busy := record(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "7")
		w.WriteHeader(http.StatusTooManyRequests)
	})
	r := newRunner(t, Options{})
	result := attempt{config: object{"base_url": busy.URL}}.run(t.Context(), t, r)
	require.True(t, result.Closes)
	require.False(t, result.Unused)
	require.Equal(t, 7*time.Second, fault.From(result.Err).RetryAfter)

	result = attempt{config: object{"base_url": busy.URL}, policy: object{}}.run(t.Context(), t, newRunner(t, Options{Ceiling: &Policy{AllowedDomains: []string{"example.com"}}}))
	require.Equal(t, fault.PolicyViolation, fault.From(result.Err).Code)
	require.True(t, result.Unused, "nothing was sent")
	require.False(t, result.Closes)

	// An open breaker refuses without a call, and closes the service for as long.
	broken := record(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) })
	a := attempt{config: object{"base_url": broken.URL}, policy: open(object{"circuit_breaker": object{"failure_threshold": 1, "recovery_timeout": 60}})}
	result = a.run(t.Context(), t, r)
	require.False(t, result.Unused || result.Closes)
	result = a.run(t.Context(), t, r)
	require.True(t, result.Unused)
	require.True(t, result.Closes)
	require.Positive(t, fault.From(result.Err).RetryAfter)
	require.Len(t, broken.all(), 1)
}
