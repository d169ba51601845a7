package expr

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Template is a value with references in it. It is immutable.
type Template struct {
	source any
	root   part
	refs   []Ref
}

// part is one compiled piece of a template.
type part interface {
	eval(s Scope) (any, *Error)
}

type (
	literal   struct{ value any }
	reference struct {
		root string
		path []segment
		text string
		at   string
		off  int
	}
	expression struct {
		prog *program
		at   string
		off  int
	}
	interpolation struct {
		parts []part
		at    string
	}
	object struct {
		names []string
		parts []part
	}
	list struct{ parts []part }
)

// ParseTemplate compiles a value of YAML or JSON. Strings in it may be a literal, one reference (`$order.total`) or
// one expression (`${ $order.total * 2 }`), which keep the type of what they give, or text in which those are
// interpolated. `$$` is a dollar sign; a `$` with neither a name nor a brace behind it stands for itself. The keys of maps
// are literal. The error is an Errors.
func ParseTemplate(v any) (*Template, error) {
	c := &templateCompiler{}
	t := &Template{source: v, root: c.compile(v, "", 0)}
	if len(c.errs) > 0 {
		return nil, c.errs
	}
	t.refs = c.refs
	return t, nil
}

// Eval gives the value. Maps and lists of the template are made anew, what references give is shared with the scope.
// The error is an *Error whose At says where in the template it arose.
func (t *Template) Eval(s Scope) (any, error) {
	v, failed := t.root.eval(s)
	if failed != nil {
		return nil, failed
	}
	return v, nil
}

// Refs lists every use of a root.
func (t *Template) Refs() []Ref { return slices.Clone(t.refs) }

// Source returns the value that was parsed. It must not be changed.
func (t *Template) Source() any { return t.source }

// Literal returns the value of a template without references, and false if it has any.
func (t *Template) Literal() (any, bool) {
	if len(t.refs) > 0 {
		return nil, false
	}
	v, failed := t.root.eval(MapScope{})
	return v, failed == nil
}

type templateCompiler struct {
	refs []Ref
	errs Errors
}

func (c *templateCompiler) compile(v any, at string, depth int) part {
	if depth > MaxDepth {
		c.errs = append(c.errs, &Error{At: at, Message: fmt.Sprintf("nested more than %d deep", MaxDepth)})
		return literal{}
	}
	switch v := v.(type) {
	case string:
		return c.compileString(v, at)
	case map[string]any:
		o := object{names: make([]string, 0, len(v)), parts: make([]part, 0, len(v))}
		for name := range v {
			o.names = append(o.names, name)
		}
		slices.Sort(o.names)
		for _, name := range o.names {
			o.parts = append(o.parts, c.compile(v[name], joinField(at, name), depth+1))
		}
		return o
	case []any:
		l := list{parts: make([]part, 0, len(v))}
		for i, item := range v {
			l.parts = append(l.parts, c.compile(item, joinIndex(at, i), depth+1))
		}
		return l
	default:
		return literal{v}
	}
}

func (c *templateCompiler) fail(at string, err *Error) part {
	err.At = at
	c.errs = append(c.errs, err)
	return literal{}
}

func (c *templateCompiler) compileString(s, at string) part {
	if !strings.Contains(s, "$") {
		return literal{s}
	}
	if len(s) > MaxSourceBytes {
		return c.fail(at, &Error{
			Message: fmt.Sprintf("a string with references has %d bytes, the limit is %d", len(s), MaxSourceBytes),
			Mend:    "write `$$` for a dollar sign, or pass the text as input",
		})
	}
	var parts []part
	var text strings.Builder
	flush := func() {
		if text.Len() > 0 {
			parts = append(parts, literal{text.String()})
			text.Reset()
		}
	}
	for i := 0; i < len(s); {
		switch {
		case s[i] != '$':
			text.WriteByte(s[i])
			i++
		case strings.HasPrefix(s[i:], "$$"):
			text.WriteByte('$')
			i += 2
		case strings.HasPrefix(s[i:], "${"):
			end := scanBraces(s, i+1)
			if end < 0 {
				return c.fail(at, &Error{Offset: i, Text: s, Message: "`${` is not closed", Mend: "add a `}`, or write `$${` for the characters themselves"})
			}
			prog, failed := compile(s[i+2 : end-1])
			if failed != nil {
				failed.Offset += i + 2
				return c.fail(at, failed)
			}
			flush()
			for _, r := range prog.refs() {
				r.At, r.Offset = at, r.Offset+i+2
				c.refs = append(c.refs, r)
			}
			parts = append(parts, expression{prog: prog, at: at, off: i + 2})
			i = end
		case i+1 < len(s) && isNameStart(s[i+1]):
			root, path, end := scanReference(s, i)
			flush()
			c.refs = append(c.refs, Ref{Root: root, Path: formatPath(path), Text: s[i:end], At: at, Offset: i})
			parts = append(parts, reference{root: root, path: path, text: s[i:end], at: at, off: i})
			i = end
		default:
			text.WriteByte('$')
			i++
		}
	}
	flush()
	if len(parts) == 1 {
		return parts[0]
	}
	return interpolation{parts: parts, at: at}
}

func (l literal) eval(Scope) (any, *Error) { return l.value, nil }

func (r reference) eval(s Scope) (any, *Error) {
	v, failed := resolve(s, r.root, false, r.path)
	if failed != nil {
		failed.At, failed.Offset, failed.Text = r.at, r.off, r.text
		return nil, failed
	}
	return v, nil
}

func (e expression) eval(s Scope) (any, *Error) {
	v, failed := e.prog.evalNative(s)
	if failed != nil {
		failed.At = e.at
		failed.Offset += e.off
		return nil, failed
	}
	return v, nil
}

func (in interpolation) eval(s Scope) (any, *Error) {
	var b strings.Builder
	for _, p := range in.parts {
		v, failed := p.eval(s)
		if failed != nil {
			return nil, failed
		}
		piece, err := text(v)
		if err == nil && b.Len()+len(piece) > MaxResultBytes {
			err = errResultTooLarge
		}
		if err != nil {
			return nil, &Error{At: in.at, Message: err.Error()}
		}
		b.WriteString(piece)
	}
	return b.String(), nil
}

func (o object) eval(s Scope) (any, *Error) {
	out := make(map[string]any, len(o.names))
	for i, name := range o.names {
		v, failed := o.parts[i].eval(s)
		if failed != nil {
			return nil, failed
		}
		out[name] = v
	}
	return out, nil
}

func (l list) eval(s Scope) (any, *Error) {
	out := make([]any, len(l.parts))
	for i, p := range l.parts {
		v, failed := p.eval(s)
		if failed != nil {
			return nil, failed
		}
		out[i] = v
	}
	return out, nil
}

// AsError returns the *Error in err, and nil if there is none.
func AsError(err error) *Error {
	e, _ := errors.AsType[*Error](err)
	return e
}
