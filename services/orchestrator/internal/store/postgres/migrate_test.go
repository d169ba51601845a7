package postgres

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/migrations"
	"github.com/specql/mesh/services/orchestrator/internal/store"
	"github.com/specql/mesh/test/pgtest"
)

// legacyTables are HTTP-only tables as applications have them: the same columns, in different words.
var legacyTables = map[string]string{
	"plain": `CREATE TABLE jobs.tb_job_run (
		id uuid PRIMARY KEY, identifier text NOT NULL UNIQUE, idempotency_key text UNIQUE,
		service_name text NOT NULL, operation text NOT NULL, input_data jsonb NOT NULL, output_data jsonb, error_message text,
		status text NOT NULL CHECK (status IN ('pending', 'running', 'completed', 'failed')),
		attempts integer NOT NULL DEFAULT 0, max_attempts integer NOT NULL DEFAULT 3, timeout_seconds integer NOT NULL DEFAULT 30,
		tenant_id uuid NOT NULL, triggered_by uuid NOT NULL, correlation_id uuid, entity_type text, entity_pk uuid,
		created_at timestamptz NOT NULL DEFAULT now(), started_at timestamptz, completed_at timestamptz, updated_at timestamptz NOT NULL DEFAULT now())`,
	"bounded": `CREATE TABLE jobs.tb_job_run (
		id uuid PRIMARY KEY DEFAULT gen_random_uuid(), identifier varchar(50) NOT NULL, idempotency_key varchar(100) NOT NULL,
		service_name varchar(40) NOT NULL, operation varchar(40) NOT NULL, input_data jsonb, output_data jsonb, error_message varchar(200),
		status varchar(20) NOT NULL DEFAULT 'pending' CONSTRAINT chk_status CHECK (status::text = ANY (ARRAY['pending', 'running', 'completed', 'failed', 'retrying'])),
		attempts smallint NOT NULL DEFAULT 0, max_attempts smallint NOT NULL DEFAULT 3, timeout_seconds smallint,
		tenant_id uuid, triggered_by uuid, correlation_id varchar(36), entity_type varchar(20), entity_pk bigint,
		created_at timestamp NOT NULL DEFAULT now(), started_at timestamp, completed_at timestamp, updated_at timestamp,
		UNIQUE (tenant_id, idempotency_key))`,
	"bare": `CREATE TABLE jobs.tb_job_run (
		id uuid PRIMARY KEY, identifier text, idempotency_key text, service_name text NOT NULL, operation text NOT NULL,
		input_data jsonb, output_data jsonb, error_message text, status text, attempts integer, max_attempts integer, timeout_seconds numeric,
		tenant_id uuid, triggered_by uuid, correlation_id text, entity_type text, entity_pk text,
		created_at timestamptz DEFAULT now(), started_at timestamptz, completed_at timestamptz, updated_at timestamptz)`,
}

// legacyRows fills the table: of ten rows one is pending, one has failed, one is cancelled where the table allows it.
const legacyRows = `INSERT INTO jobs.tb_job_run (id, identifier, idempotency_key, service_name, operation, input_data, output_data, error_message, status,
		attempts, max_attempts, timeout_seconds, tenant_id, triggered_by, created_at, started_at, completed_at, updated_at)
	SELECT md5('job' || n)::uuid, 'job-' || n, %[2]s, 'stripe_api', 'charge', jsonb_build_object('n', n), '{"ok": true}', CASE WHEN n %% 10 = 1 THEN 'refused' END,
		CASE n %% 10 WHEN 0 THEN 'pending' WHEN 1 THEN 'failed' ELSE 'completed' END, 1, 3, 30,
		'6a8f9d0e-0000-4000-8000-000000000001', '6a8f9d0e-0000-4000-8000-000000000002',
		now() - n * interval '1 second', now() - n * interval '1 second', now() - n * interval '1 second' + interval '250 ms', now()
	FROM generate_series(1, %[1]d) AS n`

// makeLegacy makes an old database.
func makeLegacy(t testing.TB, shape string, rows int, key string) string {
	t.Helper()
	url := pgtest.Database(t)
	c := pgtest.Shared(t)
	c.Psql(t, url, "CREATE SCHEMA jobs; "+legacyTables[shape]+"; "+fmt.Sprintf(legacyRows, rows, key))
	return url
}

const legacyDigest = `SELECT md5(string_agg(md5(concat_ws('|', id, identifier, idempotency_key, service_name, operation, input_data, output_data, error_message, status,
	attempts, max_attempts, timeout_seconds, tenant_id, triggered_by, correlation_id, entity_type, entity_pk, created_at, started_at, completed_at)), '' ORDER BY id)) FROM jobs.tb_job_run`

func TestLegacyTables(t *testing.T) {
	for shape := range legacyTables {
		t.Run(shape, func(t *testing.T) {
			const rows = 500
			url := makeLegacy(t, shape, rows, "'key-' || n")
			c := pgtest.Shared(t)
			before := c.Psql(t, url, legacyDigest)
			applied, err := Migrate(t.Context(), Options{URL: url})
			require.NoError(t, err)
			require.Equal(t, versions(t), applied)
			require.Equal(t, before, c.Psql(t, url, legacyDigest), "every row is as it was")
			require.Equal(t, "http|500", c.Psql(t, url, "SELECT execution_type, count(*) FROM jobs.tb_job_run GROUP BY 1"))
			problems, err := Validate(t.Context(), Options{URL: url})
			require.NoError(t, err)
			require.Empty(t, problems)
			applied, err = Migrate(t.Context(), Options{URL: url})
			require.NoError(t, err)
			require.Empty(t, applied, "a second time changes nothing")

			st := openAt(t, url)
			// Its pending rows are executed, the oldest first or as they come.
			jobs, err := st.ClaimJobs(t.Context(), "a", 1000)
			require.NoError(t, err)
			require.Len(t, jobs, rows/10)
			require.Equal(t, 30*time.Second, jobs[0].Timeout)
			require.Equal(t, 3, jobs[0].MaxAttempts)
			require.Equal(t, "6a8f9d0e-0000-4000-8000-000000000001", jobs[0].TenantID)
			require.True(t, jobs[0].CreatedAt.Before(jobs[len(jobs)-1].CreatedAt), "the oldest first")
			require.WithinDuration(t, time.Now(), jobs[0].CreatedAt, time.Hour, "its times are UTC")
			exerciseLegacy(t, st, jobs[0])

			p := view(t, st, "SELECT * FROM jobs.v_execution_performance_by_type")
			require.Len(t, p, 1)
			require.EqualValues(t, rows+2, p[0]["total_jobs"])
			require.EqualValues(t, rows/10, p[0]["failed"])
			require.InEpsilon(t, 0.25, p[0]["p50_duration_seconds"], 0.01)
			f := view(t, st, "SELECT * FROM jobs.v_runner_failure_patterns")
			require.Equal(t, []any{"INTERNAL", int64(rows / 10), "refused"}, []any{f[0]["error_code"], f[0]["failures"], f[0]["last_error_message"]})

			// An old application goes on as before; a key counts once.
			const again = `INSERT INTO jobs.tb_job_run (id, identifier, idempotency_key, service_name, operation, input_data, status, tenant_id, triggered_by)
				VALUES (gen_random_uuid(), 'new', '%s', 'stripe_api', 'charge', '{}', 'pending', '6a8f9d0e-0000-4000-8000-000000000001', '6a8f9d0e-0000-4000-8000-000000000002')`
			require.NoError(t, run(t, st, fmt.Sprintf(again, "fresh")))
			require.Error(t, run(t, st, strings.Replace(fmt.Sprintf(again, "fresh"), "'new'", "'new2'", 1)))
			if shape != "bare" {
				require.Error(t, run(t, st, strings.Replace(fmt.Sprintf(again, "key-7"), "'new'", "'new3'", 1)), "keys of old rows count too")
			}
			require.Error(t, run(t, st, "UPDATE jobs.tb_job_run SET status = 'pending' WHERE identifier = 'job-2'"), "states move one way")
			jobs, err = st.ClaimJobs(t.Context(), "a", 1000)
			require.NoError(t, err)
			require.Len(t, jobs, 1)
		})
	}
}

// exerciseLegacy adopts an old row, and runs a call of the engine's own with everything that a job can have.
func exerciseLegacy(t *testing.T, st *Store, old *store.Job) {
	t.Helper()
	now := time.Now().UTC().Truncate(time.Microsecond)
	id := newID()
	r := create(id)
	r.Create.TenantID, r.Create.Subject, r.Create.CorrelationID, r.Create.Entity, r.Create.EntityID = "acme", "ann@example.com", "corr-1", "payment", "p-1"
	own := r.NewJobs[0]
	own.StepPath = "steps[" + strings.Repeat("0].branches[1", 20) + "]"
	own.TenantID, own.TriggeredBy, own.CorrelationID, own.EntityType, own.EntityPK = "acme", "ann@example.com", "corr-1", "payment", "p-1"
	own.Service, own.IdempotencyKey, own.Timeout = strings.Repeat("s", 100), "key-7", 30*time.Second
	adopted := *old
	adopted.RunID, adopted.StepPath, adopted.Adopted, adopted.Status, adopted.Sequence, adopted.StartedAt = id, "steps[1]", true, store.Running, 2, now
	r.NewJobs = append(r.NewJobs, &adopted)
	results, err := st.Commit(t.Context(), []*store.Record{r})
	require.NoError(t, err)
	require.NoError(t, results[0])
	retry := *own
	retry.ID, retry.Generation, retry.CreatedAt = newID(), 1, now.Add(time.Second)
	done := *own
	done.Status, done.CompletedAt, done.Output = store.Cancelled, now, []byte(`{"a": 1}`)
	results, err = st.Commit(t.Context(), []*store.Record{{RunID: id, Epoch: 1, Sequence: 2, ChangedJobs: []*store.Job{&done}, NewJobs: []*store.Job{&retry}}})
	require.NoError(t, err)
	require.NoError(t, results[0], "a retry has the key of what it retries, and cancelled is a state")
	h, err := st.History(t.Context(), id)
	require.NoError(t, err)
	require.Len(t, h.Jobs, 3)
	for _, j := range h.Jobs {
		if j.ID == own.ID {
			require.Equal(t, []string{"acme", "ann@example.com", "corr-1", "payment", "p-1", own.Service}, []string{j.TenantID, j.TriggeredBy, j.CorrelationID, j.EntityType, j.EntityPK, j.Service})
			require.Equal(t, store.Cancelled, j.Status)
		}
	}
}

// TestLegacyKeysThatRepeat: old rows whose keys nobody kept apart stay; new keys count once.
func TestLegacyKeysThatRepeat(t *testing.T) {
	url := makeLegacy(t, "bare", 100, "'same'")
	_, err := Migrate(t.Context(), Options{URL: url})
	require.NoError(t, err)
	st := openAt(t, url)
	const insert = "INSERT INTO jobs.tb_job_run (idempotency_key, service_name, operation) VALUES ('%s', 's', 'o')"
	require.Error(t, run(t, st, fmt.Sprintf(insert, "same")+", ('same', 's', 'o')"))
	require.NoError(t, run(t, st, fmt.Sprintf(insert, "new")))
	require.Error(t, run(t, st, fmt.Sprintf(insert, "new")))
}

// TestMigrateByPsql: the file does by psql what the command does, as often as one likes.
func TestMigrateByPsql(t *testing.T) {
	c := pgtest.Shared(t)
	first := pgtest.Database(t)
	c.Psql(t, first, firstVersion(t))
	for name, url := range map[string]string{"empty": pgtest.Database(t), "legacy": makeLegacy(t, "plain", 100, "'key-' || n"), "migrated": ready(t), "version 1": first} {
		for range 2 {
			c.Psql(t, url, migrations.SQL)
			problems, err := Validate(t.Context(), Options{URL: url})
			require.NoError(t, err)
			require.Empty(t, problems, name)
		}
		applied, err := Migrate(t.Context(), Options{URL: url})
		require.NoError(t, err)
		require.Empty(t, applied, name)
		openAt(t, url)
	}
}

// firstVersion is the schema as its version 1 was.
func firstVersion(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", "version_1.sql"))
	require.NoError(t, err)
	return string(text)
}

// TestMigrateFromTheFirstVersion: a database of version 1 becomes what an empty one becomes, and keeps its rows.
func TestMigrateFromTheFirstVersion(t *testing.T) {
	c := pgtest.Shared(t)
	url := pgtest.Database(t)
	c.Psql(t, url, firstVersion(t))
	c.Psql(t, url, `INSERT INTO jobs.tb_job_run (service_name, operation) SELECT 'stripe_api', 'charge' FROM generate_series(1, 10)`)
	before := c.Psql(t, url, legacyDigest)
	applied, err := Migrate(t.Context(), Options{URL: url})
	require.NoError(t, err)
	require.Equal(t, append([]string{}, versions(t)[1:]...), append([]string{}, applied...))
	require.Equal(t, before, c.Psql(t, url, legacyDigest))
	problems, err := Validate(t.Context(), Options{URL: url})
	require.NoError(t, err)
	require.Empty(t, problems)
	const shape = `SELECT string_agg(line, E'\n' ORDER BY line) FROM (
		SELECT 'column ' || k.relname || '.' || a.attname || ' ' || format_type(a.atttypid, a.atttypmod) || CASE WHEN a.attnotnull THEN ' not null' ELSE '' END AS line
			FROM pg_attribute a JOIN pg_class k ON k.oid = a.attrelid WHERE k.relnamespace = 'jobs'::regnamespace AND k.relkind IN ('r', 'p', 'v') AND a.attnum > 0 AND NOT a.attisdropped
		UNION ALL SELECT 'index ' || indexdef FROM pg_indexes WHERE schemaname = 'jobs'
		UNION ALL SELECT 'trigger ' || pg_get_triggerdef(t.oid) FROM pg_trigger t JOIN pg_class k ON k.oid = t.tgrelid WHERE k.relnamespace = 'jobs'::regnamespace AND NOT t.tgisinternal
		UNION ALL SELECT 'function ' || p.oid::regprocedure || md5(p.prosrc) FROM pg_proc p WHERE p.pronamespace = 'jobs'::regnamespace
		UNION ALL SELECT 'constraint ' || conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid) FROM pg_constraint WHERE connamespace = 'jobs'::regnamespace) AS s`
	require.Equal(t, c.Psql(t, ready(t), shape), c.Psql(t, url, shape))
	jobs, err := openAt(t, url).ClaimJobs(t.Context(), "a", 100)
	require.NoError(t, err)
	require.Len(t, jobs, 10)
}

// TestMigrateMeanwhile: others insert, change and read while a large table is upgraded, and a transaction that holds the
// table for long is not in the way of anybody but the migration.
func TestMigrateMeanwhile(t *testing.T) {
	const rows = 20_000
	url := makeLegacy(t, "plain", rows, "'key-' || n")
	connect := func() *pgx.Conn {
		c, err := pgx.Connect(t.Context(), url)
		require.NoError(t, err)
		t.Cleanup(func() { _ = c.Close(context.WithoutCancel(t.Context())) })
		return c
	}
	reader, writer := connect(), connect()
	tx, err := reader.Begin(t.Context())
	require.NoError(t, err)
	_, err = tx.Exec(t.Context(), "SELECT count(*) FROM jobs.tb_job_run")
	require.NoError(t, err)

	migrated := make(chan error, 1)
	go func() {
		_, err := Migrate(t.Context(), Options{URL: url})
		migrated <- err
	}()
	inserted := 0
	insert := func() {
		_, err := writer.Exec(t.Context(), `INSERT INTO jobs.tb_job_run (id, identifier, idempotency_key, service_name, operation, input_data, status, tenant_id, triggered_by)
			VALUES (gen_random_uuid(), $1, $1, 'stripe_api', 'charge', '{}', CASE WHEN $2::bigint % 2 = 0 THEN 'pending' ELSE 'completed' END,
				'6a8f9d0e-0000-4000-8000-000000000001', '6a8f9d0e-0000-4000-8000-000000000002')`, fmt.Sprintf("meanwhile-%d", inserted), int64(inserted))
		require.NoError(t, err)
		inserted++
	}
	// The migration has come as far as the table, and gives way; then it gets it.
	require.Eventually(t, func() bool {
		insert()
		var tries int
		require.NoError(t, writer.QueryRow(t.Context(), "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE '%pr_patiently%'").Scan(&tries))
		return tries > 0 && inserted > 100
	}, time.Minute, time.Millisecond)
	require.NoError(t, tx.Commit(t.Context()))
	for running := true; running; {
		select {
		case err := <-migrated:
			require.NoError(t, err)
			running = false
		default:
			insert()
		}
	}
	for range 10 {
		insert()
	}
	st := openAt(t, url)
	p := view(t, st, "SELECT * FROM jobs.v_execution_performance_by_type")[0]
	require.EqualValues(t, rows+inserted, p["total_jobs"], "each row is counted once, also those of meanwhile")
	require.EqualValues(t, rows/10+(inserted+1)/2, p["active"])
	require.EqualValues(t, rows/10+(inserted+1)/2, view(t, st, "SELECT count(*) AS n FROM jobs.tb_job_queue")[0]["n"])
}

// TestMigrateTwiceAtOnce: one waits for the other.
// TestRulesHoldWhileTheyMove: the constraints of a database of before go once the triggers are there, and one table does not wait for
// the other's.
func TestRulesHoldWhileTheyMove(t *testing.T) {
	url := ready(t)
	c := pgtest.Shared(t)
	c.Psql(t, url, `DROP TRIGGER tr_workflow_run_check ON jobs.tb_workflow_run; DROP TRIGGER tr_job_run_check ON jobs.tb_job_run;
		ALTER TABLE jobs.tb_workflow_run ADD CONSTRAINT ck_workflow_run_created_at CHECK (created_at BETWEEN '0001-01-01' AND '9999-12-31') NOT VALID;
		ALTER TABLE jobs.tb_job_run ADD CONSTRAINT ck_job_run_created_at CHECK (created_at BETWEEN '0001-01-01' AND '9999-12-31') NOT VALID,
			ADD CONSTRAINT ck_job_run_attempts CHECK (attempts >= 0);
		DELETE FROM jobs.tb_schema_version WHERE version = 7`)
	// Somebody reads the jobs: what needs the table for itself waits.
	reader, err := pgx.Connect(t.Context(), url)
	require.NoError(t, err)
	defer func() { require.NoError(t, reader.Close(context.Background())) }()
	_, err = reader.Exec(t.Context(), "BEGIN; SELECT FROM jobs.tb_job_run")
	require.NoError(t, err)
	migrated := make(chan error, 1)
	go func() { _, err := Migrate(t.Context(), Options{URL: url}); migrated <- err }()
	require.Eventually(t, func() bool {
		return c.Psql(t, url, "SELECT count(*) FROM pg_constraint WHERE conname = 'ck_workflow_run_created_at'") == "0"
	}, time.Minute, 50*time.Millisecond)
	for _, table := range []string{"tb_workflow_run (entity, action, created_at)", "tb_job_run (service_name, operation, created_at)"} {
		_, err := c.Run(url, "SET statement_timeout = '30s'; INSERT INTO jobs."+table+" VALUES ('x', 'y', 'infinity')")
		require.ErrorContains(t, err, "violates check constraint", table)
	}
	require.Equal(t, "1", c.Psql(t, url, "SELECT count(*) FROM pg_constraint WHERE conname = 'ck_job_run_created_at'"), "the reader holds it")
	_, err = reader.Exec(t.Context(), "ROLLBACK")
	require.NoError(t, err)
	require.NoError(t, <-migrated)
	require.Equal(t, "ck_job_run_attempts,ck_job_run_status,ck_workflow_run_status", c.Psql(t, url, `SELECT string_agg(conname, ',' ORDER BY conname) FROM pg_constraint
		WHERE conrelid IN ('jobs.tb_workflow_run'::regclass, 'jobs.tb_job_run'::regclass) AND contype = 'c'`), "others' stay")
}

// TestStatesOfOldTables: a table that knows more states than five gets no rows into them.
func TestStatesOfOldTables(t *testing.T) {
	url := pgtest.Database(t)
	c := pgtest.Shared(t)
	c.Psql(t, url, "CREATE SCHEMA jobs; "+strings.Replace(legacyTables["bounded"], "'retrying'", "'cancelled', 'retrying'", 1))
	_, err := Migrate(t.Context(), Options{URL: url})
	require.NoError(t, err)
	c.Psql(t, url, "INSERT INTO jobs.tb_job_run (service_name, operation) VALUES ('x', 'y')")
	for _, from := range []string{"pending", "running"} {
		c.Psql(t, url, "UPDATE jobs.tb_job_run SET status = '"+from+"'")
		_, err := c.Run(url, "UPDATE jobs.tb_job_run SET status = 'retrying'")
		require.ErrorContains(t, err, "a job moves from pending", from)
	}
}

func TestMigrateTwiceAtOnce(t *testing.T) {
	url := makeLegacy(t, "plain", 2000, "'key-' || n")
	type outcome struct {
		applied []string
		err     error
	}
	done := make(chan outcome, 3)
	for range cap(done) {
		go func() {
			applied, err := Migrate(t.Context(), Options{URL: url})
			done <- outcome{applied, err}
		}()
	}
	total := 0
	for range cap(done) {
		o := <-done
		require.NoError(t, o.err)
		total += len(o.applied)
	}
	require.Equal(t, len(versions(t)), total)
}

func TestOpenErrors(t *testing.T) {
	_, err := Open(t.Context(), Options{})
	require.ErrorContains(t, err, "the URL is empty")
	_, err = Open(t.Context(), Options{URL: "postgres://user:secret@host:port/db"})
	require.Error(t, err)
	require.NotContains(t, err.Error(), "secret")
	_, err = Open(t.Context(), Options{URL: pgtest.Database(t)})
	require.ErrorContains(t, err, "specql migrate-schema")
	_, err = Open(t.Context(), Options{URL: makeLegacy(t, "plain", 1, "'k'")})
	require.ErrorContains(t, err, "specql migrate-schema")
	require.ErrorIs(t, err, store.ErrNotReady)

	url := ready(t)
	pgtest.Shared(t).Psql(t, url, "INSERT INTO jobs.tb_schema_version (version, name, oldest) VALUES (1000, 'later', 1000)")
	_, err = Open(t.Context(), Options{URL: url})
	require.ErrorContains(t, err, "newer version")
	require.NotErrorIs(t, err, store.ErrNotReady, "waiting does not help")
	_, err = Migrate(t.Context(), Options{URL: url})
	require.ErrorContains(t, err, "newer version")
}

func TestOlderProgramsWorkWithNewerSchemasThatSaySo(t *testing.T) {
	url := ready(t)
	psql := func(text string) { pgtest.Shared(t).Psql(t, url, text) }
	open := func() error {
		s, err := Open(t.Context(), Options{URL: url})
		if err != nil {
			return err
		}
		return s.Close()
	}
	psql("INSERT INTO jobs.tb_schema_version (version, name, oldest) VALUES (1000, 'later', 4)")
	require.NoError(t, open())
	applied, err := Migrate(t.Context(), Options{URL: url})
	require.NoError(t, err)
	require.Empty(t, applied)

	psql("INSERT INTO jobs.tb_schema_version (version, name, oldest) VALUES (1001, 'much later', 1000)")
	require.ErrorContains(t, open(), "for programs that know 1000")
	psql("DELETE FROM jobs.tb_schema_version WHERE version = 1001; ALTER TABLE jobs.tb_schema_version DROP COLUMN oldest")
	require.ErrorContains(t, open(), "newer version", "a schema that says nothing")
}

func TestValidate(t *testing.T) {
	url := pgtest.Database(t)
	problems, err := Validate(t.Context(), Options{URL: url})
	require.NoError(t, err)
	require.Greater(t, len(problems), 10)

	url = ready(t)
	c := pgtest.Shared(t)
	c.Psql(t, url, `DROP INDEX jobs.ix_job_run_error; DROP TRIGGER tr_job_run_check ON jobs.tb_job_run; DROP VIEW jobs.v_cost_by_service;
		ALTER TABLE jobs.tb_workflow_run DROP COLUMN cancel_reason; ALTER TABLE jobs.tb_job_run DISABLE TRIGGER tr_job_run_enqueue;
		DROP TABLE jobs.tb_execution_type; DROP FUNCTION jobs.fn_expect; ALTER TABLE jobs.tb_orchestrator ALTER COLUMN beat TYPE text`)
	problems, err = Validate(t.Context(), Options{URL: url})
	require.NoError(t, err)
	var what []string
	for _, p := range problems {
		what = append(what, p.What)
		require.NotEmpty(t, p.Mend)
	}
	require.ElementsMatch(t, []string{
		"table jobs.tb_execution_type is missing", "column jobs.tb_workflow_run.cancel_reason is missing",
		"column jobs.tb_orchestrator.beat is text, which bigint does not fit into", "index jobs.ix_job_run_error is missing",
		"trigger tr_job_run_check of jobs.tb_job_run is missing", "trigger tr_job_run_enqueue of jobs.tb_job_run is disabled",
		"function jobs.fn_expect is missing", "view jobs.v_cost_by_service is missing",
	}, what)
	// The migration mends what it can.
	c.Psql(t, url, `ALTER TABLE jobs.tb_orchestrator ALTER COLUMN beat DROP DEFAULT, ALTER COLUMN beat TYPE bigint USING beat::bigint;
		ALTER TABLE jobs.tb_job_run ENABLE TRIGGER tr_job_run_enqueue; ALTER TABLE jobs.tb_workflow_run ADD COLUMN cancel_reason text`)
	applied, err := Migrate(t.Context(), Options{URL: url})
	require.NoError(t, err)
	require.Equal(t, versions(t), applied)
	problems, err = Validate(t.Context(), Options{URL: url})
	require.NoError(t, err)
	require.Empty(t, problems)
}

// TestRoles: a role of its own owns the schema, another with no more than rights on rows runs the orchestrator, and a third may only
// insert calls.
func TestRoles(t *testing.T) {
	c := pgtest.Start(t)
	url := c.NewDatabase(t)
	as := func(role string) string { return strings.Replace(url, pgtest.User+"@", role+"@", 1) }
	c.Psql(t, url, `CREATE ROLE owner LOGIN; CREATE ROLE engine LOGIN; CREATE ROLE app LOGIN;
		CREATE SCHEMA jobs AUTHORIZATION owner; CREATE SCHEMA commerce AUTHORIZATION owner`)
	_, err := Migrate(t.Context(), Options{URL: as("owner")})
	require.NoError(t, err)
	problems, err := CheckPermissions(t.Context(), Options{URL: as("owner")})
	require.NoError(t, err)
	require.Empty(t, problems)

	problems, err = CheckPermissions(t.Context(), Options{URL: as("engine")})
	require.NoError(t, err)
	require.Greater(t, len(problems), 10)
	var grants []string
	for _, p := range problems {
		grants = append(grants, p.Mend)
	}
	c.Psql(t, as("owner"), strings.Join(grants, ";\n"))
	problems, err = CheckPermissions(t.Context(), Options{URL: as("engine")})
	require.NoError(t, err)
	require.Empty(t, problems)

	c.Psql(t, as("owner"), `GRANT USAGE ON SCHEMA jobs TO app; GRANT INSERT ON jobs.tb_job_run TO app`)
	c.Psql(t, as("app"), `INSERT INTO jobs.tb_job_run (service_name, operation) VALUES ('api', 'call')`)
	_, err = c.Run(as("app"), "SELECT * FROM jobs.tb_job_run")
	require.ErrorContains(t, err, "permission denied")

	st, err := Open(t.Context(), Options{URL: as("engine")})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, st.Close()) })
	_, err = st.Heartbeat(t.Context(), "a", true)
	require.NoError(t, err)
	jobs, err := st.ClaimJobs(t.Context(), "a", 10)
	require.NoError(t, err)
	require.Len(t, jobs, 1)
	id := newID()
	results, err := st.Commit(t.Context(), []*store.Record{create(id)})
	require.NoError(t, err)
	require.NoError(t, results[0])
	require.NoError(t, st.AddSignal(t.Context(), &store.Signal{RunID: id, Name: "go"}))
	require.NoError(t, st.AppendLogs(t.Context(), []*store.LogLine{{RunID: id, Sequence: 1}}))
	require.NoError(t, st.Maintain(t.Context(), time.Hour))
	for _, name := range viewNames {
		view(t, st, "SELECT * FROM jobs."+name)
	}
}
