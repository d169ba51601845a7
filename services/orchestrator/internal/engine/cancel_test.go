package engine_test

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// A process that dies after a cancelled sibling was recorded, and before the run's end was,
// replays a cancelled call: nobody may take that for a failure to be handled.
func TestReplayOfACancelledSiblingNeverRunsItsOnFailure(t *testing.T) {
	t.Parallel()
	const cancelled = `{call_service: {service: svc, operation: hang, on_failure: [{call_service: {service: store, operation: save, input: {why: "$error.code"}}}]}}`
	cases := []struct{ name, failing string }{
		{"the failure is replayed first", `[{call_service: {service: svc, operation: fail}}]`},
		{"the failure is replayed last", `[{foreach: {items: "$input.items", do: [{if: {condition: "[1, 2, 3].map(x, x * 2).exists(x, x == -1)", then: []}}]}}, {call_service: {service: svc, operation: fail}}]`},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			hanging := make(chan struct{})
			w.behave["hang"] = func(ctx context.Context, _ *engine.Call, _ map[string]any) *engine.Outcome {
				close(hanging)
				<-ctx.Done()
				return &engine.Outcome{Err: fault.From(context.Cause(ctx))}
			}
			w.behave["fail"] = func(context.Context, *engine.Call, map[string]any) *engine.Outcome {
				<-hanging
				return &engine.Outcome{Err: fault.New(fault.RemoteError, "the target said no")}
			}
			dead := make(chan struct{})
			var once sync.Once
			spy := &spyJournal{}
			spy.before = func(r *store.Record) error {
				if r.Run == nil || r.Run.Status != store.Failed {
					return nil
				}
				defer once.Do(func() { close(dead) })
				rest := *r
				rest.Run = nil
				if err := spy.Journal.Append(t.Context(), &rest); err != nil {
					return err
				}
				return fmt.Errorf("crash: %w", store.ErrClosed)
			}
			e := w.begin(spy, nil)
			r, err := e.Start(t.Context(), w.request(fmt.Sprintf("actions: [{parallel: [%s, %s]}]", cancelled, c.failing), map[string]any{"items": make([]any, 2000)}))
			require.NoError(t, err)
			<-dead
			e.kill()

			again := w.start()
			n, err := again.Recover(t.Context())
			require.NoError(t, err)
			require.Equal(t, 1, n)
			got := w.finish(again, r.ID)
			require.Equal(t, store.Failed, got.Status)
			require.Equal(t, fault.RemoteError, got.Err.Code)
			require.ElementsMatch(t, []string{"hang", "fail"}, w.operations())
		})
	}
}

func TestCancelOutlastsAnOutageOfTheJournal(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var outage atomic.Int32 // writes that fail yet
	e := w.begin(&spyJournal{before: func(*store.Record) error {
		if outage.Add(-1) >= 0 {
			return errLocked
		}
		return nil
	}}, nil)
	r, err := e.Start(t.Context(), w.request(`actions: [{parallel: [{call_service: {service: svc, operation: hang}}, {call_service: {service: svc, operation: hang}}]}]`, nil))
	require.NoError(t, err)
	<-w.arrive
	<-w.arrive
	outage.Store(4)
	ctx, cancel := context.WithTimeout(t.Context(), wait)
	defer cancel()
	require.NoError(t, e.Cancel(ctx, r.ID, "enough"))
	require.Negative(t, outage.Load())
	got, err := w.store.Run(t.Context(), r.ID)
	require.NoError(t, err)
	require.Equal(t, store.Cancelled, got.Status)
	require.Contains(t, got.Err.Message, "enough")
	require.Len(t, w.seen(), 2, "cancelled calls are not made again")
}

func TestCancelOfAQueuedRunNeedsNoSlot(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.begin(&spyJournal{}, maxRuns(1))
	busy, err := e.Start(t.Context(), w.request(`actions: [{call_service: {service: svc, operation: hang}}]`, nil))
	require.NoError(t, err)
	require.Equal(t, "hang", <-w.arrive)
	queued, err := e.Start(t.Context(), w.request(`actions: [{call_service: {service: svc, operation: echo}}]`, nil))
	require.NoError(t, err)
	require.Equal(t, store.Pending, queued.Status)
	next, err := e.Start(t.Context(), w.request(`actions: [{call_service: {service: svc, operation: other}}]`, nil))
	require.NoError(t, err)

	ctx, cancel := context.WithTimeout(t.Context(), wait)
	defer cancel()
	require.NoError(t, e.Cancel(ctx, queued.ID, "enough"))
	got, err := w.store.Run(t.Context(), queued.ID)
	require.NoError(t, err)
	require.Equal(t, store.Cancelled, got.Status)
	require.NoError(t, e.Cancel(ctx, busy.ID, ""))
	require.Equal(t, store.Completed, w.finish(e.Engine, next.ID).Status, "the slot goes to the next in the queue")
	require.Equal(t, []string{"hang", "other"}, w.operations())
}

func TestStepsOfACancelledRunAreFinal(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.start()
	r, err := e.Start(t.Context(), w.request(`actions: [{parallel: [{await_signal: {name: go}}, {wait: {seconds: 1000000}}]}]`, nil))
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		h, err := w.store.History(t.Context(), r.ID)
		return err == nil && len(h.Steps) == 2
	}, wait, tick)
	require.NoError(t, e.Cancel(t.Context(), r.ID, "enough"))
	h, err := w.store.History(t.Context(), r.ID)
	require.NoError(t, err)
	require.Equal(t, store.Cancelled, h.Run.Status)
	require.Len(t, h.Steps, 2)
	for _, s := range h.Steps {
		require.Equal(t, store.Cancelled, s.Status, s.StepPath)
		require.False(t, s.CompletedAt.IsZero(), s.StepPath)
	}
}
