package engine

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/spec/expr"
	"github.com/specql/mesh/services/orchestrator/internal/plan"
)

// frame is where a walk is within the loops around it; nil outside of any.
type frame struct {
	// key of this iteration, such as steps[4].items[2].
	key    string
	loop   *plan.Foreach
	index  int
	item   any
	parent *frame
}

// keyed is a node that has a key of its own in each iteration.
type keyed interface {
	plan.Node
	Rel() string
}

// key of a node in a frame: its path, with the iterations of the loops around it.
func (f *frame) of(n keyed) string {
	if f == nil {
		return n.Path()
	}
	return f.key + "." + n.Rel()
}

func iteration(loopKey string, i int) string { return loopKey + ".items[" + strconv.Itoa(i) + "]" }

// around finds the frame of a loop; nil where the walk is not in it.
func (f *frame) around(loop *plan.Foreach) *frame {
	for x := f; x != nil; x = x.parent {
		if x.loop == loop {
			return x
		}
	}
	return nil
}

// eval evaluates a template where the walk is.
func (r *run) eval(t *plan.Template, f *frame) (any, error) {
	if t == nil {
		return nil, nil
	}
	return t.Eval(&scope{r: r, f: f, bindings: t.Bindings})
}

func (r *run) holds(c *plan.Condition, f *frame) (bool, error) {
	return c.Eval(&scope{r: r, f: f, bindings: c.Bindings, fields: c.Fields})
}

// scope gives the names of one expression their values.
type scope struct {
	r        *run
	f        *frame
	bindings map[string]*plan.Binding
	fields   map[string]bool
}

var _ expr.BareScope = (*scope)(nil)

// LookupBare implements expr.BareScope: in preconditions a name without $ is a field.
func (s *scope) LookupBare(name string) (any, bool) {
	if !s.fields[name] {
		return s.Lookup(name)
	}
	s.r.mu.Lock()
	defer s.r.mu.Unlock()
	return s.r.entityRow[name], true
}

// Roots implements expr.Scope.
func (s *scope) Roots() []string {
	out := make([]string, 0, len(s.bindings))
	for name := range s.bindings {
		if _, ok := s.Lookup(name); ok {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// Lookup implements expr.Scope.
func (s *scope) Lookup(name string) (any, bool) {
	b := s.bindings[name]
	if b == nil {
		return nil, false
	}
	r := s.r
	r.mu.Lock()
	defer r.mu.Unlock()
	switch b.Source {
	case plan.FromInput:
		return r.input, true
	case plan.FromEntity:
		return r.entityRow, r.entityRow != nil
	case plan.FromResponse:
		return r.response(b.Call, s.f)
	case plan.FromError:
		res := r.results[s.key(b.Call)]
		if res == nil || res.err == nil {
			return nil, false
		}
		return errorValue(res.err), true
	case plan.FromItem:
		if x := s.f.around(b.Foreach); x != nil {
			return x.item, true
		}
		return nil, false
	case plan.FromRun:
		return map[string]any{"id": r.id, "started_at": r.state.StartedAt.UTC().Format(time.RFC3339Nano)}, true
	case plan.FromNames:
		for _, n := range b.Named {
			if v, ok := r.response(n, s.f); ok {
				return v, true
			}
		}
		if v, ok := r.input[name]; ok {
			return v, true
		}
		for _, n := range b.Calls {
			if v, ok := r.response(n, s.f); ok {
				return v, true
			}
		}
		if x := s.f.around(b.Index); b.Index != nil && x != nil {
			return int64(x.index), true
		}
		if b.Fallback != nil {
			return r.response(b.Fallback, s.f)
		}
	}
	return nil, false
}

func (s *scope) key(c *plan.Call) string {
	if loop := plan.In(c); loop != nil {
		if x := s.f.around(loop); x != nil {
			return x.of(c)
		}
	}
	return c.Path()
}

func errorValue(e *fault.Error) map[string]any {
	return map[string]any{
		"code": string(e.Code), "message": e.Message, "retryable": e.Retryable, "attempts": int64(e.Attempts),
	}
}

// response is what a call or signal gave, as seen from a frame; from outside of a loop, the
// list of what each iteration gave. r.mu is held.
func (r *run) response(n plan.Node, f *frame) (any, bool) {
	k, ok := n.(keyed)
	if !ok {
		return nil, false
	}
	loop := plan.In(n)
	if loop == nil {
		return r.given(n.Path())
	}
	if x := f.around(loop); x != nil {
		return r.given(x.of(k))
	}
	keys := r.iterations(loop, f)
	if len(keys) == 0 {
		// A loop over nothing gave nothing; one that was not reached has no count.
		for x := loop; x != nil && f.around(x) == nil; x = plan.In(x) {
			if _, reached := r.counts[r.loopKey(x, f)]; reached {
				return []any{}, true
			}
		}
		return nil, false
	}
	list := make([]any, len(keys))
	for i, key := range keys {
		list[i], _ = r.given(key + "." + k.Rel())
	}
	return list, true
}

func (r *run) given(key string) (any, bool) {
	res := r.results[key]
	if res == nil || res.err != nil {
		return nil, false
	}
	return res.output, true
}

func (r *run) loopKey(loop *plan.Foreach, f *frame) string {
	outer := plan.In(loop)
	if outer == nil {
		return loop.Path()
	}
	if x := f.around(outer); x != nil {
		return x.of(loop)
	}
	return loop.Path()
}

// iterations are the keys of every iteration of a loop that can be seen from a frame.
func (r *run) iterations(loop *plan.Foreach, f *frame) []string {
	bases := []string{r.loopKey(loop, f)}
	if outer := plan.In(loop); outer != nil && f.around(outer) == nil {
		bases = nil
		for _, key := range r.iterations(outer, f) {
			bases = append(bases, key+"."+loop.Rel())
		}
	}
	var out []string
	for _, base := range bases {
		for i := range r.counts[base] {
			out = append(out, iteration(base, i))
		}
	}
	return out
}

// depth is how deep a JSON text is nested.
func depth(raw []byte) int {
	deepest, now, quoted := 0, 0, false
	for i := 0; i < len(raw); i++ {
		switch c := raw[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '{' || c == '[':
			now++
			deepest = max(deepest, now)
		case c == '}' || c == ']':
			now--
		}
	}
	return deepest
}

// clip cuts a text at a number of bytes, at the border of a character.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + "…"
}

// decode reads a JSON value; numbers keep their digits.
func decode(raw json.RawMessage) (any, error) {
	if len(bytes.TrimSpace(raw)) == 0 {
		return nil, nil
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		return nil, fmt.Errorf("not JSON: %w", err)
	}
	if rest := raw[d.InputOffset():]; len(bytes.TrimLeft(rest, " \t\r\n")) > 0 {
		return nil, errors.New("not JSON: more than one value")
	}
	return v, nil
}

func decodeObject(raw json.RawMessage) (map[string]any, error) {
	v, err := decode(raw)
	if err != nil {
		return nil, err
	}
	switch v := v.(type) {
	case nil:
		return map[string]any{}, nil
	case map[string]any:
		return v, nil
	}
	return nil, fmt.Errorf("%T in place of a JSON object", v)
}
