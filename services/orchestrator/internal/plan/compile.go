package plan

import (
	"encoding/json"
	"fmt"
	"slices"
	"sort"
	"strings"

	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/pkg/spec/expr"
)

// Compile makes the plan of an action. The entity is nil for a workflow of its own. A plan
// comes back only where no problem is an error; warnings come with it.
func Compile(a *spec.Action, e *spec.Entity, reg *spec.Registry) (*Plan, spec.Problems) {
	c := &compiler{reg: reg, entity: e, plan: &Plan{Entity: e, Action: a}, as: map[string][]spec.Step{}}
	root := &scope{}
	for i, cond := range a.Preconditions {
		c.plan.Preconditions = append(c.plan.Preconditions, c.condition(cond, place{of: a, rel: fmt.Sprintf("preconditions[%d]", i)}, &scope{preconditions: true}))
	}
	c.plan.Nodes, root = c.sequence(a.Steps, root, "")
	if a.Output != nil {
		c.plan.Output = c.template(a.Output, place{of: a, rel: "output"}, root)
	}
	if c.problems.HasErrors() {
		// Names that no input can be known to give are told with the rest.
		c.problems = append(c.problems, c.plan.OpenNames()...)
		c.problems.Sort()
		return nil, c.problems
	}
	c.problems.Sort()
	return c.plan, c.problems
}

// CheckInput reports the names that the action uses and that this input does not give.
func (p *Plan) CheckInput(input map[string]any) spec.Problems {
	var out spec.Problems
	for _, n := range p.needs {
		if _, ok := input[n.root]; ok {
			continue
		}
		if len(out) == maxProblems {
			break
		}
		out = append(out, p.unknown(n, input))
	}
	return out
}

// OpenNames reports the names that only the input can give and that the action does not
// declare: errors where it declares an input, warnings where it declares none.
func (p *Plan) OpenNames() spec.Problems {
	var declared []string
	if p.Action.Input != nil {
		declared = p.Action.Input.Keys()
	}
	var out spec.Problems
	for _, n := range p.needs {
		if slices.Contains(declared, n.root) {
			continue
		}
		if len(out) == maxProblems {
			break
		}
		keys := map[string]any{}
		for _, k := range declared {
			keys[k] = nil
		}
		problem := p.unknown(n, keys)
		if p.Action.Input == nil {
			problem.Warning = true
			problem.Message = fmt.Sprintf("$%s is no call and no root: it has to be a key of the input", n.root)
			problem.Mend = fmt.Sprintf("declare it: `input: {%s: any}`", n.root)
		}
		out = append(out, problem)
	}
	return out
}

// Bounds of what is said about unknown names.
const (
	maxProblems = 100
	maxNames    = 1000
	maxListed   = 20
)

// listed is as much of a list as a message holds.
func listed(names []string) []string {
	if len(names) <= maxListed {
		return names
	}
	return append(slices.Clone(names[:maxListed]), "…")
}

func (p *Plan) unknown(n need, input map[string]any) spec.Problem {
	names := n.from.names(p.Entity)
	for k := range input {
		if len(names) == maxNames {
			break
		}
		names = append(names, k)
	}
	sort.Strings(names)
	names = slices.Compact(names)
	mend := "names there are: $" + strings.Join(listed(names), ", $")
	if guess := spec.DidYouMean(n.root, names); guess != "" {
		mend = "did you mean $" + guess + "? " + mend
	}
	if n.from.preconditions && p.Entity != nil {
		fields := p.Entity.FieldNames()
		return spec.Problem{
			Position: n.pos, Path: n.path, Mend: hint(n.root, fields, "fields"),
			Message: fmt.Sprintf("%s is no field of %s, no root and no key of the input", n.root, p.Entity.Name),
		}
	}
	return spec.Problem{
		Position: n.pos, Path: n.path,
		Message: fmt.Sprintf("$%s is unknown here: no root, no key of the input, no earlier call", n.root),
		Mend:    mend,
	}
}

// scope is what a place in the action can see.
type scope struct {
	seen          *seen
	response      *Call // innermost call whose on_success this is
	failed        *Call // innermost call whose on_failure this is
	foreach       *Foreach
	outer         *scope // scope around foreach
	preconditions bool
}

// seen is a list of the calls, signals and loops before a place, nearest first.
type seen struct {
	node Node
	prev *seen
}

func (s *scope) with(nodes ...Node) *scope {
	next := *s
	for _, n := range nodes {
		for _, named := range collect(n) {
			next.seen = &seen{node: named, prev: next.seen}
		}
	}
	return &next
}

// collect returns a node's calls and signals, itself included, in document order.
func collect(n Node) []Node {
	var out []Node
	list := func(nodes []Node) {
		for _, c := range nodes {
			out = append(out, collect(c)...)
		}
	}
	switch n := n.(type) {
	case *Call:
		out = append(out, n)
		list(n.OnSuccess)
		list(n.OnFailure)
	case *Parallel:
		for _, b := range n.Branches {
			list(b)
		}
	case *If:
		list(n.Then)
		list(n.Else)
	case *Foreach:
		list(n.Do)
	case *AwaitSignal:
		out = append(out, n)
	}
	return out
}

func (s *scope) names(e *spec.Entity) []string {
	out := []string{"input", "run"}
	if e != nil {
		out = append(out, "entity", e.Name)
	}
	for f := s; f != nil && f.foreach != nil; f = f.outer {
		out = append(out, f.foreach.As)
	}
	if s.response != nil {
		out = append(out, "response")
	}
	if s.failed != nil {
		out = append(out, "error")
	}
	for x := s.seen; x != nil && len(out) < maxNames; x = x.prev {
		switch n := x.node.(type) {
		case *Call:
			out = append(out, n.Operation.Name, n.Service.Name)
			if n.As != "" {
				out = append(out, n.As)
			}
		case *AwaitSignal:
			out = append(out, n.As)
		}
	}
	return out
}

// place is a value in the document: of a step, or of the action itself.
type place struct {
	of interface {
		PositionOf(path string) spec.Position
	}
	abs string // path of what the value belongs to; empty for the action
	rel string // path of the value in it
}

func (p place) add(rel string) place {
	if p.rel != "" && rel != "" && rel[0] != '[' {
		rel = "." + rel
	}
	p.rel += rel
	return p
}

func (p place) pos() spec.Position { return p.of.PositionOf(p.rel) }

func (p place) path() string {
	if p.abs == "" || p.rel == "" {
		return p.abs + p.rel
	}
	return p.abs + "." + p.rel
}

func of(step spec.Step, rel string) place {
	return place{of: step, abs: step.Path() + "." + step.Kind(), rel: rel}
}

type compiler struct {
	reg      *spec.Registry
	entity   *spec.Entity
	plan     *Plan
	problems spec.Problems
	as       map[string][]spec.Step
}

func (c *compiler) problem(pos spec.Position, path, mend, format string, args ...any) {
	c.problems = append(c.problems, spec.Problem{Position: pos, Path: path, Message: fmt.Sprintf(format, args...), Mend: mend})
}

func (c *compiler) warn(pos spec.Position, path, mend, format string, args ...any) {
	c.problems = append(c.problems, spec.Problem{Position: pos, Path: path, Message: fmt.Sprintf(format, args...), Mend: mend, Warning: true})
}

// sequence compiles steps that follow each other; the scope that comes back sees them all.
func (c *compiler) sequence(steps []spec.Step, s *scope, cut string) ([]Node, *scope) {
	nodes := make([]Node, 0, len(steps))
	for _, step := range steps {
		n := c.step(step, s, cut)
		if n == nil {
			continue
		}
		nodes = append(nodes, n)
		s = s.with(n)
	}
	return nodes, s
}

func (c *compiler) step(step spec.Step, s *scope, cut string) Node {
	b := base{path: step.Path(), rel: strings.TrimPrefix(strings.TrimPrefix(step.Path(), cut), ".")}
	pos := step.Pos()
	switch st := step.(type) {
	case *spec.CallService:
		if n := c.call(st, b, s, cut); n != nil {
			return n
		}
		return nil
	case *spec.Parallel:
		n := &Parallel{base: b, MaxConcurrency: st.MaxConcurrency, WaitAll: st.WaitAll}
		for _, branch := range st.Branches {
			nodes, _ := c.sequence(branch, s, cut)
			n.Branches = append(n.Branches, nodes)
		}
		return n
	case *spec.If:
		n := &If{base: b, Condition: c.condition(st.Condition, of(st, "condition"), s)}
		n.Then, _ = c.sequence(st.Then, s, cut)
		n.Else, _ = c.sequence(st.Else, s, cut)
		return n
	case *spec.Foreach:
		n := &Foreach{base: b, As: st.As, MaxConcurrency: max(1, st.MaxConcurrency), in: s.foreach}
		n.Items = c.template(st.Items, of(st, "items"), s)
		if n.As == "" {
			n.As = "item"
		}
		inner := *s
		inner.foreach, inner.outer = n, s
		n.Do, _ = c.sequence(st.Do, &inner, b.path)
		return n
	case *spec.Validate:
		n := &Validate{base: b}
		for i, cond := range st.Conditions {
			n.Conditions = append(n.Conditions, c.condition(cond, of(st, fmt.Sprintf("conditions[%d]", i)), s))
		}
		return n
	case *spec.Update:
		return c.update(st, b, s)
	case *spec.Fail:
		return &Fail{base: b, Message: c.template(st.Message, of(st, "message"), s)}
	case *spec.Wait:
		return &Wait{base: b, Seconds: c.template(st.Seconds, of(st, "seconds"), s), Until: c.template(st.Until, of(st, "until"), s)}
	case *spec.AwaitSignal:
		n := &AwaitSignal{base: b, Name: st.Name, As: st.As, Timeout: c.template(st.Timeout, of(st, "timeout"), s), in: s.foreach}
		if n.As == "" {
			n.As = n.Name
		}
		return n
	}
	c.problem(pos, b.path, "", "a step of an unknown kind %T", step)
	return nil
}

func (c *compiler) update(st *spec.Update, b base, s *scope) Node {
	n := &Update{base: b}
	if c.entity == nil {
		c.problem(st.Pos(), b.path, "move the workflow into an entity's actions", "update needs an entity, and a workflow of its own has none")
		return n
	}
	c.plan.UsesEntity = true
	for _, field := range st.Fields() {
		n.Set = append(n.Set, Assignment{Field: field, Value: c.template(st.Set[field], of(st, "set."+field), s)})
	}
	return n
}

func (c *compiler) call(st *spec.CallService, b base, s *scope, cut string) *Call {
	svc := c.reg.Service(st.Service)
	var op *spec.Operation
	if svc == nil {
		names := make([]string, 0, len(c.reg.Services))
		for _, sv := range c.reg.Services {
			names = append(names, sv.Name)
		}
		c.problem(of(st, "service").pos(), of(st, "service").path(), hint(st.Service, names, "services"), "no service %q in the registry", st.Service)
	} else if op = svc.Operation(st.Operation); op == nil {
		names := make([]string, 0, len(svc.Operations))
		for _, o := range svc.Operations {
			names = append(names, o.Name)
		}
		c.problem(of(st, "operation").pos(), of(st, "operation").path(), hint(st.Operation, names, "operations"), "service %s has no operation %q", svc.Name, st.Operation)
	}
	if svc == nil || op == nil {
		// Names that refer to this call would only repeat the problem.
		svc, op = &spec.Service{Name: st.Service}, &spec.Operation{Name: st.Operation}
	}
	n := &Call{
		base: b, Service: svc, Operation: op, As: st.As, Handled: st.OnFailure != nil,
		Timeout: op.Timeout, MaxRetries: op.MaxRetries, Retry: svc.Retry(), in: s.foreach,
		RunnerConfig: object(svc.RunnerConfig), SecurityPolicy: object(svc.SecurityPolicy), OperationConfig: object(op.Config),
	}
	if st.Timeout != nil {
		n.Timeout = *st.Timeout
	}
	if st.MaxRetries != nil {
		n.MaxRetries = st.MaxRetries
	}
	if st.As != "" {
		for _, first := range c.as[st.As] {
			if !exclusive(first.Path(), b.path) {
				c.problem(of(st, "as").pos(), of(st, "as").path(), "choose another name", "the name %q is taken by the call on line %d", st.As, first.Pos().Line)
				break
			}
		}
		c.as[st.As] = append(c.as[st.As], st)
	}
	n.Input = c.template(st.Input, of(st, "input"), s)
	success := s.with(n)
	success.response = n
	n.OnSuccess, _ = c.sequence(st.OnSuccess, success, cut)
	failure := s.with(n)
	failure.failed = n
	n.OnFailure, _ = c.sequence(st.OnFailure, failure, cut)
	return n
}

// exclusive reports whether two steps never run both: they stand in branches of one if, or
// in what follows a call's success and what follows its failure.
func exclusive(a, b string) bool {
	as, bs := strings.Split(a, "."), strings.Split(b, ".")
	for i := range min(len(as), len(bs)) {
		if as[i] == bs[i] {
			continue
		}
		x, _, _ := strings.Cut(as[i], "[")
		y, _, _ := strings.Cut(bs[i], "[")
		pair := x + " " + y
		return pair == "then else" || pair == "else then" || pair == "on_success on_failure" || pair == "on_failure on_success"
	}
	return false
}

func hint(name string, names []string, what string) string {
	sort.Strings(names)
	if len(names) == 0 {
		return "there are no " + what
	}
	all := what + " there are: " + strings.Join(listed(names), ", ")
	if guess := spec.DidYouMean(name, names[:min(len(names), maxNames)]); guess != "" {
		return "did you mean " + guess + "? " + all
	}
	return all
}

func object(m map[string]any) []byte {
	if len(m) == 0 {
		return []byte("{}")
	}
	b, err := json.Marshal(m)
	if err != nil {
		// Values come from YAML, which has only what JSON can say once spec has read it.
		return []byte("{}")
	}
	return b
}

func (c *compiler) template(t *expr.Template, at place, s *scope) *Template {
	if t == nil {
		return nil
	}
	bindings, _ := c.bind(t.Refs(), at, s)
	return &Template{Template: t, Bindings: bindings}
}

func (c *compiler) condition(cond *expr.Condition, at place, s *scope) *Condition {
	if cond == nil {
		return nil
	}
	bindings, fields := c.bind(cond.Refs(), at, s)
	return &Condition{Condition: cond, Bindings: bindings, Fields: fields}
}

// bind says what each name means, and which names without $ are fields of the entity.
func (c *compiler) bind(refs []expr.Ref, at place, s *scope) (bindings map[string]*Binding, fields map[string]bool) {
	bindings, fields = make(map[string]*Binding, len(refs)), map[string]bool{}
	for _, r := range refs {
		if r.Bare && s.preconditions && c.entity != nil && c.entity.Field(r.Root) != nil {
			c.plan.UsesEntity = true
			fields[r.Root] = true
			continue
		}
		if _, done := bindings[r.Root]; !done {
			bindings[r.Root] = c.root(r.Root, at.add(r.At), s)
		}
		if bindings[r.Root].Source == FromEntity {
			c.field(r, at.add(r.At))
		}
	}
	return bindings, fields
}

// field checks that the entity has the field that a reference begins with.
func (c *compiler) field(r expr.Ref, at place) {
	name := strings.FieldsFunc(r.Path, func(c rune) bool { return c == '.' || c == '[' })
	if c.entity == nil || len(name) == 0 || r.Tested || c.entity.Field(name[0]) != nil {
		return
	}
	names := c.entity.FieldNames()
	c.problem(at.pos(), at.path(), hint(name[0], names, "fields"), "%s has no field %s", c.entity.Name, name[0])
}

// root decides what a name means; the order is the contract's.
func (c *compiler) root(name string, at place, s *scope) *Binding {
	entity := func() *Binding {
		c.plan.UsesEntity = true
		return &Binding{Source: FromEntity}
	}
	switch {
	case name == "input":
		return &Binding{Source: FromInput}
	case name == "entity":
		if c.entity == nil {
			c.problem(at.pos(), at.path(), "move the workflow into an entity's actions, or pass the row in the input", "$entity needs an entity, and a workflow of its own has none")
		}
		return entity()
	case c.entity != nil && strings.EqualFold(name, c.entity.Name):
		return entity()
	case name == "response" && s.response != nil:
		return &Binding{Source: FromResponse, Call: s.response}
	case name == "error" && s.failed != nil:
		return &Binding{Source: FromError, Call: s.failed}
	}
	for f := s; f != nil && f.foreach != nil; f = f.outer {
		if name == f.foreach.As || name == "item" {
			return &Binding{Source: FromItem, Foreach: f.foreach}
		}
	}
	if name == "run" {
		return &Binding{Source: FromRun}
	}
	b := &Binding{Source: FromNames}
	var byService []Node
	for x := s.seen; x != nil; x = x.prev {
		switch n := x.node.(type) {
		case *Call:
			if n.As == name {
				b.Named = append(b.Named, n)
			}
			if n.Operation.Name == name {
				b.Calls = append(b.Calls, n)
			} else if strings.EqualFold(n.Service.Name, name) {
				byService = append(byService, n)
			}
		case *AwaitSignal:
			if n.As == name {
				b.Named = append(b.Named, n)
			}
		}
	}
	b.Calls = append(b.Calls, byService...)
	if name == "index" && s.foreach != nil {
		b.Index = s.foreach
	}
	if len(b.Named) > 0 || len(b.Calls) > 0 || b.Index != nil {
		return b
	}
	declared := c.plan.Action.Input != nil && slices.Contains(c.plan.Action.Input.Keys(), name)
	if s.response != nil && name != "error" && name != "response" {
		b.Fallback = s.response
		if !declared {
			c.warn(at.pos(), at.path(), fmt.Sprintf("write $response, or name the call with `as: %s`", name),
				"$%s is taken as the response of %s, the call around", name, s.response.Operation.Name)
		}
		return b
	}
	c.plan.needs = append(c.plan.needs, need{root: name, pos: at.pos(), path: at.path(), from: s})
	return b
}
