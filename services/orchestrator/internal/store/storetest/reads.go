package storetest

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

func testJobsAfter(t *testing.T, st store.Store) {
	run := started(t, st)
	var jobs []*store.Job
	for i := range 5 {
		j := newJob(run)
		// Created in the order opposite to the sequence.
		j.Sequence, j.CreatedAt = int64(10-i), day.Add(time.Duration(i)*time.Second)
		jobs = append(jobs, j)
	}
	r := change(run)
	r.NewJobs = jobs
	commit(t, st, r)
	got, err := st.Jobs(t.Context(), run.ID, 8)
	require.NoError(t, err)
	requireEqual(t, jobs[:2], got)
	got, err = st.Jobs(t.Context(), run.ID, 10)
	require.NoError(t, err)
	require.Empty(t, got)
}

func testRuns(t *testing.T, st store.Store) {
	ctx := t.Context()
	var all []string
	for i := range 10 {
		run := newRun()
		run.Entity, run.Action = "order", "ship"
		if i%2 == 0 {
			run.Entity, run.TenantID, run.Status = "payment", tenant, store.Completed
		}
		if i == 9 {
			run.Action, run.Status = "other", store.Failed
		}
		commit(t, st, create(run))
		all = append(all, run.ID)
	}
	newest := slices.Clone(all)
	slices.Sort(newest)
	slices.Reverse(newest)
	ids := func(f store.RunFilter) []string {
		t.Helper()
		runs, err := st.Runs(ctx, f)
		require.NoError(t, err)
		var out []string
		for _, r := range runs {
			out = append(out, r.ID)
		}
		return out
	}
	require.Equal(t, newest, ids(store.RunFilter{}))

	var paged []string
	f := store.RunFilter{Limit: 3}
	for {
		page := ids(f)
		if len(page) == 0 {
			break
		}
		require.LessOrEqual(t, len(page), 3)
		paged = append(paged, page...)
		f.Before = page[len(page)-1]
	}
	require.Equal(t, newest, paged)

	require.Len(t, ids(store.RunFilter{Entity: "payment"}), 5)
	require.Len(t, ids(store.RunFilter{Tenants: []string{tenant}}), 5)
	require.Len(t, ids(store.RunFilter{Action: "other"}), 1)
	require.Len(t, ids(store.RunFilter{Statuses: []store.Status{store.Completed, store.Failed}}), 6)
	require.Len(t, ids(store.RunFilter{Statuses: []store.Status{store.Running}, Entity: "order", Limit: 2}), 2)
	require.Empty(t, ids(store.RunFilter{Tenants: []string{tenant2}}))
	require.Empty(t, ids(store.RunFilter{Tenants: []string{}}), "of no tenant at all")
	require.Len(t, ids(store.RunFilter{Tenants: []string{""}}), 5, "what belongs to none")
	require.Len(t, ids(store.RunFilter{Tenants: []string{"", tenant2, tenant}}), 10)
	require.Len(t, ids(store.RunFilter{Tenants: []string{tenant}, Limit: 3}), 3, "pages are of what is seen")
	require.Empty(t, ids(store.RunFilter{Entity: "payment", Action: "other"}))
}

func testLogs(t *testing.T, st store.Store) {
	ctx := t.Context()
	run, other := started(t, st), started(t, st)
	var lines []*store.LogLine
	for i := range int64(10) {
		lines = append(lines, &store.LogLine{
			RunID: run.ID, Sequence: 3 * (i + 1), JobID: newID(), StepPath: "steps[0]", Attempt: 2, Line: i + 1, Stream: "stdout",
			Text: fmt.Sprintf("line %d ü", i), Time: day.Add(time.Duration(i) * time.Microsecond),
		})
	}
	mixed := slices.Clone(lines[:6])
	mixed = append(mixed, &store.LogLine{RunID: other.ID, Sequence: 1, JobID: newID(), Stream: "stderr", Text: "", Time: day})
	require.NoError(t, st.AppendLogs(ctx, mixed))
	require.NoError(t, st.AppendLogs(ctx, lines[6:]))
	require.NoError(t, st.AppendLogs(ctx, lines[2:4]), "lines that are there already stay as they are")
	require.NoError(t, st.AppendLogs(ctx, nil))

	got, err := st.Logs(ctx, run.ID, 0, 100)
	require.NoError(t, err)
	requireEqual(t, lines, got)
	got, err = st.Logs(ctx, run.ID, 9, 2)
	require.NoError(t, err)
	requireEqual(t, lines[3:5], got)
	got, err = st.Logs(ctx, other.ID, 0, 100)
	require.NoError(t, err)
	require.Len(t, got, 1)
	got, err = st.Logs(ctx, newID(), 0, 100)
	require.NoError(t, err)
	require.Empty(t, got)

	// Lines of a run that is not there do not cost the others theirs.
	strays := []*store.LogLine{
		{RunID: newID(), Sequence: 1, JobID: newID(), Stream: "stdout", Time: day},
		{RunID: other.ID, Sequence: 2, JobID: newID(), Stream: "stdout", Time: day},
	}
	require.ErrorIs(t, st.AppendLogs(ctx, strays), store.ErrNotFound)
	got, err = st.Logs(ctx, other.ID, 1, 100)
	require.NoError(t, err)
	require.Len(t, got, 1)
}

func (s *suite) testLogBound(t *testing.T, st store.Store) {
	ctx := t.Context()
	run, other := started(t, st), started(t, st)
	job := newID()
	batch := s.maxLogLines / 10
	lines := make([]*store.LogLine, batch)
	for n := 0; n <= s.maxLogLines; n += batch {
		for i := range lines {
			lines[i] = &store.LogLine{RunID: run.ID, Sequence: int64(n + i + 1), JobID: job, Stream: "stdout", Time: day}
		}
		lines[batch-1].RunID = other.ID
		require.NoError(t, st.AppendLogs(ctx, lines))
	}
	// One line of each batch was another run's: the last batch began with ten places left.
	var kept int
	var after int64
	for {
		got, err := st.Logs(ctx, run.ID, after, 5000)
		require.NoError(t, err)
		if len(got) == 0 {
			break
		}
		kept += len(got)
		after = got[len(got)-1].Sequence
	}
	require.Equal(t, s.maxLogLines, kept)
	require.Equal(t, int64(s.maxLogLines+10), after, "the first ones are kept")
	got, err := st.Logs(ctx, other.ID, 0, 100)
	require.NoError(t, err)
	require.Len(t, got, 11, "other runs have bounds of their own")
}

func testSnapshots(t *testing.T, st store.Store) {
	ctx := t.Context()
	require.NoError(t, st.SaveSnapshot(ctx, "d1", []byte("one\x00")))
	require.NoError(t, st.SaveSnapshot(ctx, "d1", []byte("other")))
	require.NoError(t, st.SaveSnapshot(ctx, "d2", nil))
	content, err := st.Snapshot(ctx, "d1")
	require.NoError(t, err)
	require.Equal(t, "one\x00", string(content))
	content, err = st.Snapshot(ctx, "d2")
	require.NoError(t, err)
	require.Empty(t, content)

	for _, digest := range []string{"d1", "d2", "d1"} {
		require.NoError(t, st.SetRegistry(ctx, digest))
		got, at, err := st.Registry(ctx)
		require.NoError(t, err)
		require.Equal(t, digest, got)
		require.False(t, at.IsZero())
	}
}
