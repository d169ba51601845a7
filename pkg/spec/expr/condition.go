package expr

import (
	"strings"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
)

// Condition is a compiled CEL expression that gives true or false.
type Condition struct {
	source string
	prog   *program
}

// ParseCondition compiles a condition. `$` before names is optional, and so are `${ … }` around the whole.
// The error is an *Error.
func ParseCondition(src string) (*Condition, error) {
	inner := strings.TrimSpace(src)
	if strings.HasPrefix(inner, "${") && scanBraces(inner, 1) == len(inner) {
		inner = inner[2 : len(inner)-1]
	}
	prog, failed := compile(inner)
	if failed != nil {
		return nil, failed
	}
	if !prog.kind.IsExactType(cel.BoolType) && prog.kind.Kind() != types.DynKind {
		return nil, &Error{
			Text: src, Message: "a condition must be true or false, this one is always of type " + cel.FormatCELType(prog.kind),
			Mend: "compare it with something, as in `size($items) > 0`",
		}
	}
	return &Condition{source: src, prog: prog}, nil
}

// Eval evaluates the condition. The error is an *Error: something is missing, or the result is neither true nor false.
func (c *Condition) Eval(s Scope) (bool, error) {
	v, failed := c.prog.eval(s)
	if failed != nil {
		return false, failed
	}
	b, ok := v.(types.Bool)
	if !ok {
		return false, &Error{
			Text: c.source, Message: "a condition must be true or false, this one gave a value of type " + v.Type().TypeName(),
			Mend: "compare it with something, as in `$status == 'done'`",
		}
	}
	return bool(b), nil
}

// Refs lists every use of a root, in no promised order.
func (c *Condition) Refs() []Ref { return c.prog.refs() }

// Source returns the condition as written.
func (c *Condition) Source() string { return c.source }
