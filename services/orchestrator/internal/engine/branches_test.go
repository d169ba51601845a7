package engine_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

func ends(r *store.Record, operation string) bool {
	for _, j := range r.ChangedJobs {
		if j.Operation == operation && j.Status == store.Completed {
			return true
		}
	}
	return false
}

// What a branch did is durable while its siblings go on; what the last one did is in the record of the run's end.
func TestTheLastBranchIsWrittenWithWhatFollows(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	written := make(chan struct{})
	w.behave["other"] = func(_ context.Context, c *engine.Call, _ map[string]any) *engine.Outcome {
		<-written
		return &engine.Outcome{Output: c.Job.Input}
	}
	var mu sync.Mutex
	var after []*store.Record
	e := w.begin(&spyJournal{after: func(r *store.Record) {
		mu.Lock()
		defer mu.Unlock()
		if ends(r, "echo") {
			close(written)
		} else if ends(r, "other") || r.Run != nil {
			after = append(after, r)
		}
	}}, nil)
	r := w.run(e.Engine, `actions: [{parallel: [{call_service: {service: svc, operation: echo}}, {call_service: {service: svc, operation: other}}]}]`, nil)
	require.Equal(t, store.Completed, r.Status)
	mu.Lock()
	defer mu.Unlock()
	require.Len(t, after, 1)
	require.True(t, ends(after[0], "other"))
	require.Equal(t, store.Completed, after[0].Run.Status)
}

// A run is not handed over before what its branches did is written: another owner would do it again.
func TestWhatABranchDidIsWrittenBeforeTheRunIsHandedOver(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	finish := make(chan struct{})
	w.behave["other"] = func(_ context.Context, c *engine.Call, _ map[string]any) *engine.Outcome {
		<-finish
		return &engine.Outcome{Output: c.Job.Input}
	}
	clock := endedSleep{ended: make(chan struct{})}
	held, let := make(chan struct{}), make(chan struct{})
	e := w.begin(&spyJournal{before: func(r *store.Record) error {
		if ends(r, "other") {
			close(held)
			<-let
		}
		return nil
	}}, func(o *engine.Options) { o.Clock = clock })
	r, err := e.Start(t.Context(), w.request(`actions: [{parallel: [{call_service: {service: svc, operation: other}}, {wait: {seconds: 3600}}]}]`, nil))
	require.NoError(t, err)
	require.Equal(t, "other", <-w.arrive)
	require.Eventually(t, func() bool { return len(w.waiting(e, r.ID)) == 1 }, wait, tick)
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		e.end(t.Context())
	}()
	<-clock.ended
	close(finish)
	<-held
	require.Never(t, func() bool {
		select {
		case <-drained:
			return true
		default:
			return false
		}
	}, 50*time.Millisecond, tick)
	close(let)
	<-drained
	jobs, err := w.store.Jobs(t.Context(), r.ID, 0)
	require.NoError(t, err)
	require.Len(t, jobs, 1)
	require.Equal(t, store.Completed, jobs[0].Status)
}

// A record of branches that the database never takes fails the run, even where all of it had ended by then.
func TestARefusedRecordOfBranchesFailsTheRun(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	refused := make(chan struct{})
	w.behave["other"] = func(_ context.Context, c *engine.Call, _ map[string]any) *engine.Outcome {
		<-refused
		return &engine.Outcome{Output: c.Job.Input}
	}
	var once sync.Once
	e := w.begin(&spyJournal{before: func(r *store.Record) error {
		if !ends(r, "echo") {
			return nil
		}
		first := false
		once.Do(func() { first = true })
		if !first {
			return nil
		}
		close(refused)
		<-time.After(50 * time.Millisecond) // for the other branch to end while this is under way
		return store.ErrRefused
	}}, nil)
	r := w.run(e.Engine, `actions: [{parallel: [{call_service: {service: svc, operation: echo}}, {call_service: {service: svc, operation: other}}]}]`, nil)
	require.Equal(t, store.Failed, r.Status)
}
