package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// errRedo asks for the batch once more, with savepoints.
var errRedo = errors.New("a record failed halfway")

// Commit implements [store.Store]. A batch first runs without savepoints, since records
// hardly ever fail once their fence has let them through; where one does, the batch is rolled
// back and runs again with a savepoint around each record. A key that the database gave to
// an entity's row is set in the record.
func (s *Store) Commit(ctx context.Context, records []*store.Record) ([]error, error) {
	if len(records) == 0 {
		return nil, nil
	}
	results := make([]error, len(records))
	given := map[*store.Record]*application{}
	err := s.write(ctx, func(w *writer) error {
		return s.applyAll(w, records, results, given, false)
	})
	if errors.Is(err, errRedo) {
		clear(results)
		clear(given)
		err = s.write(context.WithoutCancel(ctx), func(w *writer) error {
			return s.applyAll(w, records, results, given, true)
		})
	}
	if err != nil {
		return nil, fmt.Errorf("commit %d records: %w", len(records), err)
	}
	for r, a := range given {
		if a.rowID != "" {
			r.InsertRow.ID = a.rowID
		}
		for i, result := range a.takes {
			r.Takes[i].Result = result
		}
	}
	return results, nil
}

// applyAll writes the records one after the other. There is no round trip to save within
// one process: a prepared statement for each row is as quick as rows gathered into one.
func (s *Store) applyAll(w *writer, records []*store.Record, results []error, given map[*store.Record]*application, savepoints bool) error {
	for i, r := range records {
		a := &application{store: s, w: w, record: r, now: timeValue(s.timeNow())}
		var err error
		if savepoints {
			err = w.savepoint(a.run)
		} else {
			err = a.run()
		}
		if err == nil {
			if a.rowID != "" || len(a.takes) > 0 {
				given[r] = a
			}
			continue
		}
		fault, ok := asRecordError(err)
		if !ok {
			return err
		}
		if a.wrote && !savepoints {
			return errRedo
		}
		results[i] = fmt.Errorf("run %s: %w", r.RunID, fault)
	}
	return nil
}

// application writes one record.
type application struct {
	store  *Store
	w      *writer
	record *store.Record
	now    any
	// wrote says that a part of the record is in the transaction.
	wrote bool
	// rowID is the key that the database gave to the entity's row; empty where the record has one.
	rowID string
	// takes are what became of the record's takes.
	takes []store.TakeResult
}

// exec changes rows and notes that it did.
func (a *application) exec(query string, args ...any) (int64, error) {
	n, err := a.w.exec(query, args...)
	if n > 0 {
		a.wrote = true
	}
	return n, err
}

func (a *application) run() error {
	if err := a.check(); err != nil {
		return err
	}
	steps := []func() error{a.fence, a.entity, a.jobs, a.steps, a.signals, a.limits}
	if a.record.Create != nil {
		steps[0] = a.create
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// check refuses records that mix runs.
func (a *application) check() error {
	r := a.record
	if r.RunID == "" {
		return invalidf("the record names no run")
	}
	if r.Create != nil && r.Create.ID != r.RunID {
		return invalidf("the record creates another run, %s", r.Create.ID)
	}
	for _, jobs := range [][]*store.Job{r.NewJobs, r.ChangedJobs} {
		for _, j := range jobs {
			if j.RunID != r.RunID {
				return invalidf("job %s belongs to another run, %s", j.ID, j.RunID)
			}
		}
	}
	for _, st := range r.Steps {
		if st.RunID != r.RunID {
			return invalidf("step %s belongs to another run, %s", st.StepPath, st.RunID)
		}
	}
	if err := r.CheckLimits(); err != nil {
		return invalid(err)
	}
	return nil
}

func (a *application) create() error {
	r := a.record.Create
	if r.IdempotencyKey != "" {
		var first string
		err := a.w.row(`SELECT id FROM jobs.tb_workflow_run
			WHERE idempotency_key IS NOT NULL AND coalesce(tenant_id, '') = ? AND idempotency_key = ?`,
			[]any{r.TenantID, r.IdempotencyKey}, &first)
		if err == nil {
			return invalid(&store.DuplicateError{RunID: first})
		}
		if !errors.Is(err, sql.ErrNoRows) {
			return err
		}
	}
	e := errValues(r.Err)
	created := timeValue(r.CreatedAt)
	if created == nil {
		created = a.now
	}
	_, err := a.exec(`INSERT INTO jobs.tb_workflow_run (
			id, entity, action, entity_schema, entity_id, status, owner, epoch, retries, sequence,
			cancel_requested, cancel_reason, snapshot, idempotency_key, correlation_id, tenant_id, triggered_by, traceparent,
			error_code, error_message, error_retryable, error_attempts,
			created_at, started_at, completed_at, updated_at, output_data, entity_row, input_data)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		r.ID, textValue(r.Entity), textValue(r.Action), textValue(r.EntitySchema), textValue(r.EntityID),
		string(r.Status), r.Owner, r.Epoch, r.Retries, max(r.Sequence, a.record.Sequence),
		boolValue(r.CancelRequested), textValue(r.CancelReason), textValue(r.Snapshot), textValue(r.IdempotencyKey),
		textValue(r.CorrelationID), textValue(r.TenantID), textValue(r.Subject), textValue(r.Traceparent),
		e[0], e[1], e[2], e[3],
		created, timeValue(r.StartedAt), timeValue(r.CompletedAt), a.now,
		jsonValue(r.Output), jsonValue(r.EntityRow), jsonValue(r.Input))
	if exists(err) {
		return invalid(&store.DuplicateError{RunID: r.ID})
	}
	if err != nil {
		return err
	}
	if a.record.Run != nil {
		return a.fence()
	}
	return nil
}

// fence sets the run's own columns, if the run still has the record's epoch. It is the first
// statement of a record, so that a record that loses has written nothing.
func (a *application) fence() error {
	r := a.record
	c := r.Run
	var n int64
	var err error
	switch {
	case c == nil:
		n, err = a.exec(`UPDATE jobs.tb_workflow_run SET sequence = max(sequence, ?), updated_at = ?
			WHERE id = ? AND epoch = ?`, r.Sequence, a.now, r.RunID, r.Epoch)
	case c.Retry:
		n, err = a.exec(`UPDATE jobs.tb_workflow_run SET sequence = max(sequence, ?), updated_at = ?,
				status = 'running', retries = retries + 1, output_data = NULL,
				error_code = NULL, error_message = NULL, error_retryable = NULL, error_attempts = NULL,
				started_at = coalesce(?, started_at), completed_at = NULL, cancel_requested = 0, cancel_reason = NULL
			WHERE id = ? AND epoch = ?`, r.Sequence, a.now, timeValue(c.StartedAt), r.RunID, r.Epoch)
	default:
		e := errValues(c.Err)
		n, err = a.exec(`UPDATE jobs.tb_workflow_run SET sequence = max(sequence, ?), updated_at = ?,
				status = coalesce(?, status), output_data = coalesce(?, output_data),
				error_code = coalesce(?, error_code), error_message = coalesce(?, error_message),
				error_retryable = coalesce(?, error_retryable), error_attempts = coalesce(?, error_attempts),
				started_at = coalesce(?, started_at), completed_at = coalesce(?, completed_at)
			WHERE id = ? AND epoch = ?`, r.Sequence, a.now, textValue(string(c.Status)), jsonValue(c.Output),
			e[0], e[1], e[2], e[3], timeValue(c.StartedAt), timeValue(c.CompletedAt), r.RunID, r.Epoch)
		if m := c.Admit; m != nil && err == nil && n > 0 {
			n, err = a.exec(`UPDATE jobs.tb_workflow_run SET snapshot = ?, entity_id = ?, entity_schema = ?, entity_row = ?, input_data = ?
				WHERE id = ?`, textValue(m.Snapshot), textValue(m.EntityID), textValue(m.EntitySchema), jsonValue(m.EntityRow), jsonValue(m.Input), r.RunID)
		}
	}
	if err != nil {
		return err
	}
	if n > 0 {
		return nil
	}
	var epoch int64
	err = a.w.row("SELECT epoch FROM jobs.tb_workflow_run WHERE id = ?", []any{r.RunID}, &epoch)
	if errors.Is(err, sql.ErrNoRows) {
		return invalid(store.ErrNotFound)
	}
	if err != nil {
		return err
	}
	return invalidf("%w: its epoch is %d, the record's %d", store.ErrFenced, epoch, r.Epoch)
}

func (a *application) entity() error {
	if row := a.record.InsertRow; row != nil {
		if err := a.insertRow(row); err != nil {
			return err
		}
	}
	if row := a.record.UpdateRow; row != nil {
		return a.updateRow(row)
	}
	return nil
}

func (a *application) jobs() error {
	for _, j := range a.record.NewJobs {
		if err := a.insertJob(j); err != nil {
			return err
		}
	}
	for _, j := range a.record.ChangedJobs {
		if err := a.updateJob(j); err != nil {
			return err
		}
	}
	return nil
}

func (a *application) insertJob(j *store.Job) error {
	e := errValues(j.Err)
	created := timeValue(j.CreatedAt)
	if created == nil {
		created = a.now
	}
	_, err := a.exec(`INSERT INTO jobs.tb_job_run (
			id, identifier, idempotency_key, run_id, step_path, generation, service_name, operation, execution_type,
			status, attempts, max_attempts, next_attempt_at, timeout_seconds, duration_seconds, sequence,
			error_code, error_message, error_retryable, error_attempts,
			tenant_id, triggered_by, correlation_id, entity_type, entity_pk,
			created_at, started_at, completed_at, updated_at,
			resource_usage, security_context, runner_config, output_data, input_data)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		j.ID, j.Identifier(), textValue(j.IdempotencyKey), j.RunID, j.StepPath, j.Generation, j.Service, j.Operation, j.ExecutionType,
		string(j.Status), j.Attempts, j.MaxAttempts, timeValue(j.NextAttemptAt), timeoutValue(j.Timeout), durationValue(j), j.Sequence,
		e[0], e[1], e[2], e[3],
		textValue(j.TenantID), textValue(j.TriggeredBy), textValue(j.CorrelationID), textValue(j.EntityType), textValue(j.EntityPK),
		created, timeValue(j.StartedAt), timeValue(j.CompletedAt), a.now,
		jsonValue(j.ResourceUsage), jsonValue(j.SecurityContext), jsonValue(j.RunnerConfig), jsonValue(j.Output), jsonValue(j.Input))
	return err
}

func (a *application) updateJob(j *store.Job) error {
	e := errValues(j.Err)
	n, err := a.exec(`UPDATE jobs.tb_job_run SET
			status = ?, attempts = ?, next_attempt_at = ?, duration_seconds = ?, sequence = ?,
			error_code = ?, error_message = ?, error_retryable = ?, error_attempts = ?,
			started_at = ?, completed_at = ?, updated_at = ?,
			resource_usage = ?, security_context = ?, output_data = ?
		WHERE id = ? AND run_id = ?`,
		string(j.Status), j.Attempts, timeValue(j.NextAttemptAt), durationValue(j), j.Sequence,
		e[0], e[1], e[2], e[3],
		timeValue(j.StartedAt), timeValue(j.CompletedAt), a.now,
		jsonValue(j.ResourceUsage), jsonValue(j.SecurityContext), jsonValue(j.Output),
		j.ID, j.RunID)
	if err == nil && n == 0 {
		return invalidf("job %s: %w", j.ID, store.ErrNotFound)
	}
	return err
}

func timeoutValue(d time.Duration) any {
	if d <= 0 {
		return nil
	}
	return d.Seconds()
}

// durationValue is the time from a job's start to its end, once both are known.
func durationValue(j *store.Job) any {
	if j.StartedAt.IsZero() || j.CompletedAt.IsZero() {
		return nil
	}
	return max(j.CompletedAt.Sub(j.StartedAt), 0).Seconds()
}

func (a *application) steps() error {
	for _, st := range a.record.Steps {
		e := errValues(st.Err)
		_, err := a.exec(`INSERT INTO jobs.tb_workflow_step (
				run_id, step_path, generation, kind, status, name, until, sequence,
				error_code, error_message, error_retryable, error_attempts, started_at, completed_at, data)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
			ON CONFLICT (run_id, step_path, generation) DO UPDATE SET
				kind = excluded.kind, status = excluded.status, name = excluded.name, until = excluded.until,
				sequence = excluded.sequence, error_code = excluded.error_code, error_message = excluded.error_message,
				error_retryable = excluded.error_retryable, error_attempts = excluded.error_attempts,
				started_at = excluded.started_at, completed_at = excluded.completed_at, data = excluded.data`,
			st.RunID, st.StepPath, st.Generation, st.Kind, string(st.Status), textValue(st.Name), timeValue(st.Until), st.Sequence,
			e[0], e[1], e[2], e[3], timeValue(st.StartedAt), timeValue(st.CompletedAt), jsonValue(st.Data))
		if err != nil {
			return err
		}
	}
	return nil
}

func (a *application) signals() error {
	for id, path := range a.record.TakenSignals {
		n, err := a.exec(`UPDATE jobs.tb_workflow_signal SET taken_by = ?
			WHERE id = ? AND run_id = ? AND (taken_by IS NULL OR taken_by = ?)`, path, id, a.record.RunID, path)
		if err != nil {
			return err
		}
		if n > 0 {
			continue
		}
		var by string
		err = a.w.row("SELECT taken_by FROM jobs.tb_workflow_signal WHERE id = ? AND run_id = ?", []any{id, a.record.RunID}, textColumn{&by})
		if errors.Is(err, sql.ErrNoRows) {
			return invalidf("signal %d: %w", id, store.ErrNotFound)
		}
		if err != nil {
			return err
		}
		return invalidf("signal %d: %w: %s has taken it", id, store.ErrState, by)
	}
	return nil
}
