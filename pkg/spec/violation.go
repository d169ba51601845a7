package spec

import (
	"fmt"
	"slices"
	"strings"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/santhosh-tekuri/jsonschema/v6/kind"
	"golang.org/x/text/language"
	"golang.org/x/text/message"
)

// maxViolations bounds what one check reports.
const maxViolations = 100

// flatten makes a list of the tree in which the library reports.
func flatten(e *jsonschema.ValidationError) []Violation {
	var out []Violation
	collect(e, &out)
	slices.SortStableFunc(out, func(a, b Violation) int { return strings.Compare(a.Path, b.Path) })
	return slices.Compact(out)
}

func collect(e *jsonschema.ValidationError, out *[]Violation) {
	if len(*out) >= maxViolations {
		return
	}
	path := instancePath(e.InstanceLocation)
	add := func(path, format string, args ...any) {
		*out = append(*out, Violation{Path: path, Message: fmt.Sprintf(format, args...)})
	}
	switch k := e.ErrorKind.(type) {
	case *kind.Required:
		for _, name := range k.Missing {
			add(keyPath(path, name), "is required")
		}
	case *kind.Type:
		add(path, "must be %s, is %s", anyOf(k.Want), article(k.Got))
	case *kind.Enum:
		add(path, "must be one of %s", listValues(k.Want))
	case *kind.Const:
		add(path, "must be %s", listValues([]any{k.Want}))
	case *kind.Format:
		add(path, "must have the format %q", k.Want)
	case *kind.Pattern:
		add(path, "must match the pattern %q", clip(k.Want))
	case *kind.Minimum:
		want, _ := k.Want.Float64()
		add(path, "must be at least %v", want)
	case *kind.Maximum:
		want, _ := k.Want.Float64()
		add(path, "must be at most %v", want)
	case *kind.ExclusiveMinimum:
		want, _ := k.Want.Float64()
		add(path, "must be more than %v", want)
	case *kind.ExclusiveMaximum:
		want, _ := k.Want.Float64()
		add(path, "must be less than %v", want)
	case *kind.MultipleOf:
		want, _ := k.Want.Float64()
		add(path, "must be a multiple of %v", want)
	case *kind.AdditionalProperties:
		for _, name := range k.Properties {
			add(keyPath(path, name), "is not allowed")
		}
	case *kind.AnyOf, *kind.OneOf:
		// The branches that failed contradict each other; their reasons would mislead.
		add(path, "matches none of the alternatives, or more than one where one is asked for")
	case *kind.FalseSchema:
		add(path, "is not allowed")
	default:
		if len(e.Causes) == 0 {
			add(path, "%s", clip(e.ErrorKind.LocalizedString(message.NewPrinter(language.English))))
			return
		}
		for _, cause := range e.Causes {
			collect(cause, out)
		}
	}
}

// instancePath writes a JSON pointer as other messages write paths. A field whose name is a number looks like an index; that does no harm in a message.
func instancePath(location []string) string {
	path := ""
	for _, part := range location {
		if part != "" && strings.Trim(part, "0123456789") == "" {
			path += "[" + part + "]"
		} else {
			path = keyPath(path, part)
		}
	}
	return path
}

func article(typeName string) string {
	switch typeName {
	case "null":
		return typeName
	case "integer", "object", "array":
		return "an " + typeName
	default:
		return "a " + typeName
	}
}

func anyOf(types []string) string {
	names := make([]string, 0, len(types))
	null := false
	for _, t := range types {
		if null = null || t == "null"; t != "null" {
			names = append(names, article(t))
		}
	}
	if null {
		names = append(names, "null")
	}
	return strings.Join(names, " or ")
}

// listValues writes values of the schema, not of the data.
func listValues(values []any) string {
	var names []string
	for i, v := range values {
		if i == 10 {
			names = append(names, "…")
			break
		}
		names = append(names, clip(fmt.Sprintf("%v", v)))
	}
	return strings.Join(names, ", ")
}
