package runner

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/santhosh-tekuri/jsonschema/v6/kind"
	"golang.org/x/text/language"
	"golang.org/x/text/message"
)

// CheckService checks the configuration, the operations and the policy of a service
// against the schemas of C, O and P. Every fault is one Problem, sorted by path, with paths
// such as runner_config.base_url, operations.charge.path and security_policy.allowed_ports[0].
func CheckService[C, O, P any](s *Service) []Problem {
	problems := CheckSchema(SchemaOf[C](), s.Config, "runner_config")
	schema := SchemaOf[O]()
	for _, o := range s.Operations {
		problems = append(problems, CheckSchema(schema, o.Config, "operations."+o.Name)...)
	}
	return append(problems, CheckSchema(SchemaOf[P](), s.Policy, "security_policy")...)
}

// CheckSchema checks a JSON value against a JSON Schema. Paths of the problems begin with
// path. Empty raw counts as {}. A schema that is not valid is a problem, too; it may refer
// to nothing outside itself.
func CheckSchema(schema, raw json.RawMessage, path string) []Problem {
	found := checkJSON(schema, raw, path)
	problems := make([]Problem, 0, len(found))
	for _, f := range found {
		problems = append(problems, f.Problem)
	}
	return problems
}

// finding is a problem and whether a strict decoder stumbles over it as well.
type finding struct {
	Problem
	structural bool
	// location in the value: keys and positions.
	location []string
}

func (p *Problem) text() string {
	text := p.Message
	if p.Path != "" {
		text = p.Path + ": " + text
	}
	if p.Mend != "" {
		text += "; " + p.Mend
	}
	return text
}

// noLoader refuses every reference out of a schema: neither files nor the network are read.
type noLoader struct{}

func (noLoader) Load(url string) (any, error) {
	return nil, fmt.Errorf("a schema must not refer to %s outside itself", url)
}

const schemaURL = "schema:config"

func checkJSON(schema, raw json.RawMessage, path string) []finding {
	one := func(format string, args ...any) []finding {
		return []finding{{Problem: Problem{Path: path, Message: fmt.Sprintf(format, args...)}, structural: true}}
	}
	if len(bytes.TrimSpace(raw)) == 0 {
		raw = json.RawMessage(`{}`)
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(schema))
	if err != nil {
		return one("the schema is not JSON: %v", err)
	}
	value, err := jsonschema.UnmarshalJSON(bytes.NewReader(raw))
	if err != nil {
		return one("not JSON: %v", err)
	}
	c := jsonschema.NewCompiler()
	c.UseLoader(noLoader{})
	c.AssertFormat()
	if err := c.AddResource(schemaURL, doc); err != nil {
		return one("the schema is not valid: %v", err)
	}
	compiled, err := c.Compile(schemaURL)
	if err != nil {
		return one("the schema is not valid: %v", err)
	}
	err = compiled.Validate(value)
	if err == nil {
		return nil
	}
	var invalid *jsonschema.ValidationError
	if !errors.As(err, &invalid) {
		return one("%v", err)
	}
	w := walker{doc: doc, value: value, path: path}
	w.walk(invalid)
	sort.SliceStable(w.found, func(i, j int) bool {
		a, b := w.found[i], w.found[j]
		if a.Path != b.Path {
			return a.Path < b.Path
		}
		return a.Message < b.Message
	})
	return slices.CompactFunc(w.found, func(a, b finding) bool { return a.Problem == b.Problem })
}

// walker turns the tree of a validation error into findings.
type walker struct {
	doc, value any
	path       string
	found      []finding
}

func (w *walker) walk(e *jsonschema.ValidationError) {
	at := e.InstanceLocation
	switch k := e.ErrorKind.(type) {
	case *kind.AdditionalProperties:
		known := w.known(e.SchemaURL)
		for _, name := range k.Properties {
			w.add(append(slices.Clone(at), name), true, unknownKey(name, known), "unknown key %q", clip(name))
		}
	case *kind.Required:
		for _, name := range k.Missing {
			w.add(append(slices.Clone(at), name), false, fmt.Sprintf("add %q", name), "%q is missing", name)
		}
	case *kind.Type:
		w.add(at, true, "", "must be %s, is %s", article(strings.Join(k.Want, " or ")), article(k.Got))
	case *kind.Enum:
		options := make([]string, 0, len(k.Want))
		for _, o := range k.Want {
			options = append(options, fmt.Sprint(o))
		}
		got := clip(fmt.Sprint(k.Got))
		mend := "write one of " + strings.Join(options, ", ")
		if near := didYouMean(got, options); near != "" {
			mend = fmt.Sprintf("did you mean %q? One of %s", near, strings.Join(options, ", "))
		}
		w.add(at, false, mend, "%q is not a known value", got)
	case *kind.AnyOf, *kind.OneOf:
		// One fault, however many forms were tried.
		var forms []string
		for _, cause := range e.Causes {
			sub := walker{doc: w.doc, value: w.value, path: w.path}
			sub.walk(cause)
			for _, f := range sub.found {
				forms = append(forms, strings.TrimPrefix(f.text(), w.at(at)+": "))
			}
		}
		w.add(at, true, "", "has none of the forms allowed: %s", strings.Join(slices.Compact(forms), "; or "))
	default:
		if len(e.Causes) > 0 {
			for _, cause := range e.Causes {
				w.walk(cause)
			}
			return
		}
		_, structural := e.ErrorKind.(*kind.FalseSchema)
		w.add(at, structural, "", "%s", clip(e.ErrorKind.LocalizedString(message.NewPrinter(language.English))))
	}
}

func (w *walker) add(at []string, structural bool, mend, format string, args ...any) {
	w.found = append(w.found, finding{
		Problem:    Problem{Path: w.at(at), Message: fmt.Sprintf(format, args...), Mend: mend},
		structural: structural, location: at,
	})
}

// at writes a place as a path: keys with dots, positions in lists in brackets.
func (w *walker) at(location []string) string {
	var b strings.Builder
	b.WriteString(w.path)
	value := w.value
	for _, token := range location {
		switch v := value.(type) {
		case []any:
			b.WriteString("[" + token + "]")
			i, err := strconv.Atoi(token)
			if err != nil || i < 0 || i >= len(v) {
				value = nil
				continue
			}
			value = v[i]
			continue
		case map[string]any:
			value = v[token]
		default:
			value = nil
		}
		if b.Len() > 0 {
			b.WriteByte('.')
		}
		b.WriteString(clip(token))
	}
	return b.String()
}

// known lists the properties of the schema at a URL.
func (w *walker) known(url string) []string {
	_, pointer, _ := strings.Cut(url, "#")
	node := w.doc
	for token := range strings.SplitSeq(strings.Trim(pointer, "/"), "/") {
		if token == "" {
			continue
		}
		token = strings.NewReplacer("~1", "/", "~0", "~").Replace(token)
		switch n := node.(type) {
		case map[string]any:
			node = n[token]
		case []any:
			i, err := strconv.Atoi(token)
			if err != nil || i < 0 || i >= len(n) {
				return nil
			}
			node = n[i]
		default:
			return nil
		}
	}
	schema, _ := node.(map[string]any)
	properties, _ := schema["properties"].(map[string]any)
	names := make([]string, 0, len(properties))
	for name := range properties {
		names = append(names, name)
	}
	sort.Strings(names)
	return names
}

func unknownKey(name string, known []string) string {
	if near := didYouMean(name, known); near != "" {
		return fmt.Sprintf("did you mean %q?", near)
	}
	if len(known) == 0 {
		return "remove it; no keys are allowed here"
	}
	return "remove it; the keys allowed are " + strings.Join(known, ", ")
}

func article(name string) string {
	switch {
	case name == "null":
		return name
	case strings.HasPrefix(name, "integer"), strings.HasPrefix(name, "array"), strings.HasPrefix(name, "object"):
		return "an " + name
	}
	return "a " + name
}

// clip shortens hostile text for a message.
func clip(s string) string {
	const most = 200
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}

// didYouMean is the candidate nearest to name, or "" where none is near.
func didYouMean(name string, candidates []string) string {
	if len(name) > 64 {
		return ""
	}
	best, at := "", 1+max(1, len(name)/3)
	for _, c := range candidates {
		if d := distance(strings.ToLower(name), strings.ToLower(c)); d < at {
			best, at = c, d
		}
	}
	return best
}

// distance is the number of letters to insert, delete, change or swap to get from a to b.
func distance(a, b string) int {
	x, y := []rune(a), []rune(b)
	rows := make([][]int, len(x)+1)
	for i := range rows {
		rows[i] = make([]int, len(y)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(x); i++ {
		for j := 1; j <= len(y); j++ {
			cost := 1
			if x[i-1] == y[j-1] {
				cost = 0
			}
			rows[i][j] = min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+cost)
			if i > 1 && j > 1 && x[i-1] == y[j-2] && x[i-2] == y[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(x)][len(y)]
}
