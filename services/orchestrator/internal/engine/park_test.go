package engine_test

import (
	"context"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// parking starts an engine that parks every run that sleeps for longer than after.
func (w *world) parking(after time.Duration) *engine.Engine {
	w.t.Helper()
	j := store.NewJournal(w.store, store.JournalOptions{})
	e := engine.New(engine.Options{
		Journal: j, Store: w.store, Plans: w, Dispatcher: w, Logger: slog.New(slog.DiscardHandler), Owner: fmt.Sprintf("owner-%p", j), ParkAfter: after,
	})
	w.t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		e.Close(ctx)
		require.NoError(w.t, j.Close())
	})
	return e
}

// parked waits until nothing is walked.
func parked(t *testing.T, e *engine.Engine) {
	t.Helper()
	require.Eventually(t, func() bool { return e.Walking() == 0 }, time.Minute, time.Millisecond)
}

const nap = `
actions:
  - call_service: {service: svc, operation: echo, input: {n: 1}}
  - wait: {seconds: 0.3}
  - call_service: {service: store, operation: save, input: {n: "$echo.n"}}
`

func TestAParkedRunGoesOnWhenItsTimeHasCome(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, func(t *testing.T, w *world) {
		e := w.parking(time.Millisecond)
		run, err := e.Start(t.Context(), w.request(nap, nil))
		require.NoError(t, err)
		require.NoError(t, e.Wait(t.Context(), run.ID))
		run, err = w.store.Run(t.Context(), run.ID)
		require.NoError(t, err)
		require.Equal(t, store.Completed, run.Status, "%v", run.Err)
		require.JSONEq(t, `{"n":1}`, string(run.Output))
		require.Len(t, w.seen(), 2, "no call was repeated")
	})
}

const ask = `{actions: [{await_signal: {name: go, as: first}}, {await_signal: {name: go, as: second}}], output: {a: "$first.n", b: "$second.n"}}`

func TestASignalWakesAParkedRun(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, func(t *testing.T, w *world) {
		e := w.parking(time.Millisecond)
		run, err := e.Start(t.Context(), w.request(ask, nil))
		require.NoError(t, err)
		parked(t, e)
		require.Len(t, w.waiting(e, run.ID), 1)
		// One that no step awaits wakes it once.
		require.NoError(t, e.Signal(t.Context(), run.ID, "other", []byte(`{}`)))
		parked(t, e)
		require.NoError(t, e.Signal(t.Context(), run.ID, "go", []byte(`{"n":1}`)))
		require.NoError(t, e.Signal(t.Context(), run.ID, "go", []byte(`{"n":2}`)))
		require.NoError(t, e.Wait(t.Context(), run.ID))
		run, err = w.store.Run(t.Context(), run.ID)
		require.NoError(t, err)
		require.Equal(t, store.Completed, run.Status, "%v", run.Err)
		require.JSONEq(t, `{"a":1,"b":2}`, string(run.Output))
	})
}

// Signals that come while runs are being parked are not lost.
func TestSignalsRaceWithParking(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.parking(time.Millisecond)
	for range 50 {
		run, err := e.Start(t.Context(), w.request(ask, nil))
		require.NoError(t, err)
		for n := range 2 {
			require.NoError(t, e.Signal(t.Context(), run.ID, "go", fmt.Appendf(nil, `{"n":%d}`, n)))
		}
		require.NoError(t, e.Wait(t.Context(), run.ID))
	}
}

func TestAParkedRunIsCancelled(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, func(t *testing.T, w *world) {
		e := w.parking(time.Millisecond)
		run, err := e.Start(t.Context(), w.request(`actions: [{wait: {seconds: 1000000}}]`, nil))
		require.NoError(t, err)
		parked(t, e)
		require.NoError(t, e.Cancel(t.Context(), run.ID, "enough"))
		run, err = w.store.Run(t.Context(), run.ID)
		require.NoError(t, err)
		require.Equal(t, store.Cancelled, run.Status)
	})
}

// Another life finds the runs that were parked, and they go on there.
func TestParkedRunsOutliveTheirOrchestrator(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	j := store.NewJournal(w.store, store.JournalOptions{})
	first := engine.New(engine.Options{
		Journal: j, Store: w.store, Plans: w, Dispatcher: w, Logger: slog.New(slog.DiscardHandler), Owner: "first", ParkAfter: time.Millisecond,
	})
	run, err := first.Start(t.Context(), w.request(ask, nil))
	require.NoError(t, err)
	parked(t, first)
	first.Close(t.Context())
	require.NoError(t, j.Close())
	second := w.parking(time.Millisecond)
	n, err := second.Recover(t.Context())
	require.NoError(t, err)
	require.Equal(t, 1, n)
	for range 2 {
		require.NoError(t, second.Signal(t.Context(), run.ID, "go", []byte(`{"n":3}`)))
	}
	require.NoError(t, second.Wait(t.Context(), run.ID))
	run, err = w.store.Run(t.Context(), run.ID)
	require.NoError(t, err)
	require.JSONEq(t, `{"a":3,"b":3}`, string(run.Output))
}

// Branches that sleep beside each other keep their walk.
func TestARunWithBranchesIsNotParked(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.parking(time.Millisecond)
	run, err := e.Start(t.Context(), w.request(`actions: [{parallel: [{wait: {seconds: 1000000}}, {wait: {seconds: 1000000}}]}]`, nil))
	require.NoError(t, err)
	require.Eventually(t, func() bool { return len(w.waiting(e, run.ID)) == 2 }, time.Minute, time.Millisecond)
	require.Equal(t, 1, e.Walking())
	require.NoError(t, e.Cancel(t.Context(), run.ID, "enough"))
}
