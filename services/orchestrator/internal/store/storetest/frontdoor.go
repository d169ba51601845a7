package storetest

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// adopt is the record that makes a claimed job a part of a run of its own.
func adopt(job *store.Job, by string) *store.Record {
	run := newRun()
	run.Owner = by
	j := *job
	j.RunID, j.StepPath, j.Adopted, j.Status, j.Attempts, j.MaxAttempts, j.StartedAt, j.Sequence = run.ID, "steps[0]", true, store.Running, 1, 3, day, 1
	r := create(run)
	r.NewJobs = []*store.Job{&j}
	return r
}

// testFrontDoor: rows that a client inserts are found once, by one owner, and become parts of runs.
func (s *suite) testFrontDoor(t *testing.T, st store.Store) {
	if s.rawSQL == nil || !s.manyOwners {
		t.Skip("this database has no other clients")
	}
	ctx := t.Context()
	exec := func(statement string, args ...any) {
		t.Helper()
		require.NoError(t, s.rawSQL(t, st, fmt.Sprintf(statement, args...)))
	}
	claim := func(by string, limit int) []*store.Job {
		t.Helper()
		jobs, err := st.ClaimJobs(ctx, by, limit)
		require.NoError(t, err)
		return jobs
	}
	_, err := st.Heartbeat(ctx, owner, true)
	require.NoError(t, err)
	_, err = st.Heartbeat(ctx, "orchestrator-b", true)
	require.NoError(t, err)
	require.Empty(t, claim(owner, 10))

	first, second, third := newID(), newID(), newID()
	exec(`INSERT INTO jobs.tb_job_run (id, identifier, idempotency_key, service_name, operation, input_data, tenant_id, correlation_id, timeout_seconds)
		VALUES ('%s', 'mine', 'k1', 'api', 'call', '{"n": 1}', '%s', 'corr', 5)`, first, tenant)
	exec(`INSERT INTO jobs.tb_job_run (id, service_name, operation, execution_type) VALUES ('%s', 'api', 'call', 'docker'), ('%s', 'api', 'call', 'http')`, second, third)
	exec(`INSERT INTO jobs.tb_job_run (service_name, operation, status) VALUES ('api', 'call', 'completed'), ('api', 'call', 'failed')`)
	require.Error(t, s.rawSQL(t, st, fmt.Sprintf(`INSERT INTO jobs.tb_job_run (idempotency_key, service_name, operation, tenant_id)
		VALUES ('k1', 'api', 'call', '%s')`, tenant)), "one call for each key")

	got := claim(owner, 2)
	require.Len(t, got, 2, "oldest first")
	require.Equal(t, []string{first, second}, []string{got[0].ID, got[1].ID})
	require.Equal(t, []any{"api", "call", "http", "k1", tenant, "corr", store.Pending, 5 * time.Second, ""},
		[]any{got[0].Service, got[0].Operation, got[0].ExecutionType, got[0].IdempotencyKey, got[0].TenantID, got[0].CorrelationID, got[0].Status, got[0].Timeout, got[0].RunID})
	require.JSONEq(t, `{"n": 1}`, string(got[0].Input))
	require.Len(t, claim("orchestrator-b", 10), 1, "what is claimed is the claimer's")
	require.Empty(t, claim(owner, 10))
	owned := func() (ids []string) {
		t.Helper()
		_, jobs, err := st.Owned(ctx, owner)
		require.NoError(t, err)
		for _, j := range jobs {
			ids = append(ids, j.ID)
		}
		return ids
	}
	require.Equal(t, []string{first, second}, owned(), "an answer that was lost can be asked for again")

	r := adopt(got[0], owner)
	commit(t, st, r)
	require.Equal(t, []string{second}, owned())
	h := history(t, st, r.RunID)
	require.Len(t, h.Jobs, 1)
	want := *r.NewJobs[0]
	want.Adopted = false
	requireEqual(t, &want, h.Jobs[0])
	require.Equal(t, got[0].CreatedAt, h.Jobs[0].CreatedAt)
	require.NoError(t, s.rawSQL(t, st, fmt.Sprintf(`DO $$ BEGIN IF (SELECT identifier FROM jobs.tb_job_run WHERE id = '%s') <> 'mine' THEN RAISE 'changed'; END IF; END $$`, first)))

	// Twice is once too often, and so is what its client has cancelled meanwhile. Others of the batch are written.
	again := adopt(got[0], owner)
	exec(`UPDATE jobs.tb_job_run SET status = 'cancelled' WHERE id = '%s'`, second)
	late := adopt(got[1], owner)
	ok := newRun()
	errs := commitAll(t, st, again, create(ok), late)
	require.ErrorIs(t, errs[0], store.ErrState)
	require.NoError(t, errs[1])
	require.ErrorIs(t, errs[2], store.ErrState)
	for _, lost := range []*store.Record{again, late} {
		_, err := st.Run(ctx, lost.RunID)
		require.ErrorIs(t, err, store.ErrNotFound)
	}

	// What a dead owner claimed goes to the next one; what is over leaves the queue by itself.
	require.NoError(t, st.Retire(ctx, "orchestrator-b"))
	require.Len(t, claim(owner, 10), 1)
	buried, err := st.Bury(ctx, owner, 1)
	require.NoError(t, err)
	require.True(t, buried)
	jobs := claim("orchestrator-b", 10)
	require.Len(t, jobs, 1)
	require.Equal(t, third, jobs[0].ID)
	end := adopt(jobs[0], "orchestrator-b")
	commit(t, st, end)
	done := *end.NewJobs[0]
	done.Status, done.Output, done.CompletedAt = store.Completed, json.RawMessage(`{"ok": true}`), day.Add(time.Second)
	commit(t, st, &store.Record{RunID: end.RunID, Epoch: 1, Sequence: 9, ChangedJobs: []*store.Job{&done}})
	require.Empty(t, claim("orchestrator-c", 10))
}

// testRolledBack: what a client takes back was never there.
func (s *suite) testRolledBack(t *testing.T, st store.Store) {
	if s.rawSQL == nil || !s.manyOwners {
		t.Skip("this database has no other clients")
	}
	require.Error(t, s.rawSQL(t, st, `DO $$ BEGIN
		INSERT INTO jobs.tb_job_run (service_name, operation) VALUES ('api', 'call');
		INSERT INTO jobs.tb_workflow_run (entity, action) VALUES ('payment', 'process');
		RAISE 'no'; END $$`))
	jobs, err := st.ClaimJobs(t.Context(), owner, 10)
	require.NoError(t, err)
	require.Empty(t, jobs)
	runs, err := st.Claim(t.Context(), owner, 10)
	require.NoError(t, err)
	require.Empty(t, runs)
}

// testConcurrentAdoption: thousands of rows of one statement, each taken once.
func (s *suite) testConcurrentAdoption(t *testing.T, st store.Store) {
	if s.rawSQL == nil || !s.manyOwners {
		t.Skip("this database has no other clients")
	}
	const rows = 1000
	require.NoError(t, s.rawSQL(t, st, fmt.Sprintf(`INSERT INTO jobs.tb_job_run (service_name, operation, input_data)
		SELECT 'api', 'call', jsonb_build_object('n', n) FROM generate_series(1, %d) AS n`, rows)))
	var mu sync.Mutex
	seen := map[string]int{}
	parallel(t.Context(), t, 4, func(ctx context.Context, i int) error {
		by := fmt.Sprintf("orchestrator-%d", i)
		if _, err := st.Heartbeat(ctx, by, true); err != nil {
			return err
		}
		for {
			jobs, err := st.ClaimJobs(ctx, by, 100)
			if err != nil || len(jobs) == 0 {
				return err
			}
			var records []*store.Record
			for _, j := range jobs {
				records = append(records, adopt(j, by))
			}
			if err := appendAll(ctx, st, records...); err != nil {
				return err
			}
			mu.Lock()
			for _, j := range jobs {
				seen[string(j.Input)]++
			}
			mu.Unlock()
		}
	})
	require.Len(t, seen, rows)
	for input, n := range seen {
		require.Equal(t, 1, n, input)
	}
}

// testListen: whoever listens hears of what others do.
func (s *suite) testListen(t *testing.T, st store.Store) {
	if s.rawSQL == nil || !s.manyOwners {
		t.Skip("this database has no other clients")
	}
	ctx, cancel := context.WithCancel(t.Context())
	heard := make(chan store.Notice, 1000)
	done := make(chan error, 1)
	go func() { done <- st.Listen(ctx, func(n store.Notice) { heard <- n }) }()
	expect := func(want store.Notice, why string) {
		t.Helper()
		limit := time.After(time.Minute)
		for {
			select {
			case n := <-heard:
				if n == want {
					return
				}
			case <-limit:
				require.Fail(t, "no notice", why)
			}
		}
	}
	for n := store.NoticeWork; n <= store.NoticeRegistry; n++ {
		expect(n, "one of each to begin with")
	}
	run := started(t, st)
	require.NoError(t, s.rawSQL(t, st, "INSERT INTO jobs.tb_job_run (service_name, operation) VALUES ('api', 'call')"))
	expect(store.NoticeWork, "a pending job")
	require.NoError(t, s.rawSQL(t, st, "INSERT INTO jobs.tb_workflow_run (entity, action) VALUES ('payment', 'process')"))
	expect(store.NoticeWork, "a pending run")
	require.NoError(t, st.AddSignal(ctx, &store.Signal{RunID: run.ID, Name: "go"}))
	expect(store.NoticeRequest, "a signal")
	require.NoError(t, st.RequestCancel(ctx, run.ID, ""))
	expect(store.NoticeRequest, "a cancel")
	require.NoError(t, st.SaveSnapshot(ctx, "d", nil))
	require.NoError(t, st.SetRegistry(ctx, "d"))
	expect(store.NoticeRegistry, "a registry")
	require.NoError(t, st.SetExecutionTypes(ctx, []string{"shell"}, nil))
	expect(store.NoticeRegistry, "an execution type")
	require.NoError(t, st.Release(ctx, owner, []string{run.ID}))
	expect(store.NoticeWork, "a released run")
	cancel()
	require.ErrorIs(t, <-done, context.Canceled)
}
