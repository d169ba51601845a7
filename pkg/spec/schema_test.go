package spec_test

import (
	"encoding/json"
	"maps"
	"math"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/spec"
)

// schema parses a schema by way of a registry.
func schema(t *testing.T, text string) (*spec.Schema, []string) {
	t.Helper()
	r, problems := parseRegistry(t, "services: [{name: s, type: t, category: c, operations: [{name: o, input_schema: "+text+"}]}]\n", spec.Options{})
	return r.Service("s").Operation("o").Input, problems
}

func TestShorthand(t *testing.T) {
	for name, test := range map[string]struct {
		text  string
		value any
		want  []string
	}{
		"all types": {
			"{a: string, b: integer, c: number, d: boolean, e: object, f: array, g: any}",
			map[string]any{"a": "x", "b": 3.0, "c": json.Number("1.5"), "d": true, "e": map[string]any{}, "f": []any{}, "g": nil},
			nil,
		},
		"wrong types": {
			"{a: string, b: integer, c: number, d: boolean, e: object, f: array}",
			map[string]any{"a": 1.0, "b": 3.5, "c": "x", "d": 0.0, "e": []any{}, "f": map[string]any{}},
			[]string{"a: must be a string, is a number", "b: must be an integer, is a number", "c: must be a number, is a string", "d: must be a boolean, is a number", "e: must be an object, is an array", "f: must be an array, is an object"},
		},
		"missing":                           {"{a: string, b: 'string?', c: {type: integer, default: 3}}", map[string]any{}, []string{"a: is required"}},
		"optional may be null":              {"{a: 'string?'}", map[string]any{"a": nil}, nil},
		"optional has its type":             {"{a: 'string?'}", map[string]any{"a": 1.0}, []string{"a: must be a string or null, is a number"}},
		"more fields":                       {"{a: string}", map[string]any{"a": "x", "b": 1.0}, nil},
		"nested":                            {"{a: {b: {c: integer}}, d: [{e: string}]}", map[string]any{"a": map[string]any{"b": map[string]any{"c": "x"}}, "d": []any{map[string]any{}}}, []string{"a.b.c: must be an integer, is a string", "d[0].e: is required"}},
		"a field named type":                {"{type: string, name: string}", map[string]any{"type": "x", "name": 1.0}, []string{"name: must be a string, is a number"}},
		"an object with a field named type": {"{a: {type: string, city: string}}", map[string]any{"a": map[string]any{"type": "home", "city": "Ulm"}}, nil},
		"keywords":                          {"{a: {type: string, enum: [x, y]}, b: {type: integer, minimum: 1, maximum: 9}, c: {type: array, items: integer}}", map[string]any{"a": "z", "b": 10.0, "c": []any{"x"}}, []string{"a: must be one of x, y", "b: must be at most 9", "c[0]: must be an integer, is a string"}},
		"a type alone":                      {"array", map[string]any{}, []string{"must be an array, is an object"}},
		"a full schema":                     {"{type: object, properties: {a: {type: string, format: email}}, required: [a], additionalProperties: false}", map[string]any{"a": "nobody", "b": 1.0}, []string{"a: must have the format \"email\"", "b: is not allowed"}},
		"recursive":                         {"{properties: {a: {$ref: '#'}, n: {type: integer}}}", map[string]any{"a": map[string]any{"a": map[string]any{"n": "x"}}}, []string{"a.a.n: must be an integer, is a string"}},
		"large integers":                    {"{a: integer}", map[string]any{"a": int64(math.MaxInt64)}, nil},
		"not a number":                      {"{a: any}", map[string]any{"a": math.NaN()}, []string{"the value holds a number that is not finite"}},
		"a number bomb":                     {"{a: integer}", map[string]any{"a": json.Number("1e1000000000")}, []string{"the value holds a number that is too large or too long"}},
		"no value of JSON":                  {"{a: any}", map[string]any{"a": struct{}{}}, []string{"the value holds a struct {}, which JSON does not have"}},
		"secrets stay out":                  {"{a: {type: string, pattern: '^x'}}", map[string]any{"a": "hunter2"}, []string{`a: must match the pattern "^x"`}},
	} {
		t.Run(name, func(t *testing.T) {
			s, problems := schema(t, test.text)
			require.Empty(t, problems)
			var got []string
			for _, v := range s.Validate(test.value) {
				got = append(got, v.String())
			}
			require.Empty(t, cmp.Diff(test.want, got))
		})
	}
}

func TestSchemaProblems(t *testing.T) {
	for text, want := range map[string]string{
		"{a: str}":                         `unknown type "str"; did you mean "string"?`,
		"{a: [string, integer]}":           "a list in a shorthand schema names the type of its items",
		"{a: 5}":                           "must be the name of a type, is a number",
		"{a: {type: string, defalt: x}}":   `unknown key "defalt"; did you mean "default"?`,
		"{a: {type: integer, default: x}}": "the default does not match: must be an integer, is a string",
		"{properties: {a: {type: strin}}}": "the schema is not valid",
		"{properties: {a: {$ref: 'http://example.com/x.json'}}}": "nothing is loaded from elsewhere",
		"{properties: {a: {pattern: '('}}}":                      "the schema is not valid",
		"{$schema: 'http://example.com/meta', type: object}":     "nothing is loaded from elsewhere",
		"{properties: {a: {type: integer, default: x}}}":         "the default does not match",
	} {
		_, problems := schema(t, text)
		require.Len(t, problems, 1, text)
		require.Contains(t, problems[0], want)
	}
}

func TestReferencesThatMultiplyAreRefused(t *testing.T) {
	doc := map[string]any{"properties": map[string]any{"a": map[string]any{"$ref": "#/$defs/d0"}}}
	defs := map[string]any{}
	for i := range 30 {
		next := map[string]any{"$ref": "#/$defs/d" + string(rune('0'+(i+1)/10)) + string(rune('0'+(i+1)%10))}
		name := "d" + string(rune('0'+i/10)) + string(rune('0'+i%10))
		if i == 0 {
			name = "d0"
		}
		defs[name] = map[string]any{"allOf": []any{next, next}}
	}
	defs["d30"] = map[string]any{}
	doc["$defs"] = defs
	_, err := spec.NewSchema(doc)
	require.ErrorContains(t, err, "multiply")
}

func TestNilSchemaAllowsAnything(t *testing.T) {
	var s *spec.Schema
	require.Empty(t, s.Validate(struct{}{}))
	require.Empty(t, s.JSON())
	require.Empty(t, s.Keys())
	in := map[string]any{"a": 1}
	require.Equal(t, in, s.ApplyDefaults(in))
}

func TestDefaultsDoNotChangeTheInput(t *testing.T) {
	s, problems := schema(t, "{a: {type: object, default: {x: [1]}}, b: 'string?'}")
	require.Empty(t, problems)
	in := map[string]any{}
	first := s.ApplyDefaults(in)
	require.Empty(t, in)
	first["a"].(map[string]any)["x"] = "changed"
	require.Equal(t, map[string]any{"a": map[string]any{"x": []any{int64(1)}}}, s.ApplyDefaults(nil))
	require.Equal(t, map[string]any{"a": nil}, s.ApplyDefaults(map[string]any{"a": nil}), "null is a value")
}

func TestSchemasWithoutDefaultsLeaveTheInputAlone(t *testing.T) {
	s, problems := schema(t, "{a: {b: integer}, c: 'string?'}")
	require.Empty(t, problems)
	in := map[string]any{"a": map[string]any{}}
	require.Equal(t, in, s.ApplyDefaults(in))
	require.Equal(t, map[string]any{}, s.ApplyDefaults(nil))
	nested, problems := schema(t, "{a: {b: {type: integer, default: 3}}}")
	require.Empty(t, problems)
	require.Equal(t, map[string]any{"a": map[string]any{"b": int64(3)}}, nested.ApplyDefaults(in))
	require.Equal(t, map[string]any{"a": map[string]any{}}, in)
}

// Schemas of types alone, which are checked without the library, say of every value what it says: it checks the same schema with a
// comment in it.
func TestPlainSchemasSayWhatTheLibrarySays(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // the same each time
	types := []any{"null", "boolean", "integer", "number", "string", "array", "object"}
	names := []string{"a", "b", "c"}
	var document func(depth int) map[string]any
	document = func(depth int) map[string]any {
		doc := map[string]any{}
		switch r.IntN(4) {
		case 0:
		case 1:
			first := r.IntN(len(types) - 1)
			doc["type"] = types[first : first+1+r.IntN(2)]
		case 2:
			doc["type"] = types[r.IntN(len(types))]
		case 3:
			doc["type"] = []any{"array", "object"}[r.IntN(2)]
		}
		if r.IntN(3) == 0 {
			doc["required"] = []any{names[r.IntN(3)]}
		}
		if r.IntN(4) == 0 {
			doc["description"] = "x"
		}
		if depth == 0 {
			return doc
		}
		if r.IntN(2) == 0 {
			properties := map[string]any{}
			for range r.IntN(3) {
				properties[names[r.IntN(3)]] = document(depth - 1)
			}
			doc["properties"] = properties
		}
		if r.IntN(2) == 0 {
			doc["items"] = document(depth - 1)
		}
		if r.IntN(8) == 0 {
			doc["additionalProperties"] = false
		}
		return doc
	}
	leaves := []any{
		nil, true, "", "x", 0, int64(-3), uint64(math.MaxUint64), int32(1), uint32(1), 1.0, -0.5, 1e300, math.NaN(), math.Inf(1),
		struct{}{},
		json.Number("0"), json.Number("-7"), json.Number("007"), json.Number("1.0"), json.Number("1.5"), json.Number("1e3"), json.Number("-0"),
		json.Number("123456789012345678901234567890"), json.Number("NaN"), json.Number("-"), json.Number(""), json.Number("1e400"), json.Number("x"),
	}
	var value func(depth int) any
	value = func(depth int) any {
		switch kind := r.IntN(4); {
		case depth > 0 && kind == 0:
			list := []any{}
			for range r.IntN(3) {
				list = append(list, value(depth-1))
			}
			return list
		case depth > 0 && kind < 3:
			object := map[string]any{}
			for range r.IntN(4) {
				object[names[r.IntN(3)]] = value(depth - 1)
			}
			return object
		}
		return leaves[r.IntN(len(leaves))]
	}
	matched := 0
	for range 3000 {
		doc := document(3)
		s, err := spec.NewSchema(doc)
		require.NoError(t, err)
		commented := maps.Clone(doc)
		commented["$comment"] = "not of types alone"
		library, err := spec.NewSchema(commented)
		require.NoError(t, err)
		for range 20 {
			v := value(3)
			want := library.Validate(v)
			if want == nil {
				matched++
			}
			got := s.Validate(v)
			if want != nil && strings.HasPrefix(want[0].Message, "the value holds") { // which of several is named is chance
				require.Len(t, got, 1)
				continue
			}
			require.Equal(t, want, got, "%v of %v", v, doc)
		}
	}
	require.Greater(t, matched, 1000)
}

func BenchmarkPlainSchema(b *testing.B) {
	s, err := spec.NewSchema(map[string]any{"type": "object", "properties": map[string]any{"n": map[string]any{"type": "integer"}}, "required": []any{"n"}})
	require.NoError(b, err)
	v := map[string]any{"n": json.Number("10")}
	for b.Loop() {
		s.Validate(v)
	}
}

func TestSchemaAsJSON(t *testing.T) {
	s, problems := schema(t, "{a: integer, b: 'string?'}")
	require.Empty(t, problems)
	text, err := json.Marshal(s)
	require.NoError(t, err)
	require.JSONEq(t, `{"type":"object","properties":{"a":{"type":"integer"},"b":{"type":["string","null"]}},"required":["a"]}`, string(text))
	var again spec.Schema
	require.NoError(t, json.Unmarshal(text, &again))
	require.Equal(t, []string{"a", "b"}, again.Keys())
	require.Error(t, json.Unmarshal([]byte(`{"type":"x"}`), &again))
	require.Empty(t, again.Validate(map[string]any{"a": 1}), "a failed read changes nothing")
}

func TestManyViolationsAreBounded(t *testing.T) {
	s, problems := schema(t, "{a: [string]}")
	require.Empty(t, problems)
	list := make([]any, 10_000)
	for i := range list {
		list[i] = 1.0
	}
	require.LessOrEqual(t, len(s.Validate(map[string]any{"a": list})), 100)
	deep := any("x")
	for range 1000 {
		deep = []any{deep}
	}
	require.Contains(t, s.Validate(map[string]any{"a": deep})[0].Message, "nested")
}
