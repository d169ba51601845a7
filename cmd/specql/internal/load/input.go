package load

import (
	"encoding/json"
	"math"
	"slices"
	"strings"
)

// maxDepth bounds examples of schemas that nest.
const maxDepth = 16

// Example makes an input that fits a JSON Schema: constants, defaults, examples and first choices where the
// schema has them, else plain values of the right type. Optional fields are left out unless the
// schema has a value for them. What only a pattern says is not found out.
func Example(schema map[string]any) map[string]any {
	v, _ := example(schema, 0).(map[string]any)
	if v == nil {
		v = map[string]any{}
	}
	return v
}

// given is a value that the schema itself names.
func given(s map[string]any) (any, bool) {
	for _, key := range []string{"const", "default"} {
		if v, ok := s[key]; ok {
			return v, true
		}
	}
	for _, key := range []string{"examples", "enum"} {
		if list, ok := s[key].([]any); ok && len(list) > 0 {
			return list[0], true
		}
	}
	return nil, false
}

func example(s map[string]any, depth int) any {
	if v, ok := given(s); ok {
		return v
	}
	if depth > maxDepth {
		return nil
	}
	for _, key := range []string{"oneOf", "anyOf", "allOf"} {
		if list, ok := s[key].([]any); ok && len(list) > 0 && s["type"] == nil && s["properties"] == nil {
			first, _ := list[0].(map[string]any)
			return example(first, depth+1)
		}
	}
	switch kind(s) {
	case "object":
		return exampleObject(s, depth)
	case "array":
		items, _ := s["items"].(map[string]any)
		list := []any{}
		for range min(int(numeric(s, "minItems", 0)), 1000) {
			list = append(list, example(items, depth+1))
		}
		return list
	case "integer", "number":
		return exampleNumber(s)
	case "boolean":
		return true
	case "null":
		return nil
	}
	return exampleText(s)
}

// kind is the type of a schema: the first that is not null, or what its other keys tell.
func kind(s map[string]any) string {
	switch t := s["type"].(type) {
	case string:
		return t
	case []any:
		for _, one := range t {
			if name, ok := one.(string); ok && name != "null" {
				return name
			}
		}
		return "null"
	}
	switch {
	case s["properties"] != nil:
		return "object"
	case s["items"] != nil:
		return "array"
	}
	return "string"
}

func exampleObject(s map[string]any, depth int) map[string]any {
	out := map[string]any{}
	required, _ := s["required"].([]any)
	properties, _ := s["properties"].(map[string]any)
	for name, p := range properties {
		property, _ := p.(map[string]any)
		if _, ok := given(property); ok || slices.Contains(required, any(name)) {
			out[name] = example(property, depth+1)
		}
	}
	for _, r := range required {
		if name, ok := r.(string); ok {
			if _, there := out[name]; !there {
				out[name] = "example"
			}
		}
	}
	return out
}

// numeric is a number of a schema.
func numeric(s map[string]any, key string, without float64) float64 {
	switch v := s[key].(type) {
	case float64:
		return v
	case int:
		return float64(v)
	case json.Number:
		if f, err := v.Float64(); err == nil {
			return f
		}
	}
	return without
}

func exampleNumber(s map[string]any) any {
	v := 1.0
	low, high := numeric(s, "minimum", math.Inf(-1)), numeric(s, "maximum", math.Inf(1))
	if x := numeric(s, "exclusiveMinimum", math.Inf(-1)); x >= low {
		low = math.Floor(x) + 1
	}
	if x := numeric(s, "exclusiveMaximum", math.Inf(1)); x <= high {
		high = math.Ceil(x) - 1
	}
	v = max(v, math.Ceil(low))
	if v > high {
		v = high
	}
	if m := numeric(s, "multipleOf", 0); m > 0 {
		v = math.Ceil(max(v, m)/m) * m
		if v > high {
			v = math.Floor(high/m) * m
		}
	}
	if kind(s) == "integer" {
		v = math.Trunc(v)
	}
	return v
}

// formats are examples of texts in a known form.
var formats = map[string]string{
	"date-time": "2026-01-31T12:00:00Z", "date": "2026-01-31", "time": "12:00:00Z", "duration": "PT1S",
	"email": "someone@example.com", "hostname": "example.com", "ipv4": "192.0.2.1", "ipv6": "2001:db8::1",
	"uri": "https://example.com/", "uri-reference": "/example", "uuid": "6a8f9d0e-0000-4000-8000-000000000001",
}

func exampleText(s map[string]any) string {
	if format, ok := s["format"].(string); ok {
		if text, known := formats[format]; known {
			return text
		}
	}
	text := "example"
	if n := min(int(numeric(s, "minLength", 0)), 1<<16); len(text) < n {
		text += strings.Repeat("x", n-len(text))
	}
	if n := int(numeric(s, "maxLength", math.MaxInt32)); n >= 0 && len(text) > n {
		text = text[:n]
	}
	return text
}
