package httprunner

import (
	"bytes"
	"context"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/fault"
)

// clock is a time that the test moves.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) read() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) move(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func TestStatuses(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	r := newRunner(t, Options{})
	r.now = func() time.Time { return now }
	tests := []struct {
		status     int
		retryAfter string
		codes      []int
		code       fault.Code
		retryable  bool
		after      time.Duration
	}{
		{400, "", nil, fault.RemoteError, false, 0},
		{401, "", nil, fault.RemoteError, false, 0},
		{402, "9", nil, fault.RemoteError, false, 0},
		{404, "", nil, fault.RemoteError, false, 0},
		{408, "", nil, fault.RemoteError, false, 0},
		{429, "", nil, fault.RateLimited, true, 0},
		{429, "30", nil, fault.RateLimited, true, 30 * time.Second},
		{429, "Sat, 21 Nov 2026 12:00:45 GMT", nil, fault.RateLimited, true, 45 * time.Second},
		{429, "Sat, 21 Nov 2026 11:00:00 GMT", nil, fault.RateLimited, true, 0},
		{429, "99999999999999", nil, fault.RateLimited, true, maxRetryAfter},
		{429, "-5", nil, fault.RateLimited, true, 0},
		{429, "soon", nil, fault.RateLimited, true, 0},
		{429, "30", []int{500}, fault.RateLimited, false, 0},
		{500, "", nil, fault.RemoteError, true, 0},
		{501, "", nil, fault.RemoteError, false, 0},
		{502, "", nil, fault.RemoteError, true, 0},
		{503, "2", nil, fault.RemoteError, true, 2 * time.Second},
		{504, "", nil, fault.RemoteError, true, 0},
		{409, "1", []int{409}, fault.RemoteError, true, time.Second},
		{500, "", []int{409}, fault.RemoteError, false, 0},
		{500, "", []int{}, fault.RemoteError, false, 0},
	}
	for _, tt := range tests {
		rec := record(t, answer(tt.status, "application/json", `{"error":{"message":"card declined"}}`, "Retry-After", tt.retryAfter))
		a := attempt{config: object{"base_url": rec.URL + "/v1"}, op: object{"query": object{"key": "hidden-in-query"}}}
		if tt.codes != nil {
			a.config["retry_config"] = object{"retry_status_codes": tt.codes}
		}
		err := a.fails(t, r, tt.code)
		require.Equal(t, tt.retryable, err.Retryable, tt)
		require.Equal(t, tt.after, err.RetryAfter, tt)
		require.Contains(t, err.Message, "POST "+rec.URL+"/v1/do_it answered ")
		require.Contains(t, err.Message, "card declined")
		require.NotContains(t, err.Message, "hidden-in-query")
	}
}

func TestRateLimit(t *testing.T) {
	t.Parallel()
	rec := record(t, nil)
	c := &clock{now: time.Now()}
	r := newRunner(t, Options{})
	r.now = c.read
	a := attempt{config: object{"base_url": rec.URL}, policy: open(object{"rate_limit_per_minute": 3})}
	a.ok(t, r)
	c.move(20 * time.Second)
	a.ok(t, r)
	a.ok(t, r)
	err := a.fails(t, r, fault.RateLimited)
	require.True(t, err.Retryable)
	require.Equal(t, 40*time.Second, err.RetryAfter)
	require.Len(t, rec.all(), 3)
	other := a
	other.name = "another"
	other.ok(t, r)
	c.move(40 * time.Second)
	a.ok(t, r)
	require.Equal(t, 20*time.Second, a.fails(t, r, fault.RateLimited).RetryAfter)
	c.move(20 * time.Second)
	a.ok(t, r)
	a.ok(t, r)
	a.fails(t, r, fault.RateLimited)

	ceiled := newRunner(t, Options{Ceiling: &Policy{AllowPrivateNetworks: true, RateLimitPerMinute: 1}})
	a.ok(t, ceiled)
	require.Contains(t, a.fails(t, ceiled, fault.RateLimited).Message, "1 times a minute")
}

// TestRateLimitPacesJobs plays the orchestrator: each refused job comes back when it was told
// to, a little late.
func TestRateLimitPacesJobs(t *testing.T) {
	t.Parallel()
	const limit, jobs = 2, 14
	rec := record(t, nil)
	start := time.Now()
	c := &clock{now: start}
	r := newRunner(t, Options{})
	r.now = c.read
	due := make(map[int]time.Duration, jobs) // when a job is tried next, by its number
	refused := make(map[int]int, jobs)
	var went []time.Duration
	for i := range jobs {
		due[i] = 0
	}
	for len(due) > 0 {
		next := -1
		for i, at := range due {
			if next < 0 || at < due[next] || at == due[next] && i < next {
				next = i
			}
		}
		now := due[next]
		c.move(now - c.read().Sub(start))
		j := attempt{config: object{"base_url": rec.URL}, policy: open(object{"rate_limit_per_minute": limit})}.job(t)
		j.ID = strconv.Itoa(next)
		result, err := r.Execute(t.Context(), j, &sink{})
		require.NoError(t, err)
		if result.Err == nil {
			went = append(went, now)
			delete(due, next)
			continue
		}
		ferr := fault.From(result.Err)
		require.Equal(t, fault.RateLimited, ferr.Code, ferr.Message)
		refused[next]++
		// Other jobs are late by another while.
		due[next] = now + ferr.RetryAfter + time.Duration(next)*7*time.Millisecond
	}
	require.Len(t, went, jobs)
	for i := limit; i < jobs; i++ {
		require.GreaterOrEqual(t, went[i]-went[i-limit], time.Minute, "no minute holds more than the limit: %v", went)
	}
	require.Less(t, went[jobs-1], 7*time.Minute, "no slot is lost")
	for i, n := range refused {
		require.LessOrEqual(t, n, 2, "job %d", i)
	}
}

func TestRateLimitKeepsPromisedSlots(t *testing.T) {
	t.Parallel()
	start := time.Now()
	w := &window{most: 1}
	at := func(job string, now time.Duration) time.Duration { return w.take(job, start.Add(now)) }
	require.Zero(t, at("a", 0))
	require.Equal(t, time.Minute, at("b", 0))
	require.Equal(t, 2*time.Minute, at("c", 0))
	require.Equal(t, 50*time.Second, at("b", 10*time.Second), "a job that comes too early keeps its slot")
	require.Equal(t, 2*time.Minute, at("d", time.Minute), "nobody takes the slot of another")
	require.Zero(t, at("b", time.Minute))
	require.Equal(t, time.Minute-claimWithin-time.Second, at("e", 2*time.Minute+claimWithin+time.Second)-time.Minute,
		"c never came: its slot is free again, d's is kept")
	require.Zero(t, at("d", 3*time.Minute))

	// Without a name nothing can be kept, and what is kept is bounded.
	w = &window{most: 1}
	require.Zero(t, at("", 0))
	for range 3 {
		require.Equal(t, time.Minute, at("", 0))
	}
	for i := range maxPromises + 5 {
		at(strconv.Itoa(i), 0)
	}
	at(strings.Repeat("x", maxPromisedID+1), 0)
	require.Len(t, w.promised, maxPromises)
}

func TestRateLimitWaitsInPlaceWhereItIsShort(t *testing.T) {
	t.Parallel()
	rec := record(t, nil)
	r := newRunner(t, Options{})
	a := attempt{config: object{"base_url": rec.URL}, policy: open(object{"rate_limit_per_minute": 1})}
	full := func() *window {
		return &window{most: 1, times: []time.Time{time.Now().Add(50*time.Millisecond - time.Minute)}}
	}
	r.windows.getOrMake(windowKey{service: "svc", most: 1}, full)
	a.ok(t, r)

	a.name = "cancelled"
	w := r.windows.getOrMake(windowKey{service: a.name, most: 1}, func() *window {
		return &window{most: 1, times: []time.Time{time.Now().Add(waitHere - time.Minute)}}
	})
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(fault.New(fault.Cancelled, "enough"))
	require.EqualError(t, a.run(ctx, t, r).Err, "CANCELLED: enough")
	require.Empty(t, w.promised, "the slot is given back")
	require.Len(t, rec.all(), 1)
}

func TestCircuitBreaker(t *testing.T) {
	t.Parallel()
	var status atomic.Int64
	status.Store(500)
	rec := record(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(int(status.Load())) })
	r := newRunner(t, Options{})
	a := attempt{config: object{"base_url": rec.URL}, policy: open(object{"circuit_breaker": object{"failure_threshold": 2, "recovery_timeout": 0.05}})}
	a.fails(t, r, fault.RemoteError)
	// Neither a bad request nor a call that somebody ended says anything about the target's health.
	cancelled, cancel := context.WithCancelCause(t.Context())
	cancel(fault.New(fault.Cancelled, "enough"))
	require.EqualError(t, a.run(cancelled, t, r).Err, "CANCELLED: enough")
	a.fails(t, r, fault.RemoteError)
	err := a.fails(t, r, fault.Unavailable)
	require.Contains(t, err.Message, "circuit breaker of svc is open")
	require.True(t, err.Retryable)
	require.Positive(t, err.RetryAfter)
	require.Len(t, rec.all(), 2)
	status.Store(200)
	require.Eventually(t, func() bool { return a.run(t.Context(), t, r).Err == nil }, 5*time.Second, 10*time.Millisecond)
	status.Store(400)
	for range 3 {
		require.Equal(t, fault.RemoteError, fault.From(a.run(t.Context(), t, r).Err).Code)
	}
	status.Store(200)
	a.ok(t, r)
}

func TestSizes(t *testing.T) {
	t.Parallel()
	rec := record(t, jsonAnswer(`"12345678"`)) // 10 bytes
	r := newRunner(t, Options{})
	a := attempt{config: object{"base_url": rec.URL}, input: `{"a":"1234"}`} // 12 bytes
	a.policy = open(object{"max_request_size": 12, "max_response_size": 10})
	a.ok(t, r)
	a.policy = open(object{"max_request_size": 11})
	require.Contains(t, a.fails(t, r, fault.PolicyViolation).Message, "max_request_size forbids 12 bytes")
	require.Len(t, rec.all(), 1)
	a.policy = open(object{"max_response_size": 9})
	require.Contains(t, a.fails(t, r, fault.ResourceExceeded).Message, "max_response_size is 9")
}

// TestSizesAreBoundedWhateverThePolicySays reads no more than an output may hold.
func TestSizesAreBoundedWhateverThePolicySays(t *testing.T) {
	t.Parallel()
	const huge = 1 << 40
	var wrote atomic.Int64
	rec := record(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		chunk := bytes.Repeat([]byte{' '}, 64<<10)
		for wrote.Load() < 64<<20 && r.Context().Err() == nil {
			n, err := w.Write(chunk)
			wrote.Add(int64(n))
			if err != nil {
				return
			}
		}
	})
	for name, r := range map[string]*Runner{
		"no ceiling": newRunner(t, Options{}),
		"ceiling":    newRunner(t, Options{Ceiling: &Policy{AllowPrivateNetworks: true, MaxResponseSize: huge, MaxRequestSize: huge}}),
	} {
		a := attempt{config: object{"base_url": rec.URL}, policy: open(object{"max_response_size": huge, "max_request_size": huge})}
		ferr := a.fails(t, r, fault.ResourceExceeded)
		require.Contains(t, ferr.Message, "max_response_size is 4194304; no policy allows more", name)

		// A form repeats the key of each item.
		a.op = object{"body": "form"}
		a.input = object{strings.Repeat("k", 1<<20): make([]bool, 100_000)}
		require.Contains(t, a.fails(t, r, fault.PolicyViolation).Message, "at most 16777216 bytes", name)
	}
	require.Less(t, wrote.Load(), int64(64<<20), "the answer is not read on")
}
