// Package tree shows a run as a tree of its calls: live while it runs, and as a table of
// what each call used when it has ended.
package tree

import (
	"cmp"
	"slices"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
)

// Model is what is known of a run. Its methods are not safe for concurrent use.
type Model struct {
	run   *specqlv1.Run
	jobs  map[string]*specqlv1.Job // by step path: a retried run calls a step again
	order []string
}

// New starts with a run as it is now.
func New(run *specqlv1.Run) *Model {
	m := &Model{jobs: map[string]*specqlv1.Job{}}
	m.SetRun(run)
	return m
}

// SetRun takes a run; its jobs, where it has any, too.
func (m *Model) SetRun(run *specqlv1.Run) {
	m.run = run
	for _, j := range run.GetJobs() {
		m.setJob(j)
	}
}

// Apply takes a change of the run.
func (m *Model) Apply(e *specqlv1.WatchRunResponse) {
	switch event := e.GetEvent().(type) {
	case *specqlv1.WatchRunResponse_Run:
		m.SetRun(event.Run)
	case *specqlv1.WatchRunResponse_Job:
		m.setJob(event.Job)
	}
}

// Run is the run as last seen.
func (m *Model) Run() *specqlv1.Run { return m.run }

// Jobs are the calls in the order in which they were first seen.
func (m *Model) Jobs() []*specqlv1.Job {
	out := make([]*specqlv1.Job, 0, len(m.order))
	for _, path := range m.order {
		out = append(out, m.jobs[path])
	}
	return out
}

func (m *Model) setJob(j *specqlv1.Job) {
	path := j.GetStepPath()
	if _, ok := m.jobs[path]; !ok {
		m.order = append(m.order, path)
	}
	m.jobs[path] = j
}

// node is a step: a call, a step that others stand in, or a step that waits.
type node struct {
	segment
	prefix   string // the iteration that it is all of
	job      *specqlv1.Job
	waiting  *specqlv1.Step
	children []*node
}

// build makes the tree of the steps that have been seen. Steps other than calls are known
// from the paths of the calls in them alone.
func (m *Model) build() *node {
	root := &node{}
	for _, path := range m.order {
		root.at(parse(path)).job = m.jobs[path]
	}
	for _, s := range m.run.GetWaiting() {
		root.at(parse(s.GetStepPath())).waiting = s
	}
	root.sort()
	return root
}

func (n *node) at(path []segment) *node {
	for _, s := range path {
		i := slices.IndexFunc(n.children, func(c *node) bool { return c.segment == s })
		if i < 0 {
			n.children = append(n.children, &node{segment: s})
			i = len(n.children) - 1
		}
		n = n.children[i]
	}
	return n
}

func (n *node) sort() {
	slices.SortStableFunc(n.children, func(a, b *node) int {
		return cmp.Or(cmp.Compare(a.rank(), b.rank()), cmp.Compare(a.index, b.index))
	})
	for i, c := range n.children {
		c.sort()
		// A branch or an iteration of one step is that step.
		if (c.name == "branches" || c.iteration()) && c.job == nil && c.waiting == nil && len(c.children) == 1 {
			only := c.children[0]
			if c.iteration() {
				only.prefix = c.label() + " "
			}
			only.segment = c.segment
			n.children[i] = only
		}
	}
}

// status of a node: its call's, else the most telling outcome below it.
func (n *node) status() specqlv1.Status {
	if n.job != nil {
		return n.job.GetStatus()
	}
	if n.waiting != nil {
		return specqlv1.Status_STATUS_RUNNING
	}
	worst := specqlv1.Status_STATUS_UNSPECIFIED
	for _, c := range n.children {
		if s := c.outcome(); weight(s) > weight(worst) {
			worst = s
		}
	}
	return worst
}

// outcome of a node for the step that it stands in: a failure that was handled is what
// became of the handling.
func (n *node) outcome() specqlv1.Status {
	if n.job == nil {
		return n.status()
	}
	worst := n.job.GetStatus()
	for i, c := range n.children {
		if c.name == "on_failure" && (i == 0 || n.children[i-1].name != "on_failure") {
			worst = specqlv1.Status_STATUS_UNSPECIFIED
		}
		if s := c.outcome(); weight(s) > weight(worst) {
			worst = s
		}
	}
	return worst
}

func weight(s specqlv1.Status) int {
	switch s {
	case specqlv1.Status_STATUS_RUNNING:
		return 4
	case specqlv1.Status_STATUS_PENDING:
		return 3
	case specqlv1.Status_STATUS_FAILED, specqlv1.Status_STATUS_CANCELLED:
		return 2
	case specqlv1.Status_STATUS_COMPLETED:
		return 1
	case specqlv1.Status_STATUS_UNSPECIFIED:
	}
	return 0
}
