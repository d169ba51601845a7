package ddl_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/pkg/spec/ddl"
)

func parse(t *testing.T, texts ...string) []*spec.Entity {
	t.Helper()
	var out []*spec.Entity
	for i, text := range texts {
		e, problems := spec.ParseEntity(spec.File{Name: string(rune('a'+i)) + ".yaml", Content: []byte(text)}, spec.Options{})
		require.NoError(t, problems.Err())
		out = append(out, e)
	}
	return out
}

func findings(problems spec.Problems) []string {
	out := make([]string, 0, len(problems))
	for _, p := range problems {
		text := p.String()
		if p.Warning {
			text = "warning: " + text
		}
		out = append(out, text)
	}
	return out
}

func TestProblemsHaveTheirPlaces(t *testing.T) {
	t.Parallel()
	entities := parse(
		t,
		"entity: order\nfields:\n  customer: {type: uuid, references: custmer.id}\n  item: {type: string, references: customer.id}\n"+
			"  name: {type: string, references: customer.name}\n  other: {type: uuid, references: customer.nope}\n  xmin: integer\n",
		"entity: order\nfields: {}\n",
		"entity: customer\nschema: app\nfields: {name: string}\nindexes:\n  - {fields: [name], where: \"true; DROP TABLE x\"}\n",
		"entity: a\nschema: pg_mine\n",
		"entity: b\nschema: jobs\n",
		"entity: order\nfields:\n  customer: {type: uuid, references: custmer.id}\n  item: {type: string, references: customer.id}\n"+
			"  name: {type: string, references: customer.name}\n  other: {type: uuid, references: customer.nope}\n",
		"entity: customer\nfields: {name: string}\n",
	)
	_, problems := ddl.Tables(entities, ddl.Options{})
	require.Equal(t, []string{
		"a.yaml:7:3: fields.xmin: PostgreSQL has a system column xmin in every table; rename the field",
		"c.yaml:5:5: indexes[0].where: the condition must be one expression, without ; and comments; write one condition, such as status = 'pending'",
		"d.yaml:1:1: schema: the schema pg_mine is PostgreSQL's own; choose another, such as app",
		"e.yaml:1:1: schema: the schema jobs is the mesh's own; choose another, such as app",
		"f.yaml:1:1: entity: there are two entities app.order; rename one of the two",
	}, findings(problems), "what cannot be used hides what depends on it")

	_, problems = ddl.Tables(entities[5:], ddl.Options{})
	require.Equal(t, []string{
		`f.yaml:3:3: fields.customer.references: there is no entity custmer here; did you mean "customer"?`,
		"f.yaml:4:3: fields.item.references: item is of type string, and customer.id is of type uuid; give it the type uuid",
		"f.yaml:5:3: fields.name.references: customer.name is not unique, so that a reference could mean several rows; " +
			"add `- {fields: [name], unique: true}` to the indexes of customer, or refer to customer.id",
		"f.yaml:6:3: fields.other.references: customer has no field nope; fields there are: id, name",
	}, findings(problems))
	_, problems = ddl.Tables(entities[5:], ddl.Options{OpenReferences: true})
	require.Equal(t, []string{"warning", "f.yaml", "f.yaml", "warning"}, prefixes(findings(problems)))
}

func prefixes(lines []string) []string {
	out := make([]string, len(lines))
	for i, line := range lines {
		out[i], _, _ = strings.Cut(line, ":")
	}
	return out
}

// TestEntitiesOfPrograms: what no file can say is refused too, and nothing panics.
func TestEntitiesOfPrograms(t *testing.T) {
	t.Parallel()
	text := []*spec.Field{{Name: "a", Type: "string"}}
	for name, e := range map[string]*spec.Entity{
		"quote in schema": {Schema: `a"b`, Name: "e", Fields: text},
		"quote in entity": {Schema: "app", Name: `e"; DROP TABLE x; --`, Fields: text},
		"dot":             {Schema: "app", Name: "a.b", Fields: text},
		"empty":           {Name: "e", Fields: text},
		"long":            {Schema: "app", Name: strings.Repeat("e", 64), Fields: text},
		"field":           {Schema: "app", Name: "e", Fields: []*spec.Field{{Name: "a, b", Type: "string"}}},
		"type":            {Schema: "app", Name: "e", Fields: []*spec.Field{{Name: "a", Type: "string); --"}}},
		"twice":           {Schema: "app", Name: "e", Fields: []*spec.Field{{Name: "a", Type: "string"}, {Name: "A", Type: "string"}}},
		"index":           {Schema: "app", Name: "e", Fields: text, Indexes: []*spec.Index{{Fields: []string{"nosuch"}}}},
		"empty index":     {Schema: "app", Name: "e", Fields: text, Indexes: []*spec.Index{{}}},
		"default":         {Schema: "app", Name: "e", Fields: []*spec.Field{{Name: "a", Type: "integer", Default: "1); DROP TABLE x"}}},
		"NUL":             {Schema: "app", Name: "e", Fields: []*spec.Field{{Name: "a", Type: "string", Default: "\x00"}}},
		"enum":            {Schema: "app", Name: "e", Fields: []*spec.Field{{Name: "a", Type: "boolean", Validation: &spec.FieldValidation{Enum: []any{"x"}}}}},
	} {
		_, problems := ddl.Tables([]*spec.Entity{e}, ddl.Options{})
		require.True(t, problems.HasErrors(), name)
	}
	_, problems := ddl.Functions([]*spec.Entity{{Schema: "app", Name: "e", Actions: []*spec.Action{{Name: "a\x00"}, {}}}})
	require.Len(t, problems, 2)
	statements, problems := ddl.Tables(nil, ddl.Options{})
	require.Empty(t, statements)
	require.Empty(t, problems)
}

func TestConditionsAreClosedExpressions(t *testing.T) {
	t.Parallel()
	for where, ok := range map[string]bool{
		"status = 'pending'": true, "(a > 1) AND (b IS NULL)": true, "a = 'it''s; -- fine'": true, `"a;b" > 1`: true, "a - 1 > -1": true, "a / 2 * 3 > 1": true,
		"true; DROP TABLE x": false, "true -- ": false, "true /* x": false, "a = '": false, `"a > 1`: false, "(a > 1": false, "a > 1) OR (b": true, "a > 1) (": true,
		"a > 1))": false, `a = E'\'; '`: false, "a = $x$;$x$": false, "a\x00": false,
	} {
		e := &spec.Entity{Schema: "app", Name: "e", Fields: []*spec.Field{{Name: "a", Type: "integer"}}, Indexes: []*spec.Index{{Fields: []string{"a"}, Where: where}}}
		_, problems := ddl.Tables([]*spec.Entity{e}, ddl.Options{})
		if where == "a > 1) OR (b" || where == "a > 1) (" {
			require.NotEmpty(t, problems, where)
			continue
		}
		require.Equal(t, ok, len(problems) == 0, "%q: %v", where, problems)
	}
}

func TestActionsOfOneName(t *testing.T) {
	t.Parallel()
	_, problems := ddl.Functions(parse(
		t, "entity: a\nactions: {b_c: {steps: []}}\n", "entity: a_b\nactions: {c: {steps: []}, x: {steps: []}}\n", "entity: d\nactions: {c: {steps: []}, a_b_c: {steps: []}, b_c: {steps: []}}\n",
	))
	require.Equal(t, []string{
		"b.yaml:2:11: actions.c: the function a_b_c would be that of the action b_c of a too; rename one of the two",
		"c.yaml:2:27: actions.a_b_c: the function a_b_c would be that of the action b_c of a too; rename one of the two",
	}, findings(problems))
}

// TestTheTextIsTheSameEachTime: files under version control change with the entities alone.
func TestTheTextIsTheSameEachTime(t *testing.T) {
	t.Parallel()
	text := func() string {
		entities := parse(t, "entity: a\nfields: {v: {type: object, default: {z: 1, a: {y: 2, b: 3}}}}\nactions: {x: {steps: []}, y: {steps: []}}\n")
		tables, problems := ddl.Tables(entities, ddl.Options{})
		require.Empty(t, problems)
		functions, problems := ddl.Functions(entities)
		require.Empty(t, problems)
		return ddl.Grants(entities) + ddl.Text(tables) + ddl.Text(functions)
	}
	first := text()
	for range 10 {
		require.Equal(t, first, text())
	}
	require.Contains(t, first, `CREATE TABLE IF NOT EXISTS "app"."a"`)
}
