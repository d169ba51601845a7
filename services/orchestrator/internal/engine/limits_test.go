package engine_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

const oneCall = `
actions:
  - call_service: {service: svc, operation: echo, input: {amount: 1}}
`

// limit sets the limits of an operation.
func (w *world) limit(operation string, limits ...engine.Limit) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.limits[operation] = func() ([]engine.Limit, error) { return limits, nil }
}

func rate(key string, n int64, window time.Duration) engine.Limit {
	return engine.Limit{Limit: store.Limit{Key: key, Window: window, MaxAttempts: n}, Rule: "rate_limit_per_minute of svc"}
}

// waitingForSlots is how many jobs say that they wait.
func (w *world) waitingForSlots() int {
	w.t.Helper()
	runs, err := w.store.Runs(w.t.Context(), store.RunFilter{Statuses: []store.Status{store.Running}, Limit: 100})
	require.NoError(w.t, err)
	n := 0
	for _, r := range runs {
		jobs, err := w.store.Jobs(w.t.Context(), r.ID, 0)
		require.NoError(w.t, err)
		for _, j := range jobs {
			if j.Err != nil && j.Err.Code == fault.RateLimited && !j.NextAttemptAt.IsZero() {
				n++
			}
		}
	}
	return n
}

// usage asks the store what counts at a key.
func (w *world) usage(key string) store.TakeResult {
	w.t.Helper()
	run := &store.Run{ID: newRunID(), Action: "ask", Status: store.Completed, Owner: "nobody", Epoch: 1, Sequence: 1, CreatedAt: time.Now(), CompletedAt: time.Now()}
	take := &store.Take{ID: newRunID(), JobID: newRunID(), Limits: []store.Limit{{Key: key, Window: time.Hour, MaxCost: 1e-6, Cost: 1000}}}
	results, err := w.store.Commit(w.t.Context(), []*store.Record{{RunID: run.ID, Epoch: 1, Sequence: 1, Create: run, Takes: []*store.Take{take}}})
	require.NoError(w.t, errors.Join(append(results, err)...))
	require.False(w.t, take.Result.Granted)
	return take.Result
}

// TestRateLimitWaits: calls over the limit wait for their turn, in their order, and then are made; each but once.
func TestRateLimitWaits(t *testing.T) {
	onEachDatabase(t, func(t *testing.T, w *world) {
		const most, window, calls = 3, 600 * time.Millisecond, 9
		w.limit("echo", rate("echo", most, window))
		var mu sync.Mutex
		var times []time.Time
		w.behave["echo"] = func(_ context.Context, c *engine.Call, _ map[string]any) *engine.Outcome {
			mu.Lock()
			defer mu.Unlock()
			times = append(times, time.Now())
			return &engine.Outcome{Output: c.Job.Input}
		}
		e := w.start()
		var ids []string
		for range calls {
			r, err := e.Start(t.Context(), w.request(oneCall, nil))
			require.NoError(t, err)
			ids = append(ids, r.ID)
		}
		for _, id := range ids {
			require.NoError(t, e.Wait(t.Context(), id))
			h, err := w.store.History(t.Context(), id)
			require.NoError(t, err)
			require.Equal(t, store.Completed, h.Run.Status)
			require.Equal(t, 1, h.Jobs[0].Attempts, "waiting is no attempt")
			require.Nil(t, h.Jobs[0].Err)
		}
		for i := most; i < calls; i++ {
			require.GreaterOrEqual(t, times[i].Sub(times[i-most]), window, "%d calls within %s", most+1, window)
		}
		require.Less(t, times[calls-1].Sub(times[0]), 20*window)
		require.Zero(t, w.usage("echo").InFlight)
	})
}

// TestRateLimitOfRetries: every attempt takes a slot of its own, and one that called nothing gives it back.
func TestRateLimitOfRetries(t *testing.T) {
	onEachDatabase(t, func(t *testing.T, w *world) {
		w.limit("flaky", rate("flaky", 100, time.Hour))
		w.limit("echo", rate("echo", 100, time.Hour))
		e := w.start()
		r := w.run(e, `
actions:
  - call_service: {service: svc, operation: flaky, max_retries: 5, input: {amount: 1}}
`, nil)
		require.Equal(t, store.Completed, r.Status)
		require.Equal(t, int64(3), w.usage("flaky").Used)

		w.behave["echo"] = func(context.Context, *engine.Call, map[string]any) *engine.Outcome {
			return &engine.Outcome{Err: fault.New(fault.PolicyViolation, "no"), Unused: true}
		}
		require.Equal(t, store.Failed, w.run(e, oneCall, nil).Status)
		require.Zero(t, w.usage("echo").Used)
	})
}

// TestBudget: what a call may cost is reserved, what it did cost is kept, and calls without room fail at once, unless
// it is only reservations that are in the way.
func TestBudget(t *testing.T) {
	onEachDatabase(t, func(t *testing.T, w *world) {
		l := engine.Limit{Limit: store.Limit{Key: "lambda", Window: time.Hour, MaxCost: 1, Cost: 0.6}, Budget: true, Rule: "cost_limits of svc", CostKey: "cost_limits.max_cost_per_hour"}
		w.limit("echo", l)
		release := make(chan struct{})
		var reserved atomic.Pointer[float64]
		w.behave["echo"] = func(_ context.Context, c *engine.Call, _ map[string]any) *engine.Outcome {
			reserved.Store(c.Reserved)
			<-release
			return &engine.Outcome{Output: c.Job.Input, Usage: &runnerv1.ResourceUsage{CostUsd: new(0.3)}}
		}
		e := w.start()
		var ids []string
		for range 3 {
			r, err := e.Start(t.Context(), w.request(oneCall, nil))
			require.NoError(t, err)
			ids = append(ids, r.ID)
		}
		<-w.arrive
		require.InDelta(t, 0.6, *reserved.Load(), 1e-9)
		require.Never(t, func() bool { return len(w.arrive) > 0 }, 500*time.Millisecond, 50*time.Millisecond, "the others wait for what the first one costs")
		close(release)
		codes := map[store.Status]int{}
		for _, id := range ids {
			require.NoError(t, e.Wait(t.Context(), id))
			h, err := w.store.History(t.Context(), id)
			require.NoError(t, err)
			codes[h.Run.Status]++
			if h.Run.Status == store.Failed {
				require.Equal(t, fault.BudgetExceeded, h.Jobs[0].Err.Code)
				require.Contains(t, h.Jobs[0].Err.Message, "0.600000 USD were spent in the last hour over all orchestrators")
				require.Zero(t, h.Jobs[0].Attempts)
				denied, err := w.store.Violations(t.Context(), store.JobFilter{}, 10)
				require.NoError(t, err)
				require.Len(t, denied, 1)
				require.Equal(t, []string{"BUDGET_EXCEEDED", "cost_limits.max_cost_per_hour", id}, []string{denied[0].ErrorCode, denied[0].Rule, denied[0].RunID})
				require.JSONEq(t, `[{"key": "cost_limits.max_cost_per_hour", "above": 1}]`, string(denied[0].AllowedBy))
			}
		}
		require.Equal(t, map[store.Status]int{store.Completed: 2, store.Failed: 1}, codes)
		require.InDelta(t, 0.6, w.usage("lambda").Cost, 1e-9)
		require.Len(t, w.seen(), 2)
	})
}

// TestClosed: one that asked to be left alone is left alone by everybody, also those that find it out in the database alone.
func TestClosed(t *testing.T) {
	onEachDatabase(t, func(t *testing.T, w *world) {
		w.limit("echo", rate("echo", 100, time.Hour))
		const alone = 700 * time.Millisecond
		var told time.Time
		w.behave["echo"] = func(_ context.Context, c *engine.Call, _ map[string]any) *engine.Outcome {
			if told.IsZero() {
				told = time.Now()
				f := fault.New(fault.RateLimited, "429")
				f.Retryable, f.RetryAfter = false, alone
				return &engine.Outcome{Err: f, Closes: true}
			}
			return &engine.Outcome{Output: c.Job.Input}
		}
		e := w.start()
		require.Equal(t, store.Failed, w.run(e, oneCall, nil).Status)
		require.Equal(t, store.Completed, w.run(e, oneCall, nil).Status)
		require.GreaterOrEqual(t, time.Since(told), alone)
	})
}

// TestLimitsChange: a runner that says that its limits are others is asked again, and no attempt is counted.
func TestLimitsChange(t *testing.T) {
	w := newWorld(t)
	var cost atomic.Int64
	w.limits["echo"] = func() ([]engine.Limit, error) {
		return []engine.Limit{{Limit: store.Limit{Key: "grows", Window: time.Hour, MaxCost: 10, Cost: float64(cost.Add(1))}, Budget: true}}, nil
	}
	w.behave["echo"] = func(_ context.Context, c *engine.Call, _ map[string]any) *engine.Outcome {
		if *c.Reserved < 3 {
			return &engine.Outcome{Err: fault.New(fault.Unavailable, "larger"), Unused: true, Again: true, LimitsChanged: true}
		}
		return &engine.Outcome{Output: c.Job.Input}
	}
	r := w.run(w.start(), oneCall, nil)
	require.Equal(t, store.Completed, r.Status)
	h, err := w.store.History(t.Context(), r.ID)
	require.NoError(t, err)
	require.Equal(t, 1, h.Jobs[0].Attempts)
	require.InDelta(t, 3, w.usage("grows").Cost, 1e-9)
}

// TestLimitsUnknown: a runner that does not tell its limits is as one that cannot be reached.
func TestLimitsUnknown(t *testing.T) {
	w := newWorld(t)
	var asked atomic.Int64
	w.limits["echo"] = func() ([]engine.Limit, error) {
		if asked.Add(1) < 3 {
			return nil, fault.New(fault.Unavailable, "no answer")
		}
		return nil, nil
	}
	r := w.run(w.start(), `
actions:
  - call_service: {service: svc, operation: echo, max_retries: 5, input: {amount: 1}}
`, nil)
	require.Equal(t, store.Completed, r.Status)
	require.Len(t, w.seen(), 1, "nothing is called before it is known what counts")
}

// TestWaitEnds: a call that waits is cancelled at once, and one that would wait for too long fails at once.
func TestWaitEnds(t *testing.T) {
	w := newWorld(t)
	w.limit("echo", rate("echo", 1, 45*time.Minute))
	e := w.start()
	require.Equal(t, store.Completed, w.run(e, oneCall, nil).Status)
	waiting, err := e.Start(t.Context(), w.request(oneCall, nil))
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		h, err := w.store.History(t.Context(), waiting.ID)
		return err == nil && len(h.Jobs) == 1 && h.Jobs[0].Err != nil && h.Jobs[0].Err.Code == fault.RateLimited && !h.Jobs[0].NextAttemptAt.IsZero()
	}, 10*time.Second, 10*time.Millisecond, "the row says what it waits for")
	_, err = e.Start(t.Context(), w.request(oneCall, nil))
	require.NoError(t, err)
	require.Eventually(t, func() bool { return w.waitingForSlots() == 2 }, 10*time.Second, 10*time.Millisecond)
	// One is let through in 45 minutes, and two are before the next.
	failed := w.run(e, oneCall, nil)
	require.Equal(t, store.Failed, failed.Status)
	require.Equal(t, fault.RateLimited, failed.Err.Code)
	require.Contains(t, failed.Err.Message, "at most 1h0m0s are waited")
	err = e.Cancel(t.Context(), waiting.ID, "enough")
	require.NoError(t, err)
	require.NoError(t, e.Wait(t.Context(), waiting.ID))
	require.Len(t, w.seen(), 1)
}

// TestCancelledTake: a run that is cancelled while it is not known yet whether it got its slot leaves nothing that counts.
func TestCancelledTake(t *testing.T) {
	w := newWorld(t)
	w.limit("echo", rate("echo", 5, time.Hour))
	asked, answer := make(chan struct{}), make(chan struct{})
	e := w.begin(&spyJournal{before: func(r *store.Record) error {
		if len(r.Takes) > 0 {
			close(asked)
			<-answer
		}
		return nil
	}}, nil)
	// The pause parts the record that takes the slot from the one that Start waits for.
	run, err := e.Start(t.Context(), w.request("actions:\n  - wait: {seconds: 1}\n  - call_service: {service: svc, operation: echo, input: {amount: 1}}\n", nil))
	require.NoError(t, err)
	<-asked
	cancelled := make(chan error, 1)
	go func() { cancelled <- e.Cancel(t.Context(), run.ID, "enough") }()
	<-time.After(100 * time.Millisecond) // so that the cancel most likely comes before the answer; whichever does, the test holds
	close(answer)
	require.NoError(t, <-cancelled)
	require.Zero(t, w.usage("echo").Used)
	require.Empty(t, w.seen())
}

// TestAbsurdUsage: what no runner can have measured is not recorded, and makes no sum of others a number that is none.
func TestAbsurdUsage(t *testing.T) {
	w := newWorld(t)
	w.behave["echo"] = func(context.Context, *engine.Call, map[string]any) *engine.Outcome {
		return &engine.Outcome{Output: []byte(`{}`), Usage: &runnerv1.ResourceUsage{
			CostUsd: new(math.Inf(1)), CpuSeconds: new(math.NaN()), MemoryMb: new(-1.0), PeakMemoryMb: new(1e300), DiskReadMb: new(2.5), DurationSeconds: new(1.5),
		}}
	}
	run := w.run(w.start(), oneCall, nil)
	require.Equal(t, store.Completed, run.Status)
	h, err := w.store.History(t.Context(), run.ID)
	require.NoError(t, err)
	require.JSONEq(t, `{"duration_seconds": 1.5, "disk_read_mb": 2.5, "attempts": 1}`, string(h.Jobs[0].ResourceUsage))
}

// TestLimitAfterCrash: the attempt that was in flight counts on, the next one takes a slot of its own, and one that waited is
// not counted as an attempt.
func TestLimitAfterCrash(t *testing.T) {
	w := newWorld(t)
	w.limit("hang", rate("hang", 1, time.Hour))
	w.limit("echo", rate("echo", 1, time.Hour))
	j := store.NewJournal(w.store, store.JournalOptions{})
	e := w.engine(j)
	r, err := e.Start(t.Context(), w.request(`
actions:
  - parallel:
      - call_service: {service: svc, operation: hang, max_retries: 5, input: {amount: 1}}
`, nil))
	require.NoError(t, err)
	<-w.arrive
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	e.Close(ctx) // hands the run back with its attempt in flight
	require.NoError(t, j.Close())
	require.Equal(t, int64(1), w.usage("hang").InFlight)

	w.limit("hang", rate("hang", 2, time.Hour))
	e = w.start()
	_, err = e.Join(t.Context())
	require.NoError(t, err)
	<-w.arrive
	u := w.usage("hang")
	require.Equal(t, []int64{2, 1}, []int64{u.Used, u.InFlight}, "the old attempt has ended and counts, the new one has a slot of its own")
	h, err := w.store.History(t.Context(), r.ID)
	require.NoError(t, err)
	require.Equal(t, 2, h.Jobs[0].Attempts)
	err = e.Cancel(t.Context(), r.ID, "")
	require.NoError(t, err)
	require.NoError(t, e.Wait(t.Context(), r.ID))
	require.Zero(t, w.usage("hang").InFlight)
}

var runIDs atomic.Int64

func newRunID() string { return fmt.Sprintf("0198f0a0-0000-7000-8000-%012x", runIDs.Add(1)) }
