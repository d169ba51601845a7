package spec_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/spec"
)

func payment(t *testing.T) *spec.Entity {
	t.Helper()
	e, problems := spec.ParseEntity(readFile(t, "documents/entity_payment.yaml"), spec.Options{})
	require.Empty(t, problems)
	return e
}

func TestEntity(t *testing.T) {
	e := payment(t)
	require.Equal(t, "payment", e.Name)
	require.Equal(t, "commerce", e.Schema)
	require.Equal(t, []string{"id", "amount_cents", "currency", "status", "order", "fee", "charge_id", "tags", "details", "created_at"}, e.FieldNames())
	require.True(t, e.PrimaryKey().Implicit)
	require.Equal(t, "uuid", e.PrimaryKey().Type)
	require.True(t, e.Field("AMOUNT_CENTS").Required)
	require.Equal(t, "USD", e.Field("currency").Default)
	require.Equal(t, "order.id", e.Field("order").References)
	require.Equal(t, []any{"pending", "paid", "failed"}, e.Field("status").Validation.Enum)
	require.InDelta(t, 1000.5, *e.Field("fee").Validation.Max, 0)
	require.Equal(t, 7, e.Field("currency").Line)
	require.Len(t, e.Indexes, 2)
	require.Equal(t, "status = 'pending'", e.Indexes[0].Where)
	require.True(t, e.Indexes[1].Unique)
	require.Equal(t, []string{"process_payment", "cancel"}, e.ActionNames())
}

func TestRows(t *testing.T) {
	e := payment(t)
	newID := func() string { return "00000000-0000-4000-8000-000000000001" }
	row, err := e.NewRow(map[string]any{"amount_cents": json.Number("5"), "card_token": "not a field", "tags": []any{"a"}}, newID)
	require.NoError(t, err)
	require.Empty(t, cmp.Diff(map[string]any{
		"id": newID(), "amount_cents": json.Number("5"), "currency": "USD", "status": "pending", "order": nil, "fee": nil,
		"charge_id": nil, "tags": []any{"a"}, "details": nil, "created_at": nil,
	}, row))

	_, err = e.NewRow(map[string]any{"status": "lost", "currency": "usd", "fee": "12.x"}, newID)
	var invalid *spec.RowError
	require.ErrorAs(t, err, &invalid)
	require.Empty(t, cmp.Diff([]spec.Violation{
		{Path: "amount_cents", Message: "is required"},
		{Path: "currency", Message: `must match the pattern "^[A-Z]{3}$"`},
		{Path: "status", Message: "must be one of pending, paid, failed"},
		{Path: "fee", Message: "must be a number, is a string"},
	}, invalid.Violations))

	for _, test := range []struct {
		row  map[string]any
		want string
	}{
		{map[string]any{"status": "paid", "fee": "12.50"}, ""},
		{map[string]any{"fee": -1}, "the row of payment is not valid: fee: must be at least 0"},
		{map[string]any{"fee": 2e3}, "the row of payment is not valid: fee: must be at most 1000.5"},
		{map[string]any{"amount_cents": 1.5}, "the row of payment is not valid: amount_cents: must be a whole number, is a number"},
		{map[string]any{"amount_cents": 3.0, "order": "00000000-0000-4000-8000-000000000001", "created_at": "2030-01-31T12:00:00.5+02:00"}, ""},
		{map[string]any{"amount_cents": nil}, "the row of payment is not valid: amount_cents: is required"},
		{map[string]any{"order": "o1"}, "the row of payment is not valid: order: must be a UUID"},
		{map[string]any{"created_at": "yesterday"}, `the row of payment is not valid: created_at: must be a timestamp such as "2030-01-31T12:00:00Z"`},
		{map[string]any{"statis": 1}, `the row of payment is not valid: statis: is not a field; did you mean "status"?`},
		{map[string]any{"charge_id": "a\x00"}, "the row of payment is not valid: charge_id: must not hold a NUL character"},
		{map[string]any{"details": map[string]any{"x": func() {}}}, "the row of payment is not valid: details: the value holds a func(), which JSON does not have"},
		{map[string]any{"amount_cents": json.Number("1e999999999")}, "the row of payment is not valid: amount_cents: the value holds a number that is too large or too long"},
	} {
		err := e.CheckRow(test.row)
		if test.want == "" {
			require.NoError(t, err)
			continue
		}
		require.EqualError(t, err, test.want)
	}
}

// TestDecimalsAreComparedByTheirValue: exactly, and however they are written.
func TestDecimalsAreComparedByTheirValue(t *testing.T) {
	e, problems := spec.ParseEntity(spec.File{Name: "e.yaml", Content: []byte(
		"entity: e\nfields:\n  a: {type: decimal, validation: {min: 0.3, max: 1000.5}}\n  b: {type: decimal, validation: {enum: [\"1.50\", 2, 0.1]}}\n")}, spec.Options{})
	require.Empty(t, problems)
	for _, test := range []struct {
		field string
		value any
		ok    bool
	}{
		{"a", "0.3", true},
		{"a", 0.3, true},
		{"a", "0.29999999999999999999999", false},
		{"a", "1000.50000000000000000000001", false},
		{"a", json.Number("1000.5"), true},
		{"a", "+.5", true},
		{"a", strings.Repeat("9", 1000), false},
		{"a", int64(1001), false},
		{"b", "1.5", true},
		{"b", 1.5, true},
		{"b", "2.00", true},
		{"b", json.Number("2"), true},
		{"b", "0.1000", true},
		{"b", "0.10001", false},
	} {
		require.Equal(t, test.ok, e.CheckRow(map[string]any{test.field: test.value}) == nil, "%v", test)
	}
}

func TestIntegerKeysAreLeftToTheDatabase(t *testing.T) {
	e, problems := spec.ParseEntity(spec.File{Name: "e.yaml", Content: []byte("entity: e\nfields: {id: integer, name: string!}\n")}, spec.Options{})
	require.Empty(t, problems)
	require.False(t, e.PrimaryKey().Implicit)
	row, err := e.NewRow(map[string]any{"name": "n"}, nil)
	require.NoError(t, err)
	require.Equal(t, map[string]any{"name": "n"}, row)
}

func TestEntityProblems(t *testing.T) {
	for name, test := range map[string]struct {
		text string
		want []string
	}{
		"a registry": {"services: []\n", []string{"1:1: services: this is a service registry, not an entity"}},
		"no name":    {"fields: {a: string}\n", []string{"1:1: the key \"entity\" is missing; add `entity:` with its name"}},
		"bad name":   {"entity: my-entity\n", []string{"1:9: entity: \"my-entity\" cannot be used as a name; use letters, digits and `_`, and no digit first"}},
		"field types": {"entity: e\nfields:\n  a: int\n  b: datetime!\n  c: {type: strng}\n  d:\n", []string{
			`3:6: fields.a: unknown type "int"; did you mean "integer"?`,
			`4:6: fields.b: unknown type "datetime"; did you mean "timestamp"?`,
			`5:13: fields.c.type: unknown type "strng"; did you mean "string"?`,
			"6:3: fields.d: the field has no type; write a type, as in `d: string`",
		}},
		"fields twice": {"entity: e\nfields: {a: string, A: text}\n", []string{`2:21: fields.A: the field "A" is there twice, first in line 2; rename one of the two; case does not count`}},
		"validation": {"entity: e\nfields:\n  a: {type: string, validation: {min: 1, pattern: '('}}\n  b: {type: integer, validation: {min: 3, max: 2, enum: [x]}, default: 1.5}\n", []string{
			"3:39: fields.a.validation.min: only numbers have a bound, this field is of type string",
			"3:51: fields.a.validation.pattern: is not a regular expression; use the syntax of RE2",
			"4:40: fields.b.validation.min: min is more than max",
			"4:58: fields.b.validation.enum[0]: is no value of the field: must be a whole number, is a string",
			"4:72: fields.b.default: the default does not match: must be a whole number, is a number",
		}},
		"references": {"entity: e\nfields: {a: {type: uuid, references: a.b.c}}\n", []string{"2:38: fields.a.references: \"a.b.c\" is not a field of an entity; write `entity.field`, as in `order.id`"}},
		"index": {"entity: e\nfields: {name: string}\nindexes: [{fields: [nme, name, name]}, {uniqe: true}]\n", []string{
			`3:21: indexes[0].fields[0]: the entity has no field "nme"; did you mean "name"?`,
			`3:32: indexes[0].fields[2]: the field "name" is there twice`,
			"3:40: indexes[1]: the key \"fields\" is missing; add `fields:` with a list",
			`3:41: indexes[1].uniqe: unknown key "uniqe"; did you mean "unique"?`,
		}},
		"actions": {"entity: e\nactions:\n  - name: a\n    steps: []\n  - name: a\n    actions: []\n  - call_service: {}\n  - steps: []\n", []string{
			"5:11: actions[1].name: the action \"a\" is there twice, first in line 3; rename one of the two",
			"7:5: actions[2]: this is a step, where an action with a name is expected; write `- name: …` with the steps below `actions:`",
			"8:5: actions[3]: the key \"name\" is missing; add `name:`",
		}},
		"update": {"entity: e\nfields: {state: string}\nactions:\n  a: {steps: [{update: {set: {stat: 1, id: 2}}}]}\n", []string{
			`4:31: actions.a.steps[0].update.set.stat: the entity e has no field "stat"; did you mean "state"?`,
			"4:40: actions.a.steps[0].update.set.id: the primary key cannot be changed",
		}},
		"preconditions": {"entity: e\nactions:\n  a:\n    preconditions: ['1 +', '5']\n    steps: []\n", []string{
			"4:21: actions.a.preconditions[0]: `1 +`: mismatched input '<EOF>' expecting {'[', '{', '(', '.', '-', '!', 'true', 'false', 'null', NUM_FLOAT, NUM_INT, NUM_UINT, STRING, BYTES, IDENTIFIER}",
			"4:28: actions.a.preconditions[1]: `5`: a condition must be true or false, this one is always of type int; compare it with something, as in `size($items) > 0`",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			_, problems := spec.ParseEntity(spec.File{Name: "e.yaml", Content: []byte(test.text)}, spec.Options{})
			require.Empty(t, cmp.Diff(test.want, findings(problems)))
		})
	}
}
