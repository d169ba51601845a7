package postgres

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgtype"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// column is a column that a statement writes: the values of many rows travel as one array.
type column[T any] struct {
	name string
	// array is the type of an element of the parameter.
	array string
	// values gives the parameter for many rows, and value that for a single one.
	values func([]T) any
	value  func(T) any
}

func columnOf[T, V any](name, array string, get func(T) V) column[T] {
	return column[T]{name, array, func(rows []T) any { return gather(rows, get) }, func(row T) any { return get(row) }}
}

func ids[T any](name string, get func(T) string) column[T] {
	return columnOf(name, "uuid", func(r T) pgtype.UUID { return uuidValue(get(r)) })
}

func sameIDs[T any](name string, get func(T) string) column[T] {
	return columnOf(name, "uuid", func(r T) pgtype.UUID { return sameUUID(get(r)) })
}

func texts[T any](name string, get func(T) string) column[T] {
	return columnOf(name, "text", get)
}

func nullTexts[T any](name string, get func(T) string) column[T] {
	return columnOf(name, "text", func(r T) *string { return nullText(get(r)) })
}

// payloads travel as text and are parsed by the server, which refuses what is no JSON.
func payloads[T any](name string, get func(T) []byte) column[T] {
	return columnOf(name, "text", func(r T) []byte { return nullJSON(get(r)) })
}

func numbers[T any](name string, get func(T) int64) column[T] {
	return columnOf(name, "bigint", get)
}

func nullNumbers[T any](name string, get func(T) *int64) column[T] {
	return columnOf(name, "bigint", get)
}

func booleans[T any](name string, get func(T) bool) column[T] {
	return columnOf(name, "boolean", get)
}

func nullBooleans[T any](name string, get func(T) *bool) column[T] {
	return columnOf(name, "boolean", get)
}

func times[T any](name string, get func(T) time.Time) column[T] {
	return columnOf(name, "timestamptz", func(r T) *time.Time { return nullTime(get(r)) })
}

func floats[T any](name string, get func(T) *float64) column[T] {
	return columnOf(name, "double precision", get)
}

func gather[T, V any](rows []T, get func(T) V) []V {
	out := make([]V, len(rows))
	for i, r := range rows {
		out[i] = get(r)
	}
	return out
}

// faults are the four columns of an error.
func faults[T any](get func(T) *fault.Error) []column[T] {
	return []column[T]{
		nullTexts("error_code", func(r T) string {
			if e := get(r); e != nil {
				return plain(string(e.Code))
			}
			return ""
		}),
		nullTexts("error_message", func(r T) string {
			if e := get(r); e != nil {
				return plain(e.Message)
			}
			return ""
		}),
		nullBooleans("error_retryable", func(r T) *bool {
			if e := get(r); e != nil {
				return &e.Retryable
			}
			return nil
		}),
		nullNumbers("error_attempts", func(r T) *int64 {
			if e := get(r); e != nil {
				return new(int64(e.Attempts))
			}
			return nil
		}),
	}
}

// arguments are the parameters of a statement over rows.
func arguments[T any](columns []column[T], rows []T) []any {
	return appendArguments(make([]any, 0, len(columns)+1), columns, rows, false)
}

// appendArguments adds the parameters of a statement over rows; those of one over a single row are no arrays.
func appendArguments[T any](args []any, columns []column[T], rows []T, single bool) []any {
	for _, c := range columns {
		if single {
			args = append(args, c.value(rows[0]))
		} else {
			args = append(args, c.values(rows))
		}
	}
	return args
}

// source is the FROM of a statement over rows: d, with a column for each parameter. In a list of what is selected, unnest gives one row
// after the other; in FROM, each of its arrays would fill a store of 16 KiB first.
func source[T any](columns []column[T]) string {
	var arrays []string
	for i, c := range columns {
		arrays = append(arrays, fmt.Sprintf("unnest($%d::%s[]) AS %s", i+1, c.array, c.name))
	}
	return "(SELECT " + strings.Join(arrays, ", ") + ") AS d"
}

// change is a record's change of its run, with the sequence that plain records of the same run add.
type change struct {
	record   *store.Record
	sequence int64
}

// statements are the texts that depend on the types of the columns of tb_job_run, which an upgraded table may
// have of its own.
type statements struct {
	types map[string]string
	// sumColumns are the columns of tb_job_stat in the order of the table.
	sumColumns []string
	// jobColumns is what a read of jobs selects, from j with its run r; queuedColumns, of jobs that wait for a run, leave out
	// what their clients may have written beside the input, and end with the input's length.
	jobColumns, queuedColumns string

	createRuns, touchRuns, changeRuns, retryRuns string
	insertJobs, insertNewJobs, adoptJobs         string
	updateJobs, upsertSteps, takeSignals         string
	// endJobs is updateJobs for jobs that have not ended, and addSums adds what such ends add to the sums, where the triggers do not.
	endJobs, addSums string

	// steps are statements made of these, by their parts.
	steps sync.Map
}

// stepParts says which of these one statement is made of: touchRuns, changeRuns, updateJobs (or endJobs, where the statement keeps
// what the triggers would see to), addSums, insertNewJobs, createRuns. The parameters of a single one have a row each.
type stepParts struct{ touch, change, end, kept, sum, begin, create, single bool }

var runColumns = append([]column[*store.Record]{
	ids("id", func(r *store.Record) string { return r.Create.ID }),
	nullTexts("entity", func(r *store.Record) string { return r.Create.Entity }),
	nullTexts("action", func(r *store.Record) string { return r.Create.Action }),
	nullTexts("entity_schema", func(r *store.Record) string { return r.Create.EntitySchema }),
	nullTexts("entity_id", func(r *store.Record) string { return r.Create.EntityID }),
	texts("status", func(r *store.Record) string { return string(r.Create.Status) }),
	texts("owner", func(r *store.Record) string { return r.Create.Owner }),
	numbers("epoch", func(r *store.Record) int64 { return r.Create.Epoch }),
	numbers("retries", func(r *store.Record) int64 { return int64(r.Create.Retries) }),
	numbers("sequence", func(r *store.Record) int64 { return max(r.Create.Sequence, r.Sequence) }),
	booleans("cancel_requested", func(r *store.Record) bool { return r.Create.CancelRequested }),
	nullTexts("cancel_reason", func(r *store.Record) string { return r.Create.CancelReason }),
	nullTexts("snapshot", func(r *store.Record) string { return r.Create.Snapshot }),
	nullTexts("idempotency_key", func(r *store.Record) string { return r.Create.IdempotencyKey }),
	nullTexts("correlation_id", func(r *store.Record) string { return r.Create.CorrelationID }),
	nullTexts("tenant_id", func(r *store.Record) string { return r.Create.TenantID }),
	nullTexts("triggered_by", func(r *store.Record) string { return r.Create.Subject }),
	nullTexts("traceparent", func(r *store.Record) string { return r.Create.Traceparent }),
	times("created_at", func(r *store.Record) time.Time { return r.Create.CreatedAt }),
	times("started_at", func(r *store.Record) time.Time { return r.Create.StartedAt }),
	times("completed_at", func(r *store.Record) time.Time { return r.Create.CompletedAt }),
	payloads("output_data", func(r *store.Record) []byte { return r.Create.Output }),
	payloads("entity_row", func(r *store.Record) []byte { return r.Create.EntityRow }),
	payloads("input_data", func(r *store.Record) []byte { return r.Create.Input }),
}, faults(func(r *store.Record) *fault.Error { return r.Create.Err })...)

var touchColumns = []column[*change]{
	ids("id", func(c *change) string { return c.record.RunID }),
	numbers("epoch", func(c *change) int64 { return c.record.Epoch }),
	numbers("sequence", func(c *change) int64 { return c.sequence }),
}

var changeColumns = append(append([]column[*change]{
	nullTexts("status", func(c *change) string { return string(c.record.Run.Status) }),
	times("started_at", func(c *change) time.Time { return c.record.Run.StartedAt }),
	times("completed_at", func(c *change) time.Time { return c.record.Run.CompletedAt }),
	payloads("output_data", func(c *change) []byte { return c.record.Run.Output }),
}, faults(func(c *change) *fault.Error { return c.record.Run.Err })...), touchColumns...)

var retryColumns = append([]column[*change]{
	times("started_at", func(c *change) time.Time { return c.record.Run.StartedAt }),
}, touchColumns...)

// The columns of a job that a start sets, and those that can change after it.
var (
	startColumns = []column[*store.Job]{
		ids("id", func(j *store.Job) string { return j.ID }),
		ids("run_id", func(j *store.Job) string { return j.RunID }),
		nullTexts("idempotency_key", func(j *store.Job) string { return j.IdempotencyKey }),
		texts("step_path", func(j *store.Job) string { return j.StepPath }),
		numbers("generation", func(j *store.Job) int64 { return int64(j.Generation) }),
		texts("service_name", func(j *store.Job) string { return j.Service }),
		texts("operation", func(j *store.Job) string { return j.Operation }),
		texts("execution_type", func(j *store.Job) string { return j.ExecutionType }),
		texts("status", func(j *store.Job) string { return string(j.Status) }),
		numbers("attempts", func(j *store.Job) int64 { return int64(j.Attempts) }),
		numbers("max_attempts", func(j *store.Job) int64 { return int64(j.MaxAttempts) }),
		floats("timeout_seconds", func(j *store.Job) *float64 { return seconds(j.Timeout) }),
		numbers("sequence", func(j *store.Job) int64 { return j.Sequence }),
		sameIDs("tenant_id", func(j *store.Job) string { return j.TenantID }),
		sameIDs("triggered_by", func(j *store.Job) string { return j.TriggeredBy }),
		nullTexts("correlation_id", func(j *store.Job) string { return j.CorrelationID }),
		nullTexts("entity_type", func(j *store.Job) string { return j.EntityType }),
		nullTexts("entity_pk", func(j *store.Job) string { return j.EntityPK }),
		times("started_at", func(j *store.Job) time.Time { return j.StartedAt }),
		payloads("runner_config", func(j *store.Job) []byte { return j.RunnerConfig }),
		payloads("input_data", func(j *store.Job) []byte { return j.Input }),
	}
	bornColumns = []column[*store.Job]{
		texts("identifier", func(j *store.Job) string { return j.Identifier() }),
		times("created_at", func(j *store.Job) time.Time { return j.CreatedAt }),
		booleans("by_sql", func(*store.Job) bool { return false }),
	}
	endColumns = append([]column[*store.Job]{
		times("next_attempt_at", func(j *store.Job) time.Time { return j.NextAttemptAt }),
		floats("duration_seconds", jobSeconds),
		times("completed_at", func(j *store.Job) time.Time { return j.CompletedAt }),
		payloads("resource_usage", func(j *store.Job) []byte { return j.ResourceUsage }),
		payloads("security_context", func(j *store.Job) []byte { return j.SecurityContext }),
		payloads("output_data", func(j *store.Job) []byte { return j.Output }),
	}, faults(func(j *store.Job) *fault.Error { return j.Err })...)

	newJobColumns    = append(append([]column[*store.Job]{}, startColumns...), bornColumns...)
	fullJobColumns   = append(append([]column[*store.Job]{}, newJobColumns...), endColumns...)
	adoptColumns     = append(append([]column[*store.Job]{}, startColumns...), endColumns...)
	changeJobColumns = append([]column[*store.Job]{
		ids("id", func(j *store.Job) string { return j.ID }),
		ids("run_id", func(j *store.Job) string { return j.RunID }),
		texts("status", func(j *store.Job) string { return string(j.Status) }),
		numbers("attempts", func(j *store.Job) int64 { return int64(j.Attempts) }),
		numbers("sequence", func(j *store.Job) int64 { return j.Sequence }),
		times("started_at", func(j *store.Job) time.Time { return j.StartedAt }),
	}, endColumns...)
)

// atStart reports whether a job has nothing yet of what comes with its end.
func atStart(j *store.Job) bool {
	return j.NextAttemptAt.IsZero() && j.CompletedAt.IsZero() && j.Err == nil &&
		len(j.ResourceUsage) == 0 && len(j.SecurityContext) == 0 && len(j.Output) == 0
}

var stepColumns = append([]column[*store.Step]{
	ids("run_id", func(s *store.Step) string { return s.RunID }),
	texts("step_path", func(s *store.Step) string { return s.StepPath }),
	numbers("generation", func(s *store.Step) int64 { return int64(s.Generation) }),
	texts("kind", func(s *store.Step) string { return s.Kind }),
	texts("status", func(s *store.Step) string { return string(s.Status) }),
	nullTexts("name", func(s *store.Step) string { return s.Name }),
	times("until", func(s *store.Step) time.Time { return s.Until }),
	numbers("sequence", func(s *store.Step) int64 { return s.Sequence }),
	times("started_at", func(s *store.Step) time.Time { return s.StartedAt }),
	times("completed_at", func(s *store.Step) time.Time { return s.CompletedAt }),
	payloads("data", func(s *store.Step) []byte { return s.Data }),
}, faults(func(s *store.Step) *fault.Error { return s.Err })...)

// taken is a signal that a step takes.
type taken struct {
	id          int64
	runID, path string
}

var takenColumns = []column[taken]{
	numbers("id", func(t taken) int64 { return t.id }),
	ids("run_id", func(t taken) string { return t.runID }),
	texts("path", func(t taken) string { return t.path }),
}

// integers are the columns whose parameters are bigint and that are narrower.
var integers = map[string]bool{
	"retries": true, "generation": true, "attempts": true, "max_attempts": true, "error_attempts": true,
}

// plainValue is a column of d as a table other than tb_job_run keeps it.
func plainValue(name string) string {
	switch {
	case integers[name]:
		return "d." + name + "::integer"
	case strings.HasSuffix(name, "_data") || name == "entity_row" || name == "data":
		return "d." + name + "::jsonb"
	}
	return "d." + name
}

// jobValue is a column of d as tb_job_run keeps it. What a column of another type cannot hold is null.
func (s *statements) jobValue(name, array string) string {
	kind := s.types[name]
	value := "d." + name
	if name == "created_at" {
		value = "coalesce(d.created_at, now())"
	}
	switch {
	case kind == array || kind == "":
		return value
	case kind == "uuid" && array == "text":
		return "CASE WHEN " + value + " ~ '^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$' THEN " + value + "::uuid END"
	case isInteger(kind) && array == "text":
		return "CASE WHEN " + value + " ~ '^-?[0-9]{1,18}$' THEN " + value + "::" + kind + " END"
	case isInteger(kind) && array == "double precision":
		return "ceil(" + value + ")::" + kind
	}
	return value + "::" + kind
}

func isInteger(kind string) bool { return kind == "integer" || kind == "bigint" || kind == "smallint" }

func newStatements(types map[string]string, sumColumns []string) *statements {
	s := &statements{types: types, sumColumns: sumColumns}
	s.jobColumns = s.readJob("j.resource_usage", "j.security_context", "j.runner_config", s.readJSON("output_data"), s.readJSON("input_data"))
	s.queuedColumns = s.readJob("NULL::jsonb", "NULL::jsonb", "NULL::jsonb", "NULL::jsonb",
		fmt.Sprintf("CASE WHEN octet_length(j.input_data::text) <= %d THEN %s END", maxInput, s.readJSON("input_data")),
		"coalesce(octet_length(j.input_data::text), 0)::bigint")

	s.createRuns = insert("jobs.tb_workflow_run", runColumns, func(c column[*store.Record]) string {
		if c.name == "created_at" {
			return "coalesce(d.created_at, now())"
		}
		return plainValue(c.name)
	})
	const touch = `WITH changed AS (UPDATE jobs.tb_workflow_run r SET sequence = greatest(r.sequence, d.sequence), updated_at = now()`
	fence := func(from string, n int) string {
		return fmt.Sprintf(` FROM %s WHERE r.id = d.id AND r.epoch = d.epoch RETURNING 1)
			SELECT jobs.fn_expect(count(*), $%d, 'fence') FROM changed`, from, n+1)
	}
	s.touchRuns = touch + fence(source(touchColumns), len(touchColumns))
	set := touch
	for _, c := range changeColumns[:len(changeColumns)-len(touchColumns)] {
		set += fmt.Sprintf(", %s = coalesce(%s, r.%[1]s)", c.name, plainValue(c.name))
	}
	s.changeRuns = set + fence(source(changeColumns), len(changeColumns))
	s.retryRuns = touch + `, status = 'running', retries = r.retries + 1, output_data = NULL,
		error_code = NULL, error_message = NULL, error_retryable = NULL, error_attempts = NULL,
		started_at = coalesce(d.started_at, r.started_at), completed_at = NULL, cancel_requested = false, cancel_reason = NULL` +
		fence(source(retryColumns), len(retryColumns))

	jobValue := func(c column[*store.Job]) string { return s.jobValue(c.name, c.array) }
	s.insertNewJobs = insert("jobs.tb_job_run", newJobColumns, jobValue)
	s.insertJobs = insert("jobs.tb_job_run", fullJobColumns, jobValue)
	// What a client gave and the engine leaves out stays; the row is no longer the queue's.
	set = "WITH adopted AS (UPDATE jobs.tb_job_run j SET updated_at = now()"
	for _, c := range adoptColumns[1:] {
		switch c.name {
		case "tenant_id", "triggered_by", "correlation_id", "entity_type", "entity_pk", "idempotency_key":
			set += fmt.Sprintf(", %s = coalesce(%s, j.%[1]s)", c.name, jobValue(c))
		default:
			set += fmt.Sprintf(", %s = %s", c.name, jobValue(c))
		}
	}
	s.adoptJobs = set + fmt.Sprintf(` FROM %s WHERE j.id = d.id AND j.status = 'pending' AND %s RETURNING j.id),
		gone AS (DELETE FROM jobs.tb_job_queue q USING adopted a WHERE q.job_id = a.id)
		SELECT jobs.fn_expect(count(*), $%d, 'adopt') FROM adopted`, source(adoptColumns), loose, len(adoptColumns)+1)
	set = "WITH changed AS (UPDATE jobs.tb_job_run j SET updated_at = now()"
	for _, c := range changeJobColumns[2:] {
		set += fmt.Sprintf(", %s = %s", c.name, jobValue(c))
	}
	// IS TRUE: by no other index than that of ids, whatever statistics say.
	update := func(condition string) string {
		return set + fmt.Sprintf(` FROM %s WHERE j.id = d.id AND (j.run_id = d.run_id%s) IS TRUE RETURNING 1)
		SELECT jobs.fn_expect(count(*), $%d, 'job') FROM changed`, source(changeJobColumns), condition, len(changeJobColumns)+1)
	}
	s.updateJobs = update("")
	s.endJobs = update(" AND j.status IN ('pending', 'running')")
	// Either the triggers count, or this does.
	s.addSums = fmt.Sprintf(`INSERT INTO jobs.tb_job_stat (%s) SELECT s.%s FROM unnest($1::text::jobs.tb_job_stat[]) s
		WHERE NOT jobs.fn_left_to_triggers('all')`,
		strings.Join(s.sumColumns, ", "), strings.Join(s.sumColumns, ", s."))

	set = ""
	for _, c := range stepColumns[3:] {
		set += fmt.Sprintf(", %s = excluded.%[1]s", c.name)
	}
	s.upsertSteps = insert("jobs.tb_workflow_step", stepColumns, func(c column[*store.Step]) string { return plainValue(c.name) }) +
		" ON CONFLICT (run_id, step_path, generation) DO UPDATE SET " + set[2:]
	s.takeSignals = fmt.Sprintf(`WITH changed AS (UPDATE jobs.tb_workflow_signal s SET taken_by = d.path FROM %s
		WHERE s.id = d.id AND s.run_id = d.run_id AND (s.taken_by IS NULL OR s.taken_by = d.path) RETURNING 1)
		SELECT jobs.fn_expect(count(*), $%d, 'signal') FROM changed`, source(takenColumns), len(takenColumns)+1)
	return s
}

// step is one statement for several: what a statement costs besides its rows is a good part of what a step costs. Their parameters
// follow each other.
func (s *statements) step(p stepParts) string {
	if text, ok := s.steps.Load(p); ok {
		return text.(string)
	}
	var parts, checks []string
	n := 0
	counted := func(name, text string, columns int) {
		change, check, _ := strings.Cut(strings.TrimPrefix(text, "WITH changed AS"), "SELECT jobs.fn_expect(count(*),")
		what, _, _ := strings.Cut(check, " FROM ")
		parts = append(parts, name+" AS"+shift(change, n))
		checks = append(checks, "jobs.fn_expect((SELECT count(*) FROM "+name+"),"+shift(what, n))
		n += columns + 1
	}
	added := func(name, text string, columns int) {
		parts = append(parts, name+" AS ("+shift(text, n)+")")
		n += columns
	}
	if p.touch {
		counted("touched", s.touchRuns, len(touchColumns))
	}
	if p.change {
		counted("changed", s.changeRuns, len(changeColumns))
	}
	if p.end && p.kept {
		counted("ended", s.endJobs, len(changeJobColumns))
	} else if p.end {
		counted("ended", s.updateJobs, len(changeJobColumns))
	}
	if p.sum {
		added("summed", s.addSums, 1)
	}
	if p.begin {
		added("begun", s.insertNewJobs, len(newJobColumns))
	}
	if p.create {
		added("created", s.createRuns, len(runColumns))
		checks = append(checks, shift(notBuried, n))
	}
	text := "WITH " + strings.Join(parts, ", ") + " SELECT " + strings.Join(append(checks, "1"), ", ")
	if p.single {
		text = unnested.ReplaceAllString(text, "$1 AS")
	}
	s.steps.Store(p, text)
	return text
}

var (
	parameter = regexp.MustCompile(`\$[0-9]+`)
	// unnested is a column of a [source].
	unnested = regexp.MustCompile(`unnest\((\$[0-9]+::[a-z ]+)\[\]\) AS`)
)

// shift counts the parameters of a text from n on.
func shift(text string, n int) string {
	return parameter.ReplaceAllStringFunc(text, func(p string) string {
		k, _ := strconv.Atoi(p[1:])
		return fmt.Sprintf("$%d", k+n)
	})
}

// insert is the statement that inserts rows, in the order of the parameters.
func insert[T any](table string, columns []column[T], value func(column[T]) string) string {
	var names, values []string
	for _, c := range columns {
		names = append(names, c.name)
		values = append(values, value(c))
	}
	return "INSERT INTO " + table + " (" + strings.Join(names, ", ") + ") SELECT " + strings.Join(values, ", ") + " FROM " + source(columns)
}

// readJSON reads a column as jsonb; one of an old table's json that jsonb does not hold is null.
func (s *statements) readJSON(name string) string {
	if s.types[name] == "json" {
		return "jobs.fn_jsonb(j." + name + ")"
	}
	return "j." + name
}

// readJob selects the columns of a job j and its run r. Where the job's own column cannot hold the text, the run has it.
// The payloads are read as it is given.
func (s *statements) readJob(payloads ...string) string {
	text := func(name, run string) string {
		if run != "" {
			return fmt.Sprintf("coalesce(j.%s::text, %s, '')", name, run)
		}
		return fmt.Sprintf("coalesce(j.%s::text, '')", name)
	}
	lossy := func(name, run string) string {
		if kind := s.types[name]; kind == "text" || kind == "" {
			return text(name, "")
		}
		return text(name, run)
	}
	return strings.Join(append([]string{
		"j.id::text", text("idempotency_key", ""), text("run_id", ""), text("step_path", ""), "j.generation",
		"j.service_name::text", "j.operation::text", "j.execution_type::text", "j.status::text",
		"coalesce(j.attempts, 0)", "coalesce(j.max_attempts, 0)", "j.next_attempt_at", "coalesce(j.timeout_seconds, 0)::double precision", "j.sequence",
		text("error_code", ""), text("error_message", ""), "coalesce(j.error_retryable, false)", "coalesce(j.error_attempts, 0)",
		text("tenant_id", "r.tenant_id"), text("triggered_by", "r.triggered_by"), lossy("correlation_id", "r.correlation_id"),
		lossy("entity_type", "r.entity"), lossy("entity_pk", "r.entity_id"),
		"j.created_at::timestamptz", "j.started_at::timestamptz", "j.completed_at::timestamptz",
	}, payloads...), ", ")
}
