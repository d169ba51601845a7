// Package expr holds the expressions of the workflow language: references such as
// `$order.items[0].name`, strings that interpolate them, and CEL inside `${ … }` and in conditions.
//
// Everything is compiled once, is immutable afterwards and may be evaluated from many goroutines at
// the same time. Which roots exist at a place of a workflow is not decided here: an expression says
// which ones it uses (Refs) and looks them up in a [Scope] when it is evaluated. Evaluation is pure;
// it has no clock, no randomness and no I/O, so evaluating again gives the same value.
//
// Values are those of JSON: map[string]any, []any, string, bool, nil and numbers. Numbers come in as
// any of float64, int64, int, or json.Number and go out as int64 or float64.
package expr

// Bounds on expressions. What is larger is refused when it is parsed.
const (
	// MaxSourceBytes bounds one string of a template and one condition.
	MaxSourceBytes = 16 << 10
	// MaxDepth bounds the nesting of a template's maps and lists.
	MaxDepth = 100
	// MaxResultBytes bounds the string that an interpolation makes.
	MaxResultBytes = 8 << 20

	maxCELDepth    = 48        // nesting of one CEL expression
	maxCELNodes    = 4000      // nodes of one CEL expression, macros expanded
	maxCELCost     = 1_000_000 // cost units of one evaluation; about as many elementary operations
	maxResultNodes = 200_000   // values in one result
	maxListedNames = 20        // names that an error message lists
)

// Scope gives the values of the roots. An implementation must be safe for the goroutine that
// evaluates; it is never kept.
type Scope interface {
	// Lookup returns the value of `$root`, and false if there is no such root.
	Lookup(root string) (any, bool)
	// Roots lists the roots there are; error messages show it.
	Roots() []string
}

// BareScope is a Scope in which a name without `$` may mean something else than the same name with
// it, as in preconditions, where `status` is a field of the entity. A Scope that does not implement it has
// both mean the same.
type BareScope interface {
	Scope
	// LookupBare returns the value of a name written without `$`.
	LookupBare(name string) (any, bool)
}

// MapScope is a Scope over a plain map.
type MapScope map[string]any

// Lookup implements Scope.
func (m MapScope) Lookup(root string) (any, bool) {
	v, ok := m[root]
	return v, ok
}

// Roots implements Scope. The order is undefined.
func (m MapScope) Roots() []string {
	names := make([]string, 0, len(m))
	for name := range m {
		names = append(names, name)
	}
	return names
}

// Ref is one use of a root.
type Ref struct {
	// Root is the name after the `$`.
	Root string
	// Path is what follows the root and is known without evaluating, such as `items[0].name`. It may be empty.
	Path string
	// Text is the reference as written, such as `$order.items[0].name`.
	Text string
	// At is the place in the template, such as `lines[2].price`; empty for a template that is one string, and for conditions.
	At string
	// Offset is the position of the reference in its string, in bytes.
	Offset int
	// Bare says that the name was written without `$`, which only CEL allows.
	Bare bool
	// Tested says that only the existence of the last field is asked for, as in `has($input.note)`.
	Tested bool
}
