package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

const runHeadColumns = `r.id::text, coalesce(r.entity, ''), coalesce(r.action, ''), coalesce(r.entity_schema, ''), coalesce(r.entity_id, ''),
	r.status, r.owner, r.epoch, r.retries, r.sequence, r.cancel_requested, coalesce(r.cancel_reason, ''), coalesce(r.snapshot, ''),
	coalesce(r.idempotency_key, ''), coalesce(r.correlation_id, ''), coalesce(r.tenant_id, ''), coalesce(r.triggered_by, ''), coalesce(r.traceparent, ''),
	coalesce(r.error_code, ''), coalesce(r.error_message, ''), coalesce(r.error_retryable, false), coalesce(r.error_attempts, 0),
	r.created_at, r.started_at, r.completed_at`

const (
	runReadColumns = runHeadColumns + `, r.output_data, r.entity_row, r.input_data`
	// runListColumns leave the payloads out: a list of runs is bounded by its length alone.
	runListColumns = runHeadColumns + `, NULL::jsonb, NULL::jsonb, NULL::jsonb`
)

func scanRun(row pgx.CollectableRow) (*store.Run, error) {
	r := &store.Run{}
	var e errColumns
	var created, started, completed moment
	err := row.Scan(&r.ID, &r.Entity, &r.Action, &r.EntitySchema, &r.EntityID,
		&r.Status, &r.Owner, &r.Epoch, &r.Retries, &r.Sequence, &r.CancelRequested, &r.CancelReason, &r.Snapshot,
		&r.IdempotencyKey, &r.CorrelationID, &r.TenantID, &r.Subject, &r.Traceparent,
		&e.code, &e.message, &e.retryable, &e.attempts, &created, &started, &completed,
		jsonOf(&r.Output), jsonOf(&r.EntityRow), jsonOf(&r.Input))
	if err != nil {
		return nil, err
	}
	r.CreatedAt, r.StartedAt, r.CompletedAt, r.Err = utc(created), utc(started), utc(completed), e.err()
	return r, nil
}

// jsonOf is where a jsonb column is read into, as the server wrote it.
func jsonOf(j *json.RawMessage) *[]byte { return (*[]byte)(j) }

func scanJob(row pgx.CollectableRow) (*store.Job, error) { return scanJobAnd(row) }

// scanJobAnd reads a job and what stands behind its columns.
func scanJobAnd(row pgx.CollectableRow, rest ...any) (*store.Job, error) {
	j := &store.Job{}
	var e errColumns
	var timeout float64
	var next, created, started, completed moment
	err := row.Scan(append([]any{
		&j.ID, &j.IdempotencyKey, &j.RunID, &j.StepPath, &j.Generation, &j.Service, &j.Operation, &j.ExecutionType,
		&j.Status, &j.Attempts, &j.MaxAttempts, &next, &timeout, &j.Sequence, &e.code, &e.message, &e.retryable, &e.attempts,
		&j.TenantID, &j.TriggeredBy, &j.CorrelationID, &j.EntityType, &j.EntityPK, &created, &started, &completed,
		jsonOf(&j.ResourceUsage), jsonOf(&j.SecurityContext), jsonOf(&j.RunnerConfig), jsonOf(&j.Output), jsonOf(&j.Input),
	}, rest...)...)
	if err != nil {
		return nil, err
	}
	// A client may have written any number; one beyond a year of seconds is none.
	if timeout > 0 && timeout < 366*24*3600 {
		j.Timeout = time.Duration(timeout * float64(time.Second)).Round(time.Microsecond)
	}
	j.NextAttemptAt, j.CreatedAt, j.StartedAt, j.CompletedAt, j.Err = utc(next), utc(created), utc(started), utc(completed), e.err()
	return j, nil
}

// Run implements [store.Store].
func (s *Store) Run(ctx context.Context, id string) (*store.Run, error) {
	r, err := first(ctx, s, scanRun, "SELECT "+runReadColumns+" FROM jobs.tb_workflow_run r WHERE r.id = $1", uuidValue(id))
	if err != nil {
		return nil, fmt.Errorf("run %s: %w", id, err)
	}
	return r, nil
}

// RunByKey implements [store.Store].
func (s *Store) RunByKey(ctx context.Context, tenantID, key string) (*store.Run, error) {
	r, err := first(ctx, s, scanRun, "SELECT "+runReadColumns+` FROM jobs.tb_workflow_run r
		WHERE r.idempotency_key IS NOT NULL AND coalesce(r.tenant_id, '') = $1 AND r.idempotency_key = $2`, plain(tenantID), plain(key))
	if err != nil {
		return nil, fmt.Errorf("run with idempotency key %q: %w", key, err)
	}
	return r, nil
}

// Jobs implements [store.Store].
func (s *Store) Jobs(ctx context.Context, runID string, after int64) (jobs []*store.Job, err error) {
	err = s.with(ctx, func(ctx context.Context, c *pgx.Conn) error {
		jobs, err = s.readJobs(ctx, c, runID, after)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("jobs of run %s: %w", runID, err)
	}
	return jobs, nil
}

func (s *Store) readJobs(ctx context.Context, q querier, runID string, after int64) ([]*store.Job, error) {
	return query(ctx, q, scanJob, "SELECT "+s.sql.jobColumns+` FROM jobs.tb_job_run j LEFT JOIN jobs.tb_workflow_run r ON r.id = j.run_id
		WHERE j.run_id = $1 AND j.sequence > $2 ORDER BY j.created_at, j.id`, uuidValue(runID), after)
}

// History implements [store.Store]. All of it is of one moment.
func (s *Store) History(ctx context.Context, id string) (*store.History, error) {
	h := &store.History{}
	err := s.with(ctx, func(ctx context.Context, c *pgx.Conn) error {
		return pgx.BeginTxFunc(ctx, c, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
			run := uuidValue(id)
			var err error
			if h.Run, err = one(ctx, tx, scanRun, "SELECT "+runReadColumns+" FROM jobs.tb_workflow_run r WHERE r.id = $1", run); err != nil {
				return err
			}
			// Every job, also one of a writer that gives no sequences.
			if h.Jobs, err = s.readJobs(ctx, tx, id, -1); err != nil {
				return err
			}
			if h.Steps, err = query(ctx, tx, scanStep, `SELECT run_id::text, step_path, generation, kind, status, coalesce(name, ''), until, sequence,
					coalesce(error_code, ''), coalesce(error_message, ''), coalesce(error_retryable, false), coalesce(error_attempts, 0),
					started_at, completed_at, data
				FROM jobs.tb_workflow_step WHERE run_id = $1 ORDER BY step_path COLLATE "C", generation`, run); err != nil {
				return err
			}
			h.Signals, err = query(ctx, tx, scanSignal, "SELECT "+signalColumns+" FROM jobs.tb_workflow_signal s WHERE s.run_id = $1 ORDER BY s.id", run)
			return err
		})
	})
	if err != nil {
		return nil, fmt.Errorf("history of run %s: %w", id, err)
	}
	return h, nil
}

func scanStep(row pgx.CollectableRow) (*store.Step, error) {
	st := &store.Step{}
	var e errColumns
	var until, started, completed moment
	err := row.Scan(&st.RunID, &st.StepPath, &st.Generation, &st.Kind, &st.Status, &st.Name, &until, &st.Sequence,
		&e.code, &e.message, &e.retryable, &e.attempts, &started, &completed, jsonOf(&st.Data))
	if err != nil {
		return nil, err
	}
	st.Until, st.StartedAt, st.CompletedAt, st.Err = utc(until), utc(started), utc(completed), e.err()
	return st, nil
}

const signalColumns = "s.id, s.run_id::text, s.name, coalesce(s.taken_by, ''), s.created_at, s.payload"

func scanSignal(row pgx.CollectableRow) (*store.Signal, error) {
	sig := &store.Signal{}
	var created moment
	err := row.Scan(&sig.ID, &sig.RunID, &sig.Name, &sig.TakenBy, &created, jsonOf(&sig.Payload))
	sig.CreatedAt = utc(created)
	return sig, err
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
	where := []string{"true"}
	var args []any
	add := func(condition string, value any) {
		args = append(args, value)
		where = append(where, fmt.Sprintf(condition, len(args)))
	}
	if len(f.Statuses) > 0 {
		add("r.status = ANY ($%d::text[])", gather(f.Statuses, func(st store.Status) string { return string(st) }))
	}
	if f.Entity != "" {
		add("r.entity = $%d", plain(f.Entity))
	}
	if f.Action != "" {
		add("r.action = $%d", plain(f.Action))
	}
	if f.Tenants != nil {
		condition := "r.tenant_id = ANY ($%d::text[])"
		if slices.Contains(f.Tenants, "") {
			condition = "(r.tenant_id IS NULL OR " + condition + ")"
		}
		add(condition, gather(f.Tenants, plain))
	}
	if f.Before != "" {
		add("r.id < $%d", uuidValue(f.Before))
	}
	args = append(args, pageSize(f.Limit))
	runs, err := all(ctx, s, scanRun, "SELECT "+runListColumns+" FROM jobs.tb_workflow_run r WHERE "+
		strings.Join(where, " AND ")+fmt.Sprintf(" ORDER BY r.id DESC LIMIT $%d", len(args)), args...)
	if err != nil {
		return nil, fmt.Errorf("list runs: %w", err)
	}
	return runs, nil
}

// RunStates implements [store.Store]. What it says of a commit that had no answer stays true.
func (s *Store) RunStates(ctx context.Context, ids []string) (map[string]store.RunState, error) {
	out := make(map[string]store.RunState, len(ids))
	if len(ids) == 0 {
		return out, ctx.Err()
	}
	err := s.with(ctx, func(ctx context.Context, c *pgx.Conn) error {
		if err := s.settle(ctx, c); err != nil {
			return err
		}
		_, err := query(ctx, c, func(row pgx.CollectableRow) (struct{}, error) {
			var id string
			var st store.RunState
			err := row.Scan(&id, &st.Status, &st.Owner, &st.Epoch, &st.Sequence, &st.LogSequence)
			out[id] = st
			return struct{}{}, err
		}, `SELECT r.id::text, r.status, r.owner, r.epoch, r.sequence,
			coalesce((SELECT max(l.sequence) FROM jobs.tb_job_log l WHERE l.run_id = r.id), 0)
		FROM unnest($1::uuid[]) AS d (id) JOIN jobs.tb_workflow_run r ON r.id = d.id`, gather(ids, uuidValue))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("states of runs: %w", err)
	}
	return out, nil
}

// Query runs a statement that reads, such as SELECT * FROM jobs.v_job_queue_health, and
// returns the names of its columns and at most 10,000 rows. A statement that writes fails.
func (s *Store) Query(ctx context.Context, text string, args ...any) (columns []string, rows [][]any, err error) {
	err = s.with(ctx, func(ctx context.Context, c *pgx.Conn) error {
		return pgx.BeginTxFunc(ctx, c, pgx.TxOptions{AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
			// The planner may scan here: these are no statements of the store's own.
			if _, err := tx.Exec(ctx, `SET LOCAL enable_seqscan = on; SET LOCAL enable_hashjoin = on; SET LOCAL enable_mergejoin = on`,
				pgx.QueryExecModeSimpleProtocol); err != nil {
				return err
			}
			found, err := tx.Query(ctx, text, append([]any{pgx.QueryExecModeExec}, args...)...)
			if err != nil {
				return err
			}
			defer found.Close()
			for _, f := range found.FieldDescriptions() {
				columns = append(columns, f.Name)
			}
			for found.Next() {
				if len(rows) == maxPage {
					return fmt.Errorf("more than %d rows; add a LIMIT", maxPage)
				}
				values, err := found.Values()
				if err != nil {
					return err
				}
				rows = append(rows, values)
			}
			return found.Err()
		})
	})
	if err != nil {
		return nil, nil, fmt.Errorf("query: %w", err)
	}
	return columns, rows, nil
}

func isNotFound(err error) bool { return errors.Is(err, store.ErrNotFound) }
