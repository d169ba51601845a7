package expr

import (
	"strings"

	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/types"
)

// Formula is a condition that compares and reckons with names and numbers alone, as a tree, for
// whoever has to say it in another language.
type Formula struct {
	// Op is one of && || ! == != < <= > >= + - * /, and empty for a name or a number. A minus
	// with one argument is a negation.
	Op   string
	Args []*Formula
	// Root is the name; empty for a number.
	Root   string
	Number float64
}

// Formula gives the tree of the condition; nil where it holds anything but names, numbers,
// comparisons, arithmetic and logic.
func (c *Condition) Formula() *Formula {
	rewritten, _, failed := rewrite(c.prog.source)
	if failed != nil {
		return nil
	}
	env, err := environment()
	if err != nil {
		return nil
	}
	parsed, issues := env.Parse(rewritten)
	if issues.Err() != nil {
		return nil
	}
	return formulaOf(parsed.NativeRep().Expr())
}

var formulaOps = map[string]string{
	operators.LogicalAnd: "&&", operators.LogicalOr: "||", operators.LogicalNot: "!",
	operators.Equals: "==", operators.NotEquals: "!=", operators.Less: "<", operators.LessEquals: "<=",
	operators.Greater: ">", operators.GreaterEquals: ">=", operators.Add: "+", operators.Subtract: "-",
	operators.Multiply: "*", operators.Divide: "/", operators.Negate: "-",
}

func formulaOf(e ast.Expr) *Formula {
	switch e.Kind() {
	case ast.LiteralKind:
		switch v := e.AsLiteral().(type) {
		case types.Double:
			return &Formula{Number: float64(v)}
		case types.Int:
			return &Formula{Number: float64(v)}
		case types.Uint:
			return &Formula{Number: float64(v)}
		}
	case ast.CallKind:
		call := e.AsCall()
		op, known := formulaOps[call.FunctionName()]
		if !known || call.IsMemberFunction() {
			return nil
		}
		f := &Formula{Op: op}
		for _, arg := range call.Args() {
			below := formulaOf(arg)
			if below == nil {
				return nil
			}
			f.Args = append(f.Args, below)
		}
		return f
	case ast.IdentKind:
		for _, prefix := range []string{dollarPrefix, barePrefix} {
			if root, ok := strings.CutPrefix(e.AsIdent(), prefix); ok {
				return &Formula{Root: root}
			}
		}
	default: // fields, lists and maps have no form in a tree of numbers
	}
	return nil
}
