package engine_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

const (
	wait = 20 * time.Second
	tick = 5 * time.Millisecond
)

// crashJournal loses the connection to the database for ever at its n-th write, before or
// after that write took effect, as a killed process does.
type crashJournal struct {
	*store.Journal
	w     *world
	left  atomic.Int64
	after bool
	dead  chan struct{}
}

func (c *crashJournal) Append(ctx context.Context, r *store.Record) error {
	n := c.left.Add(-1)
	if n < 0 {
		return fmt.Errorf("dead: %w", store.ErrClosed)
	}
	if n > 0 {
		return c.Journal.Append(ctx, r)
	}
	defer close(c.dead)
	if c.after {
		if err := c.Journal.Append(ctx, r); err != nil {
			return err
		}
	}
	return fmt.Errorf("crash: %w", store.ErrClosed)
}

func newCrashJournal(w *world, n int64, after bool) *crashJournal {
	j := &crashJournal{Journal: store.NewJournal(w.store, store.JournalOptions{}), w: w, after: after, dead: make(chan struct{})}
	j.left.Store(n)
	return j
}

// waitFor returns when the journal is dead or the run has ended.
func (c *crashJournal) waitFor(e *engine.Engine, id string) {
	ctx, cancel := context.WithCancel(c.w.t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = e.Wait(ctx, id) // the crash ends it early
	}()
	select {
	case <-c.dead:
	case <-ended:
	}
	cancel()
	<-ended
}

// end ends what is left of a crashed engine.
func (c *crashJournal) end(e *engine.Engine) {
	gone, cancel := context.WithCancel(c.w.t.Context())
	cancel()
	e.Close(gone)
	require.NoError(c.w.t, c.Journal.Close())
}

const crashWorkflow = `
actions:
  - call_service: {service: svc, operation: echo, input: {n: "$input.n"}, as: first}
  - parallel:
      - call_service: {service: svc, operation: echo, input: {n: 1}, as: left}
      - call_service: {service: svc, operation: fail, on_failure: [{call_service: {service: store, operation: save, input: {why: "$error.code"}}}]}
  - foreach:
      items: [1, 2, 3]
      max_concurrency: 2
      do:
        - call_service: {service: svc, operation: other, input: {v: "$item", of: "$first.n"}}
  - wait: {seconds: 1}
  - call_service: {service: svc, operation: flaky, input: {all: "$other", why: "$save.why"}}
output: {all: "$flaky.all", why: "$flaky.why", left: "$left.n"}
`

// A crash at every write of the journal, before and after it took effect, changes neither
// the outcome nor which calls arrive; a repeated call carries the same key.
func TestCrashAtEveryWrite(t *testing.T) {
	t.Parallel()
	onEachDatabase(t, crashAtEveryWrite)
}

func crashAtEveryWrite(t *testing.T, w *world) {
	const want = `{"all":[{"v":1,"of":9},{"v":2,"of":9},{"v":3,"of":9}],"why":"REMOTE_ERROR","left":1}`
	req := w.request(crashWorkflow, map[string]any{"n": 9.0})
	for _, after := range []bool{false, true} {
		writes := int64(0)
		for crashed, n := true, int64(1); crashed; n++ {
			t.Run(fmt.Sprintf("write %d after=%t", n, after), func(t *testing.T) {
				run, keys := (*store.Run)(nil), map[string]string(nil)
				run, keys, crashed = w.disturbed(t, *req, t.Name(), n, after)
				require.Equal(t, store.Completed, run.Status, "%v", run.Err)
				require.JSONEq(t, want, string(run.Output))
				require.Len(t, keys, 8)
			})
			writes = n
		}
		require.Greater(t, writes, int64(8), "the workflow writes more often than that")
	}
}

// disturbed runs a workflow with a crash at the n-th write, goes on with it in another
// engine, and returns how it ended, the idempotency key of each step that made a call, and
// whether there was a crash.
func (w *world) disturbed(t require.TestingT, req engine.StartRequest, key string, n int64, after bool) (run *store.Run, keys map[string]string, crashed bool) {
	before := len(w.seen())
	req.IdempotencyKey = key
	j := newCrashJournal(w, n, after)
	first := w.engine(j)
	if r, err := first.Start(w.t.Context(), &req); err == nil {
		j.waitFor(first, r.ID)
	}
	j.end(first)

	e := w.begin(&spyJournal{}, nil)
	defer e.kill()
	_, err := e.Recover(w.t.Context())
	require.NoError(t, err)
	// Whoever got no answer asks again with the same key.
	if _, err := e.Start(w.t.Context(), &req); err != nil {
		var dup *store.DuplicateError
		require.ErrorAs(t, err, &dup)
	}
	run, err = w.store.RunByKey(w.t.Context(), "", key)
	require.NoError(t, err)
	return w.ended(t, e.Engine, run.ID), w.keys(t, before), j.left.Load() <= 0
}

// ended waits for the end of a run and reads it.
func (w *world) ended(t require.TestingT, e *engine.Engine, id string) *store.Run {
	ctx, cancel := context.WithTimeout(w.t.Context(), wait)
	defer cancel()
	require.NoError(t, e.Wait(ctx, id))
	h, err := w.store.History(w.t.Context(), id)
	require.NoError(t, err)
	for _, j := range h.Jobs {
		require.True(t, j.Status.Final(), "job %s of the %s run is %s", j.StepPath, h.Run.Status, j.Status)
	}
	return h.Run
}

// keys returns the idempotency key of each step that made a call since the first so many.
func (w *world) keys(t require.TestingT, before int) map[string]string {
	for len(w.arrive) > 0 {
		<-w.arrive
	}
	out := map[string]string{}
	for _, c := range w.seen()[before:] {
		if old, ok := out[c.step]; ok {
			require.Equal(t, old, c.key, "%s was called with two keys", c.step)
		}
		out[c.step] = c.key
	}
	return out
}
