package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// querier is a reading connection or transaction.
type querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

const runHeadColumns = `id, entity, action, entity_schema, entity_id, status, owner, epoch, retries, sequence,
	cancel_requested, cancel_reason, snapshot, idempotency_key, correlation_id, tenant_id, triggered_by, traceparent,
	error_code, error_message, error_retryable, error_attempts,
	created_at, started_at, completed_at`

const (
	runColumns = runHeadColumns + `, output_data, entity_row, input_data`
	// runListColumns leave the payloads out: a list of runs is bounded by its length alone.
	runListColumns = runHeadColumns + `, NULL, NULL, NULL`
)

// scanner is a row of either kind.
type scanner interface{ Scan(dest ...any) error }

func scanRun(row scanner) (*store.Run, error) {
	r := &store.Run{}
	var e errColumns
	d := e.dest()
	err := row.Scan(&r.ID, textColumn{&r.Entity}, textColumn{&r.Action}, textColumn{&r.EntitySchema}, textColumn{&r.EntityID},
		&r.Status, &r.Owner, &r.Epoch, &r.Retries, &r.Sequence,
		&r.CancelRequested, textColumn{&r.CancelReason}, textColumn{&r.Snapshot}, textColumn{&r.IdempotencyKey},
		textColumn{&r.CorrelationID}, textColumn{&r.TenantID}, textColumn{&r.Subject}, textColumn{&r.Traceparent},
		d[0], d[1], d[2], d[3],
		timeColumn{&r.CreatedAt}, timeColumn{&r.StartedAt}, timeColumn{&r.CompletedAt},
		jsonColumn{&r.Output}, jsonColumn{&r.EntityRow}, jsonColumn{&r.Input})
	if err != nil {
		return nil, err
	}
	r.Err = e.err()
	return r, nil
}

const jobColumns = `id, idempotency_key, run_id, step_path, generation, service_name, operation, execution_type,
	status, attempts, max_attempts, next_attempt_at, timeout_seconds, sequence,
	error_code, error_message, error_retryable, error_attempts,
	tenant_id, triggered_by, correlation_id, entity_type, entity_pk,
	created_at, started_at, completed_at,
	resource_usage, security_context, runner_config, output_data, input_data`

func scanJob(row scanner) (*store.Job, error) {
	j := &store.Job{}
	var e errColumns
	d := e.dest()
	err := row.Scan(&j.ID, textColumn{&j.IdempotencyKey}, textColumn{&j.RunID}, textColumn{&j.StepPath}, &j.Generation,
		&j.Service, &j.Operation, &j.ExecutionType,
		&j.Status, &j.Attempts, &j.MaxAttempts, timeColumn{&j.NextAttemptAt}, secondsColumn{&j.Timeout}, &j.Sequence,
		d[0], d[1], d[2], d[3],
		textColumn{&j.TenantID}, textColumn{&j.TriggeredBy}, textColumn{&j.CorrelationID}, textColumn{&j.EntityType}, textColumn{&j.EntityPK},
		timeColumn{&j.CreatedAt}, timeColumn{&j.StartedAt}, timeColumn{&j.CompletedAt},
		jsonColumn{&j.ResourceUsage}, jsonColumn{&j.SecurityContext}, jsonColumn{&j.RunnerConfig}, jsonColumn{&j.Output}, jsonColumn{&j.Input})
	if err != nil {
		return nil, err
	}
	j.Err = e.err()
	return j, nil
}

// query reads every row of a query.
func query[T any](ctx context.Context, q querier, scan func(scanner) (T, error), text string, args ...any) ([]T, error) {
	rows, err := q.QueryContext(ctx, text, args...)
	if err != nil {
		return nil, err
	}
	defer func() { _ = rows.Close() }()
	var all []T
	for rows.Next() {
		v, err := scan(rows)
		if err != nil {
			return nil, err
		}
		all = append(all, v)
	}
	return all, rows.Err()
}

// one reads the row of a query; ErrNotFound where there is none.
func one[T any](ctx context.Context, q querier, scan func(scanner) (T, error), text string, args ...any) (T, error) {
	v, err := scan(q.QueryRowContext(ctx, text, args...))
	if errors.Is(err, sql.ErrNoRows) {
		err = store.ErrNotFound
	}
	return v, err
}

func isNotFound(err error) bool { return errors.Is(err, store.ErrNotFound) }

// read begins a read; its end must be told. ErrClosed after Close.
func (s *Store) read() (end func(), err error) {
	s.reads.RLock()
	select {
	case <-s.closed:
		s.reads.RUnlock()
		return nil, store.ErrClosed
	default:
		return s.reads.RUnlock, nil
	}
}

// Run implements [store.Store].
func (s *Store) Run(ctx context.Context, id string) (*store.Run, error) {
	end, err := s.read()
	if err != nil {
		return nil, err
	}
	defer end()
	r, err := readRun(ctx, s.readDB, id)
	if err != nil {
		return nil, fmt.Errorf("run %s: %w", id, err)
	}
	return r, nil
}

func readRun(ctx context.Context, q querier, id string) (*store.Run, error) {
	return one(ctx, q, scanRun, "SELECT "+runColumns+" FROM jobs.tb_workflow_run WHERE id = ?", id)
}

// RunByKey implements [store.Store].
func (s *Store) RunByKey(ctx context.Context, tenantID, key string) (*store.Run, error) {
	end, err := s.read()
	if err != nil {
		return nil, err
	}
	defer end()
	r, err := one(ctx, s.readDB, scanRun, "SELECT "+runColumns+` FROM jobs.tb_workflow_run
		WHERE idempotency_key IS NOT NULL AND coalesce(tenant_id, '') = ? AND idempotency_key = ?`, tenantID, key)
	if err != nil {
		return nil, fmt.Errorf("run with idempotency key %q: %w", key, err)
	}
	return r, nil
}

// Jobs implements [store.Store].
func (s *Store) Jobs(ctx context.Context, runID string, after int64) ([]*store.Job, error) {
	end, err := s.read()
	if err != nil {
		return nil, err
	}
	defer end()
	jobs, err := readJobs(ctx, s.readDB, runID, after)
	if err != nil {
		return nil, fmt.Errorf("jobs of run %s: %w", runID, err)
	}
	return jobs, nil
}

func readJobs(ctx context.Context, q querier, runID string, after int64) ([]*store.Job, error) {
	return query(ctx, q, scanJob, "SELECT "+jobColumns+` FROM jobs.tb_job_run
		WHERE run_id = ? AND sequence > ? ORDER BY created_at, id`, runID, after)
}

// History implements [store.Store]. All of it is of one moment.
func (s *Store) History(ctx context.Context, id string) (_ *store.History, err error) {
	end, err := s.read()
	if err != nil {
		return nil, err
	}
	defer end()
	defer func() {
		if err != nil {
			err = fmt.Errorf("history of run %s: %w", id, err)
		}
	}()
	tx, err := s.readDB.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	defer func() { _ = tx.Rollback() }()
	h := &store.History{}
	if h.Run, err = readRun(ctx, tx, id); err != nil {
		return nil, err
	}
	// Every job, also one of a writer that gives no sequences.
	if h.Jobs, err = readJobs(ctx, tx, id, -1); err != nil {
		return nil, err
	}
	if h.Steps, err = query(ctx, tx, scanStep, `SELECT run_id, step_path, generation, kind, status, name, until, sequence,
			error_code, error_message, error_retryable, error_attempts, started_at, completed_at, data
		FROM jobs.tb_workflow_step WHERE run_id = ? ORDER BY step_path, generation`, id); err != nil {
		return nil, err
	}
	if h.Signals, err = query(ctx, tx, scanSignal, `SELECT id, run_id, name, taken_by, created_at, payload
		FROM jobs.tb_workflow_signal WHERE run_id = ? ORDER BY id`, id); err != nil {
		return nil, err
	}
	return h, nil
}

func scanStep(row scanner) (*store.Step, error) {
	st := &store.Step{}
	var e errColumns
	d := e.dest()
	err := row.Scan(&st.RunID, &st.StepPath, &st.Generation, &st.Kind, &st.Status, textColumn{&st.Name}, timeColumn{&st.Until}, &st.Sequence,
		d[0], d[1], d[2], d[3], timeColumn{&st.StartedAt}, timeColumn{&st.CompletedAt}, jsonColumn{&st.Data})
	if err != nil {
		return nil, err
	}
	st.Err = e.err()
	return st, nil
}

func scanSignal(row scanner) (*store.Signal, error) {
	sig := &store.Signal{}
	err := row.Scan(&sig.ID, &sig.RunID, &sig.Name, textColumn{&sig.TakenBy}, timeColumn{&sig.CreatedAt}, jsonColumn{&sig.Payload})
	if err != nil {
		return nil, err
	}
	return sig, nil
}

// maxPage bounds what one listing returns.
const maxPage = 10_000

// pageSize is how many rows a caller gets who asks for limit; none means all, up to the bound.
func pageSize(limit int) int {
	if limit <= 0 || limit > maxPage {
		return maxPage
	}
	return limit
}

// Runs implements [store.Store].
func (s *Store) Runs(ctx context.Context, f store.RunFilter) ([]*store.Run, error) {
	end, err := s.read()
	if err != nil {
		return nil, err
	}
	defer end()
	where := []string{"true"}
	var args []any
	add := func(condition string, values ...any) {
		where = append(where, condition)
		args = append(args, values...)
	}
	if len(f.Statuses) > 0 {
		var values []any
		for _, st := range f.Statuses {
			values = append(values, string(st))
		}
		add("status IN (?"+strings.Repeat(", ?", len(values)-1)+")", values...)
	}
	if f.Entity != "" {
		add("entity = ?", f.Entity)
	}
	if f.Action != "" {
		add("action = ?", f.Action)
	}
	if f.Tenants != nil {
		condition, value := ofTenants("?", f.Tenants)
		add(condition, value)
	}
	if f.Before != "" {
		add("id < ?", f.Before)
	}
	args = append(args, pageSize(f.Limit))
	runs, err := query(ctx, s.readDB, scanRun, "SELECT "+runListColumns+" FROM jobs.tb_workflow_run WHERE "+
		strings.Join(where, " AND ")+" ORDER BY id DESC LIMIT ?", args...)
	if err != nil {
		return nil, fmt.Errorf("list runs: %w", err)
	}
	return runs, nil
}
