package faults

import (
	"context"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"
)

// auditSQL notes every change of a run from outside: in the transaction that makes it, and with who made it. Changes of one run
// wait for each other, so that n is their order.
const auditSQL = `
CREATE SCHEMA audit;
CREATE TABLE audit.tb_change (
    n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL, tx bigint NOT NULL, writer text NOT NULL,
    run text NOT NULL, owner text NOT NULL, epoch bigint NOT NULL, status text NOT NULL, sequence bigint NOT NULL
);
CREATE INDEX ON audit.tb_change (run, n);
CREATE FUNCTION audit.note() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO audit.tb_change (at, tx, writer, run, owner, epoch, status, sequence)
    VALUES (clock_timestamp(), txid_current(), current_setting('application_name'),
            NEW.id::text, coalesce(NEW.owner, ''), NEW.epoch, NEW.status, NEW.sequence);
    RETURN NULL;
END $$;
CREATE TRIGGER tr_audit AFTER INSERT OR UPDATE ON jobs.tb_workflow_run FOR EACH ROW EXECUTE FUNCTION audit.note();
`

// change is a row of the audit table.
type change struct {
	N        int64
	At       time.Time
	Tx       int64
	Writer   string // the process, by the application_name of its connections
	Run      string
	Owner    string
	Epoch    int64
	Status   string
	Sequence int64
}

// row is what the database says of a run in the end.
type row struct {
	ID, Status, Owner string
	Epoch             int64
	// Key is the idempotency key that the run was started with.
	Key string
	// Token is its output's.
	Token string
	// Error is why it failed.
	Error string
	// Jobs are the steps of its calls, with their number; Open are those that have not completed.
	Jobs map[string]int
	Open int
}

// loose is a call that a client inserted by SQL, by the run that its input names.
type loose struct {
	Name, Status, Error string
	Attempts            int
}

// query reads rows into structs.
func query[T any](ctx context.Context, t testing.TB, db *pgxpool.Pool, sql string, args ...any) []T {
	t.Helper()
	rows, err := db.Query(ctx, sql, args...)
	require.NoError(t, err)
	out, err := pgx.CollectRows(rows, pgx.RowToStructByPos[T])
	require.NoError(t, err)
	return out
}

// changes are all changes of runs, in their order.
func changes(ctx context.Context, t testing.TB, db *pgxpool.Pool) []change {
	t.Helper()
	return query[change](ctx, t, db, "SELECT n, at, tx, writer, run, owner, epoch, status, sequence FROM audit.tb_change ORDER BY n")
}

// looseRows are the calls that were inserted by SQL under names that begin so.
func looseRows(ctx context.Context, t testing.TB, db *pgxpool.Pool) []loose {
	t.Helper()
	return query[loose](ctx, t, db, `
SELECT input_data ->> 'run', status, coalesce(error_message, ''), attempts FROM jobs.tb_job_run WHERE input_data ->> 'run' LIKE $1 || '%' ORDER BY 1`, loosePrefix)
}

// runRows are all runs with what their jobs came to, but for those that carry out a call that was inserted by SQL.
func runRows(ctx context.Context, t testing.TB, db *pgxpool.Pool) []row {
	t.Helper()
	return query[row](ctx, t, db, `
SELECT r.id::text, r.status, coalesce(r.owner, ''), r.epoch, coalesce(r.idempotency_key, ''), coalesce(r.output_data ->> 'token', ''),
       coalesce(r.error_message, ''),
       coalesce((SELECT jsonb_object_agg(step, n) FROM (
           SELECT coalesce(j.input_data ->> 'step', j.step_path) AS step, count(*) AS n FROM jobs.tb_job_run j WHERE j.run_id = r.id GROUP BY 1) s), '{}'),
       (SELECT count(*) FROM jobs.tb_job_run j WHERE j.run_id = r.id AND j.status <> 'completed')
FROM jobs.tb_workflow_run r
WHERE NOT EXISTS (SELECT FROM jobs.tb_job_run j WHERE j.run_id = r.id AND j.input_data ->> 'run' LIKE $1 || '%') ORDER BY r.id`, loosePrefix)
}

// unfinished counts the runs that have not ended.
func unfinished(ctx context.Context, db *pgxpool.Pool) (n int, err error) {
	err = db.QueryRow(ctx, "SELECT count(*) FROM jobs.tb_workflow_run WHERE status IN ('pending', 'running')").Scan(&n)
	return n, err
}
