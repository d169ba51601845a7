package engine_test

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

const retried = `
actions:
  - call_service: {service: svc, operation: echo, input: {amount: 1}, max_retries: 3}
`

// later has every call of echo fail with the wish to be left alone for an hour.
func (w *world) later() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.behave["echo"] = func(context.Context, *engine.Call, map[string]any) *engine.Outcome {
		f := fault.New(fault.Unavailable, "in an hour")
		f.RetryAfter = time.Hour
		return &engine.Outcome{Err: f}
	}
}

// disable disables http and has the engine know.
func (w *world) disable(e *engine.Engine) {
	w.t.Helper()
	require.NoError(w.t, w.store.SetExecutionTypes(w.t.Context(), []string{"http"}, nil))
	require.NoError(w.t, e.Refreshed(w.t.Context()))
}

// failsAtOnce waits for the end of a run, which DISABLED is.
func (w *world) failsAtOnce(e *engine.Engine, id string, attempts int) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
	defer cancel()
	require.NoError(w.t, e.Wait(ctx, id))
	h, err := w.store.History(w.t.Context(), id)
	require.NoError(w.t, err)
	require.Equal(w.t, store.Failed, h.Run.Status)
	require.Equal(w.t, fault.Disabled, h.Jobs[0].Err.Code)
	require.Contains(w.t, h.Jobs[0].Err.Message, "`specql execution-types --enable http` enables it")
	require.Equal(w.t, attempts, h.Jobs[0].Attempts, "the attempt that is not made does not count")
	require.True(w.t, h.Jobs[0].NextAttemptAt.IsZero())
}

func TestDisablingEndsThePauseBeforeAnAttempt(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, func(t *testing.T, w *world) {
		for name, after := range map[string]time.Duration{"awake": 0, "parked": time.Millisecond} {
			t.Run(name, func(t *testing.T) {
				require.NoError(t, w.store.SetExecutionTypes(t.Context(), nil, []string{"http"}))
				w.later()
				e := w.parking(after)
				require.NoError(t, e.Refreshed(t.Context()))
				run, err := e.Start(t.Context(), w.request(retried, nil))
				require.NoError(t, err)
				require.Eventually(t, func() bool {
					jobs, err := w.store.Jobs(t.Context(), run.ID, 0)
					require.NoError(t, err)
					return len(jobs) == 1 && !jobs[0].NextAttemptAt.IsZero()
				}, time.Minute, time.Millisecond)
				if after > 0 {
					parked(t, e)
				}
				calls := len(w.seen())
				w.disable(e)
				w.failsAtOnce(e, run.ID, 1)
				require.Len(t, w.seen(), calls, "nothing was called")
			})
		}
	})
}

func TestDisablingEndsTheWaitForASlot(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, func(t *testing.T, w *world) {
		w.limit("echo", rate("echo", 1, time.Hour-time.Minute))
		e := w.parking(0)
		require.Equal(t, store.Completed, w.run(e, oneCall, nil).Status)
		run, err := e.Start(t.Context(), w.request(oneCall, nil))
		require.NoError(t, err)
		require.Eventually(t, func() bool { return w.waitingForSlots() == 1 }, time.Minute, time.Millisecond)
		w.disable(e)
		w.failsAtOnce(e, run.ID, 0)
		require.Len(t, w.seen(), 1)

		// Those that wait after it was enabled again wait.
		require.NoError(t, w.store.SetExecutionTypes(t.Context(), nil, []string{"http"}))
		require.NoError(t, e.Refreshed(t.Context()))
		run, err = e.Start(t.Context(), w.request(oneCall, nil))
		require.NoError(t, err)
		require.Eventually(t, func() bool { return w.waitingForSlots() == 1 }, time.Minute, time.Millisecond)
		w.disable(e)
		w.failsAtOnce(e, run.ID, 0)
	})
}
