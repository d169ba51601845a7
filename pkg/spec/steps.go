package spec

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/specql/mesh/pkg/spec/expr"
)

// stepKeys are the keys of each kind of step.
var stepKeys = map[string][]string{
	"call_service": {"service", "operation", "input", "as", "on_success", "on_failure", "timeout", "max_retries"},
	"parallel":     {"branches", "max_concurrency", "on_error"},
	"if":           {"condition", "then", "else"},
	"foreach":      {"items", "as", "max_concurrency", "do"},
	"validate":     {"conditions"},
	"update":       {"set"},
	"fail":         {"message"},
	"wait":         {"seconds", "until"},
	"await_signal": {"name", "timeout", "as"},
}

var stepKinds = []string{"call_service", "parallel", "if", "foreach", "validate", "update", "fail", "wait", "await_signal"}

const (
	maxConcurrency = 10_000
	// maxStepDepth bounds how deep steps hold steps.
	maxStepDepth = 40
)

// steps reads a list of steps. at is the place in the document, path the one in the action. A list that is there is never nil.
func (p *actionParser) steps(n *node, at, path string, depth int) []Step {
	if n.isNull() {
		return nil
	}
	if depth > maxStepDepth {
		p.errorf(n.pos, at, "move the inner steps into an action of their own", "steps are nested more than %d deep", maxStepDepth)
		return nil
	}
	out := []Step{}
	if n.kind == mappingNode && len(n.entries) == 1 && slices.Contains(stepKinds, n.entries[0].key) {
		p.errorf(n.pos, at, "write it behind a `- `", "must be a list of steps, is one step")
		return out
	}
	if !p.sequence(n, at) {
		return out
	}
	for i, item := range n.items {
		if s := p.step(item, indexPath(at, i), indexPath(path, i), depth); s != nil {
			out = append(out, s)
		}
	}
	return out
}

// step reads one step; nil next to a problem.
func (p *actionParser) step(n *node, at, path string, depth int) Step {
	if n.kind != mappingNode || len(n.entries) == 0 {
		mend := "begin it with one of: " + strings.Join(stepKinds, ", ")
		if s, ok := n.scalarString(); ok && slices.Contains(stepKinds, s) {
			mend = fmt.Sprintf("write `%s:` with its settings below", s)
		}
		p.errorf(n.pos, at, mend, "must be a step, is %s", n.describe())
		return nil
	}
	var kinds []*entry
	for i := range n.entries {
		if slices.Contains(stepKinds, n.entries[i].key) {
			kinds = append(kinds, &n.entries[i])
		}
	}
	if len(kinds) == 0 {
		e := n.entries[0]
		p.errorf(e.pos, keyPath(at, e.key), p.suggest(e.key, stepKinds), "unknown kind of step %q", clip(e.key))
		return nil
	}
	kind := kinds[0]
	for _, e := range n.entries {
		switch {
		case e.key == kind.key:
		case slices.Contains(stepKinds, e.key):
			p.errorf(e.pos, keyPath(at, e.key), "begin a new step with `- "+e.key+":`", "a step is of one kind, this one is also %s", kind.key)
		case slices.Contains(stepKeys[kind.key], e.key):
			p.errorf(e.pos, keyPath(at, e.key), "indent it further", "%q belongs below %s", e.key, kind.key)
		default:
			p.errorf(e.pos, keyPath(at, e.key), p.suggest(e.key, stepKeys[kind.key]), "unknown key %q", clip(e.key))
		}
	}
	b := &stepBuilder{actionParser: p, n: kind.value, at: keyPath(at, kind.key), base: stepBase{pos: n.pos, path: path, source: kind.value}, depth: depth + 1, entry: kind}
	return b.build(kind.key)
}

// stepBuilder reads the body of one step.
type stepBuilder struct {
	*actionParser
	n     *node
	at    string
	base  stepBase
	depth int
	entry *entry
}

func (b *stepBuilder) build(kind string) Step {
	switch kind { // the forms that are not a map
	case "parallel":
		if b.n.kind == sequenceNode {
			return &Parallel{stepBase: b.base, Branches: b.branches(b.n, b.at)}
		}
	case "validate":
		if b.n.kind == sequenceNode {
			return &Validate{stepBase: b.base, Conditions: b.conditions(b.n, b.at)}
		}
	case "fail":
		if s, ok := b.n.scalarString(); ok && s != "" {
			return &Fail{stepBase: b.base, Message: b.template(b.n, b.at)}
		}
	}
	if b.n.isNull() {
		b.errorf(b.entry.pos, b.at, "its keys are: "+strings.Join(stepKeys[kind], ", "), "is empty")
		return nil
	}
	if !b.mapping(b.n, b.at) {
		return nil
	}
	b.known(b.n, b.at, stepKeys[kind]...)
	switch kind {
	case "call_service":
		return b.callService()
	case "parallel":
		return b.parallel()
	case "if":
		return b.ifStep()
	case "foreach":
		return b.foreach()
	case "validate":
		return &Validate{stepBase: b.base, Conditions: b.conditions(b.need("conditions", "add `conditions:` with a list"), b.in("conditions"))}
	case "update":
		return b.update()
	case "fail":
		s := &Fail{stepBase: b.base}
		if n := b.need("message", "add `message:`"); n != nil {
			s.Message = b.template(n, b.in("message"))
		}
		return s
	case "wait":
		return b.wait()
	default:
		return b.awaitSignal()
	}
}

func (b *stepBuilder) in(key string) string { return keyPath(b.at, key) }

// need gives the value of a key and reports it if it is not there.
func (b *stepBuilder) need(key, mend string) *node {
	n := b.n.get(key)
	if n.isNull() {
		pos := b.entry.pos
		if e := b.n.entry(key); e != nil {
			pos = e.pos
		}
		b.errorf(pos, b.at, mend, "the key %q is missing", key)
		return nil
	}
	return n
}

// inner reads the steps below a key.
func (b *stepBuilder) inner(key string) []Step {
	n := b.n.get(key)
	if n.isNull() && b.n.entry(key) != nil {
		return []Step{}
	}
	return b.steps(n, b.in(key), b.base.path+"."+key, b.depth)
}

func (b *stepBuilder) callService() Step {
	s := &CallService{stepBase: b.base}
	if n := b.need("service", "add `service:`"); n != nil {
		s.Service, _ = b.name(n, b.in("service"))
	}
	if n := b.need("operation", "add `operation:`"); n != nil {
		s.Operation, _ = b.name(n, b.in("operation"))
	}
	if n := b.n.get("input"); !n.isNull() {
		if text, isString := n.scalarString(); n.kind == mappingNode || isString && strings.HasPrefix(text, "$") {
			s.Input = b.template(n, b.in("input"))
		} else {
			b.errorf(n.pos, b.in("input"), "", "must be a map or a reference to one, is %s", n.describe())
		}
	}
	s.As = b.as("")
	s.OnSuccess, s.OnFailure = b.inner("on_success"), b.inner("on_failure")
	if n := b.n.get("timeout"); n != nil {
		if d, ok := b.seconds(n, b.in("timeout")); ok {
			s.Timeout = &d
		}
	}
	if n := b.n.get("max_retries"); n != nil {
		if i, ok := b.integer(n, b.in("max_retries"), 0, maxRetries); ok {
			s.MaxRetries = &i
		}
	}
	return s
}

// as reads the name of a result.
func (b *stepBuilder) as(fallback string) string {
	n := b.n.get("as")
	if n == nil {
		return fallback
	}
	name, ok := b.identifier(n, b.in("as"))
	if ok && slices.Contains(reservedRoots, name) && !(name == "item" && fallback == "item") {
		b.errorf(n.pos, b.in("as"), "choose another name", "$%s is always something else", name)
	}
	return name
}

// reservedRoots are the roots that come before all others.
var reservedRoots = []string{"input", "entity", "response", "error", "item", "run"}

func (b *stepBuilder) concurrency(fallback int) int {
	n := b.n.get("max_concurrency")
	if n == nil {
		return fallback
	}
	if i, ok := b.integer(n, b.in("max_concurrency"), 1, maxConcurrency); ok {
		return i
	}
	return fallback
}

func (b *stepBuilder) parallel() Step {
	s := &Parallel{stepBase: b.base, MaxConcurrency: b.concurrency(0)}
	if n := b.need("branches", "add `branches:` with a list"); n != nil && b.sequence(n, b.in("branches")) {
		s.Branches = b.branches(n, b.in("branches"))
	}
	if n := b.n.get("on_error"); n != nil {
		if mode, ok := b.text(n, b.in("on_error")); ok {
			switch mode {
			case "fail_fast":
			case "wait_all":
				s.WaitAll = true
			default:
				b.errorf(n.pos, b.in("on_error"), b.suggest(mode, []string{"fail_fast", "wait_all"}), "must be fail_fast or wait_all, is %q", clip(mode))
			}
		}
	}
	return s
}

// branches reads a list in which each item is a step or a list of steps.
func (b *stepBuilder) branches(n *node, at string) [][]Step {
	out := make([][]Step, 0, len(n.items))
	if len(n.items) == 0 {
		b.errorf(n.pos, at, "add a step", "holds no steps")
	}
	for i, item := range n.items {
		here, path := indexPath(at, i), indexPath(b.base.path+".branches", i)
		if item.kind == sequenceNode {
			out = append(out, b.steps(item, here, path+".steps", b.depth))
			continue
		}
		if b.depth > maxStepDepth {
			b.errorf(item.pos, here, "move the inner steps into an action of their own", "steps are nested more than %d deep", maxStepDepth)
			return out
		}
		if s := b.step(item, here, path, b.depth); s != nil {
			out = append(out, []Step{s})
		}
	}
	return out
}

func (b *stepBuilder) ifStep() Step {
	s := &If{stepBase: b.base}
	if n := b.need("condition", "add `condition:`"); n != nil {
		s.Condition = b.condition(n, b.in("condition"))
	}
	s.Then, s.Else = b.inner("then"), b.inner("else")
	if b.n.get("then") == nil && b.n.get("else") == nil {
		b.errorf(b.entry.pos, b.at, "add `then:` with a list of steps", "the key %q is missing", "then")
	}
	return s
}

func (b *stepBuilder) foreach() Step {
	s := &Foreach{stepBase: b.base, As: b.as("item"), MaxConcurrency: b.concurrency(1)}
	if n := b.need("items", "add `items:`, a list or a reference to one"); n != nil {
		if text, isString := n.scalarString(); n.kind == sequenceNode || isString && strings.HasPrefix(text, "$") {
			s.Items = b.template(n, b.in("items"))
		} else {
			b.errorf(n.pos, b.in("items"), "write a list, or a reference such as `$input.files`", "must be a list or a reference to one, is %s", n.describe())
		}
	}
	s.Do = b.inner("do")
	if b.n.get("do") == nil {
		b.errorf(b.entry.pos, b.at, "add `do:` with a list of steps", "the key %q is missing", "do")
	}
	return s
}

func (b *stepBuilder) update() Step {
	s := &Update{stepBase: b.base}
	n := b.need("set", "add `set:` with fields and values")
	if n == nil || !b.mapping(n, b.in("set")) {
		return s
	}
	for _, e := range n.entries {
		here := keyPath(b.in("set"), e.key)
		if b.entity != nil {
			b.checkField(b.entity, e, here)
		}
		if t := b.template(e.value, here); t != nil {
			if s.Set == nil {
				s.Set = map[string]*expr.Template{}
			}
			s.Set[e.key] = t
		}
	}
	if len(n.entries) == 0 {
		b.errorf(n.pos, b.in("set"), "", "sets no field")
	}
	return s
}

// checkField reports a field that an update cannot set.
func (b *stepBuilder) checkField(entity *Entity, e entry, path string) {
	field := entity.Field(e.key)
	switch {
	case field == nil:
		b.errorf(e.pos, path, b.suggest(e.key, entity.FieldNames()), "the entity %s has no field %q", entity.Name, clip(e.key))
	case field.Name == primaryKey:
		b.errorf(e.pos, path, "", "the primary key cannot be changed")
	}
}

func (b *stepBuilder) wait() Step {
	s := &Wait{stepBase: b.base}
	seconds, until := b.n.get("seconds"), b.n.get("until")
	switch {
	case !seconds.isNull() && !until.isNull():
		b.errorf(b.n.entry("until").pos, b.in("until"), "keep one of the two", "`seconds` and `until` exclude each other")
	case !seconds.isNull():
		if _, isString := seconds.scalarString(); isString {
			s.Seconds = b.template(seconds, b.in("seconds"))
			b.literalProblem(seconds, b.in("seconds"), s.Seconds, "must be a number of seconds", isSeconds)
		} else if f, ok := seconds.number(); !ok || f < 0 || f > maxSeconds {
			b.errorf(seconds.pos, b.in("seconds"), "", "must be a number of seconds, at most %d, or a reference to one", maxSeconds)
		} else {
			s.Seconds = b.template(seconds, b.in("seconds"))
		}
	case !until.isNull():
		if _, isString := until.scalarString(); !isString {
			b.errorf(until.pos, b.in("until"), "write a time such as \"2030-01-31T12:00:00Z\"", "must be a timestamp or a reference to one, is %s", until.describe())
			break
		}
		s.Until = b.template(until, b.in("until"))
		b.literalProblem(until, b.in("until"), s.Until, "must be a timestamp such as \"2030-01-31T12:00:00Z\"", isTimestamp)
	default:
		b.errorf(b.entry.pos, b.at, "add `seconds:`", "one of the keys \"seconds\" and \"until\" is missing")
	}
	return s
}

func (b *stepBuilder) awaitSignal() Step {
	s := &AwaitSignal{stepBase: b.base, As: b.as("")}
	if n := b.need("name", "add `name:`"); n != nil {
		s.Name, _ = b.name(n, b.in("name"))
	}
	if n := b.n.get("timeout"); !n.isNull() {
		if n.kind != scalarNode {
			b.errorf(n.pos, b.in("timeout"), "write seconds, or a time such as `2h`", "must be a time, is %s", n.describe())
			return s
		}
		s.Timeout = b.template(n, b.in("timeout"))
		b.literalProblem(n, b.in("timeout"), s.Timeout, "must be a number of seconds or a time such as `2h`", isSeconds, isDuration)
	}
	return s
}

// literalProblem reports a template without references whose value none of the checks accepts.
func (b *stepBuilder) literalProblem(n *node, path string, t *expr.Template, message string, checks ...func(any) bool) {
	if t == nil {
		return
	}
	v, literal := t.Literal()
	if literal && !slices.ContainsFunc(checks, func(check func(any) bool) bool { return check(v) }) {
		b.errorf(n.pos, path, "", "%s", message)
	}
}

func isSeconds(v any) bool {
	switch v := v.(type) {
	case int64:
		return v >= 0 && v <= maxSeconds
	case float64:
		return v >= 0 && v <= maxSeconds
	}
	return false
}

func isDuration(v any) bool {
	s, _ := v.(string)
	d, err := time.ParseDuration(s)
	return err == nil && d >= 0 && d <= maxSeconds*time.Second
}

func isTimestamp(v any) bool {
	s, _ := v.(string)
	_, err := time.Parse(time.RFC3339Nano, s)
	return err == nil
}
