package storetest

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// entity parses an entity and makes its table.
func entity(t *testing.T, st store.Store, text string) *spec.Entity {
	t.Helper()
	e, problems := spec.ParseEntity(spec.File{Name: "entity.yaml", Content: []byte(text)}, spec.Options{})
	require.NoError(t, problems.Err())
	require.NoError(t, st.EnsureEntities(t.Context(), []*spec.Entity{e}))
	return e
}

func paymentEntity(t *testing.T, st store.Store) *spec.Entity {
	t.Helper()
	return entity(t, st, `
entity: payment
schema: commerce
fields:
  status: string!
  amount: integer
`)
}

func insert(e *spec.Entity, id string, values map[string]any) *store.Record {
	run := newRun()
	r := create(run)
	r.InsertRow = &store.EntityRow{Schema: e.Schema, Entity: e.Name, ID: id, Values: values}
	return r
}

func row(t *testing.T, st store.Store, e *spec.Entity, id string) map[string]any {
	t.Helper()
	got, err := st.EntityRow(t.Context(), e, id)
	require.NoError(t, err)
	return got
}

func testEntities(t *testing.T, st store.Store) {
	e := entity(t, st, `
entity: thing
schema: app
fields:
  a_string: string
  a_text: text
  an_integer: integer
  a_number: number
  a_decimal: decimal
  a_boolean: boolean
  an_object: object
  a_json: json
  an_array: array
  a_uuid: uuid
  a_date: date
  a_timestamp: timestamp
  nothing: string
  order: string
indexes:
  - {fields: [a_string, a_number]}
`)
	id := newID()
	values := map[string]any{
		"id": id, "a_string": "x'y", "a_text": "long", "an_integer": 9007199254740993, "a_number": 1.25, "a_decimal": "12.30", "a_boolean": true,
		"an_object": map[string]any{"k": []any{"v", nil, true}}, "a_json": "text", "an_array": []any{1.0, "b"},
		"a_uuid": "6a8f9d0e-0000-4000-8000-00000000abcd", "a_date": "2030-01-31", "a_timestamp": "2030-01-31T12:00:00Z",
		"nothing": nil, "order": "a word of SQL",
	}
	require.NoError(t, e.CheckRow(values))
	r := insert(e, id, values)
	commit(t, st, r)
	got := row(t, st, e, id)
	require.NoError(t, e.CheckRow(got))
	for _, name := range e.FieldNames() {
		require.EqualValues(t, values[name], got[name], name)
	}
	require.Len(t, got, len(values))

	// An update sets some columns; null takes a value away.
	u := change(r.Create)
	u.UpdateRow = &store.EntityRow{Schema: "app", Entity: "thing", ID: id, Values: map[string]any{"a_string": nil, "a_boolean": false, "order": "new", "an_integer": 3.0}}
	commit(t, st, u)
	got = row(t, st, e, id)
	require.Nil(t, got["a_string"])
	require.Equal(t, false, got["a_boolean"])
	require.Equal(t, "new", got["order"])
	require.EqualValues(t, 3, got["an_integer"])
	require.Equal(t, "long", got["a_text"])

	_, err := st.EntityRow(t.Context(), e, newID())
	require.ErrorIs(t, err, store.ErrNotFound)
	u.UpdateRow.ID = newID()
	require.ErrorIs(t, commitOne(t, st, u), store.ErrNotFound)
	require.NoError(t, st.EnsureEntities(t.Context(), []*spec.Entity{e}), "a second time changes nothing")
	require.Equal(t, "new", row(t, st, e, id)["order"])
}

func testEntityColumns(t *testing.T, st store.Store) {
	before := entity(t, st, "entity: thing\nschema: app\nfields: {a: string!, b: integer}\n")
	id := newID()
	commit(t, st, insert(before, id, map[string]any{"a": "x", "b": 2}))

	after := entity(t, st, "entity: thing\nschema: app\nfields: {a: string!, c: boolean!, d: string}\nindexes: [{fields: [c, d]}]\n")
	got := row(t, st, after, id)
	require.Equal(t, "x", got["a"])
	require.Contains(t, got, "c")
	require.Nil(t, got["c"])
	require.NotContains(t, got, "b")
	commit(t, st, insert(after, newID(), map[string]any{"a": "y", "c": true, "d": "z"}))
	require.EqualValues(t, 2, row(t, st, before, id)["b"], "what is gone from the file is not dropped")

	// Two schemas are two tables.
	elsewhere := entity(t, st, "entity: thing\nschema: other\nfields: {a: integer}\n")
	commit(t, st, insert(elsewhere, id, map[string]any{"a": 1}))
	require.Equal(t, "x", row(t, st, after, id)["a"])
}

func testEntityConstraints(t *testing.T, st store.Store) {
	e := entity(t, st, `
entity: account
schema: app
fields: {email: string!, age: integer, region: string}
indexes: [{fields: [email, region], unique: true}]
`)
	id := newID()
	first := insert(e, id, map[string]any{"email": "a@example.com", "region": "eu"})
	commit(t, st, first)
	for name, values := range map[string]map[string]any{
		"unique":   {"email": "a@example.com", "region": "eu"},
		"required": {"age": 1},
		"null":     {"email": nil},
		"unknown":  {"email": "b@example.com", "nosuch": 1},
		"type":     {"email": "b@example.com", "age": "old"},
	} {
		ok := newRun()
		bad := insert(e, newID(), values)
		errs := commitAll(t, st, create(ok), bad)
		require.NoError(t, errs[0], name)
		f, is := fault.As(errs[1])
		require.True(t, is, "%s: %v", name, errs[1])
		require.Equal(t, fault.Validation, f.Code, name)
		_, err := st.Run(t.Context(), bad.RunID)
		require.ErrorIs(t, err, store.ErrNotFound, name)
		_, err = st.EntityRow(t.Context(), e, bad.InsertRow.ID)
		require.ErrorIs(t, err, store.ErrNotFound, name)
	}
	_, is := fault.As(commitOne(t, st, insert(e, id, map[string]any{"email": "c@example.com"})))
	require.True(t, is, "the primary key is taken")
}

// testEntityCountedKey: the database counts a key that is an integer and that nobody gave.
func testEntityCountedKey(t *testing.T, st store.Store) {
	e := entity(t, st, "entity: ticket\nschema: app\nfields: {id: integer, title: string}\n")
	a, b := insert(e, "", map[string]any{"title": "a"}), insert(e, "", map[string]any{"title": "b"})
	commit(t, st, a, b)
	require.NotEmpty(t, a.InsertRow.ID)
	require.NotEqual(t, a.InsertRow.ID, b.InsertRow.ID)
	require.Equal(t, "b", row(t, st, e, b.InsertRow.ID)["title"])
	require.Equal(t, b.InsertRow.ID, load(t, st, b.RunID).EntityID)

	c := insert(e, "1000", map[string]any{"id": 1000, "title": "c"})
	commit(t, st, c)
	require.EqualValues(t, 1000, row(t, st, e, "1000")["id"])
	u := change(c.Create)
	u.UpdateRow = &store.EntityRow{Schema: "app", Entity: "ticket", ID: "1000", Values: map[string]any{"title": "d"}}
	commit(t, st, u)
	require.Equal(t, "d", row(t, st, e, "1000")["title"])
}

func testEntityHostileNames(t *testing.T, st store.Store) {
	ctx := t.Context()
	text := []*spec.Field{{Name: "a", Type: "string"}}
	for name, e := range map[string]*spec.Entity{
		"quote in schema": {Schema: `a"b`, Name: "e", Fields: text},
		"quote in entity": {Schema: "app", Name: `e"; DROP TABLE x; --`, Fields: text},
		"dot":             {Schema: "app", Name: "a.b", Fields: text},
		"empty":           {Schema: "", Name: "e", Fields: text},
		"field":           {Schema: "app", Name: "e1", Fields: []*spec.Field{{Name: "a, b", Type: "string"}}},
		"type":            {Schema: "app", Name: "e2", Fields: []*spec.Field{{Name: "a", Type: "string); --"}}},
		"twice":           {Schema: "app", Name: "e3", Fields: []*spec.Field{{Name: "a", Type: "string"}, {Name: "A", Type: "string"}}},
		"index":           {Schema: "app", Name: "e4", Fields: text, Indexes: []*spec.Index{{Fields: []string{"nosuch"}}}},
		"where":           {Schema: "app", Name: "e5", Fields: text, Indexes: []*spec.Index{{Fields: []string{"a"}, Where: "true; DROP TABLE tb_job_run"}}},
	} {
		require.Error(t, st.EnsureEntities(ctx, []*spec.Entity{e}), name)
	}
	r := insert(&spec.Entity{Schema: "app", Name: "nosuch"}, newID(), map[string]any{"a": 1})
	require.Error(t, commitOne(t, st, r))
	r = insert(&spec.Entity{Schema: "jobs", Name: `x" (a) VALUES (1)`}, newID(), map[string]any{"a": 1})
	require.Error(t, commitOne(t, st, r))
}
