// Package plan turns an action into a tree of nodes with stable paths, in which every call
// knows its service and every reference its source. Plans are immutable and made without
// I/O; one plan serves any number of runs at once.
package plan

import (
	"time"

	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/pkg/spec/expr"
)

// Plan is an action ready to be walked.
type Plan struct {
	// Entity the action belongs to; nil for a workflow of its own.
	Entity *spec.Entity
	Action *spec.Action
	// Nodes are the steps in order.
	Nodes []Node
	// Preconditions are checked before the first step.
	Preconditions []*Condition
	// Output of the run; nil gives the output of the last call of the document that completed.
	Output *Template
	// UsesEntity says whether the action reads or writes its entity's row.
	UsesEntity bool
	// needs are roots that only a key of the input can be, with where each is used.
	needs []need
}

type need struct {
	root string
	pos  spec.Position
	path string
	from *scope
}

// Node is one step.
type Node interface {
	// Path is the place in the action, such as steps[0].on_success[1].
	Path() string
}

// base is what all nodes have.
type base struct {
	path string
	// rel is the path below the enclosing foreach, or the whole path outside of one.
	rel string
}

// Path implements Node.
func (b *base) Path() string { return b.path }

// Rel is the path below the enclosing foreach's iteration, or the whole path outside of one.
func (b *base) Rel() string { return b.rel }

// Template is an expression together with what its names mean where it stands.
type Template struct {
	*expr.Template
	Bindings map[string]*Binding
}

// Condition is a CEL condition together with what its names mean where it stands.
type Condition struct {
	*expr.Condition
	Bindings map[string]*Binding
	// Fields are the names without $ that are fields of the entity, in preconditions.
	Fields map[string]bool
}

// Source says where a root's value comes from.
type Source int

// The sources, in the order in which they are tried.
const (
	FromInput    Source = iota // the whole input
	FromEntity                 // the entity's row
	FromResponse               // the output of the call in Call
	FromError                  // the error of the call in Call
	FromItem                   // the item of the foreach in Foreach
	FromRun                    // the run itself
	FromNames                  // the first of: Named, a key of the input, Calls, Index, Fallback
)

// Binding says what a root means at one place.
type Binding struct {
	Source  Source
	Call    *Call
	Foreach *Foreach
	// Named are the earlier calls and signals with that `as`, nearest first.
	Named []Node
	// Calls are the earlier calls with that operation name, nearest first, then those with
	// that service name.
	Calls []Node
	// Index is the loop whose index $index is, where nothing else has that name.
	Index *Foreach
	// Fallback is the enclosing call whose on_success uses a name of its own for the response.
	Fallback *Call
}

// Call is a call_service step.
type Call struct {
	base
	Service   *spec.Service
	Operation *spec.Operation
	Input     *Template // nil for an empty input
	As        string
	OnSuccess []Node
	OnFailure []Node
	// Handled says whether there is an on_failure, even an empty one.
	Handled bool
	// Timeout of one attempt; 0 where nothing says.
	Timeout time.Duration
	// MaxRetries is nil where nothing says: the execution type's default holds.
	MaxRetries *int
	Retry      spec.RetryPolicy
	// The parts of the registry that the runner gets, as JSON; never empty.
	RunnerConfig    []byte
	SecurityPolicy  []byte
	OperationConfig []byte
	// in is the foreach that the call stands in, innermost; nil outside.
	in *Foreach
}

// Parallel is a parallel step.
type Parallel struct {
	base
	Branches       [][]Node
	MaxConcurrency int // 0 for no bound
	WaitAll        bool
}

// If is an if step.
type If struct {
	base
	Condition *Condition
	Then      []Node
	Else      []Node
}

// Foreach is a foreach step.
type Foreach struct {
	base
	Items          *Template
	As             string
	MaxConcurrency int // at least 1
	Do             []Node
	in             *Foreach
}

// Validate is a validate step.
type Validate struct {
	base
	Conditions []*Condition
}

// Update is an update step: fields of the entity and their new values, in order of the names.
type Update struct {
	base
	Set []Assignment
}

// Assignment sets one field.
type Assignment struct {
	Field string
	Value *Template
}

// Fail is a fail step.
type Fail struct {
	base
	Message *Template
}

// Wait is a wait step; one of the two is set.
type Wait struct {
	base
	Seconds *Template
	Until   *Template
}

// AwaitSignal is an await_signal step.
type AwaitSignal struct {
	base
	Name    string
	Timeout *Template // seconds; nil for ever
	As      string
	in      *Foreach
}

// In returns the innermost foreach that a node's result belongs to; nil outside.
func In(n Node) *Foreach {
	switch n := n.(type) {
	case *Call:
		return n.in
	case *AwaitSignal:
		return n.in
	case *Foreach:
		return n.in
	}
	return nil
}

// Calls returns every call of the plan, in the order of the document.
func (p *Plan) Calls() []*Call {
	var out []*Call
	var walk func(nodes []Node)
	walk = func(nodes []Node) {
		for _, n := range nodes {
			switch n := n.(type) {
			case *Call:
				out = append(out, n)
				walk(n.OnSuccess)
				walk(n.OnFailure)
			case *Parallel:
				for _, b := range n.Branches {
					walk(b)
				}
			case *If:
				walk(n.Then)
				walk(n.Else)
			case *Foreach:
				walk(n.Do)
			}
		}
	}
	walk(p.Nodes)
	return out
}
