package engine_test

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
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
	jobs, err := w.store.Jobs(t.Context(), r.ID, 0)
	require.NoError(t, err)
	require.Len(t, jobs, 2)
	for _, j := range jobs {
		require.True(t, j.Status.Final(), "%s is %s", j.StepPath, j.Status)
	}
}

// Branches that update the row at the same time do not fail for what the table refuses of another.
func TestUpdatesOfBranchesFailAlone(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := w.begin(&spyJournal{before: func(r *store.Record) error {
		if r.UpdateRow != nil && r.UpdateRow.Values["bad"] != nil {
			return store.ErrRefused
		}
		return nil
	}}, nil)
	for n := range 50 {
		req := w.entityRequest(`
entity: thing
fields:
  good: {type: string, default: "no"}
  bad: {type: string, default: "no"}
actions:
  go:
    steps:
      - parallel: {on_error: wait_all, branches: [{update: {set: {good: "yes"}}}, {update: {set: {bad: "yes"}}}]}
`, "go", rowID(n), nil)
		r, err := e.Start(t.Context(), req)
		require.NoError(t, err)
		got := w.finish(e.Engine, r.ID)
		require.Equal(t, store.Failed, got.Status)
		require.Contains(t, got.Err.Message, "branches[1]")
		require.NotContains(t, got.Err.Message, "more")
		row, err := w.store.EntityRow(t.Context(), req.Plan.Entity, rowID(n))
		require.NoError(t, err)
		require.Equal(t, "yes", row["good"])
	}
}

// What a runner says beyond what this version knows is stored nowhere, and told to nobody.
func TestUnknownFieldsOfARunnerAreDropped(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	unknown := protowire.AppendString(protowire.AppendTag(nil, 9999, protowire.BytesType), strings.Repeat("x", 1000))
	w.behave["echo"] = func(_ context.Context, c *engine.Call, _ map[string]any) *engine.Outcome {
		out := &engine.Outcome{
			Output: c.Job.Input, Usage: &runnerv1.ResourceUsage{Source: "http"},
			Security: &runnerv1.SecurityContext{Runner: "r", Checks: []*runnerv1.PolicyCheck{{Rule: "x", Allowed: true}}},
		}
		for _, m := range []proto.Message{out.Usage, out.Security, out.Security.GetChecks()[0]} {
			m.ProtoReflect().SetUnknown(unknown)
		}
		return out
	}
	seen := make(chan *store.Job, 1)
	e := w.begin(&spyJournal{after: func(r *store.Record) {
		if ends(r, "echo") {
			seen <- r.ChangedJobs[0]
		}
	}}, nil)
	w.run(e.Engine, `actions: [{call_service: {service: svc, operation: echo}}]`, nil)
	j := <-seen
	for _, m := range []proto.Message{j.Usage, j.Security, j.Security.GetChecks()[0]} {
		require.Empty(t, m.ProtoReflect().GetUnknown())
	}
	require.Equal(t, "r", j.Security.GetRunner())
}
