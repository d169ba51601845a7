package engine_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

func TestRetryGoesOnWhenItsClientGoesAway(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx, cancel := context.WithCancel(t.Context())
	var retries atomic.Int32
	e := w.begin(&spyJournal{before: func(r *store.Record) error {
		if r.Run != nil && r.Run.Retry {
			retries.Add(1)
			cancel()
		}
		return nil
	}}, nil)
	r := w.run(e.Engine, `actions: [{call_service: {service: svc, operation: fail, input: {v: 1}}}]`, nil)
	require.Equal(t, store.Failed, r.Status)
	w.answers("fail")
	_ = e.Retry(ctx, r.ID) // nobody is there to hear the answer
	require.Error(t, ctx.Err())
	require.Positive(t, retries.Load())
	got := w.finish(e.Engine, r.ID)
	require.Equal(t, store.Completed, got.Status, "%v", got.Err)
	require.Equal(t, 1, got.Retries)
}

func TestRetryIsTakenAsSoonAsTheEndIsSeen(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.start()
	req := w.request(`actions: [{call_service: {service: svc, operation: fail}}]`, nil)
	for range 50 {
		r, err := e.Start(t.Context(), req)
		require.NoError(t, err)
		require.Equal(t, store.Failed, w.finish(e, r.ID).Status)
		require.NoError(t, e.Retry(t.Context(), r.ID))
		require.Equal(t, 1, w.finish(e, r.ID).Retries)
	}
}

const manyFailures = `
actions:
  - parallel:
      on_error: wait_all
      branches:
        - call_service: {service: svc, operation: fail, input: {v: 1}}
        - call_service: {service: svc, operation: echo, input: {v: 2}}
        - call_service: {service: svc, operation: fail, input: {v: 3}}
        - [{call_service: {service: svc, operation: other, input: {v: 4}}}, {call_service: {service: svc, operation: fail, input: {v: 5}}}]
output: {a: "$echo.v", b: "$other.v"}
`

// A crash at every write of a retry, before and after it took effect, leaves a run that ends
// well, or one that can be retried again; what had completed is not called again.
func TestCrashAtEveryWriteOfARetry(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for _, after := range []bool{false, true} {
		writes := int64(0)
		for crashed, n := true, int64(1); crashed; n++ {
			t.Run(fmt.Sprintf("write %d after=%t", n, after), func(t *testing.T) {
				crashed = w.crashRetry(t, n, after)
			})
			writes = n
		}
		require.Greater(t, writes, int64(2), "a retry writes its beginning and its end at least")
	}
}

// crashRetry retries a run with a crash at the n-th write and reports whether there was one.
func (w *world) crashRetry(t *testing.T, n int64, after bool) bool {
	before := len(w.seen())
	w.mu.Lock()
	delete(w.behave, "fail")
	w.mu.Unlock()
	first := w.begin(&spyJournal{}, nil)
	r := w.run(first.Engine, manyFailures, nil)
	require.Equal(t, store.Failed, r.Status)
	first.end(t.Context())
	w.answers("fail")

	j := newCrashJournal(w, n, after)
	e := w.engine(j)
	if e.Retry(t.Context(), r.ID) == nil {
		j.waitFor(e, r.ID)
	}
	j.end(e)

	second := w.begin(&spyJournal{}, nil)
	defer second.kill()
	e = second.Engine
	_, err := e.Recover(t.Context())
	require.NoError(t, err)
	got, err := w.store.Run(t.Context(), r.ID)
	require.NoError(t, err)
	if got.Status == store.Failed {
		require.NoError(t, e.Retry(t.Context(), r.ID))
	}
	got = w.ended(t, e, r.ID)
	require.Equal(t, store.Completed, got.Status, "%v", got.Err)
	require.JSONEq(t, `{"a":2,"b":4}`, string(got.Output))
	times := map[string]int{}
	for _, c := range w.seen()[before:] {
		times[c.operation]++
	}
	require.Equal(t, 1, times["echo"])
	require.Equal(t, 1, times["other"])
	require.GreaterOrEqual(t, times["fail"], 6, "three failures and three answers")
	return j.left.Load() <= 0
}
