// Package ddl holds pkg/spec/ddl to a real PostgreSQL: the statements can be run again and
// again, checks say what spec says, and functions begin runs in the caller's transaction.
package ddl

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/specql/mesh/migrations"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/pkg/spec/ddl"
	"github.com/specql/mesh/test/pgtest"
)

func TestMain(m *testing.M) {
	status := m.Run()
	if err := pgtest.Shutdown(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		status = max(status, 1)
	}
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		status = max(status, 1)
	}
	os.Exit(status)
}

func parse(t *testing.T, texts ...string) []*spec.Entity {
	t.Helper()
	var out []*spec.Entity
	for i, text := range texts {
		e, problems := spec.ParseEntity(spec.File{Name: fmt.Sprintf("e%d.yaml", i), Content: []byte(text)}, spec.Options{})
		require.NoError(t, problems.Err())
		out = append(out, e)
	}
	return out
}

// psql runs a script; it must work.
func psql(t *testing.T, url, script string) string {
	t.Helper()
	return pgtest.Shared(t).Psql(t, url, script)
}

// refused runs a script, which must fail, and returns what psql said.
func refused(t *testing.T, url, script string) string {
	t.Helper()
	_, err := pgtest.Shared(t).Run(url, script)
	require.Error(t, err, script)
	return err.Error()
}

// statements are those of tables and functions; there are no problems.
func statements(t *testing.T, entities []*spec.Entity) []ddl.Statement {
	t.Helper()
	tables, problems := ddl.Tables(entities, ddl.Options{})
	require.Empty(t, problems)
	functions, problems := ddl.Functions(entities)
	require.Empty(t, problems)
	return append(tables, functions...)
}

// apply runs the statements twice: the first time those that are needed, as a program does,
// the second time all of them, as psql does. Then nothing is left to do.
func apply(t *testing.T, url string, entities []*spec.Entity) {
	t.Helper()
	all := statements(t, entities)
	var b strings.Builder
	for _, s := range all {
		fmt.Fprintf(&b, "SELECT (%s) IS TRUE AS done \\gset\n\\if :done\n\\else\n%s;\n\\endif\n", s.Done, s.SQL)
	}
	psql(t, url, b.String())
	require.Zero(t, undone(t, url, all), "after the first time")
	shape := shapeOf(t, url)
	psql(t, url, ddl.Text(all))
	require.Zero(t, undone(t, url, all), "after the second time")
	require.Equal(t, shape, shapeOf(t, url), "the second time changes nothing")
}

// undone counts the statements that are not done.
func undone(t *testing.T, url string, all []ddl.Statement) int {
	t.Helper()
	var b strings.Builder
	for i, s := range all {
		fmt.Fprintf(&b, "SELECT %d WHERE (%s) IS NOT TRUE;\n", i, s.Done)
	}
	out := strings.TrimSpace(psql(t, url, b.String()))
	if out == "" {
		return 0
	}
	lines := strings.Split(out, "\n")
	if len(all) > 1 {
		t.Logf("not done: %v", lines)
	}
	return len(lines)
}

// shapeOf is all that the catalog says of what was made.
func shapeOf(t *testing.T, url string) string {
	t.Helper()
	return psql(t, url, `
SELECT c.oid, n.nspname, c.relname, c.relkind, obj_description(c.oid, 'pg_class') FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname !~ '^(pg_|information_schema)' ORDER BY 1;
SELECT a.attrelid, a.attname, a.atttypid::regtype, a.attnotnull, a.attidentity, pg_get_expr(d.adbin, d.adrelid) FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname !~ '^(pg_|information_schema)' AND a.attnum > 0 ORDER BY 1, 2;
SELECT c.oid, c.conname, pg_get_constraintdef(c.oid), obj_description(c.oid, 'pg_constraint') FROM pg_constraint c JOIN pg_namespace n ON n.oid = c.connamespace WHERE n.nspname !~ '^(pg_|information_schema)' ORDER BY 1;
SELECT p.oid, pg_get_functiondef(p.oid), obj_description(p.oid, 'pg_proc') FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname !~ '^(pg_|information_schema)' ORDER BY 1;
`)
}

func TestTheExamplesApply(t *testing.T) {
	t.Parallel()
	names, err := filepath.Glob("../../examples/multi-execution/entities/*.yaml")
	require.NoError(t, err)
	require.NotEmpty(t, names)
	var texts []string
	for _, name := range names {
		content, err := os.ReadFile(name)
		require.NoError(t, err)
		texts = append(texts, string(content))
	}
	url := pgtest.Database(t)
	entities := parse(t, texts...)
	apply(t, url, entities)
	require.Equal(t, fmt.Sprint(len(entities)), psql(t, url, "SELECT count(*) FROM pg_tables WHERE schemaname = 'examples'"))
	require.Equal(t, "paid|", psql(t, url, "INSERT INTO examples.payment (id) VALUES (DEFAULT); UPDATE examples.payment SET status = 'paid' RETURNING status, NULL"))
	require.Contains(t, refused(t, url, "UPDATE examples.payment SET status = 'lost'"), "ck_payment__status__enum")
}

// rule is a field with values to try on it. What spec says of each is what the table has to say.
type rule struct {
	field  string
	values []any
}

var rules = map[string]rule{
	"string":            {field: "string", values: []any{"", "a", "ä'\"\\", "line\nline", strings.Repeat("x", 10000)}},
	"enum of strings":   {field: `{type: string, validation: {enum: [new, "it's", "back\\slash", "$specql$", "", "Ä"]}}`, values: []any{"new", "New", "it's", `back\slash`, "$specql$", "", "Ä", "ä", "x"}},
	"integer":           {field: "integer", values: []any{0, -5, 9007199254740993, 1.0, 1.5}},
	"integer in bounds": {field: "{type: integer, validation: {min: -3, max: 10}}", values: []any{-4, -3, 0, 10, 11, 9007199254740993}},
	"integer, broken bounds": {
		field: "{type: integer, validation: {min: 0.5, max: 2.5}}", values: []any{0, 1, 2, 3},
	},
	"large bounds":    {field: "{type: integer, validation: {max: 9007199254740993}}", values: []any{9007199254740991, 9007199254740992, 9007199254740993, 9007199254740994, 9007199254740999}},
	"enum of numbers": {field: "{type: integer, validation: {enum: [1, 2.0, 9007199254740993]}}", values: []any{1, 2, 3, 9007199254740992, 9007199254740993}},
	"number":          {field: "{type: number, validation: {min: 0.1, max: 1e20}}", values: []any{0.1, 0.09999999999999999, 0, 1e20, 1.0000000000000002e20, -1e300, 1e308}},
	"enum of floats":  {field: "{type: number, validation: {enum: [0.1, 1e-7, 2]}}", values: []any{0.1, 0.1000000001, 1e-7, 2, 2.5}},
	"decimal": {
		field:  "{type: decimal, validation: {min: 0.3, max: 1000.5}}",
		values: []any{"0.3", "0.30000000000000000000001", "0.29999999999999999999999", "1000.5", "1000.50000000000000000000001", 1000.5, 12, "+5", ".5", "5.", "-5", strings.Repeat("9", 400)},
	},
	"enum of decimals":   {field: `{type: decimal, validation: {enum: ["1.50", 2, 0.1]}}`, values: []any{"1.50", "1.5", 1.5, "2", "2.00", 2, "0.1", "0.10", "0.1000001", 3}},
	"boolean":            {field: "{type: boolean, validation: {enum: [true]}}", values: []any{true, false}},
	"object":             {field: "object", values: []any{map[string]any{}, map[string]any{"a": []any{1.0, nil}}, []any{}, "a", 1.0, true}},
	"array":              {field: "array", values: []any{[]any{}, []any{1.0, "a", nil}, map[string]any{}, "[]", 1.0}},
	"json":               {field: "json", values: []any{[]any{}, map[string]any{}, "a", 1.0, false}},
	"enum of json":       {field: `{type: json, validation: {enum: [a, 1, true, "it's"]}}`, values: []any{"a", "b", 1.0, 2.0, true, false, "it's", []any{}, "1", "true"}},
	"uuid":               {field: "uuid", values: []any{"6a8f9d0e-0000-4000-8000-00000000abcd", "6A8F9D0E-0000-4000-8000-00000000ABCD", "nope", ""}},
	"date":               {field: "date", values: []any{"2030-01-31", "0001-01-01", "9999-12-31", "2030-02-30", "infinity", "-infinity", "10000-01-01", "2030-01-31 BC"}},
	"timestamp":          {field: "timestamp", values: []any{"2030-01-31T12:00:00Z", "2030-01-31T12:00:00.123456+02:00", "infinity", "-infinity", "12030-01-31T12:00:00Z", "nonsense"}},
	"email":              {field: `{type: string, validation: {pattern: "^[^@\\s]+@[^@\\s]+$"}}`, values: []any{"a@b", "a @b", "a@b\n", "\na@b", "a@", "ä@ö", "a\u00a0b@c"}},
	"bucket":             {field: `{type: string, validation: {pattern: "^[a-z0-9][a-z0-9.-]{2,62}$"}}`, values: []any{"abc", "ab", "a.b-c", "Abc", "ab_c", strings.Repeat("a", 63), strings.Repeat("a", 64)}},
	"somewhere":          {field: `{type: string, validation: {pattern: 'b+'}}`, values: []any{"abc", "ac", "", "\nb"}},
	"digits":             {field: `{type: text, validation: {pattern: '^\d+$'}}`, values: []any{"123", "١٢٣", "", "12a", "12\n"}},
	"words":              {field: `{type: text, validation: {pattern: '^\w+$'}}`, values: []any{"ab_1", "äb", "a b"}},
	"not digits":         {field: `{type: text, validation: {pattern: '^[^\d\s]\D$'}}`, values: []any{"ab", "1b", "a1", "a١", "a\n", " a"}},
	"dot":                {field: `{type: text, validation: {pattern: '^a.b$'}}`, values: []any{"axb", "a\nb", "a\rb", "ab", "aäb"}},
	"dot with newline":   {field: `{type: text, validation: {pattern: '(?s)^a.b$'}}`, values: []any{"axb", "a\nb", "ab"}},
	"lines":              {field: `{type: text, validation: {pattern: '(?m)^b$'}}`, values: []any{"b", "a\nb\nc", "a\nb", "b\nc", "ab", "a\r\nb"}},
	"case":               {field: `{type: text, validation: {pattern: '(?i)^straße[k-m]$'}}`, values: []any{"STRAßEK", "strasse", "Straßel", "straſſel", "ſtraßeK", "STRAẞEL", "straßex"}},
	"word boundaries":    {field: `{type: text, validation: {pattern: '\bcat\B'}}`, values: []any{"cats", "cat", "a cats", "xcats", "äcats", "catä"}},
	"alternatives":       {field: `{type: text, validation: {pattern: '^(?:a|bc|)(d|e)??$'}}`, values: []any{"", "a", "ad", "bc", "bce", "b", "de"}},
	"special characters": {field: `{type: text, validation: {pattern: '^[\]\[\\^.*+?(){}|$''"-]+\$\.\*\{1\}$'}}`, values: []any{`]$.*{1}`, `\^$.*{1}`, `'"-$.*{1}`, `a$.*{1}`, `]$.*1`}},
	"quoted":             {field: `{type: text, validation: {pattern: '^\Q$specql$\E[\x41-\x{43}\x{10000}-\x{10FFFF}]$'}}`, values: []any{"$specql$A", "$specql$D", "$specql$😀", "$specql$ä"}},
	"unicode class":      {field: `{type: text, validation: {pattern: '^\p{Greek}+$'}}`, values: []any{"αβγ", "abc", ""}},
	"not a class":        {field: `{type: text, validation: {pattern: '^[^a-z\n]$'}}`, values: []any{"a", "A", "\n", "ä", "😀"}},
	"looks like options": {field: `{type: text, validation: {pattern: '^(?:\*\*\*=a|\*\*\*:b)$'}}`, values: []any{"***=a", "a", "***:b", "b"}},
	"looks like a class": {field: `{type: text, validation: {pattern: '^[[:alpha:]:\[.=]+$'}}`, values: []any{"ab", "[:", ".=", "ä", "1"}},
	"required":           {field: "string!", values: []any{"a", nil}},
	"optional":           {field: "{type: string, validation: {enum: [a]}}", values: []any{"a", nil}},
}

// TestChecksSayWhatSpecSays puts the same values to spec and to a table.
func TestChecksSayWhatSpecSays(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	names := make([]string, 0, len(rules))
	for name := range rules {
		names = append(names, name)
	}
	slices.Sort(names)
	var entities []*spec.Entity
	for i, name := range names {
		entities = append(entities, parse(t, fmt.Sprintf("entity: e%d\nfields:\n  v: %s\n", i, rules[name].field))...)
	}
	apply(t, url, entities)
	for i, name := range names {
		t.Run(name, func(t *testing.T) {
			e := entities[i]
			f := e.Field("v")
			if v := f.Validation; v != nil && v.Pattern != "" {
				require.Equal(t, "1", psql(t, url, fmt.Sprintf("SELECT count(*) FROM pg_constraint WHERE conrelid = 'app.e%d'::regclass AND conname LIKE '%%pattern'", i)), "the pattern is carried over")
			}
			taken := takes(t, url, e, f, rules[name].values)
			for i, v := range rules[name].values {
				err := e.CheckRow(map[string]any{"v": v})
				require.Equal(t, err == nil, taken[i], "%#v: spec says %v", v, err)
			}
		})
	}
}

// takes says which of the values that a program writes a table takes.
func takes(t *testing.T, url string, e *spec.Entity, f *spec.Field, values []any) []bool {
	t.Helper()
	column := ddl.ColumnType(f)
	value := "(j->>'v')::" + column
	if column == "jsonb" {
		value = "nullif(j->'v', 'null')"
	}
	var b strings.Builder
	fmt.Fprintf(&b, `
CREATE FUNCTION pg_temp.try(j jsonb) RETURNS text LANGUAGE plpgsql AS $try$
BEGIN
  INSERT INTO %s (v) VALUES (%s);
  RETURN 'taken';
EXCEPTION WHEN OTHERS THEN
  RETURN SQLSTATE;
END $try$;`, ddl.TableName(e), value)
	for _, v := range values {
		raw, err := json.Marshal(map[string]any{"v": v})
		require.NoError(t, err)
		require.NotContains(t, string(raw), "$json$")
		fmt.Fprintf(&b, "SELECT pg_temp.try($json$%s$json$);\n", raw)
	}
	said := strings.Split(psql(t, url, b.String()), "\n")
	require.Len(t, said, len(values))
	taken := make([]bool, len(values))
	for i, s := range said {
		if taken[i] = s == "taken"; !taken[i] {
			// A check, a missing value, a text that is none of the type, a number or a time out of range.
			require.Contains(t, []string{"23514", "23502", "22P02", "22007", "22008", "22003"}, s, "%#v", values[i])
		}
	}
	return taken
}

// TestValuesThatJSONDoesNotHave: what SQL can write and no program reads is refused.
func TestValuesThatJSONDoesNotHave(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	apply(t, url, parse(t, "entity: e\nfields: {n: number, d: decimal}\n"))
	for _, value := range []string{"'NaN'", "'Infinity'", "'-Infinity'"} {
		require.Contains(t, refused(t, url, "INSERT INTO app.e (n) VALUES ("+value+")"), "ck_e__n__type")
		require.Contains(t, refused(t, url, "INSERT INTO app.e (d) VALUES ("+value+")"), "ck_e__d__type")
	}
}

func TestPatternsThatCannotBeCarriedOver(t *testing.T) {
	t.Parallel()
	for pattern, why := range map[string]string{
		`a{300}`:             "repeats at most 255",
		`(?:a{100}){11}`:     "", // RE2 itself refuses this one
		`(a{40}b{40}){9}`:    "",
		`(?:[a-z]{200}){5}x`: "too large",
		`(^a|b)+`:            "condition on a place",
		`\p{L}`:              "too many ranges",
		`\x00`:               "NUL",
		`[^\x00-\x{10FFFF}]`: "nothing",
	} {
		e, problems := spec.ParseEntity(spec.File{Name: "e.yaml", Content: []byte("entity: e\nfields: {v: {type: text, validation: {pattern: '" + pattern + "'}}}\n")}, spec.Options{})
		if problems.HasErrors() || why == "" {
			continue
		}
		url := pgtest.Database(t)
		text := ddl.Text(statements(t, []*spec.Entity{e}))
		require.NotContains(t, text, "__pattern", pattern)
		require.Regexp(t, `-- The pattern of v is checked by the mesh alone: .*`+regexp.QuoteMeta(why), text, pattern)
		apply(t, url, []*spec.Entity{e})
		psql(t, url, "INSERT INTO app.e (v) VALUES ('x')")
	}
}

const hostileEntity = `
entity: select
schema: User
description: "it's a 'table' -- $specql$; DROP TABLE x; \\ \n second line"
fields:
  order: {type: string, default: "'; DROP TABLE x; -- $specql$ \\' $specql1$ $$", validation: {enum: ["'; DROP TABLE x; -- $specql$ \\' $specql1$ $$", "% %s %I $1"], pattern: "^['%](?:;| )"}}
  table: {type: object, default: {"a'b": "\\u0041 $specql$", "c": [1, "'"]}}
  UPPER: {type: integer, default: -5, validation: {min: -5}}
  end: {type: timestamp, default: "2030-01-31T12:00:00Z"}
  long_name_of_a_field_that_is_as_long_as_a_name_can_be_xxxxxxxxx: {type: number, default: 1e-7, validation: {min: 0, max: 1, enum: [1e-7]}}
  long_name_of_a_field_that_is_as_long_as_a_name_can_be_yyyyyyyyy: {type: decimal, default: "12.30"}
indexes:
  - {fields: [order], unique: true, where: "\"UPPER\" > 3 AND \"order\" <> 'it''s'"}
  - {fields: [long_name_of_a_field_that_is_as_long_as_a_name_can_be_xxxxxxxxx, long_name_of_a_field_that_is_as_long_as_a_name_can_be_yyyyyyyyy]}
  - {fields: [table]}
  - {fields: [created_at]}
actions:
  drop: {steps: []}
  über.mittlung-2: {steps: []}
  an_action_with_a_name_of_more_than_sixty_three_bytes_as_a_name_may_have: {steps: []}
  an_action_with_a_name_of_more_than_sixty_three_bytes_as_a_name_may_hold: {steps: []}
`

func TestHostileNamesAndValues(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	e := parse(t, hostileEntity)[0]
	apply(t, url, []*spec.Entity{e})
	row, err := e.NewRow(map[string]any{}, func() string { return "6a8f9d0e-0000-4000-8000-00000000abcd" })
	require.NoError(t, err)
	psql(t, url, `INSERT INTO "User"."select" (id) VALUES ('6a8f9d0e-0000-4000-8000-00000000abcd')`)
	got := map[string]any{}
	require.NoError(t, json.Unmarshal([]byte(psql(t, url, `SELECT to_jsonb(s) FROM "User"."select" s`)), &got))
	require.NotNil(t, got["created_at"])
	got["long_name_of_a_field_that_is_as_long_as_a_name_can_be_yyyyyyyyy"] = "12.30"
	for _, f := range e.Fields {
		if f.Name != "created_at" && f.Name != "end" {
			want, err := json.Marshal(row[f.Name])
			require.NoError(t, err)
			have, err := json.Marshal(got[f.Name])
			require.NoError(t, err)
			require.JSONEq(t, string(want), string(have), f.Name)
		}
	}
	require.Equal(t, "12.30", psql(t, url, `SELECT long_name_of_a_field_that_is_as_long_as_a_name_can_be_yyyyyyyyy FROM "User"."select"`))
	require.Equal(t, e.Description, psql(t, url, `SELECT obj_description('"User"."select"'::regclass)`))
	require.Equal(t, "4", psql(t, url, `SELECT count(*) FROM pg_proc WHERE pronamespace = '"User"'::regnamespace`))
	require.Equal(t, "0", psql(t, url, `SELECT count(*) FROM (SELECT conname AS n FROM pg_constraint UNION ALL SELECT relname FROM pg_class UNION ALL SELECT proname FROM pg_proc) s WHERE octet_length(n::text) > 63`))
}

func TestATableFollowsItsFile(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	apply(t, url, parse(t, `
entity: order
fields: {status: {type: string, required: true, default: new, validation: {enum: [new, paid]}}, note: {type: string, default: a, validation: {pattern: '^a'}}}
`))
	psql(t, url, "INSERT INTO app.order (status) VALUES ('new'), ('paid')")

	// A value more, a check less, another default, new fields: one that rows cannot be without, one with a default.
	apply(t, url, parse(t, `
entity: order
fields:
  status: {type: string, default: paid, validation: {enum: [new, paid, sent]}}
  note: string
  count: {type: integer, required: true, default: 7}
`))
	require.Equal(t, "7|paid|", psql(t, url, "INSERT INTO app.order (note) VALUES ('b') RETURNING count, status, null"))
	psql(t, url, "UPDATE app.order SET status = 'sent'; UPDATE app.order SET status = NULL")
	require.Contains(t, refused(t, url, "INSERT INTO app.order (count) VALUES (NULL)"), "not-null")
	require.Empty(t, psql(t, url, "INSERT INTO app.order (status) VALUES ('new') RETURNING note"))

	// Rows that break a rule stay, with a warning, until they are mended.
	later := parse(t, `
entity: order
fields:
  status: {type: string, required: true, validation: {enum: [paid, sent]}}
  note: string
  count: {type: integer, required: true, default: 7}
  who: {type: string, required: true}
`)
	all := statements(t, later)
	psql(t, url, ddl.Text(all))
	require.Equal(t, 1, undone(t, url, all), "the required columns and the enum wait for the rows")
	psql(t, url, "UPDATE app.order SET note = 'still'; INSERT INTO app.order (status, who) VALUES ('lost', 'me')")
	psql(t, url, "UPDATE app.order SET status = 'paid', who = 'me'")
	apply(t, url, later)
	require.Contains(t, refused(t, url, "INSERT INTO app.order (status, who) VALUES ('lost', 'me')"), "ck_order__status__enum")
	require.Contains(t, refused(t, url, "INSERT INTO app.order (status) VALUES ('paid')"), "not-null")

	// The type of a column stays.
	tables, problems := ddl.Tables(parse(t, "entity: order\nfields: {count: boolean}\n"), ddl.Options{})
	require.Empty(t, problems)
	require.Regexp(t, `column count of "app"."order" is bigint and has to be boolean: .*give the field another name`, refused(t, url, ddl.Text(tables)))
}

// TestATableOfOnesOwn: a table that was there before keeps its own rules and types.
func TestATableOfOnesOwn(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	psql(t, url, `
CREATE SCHEMA app;
CREATE TYPE state AS ENUM ('new', 'paid');
CREATE TABLE app.payment (id uuid PRIMARY KEY, state state NOT NULL DEFAULT 'new', amount integer NOT NULL DEFAULT 3 CHECK (amount > 2), name varchar(20));
INSERT INTO app.payment VALUES (gen_random_uuid());`)
	apply(t, url, parse(t, "entity: payment\nfields: {state: {type: string, validation: {enum: [new, paid]}}, amount: {type: integer, default: 5, validation: {max: 9}}, name: string, more: string}\n"))
	require.Equal(t, "new|3||", psql(t, url, "INSERT INTO app.payment (id) VALUES (gen_random_uuid()) RETURNING state, amount, name, more"))
	require.Contains(t, refused(t, url, "UPDATE app.payment SET amount = 2"), "payment_amount_check")
	require.Contains(t, refused(t, url, "UPDATE app.payment SET amount = 10"), "ck_payment__amount__max")
	require.Contains(t, refused(t, url, "UPDATE app.payment SET amount = NULL"), "not-null")
	require.Contains(t, refused(t, pgtest.Database(t), "CREATE SCHEMA app; CREATE TABLE app.e (a text);"+ddl.Text(statements(t, parse(t, "entity: e\nfields: {a: string}\n")))), "no column id")
}

func TestForeignKeys(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	entities := parse(
		t,
		"entity: order\nfields: {payment: {type: uuid, references: payment.id}, ref: string!, parent: {type: uuid, references: order}}\nindexes: [{fields: [ref], unique: true}]\n",
		"entity: payment\nschema: money\nfields: {order: {type: uuid, references: order.id}, ref: {type: string, references: order.ref}}\n",
	)
	apply(t, url, entities)
	const o, p = "'00000000-0000-4000-8000-000000000001'", "'00000000-0000-4000-8000-000000000002'"
	psql(t, url, "BEGIN; SET CONSTRAINTS ALL DEFERRED; INSERT INTO app.order (id, ref, payment, parent) VALUES ("+o+", 'r', "+p+", "+o+"); INSERT INTO money.payment VALUES ("+p+", "+o+", 'r'); COMMIT;")
	require.Contains(t, refused(t, url, "UPDATE app.order SET payment = "+o), "fk_order__payment")
	require.Contains(t, refused(t, url, "UPDATE money.payment SET ref = 'other'"), "fk_payment__ref")

	// A foreign key that is gone from the files is gone from the table.
	apply(t, url, parse(t, "entity: order\nfields: {payment: uuid, ref: string!, parent: uuid}\nindexes: [{fields: [ref], unique: true}]\n"))
	psql(t, url, "UPDATE app.order SET payment = "+o)

	// With it again, the rows that break it stay.
	all := statements(t, entities)
	psql(t, url, ddl.Text(all))
	require.Equal(t, 1, undone(t, url, all))
}

// mesh makes the tables of the mesh.
func mesh(t *testing.T, url string) {
	t.Helper()
	psql(t, url, migrations.SQL)
}

func TestFunctionsBeginRunsInTheCallersTransaction(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	mesh(t, url)
	apply(t, url, parse(
		t,
		"entity: payment\nactions: {process_payment: {input: {card_token: string}, steps: []}, cancel: {steps: []}}\n",
		"entity: ticket\nfields: {id: integer}\nactions: {cancel: {steps: []}, close: {steps: []}}\n",
		"entity: order\nschema: shop\nactions: {cancel: {steps: []}}\n",
	))
	const id = "6a8f9d0e-0000-4000-8000-00000000abcd"
	const count = "SELECT count(*) FROM jobs.tb_workflow_run"
	psql(t, url, "BEGIN; SELECT app.process_payment('"+id+"'::uuid, '{\"card_token\": \"x\"}'); ROLLBACK")
	require.Equal(t, "0", psql(t, url, count))

	run := psql(t, url, "SELECT app.process_payment('"+id+"'::uuid, '{\"card_token\": \"x\"}')")
	require.Equal(t, run+"|payment|process_payment|app|"+id+`|{"card_token": "x"}|pending|||specql`,
		psql(t, url, "SELECT id, entity, action, entity_schema, entity_id, input_data, status, owner, idempotency_key, triggered_by FROM jobs.tb_workflow_run"))
	require.Regexp(t, `^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab]`, run, "a UUID that grows with time")
	later := psql(t, url, "SELECT app.process_payment(input => '{}', id => '"+id+"')")
	require.Less(t, run, later)
	// begun calls a function and returns what it noted.
	begun := func(call string) string {
		return psql(t, url, "SELECT entity, action, entity_schema, entity_id, input_data FROM jobs.tb_workflow_run WHERE id = '"+psql(t, url, "SELECT "+call)+"'")
	}
	require.Equal(t, "payment|process_payment|app||{}", begun("app.process_payment()"))
	require.Equal(t, "payment|process_payment|app||{}", begun("app.process_payment(NULL, NULL)"))
	require.Equal(t, "ticket|close|app|7|{}", begun("app.close(7)"))
	require.Contains(t, refused(t, url, "SELECT app.process_payment(input => '[1]')"), "the input of process_payment must be a JSON object, and is of type array")

	// Names that two entities of a schema share.
	require.Equal(t, "payment|cancel|app||{}", begun("app.payment_cancel()"))
	require.Equal(t, "ticket|cancel|app||{}", begun("app.ticket_cancel()"))
	require.Equal(t, "order|cancel|shop||{}", begun("shop.cancel()"))
	require.Contains(t, refused(t, url, "SELECT app.cancel()"), "does not exist")

	// A key gives the first run.
	first := psql(t, url, "SELECT app.process_payment(idempotency_key => 'k')")
	require.Equal(t, first, psql(t, url, "SELECT app.process_payment('"+id+"', '{\"a\": 1}', 'k')"))
	require.Equal(t, first+"\n"+first, psql(t, url, "BEGIN; SELECT app.process_payment(idempotency_key => 'k'); SELECT app.process_payment(idempotency_key => 'k'); COMMIT"))
	before := psql(t, url, count)
	require.Equal(t, "20|20", psql(t, url, "SELECT count(*), count(DISTINCT r) FROM (SELECT app.process_payment(idempotency_key => '') AS r FROM generate_series(1, 20)) s"), "an empty key is none")
	require.NotEqual(t, before, psql(t, url, count))

	// The type of the key changes, and the function with it.
	psql(t, url, "DROP TABLE app.ticket")
	apply(t, url, parse(t, "entity: ticket\nactions: {close: {steps: []}}\n"))
	psql(t, url, "SELECT app.close('"+id+"')")
	require.Contains(t, refused(t, url, "SELECT app.close(7)"), "does not exist")
}

// TestTheSameKeyAtTheSameTime: the second waits for the first and gets its run, or begins its
// own where the first rolled back.
func TestTheSameKeyAtTheSameTime(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	mesh(t, url)
	apply(t, url, parse(t, "entity: payment\nactions: {pay: {steps: []}}\n"))
	results := make(chan string)
	for range 20 {
		go func() {
			out, err := pgtest.Shared(t).Run(url, "BEGIN; SELECT app.pay(idempotency_key => 'k'); SELECT pg_sleep(0.01); COMMIT")
			if err != nil {
				out = err.Error()
			}
			results <- strings.TrimSpace(out)
		}()
	}
	var ids []string
	for range 20 {
		ids = append(ids, <-results)
	}
	slices.Sort(ids)
	require.Len(t, slices.Compact(ids), 1)
	require.Equal(t, "1", psql(t, url, "SELECT count(*) FROM jobs.tb_workflow_run"))
}

// TestTheRightsOfACaller: what Grants says is enough, and it is needed.
func TestTheRightsOfACaller(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	mesh(t, url)
	entities := parse(t, "entity: payment\nactions: {pay: {steps: []}}\n")
	apply(t, url, entities)
	role := "web_" + regexp.MustCompile(`\W`).ReplaceAllString(url[strings.LastIndex(url, "/")+1:], "_")
	if at := strings.IndexByte(role, '?'); at > 0 {
		role = role[:at]
	}
	psql(t, url, "CREATE ROLE "+role)
	require.Contains(t, refused(t, url, "SET ROLE "+role+"; SELECT app.pay()"), "permission denied")
	for _, line := range regexp.MustCompile(`(?m)^--   (GRANT [^…\n]*);$`).FindAllStringSubmatch(ddl.Grants(entities), -1) {
		psql(t, url, strings.ReplaceAll(line[1], "TO web", "TO "+role))
	}
	require.Equal(t, role, psql(t, url, "SET ROLE "+role+"; SELECT app.pay(idempotency_key => 'a'); SELECT app.pay(idempotency_key => 'a'); RESET ROLE; SELECT DISTINCT triggered_by FROM jobs.tb_workflow_run")[37*2:])
	require.Contains(t, refused(t, url, "SET ROLE "+role+"; SELECT input_data FROM jobs.tb_workflow_run"), "permission denied")
	psql(t, url, "GRANT INSERT ON jobs.tb_job_run TO "+role+"; SET ROLE "+role+"; INSERT INTO jobs.tb_job_run (service_name, operation, input_data) VALUES ('s', 'o', '{}')")
	psql(t, url, "DROP OWNED BY "+role+"; DROP ROLE "+role)

	// A role that may change nothing finds that it need not.
	psql(t, url, "CREATE ROLE "+role+"; GRANT USAGE ON SCHEMA app TO "+role)
	script := "SET ROLE " + role + ";\n"
	for _, s := range statements(t, entities) {
		script += "SELECT 'undone' WHERE (" + s.Done + ") IS NOT TRUE;\n"
	}
	require.NotContains(t, psql(t, url, script+"RESET ROLE; DROP OWNED BY "+role+"; DROP ROLE "+role), "undone")
}
