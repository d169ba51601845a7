package expr

import (
	"fmt"
	"slices"
	"strings"
	"sync"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/ext"
)

// environment is the CEL of the language: the standard library with strings, math, lists, sets, cel.bind and optional values.
// It has no clock and no I/O. It is immutable, so one serves the process.
var environment = sync.OnceValues(func() (*cel.Env, error) {
	return cel.NewEnv(
		cel.CustomTypeAdapter(adapter{types.DefaultTypeAdapter}),
		cel.CrossTypeNumericComparisons(true),
		cel.DefaultUTCTimeZone(true),
		cel.EnableIdentifierEscapeSyntax(),
		cel.OptionalTypes(),
		cel.ParserRecursionLimit(maxCELDepth),
		cel.ParserExpressionSizeLimit(2*MaxSourceBytes),
		cel.ExpressionNodeLimit(maxCELNodes),
		cel.RegexProgramSizeLimit(1000),
		ext.Strings(), ext.Math(), ext.Lists(), ext.Sets(), ext.Bindings(), ext.Encoders(), ext.TwoVarComprehensions(),
		mixedArithmetic(),
	)
})

// program is one compiled CEL expression.
type program struct {
	source string // as written, for messages
	run    cel.Program
	uses   []use
	kind   *cel.Type
}

// use is a reference inside a CEL expression.
type use struct {
	ref  Ref
	path []segment
}

// compile compiles a CEL expression.
func compile(source string) (*program, *Error) {
	fail := func(offset int, format string, args ...any) *Error {
		return &Error{Offset: offset, Text: strings.TrimSpace(source), Message: fmt.Sprintf(format, args...)}
	}
	if len(source) > MaxSourceBytes {
		return nil, fail(0, "the expression has %d bytes, the limit is %d", len(source), MaxSourceBytes)
	}
	if strings.TrimSpace(source) == "" {
		return nil, fail(0, "the expression is empty")
	}
	rewritten, names, failed := rewrite(source)
	if failed != nil {
		return nil, failed
	}
	base, err := environment()
	if err != nil {
		return nil, fail(0, "the CEL environment does not work: %v", err)
	}
	parsed, issues := base.Parse(rewritten)
	if issues.Err() != nil {
		offset, message := explainIssues(issues, names)
		return nil, fail(offset, "%s", message)
	}
	p := &program{source: strings.TrimSpace(source)}
	w := &walker{info: parsed.NativeRep().SourceInfo(), names: names}
	w.walk(parsed.NativeRep().Expr(), nil)
	p.uses = w.uses

	declared := make([]cel.EnvOption, 0, len(p.uses))
	seen := map[string]bool{}
	for _, u := range p.uses {
		if name := prefixed(u.ref); !seen[name] {
			seen[name] = true
			declared = append(declared, cel.Variable(name, cel.DynType))
		}
	}
	env, err := base.Extend(declared...)
	if err != nil {
		return nil, fail(0, "%s", unprefix(err.Error()))
	}
	checked, issues := env.Check(parsed)
	if issues.Err() != nil {
		offset, message := explainIssues(issues, names)
		return nil, fail(offset, "%s", message)
	}
	p.kind = checked.OutputType()
	p.run, err = env.Program(checked, cel.CostLimit(maxCELCost), cel.EvalOptions(cel.OptOptimize), cel.CustomDecoratorV2(promoteNumbers))
	if err != nil {
		return nil, fail(0, "%s", unprefix(err.Error()))
	}
	return p, nil
}

func prefixed(r Ref) string {
	if r.Bare {
		return barePrefix + r.Root
	}
	return dollarPrefix + r.Root
}

// unprefix takes the prefixes of the rewriting out of a message of cel-go.
func unprefix(message string) string {
	return strings.NewReplacer(dollarPrefix, "$", barePrefix, "").Replace(message)
}

// explainIssues gives the first issue of a compilation, its place in bytes of the original source.
func explainIssues(issues *cel.Issues, names []occurrence) (int, string) {
	all := issues.Errors()
	if len(all) == 0 {
		return 0, unprefix(issues.Err().Error())
	}
	message := unprefix(all[0].Message)
	message = strings.TrimPrefix(message, "Syntax error: ")
	message, _, _ = strings.Cut(message, " (in container '')")
	if all[0].Location == nil || all[0].Location.Line() > 1 {
		return 0, message
	}
	return originalOffset(names, all[0].Location.Column()), message
}

// originalOffset maps an offset of the rewritten source, in runes, to one of the original. Between names it is exact for ASCII.
func originalOffset(names []occurrence, rewritten int) int {
	last := occurrence{}
	for _, o := range names {
		if o.rewritten > rewritten {
			break
		}
		last = o
	}
	if last.rewritten == rewritten {
		return last.original
	}
	return max(0, last.original+rewritten-last.rewritten-len(barePrefix)*min(1, len(names)))
}

// walker collects the free names of an expression.
type walker struct {
	info  *ast.SourceInfo
	names []occurrence
	uses  []use
}

// walk visits e; bound holds the variables of the macros around it.
func (w *walker) walk(e ast.Expr, bound []string) {
	if root, path, ok := staticPath(e); ok {
		w.add(root, path, e.Kind() == ast.SelectKind && e.AsSelect().IsTestOnly(), bound)
		return
	}
	switch e.Kind() {
	case ast.CallKind:
		call := e.AsCall()
		if call.IsMemberFunction() {
			w.walk(call.Target(), bound)
		}
		for _, arg := range call.Args() {
			w.walk(arg, bound)
		}
	case ast.SelectKind:
		w.walk(e.AsSelect().Operand(), bound)
	case ast.ListKind:
		for _, item := range e.AsList().Elements() {
			w.walk(item, bound)
		}
	case ast.MapKind:
		for _, entry := range e.AsMap().Entries() {
			w.walk(entry.AsMapEntry().Key(), bound)
			w.walk(entry.AsMapEntry().Value(), bound)
		}
	case ast.StructKind:
		for _, field := range e.AsStruct().Fields() {
			w.walk(field.AsStructField().Value(), bound)
		}
	case ast.ComprehensionKind:
		c := e.AsComprehension()
		w.walk(c.IterRange(), bound)
		w.walk(c.AccuInit(), bound)
		inner := append(append([]string{}, bound...), c.IterVar(), c.AccuVar())
		if c.HasIterVar2() {
			inner = append(inner, c.IterVar2())
		}
		w.walk(c.LoopCondition(), inner)
		w.walk(c.LoopStep(), inner)
		w.walk(c.Result(), append(append([]string{}, bound...), c.AccuVar()))
	default: // literals and names; names are static paths
	}
}

func (w *walker) add(root ast.Expr, path []segment, tested bool, bound []string) {
	name := root.AsIdent()
	if slices.Contains(bound, name) {
		return
	}
	r := Ref{Path: formatPath(path), Tested: tested}
	switch {
	case strings.HasPrefix(name, dollarPrefix):
		r.Root = strings.TrimPrefix(name, dollarPrefix)
		r.Text = formatReference(r.Root, path)
	case strings.HasPrefix(name, barePrefix):
		r.Root, r.Bare = strings.TrimPrefix(name, barePrefix), true
		r.Text = strings.TrimPrefix(formatReference(r.Root, path), "$")
	default: // a type name, or an accumulator of a macro
		return
	}
	if span, ok := w.info.GetOffsetRange(root.ID()); ok {
		r.Offset = originalOffset(w.names, int(span.Start))
	}
	w.uses = append(w.uses, use{ref: r, path: path})
}

// staticPath takes a name followed by fields and constant indexes apart.
func staticPath(e ast.Expr) (root ast.Expr, path []segment, ok bool) {
	switch e.Kind() {
	case ast.IdentKind:
		return e, nil, true
	case ast.SelectKind:
		s := e.AsSelect()
		root, path, ok = staticPath(s.Operand())
		return root, append(path, segment{field: s.FieldName()}), ok
	case ast.CallKind:
		call := e.AsCall()
		if call.FunctionName() != operators.Index || call.IsMemberFunction() || len(call.Args()) != 2 || call.Args()[1].Kind() != ast.LiteralKind {
			return nil, nil, false
		}
		root, path, ok = staticPath(call.Args()[0])
		switch key := call.Args()[1].AsLiteral().(type) {
		case types.Int:
			if key < 0 {
				return nil, nil, false
			}
			return root, append(path, segment{index: int(key), isIndex: true}), ok
		case types.String:
			return root, append(path, segment{field: string(key)}), ok
		}
	default: // anything else is computed
	}
	return nil, nil, false
}

// activation resolves rewritten names in a Scope.
type activation struct{ scope Scope }

func (a activation) ResolveName(name string) (any, bool) {
	if root, ok := strings.CutPrefix(name, dollarPrefix); ok {
		return lookup(a.scope, root, false)
	}
	if root, ok := strings.CutPrefix(name, barePrefix); ok {
		return lookup(a.scope, root, true)
	}
	return nil, false
}

func (activation) Parent() cel.Activation { return nil }

// eval evaluates the expression to a CEL value.
func (p *program) eval(s Scope) (ref.Val, *Error) {
	out, _, err := p.run.Eval(activation{s})
	if err == nil {
		if failed, isErr := out.(*types.Err); isErr {
			err = failed
		}
	}
	if err != nil {
		return nil, p.explain(s, err)
	}
	return out, nil
}

// evalNative evaluates the expression to a value of JSON.
func (p *program) evalNative(s Scope) (any, *Error) {
	out, failed := p.eval(s)
	if failed != nil {
		return nil, failed
	}
	budget := maxResultNodes
	v, err := native(out, &budget, 0)
	if err != nil {
		return nil, &Error{Text: p.source, Message: err.Error()}
	}
	return v, nil
}

// explain turns an error of cel-go into one that names the reference at fault and what there is instead.
func (p *program) explain(s Scope, err error) *Error {
	message := unprefix(err.Error())
	switch {
	case strings.Contains(message, "cost limit"):
		return &Error{Text: p.source, Message: "the expression takes too long to evaluate", Mend: "give it less data or split it"}
	case strings.Contains(message, "no such key"), strings.Contains(message, "no such attribute"),
		strings.Contains(message, "index out of"), strings.Contains(message, "unsupported index"),
		strings.Contains(message, "no such overload"), strings.Contains(message, "invalid"):
		for _, u := range p.uses {
			path := u.path
			if u.ref.Tested && len(path) > 0 {
				path = path[:len(path)-1]
			}
			if _, missing := resolve(s, u.ref.Root, u.ref.Bare, path); missing != nil {
				missing.Offset, missing.Text = u.ref.Offset, p.source
				return missing
			}
		}
	}
	if key, ok := strings.CutPrefix(message, "no such key: "); ok {
		message = fmt.Sprintf("there is no field %q", clip(key, 64))
	}
	if strings.HasPrefix(message, "no such overload") {
		message = "the types of the values do not fit: " + message
	}
	return &Error{Text: p.source, Message: message}
}

func (p *program) refs() []Ref {
	out := make([]Ref, len(p.uses))
	for i, u := range p.uses {
		out[i] = u.ref
	}
	return out
}
