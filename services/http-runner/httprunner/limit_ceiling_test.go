package httprunner

import (
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/fault"
)

// TestCeilingOfTheRateHoldsForEveryName: whoever sends the jobs chooses the services' names.
func TestCeilingOfTheRateHoldsForEveryName(t *testing.T) {
	t.Parallel()
	rec := record(t, nil)
	r := newRunner(t, Options{Ceiling: &Policy{AllowPrivateNetworks: true, RateLimitPerMinute: 3}})
	call := func(i int) attempt {
		return attempt{name: "svc-" + strconv.Itoa(i), config: object{"base_url": rec.URL}}
	}
	for i := range 3 {
		call(i).ok(t, r)
	}
	err := call(3).fails(t, r, fault.RateLimited)
	require.True(t, err.Retryable)
	require.Positive(t, err.RetryAfter)
	require.Contains(t, err.Message, "--policy")
	require.Len(t, rec.all(), 3)
	other := record(t, nil)
	attempt{config: object{"base_url": other.URL}}.ok(t, r) // another origin has its own
}

// TestSlotIsGivenBack: a call that the operator's limit refuses costs the service nothing.
func TestSlotIsGivenBack(t *testing.T) {
	t.Parallel()
	rec := record(t, nil)
	r := newRunner(t, Options{Ceiling: &Policy{AllowPrivateNetworks: true, RateLimitPerMinute: 1}})
	a := attempt{config: object{"base_url": rec.URL}, policy: open(object{"rate_limit_per_minute": 2})}
	a.ok(t, r)
	for range 5 {
		require.Contains(t, a.fails(t, r, fault.RateLimited).Message, "--policy")
	}
	w, ok := r.windows.get(windowKey{service: "svc", most: 2})
	require.True(t, ok)
	require.Zero(t, w.take("", time.Now()), "one of two is free")
	require.Positive(t, w.take("", time.Now()))

	full := &window{most: 2}
	start := time.Now()
	for _, at := range []time.Duration{0, time.Second, time.Minute} {
		require.Zero(t, full.take("", start.Add(at)))
	}
	full.giveBack(start.Add(time.Minute))
	require.Zero(t, full.take("", start.Add(time.Minute)))
	require.Positive(t, full.take("", start.Add(time.Minute)))
	full.giveBack(start.Add(time.Hour)) // not the last one
	require.Positive(t, full.take("", start.Add(time.Minute)))
}
