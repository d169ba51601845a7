package engine_test

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// endedSleep is a clock whose sleeps last until their context ends, and tells of that.
type endedSleep struct {
	engine.SystemClock
	ended chan struct{}
}

func (c endedSleep) Sleep(ctx context.Context, _ time.Duration) error {
	<-ctx.Done()
	close(c.ended)
	return context.Cause(ctx)
}

func TestDrainLeavesASiblingsCallAlone(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	release := make(chan struct{})
	var abandoned atomic.Bool
	w.behave["hang"] = func(ctx context.Context, c *engine.Call, _ map[string]any) *engine.Outcome {
		select {
		case <-release:
			return &engine.Outcome{Output: c.Job.Input}
		case <-ctx.Done():
			abandoned.Store(true)
			return &engine.Outcome{Err: fault.From(context.Cause(ctx))}
		}
	}
	clock := endedSleep{ended: make(chan struct{})}
	e := w.begin(&spyJournal{}, func(o *engine.Options) { o.Clock = clock })
	r, err := e.Start(t.Context(), w.request(`actions: [{parallel: [{call_service: {service: svc, operation: hang, input: {v: 1}}}, {wait: {seconds: 3600}}]}, {call_service: {service: svc, operation: other}}]`, nil))
	require.NoError(t, err)
	require.Equal(t, "hang", <-w.arrive)
	require.Eventually(t, func() bool { return len(w.waiting(e, r.ID)) == 1 }, wait, tick)
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		e.end(t.Context())
	}()
	<-clock.ended
	require.Never(t, abandoned.Load, 50*time.Millisecond, tick)
	close(release)
	<-drained
	require.False(t, abandoned.Load())
	jobs, err := w.store.Jobs(t.Context(), r.ID, 0)
	require.NoError(t, err)
	require.Len(t, jobs, 1, "draining begins nothing new")
	require.Equal(t, store.Completed, jobs[0].Status)
	got, err := w.store.Run(t.Context(), r.ID)
	require.NoError(t, err)
	require.Equal(t, store.Running, got.Status, "another one goes on with it")
}

// backingOff starts a run whose only call asks to be left alone for an hour, and returns
// once that is durable.
func (w *world) backingOff(clock engine.Clock, maxRuns int) (*life, string) {
	w.t.Helper()
	w.behave["flaky"] = func(context.Context, *engine.Call, map[string]any) *engine.Outcome {
		f := fault.New(fault.RateLimited, "later")
		f.RetryAfter = time.Hour
		return &engine.Outcome{Err: f}
	}
	noted := make(chan struct{})
	e := w.begin(&spyJournal{after: func(r *store.Record) {
		for _, j := range r.ChangedJobs {
			if !j.NextAttemptAt.IsZero() {
				close(noted)
			}
		}
	}}, func(o *engine.Options) { o.Clock, o.MaxRuns = clock, maxRuns })
	r, err := e.Start(w.t.Context(), w.request(`actions: [{call_service: {service: svc, operation: flaky}}]`, nil))
	require.NoError(w.t, err)
	<-noted
	return e, r.ID
}

func TestDrainEndsABackoff(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e, id := w.backingOff(engine.SystemClock{}, 0)
	ctx, cancel := context.WithTimeout(t.Context(), wait)
	defer cancel()
	e.end(ctx)
	require.NoError(t, ctx.Err(), "the drain waited for the backoff")
	jobs, err := w.store.Jobs(t.Context(), id, 0)
	require.NoError(t, err)
	require.Len(t, jobs, 1)
	require.Equal(t, store.Running, jobs[0].Status)
	require.False(t, jobs[0].NextAttemptAt.IsZero())
}

func TestBackoffNeedsNoSlotBeforeAndAfterARestart(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e, id := w.backingOff(engine.SystemClock{}, 1)
	const another = `actions: [{call_service: {service: svc, operation: echo}}]`
	other, err := e.Start(t.Context(), w.request(another, nil))
	require.NoError(t, err)
	require.Equal(t, store.Completed, w.finish(e.Engine, other.ID).Status)
	e.kill()

	e = w.begin(&spyJournal{}, maxRuns(1))
	n, err := e.Recover(t.Context())
	require.NoError(t, err)
	require.Equal(t, 1, n)
	other, err = e.Start(t.Context(), w.request(another, nil))
	require.NoError(t, err)
	require.Equal(t, store.Completed, w.finish(e.Engine, other.ID).Status)
	jobs, err := w.store.Jobs(t.Context(), id, 0)
	require.NoError(t, err)
	require.Equal(t, 2, jobs[0].Attempts, "a restart is no reason to call sooner or to count an attempt")
}

func TestARunOfWhichEveryLiveBranchWaitsNeedsNoSlot(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.begin(&spyJournal{}, maxRuns(1))
	sleeping := make([]string, 0, 20)
	for range 20 {
		r, err := e.Start(t.Context(), w.request(`actions: [{parallel: [{validate: ["true"]}, {validate: ["true"]}, {await_signal: {name: go}}]}]`, nil))
		require.NoError(t, err)
		sleeping = append(sleeping, r.ID)
	}
	for _, id := range sleeping {
		require.Eventually(t, func() bool { return len(w.waiting(e, id)) == 1 }, wait, tick, "a waiting run kept the only slot")
	}
	for _, id := range sleeping {
		require.NoError(t, e.Signal(t.Context(), id, "go", []byte(`1`)))
		require.Equal(t, store.Completed, w.finish(e.Engine, id).Status)
	}
}
