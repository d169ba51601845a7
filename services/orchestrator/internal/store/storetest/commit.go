package storetest

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

func testRunRoundTrip(t *testing.T, st store.Store) {
	for _, run := range []*store.Run{fullRun(), {ID: newID(), Status: store.Pending, CreatedAt: day}} {
		commit(t, st, create(run))
		requireEqual(t, run, load(t, st, run.ID))
		requireEqual(t, run, history(t, st, run.ID).Run)
	}
}

func testJobRoundTrip(t *testing.T, st store.Store) {
	run := started(t, st)
	job, small := fullJob(run), &store.Job{ID: newID(), RunID: run.ID, StepPath: "steps[9]", Service: "s", Operation: "o", ExecutionType: "wasm", Status: store.Pending, CreatedAt: day.Add(1)}
	small.CreatedAt = day.Add(time.Microsecond)
	r := change(run)
	r.NewJobs = []*store.Job{job, small}
	commit(t, st, r)
	requireEqual(t, []*store.Job{job, small}, history(t, st, run.ID).Jobs)

	changed := newJob(run)
	r = change(run)
	r.NewJobs = []*store.Job{changed}
	commit(t, st, r)
	full := fullJob(run)
	changed.Status, changed.Attempts, changed.NextAttemptAt, changed.Output, changed.Err = full.Status, 3, full.NextAttemptAt, full.Output, full.Err
	changed.ResourceUsage, changed.SecurityContext, changed.Sequence = full.ResourceUsage, full.SecurityContext, 12
	changed.StartedAt, changed.CompletedAt = full.StartedAt, full.CompletedAt
	r = change(run)
	r.ChangedJobs = []*store.Job{changed}
	commit(t, st, r)
	jobs, err := st.Jobs(t.Context(), run.ID, 11)
	require.NoError(t, err)
	requireEqual(t, []*store.Job{changed}, jobs)
}

func testStepRoundTrip(t *testing.T, st store.Store) {
	run := started(t, st)
	a := &store.Step{RunID: run.ID, StepPath: "steps[1]", Kind: "wait", Status: store.Running, Until: day.Add(time.Hour), Sequence: 3, StartedAt: day}
	b := &store.Step{RunID: run.ID, StepPath: "steps[1]", Generation: 1, Kind: "await_signal", Status: store.Pending, Name: "go", Sequence: 4}
	r := change(run)
	r.Steps = []*store.Step{b, a}
	commit(t, st, r)
	requireEqual(t, []*store.Step{a, b}, history(t, st, run.ID).Steps)

	a.Status, a.Data, a.CompletedAt, a.Sequence, a.Until = store.Completed, json.RawMessage(`{"x": 1}`), day.Add(time.Minute), 5, time.Time{}
	b.Status, b.Err = store.Failed, fault.New(fault.Timeout, "no signal")
	r = change(run)
	r.Steps = []*store.Step{a, b}
	commit(t, st, r)
	requireEqual(t, []*store.Step{a, b}, history(t, st, run.ID).Steps)
}

func testOneRecordHoldsAll(t *testing.T, st store.Store) {
	e := paymentEntity(t, st)
	run := newRun()
	run.Status, run.StartedAt = store.Pending, time.Time{}
	job := newJob(run)
	id := newID()
	r := create(run)
	r.InsertRow = &store.EntityRow{Schema: e.Schema, Entity: e.Name, ID: id, Values: map[string]any{"status": "pending", "amount": 5}}
	r.UpdateRow = &store.EntityRow{Schema: e.Schema, Entity: e.Name, ID: id, Values: map[string]any{"amount": 6}}
	r.Run = &store.RunChange{Status: store.Running, StartedAt: day}
	r.NewJobs = []*store.Job{job}
	done := *job
	done.Status, done.Output, done.CompletedAt = store.Completed, json.RawMessage(`1`), day
	r.ChangedJobs = []*store.Job{&done}
	r.Steps = []*store.Step{{RunID: run.ID, StepPath: "steps[7]", Kind: "update", Status: store.Completed}}
	r.Sequence = 5
	commit(t, st, r)

	h := history(t, st, run.ID)
	require.Equal(t, store.Running, h.Run.Status)
	require.Equal(t, int64(5), h.Run.Sequence)
	requireEqual(t, []*store.Job{&done}, h.Jobs)
	require.Len(t, h.Steps, 1)
	row, err := st.EntityRow(t.Context(), e, id)
	require.NoError(t, err)
	require.EqualValues(t, 6, row["amount"])
}

// testNewJobThatChanged has jobs begin and change in one record, whatever they begin with.
func testNewJobThatChanged(t *testing.T, st store.Store) {
	run := newRun()
	r := create(run)
	var want []*store.Job
	for _, next := range []time.Time{{}, day.Add(time.Hour)} {
		job := newJob(run)
		job.NextAttemptAt = next
		done := *job
		done.Status, done.Output, done.CompletedAt, done.NextAttemptAt = store.Completed, json.RawMessage(`1`), day, time.Time{}
		r.NewJobs, r.ChangedJobs = append(r.NewJobs, job), append(r.ChangedJobs, &done)
		want = append(want, &done)
	}
	commit(t, st, r)
	requireEqual(t, want, history(t, st, run.ID).Jobs)
}

func testRunChange(t *testing.T, st store.Store) {
	run := newRun()
	run.Status, run.StartedAt = store.Pending, time.Time{}
	commit(t, st, create(run))
	r := change(run)
	r.Run = &store.RunChange{Status: store.Running, StartedAt: day.Add(time.Second)}
	commit(t, st, r)
	run.Status, run.StartedAt, run.Sequence = store.Running, day.Add(time.Second), 2
	requireEqual(t, run, load(t, st, run.ID))

	r = change(run)
	r.Run = &store.RunChange{Output: json.RawMessage(`{"so": "far"}`)}
	commit(t, st, r)
	r.Run = &store.RunChange{Status: store.Failed, Err: fault.New(fault.Internal, "oh"), CompletedAt: day.Add(time.Minute)}
	r.Sequence = 9
	commit(t, st, r)
	run.Status, run.Output, run.Err, run.CompletedAt, run.Sequence = store.Failed, json.RawMessage(`{"so": "far"}`), fault.New(fault.Internal, "oh"), day.Add(time.Minute), 9
	requireEqual(t, run, load(t, st, run.ID))
}

func testRetry(t *testing.T, st store.Store) {
	run := fullRun()
	commit(t, st, create(run))
	r := change(run)
	r.Run = &store.RunChange{Status: store.Running, Retry: true}
	commit(t, st, r)
	run.Status, run.Retries, run.Output, run.Err, run.CompletedAt = store.Running, 3, nil, nil, time.Time{}
	run.CancelRequested, run.CancelReason, run.Sequence = false, "", 42
	requireEqual(t, run, load(t, st, run.ID))

	// Running and completed runs are not retried.
	require.ErrorIs(t, commitOne(t, st, r), store.ErrState)
	r.Run = &store.RunChange{Status: store.Completed}
	commit(t, st, r)
	r.Run = &store.RunChange{Status: store.Running, Retry: true}
	require.ErrorIs(t, commitOne(t, st, r), store.ErrState)
	require.Equal(t, 3, load(t, st, run.ID).Retries)
}

func testFencing(t *testing.T, st store.Store) {
	run := started(t, st)
	claimed, err := st.Claim(t.Context(), "orchestrator-b", 10)
	require.NoError(t, err)
	require.Len(t, claimed, 1)

	job := newJob(run)
	stale := change(run)
	stale.NewJobs = []*store.Job{job}
	stale.Run = &store.RunChange{Status: store.Completed}
	require.ErrorIs(t, commitOne(t, st, stale), store.ErrFenced)
	h := history(t, st, run.ID)
	require.Equal(t, store.Running, h.Run.Status)
	require.Empty(t, h.Jobs)
	require.Equal(t, int64(1), h.Run.Sequence)

	fresh := change(claimed[0])
	fresh.NewJobs = []*store.Job{job}
	commit(t, st, fresh)
	require.Len(t, history(t, st, run.ID).Jobs, 1)
}

// testLoserLeavesNothing has losers between winners, each losing late in its record.
func testLoserLeavesNothing(t *testing.T, st store.Store) {
	e := paymentEntity(t, st)
	taken := newJob(started(t, st))
	r := change(&store.Run{ID: taken.RunID, Epoch: 1})
	r.NewJobs = []*store.Job{taken}
	commit(t, st, r)

	var records []*store.Record
	var runs []*store.Run
	losers := []func(*store.Record, *store.Run){
		func(r *store.Record, run *store.Run) {
			twin := newJob(run)
			twin.ID = taken.ID
			r.NewJobs = []*store.Job{newJob(run), twin}
		},
		func(r *store.Record, run *store.Run) {
			r.NewJobs = []*store.Job{newJob(run)}
			r.ChangedJobs = []*store.Job{newJob(run)}
		},
		func(r *store.Record, run *store.Run) {
			r.NewJobs = []*store.Job{newJob(run)}
			r.TakenSignals = map[int64]string{987654: "steps[0]"}
		},
		func(r *store.Record, _ *store.Run) {
			r.UpdateRow = &store.EntityRow{Schema: e.Schema, Entity: e.Name, ID: newID(), Values: map[string]any{"amount": 1}}
		},
		func(r *store.Record, _ *store.Run) {
			r.InsertRow = &store.EntityRow{Schema: e.Schema, Entity: e.Name, ID: newID(), Values: map[string]any{"status": nil}}
		},
	}
	for _, lose := range losers {
		win, loser := newRun(), newRun()
		bad := create(loser)
		lose(bad, loser)
		good := create(win)
		good.NewJobs = []*store.Job{newJob(win)}
		records = append(records, good, bad)
		runs = append(runs, win, loser)
	}
	for i, err := range commitAll(t, st, records...) {
		if i%2 == 0 {
			require.NoError(t, err, "record %d", i)
			require.Len(t, history(t, st, runs[i].ID).Jobs, 1)
			continue
		}
		require.Error(t, err, "record %d", i)
		_, err := st.Run(t.Context(), runs[i].ID)
		require.ErrorIs(t, err, store.ErrNotFound, "record %d", i)
		jobs, err := st.Jobs(t.Context(), runs[i].ID, 0)
		require.NoError(t, err)
		require.Empty(t, jobs, "record %d", i)
	}
}

func testIdempotencyKey(t *testing.T, st store.Store) {
	first := newRun()
	first.IdempotencyKey, first.TenantID = "once", tenant
	commit(t, st, create(first))

	second := newRun()
	second.IdempotencyKey, second.TenantID = "once", tenant
	r := create(second)
	r.NewJobs = []*store.Job{newJob(second)}
	requireDuplicate(t, commitOne(t, st, r), first.ID)
	_, err := st.Run(t.Context(), second.ID)
	require.ErrorIs(t, err, store.ErrNotFound)
	jobs, err := st.Jobs(t.Context(), second.ID, 0)
	require.NoError(t, err)
	require.Empty(t, jobs)

	// Keys are of a tenant, and no key is no key.
	for _, of := range []string{"", tenant2} {
		other := newRun()
		other.IdempotencyKey, other.TenantID = "once", of
		commit(t, st, create(other))
		found, err := st.RunByKey(t.Context(), of, "once")
		require.NoError(t, err)
		require.Equal(t, other.ID, found.ID)
	}
	commit(t, st, create(newRun()), create(newRun()))
	found, err := st.RunByKey(t.Context(), tenant, "once")
	require.NoError(t, err)
	requireEqual(t, first, found)
	_, err = st.RunByKey(t.Context(), tenant, "ONCE")
	require.ErrorIs(t, err, store.ErrNotFound)
	_, err = st.RunByKey(t.Context(), tenant, "")
	require.ErrorIs(t, err, store.ErrNotFound)
}

func testIdempotencyKeysInOneBatch(t *testing.T, st store.Store) {
	a, b, c := newRun(), newRun(), newRun()
	a.IdempotencyKey, b.IdempotencyKey = "k", "k"
	errs := commitAll(t, st, create(a), create(b), create(c))
	require.NoError(t, errs[0])
	requireDuplicate(t, errs[1], a.ID)
	require.NoError(t, errs[2])
}

func testSameRunTwice(t *testing.T, st store.Store) {
	run := started(t, st)
	requireDuplicate(t, commitOne(t, st, create(run)), run.ID)
}

// statuses are all states; forward says which change is a step forward.
var (
	statuses = []store.Status{store.Pending, store.Running, store.Completed, store.Failed, store.Cancelled}
	forward  = map[store.Status]int{store.Pending: 0, store.Running: 1, store.Completed: 2, store.Failed: 2, store.Cancelled: 2}
)

func allowed(from, to store.Status) bool { return from == to || forward[from] < forward[to] }

func testOneWayStates(t *testing.T, st store.Store) {
	for _, from := range statuses {
		for _, to := range statuses {
			run := newRun()
			run.Status = from
			live := newRun()
			job := newJob(live)
			job.Status = from
			step := &store.Step{RunID: live.ID, StepPath: "steps[3]", Kind: "wait", Status: from}
			r := create(live)
			r.NewJobs, r.Steps = []*store.Job{job}, []*store.Step{step}
			commit(t, st, create(run), r)

			setRun, setJob, setStep := change(run), change(live), change(live)
			setRun.Run = &store.RunChange{Status: to}
			changedJob, changedStep := *job, *step
			changedJob.Status, changedJob.Output = to, json.RawMessage(`"late"`)
			changedStep.Status = to
			setJob.ChangedJobs, setStep.Steps = []*store.Job{&changedJob}, []*store.Step{&changedStep}
			for i, err := range commitAll(t, st, setRun, setJob, setStep) {
				if allowed(from, to) {
					require.NoError(t, err, "%s to %s: %d", from, to, i)
				} else {
					require.ErrorIs(t, err, store.ErrState, "%s to %s: %d", from, to, i)
				}
			}
			want := from
			if allowed(from, to) {
				want = to
			}
			h := history(t, st, live.ID)
			require.Equal(t, want, load(t, st, run.ID).Status, "%s to %s", from, to)
			require.Equal(t, want, h.Jobs[0].Status, "%s to %s", from, to)
			require.Equal(t, want, h.Steps[0].Status, "%s to %s", from, to)
			if !allowed(from, to) {
				require.Empty(t, h.Jobs[0].Output, "%s to %s", from, to)
			}
		}
	}
}

func (s *suite) testOneWayStatesInSQL(t *testing.T, st store.Store) {
	if s.rawSQL == nil {
		t.Skip("this database runs no raw statements here")
	}
	for _, from := range statuses {
		run := newRun()
		run.Status = from
		job := newJob(run)
		job.Status = from
		r := create(run)
		r.NewJobs, r.Steps = []*store.Job{job}, []*store.Step{{RunID: run.ID, StepPath: "s", Kind: "wait", Status: from}}
		commit(t, st, r)
		for _, to := range append(statuses, "unknown") {
			if allowed(from, to) && to != "unknown" {
				continue
			}
			for _, statement := range []string{
				"UPDATE jobs.tb_workflow_run SET status = '%s' WHERE id = '%s'",
				"UPDATE jobs.tb_job_run SET status = '%s' WHERE run_id = '%s'",
				"UPDATE jobs.tb_workflow_step SET status = '%s' WHERE run_id = '%s'",
			} {
				require.Error(t, s.rawSQL(t, st, fmt.Sprintf(statement, to, run.ID)), "%s to %s: %s", from, to, statement)
			}
		}
		h := history(t, st, run.ID)
		require.Equal(t, []store.Status{from, from, from}, []store.Status{h.Run.Status, h.Jobs[0].Status, h.Steps[0].Status})
	}
	run := ended(t, st, store.Failed)
	for _, statement := range []string{
		"UPDATE jobs.tb_workflow_run SET status = 'running', retries = retries + 2 WHERE id = '%s'",
		"UPDATE jobs.tb_workflow_run SET retries = retries + 1 WHERE id = '%s'",
		"UPDATE jobs.tb_workflow_run SET retries = retries - 1 WHERE id = '%s'",
	} {
		require.Error(t, s.rawSQL(t, st, fmt.Sprintf(statement, run.ID)), statement)
	}
	require.NoError(t, s.rawSQL(t, st, fmt.Sprintf("UPDATE jobs.tb_workflow_run SET status = 'running', retries = retries + 1 WHERE id = '%s'", run.ID)))
}

// testForeignRecords: a record is about one run, and runs that are not there have no jobs.
func testForeignRecords(t *testing.T, st store.Store) {
	a, b := started(t, st), started(t, st)
	job := newJob(a)
	r := change(a)
	r.NewJobs = []*store.Job{job}
	commit(t, st, r)

	other := change(b)
	other.ChangedJobs = []*store.Job{job}
	require.Error(t, commitOne(t, st, other))
	stolen := *job
	stolen.RunID = b.ID
	other.ChangedJobs = []*store.Job{&stolen}
	require.ErrorIs(t, commitOne(t, st, other), store.ErrNotFound)
	other = change(b)
	other.Steps = []*store.Step{{RunID: a.ID, StepPath: "s", Kind: "wait", Status: store.Running}}
	require.Error(t, commitOne(t, st, other))
	other = change(b)
	other.Create = newRun()
	require.Error(t, commitOne(t, st, other))
	require.Error(t, commitOne(t, st, &store.Record{}))
	require.Equal(t, int64(1), load(t, st, b.ID).Sequence)
}

func testNotFound(t *testing.T, st store.Store) {
	ctx, id := t.Context(), newID()
	_, err := st.Run(ctx, id)
	require.ErrorIs(t, err, store.ErrNotFound)
	_, err = st.RunByKey(ctx, "", "none")
	require.ErrorIs(t, err, store.ErrNotFound)
	_, err = st.History(ctx, id)
	require.ErrorIs(t, err, store.ErrNotFound)
	_, err = st.ClaimRun(ctx, owner, id)
	require.ErrorIs(t, err, store.ErrNotFound)
	require.ErrorIs(t, st.RequestCancel(ctx, id, ""), store.ErrNotFound)
	require.ErrorIs(t, st.AddSignal(ctx, &store.Signal{RunID: id, Name: "go"}), store.ErrNotFound)
	require.ErrorIs(t, commitOne(t, st, &store.Record{RunID: id, Epoch: 1, Sequence: 1}), store.ErrNotFound)
	_, _, err = st.Registry(ctx)
	require.ErrorIs(t, err, store.ErrNotFound)
	_, err = st.Snapshot(ctx, "none")
	require.ErrorIs(t, err, store.ErrNotFound)
	require.ErrorIs(t, st.SetRegistry(ctx, "none"), store.ErrNotFound)

	jobs, err := st.Jobs(ctx, id, 0)
	require.NoError(t, err)
	require.Empty(t, jobs)
	results, err := st.Commit(ctx, nil)
	require.NoError(t, err)
	require.Empty(t, results)
}

func testHostileText(t *testing.T, st store.Store) {
	run := newRun()
	run.Action = `'; DROP TABLE tb_workflow_run; --"` + "\n\t🙂"
	run.CorrelationID = strings.Repeat("%_", 100)
	run.Input = json.RawMessage(`{"a": "\u0001 ' \" \\ 🙂", "b": 1e300}`)
	commit(t, st, create(run))
	requireEqual(t, run, load(t, st, run.ID))

	// What is not JSON is refused, alone.
	bad, good := newRun(), newRun()
	bad.Input = json.RawMessage(`{"a":`)
	errs := commitAll(t, st, create(bad), create(good))
	require.Error(t, errs[0])
	require.NoError(t, errs[1])
}

func testLargePayload(t *testing.T, st store.Store) {
	run := newRun()
	run.Input = json.RawMessage(`"` + strings.Repeat("x", 4<<20) + `"`)
	commit(t, st, create(run))
	r := change(run)
	r.Run = &store.RunChange{Status: store.Completed, Output: run.Input}
	commit(t, st, r)
	require.Len(t, load(t, st, run.ID).Output, len(run.Input))
}
