package postgres

import (
	"context"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/specql/mesh/migrations"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// Problem is what a database lacks, with the mend.
type Problem struct {
	// What is wrong, with its place: a table, a column, an index.
	What string
	// Mend is what to do about it.
	Mend string
}

// migrateMend is the mend of most problems.
const migrateMend = "run specql migrate-schema --database URL, or psql -v ON_ERROR_STOP=1 -f migrations/001_multi_execution.sql, as the owner of the schema jobs"

// ungated finds the triggers that do what [Store] does itself, and do not ask whether it has: those of an older version's file, over which a
// newer one was before.
const ungated = `SELECT k.relname || '.' || t.tgname, 'of another version' FROM pg_trigger t JOIN pg_class k ON k.oid = t.tgrelid
	WHERE t.tgrelid IN (to_regclass('jobs.tb_job_run'), to_regclass('jobs.tb_workflow_run'))
		AND t.tgname IN ('tr_job_run_check', 'tr_job_run_stat_insert', 'tr_job_run_stat_update', 'tr_workflow_run_check')
		AND pg_get_triggerdef(t.oid) NOT LIKE '%fn_left_to_triggers%'`

// standing is what tells whether the sums of jobs can be worked out before they are written.
type standing struct {
	// columns are those of tb_job_stat, in their order.
	columns []string
	// same says that tb_job_run keeps what is written to it: an upgraded table may round times, and a trigger of somebody else
	// may change rows.
	same bool
}

func lookAtSums(ctx context.Context, q querier) (standing, error) {
	columns, err := query(ctx, q, pgx.RowTo[string], `SELECT attname::text FROM pg_attribute
		WHERE attrelid = 'jobs.tb_job_stat'::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum`)
	if err != nil {
		return standing{}, err
	}
	same, err := one(ctx, q, pgx.RowTo[bool], `SELECT NOT EXISTS (SELECT FROM pg_attribute
			WHERE attrelid = 'jobs.tb_job_run'::regclass AND attname IN ('duration_seconds', 'created_at', 'started_at', 'completed_at')
				AND format_type(atttypid, atttypmod) <> CASE attname WHEN 'duration_seconds' THEN 'double precision' ELSE 'timestamp with time zone' END)
		AND NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = 'jobs.tb_job_run'::regclass AND NOT tgisinternal AND tgenabled <> 'D'
			AND tgtype & 3 = 3 AND tgname <> 'tr_job_run_check')`) // 3: for each row, before
	return standing{columns, same}, err
}

// check sees that the schema is the one that this program knows, and returns the types of the columns of tb_job_run and how it
// stands with the sums.
func (s *Store) check(ctx context.Context) (types map[string]string, sums standing, err error) {
	types = map[string]string{}
	err = s.with(ctx, func(ctx context.Context, c *pgx.Conn) error {
		if err := checkVersion(ctx, c); err != nil {
			return err
		}
		var old bool
		if err := c.QueryRow(ctx, "SELECT EXISTS ("+ungated+")").Scan(&old); err != nil {
			return err
		}
		if old {
			return fmt.Errorf("%w: an older version's file made its triggers anew; %s", store.ErrNotReady, migrateMend)
		}
		var err error
		if sums, err = lookAtSums(ctx, c); err != nil {
			return err
		}
		_, err = query(ctx, c, func(row pgx.CollectableRow) (struct{}, error) {
			var name, kind string
			err := row.Scan(&name, &kind)
			types[name] = base(kind)
			return struct{}{}, err
		}, `SELECT attname::text, format_type(atttypid, atttypmod) FROM pg_attribute
			WHERE attrelid = 'jobs.tb_job_run'::regclass AND attnum > 0 AND NOT attisdropped`)
		return err
	})
	return types, sums, err
}

func checkVersion(ctx context.Context, c *pgx.Conn) error {
	versions, err := migrations.Versions()
	if err != nil {
		return err
	}
	var version int
	if err := c.QueryRow(ctx, "SELECT current_setting('server_version_num')::int").Scan(&version); err != nil {
		return err
	}
	if version < minVersion {
		return fmt.Errorf("the server is PostgreSQL %d; use %d or later", version/10000, minVersion/10000)
	}
	have, err := schemaVersion(ctx, c)
	switch {
	case err != nil:
		return err
	case have == 0:
		return fmt.Errorf("%w: it has no tables of SpecQL, or old ones; %s", store.ErrNotReady, migrateMend)
	case have < len(versions):
		return fmt.Errorf("%w: its schema is version %d, this program needs %d; %s", store.ErrNotReady, have, len(versions), migrateMend)
	case have > len(versions):
		return checkNewer(ctx, c, have, len(versions))
	}
	return nil
}

// checkNewer says whether a schema that is newer than this program still does for it: the migrations that made it
// newer say which is the oldest version that can work with them.
func checkNewer(ctx context.Context, c *pgx.Conn, have, known int) error {
	oldest := have
	var tells bool
	err := c.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_attribute
		WHERE attrelid = 'jobs.tb_schema_version'::regclass AND attname = 'oldest' AND NOT attisdropped)`).Scan(&tells)
	if err == nil && tells {
		err = c.QueryRow(ctx, "SELECT max(coalesce(oldest, version)) FROM jobs.tb_schema_version").Scan(&oldest)
	}
	if err != nil {
		return err
	}
	if oldest > known {
		return fmt.Errorf("the database was migrated by a newer version (its schema is %d and for programs that know %d, this one knows %d); use that version", have, oldest, known)
	}
	return nil
}

// schemaVersion is the highest migration that the database has; 0 for none.
func schemaVersion(ctx context.Context, c *pgx.Conn) (int, error) {
	var there bool
	if err := c.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_class k JOIN pg_namespace n ON n.oid = k.relnamespace
		WHERE n.nspname = 'jobs' AND k.relname = 'tb_schema_version')`).Scan(&there); err != nil || !there {
		return 0, err
	}
	var version int
	err := c.QueryRow(ctx, "SELECT coalesce(max(version), 0) FROM jobs.tb_schema_version").Scan(&version)
	return version, err
}

// connect opens one connection, outside a pool.
func connect(ctx context.Context, o Options) (*pgx.Conn, error) {
	config, err := poolConfig(o)
	if err != nil {
		return nil, err
	}
	if o.Logger != nil {
		config.ConnConfig.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) {
			o.Logger.WarnContext(ctx, n.Message)
		}
	}
	c, err := pgx.ConnectConfig(ctx, config.ConnConfig)
	if err != nil {
		return nil, fmt.Errorf("connect to the database: %w", err)
	}
	return c, nil
}

// migrateLock is the advisory lock under which the schema changes.
const migrateLock = 7271450120554

// Migrate brings a database to the schema that this program knows, and returns the names of the versions that it
// applied: none where nothing was amiss, all of them where something that an earlier one made was lost. Each statement is a transaction of its own; one migrates at a time, others wait.
func Migrate(ctx context.Context, o Options) (applied []string, err error) {
	versions, err := migrations.Versions()
	if err != nil {
		return nil, err
	}
	c, err := connect(ctx, o)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close(context.WithoutCancel(ctx)) }()
	if err := lockMigration(ctx, c); err != nil {
		return nil, fmt.Errorf("migrate: %w", err)
	}
	have, err := schemaVersion(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("migrate: %w", err)
	}
	if have > len(versions) {
		if err := checkNewer(ctx, c, have, len(versions)); err != nil {
			return nil, fmt.Errorf("migrate: %w", err)
		}
		return nil, nil
	}
	if have == len(versions) {
		problems, err := validate(ctx, c)
		if err != nil {
			return nil, err
		}
		if len(problems) == 0 {
			// Rows may have come past the triggers, with a dump that was restored.
			if _, err := c.Exec(ctx, "SET enable_seqscan = on; SELECT jobs.fn_enqueue_pending()", pgx.QueryExecModeSimpleProtocol); err != nil {
				return nil, fmt.Errorf("migrate: queue pending jobs: %w", err)
			}
			return nil, nil
		}
		have = 0
	}
	if err := apply(ctx, c, migrations.SQL); err != nil {
		return nil, fmt.Errorf("migrate: %w", err)
	}
	for _, v := range versions[have:] {
		applied = append(applied, v.Name)
	}
	return applied, nil
}

// lockMigration waits for the lock without holding a transaction open, which an index that is being built
// concurrently would wait for.
func lockMigration(ctx context.Context, c *pgx.Conn) error {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		var mine bool
		if err := c.QueryRow(ctx, "SELECT pg_try_advisory_lock($1)", int64(migrateLock)).Scan(&mine); err != nil || mine {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func apply(ctx context.Context, c *pgx.Conn, text string) error {
	statements, err := migrations.Statements(text)
	if err != nil {
		return err
	}
	for _, text := range statements {
		for try := 1; ; try++ {
			_, err := c.Exec(ctx, text, pgx.QueryExecModeSimpleProtocol)
			if err == nil {
				break
			}
			if e, ok := ofServer(err); ok && (e.Code == codeDeadlock || e.Code == codeLockTimeout) && try < 5 {
				continue
			}
			if e, ok := ofServer(err); ok && e.Hint != "" {
				return fmt.Errorf("%w (%s), in: %s", err, e.Hint, firstLine(text))
			}
			return fmt.Errorf("%w, in: %s", err, firstLine(text))
		}
	}
	return nil
}

// firstLine is what a statement does, without the comments before it.
func firstLine(text string) string {
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "--") {
			return line
		}
	}
	return ""
}

// wanted is what the schema holds, read from its text.
type wanted struct {
	tables    map[string][][2]string // columns with their types
	indexes   []string
	triggers  [][2]string // table and name
	functions []string
	views     []string
}

var (
	wantTable    = regexp.MustCompile(`(?s)CREATE TABLE (?:IF NOT EXISTS )?jobs\.(\w+) \(\n(.*?)\n\s*\)`)
	wantColumn   = regexp.MustCompile(`^\s*([a-z_]+)\s+([a-z]+(?: precision)?(?:\[\])?)[ ,]`)
	wantIndex    = regexp.MustCompile(`INDEX (?:CONCURRENTLY )?IF NOT EXISTS (\w+)`)
	wantTrigger  = regexp.MustCompile(`CREATE OR REPLACE TRIGGER (\w+) (?:BEFORE|AFTER) [A-Z ]+ ON jobs\.(\w+)`)
	wantFunction = regexp.MustCompile(`CREATE OR REPLACE (?:FUNCTION|PROCEDURE) jobs\.(\w+)|EXECUTE FUNCTION jobs\.(\w+)`)
	wantView     = regexp.MustCompile(`CREATE OR REPLACE VIEW jobs\.(\w+)`)
)

func readWanted(text string) wanted {
	w := wanted{tables: map[string][][2]string{}}
	for _, m := range wantTable.FindAllStringSubmatch(text, -1) {
		for line := range strings.Lines(m[2] + ",\n") {
			if c := wantColumn.FindStringSubmatch(line); c != nil {
				w.tables[m[1]] = append(w.tables[m[1]], [2]string{c[1], c[2]})
			}
		}
	}
	for _, m := range wantIndex.FindAllStringSubmatch(text, -1) {
		w.indexes = append(w.indexes, m[1])
	}
	for _, m := range wantTrigger.FindAllStringSubmatch(text, -1) {
		w.triggers = append(w.triggers, [2]string{m[2], m[1]})
	}
	for _, m := range wantFunction.FindAllStringSubmatch(text, -1) {
		if name := m[1] + m[2]; !slices.Contains(w.functions, name) {
			w.functions = append(w.functions, name)
		}
	}
	for _, m := range wantView.FindAllStringSubmatch(text, -1) {
		w.views = append(w.views, m[1])
	}
	return w
}

// fits reports whether a column that is there can do what the wanted type is for. The old table's types vary.
func fits(have, want string) bool {
	switch have = base(have); {
	case have == want, want == "timestamptz" && strings.HasPrefix(have, "timestamp"), want == "jsonb" && have == "json":
		return true
	case want == "text":
		return have == "character varying" || have == "character" || have == "uuid" || isInteger(have)
	case want == "double precision":
		return isInteger(have) || have == "numeric" || have == "real"
	case want == "integer" || want == "bigint":
		return isInteger(have)
	}
	return false
}

// Validate lists what a database lacks of the schema that this program needs; nothing where it is ready.
func Validate(ctx context.Context, o Options) ([]Problem, error) {
	c, err := connect(ctx, o)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close(context.WithoutCancel(ctx)) }()
	problems, err := validate(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("validate the schema: %w", err)
	}
	return problems, nil
}

func validate(ctx context.Context, c *pgx.Conn) ([]Problem, error) {
	if err := c.Ping(ctx); err != nil {
		return nil, err
	}
	var problems []Problem
	add := func(mend, format string, args ...any) {
		problems = append(problems, Problem{What: fmt.Sprintf(format, args...), Mend: mend})
	}
	if err := checkVersion(ctx, c); err != nil {
		if e, ok := ofServer(err); ok && e.Code != "42501" {
			return nil, err
		}
		add(migrateMend, "%v", err)
	}
	w := readWanted(migrations.SQL)
	columns := map[[2]string]string{}
	tables := map[string]bool{}
	_, err := query(ctx, c, func(row pgx.CollectableRow) (struct{}, error) {
		var table, column, kind string
		err := row.Scan(&table, &column, &kind)
		columns[[2]string{table, column}] = kind
		tables[table] = true
		return struct{}{}, err
	}, `SELECT k.relname::text, a.attname::text, format_type(a.atttypid, a.atttypmod)
		FROM pg_class k JOIN pg_namespace n ON n.oid = k.relnamespace JOIN pg_attribute a ON a.attrelid = k.oid
		WHERE n.nspname = 'jobs' AND k.relkind IN ('r', 'p', 'v') AND a.attnum > 0 AND NOT a.attisdropped`)
	if err != nil {
		return nil, err
	}
	for _, table := range sortedKeys(w.tables) {
		if !tables[table] {
			add(migrateMend, "table jobs.%s is missing", table)
			continue
		}
		for _, want := range w.tables[table] {
			have, ok := columns[[2]string{table, want[0]}]
			switch {
			case !ok:
				add(migrateMend, "column jobs.%s.%s is missing", table, want[0])
			case !fits(have, want[1]):
				add(fmt.Sprintf("ALTER TABLE jobs.%s ALTER COLUMN %s TYPE %s USING %[2]s::%[3]s, at a time when nobody writes", table, want[0], want[1]),
					"column jobs.%s.%s is %s, which %s does not fit into", table, want[0], have, want[1])
			case want[1] == "text" && strings.Contains(have, "("):
				add("drop the views that use the column, "+migrateMend+", and create the views anew",
					"column jobs.%s.%s is %s: longer values would be refused", table, want[0], have)
			}
		}
	}
	if err := validateRest(ctx, c, w, tables, add); err != nil {
		return nil, err
	}
	return problems, nil
}

// validateRest looks at what stands on the tables.
func validateRest(ctx context.Context, c *pgx.Conn, w wanted, tables map[string]bool, add func(mend, format string, args ...any)) error {
	pairs := func(text string) (map[string]string, error) {
		out := map[string]string{}
		_, err := query(ctx, c, func(row pgx.CollectableRow) (struct{}, error) {
			var name, state string
			err := row.Scan(&name, &state)
			out[name] = state
			return struct{}{}, err
		}, text)
		return out, err
	}
	indexes, err := pairs(`SELECT k.relname::text, i.indisvalid::text FROM pg_index i JOIN pg_class k ON k.oid = i.indexrelid
		JOIN pg_namespace n ON n.oid = k.relnamespace WHERE n.nspname = 'jobs'`)
	if err != nil {
		return err
	}
	for _, name := range w.indexes {
		switch indexes[name] {
		case "":
			add(migrateMend, "index jobs.%s is missing", name)
		case "false":
			add(migrateMend, "index jobs.%s was not finished", name)
		}
	}
	leftovers, err := pairs(`SELECT 'index ' || k.relname || ': ' || pg_get_indexdef(i.indexrelid),
			CASE WHEN c.oid IS NULL THEN format('DROP INDEX %s', i.indexrelid::regclass) ELSE format('ALTER TABLE jobs.tb_job_run DROP CONSTRAINT %I', c.conname) END
		FROM pg_index i JOIN pg_class k ON k.oid = i.indexrelid LEFT JOIN pg_constraint c ON c.conindid = i.indexrelid AND c.conrelid = i.indrelid
		WHERE i.indrelid = to_regclass('jobs.tb_job_run') AND i.indisunique AND NOT i.indisprimary AND k.relname <> 'ux_job_run_idempotency_key'
			AND pg_get_indexdef(i.indexrelid) LIKE '%idempotency_key%'
		UNION ALL
		SELECT 'constraint ' || conname || ': ' || pg_get_constraintdef(oid), format('ALTER TABLE jobs.tb_job_run DROP CONSTRAINT %I', conname)
		FROM pg_constraint WHERE conrelid = to_regclass('jobs.tb_job_run') AND contype = 'c' AND conname <> 'ck_job_run_status' AND cardinality(conkey) > 1
			AND pg_get_constraintdef(oid) ~ '\m(pending|running|completed|failed)\M'`)
	if err != nil {
		return err
	}
	for _, what := range sortedKeys(leftovers) {
		add(leftovers[what]+", or put a rule in its place that lets the engine write every state and repeat the key of a call that it retries",
			"jobs.tb_job_run has a rule of its own that may refuse what the engine writes: %s", what)
	}
	triggers, err := pairs(`SELECT k.relname || '.' || t.tgname, t.tgenabled::text FROM pg_trigger t JOIN pg_class k ON k.oid = t.tgrelid
		JOIN pg_namespace n ON n.oid = k.relnamespace WHERE n.nspname = 'jobs' AND NOT t.tgisinternal`)
	if err != nil {
		return err
	}
	for _, trigger := range w.triggers {
		switch triggers[trigger[0]+"."+trigger[1]] {
		case "":
			add(migrateMend, "trigger %s of jobs.%s is missing", trigger[1], trigger[0])
		case "D", "R":
			add(fmt.Sprintf("ALTER TABLE jobs.%s ENABLE TRIGGER %s", trigger[0], trigger[1]), "trigger %s of jobs.%s is disabled", trigger[1], trigger[0])
		}
	}
	others, err := pairs(ungated)
	if err != nil {
		return err
	}
	for _, name := range sortedKeys(others) {
		table, trigger, _ := strings.Cut(name, ".")
		add(migrateMend, "trigger %s of jobs.%s is that of an older version", trigger, table)
	}
	functions, err := pairs("SELECT p.proname::text, 'there' FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = 'jobs'")
	if err != nil {
		return err
	}
	for _, name := range w.functions {
		if functions[name] == "" {
			add(migrateMend, "function jobs.%s is missing", name)
		}
	}
	for _, name := range w.views {
		if !tables[name] {
			add(migrateMend, "view jobs.%s is missing", name)
		}
	}
	return nil
}

// CheckPermissions lists what the role of the URL may not do and the orchestrator has to; nothing where it may do all.
func CheckPermissions(ctx context.Context, o Options) ([]Problem, error) {
	c, err := connect(ctx, o)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close(context.WithoutCancel(ctx)) }()
	var problems []Problem
	var role string
	var schema, usage bool
	err = c.QueryRow(ctx, `SELECT current_user::text, to_regnamespace('jobs') IS NOT NULL,
		coalesce(has_schema_privilege(to_regnamespace('jobs'), 'USAGE'), false)`).Scan(&role, &schema, &usage)
	switch {
	case err != nil:
		return nil, fmt.Errorf("check permissions: %w", err)
	case !schema:
		return []Problem{{What: "there is no schema jobs", Mend: migrateMend}}, nil
	case !usage:
		problems = append(problems, Problem{What: fmt.Sprintf("%s may not use the schema jobs", role), Mend: "GRANT USAGE ON SCHEMA jobs TO " + quote(role)})
	}
	found, err := query(ctx, c, pgx.RowToStructByPos[struct{ Object, Right, Kind string }], `
		SELECT k.relname::text, p.name, 'TABLE' FROM pg_class k JOIN pg_namespace n ON n.oid = k.relnamespace
			CROSS JOIN LATERAL unnest(CASE WHEN k.relkind = 'v' OR k.relname = 'tb_schema_version' THEN array['SELECT']
				ELSE array['SELECT', 'INSERT', 'UPDATE', 'DELETE'] END) AS p (name)
			WHERE n.nspname = 'jobs' AND k.relkind IN ('r', 'p', 'v') AND k.relname ~ '^(tb|v)_' AND NOT has_table_privilege(k.oid, p.name)
		UNION ALL
		SELECT p.oid::regprocedure::text, 'EXECUTE', 'FUNCTION' FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
			WHERE n.nspname = 'jobs' AND p.prorettype <> 'trigger'::regtype AND p.prokind = 'f' AND NOT has_function_privilege(p.oid, 'EXECUTE')
		ORDER BY 1, 2`)
	if err != nil {
		return nil, fmt.Errorf("check permissions: %w", err)
	}
	w := readWanted(migrations.SQL)
	for _, f := range found {
		object := f.Object
		if f.Kind == "TABLE" {
			if w.tables[object] == nil && !slices.Contains(w.views, object) {
				continue // a table of somebody else
			}
			object = "jobs." + object
		}
		problems = append(problems, Problem{
			What: fmt.Sprintf("%s lacks the right %s on %s", role, f.Right, object),
			Mend: fmt.Sprintf("GRANT %s ON %s %s TO %s", f.Right, f.Kind, object, quote(role)),
		})
	}
	return problems, nil
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
