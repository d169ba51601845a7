package spec

import (
	"errors"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/specql/mesh/pkg/spec/expr"
)

// Action is a named list of steps: an action of an entity, or a workflow of its own.
type Action struct {
	Name        string
	Description string
	// Input is nil where anything goes.
	Input *Schema
	// Output is nil where the action gives nothing.
	Output *expr.Template
	// Preconditions must all hold before the first step. A name without `$` in them is a field of the entity.
	Preconditions []*expr.Condition
	Steps         []Step
	Position

	source *node
}

// PositionOf gives the place of a value of the action, such as `output.id` or `preconditions[0]`, and that of its nearest parent where it is
// not in the document.
func (a *Action) PositionOf(path string) Position { return a.source.positionOf(a.Position, path) }

// Step is one of *CallService, *Parallel, *If, *Foreach, *Validate, *Update, *Fail, *Wait and *AwaitSignal.
type Step interface {
	// Pos is the step's place in the file.
	Pos() Position
	// Path is the step's place in its action, such as `steps[0].on_success[1]`. It stays the same as long as the steps around it do.
	Path() string
	// Kind is the key by which the step is written, such as `call_service`.
	Kind() string
	// PositionOf gives the place of a value of the step, such as `service` or `input.lines[0].price`, and that of its nearest parent
	// where it is not in the document.
	PositionOf(path string) Position
	step()
}

// stepBase is what all steps share.
type stepBase struct {
	pos    Position
	path   string
	source *node
}

func (s stepBase) Pos() Position { return s.pos }
func (s stepBase) Path() string  { return s.path }
func (stepBase) step()           {}

func (s stepBase) PositionOf(path string) Position { return s.source.positionOf(s.pos, path) }

// CallService calls an operation of a service.
type CallService struct {
	stepBase
	Service, Operation string
	// Input gives an object; nil for none.
	Input *expr.Template
	// As names the response for later steps; empty for none.
	As string
	// OnSuccess and OnFailure are the steps that follow. A nil OnFailure lets a failure fail the run, an empty one takes it as handled.
	OnSuccess, OnFailure []Step
	// Timeout and MaxRetries go over those of the operation; nil leaves these.
	Timeout    *time.Duration
	MaxRetries *int
}

// Parallel runs branches at the same time.
type Parallel struct {
	stepBase
	// Branches are lists of steps. A step that is a branch by itself has the path `….branches[0]`, one in a list `….branches[0].steps[1]`.
	Branches [][]Step
	// MaxConcurrency bounds the branches that run at a time; 0 is no bound.
	MaxConcurrency int
	// WaitAll lets the other branches end when one fails, rather than cancel them.
	WaitAll bool
}

// If runs one of two lists of steps.
type If struct {
	stepBase
	Condition  *expr.Condition
	Then, Else []Step
}

// Foreach runs steps for each item of a list.
type Foreach struct {
	stepBase
	// Items gives a list.
	Items *expr.Template
	// As is the root that holds the item, by default `item`.
	As string
	// MaxConcurrency bounds the items that are worked on at a time, by default 1.
	MaxConcurrency int
	Do             []Step
}

// Validate fails the run unless all conditions hold.
type Validate struct {
	stepBase
	Conditions []*expr.Condition
}

// Update changes fields of the entity.
type Update struct {
	stepBase
	// Set holds the new values by field.
	Set map[string]*expr.Template
}

// Fields lists what is set, sorted.
func (u *Update) Fields() []string {
	names := make([]string, 0, len(u.Set))
	for name := range u.Set {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Fail fails the run, or is handled as any failure.
type Fail struct {
	stepBase
	Message *expr.Template
}

// Wait lets time pass. One of Seconds and Until is set.
type Wait struct {
	stepBase
	// Seconds gives a number.
	Seconds *expr.Template
	// Until gives a timestamp (RFC 3339).
	Until *expr.Template
}

// AwaitSignal waits for somebody to send a signal to the run.
type AwaitSignal struct {
	stepBase
	Name string
	// Timeout gives a number of seconds or a string such as `2h`; nil waits for ever.
	Timeout *expr.Template
	// As names the signal's payload for later steps; empty for none.
	As string
}

// Kind implements Step.
func (*CallService) Kind() string { return "call_service" }

// Kind implements Step.
func (*Parallel) Kind() string { return "parallel" }

// Kind implements Step.
func (*If) Kind() string { return "if" }

// Kind implements Step.
func (*Foreach) Kind() string { return "foreach" }

// Kind implements Step.
func (*Validate) Kind() string { return "validate" }

// Kind implements Step.
func (*Update) Kind() string { return "update" }

// Kind implements Step.
func (*Fail) Kind() string { return "fail" }

// Kind implements Step.
func (*Wait) Kind() string { return "wait" }

// Kind implements Step.
func (*AwaitSignal) Kind() string { return "await_signal" }

// Children gives the lists of steps inside a step, in order; none for most kinds.
func Children(s Step) [][]Step {
	switch s := s.(type) {
	case *CallService:
		return [][]Step{s.OnSuccess, s.OnFailure}
	case *Parallel:
		return s.Branches
	case *If:
		return [][]Step{s.Then, s.Else}
	case *Foreach:
		return [][]Step{s.Do}
	default:
		return nil
	}
}

// Walk calls visit for every step, those inside a step after it, until visit returns false.
func Walk(steps []Step, visit func(Step) bool) bool {
	for _, s := range steps {
		if !visit(s) {
			return false
		}
		for _, inner := range Children(s) {
			if !Walk(inner, visit) {
				return false
			}
		}
	}
	return true
}

// ParseWorkflow reads a workflow of its own: a top-level `actions:` list (or `steps:`), with an optional `name`, `description`, `input` and
// `output`. A repeated `actions:` continues the first, with a warning. The name is by default the file's. An action is also returned next to problems; it is nil if nothing could be read.
func ParseWorkflow(f File, o Options) (*Action, Problems) {
	c := &collector{strict: o.Strict}
	root := loadJoining(f, c, "actions")
	if root == nil {
		return nil, c.sorted()
	}
	p := &actionParser{reader: reader{c}}
	if root.kind != mappingNode {
		p.errorf(root.pos, "", "begin it with `actions:`", "a workflow must be a map, is %s", root.describe())
		return nil, c.sorted()
	}
	if e := root.entry("entity"); e != nil {
		p.errorf(e.pos, "entity", "name the entity and the action, rather than the file", "this is an entity, not a workflow")
		return nil, c.sorted()
	}
	if e := root.entry("services"); e != nil {
		p.errorf(e.pos, "services", "", "this is a service registry, not a workflow")
		return nil, c.sorted()
	}
	p.known(root, "", "name", "description", "input", "output", "actions", "steps")
	a := p.action(root, "")
	if n := root.get("name"); n != nil {
		a.Name, _ = p.name(n, "name")
	}
	if a.Name == "" {
		a.Name = workflowName(f.Name)
	}
	return a, c.sorted()
}

// workflowName makes a name of the file's.
func workflowName(file string) string {
	base := path.Base(strings.ReplaceAll(file, `\`, "/"))
	base = strings.TrimSuffix(base, path.Ext(base))
	if base == "" || checkName(base) != "" {
		return "workflow"
	}
	return base
}

type actionParser struct {
	reader
	entity *Entity // nil for a workflow
}

// action reads the body of an action; the keys are checked by the caller.
func (p *actionParser) action(n *node, at string) *Action {
	a := &Action{Position: n.pos, source: n}
	if d := n.get("description"); d != nil {
		a.Description, _ = p.str(d, keyPath(at, "description"))
	}
	a.Input = p.schema(n.get("input"), keyPath(at, "input"))
	if o := n.get("output"); !o.isNull() {
		a.Output = p.template(o, keyPath(at, "output"))
	}
	a.Preconditions = p.conditions(n.get("preconditions"), keyPath(at, "preconditions"))
	list, plain := n.entry("actions"), n.entry("steps")
	switch {
	case list != nil && plain != nil:
		p.errorf(plain.pos, keyPath(at, "steps"), "join them", "`actions` and `steps` are two names of the same list")
		fallthrough
	case list != nil:
		a.Steps = p.steps(list.value, keyPath(at, "actions"), "steps", 0)
	case plain != nil:
		a.Steps = p.steps(plain.value, keyPath(at, "steps"), "steps", 0)
	default:
		p.missing(n, at, "actions", "add `actions:` with a list of steps")
	}
	if s := firstNonNil(list, plain); s != nil && s.value.isNull() {
		p.errorf(s.pos, keyPath(at, s.key), "add a step, such as `- call_service:`", "holds no steps")
	}
	return a
}

func firstNonNil(entries ...*entry) *entry {
	for _, e := range entries {
		if e != nil {
			return e
		}
	}
	return nil
}

// conditions reads a list of conditions, or one alone.
func (r reader) conditions(n *node, path string) []*expr.Condition {
	if n.isNull() {
		return nil
	}
	if n.kind == scalarNode {
		if c := r.condition(n, path); c != nil {
			return []*expr.Condition{c}
		}
		return nil
	}
	if !r.sequence(n, path) {
		return nil
	}
	var out []*expr.Condition
	for i, item := range n.items {
		if c := r.condition(item, indexPath(path, i)); c != nil {
			out = append(out, c)
		}
	}
	return out
}

// condition reads one condition: CEL, or a plain true or false.
func (r reader) condition(n *node, path string) *expr.Condition {
	source, ok := n.scalarString()
	if b, isBool := n.value.(bool); isBool && n.kind == scalarNode {
		source, ok = "false", true
		if b {
			source = "true"
		}
	}
	if !ok || n.kind != scalarNode {
		r.errorf(n.pos, path, "write it in quotes, as in `\"$input.amount > 0\"`", "must be a condition, is %s", n.describe())
		return nil
	}
	if !r.affords(n, path, 1) {
		return nil
	}
	c, err := expr.ParseCondition(source)
	if err != nil {
		r.exprProblem(n, path, err)
		return nil
	}
	return c
}

// template reads a value with references.
func (r reader) template(n *node, path string) *expr.Template {
	if !r.affords(n, path, n.expressions()) {
		return nil
	}
	t, err := expr.ParseTemplate(n.native())
	if err != nil {
		r.exprProblem(n, path, err)
		return nil
	}
	return t
}

// affords counts the CEL expressions of a document, whose compilation takes far longer than anything else, and says whether there may be more.
func (c *collector) affords(n *node, path string, more int) bool {
	before := c.expressions
	c.expressions += more
	if c.expressions <= maxExpressions {
		return true
	}
	if before <= maxExpressions {
		c.errorf(n.pos, path, "split it", "the document has more than %d expressions", maxExpressions)
	}
	return false
}

// expressions counts the `${` in a value.
func (n *node) expressions() int {
	s, _ := n.value.(string)
	count := strings.Count(s, "${")
	for _, e := range n.entries {
		count += e.value.expressions()
	}
	for _, item := range n.items {
		count += item.expressions()
	}
	return count
}

// exprProblem reports the faults of an expression, each at its own value.
func (r reader) exprProblem(n *node, path string, err error) {
	if list, ok := errors.AsType[expr.Errors](err); ok {
		for _, one := range list {
			r.exprProblem(n, path, one)
		}
		return
	}
	e := expr.AsError(err)
	if e == nil {
		r.errorf(n.pos, path, "", "%s", err)
		return
	}
	pos, at := n.pos, path
	for rest := e.At; rest != ""; {
		next, _, after := n.step(rest)
		if next == nil {
			break
		}
		n, pos, rest = next, next.pos, after
	}
	if e.At != "" {
		at = keyPath(path, e.At)
		if e.At[0] == '[' {
			at = path + e.At
		}
	}
	message := e.Message
	if e.Text != "" {
		message = "`" + clip(strings.TrimSpace(e.Text)) + "`: " + message
	}
	r.errorf(pos, at, e.Mend, "%s", message)
}
