package engine_test

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// What a waiting caller is given from memory is what the database says of the run.
func TestAwaitGivesWhatIsStored(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, func(t *testing.T, w *world) {
		e := w.start()
		release := make(chan struct{})
		w.behave["save"] = func(_ context.Context, c *engine.Call, _ map[string]any) *engine.Outcome {
			<-release
			return &engine.Outcome{Output: c.Job.Input}
		}
		started, err := e.Start(t.Context(), w.request(`
actions:
  - call_service: {service: store, operation: save, input: {b: [1.50, "ü"], a: {z: null}}}
  - parallel:
      - call_service: {service: svc, operation: fail, on_failure: [{call_service: {service: svc, operation: echo, input: {code: "$error.code"}}}]}
      - call_service: {service: svc, operation: echo, input: {n: 1}}
`, nil))
		require.NoError(t, err)
		cut, cancel := context.WithCancel(t.Context())
		cancel()
		run, jobs := e.Await(cut, started.ID)
		require.Nil(t, run, "it has not ended")
		require.Nil(t, jobs)
		go close(release)
		run, jobs = e.Await(t.Context(), started.ID)
		require.NotNil(t, run)

		stored, err := w.store.Run(t.Context(), started.ID)
		require.NoError(t, err)
		require.Equal(t, store.Completed, stored.Status)
		require.Equal(t, stored.Status, run.Status)
		require.JSONEq(t, string(stored.Output), string(run.Output))
		require.Equal(t, stored.CompletedAt, run.CompletedAt)
		kept, err := w.store.Jobs(t.Context(), started.ID, 0)
		require.NoError(t, err)
		require.Len(t, jobs, len(kept))
		for i, k := range kept {
			j := *jobs[i]
			require.JSONEq(t, string(k.Input), string(j.Input))
			require.JSONEq(t, string(k.ResourceUsage), string(j.ResourceUsage))
			if k.Output != nil {
				require.JSONEq(t, string(k.Output), string(j.Output))
			}
			if k.Err != nil {
				require.Equal(t, k.Err.Code, j.Err.Code)
				require.Equal(t, k.Err.Message, j.Err.Message)
			}
			require.Equal(t, []any{k.ID, k.StepPath, k.Status, k.Attempts, k.CreatedAt, k.StartedAt, k.CompletedAt},
				[]any{j.ID, j.StepPath, j.Status, j.Attempts, j.CreatedAt, j.StartedAt, j.CompletedAt})
		}
		run, _ = e.Await(t.Context(), started.ID)
		require.Nil(t, run, "it is no longer walked; the store has it")
	})
}

// A run of which jobs are in the store alone, since an earlier walk made them, is read from there.
func TestAwaitLeavesARetriedRunToTheStore(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.start()
	failed := w.run(e, `actions: [{call_service: {service: svc, operation: fail}}]`, nil)
	require.Equal(t, store.Failed, failed.Status)
	release := make(chan struct{})
	w.mu.Lock()
	w.behave["fail"] = func(context.Context, *engine.Call, map[string]any) *engine.Outcome {
		<-release
		return &engine.Outcome{Output: []byte(`{}`)}
	}
	w.mu.Unlock()
	require.NoError(t, e.Retry(t.Context(), failed.ID))
	run, _ := e.Await(t.Context(), failed.ID)
	require.Nil(t, run)
	close(release)
	require.NoError(t, e.Wait(t.Context(), failed.ID))
	jobs, err := w.store.Jobs(t.Context(), failed.ID, 0)
	require.NoError(t, err)
	require.Len(t, jobs, 2)
}
