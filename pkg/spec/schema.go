package spec

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/santhosh-tekuri/jsonschema/v6"
)

// Schema says what an input or output looks like. It is immutable. A nil *Schema allows anything.
type Schema struct {
	doc      map[string]any
	compiled *jsonschema.Schema
	plain    *plainSchema // nil where it says more
	keys     []string
	// defaults says that there are some.
	defaults bool
}

// Violation is one way in which a value does not match.
type Violation struct {
	// Path is the place in the value, such as `items[0].price`; empty for the value itself.
	Path string
	// Message says what is wrong. It never holds the value, which may be a secret.
	Message string
}

// String gives "path: message".
func (v Violation) String() string {
	if v.Path == "" {
		return v.Message
	}
	return v.Path + ": " + v.Message
}

// schemaTypes are the types of the shorthand.
var schemaTypes = []string{"string", "integer", "number", "boolean", "object", "array", "any"}

// typeSynonyms are names from elsewhere that edit distance does not lead to ours.
var typeSynonyms = map[string]string{
	"int": "integer", "int32": "integer", "int64": "integer", "bigint": "integer", "long": "integer",
	"float": "number", "double": "number", "numeric": "number",
	"bool": "boolean", "str": "string", "varchar": "string", "char": "string",
	"map": "object", "dict": "object", "hash": "object", "struct": "object", "json": "object", "jsonb": "json",
	"list": "array", "datetime": "timestamp", "time": "timestamp", "timestamptz": "timestamp", "guid": "uuid",
}

func suggestType(name string, types []string) string {
	if s := typeSynonyms[strings.ToLower(name)]; slices.Contains(types, s) {
		return fmt.Sprintf("did you mean %q?", s)
	}
	if s := DidYouMean(name, types); s != "" {
		return fmt.Sprintf("did you mean %q?", s)
	}
	return "the types are: " + strings.Join(types, ", ")
}

// fragmentKeywords are the keys that a field of the shorthand may have when it is written as a map with `type`.
var fragmentKeywords = []string{
	"type", "default", "required", "description", "title", "enum", "const", "format", "pattern", "minLength", "maxLength",
	"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "items", "minItems", "maxItems", "uniqueItems",
	"properties", "additionalProperties", "minProperties", "maxProperties", "examples", "nullable",
}

// schema reads a schema; nil means anything.
func (r reader) schema(n *node, path string) *Schema {
	if n.isNull() {
		return nil
	}
	before := len(r.problems)
	var doc map[string]any
	switch {
	case isFullSchema(n):
		doc, _ = n.native().(map[string]any)
	case n.kind == mappingNode:
		doc = r.shorthandObject(n, path)
	default:
		doc, _ = r.shorthandType(n, path)
	}
	if len(r.problems) > before || doc == nil {
		return nil
	}
	s, err := NewSchema(doc)
	if err != nil {
		r.errorf(n.pos, path, "", "the schema is not valid: %s", schemaFault(err))
		return nil
	}
	r.checkDefaults(n, path, doc, s)
	return s
}

// isFullSchema tells JSON Schema from the shorthand.
func isFullSchema(n *node) bool {
	if n.kind != mappingNode {
		return false
	}
	properties := n.get("properties")
	return n.get("$schema") != nil && n.get("$schema").kind == scalarNode || properties != nil && properties.kind == mappingNode
}

func (r reader) shorthandObject(n *node, path string) map[string]any {
	properties := make(map[string]any, len(n.entries))
	required := []any{}
	for _, e := range n.entries {
		fragment, optional := r.shorthandField(e.value, keyPath(path, e.key))
		properties[e.key] = fragment
		if !optional {
			required = append(required, e.key)
		}
	}
	doc := map[string]any{"type": "object", "properties": properties}
	if len(required) > 0 {
		doc["required"] = required
	}
	return doc
}

// shorthandField reads the value of one field: a type, a list with the type of its items, a map with `type` and keywords, or a nested shorthand.
func (r reader) shorthandField(n *node, path string) (doc map[string]any, optional bool) {
	if n.kind == mappingNode {
		switch {
		case isFullSchema(n):
			doc, _ = n.native().(map[string]any)
			_, hasDefault := doc["default"]
			return doc, hasDefault
		case isFragment(n):
			return r.fragment(n, path)
		}
		return r.shorthandObject(n, path), false
	}
	return r.shorthandType(n, path)
}

// isFragment says whether a map is one field with keywords, such as {type: string, default: x}, and not an object with a field named `type`.
func isFragment(n *node) bool {
	t := n.get("type")
	if t == nil || t.kind != scalarNode {
		return false
	}
	for _, e := range n.entries {
		if !slices.Contains(fragmentKeywords, e.key) && isShorthandType(e.value) {
			return false
		}
	}
	return true
}

func isShorthandType(n *node) bool {
	s, ok := n.value.(string)
	return n.kind == mappingNode || ok && slices.Contains(schemaTypes, strings.TrimSuffix(s, "?"))
}

func (r reader) fragment(n *node, path string) (doc map[string]any, optional bool) {
	r.known(n, path, fragmentKeywords...)
	doc, optional = r.shorthandType(n.get("type"), keyPath(path, "type"))
	if doc == nil {
		doc = map[string]any{}
	}
	for _, e := range n.entries {
		here := keyPath(path, e.key)
		switch e.key {
		case "type":
		case "required":
			if required, ok := r.boolean(e.value, here); ok && !required {
				optional = true
			}
		case "nullable":
			if nullable, ok := r.boolean(e.value, here); ok && nullable {
				allowNull(doc)
			}
		case "default":
			optional = true
			doc["default"] = e.value.native()
		case "items":
			if fragment, _ := r.shorthandField(e.value, here); fragment != nil {
				doc["items"] = fragment
			}
		case "enum":
			values := e.value.native()
			if list, ok := values.([]any); ok && optional && allowsNull(doc) && !slices.Contains(list, nil) {
				values = append(list, nil)
			}
			doc["enum"] = values
		default:
			doc[e.key] = e.value.native()
		}
	}
	return doc, optional
}

// shorthandType reads `string`, `string?` or `[string]`. Where a value may be left out it may also be null.
func (r reader) shorthandType(n *node, path string) (doc map[string]any, optional bool) {
	if n.kind == sequenceNode {
		if len(n.items) != 1 {
			r.errorf(n.pos, path, "write one type, as in `[string]`", "a list in a shorthand schema names the type of its items")
			return nil, false
		}
		items, _ := r.shorthandField(n.items[0], indexPath(path, 0))
		return map[string]any{"type": "array", "items": items}, false
	}
	s, ok := n.value.(string)
	if !ok || n.kind != scalarNode {
		r.errorf(n.pos, path, "the types are: "+strings.Join(schemaTypes, ", "), "must be the name of a type, is %s", n.describe())
		return nil, false
	}
	name, optional := strings.CutSuffix(strings.TrimSpace(s), "?")
	if !slices.Contains(schemaTypes, name) {
		r.errorf(n.pos, path, suggestType(name, schemaTypes), "unknown type %q", clip(name))
		return nil, optional
	}
	doc = map[string]any{}
	if name != "any" {
		doc["type"] = name
	}
	if optional {
		allowNull(doc)
	}
	return doc, optional
}

func allowNull(doc map[string]any) {
	if name, ok := doc["type"].(string); ok {
		doc["type"] = []any{name, "null"}
	}
}

func allowsNull(doc map[string]any) bool {
	types, ok := doc["type"].([]any)
	return ok && slices.Contains(types, any("null"))
}

// checkDefaults reports defaults that the schema itself refuses. It looks at the top level alone.
func (r reader) checkDefaults(n *node, path string, doc map[string]any, s *Schema) {
	properties, _ := doc["properties"].(map[string]any)
	defaults := map[string]any{}
	for name, property := range properties {
		if p, ok := property.(map[string]any); ok {
			if value, there := p["default"]; there {
				defaults[name] = value
			}
		}
	}
	if len(defaults) == 0 {
		return
	}
	failed, ok := errors.AsType[*jsonschema.ValidationError](s.compiled.Validate(defaults))
	if !ok {
		return
	}
	holder := n
	if isFullSchema(n) {
		holder = n.get("properties")
	}
	for _, cause := range failed.Causes {
		for _, v := range flatten(cause) {
			name, _, _ := strings.Cut(strings.ReplaceAll(v.Path, "[", "."), ".")
			if d := holder.get(name).get("default"); d != nil {
				r.errorf(d.pos, keyPath(keyPath(path, name), "default"), "", "the default does not match: %s", v.Message)
			}
		}
	}
}

// schemaURL is where a schema is said to live. Nothing is loaded from it.
const schemaURL = "specql:///schema.json"

type noLoader struct{}

func (noLoader) Load(url string) (any, error) {
	return nil, fmt.Errorf("%s is outside of the schema, and nothing is loaded from elsewhere", clip(url))
}

// NewSchema compiles a full JSON Schema (draft 2020-12 unless `$schema` says otherwise). References to anything outside of it are refused.
// doc must not be changed afterwards.
func NewSchema(doc map[string]any) (s *Schema, err error) {
	if fault := checkValue(doc, 0); fault != "" {
		return nil, errors.New(fault)
	}
	if err := boundSchema(doc); err != nil {
		return nil, err
	}
	defer func() {
		if r := recover(); r != nil { // the library compiles what a stranger wrote
			s, err = nil, fmt.Errorf("it cannot be compiled: %v", r)
		}
	}()
	c := jsonschema.NewCompiler()
	c.UseLoader(noLoader{})
	c.DefaultDraft(jsonschema.Draft2020)
	c.AssertFormat()
	if err := c.AddResource(schemaURL, doc); err != nil {
		return nil, err
	}
	compiled, err := c.Compile(schemaURL)
	if err != nil {
		return nil, err
	}
	properties, _ := doc["properties"].(map[string]any)
	return &Schema{doc: doc, compiled: compiled, plain: plain(doc), keys: slices.Sorted(maps.Keys(properties)), defaults: hasDefaults(doc, 0)}, nil
}

// schemaFault makes one line of an error of the compiler.
func schemaFault(err error) string {
	if invalid, ok := errors.AsType[*jsonschema.SchemaValidationError](err); ok {
		if failed, ok := errors.AsType[*jsonschema.ValidationError](invalid.Err); ok {
			if list := flatten(failed); len(list) > 0 {
				return list[0].String()
			}
		}
	}
	if load, ok := errors.AsType[*jsonschema.LoadURLError](err); ok {
		return load.Err.Error()
	}
	message, _, _ := strings.Cut(strings.ReplaceAll(err.Error(), schemaURL, ""), "\n")
	return clip(message)
}

// JSON returns the full JSON Schema; for a nil Schema the one that allows anything. It must not be changed.
func (s *Schema) JSON() map[string]any {
	if s == nil {
		return map[string]any{}
	}
	return s.doc
}

// Keys lists the top-level properties, sorted.
func (s *Schema) Keys() []string {
	if s == nil {
		return nil
	}
	return slices.Clone(s.keys)
}

// Requires says whether the property must be given: it is required and has no default.
func (s *Schema) Requires(name string) bool {
	if s == nil {
		return false
	}
	required, _ := s.doc["required"].([]any)
	properties, _ := s.doc["properties"].(map[string]any)
	property, _ := properties[name].(map[string]any)
	_, hasDefault := property["default"]
	return slices.Contains(required, any(name)) && !hasDefault
}

// MarshalJSON writes the full JSON Schema.
func (s *Schema) MarshalJSON() ([]byte, error) { return json.Marshal(s.JSON()) }

// UnmarshalJSON reads a full JSON Schema.
func (s *Schema) UnmarshalJSON(b []byte) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	var doc map[string]any
	if err := d.Decode(&doc); err != nil {
		return fmt.Errorf("read JSON Schema: %w", err)
	}
	compiled, err := NewSchema(doc)
	if err != nil {
		return fmt.Errorf("compile JSON Schema: %w", err)
	}
	*s = *compiled
	return nil
}

// Validate checks a value. Fields that the schema does not name are allowed unless it forbids them itself.
func (s *Schema) Validate(v any) []Violation {
	if s == nil {
		return nil
	}
	if fault := checkValue(v, 0); fault != "" {
		return []Violation{{Message: fault}}
	}
	if s.plain.holds(v) {
		return nil
	}
	err := s.compiled.Validate(v)
	if err == nil {
		return nil
	}
	failed, ok := errors.AsType[*jsonschema.ValidationError](err)
	if !ok {
		return []Violation{{Message: err.Error()}}
	}
	return flatten(failed)
}

// ApplyDefaults returns the input with the defaults of what it leaves out, also inside objects that are there. The input is not changed.
func (s *Schema) ApplyDefaults(input map[string]any) map[string]any {
	if s == nil || !s.defaults && input != nil {
		return input
	}
	return applyDefaults(s.doc, input, 0)
}

// hasDefaults says whether [applyDefaults] may find some.
func hasDefaults(doc map[string]any, depth int) bool {
	properties, _ := doc["properties"].(map[string]any)
	if depth > MaxDepth {
		return false
	}
	for _, property := range properties {
		p, ok := property.(map[string]any)
		if !ok {
			continue
		}
		if _, there := p["default"]; there || hasDefaults(p, depth+1) {
			return true
		}
	}
	return false
}

func applyDefaults(doc, input map[string]any, depth int) map[string]any {
	properties, _ := doc["properties"].(map[string]any)
	if len(properties) == 0 || depth > MaxDepth {
		return input
	}
	out := maps.Clone(input)
	if out == nil {
		out = map[string]any{}
	}
	for name, property := range properties {
		p, ok := property.(map[string]any)
		if !ok {
			continue
		}
		value, there := out[name]
		if !there {
			if d, hasDefault := p["default"]; hasDefault {
				out[name] = cloneValue(d)
			}
			continue
		}
		if nested, isObject := value.(map[string]any); isObject {
			out[name] = applyDefaults(p, nested, depth+1)
		}
	}
	return out
}

func cloneValue(v any) any {
	switch v := v.(type) {
	case map[string]any:
		out := make(map[string]any, len(v))
		for k, item := range v {
			out[k] = cloneValue(item)
		}
		return out
	case []any:
		out := make([]any, len(v))
		for i, item := range v {
			out[i] = cloneValue(item)
		}
		return out
	default:
		return v
	}
}

// checkValue says what keeps a value from being one of JSON that can be checked in bounded time; "" if nothing.
func checkValue(v any, depth int) string {
	if depth > 2*MaxDepth {
		return fmt.Sprintf("the value is nested more than %d deep", 2*MaxDepth)
	}
	switch v := v.(type) {
	case nil, bool, string, int, int64, int32, uint32, uint64:
		return ""
	case float64:
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return "the value holds a number that is not finite"
		}
	case json.Number:
		if f, err := v.Float64(); err != nil || math.IsInf(f, 0) || len(v) > 400 || f == 0 && strings.ContainsAny(v.String(), "eE") {
			return "the value holds a number that is too large or too long"
		}
	case map[string]any:
		for _, item := range v {
			if fault := checkValue(item, depth+1); fault != "" {
				return fault
			}
		}
	case []any:
		for _, item := range v {
			if fault := checkValue(item, depth+1); fault != "" {
				return fault
			}
		}
	default:
		return fmt.Sprintf("the value holds a %T, which JSON does not have", v)
	}
	return ""
}
