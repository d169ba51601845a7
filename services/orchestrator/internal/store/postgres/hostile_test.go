package postgres

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/internal/store"
	"github.com/specql/mesh/test/pgtest"
)

// ordersStore has the table app.orders.
func ordersStore(t *testing.T) (*Store, string) {
	t.Helper()
	url := ready(t)
	st := openAt(t, url)
	text := "entity: orders\nfields:\n  total: {type: integer}\nactions:\n  pay:\n    steps:\n      - update: {set: {total: 1}}\n"
	e, problems := spec.ParseEntity(spec.File{Name: "orders.yaml", Content: []byte(text)}, spec.Options{})
	require.NoError(t, problems.Err())
	require.NoError(t, st.EnsureEntities(t.Context(), []*spec.Entity{e}))
	return st, url
}

func insertOrder(id string) *store.EntityRow {
	return &store.EntityRow{Schema: "app", Entity: "orders", ID: id, Values: map[string]any{"total": 2}}
}

// client is another client of a database, in a transaction of its own until the test ends.
func client(t *testing.T, url string, statements ...string) pgx.Tx {
	t.Helper()
	c, err := pgx.Connect(t.Context(), url)
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close(context.WithoutCancel(t.Context())) })
	tx, err := c.Begin(t.Context())
	require.NoError(t, err)
	for _, s := range statements {
		_, err := tx.Exec(t.Context(), s, pgx.QueryExecModeSimpleProtocol)
		require.NoError(t, err)
	}
	return tx
}

// TestLocksOfOthers: a client that holds a lock, and does nothing, keeps only those records waiting that need what it holds.
func TestLocksOfOthers(t *testing.T) {
	st, url := ordersStore(t)
	order := newID()
	a, b := create(newID()), create(newID())
	a.InsertRow = insertOrder(order)
	results, err := st.Commit(t.Context(), []*store.Record{a, b})
	require.NoError(t, err)
	require.Equal(t, []error{nil, nil}, results)

	holds := client(t, url, "SELECT FROM app.orders WHERE id = '"+order+"' FOR UPDATE",
		"INSERT INTO jobs.tb_workflow_run (entity, action, idempotency_key) VALUES ('orders', 'pay', 'k')")
	row := &store.Record{RunID: a.RunID, Epoch: 1, Sequence: 2, UpdateRow: insertOrder(order)}
	key := create(newID())
	key.Create.IdempotencyKey = "k"
	free := &store.Record{RunID: b.RunID, Epoch: 1, Sequence: 2}
	results, err = st.Commit(t.Context(), []*store.Record{row, key, free})
	require.NoError(t, err)
	require.ErrorIs(t, results[0], store.ErrBusy)
	require.ErrorIs(t, results[1], store.ErrBusy)
	require.NoError(t, results[2])

	require.NoError(t, holds.Rollback(t.Context()))
	results, err = st.Commit(t.Context(), []*store.Record{row, key})
	require.NoError(t, err)
	require.Equal(t, []error{nil, nil}, results)
}

// TestManyLocks: when a whole table is held, the records are given back before the bound on a commit ends it.
func TestManyLocks(t *testing.T) {
	url := ready(t)
	st := openAt(t, url)
	client(t, url, "LOCK TABLE jobs.tb_job_run IN ACCESS EXCLUSIVE MODE")
	records := make([]*store.Record, 500)
	for i := range records {
		records[i] = create(newID())
	}
	results, err := st.Commit(t.Context(), records)
	require.NoError(t, err)
	for _, err := range results {
		require.ErrorIs(t, err, store.ErrBusy)
	}
}

// TestTriggersOfEntities: whatever a trigger of an entity's table raises is the fault of its record alone.
func TestTriggersOfEntities(t *testing.T) {
	st, url := ordersStore(t)
	c := pgtest.Shared(t)
	for _, code := range []string{"APP01", "55P03", "40001", "57014", "53100", codeExpect, codeState, "XX000"} {
		c.Psql(t, url, fmt.Sprintf(`CREATE OR REPLACE FUNCTION app.no() RETURNS trigger LANGUAGE plpgsql AS
			$$ BEGIN RAISE EXCEPTION USING ERRCODE = '%s', MESSAGE = 'row: a limit'; END $$;
			CREATE OR REPLACE TRIGGER no BEFORE INSERT OR UPDATE ON app.orders FOR EACH ROW EXECUTE FUNCTION app.no()`, code))
		a, b := create(newID()), create(newID())
		a.InsertRow = insertOrder(newID())
		results, err := st.Commit(t.Context(), []*store.Record{a, b})
		require.NoError(t, err, code)
		refused, ok := errors.AsType[*fault.Error](results[0])
		require.True(t, ok, "%s: %v", code, results[0])
		require.Equal(t, fault.Validation, refused.Code, code)
		require.ErrorContains(t, results[0], "a limit", code)
		require.NoError(t, results[1], code)
	}
}

// TestReadersLeaveConnections: readers that hold every connection keep neither a heartbeat nor a commit from its work.
func TestReadersLeaveConnections(t *testing.T) {
	url := ready(t)
	st, err := Open(t.Context(), Options{URL: url, MaxConnections: 2})
	require.NoError(t, err)
	defer func() { require.NoError(t, st.Close()) }()
	release, held := make(chan struct{}), make(chan error, 2)
	inside := make(chan struct{}, 2)
	for range 2 {
		go func() {
			held <- st.with(t.Context(), func(context.Context, *pgx.Conn) error { inside <- struct{}{}; <-release; return nil })
		}()
		<-inside
	}
	_, err = st.Heartbeat(t.Context(), "a", true)
	require.NoError(t, err)
	results, err := st.Commit(t.Context(), []*store.Record{create(newID())})
	require.NoError(t, err)
	require.Equal(t, []error{nil}, results)
	close(release)
	require.NoError(t, <-held)
	require.NoError(t, <-held)
}

// unruled makes a database without the rules on what a row may hold, as one has whose rows were there before them.
func unruled(t *testing.T) (*Store, string) {
	t.Helper()
	url := ready(t)
	pgtest.Shared(t).Psql(t, url, "DROP TRIGGER tr_workflow_run_check ON jobs.tb_workflow_run; DROP TRIGGER tr_job_run_check ON jobs.tb_job_run")
	return openAt(t, url), url
}

// TestHostileRows: rows that nobody can work with, which came before the rules, keep nobody else's from being claimed, listed and counted.
func TestHostileRows(t *testing.T) {
	st, url := unruled(t)
	c := pgtest.Shared(t)
	_, err := st.Heartbeat(t.Context(), "a", true)
	require.NoError(t, err)
	c.Psql(t, url, `INSERT INTO jobs.tb_workflow_run (entity, action, epoch, created_at) VALUES
		('x', 'y', 9223372036854775807, now()), ('x', 'y', 0, 'infinity'), ('x', 'y', 0, '-infinity'), ('x', 'y', 0, '20000-01-01'), ('x', 'y', 0, now())`)
	runs, err := st.Claim(t.Context(), "a", 10)
	require.NoError(t, err)
	require.Len(t, runs, 4, "all but the one of the last epoch")
	runs, err = st.Runs(t.Context(), store.RunFilter{})
	require.NoError(t, err)
	require.Len(t, runs, 5)

	c.Psql(t, url, `INSERT INTO jobs.tb_job_run (service_name, operation, created_at, started_at, next_attempt_at, timeout_seconds) VALUES
		('x', 'y', 'infinity', 'infinity', 'infinity', 'NaN'), ('x', 'y', '-infinity', NULL, NULL, 'infinity'), ('x', 'y', now(), NULL, NULL, NULL)`)
	jobs, err := st.ClaimJobs(t.Context(), "a", 10)
	require.NoError(t, err)
	require.Len(t, jobs, 3)
	health, err := st.QueueHealth(t.Context(), store.JobFilter{})
	require.NoError(t, err)
	require.EqualValues(t, 3, health[0].Pending)
}

// TestRules: what nobody can work with is refused to its writer.
func TestRules(t *testing.T) {
	url := ready(t)
	c := pgtest.Shared(t)
	for _, values := range []string{
		"tb_workflow_run (entity, action, epoch) VALUES ('x', 'y', 9223372036854775807)",
		"tb_workflow_run (entity, action, sequence) VALUES ('x', 'y', -1)",
		"tb_workflow_run (entity, action, created_at) VALUES ('x', 'y', 'infinity')",
		"tb_workflow_run (entity, action) VALUES ('x', repeat('y', 1001))",
		"tb_job_run (service_name, operation, next_attempt_at) VALUES ('x', 'y', '-infinity')",
		"tb_job_run (service_name, operation, created_at) VALUES ('x', 'y', '10000-01-01')",
		"tb_job_run (service_name, operation, max_attempts) VALUES ('x', 'y', 2000000000)",
		"tb_job_run (service_name, operation) VALUES (repeat('x', 1001), 'y')",
	} {
		_, err := c.Run(url, "INSERT INTO jobs."+values)
		require.ErrorContains(t, err, "violates check constraint", values)
	}
	c.Psql(t, url, "INSERT INTO jobs.tb_workflow_run (id, entity, action, created_at) VALUES ('"+runOne+"', 'x', 'y', now()); UPDATE jobs.tb_workflow_run SET sequence = 7")
	for change, want := range map[string]string{
		"sequence = 6": "only grow", "sequence = 9007199254740993": "ck_workflow_run_sequence", "epoch = -1": "ck_workflow_run_epoch", "owner = 'b'": "only grow",
		"updated_at = 'infinity'": "violates check constraint", "updated_at = '-infinity'": "violates check constraint",
		"created_at = 'infinity', sequence = 8": "violates check constraint", "entity = repeat('x', 1001)": "violates check constraint",
		"id = gen_random_uuid()": "only grow", "retries = 1": "a run moves from pending",
	} {
		_, err := c.Run(url, "UPDATE jobs.tb_workflow_run SET "+change)
		require.ErrorContains(t, err, want, change)
	}
	c.Psql(t, url, "UPDATE jobs.tb_workflow_run SET sequence = 8, epoch = 1, owner = 'b'; DELETE FROM jobs.tb_workflow_run")
	// Nor does it help to say what an orchestrator says, without its rights.
	c.Psql(t, url, `CREATE ROLE rules_client; GRANT USAGE ON SCHEMA jobs TO rules_client; GRANT SELECT, INSERT, UPDATE ON jobs.tb_job_run, jobs.tb_workflow_run TO rules_client`)
	defer c.Psql(t, url, "DROP OWNED BY rules_client; DROP ROLE rules_client")
	for statement, want := range map[string]string{
		"INSERT INTO jobs.tb_job_run (service_name, operation, created_at) VALUES ('x', 'y', 'infinity')":                                             "violates check constraint",
		"INSERT INTO jobs.tb_job_run (service_name, operation, run_id, status) VALUES ('x', 'y', gen_random_uuid(), 'failed')":                        "a client inserts jobs of no run",
		"INSERT INTO jobs.tb_workflow_run (entity, action, status) VALUES ('x', 'y', 'completed')":                                                    "a client inserts pending runs",
		"INSERT INTO jobs.tb_job_run (service_name, operation, status) VALUES ('x', 'y', 'completed'); UPDATE jobs.tb_job_run SET status = 'running'": "a job moves from pending",
	} {
		for _, says := range []string{"yes", "all"} {
			_, err := c.Run(url, "SET ROLE rules_client; SET specql.checked = '"+says+"'; "+statement)
			require.ErrorContains(t, err, want, statement)
		}
	}
	c.Psql(t, url, "SET ROLE rules_client; INSERT INTO jobs.tb_job_run (service_name, operation) VALUES ('x', 'y')")
	_, err := c.Run(url, "SET ROLE rules_client; SET specql.checked = 'all'; UPDATE jobs.tb_job_run SET next_attempt_at = '-infinity'")
	require.ErrorContains(t, err, "violates check constraint")
	// Nor to have other meanings for the words of the rules, or another time.
	c.Psql(t, url, `CREATE SCHEMA rules_client AUTHORIZATION rules_client; SET ROLE rules_client;
		CREATE FUNCTION rules_client.octet_length(text) RETURNS integer LANGUAGE sql AS 'SELECT 0';
		CREATE FUNCTION rules_client.has_table_privilege(regclass, text) RETURNS boolean LANGUAGE sql AS 'SELECT true';
		CREATE FUNCTION rules_client.same(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT true';
		CREATE FUNCTION rules_client.current_setting(text, boolean) RETURNS text LANGUAGE sql AS $f$ SELECT 'all' $f$;
		CREATE FUNCTION rules_client.differ(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT false';
		CREATE OPERATOR rules_client.<> (LEFTARG = text, RIGHTARG = text, FUNCTION = rules_client.differ);
		CREATE OPERATOR rules_client.= (LEFTARG = text, RIGHTARG = text, FUNCTION = rules_client.same)`)
	c.Psql(t, url, "INSERT INTO jobs.tb_workflow_run (entity, action, status) VALUES ('x', 'y', 'completed')")
	for statement, want := range map[string]string{
		"INSERT INTO jobs.tb_job_run (service_name, operation) VALUES (repeat('x', 1001), 'y')":                                       "violates check constraint",
		"INSERT INTO jobs.tb_job_run (service_name, operation, run_id, status) VALUES ('x', 'y', gen_random_uuid(), 'failed')":        "a client inserts jobs of no run",
		"UPDATE jobs.tb_workflow_run SET status = 'running', retries = retries + 1":                                                   "a run moves from pending",
		"SET timezone = '<x>-14'; INSERT INTO jobs.tb_job_run (service_name, operation, created_at) VALUES ('x', 'y', '0001-01-01')":  "violates check constraint",
		"SET timezone = '<x>+160'; INSERT INTO jobs.tb_job_run (service_name, operation, created_at) VALUES ('x', 'y', '9999-12-31')": "violates check constraint",
	} {
		_, err := c.Run(url, "SET ROLE rules_client; SET search_path = rules_client, pg_catalog; "+statement)
		require.ErrorContains(t, err, want, statement)
	}
	// Nor by way of a function that has an orchestrator's rights.
	c.Psql(t, url, `ALTER ROLE rules_client LOGIN; CREATE FUNCTION public.begin_run(key text) RETURNS void LANGUAGE sql SECURITY DEFINER AS
		$$ INSERT INTO jobs.tb_workflow_run (entity, action, correlation_id) VALUES ('x', 'y', key) $$`)
	as := strings.Replace(url, pgtest.User+"@", "rules_client@", 1)
	c.Psql(t, as, "SET specql.checked = 'all'; SELECT public.begin_run('k')")
	_, err = c.Run(as, "SET specql.checked = 'all'; SELECT public.begin_run(repeat('k', 10001))")
	require.ErrorContains(t, err, "violates check constraint")
}

// TestBounds: the store looks at what it writes as the tables do at what others write.
func TestBounds(t *testing.T) {
	st := openTest(t)
	far, long := time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC), strings.Repeat("x", maxText+1)
	fine := create(newID())
	records := []*store.Record{fine}
	for _, spoil := range []func(r *store.Record){
		func(r *store.Record) { r.Create.Entity = long[:maxName+1] },
		func(r *store.Record) { r.Create.CorrelationID = long },
		func(r *store.Record) { r.Create.CreatedAt = far },
		func(r *store.Record) { r.Create.Epoch = -1 },
		func(r *store.Record) { r.Sequence = maxSerial + 1 },
		func(r *store.Record) { r.Create.Err = &fault.Error{Code: fault.Internal, Attempts: maxCount + 1} },
		func(r *store.Record) { r.NewJobs = []*store.Job{newJob(r.RunID, 1)}; r.NewJobs[0].NextAttemptAt = far },
		func(r *store.Record) { r.NewJobs = []*store.Job{newJob(r.RunID, 1)}; r.NewJobs[0].Service = long },
		func(r *store.Record) { r.NewJobs = []*store.Job{newJob(r.RunID, 1)}; r.NewJobs[0].MaxAttempts = -1 },
	} {
		r := create(newID())
		spoil(r)
		records = append(records, r)
	}
	results, err := st.Commit(t.Context(), records)
	require.NoError(t, err)
	require.NoError(t, results[0])
	for i, err := range results[1:] {
		require.ErrorIs(t, err, store.ErrRefused, "%d", i)
	}
}

// TestLargeInputs: a claim is bounded by the bytes of its inputs, and one that is too large is a fault of its job.
func TestLargeInputs(t *testing.T) {
	url := ready(t)
	st := openAt(t, url)
	c := pgtest.Shared(t)
	_, err := st.Heartbeat(t.Context(), "a", true)
	require.NoError(t, err)
	c.Psql(t, url, `INSERT INTO jobs.tb_job_run (service_name, operation, input_data) VALUES ('large', 'y', jsonb_build_object('a', repeat('x', 5000000)));
		INSERT INTO jobs.tb_job_run (service_name, operation, input_data) SELECT 'fits', 'y', jsonb_build_object('a', repeat('x', 4000000)) FROM generate_series(1, 12)`)
	claimed := map[string]bool{}
	for _, want := range []int{10, 3, 0} { // 32 MiB are nine of those that fit
		jobs, err := st.ClaimJobs(t.Context(), "a", 100)
		require.NoError(t, err)
		require.Len(t, jobs, want)
		for _, j := range jobs {
			require.False(t, claimed[j.ID])
			claimed[j.ID] = true
			if j.Service == "large" {
				require.Empty(t, j.Input)
				require.Equal(t, fault.Validation, j.Err.Code)
				require.Contains(t, j.Err.Message, "at most 4194304")
				continue
			}
			require.Nil(t, j.Err)
			require.Greater(t, len(j.Input), 4_000_000)
		}
	}
	_, jobs, err := st.Owned(t.Context(), "a")
	require.NoError(t, err)
	require.Len(t, jobs, 10)
}

// TestLegacyJSON: an old table's json that jsonb does not hold is the fault of its own job.
func TestLegacyJSON(t *testing.T) {
	url := pgtest.Database(t)
	c := pgtest.Shared(t)
	c.Psql(t, url, "CREATE SCHEMA jobs; "+strings.Replace(legacyTables["bare"], "input_data jsonb, output_data jsonb", "input_data json, output_data json", 1)+`;
		INSERT INTO jobs.tb_job_run (id, status, service_name, operation, input_data, created_at) VALUES
			(gen_random_uuid(), 'pending', 'bad', 'b', '{"x": "\u0000"}', now()), (gen_random_uuid(), 'pending', 'good', 'b', '{"x": 1}', now() + interval '1 s')`)
	_, err := Migrate(t.Context(), Options{URL: url})
	require.NoError(t, err)
	st := openAt(t, url)
	jobs, err := st.ClaimJobs(t.Context(), "a", 10)
	require.NoError(t, err)
	require.Len(t, jobs, 2)
	require.Equal(t, "bad", jobs[0].Service)
	require.Equal(t, fault.Validation, jobs[0].Err.Code)
	require.Nil(t, jobs[1].Err)
	require.JSONEq(t, `{"x": 1}`, string(jobs[1].Input))
}

// role makes a role for the test; statements are run as it through as.
func role(t *testing.T, url, grants string) (name string, as func(statements string) error) {
	t.Helper()
	c := pgtest.Shared(t)
	name = "r_" + strings.ReplaceAll(newID(), "-", "")
	c.Psql(t, url, fmt.Sprintf("CREATE ROLE %s; GRANT USAGE ON SCHEMA jobs TO %[1]s; "+grants, name))
	t.Cleanup(func() { _, _ = c.Run(url, fmt.Sprintf("DROP OWNED BY %s; DROP ROLE %[1]s", name)) })
	return name, func(statements string) error {
		_, err := c.Run(url, "SET SESSION AUTHORIZATION "+name+"; "+statements)
		return err
	}
}

// TestTriggerFunctions: what runs with its owner's rights does so on its own table alone.
func TestTriggerFunctions(t *testing.T) {
	st := openTest(t)
	url := st.pool.Config().ConnString()
	id := newID()
	results, err := st.Commit(t.Context(), []*store.Record{create(id)})
	require.NoError(t, err)
	require.NoError(t, results[0])
	_, as := role(t, url, "GRANT INSERT ON jobs.tb_job_run TO %[1]s")
	const attach = `CREATE TEMP TABLE z (id uuid);
		CREATE TRIGGER x AFTER DELETE ON z REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION jobs.fn_delete_with_run();
		INSERT INTO z VALUES ('%s'); DELETE FROM z;`
	require.ErrorContains(t, as(fmt.Sprintf(attach, id)), "permission denied for function jobs.fn_delete_with_run")
	// Not even by somebody who may.
	c := pgtest.Shared(t)
	_, err = c.Run(url, fmt.Sprintf(attach, id))
	require.ErrorContains(t, err, "the trigger of jobs.tb_workflow_run alone")
	definers := view(t, st, `SELECT p.proname FROM pg_proc p WHERE p.pronamespace = 'jobs'::regnamespace AND p.prosecdef
		AND p.prorettype = 'trigger'::regtype AND (has_function_privilege('public', p.oid, 'EXECUTE') OR p.prosrc NOT LIKE '%TG_TABLE_SCHEMA%')`)
	require.Empty(t, definers)
}

// TestForgedRows: the right to insert is not the right to write what orchestrators write.
func TestForgedRows(t *testing.T) {
	st := openTest(t)
	url := st.pool.Config().ConnString()
	id := newID()
	results, err := st.Commit(t.Context(), []*store.Record{create(id)})
	require.NoError(t, err)
	require.NoError(t, results[0])
	_, as := role(t, url, "GRANT INSERT ON jobs.tb_job_run, jobs.tb_workflow_run TO %[1]s")
	require.ErrorContains(t, as("INSERT INTO jobs.tb_job_run (service_name, operation, status, run_id, step_path, output_data) VALUES ('api', 'call', 'completed', '"+
		id+"', 'steps[1]', '{}')"), "a client inserts jobs of no run")
	require.ErrorContains(t, as("INSERT INTO jobs.tb_job_run (service_name, operation, by_sql) VALUES ('api', 'call', false)"), "a client inserts jobs of no run")
	for _, forged := range []string{"owner, epoch", "epoch, owner"} {
		require.ErrorContains(t, as("INSERT INTO jobs.tb_workflow_run (entity, action, "+forged+") VALUES ('x', 'y', '1', '1')"), "a client inserts pending runs")
	}
	require.ErrorContains(t, as("INSERT INTO jobs.tb_workflow_run (entity, action, snapshot) VALUES ('x', 'y', 'd')"), "a client inserts pending runs")
	// What clients do, and what old ones did.
	require.NoError(t, as("INSERT INTO jobs.tb_workflow_run (entity, action, idempotency_key, tenant_id) VALUES ('x', 'y', 'k', 't')"))
	require.NoError(t, as("INSERT INTO jobs.tb_job_run (service_name, operation) VALUES ('api', 'call')"))
	require.NoError(t, as("INSERT INTO jobs.tb_job_run (service_name, operation, status, completed_at) VALUES ('api', 'call', 'completed', now())"))
}

// TestDashboards: the right to read a view is enough to read it, and to read nothing else.
func TestDashboards(t *testing.T) {
	st := openTest(t)
	url := st.pool.Config().ConnString()
	views := view(t, st, "SELECT relname::text AS name FROM pg_class WHERE relnamespace = 'jobs'::regnamespace AND relkind = 'v'")
	require.Len(t, views, 8)
	dash, as := role(t, url, "")
	require.ErrorContains(t, as("SELECT * FROM jobs.fn_failures()"), "may not read the views")
	require.ErrorContains(t, as("SELECT * FROM jobs.fn_active_jobs()"), "may not read the views")
	for _, v := range views {
		pgtest.Shared(t).Psql(t, url, fmt.Sprintf("GRANT SELECT ON jobs.%s TO %s", v["name"], dash))
		require.NoError(t, as(fmt.Sprintf("SELECT count(*) FROM jobs.%s", v["name"])))
	}
	require.ErrorContains(t, as("SELECT FROM jobs.tb_job_run"), "permission denied")
}

// TestBuriedOwner: an owner that was taken for dead creates and claims nothing, until it registers again.
func TestBuriedOwner(t *testing.T) {
	st := openTest(t)
	ctx := t.Context()
	beats, err := st.Heartbeat(ctx, "a", true)
	require.NoError(t, err)
	buried, err := st.Bury(ctx, "a", beats["a"])
	require.NoError(t, err)
	require.True(t, buried)
	again, err := st.Bury(ctx, "a", beats["a"])
	require.NoError(t, err)
	require.False(t, again)
	require.NoError(t, run(t, st, "INSERT INTO jobs.tb_workflow_run (entity, action) VALUES ('x', 'y')"))
	require.NoError(t, run(t, st, "INSERT INTO jobs.tb_job_run (service_name, operation) VALUES ('x', 'y')"))
	failed := create(newID())
	failed.Create.Owner, failed.Create.Status, failed.Create.CompletedAt = "b", store.Failed, time.Now()

	mine := create(newID())
	results, err := st.Commit(ctx, []*store.Record{mine, failed})
	require.NoError(t, err)
	require.ErrorIs(t, results[0], store.ErrFenced)
	require.NoError(t, results[1])
	_, err = st.Claim(ctx, "a", 10)
	require.ErrorIs(t, err, store.ErrFenced)
	_, err = st.ClaimJobs(ctx, "a", 10)
	require.ErrorIs(t, err, store.ErrFenced)
	_, err = st.ClaimRun(ctx, "a", failed.RunID)
	require.ErrorIs(t, err, store.ErrFenced)
	_, err = st.Heartbeat(ctx, "a", false)
	require.ErrorIs(t, err, store.ErrFenced)
	beats, err = st.Heartbeat(ctx, "b", true)
	require.NoError(t, err)
	require.NotContains(t, beats, "a")

	_, err = st.Heartbeat(ctx, "a", true)
	require.NoError(t, err)
	results, err = st.Commit(ctx, []*store.Record{mine})
	require.NoError(t, err)
	require.NoError(t, results[0])
	runs, err := st.Claim(ctx, "a", 10)
	require.NoError(t, err)
	require.Len(t, runs, 1)
}

// TestQueueIsTidied: jobs that ended while they were claimed leave the queue, and those that came past the triggers get into it.
func TestQueueIsTidied(t *testing.T) {
	st := openTest(t)
	url := st.pool.Config().ConnString()
	c := pgtest.Shared(t)
	c.Psql(t, url, "INSERT INTO jobs.tb_job_run (service_name, operation) VALUES ('x', 'y')")
	jobs, err := st.ClaimJobs(t.Context(), "a", 10)
	require.NoError(t, err)
	require.Len(t, jobs, 1)
	c.Psql(t, url, "UPDATE jobs.tb_job_run SET status = 'cancelled'")
	require.NoError(t, st.Maintain(t.Context(), 0))
	require.Equal(t, "0", c.Psql(t, url, "SELECT count(*) FROM jobs.tb_job_queue"))

	c.Psql(t, url, "SET session_replication_role = replica; INSERT INTO jobs.tb_job_run (service_name, operation) VALUES ('x', 'y')")
	jobs, err = st.ClaimJobs(t.Context(), "a", 10)
	require.NoError(t, err)
	require.Empty(t, jobs)
	applied, err := Migrate(t.Context(), Options{URL: url})
	require.NoError(t, err)
	require.Empty(t, applied)
	jobs, err = st.ClaimJobs(t.Context(), "a", 10)
	require.NoError(t, err)
	require.Len(t, jobs, 1)
}

// TestTookTooLong: which failures have a prune try less at once.
func TestTookTooLong(t *testing.T) {
	require.True(t, tookTooLong(fmt.Errorf("x: %w", context.DeadlineExceeded)))
	require.True(t, tookTooLong(&pgconn.PgError{Code: codeCancelled}))
	require.False(t, tookTooLong(&pgconn.PgError{Code: codeUnique}))
	require.False(t, tookTooLong(store.ErrClosed))
}

// TestPruneHalves: what is too much for one statement goes in smaller parts.
func TestPruneHalves(t *testing.T) {
	st := openTest(t)
	url := st.pool.Config().ConnString()
	c := pgtest.Shared(t)
	// A statement that deletes more than ten runs takes longer than it may.
	c.Psql(t, url, `CREATE FUNCTION jobs.slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
			IF (SELECT count(*) FROM old_rows) > 10 THEN RAISE EXCEPTION USING ERRCODE = '57014', MESSAGE = 'too long'; END IF; RETURN NULL; END $$;
		CREATE TRIGGER slow AFTER DELETE ON jobs.tb_workflow_run REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION jobs.slow();
		INSERT INTO jobs.tb_workflow_run (status, owner, completed_at) SELECT 'completed', 'x', now() - interval '9 days' FROM generate_series(1, 100)`)
	require.NoError(t, st.Maintain(t.Context(), time.Hour))
	require.Equal(t, "0", c.Psql(t, url, "SELECT count(*) FROM jobs.tb_workflow_run"))
}

// TestListsByIndex: a filter that fits no run does not read all runs.
func TestListsByIndex(t *testing.T) {
	st := openTest(t)
	url := st.pool.Config().ConnString()
	pgtest.Shared(t).Psql(t, url, `INSERT INTO jobs.tb_workflow_run (entity, tenant_id, action, status, owner)
		SELECT 'orders', 'acme', 'pay', 'completed', 'x' FROM generate_series(1, 5000); ANALYZE jobs.tb_workflow_run`)
	for column, index := range map[string]string{"entity": "ix_workflow_run_entity", "tenant_id": "ix_workflow_run_tenant"} {
		var plan string
		require.NoError(t, st.with(t.Context(), func(ctx context.Context, c *pgx.Conn) error {
			if _, err := c.Exec(ctx, "PREPARE listing (text) AS SELECT r.id FROM jobs.tb_workflow_run r WHERE true AND r."+column+" = $1 ORDER BY r.id DESC LIMIT 100",
				pgx.QueryExecModeSimpleProtocol); err != nil {
				return err
			}
			lines, err := query(ctx, c, pgx.RowTo[string], "EXPLAIN EXECUTE listing ('none')", pgx.QueryExecModeSimpleProtocol)
			plan = strings.Join(lines, "\n")
			_, undo := c.Exec(ctx, "DEALLOCATE listing")
			require.NoError(t, undo)
			return err
		}))
		require.Contains(t, plan, index)
	}
}
