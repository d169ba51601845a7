package load

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/stretchr/testify/require"
)

// fits checks an example against its schema with the validator that the mesh itself uses.
func fits(t *testing.T, schema string) map[string]any {
	t.Helper()
	var s map[string]any
	require.NoError(t, json.Unmarshal([]byte(schema), &s))
	doc, err := jsonschema.UnmarshalJSON(strings.NewReader(schema))
	require.NoError(t, err)
	c := jsonschema.NewCompiler()
	c.AssertFormat()
	require.NoError(t, c.AddResource("s.json", doc))
	compiled, err := c.Compile("s.json")
	require.NoError(t, err)
	made := Example(s)
	raw, err := json.Marshal(made)
	require.NoError(t, err)
	value, err := jsonschema.UnmarshalJSON(strings.NewReader(string(raw)))
	require.NoError(t, err)
	require.NoError(t, compiled.Validate(value), string(raw))
	return made
}

func TestExample(t *testing.T) {
	t.Parallel()
	require.Empty(t, Example(nil))
	require.Empty(t, fits(t, `{"type": "object", "properties": {"a": {"type": "string"}}}`), "what is optional is left out")
	require.Equal(t, map[string]any{"a": "b", "c": 7.0, "d": "x"}, fits(t, `{"type": "object", "required": ["a"], "properties": {
		"a": {"type": "string", "default": "b"}, "c": {"type": "integer", "default": 7}, "d": {"enum": ["x", "y"]}, "e": {"type": "null"}}}`))
	for _, property := range []string{
		`{"type": "integer", "minimum": 5}`, `{"type": "integer", "exclusiveMinimum": 5}`, `{"type": "integer", "maximum": -3}`,
		`{"type": "integer", "multipleOf": 7, "minimum": 10}`, `{"type": "number", "exclusiveMaximum": 1, "minimum": 0}`, `{"type": "boolean"}`,
		`{"type": ["null", "string"], "minLength": 20}`, `{"type": "string", "maxLength": 3}`, `{"type": "string", "format": "date-time"}`,
		`{"type": "string", "format": "uuid"}`, `{"type": "string", "format": "email"}`, `{"type": "array", "minItems": 2, "items": {"type": "integer"}}`,
		`{"type": "array", "items": {"type": "object"}}`, `{"type": "object", "required": ["x"], "properties": {"x": {"type": "number"}}}`,
		`{"oneOf": [{"type": "integer"}, {"type": "string"}]}`, `{"const": [1]}`, `{}`, `true`, `{"type": "string", "examples": ["abc"], "pattern": "^abc$"}`,
	} {
		fits(t, `{"type": "object", "required": ["v"], "properties": {"v": `+property+`}}`)
	}
	deep := `{"type": "integer"}`
	for range 100 {
		deep = `{"type": "object", "required": ["a"], "properties": {"a": ` + deep + `}}`
	}
	var s map[string]any
	require.NoError(t, json.Unmarshal([]byte(deep), &s))
	require.NotNil(t, Example(s), "it ends")
	require.NotPanics(t, func() {
		Example(map[string]any{"properties": 1, "required": "a", "type": 5})
		Example(map[string]any{"type": "object", "required": []any{"a", 1}, "properties": map[string]any{"a": []any{}}})
	})
}
