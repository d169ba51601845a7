package storetest

import (
	"context"
	"encoding/json"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

func testHeartbeat(t *testing.T, st store.Store) {
	ctx := t.Context()
	_, err := st.Heartbeat(ctx, owner, false)
	require.ErrorIs(t, err, store.ErrFenced, "nobody knows it yet")
	for beat := int64(1); beat <= 3; beat++ {
		beats, err := st.Heartbeat(ctx, owner, beat == 1)
		require.NoError(t, err)
		require.Equal(t, map[string]int64{owner: beat}, beats)
	}
	buried, err := st.Bury(ctx, owner, 2)
	require.NoError(t, err)
	require.False(t, buried, "it has beaten since")
	buried, err = st.Bury(ctx, owner, 3)
	require.NoError(t, err)
	require.True(t, buried)
	buried, err = st.Bury(ctx, owner, 3)
	require.NoError(t, err)
	require.False(t, buried, "once is enough")
	_, err = st.Heartbeat(ctx, owner, false)
	require.ErrorIs(t, err, store.ErrFenced)
	_, err = st.Heartbeat(ctx, owner, true)
	require.NoError(t, err)
	require.NoError(t, st.Retire(ctx, owner))
	_, err = st.Heartbeat(ctx, owner, false)
	require.ErrorIs(t, err, store.ErrFenced)
}

// testClaimsOfTheDead: what a registered owner has stays its own, until it is buried, retires or lets go.
func (s *suite) testClaimsOfTheDead(t *testing.T, st store.Store) {
	if !s.manyOwners {
		t.Skip("this database has one owner at a time")
	}
	ctx := t.Context()
	claim := func(by string) []string {
		t.Helper()
		runs, err := st.Claim(ctx, by, 10)
		require.NoError(t, err)
		var out []string
		for _, r := range runs {
			require.Equal(t, by, r.Owner)
			out = append(out, r.ID)
		}
		return out
	}
	_, err := st.Heartbeat(ctx, owner, true)
	require.NoError(t, err)
	beats, err := st.Heartbeat(ctx, "orchestrator-b", true)
	require.NoError(t, err)
	require.Equal(t, map[string]int64{owner: 1, "orchestrator-b": 1}, beats)

	a, b := started(t, st), started(t, st)
	require.Empty(t, claim("orchestrator-b"), "their owner lives")
	require.NoError(t, st.Release(ctx, "orchestrator-b", []string{a.ID}))
	require.Empty(t, claim("orchestrator-b"), "nobody gives away what is another's")
	require.NoError(t, st.Release(ctx, owner, []string{a.ID}))
	require.Equal(t, []string{a.ID}, claim("orchestrator-b"))
	require.ErrorIs(t, commitOne(t, st, change(a)), store.ErrFenced)
	require.NoError(t, commitOne(t, st, change(b)))

	buried, err := st.Bury(ctx, owner, 1)
	require.NoError(t, err)
	require.True(t, buried)
	require.Equal(t, []string{b.ID}, claim("orchestrator-b"))
	require.ErrorIs(t, commitOne(t, st, change(b)), store.ErrFenced)
	_, err = st.Heartbeat(ctx, owner, true)
	require.NoError(t, err)
	require.Empty(t, claim(owner))
	require.NoError(t, st.Retire(ctx, "orchestrator-b"))
	require.ElementsMatch(t, []string{a.ID, b.ID}, claim(owner))
	require.Equal(t, int64(3), load(t, st, a.ID).Epoch)
}

func testRelease(t *testing.T, st store.Store) {
	ctx := t.Context()
	run, over := started(t, st), ended(t, st, store.Completed)
	require.NoError(t, st.Release(ctx, "orchestrator-b", []string{run.ID}))
	require.Equal(t, owner, load(t, st, run.ID).Owner, "it is another's")
	require.NoError(t, st.Release(ctx, owner, []string{run.ID, over.ID, newID(), "no id"}))
	require.NoError(t, st.Release(ctx, owner, nil))
	require.Empty(t, load(t, st, run.ID).Owner)
	require.Equal(t, owner, load(t, st, over.ID).Owner, "who ended it stays known")
	got, err := st.Claim(ctx, owner, 1)
	require.NoError(t, err)
	require.Len(t, got, 1, "also by the one who gave it up")
	require.Equal(t, int64(2), got[0].Epoch)
	require.NoError(t, st.Retire(ctx, owner))
	require.Empty(t, load(t, st, run.ID).Owner)
}

func testRunStates(t *testing.T, st store.Store) {
	ctx := t.Context()
	run, over := started(t, st), ended(t, st, store.Failed)
	r := change(run)
	r.Sequence = 17
	commit(t, st, r)
	require.NoError(t, st.AppendLogs(ctx, []*store.LogLine{
		{RunID: run.ID, Sequence: 5, JobID: newID(), Stream: "stdout", Time: day}, {RunID: run.ID, Sequence: 9, JobID: newID(), Stream: "stdout", Time: day},
	}))
	states, err := st.RunStates(ctx, []string{run.ID, over.ID, newID(), "no id"})
	require.NoError(t, err)
	require.Equal(t, map[string]store.RunState{
		run.ID:  {Status: store.Running, Owner: owner, Epoch: 1, Sequence: 17, LogSequence: 9},
		over.ID: {Status: store.Failed, Owner: owner, Epoch: 1, Sequence: 1},
	}, states)
	states, err = st.RunStates(ctx, nil)
	require.NoError(t, err)
	require.Empty(t, states)
}

func testRequests(t *testing.T, st store.Store) {
	ctx := t.Context()
	run, other := started(t, st), newRun()
	other.Owner = "orchestrator-b"
	commit(t, st, create(other))
	none, err := st.Requests(ctx, owner)
	require.NoError(t, err)
	require.Empty(t, none.Cancels)
	require.Empty(t, none.Signals)

	require.NoError(t, st.RequestCancel(ctx, run.ID, "enough"))
	require.NoError(t, st.RequestCancel(ctx, other.ID, ""))
	var sent []*store.Signal
	for _, id := range []string{run.ID, other.ID, run.ID} {
		sig := &store.Signal{RunID: id, Name: "go", Payload: json.RawMessage(`{"n": 1}`), CreatedAt: day}
		require.NoError(t, st.AddSignal(ctx, sig))
		sent = append(sent, sig)
	}
	got, err := st.Requests(ctx, owner)
	require.NoError(t, err)
	require.Equal(t, map[string]string{run.ID: "enough"}, got.Cancels)
	requireEqual(t, []*store.Signal{sent[0], sent[2]}, got.Signals)

	// A signal that was taken is no request any more, nor is any of a run that has ended.
	r := change(run)
	r.TakenSignals = map[int64]string{sent[0].ID: "steps[1]"}
	commit(t, st, r)
	got, err = st.Requests(ctx, owner)
	require.NoError(t, err)
	requireEqual(t, []*store.Signal{sent[2]}, got.Signals)
	r = change(run)
	r.Run = &store.RunChange{Status: store.Cancelled}
	commit(t, st, r)
	got, err = st.Requests(ctx, owner)
	require.NoError(t, err)
	require.Empty(t, got.Cancels)
	require.Empty(t, got.Signals)
}

func testExecutionTypes(t *testing.T, st store.Store) {
	ctx := t.Context()
	enabled := func() map[string]bool {
		t.Helper()
		types, err := st.ExecutionTypes(ctx)
		require.NoError(t, err)
		out := map[string]bool{}
		for name, is := range types {
			require.False(t, is.ChangedAt.IsZero(), name)
			out[name] = is.Enabled
		}
		return out
	}
	require.Empty(t, enabled())
	require.NoError(t, st.SetExecutionTypes(ctx, []string{"shell", "docker"}, nil))
	require.Equal(t, map[string]bool{"shell": false, "docker": false}, enabled())
	require.NoError(t, st.SetExecutionTypes(ctx, []string{"wasm"}, []string{"docker", "http"}))
	require.Equal(t, map[string]bool{"shell": false, "docker": true, "http": true, "wasm": false}, enabled())
	require.NoError(t, st.SetExecutionTypes(ctx, []string{"http"}, []string{"http"}))
	require.True(t, enabled()["http"], "the last word counts")
	require.NoError(t, st.SetExecutionTypes(ctx, nil, nil))
}

func testMaintain(t *testing.T, st store.Store) {
	ctx := t.Context()
	now := time.Now().UTC().Truncate(time.Microsecond)
	var ids []string
	make1 := func(status store.Status, completed time.Time) string {
		t.Helper()
		run := newRun()
		run.Status, run.CreatedAt, run.StartedAt, run.CompletedAt = status, now.Add(-3*time.Hour), now.Add(-3*time.Hour), completed
		job := newJob(run)
		r := create(run)
		r.NewJobs = []*store.Job{job}
		r.Steps = []*store.Step{{RunID: run.ID, StepPath: "steps[9]", Kind: "wait", Status: store.Completed}}
		commit(t, st, r)
		require.NoError(t, st.AppendLogs(ctx, []*store.LogLine{{RunID: run.ID, Sequence: 1, JobID: job.ID, Stream: "stdout", Text: "x", Time: now}}))
		ids = append(ids, run.ID)
		return run.ID
	}
	old := make1(store.Completed, now.Add(-2*time.Hour))
	failed := make1(store.Failed, now.Add(-90*time.Minute))
	recent := make1(store.Completed, now.Add(-10*time.Minute))
	running := make1(store.Running, time.Time{})

	require.NoError(t, st.Maintain(ctx, 0))
	for _, id := range ids {
		require.Len(t, history(t, st, id).Jobs, 1, "nothing is deleted without a bound")
	}
	require.NoError(t, st.Maintain(ctx, time.Hour))
	for _, id := range []string{old, failed} {
		_, err := st.History(ctx, id)
		require.ErrorIs(t, err, store.ErrNotFound)
		jobs, err := st.Jobs(ctx, id, 0)
		require.NoError(t, err)
		require.Empty(t, jobs)
		lines, err := st.Logs(ctx, id, 0, 10)
		require.NoError(t, err)
		require.Empty(t, lines)
	}
	for _, id := range []string{recent, running} {
		h := history(t, st, id)
		require.Len(t, h.Jobs, 1)
		require.Len(t, h.Steps, 1)
		lines, err := st.Logs(ctx, id, 0, 10)
		require.NoError(t, err)
		require.Len(t, lines, 1)
	}
	// Several at once do not get into each other's way.
	parallel(ctx, t, 4, func(ctx context.Context, _ int) error { return st.Maintain(ctx, time.Hour) })
}

// testAdmit: a run that a client inserted gets what it lacks.
func testAdmit(t *testing.T, st store.Store) {
	run := &store.Run{ID: newID(), Entity: "payment", Action: "process", Status: store.Pending, CreatedAt: day}
	commit(t, st, create(run))
	claimed, err := st.Claim(t.Context(), owner, 1)
	require.NoError(t, err)
	require.Len(t, claimed, 1)
	r := change(claimed[0])
	r.Run = &store.RunChange{Status: store.Running, StartedAt: day, Admit: &store.Admission{
		Snapshot: "abc", EntityID: "7", EntitySchema: "commerce", EntityRow: json.RawMessage(`{"a": 1}`), Input: json.RawMessage(`{"b": 2}`),
	}}
	commit(t, st, r)
	run.Status, run.StartedAt, run.Owner, run.Epoch, run.Sequence = store.Running, day, owner, 1, 1
	run.Snapshot, run.EntityID, run.EntitySchema, run.EntityRow, run.Input = "abc", "7", "commerce", json.RawMessage(`{"a": 1}`), json.RawMessage(`{"b": 2}`)
	requireEqual(t, run, load(t, st, run.ID))
}

// testListenEnds: with its context, or with the store.
func testListenEnds(t *testing.T, st store.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 2)
	go func() { done <- st.Listen(ctx, func(store.Notice) {}) }()
	cancel()
	require.ErrorIs(t, <-done, context.Canceled)
	go func() { done <- st.Listen(t.Context(), func(store.Notice) {}) }()
	require.NoError(t, st.Close())
	require.ErrorIs(t, <-done, store.ErrClosed)
}
