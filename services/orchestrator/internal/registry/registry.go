package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/internal/plan"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// Store is what the registry keeps in the database.
type Store interface {
	SaveSnapshot(ctx context.Context, digest string, content []byte) error
	Snapshot(ctx context.Context, digest string) ([]byte, error)
	SetRegistry(ctx context.Context, digest string) error
	Registry(ctx context.Context) (digest string, appliedAt time.Time, err error)
	EnsureEntities(ctx context.Context, entities []*spec.Entity) error
}

// Bounds of what is kept in memory of snapshots and workflows that are not in force: how
// many, and of workflows also how much text, as plans grow with it.
const (
	cacheSize  = 256
	cacheBytes = 4 << 20
)

// VariablePrefix begins the variables that a registry sent to the API may name: any caller
// could read the process's environment else.
const VariablePrefix = "SPECQL_VAR_"

// Registry holds the snapshot in force, and finds those that runs began with.
type Registry struct {
	store   Store
	runners Runners
	env     func(string) (string, bool)
	now     func() time.Time

	apply sync.Mutex // one at a time, so that memory and store agree

	mu            sync.Mutex
	current       *Snapshot
	snapshots     map[string]*Snapshot
	workflows     map[string]*Workflow
	workflowBytes int
}

// Workflow is a workflow of its own and its plan.
type Workflow struct {
	// Digest under which Plan finds it, once it is kept.
	Digest string
	Plan   *plan.Plan

	content []byte
	kept    bool
}

// New makes a registry with nothing in force.
func New(s Store, runners Runners, env func(string) (string, bool), now func() time.Time) *Registry {
	return &Registry{
		store: s, runners: runners, env: env, now: now, current: &Snapshot{Registry: &spec.Registry{}, plans: map[string]*plan.Plan{}},
		snapshots: map[string]*Snapshot{}, workflows: map[string]*Workflow{},
	}
}

// Current is the snapshot in force.
func (r *Registry) Current() *Snapshot {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.current
}

// CurrentDocuments are what the snapshot in force was made from.
func (r *Registry) CurrentDocuments() Documents { return r.Current().docs }

// Load puts in force what the store says was; nothing where it knows none.
func (r *Registry) Load(ctx context.Context) error {
	digest, at, err := r.store.Registry(ctx)
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the registry in force: %w", err)
	}
	s, err := r.snapshot(ctx, digest)
	if err != nil {
		return err
	}
	c := *s
	c.AppliedAt = at
	r.mu.Lock()
	r.current = &c
	r.mu.Unlock()
	return nil
}

// Refresh puts in force what another orchestrator did, if that is not in force here.
func (r *Registry) Refresh(ctx context.Context) error {
	r.apply.Lock()
	defer r.apply.Unlock()
	digest, _, err := r.store.Registry(ctx)
	if errors.Is(err, store.ErrNotFound) || err == nil && digest == r.Current().Digest {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the registry in force: %w", err)
	}
	return r.Load(ctx)
}

// public looks up the variables that a caller of the API may name.
func (r *Registry) public(name string) (string, bool) {
	if r.env == nil || !strings.HasPrefix(name, VariablePrefix) {
		return "", false
	}
	return r.env(name)
}

// Validate checks documents that a caller sent and puts nothing in force.
func (r *Registry) Validate(ctx context.Context, d Documents, strict bool) (spec.Problems, error) {
	_, problems, err := Build(ctx, d, BuildOptions{LookupEnv: r.public, Strict: strict, Runners: r.runners, PublicOnly: true})
	return problems, err
}

// Apply checks documents that a caller sent and puts them in force, unless a problem is an
// error: then the snapshot is nil and what was in force stays.
func (r *Registry) Apply(ctx context.Context, d Documents) (*Snapshot, spec.Problems, error) {
	d.Alerts = r.CurrentDocuments().Alerts // a file of the operator's, which no caller sends
	return r.put(ctx, d, BuildOptions{LookupEnv: r.public, Runners: r.runners, PublicOnly: true})
}

// ApplyFiles is Apply for the operator's own files, which may name any variable.
func (r *Registry) ApplyFiles(ctx context.Context, d Documents) (*Snapshot, spec.Problems, error) {
	return r.put(ctx, d, BuildOptions{LookupEnv: r.env, Runners: r.runners})
}

func (r *Registry) put(ctx context.Context, d Documents, o BuildOptions) (*Snapshot, spec.Problems, error) {
	r.apply.Lock()
	defer r.apply.Unlock()
	d.Vars = nil // the values come from here, never from elsewhere
	s, problems, err := Build(ctx, d, o)
	if err != nil || s == nil {
		return nil, problems, err
	}
	if err := r.store.EnsureEntities(ctx, s.Entities); err != nil {
		return nil, problems, fmt.Errorf("make the entities' tables: %w", err)
	}
	if err := r.store.SaveSnapshot(ctx, s.Digest, s.content); err != nil {
		return nil, problems, fmt.Errorf("store the registry: %w", err)
	}
	if err := r.store.SetRegistry(ctx, s.Digest); err != nil {
		return nil, problems, fmt.Errorf("put the registry in force: %w", err)
	}
	s.AppliedAt = r.now()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.current = s
	r.keep(s)
	return s, problems, nil
}

// keep remembers a snapshot. r.mu is held.
func (r *Registry) keep(s *Snapshot) {
	for digest := range r.snapshots {
		if len(r.snapshots) < cacheSize {
			break
		}
		delete(r.snapshots, digest)
	}
	r.snapshots[s.Digest] = s
}

// snapshot reads a snapshot by its digest.
func (r *Registry) snapshot(ctx context.Context, digest string) (*Snapshot, error) {
	if digest == "" {
		// A workflow may have begun before any registry was applied.
		return &Snapshot{Registry: &spec.Registry{}, plans: map[string]*plan.Plan{}}, nil
	}
	r.mu.Lock()
	s := r.snapshots[digest]
	r.mu.Unlock()
	if s != nil {
		return s, nil
	}
	content, err := r.store.Snapshot(ctx, digest)
	if err != nil {
		return nil, fmt.Errorf("read the registry %.12s: %w", digest, err)
	}
	var d Documents
	if err := json.Unmarshal(content, &d); err != nil {
		return nil, fault.Wrap(err, fault.Internal, "the stored registry %.12s is damaged: %v", digest, err)
	}
	s, problems, err := Build(ctx, d, BuildOptions{})
	if err != nil {
		return nil, err
	}
	if s == nil {
		return nil, fault.Wrap(problems.Err(), fault.Internal, "the stored registry %.12s is not valid any more: %v", digest, problems.Err())
	}
	s.Digest = digest
	r.mu.Lock()
	defer r.mu.Unlock()
	r.keep(s)
	return s, nil
}

// Workflow makes the plan of a workflow of its own against the registry in force. Keep
// stores it, once it is known that it will run.
func (r *Registry) Workflow(text string) (*Workflow, spec.Problems, error) {
	base := r.Current()
	content, digest, err := encode(workflowDocuments{Base: base.Digest, Workflow: Document{Name: "workflow", Content: text}})
	if err != nil {
		return nil, nil, err
	}
	r.mu.Lock()
	w := r.workflows[digest]
	r.mu.Unlock()
	if w != nil {
		return w, nil, nil
	}
	p, problems := compileWorkflow(text, base.Registry)
	if p == nil {
		return nil, problems, nil
	}
	return &Workflow{Digest: digest, Plan: p, content: content}, nil, nil
}

// Keep stores what a workflow was made from, so that its runs survive this process.
func (r *Registry) Keep(ctx context.Context, w *Workflow) error {
	if w.kept {
		return nil
	}
	if err := r.store.SaveSnapshot(ctx, w.Digest, w.content); err != nil {
		return fmt.Errorf("store the workflow: %w", err)
	}
	r.keepWorkflow(&Workflow{Digest: w.Digest, Plan: w.Plan, content: w.content, kept: true})
	return nil
}

func (r *Registry) keepWorkflow(w *Workflow) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.workflows[w.Digest] != nil || len(w.content) > cacheBytes/4 {
		return
	}
	for digest, old := range r.workflows {
		if len(r.workflows) < cacheSize && r.workflowBytes+len(w.content) <= cacheBytes {
			break
		}
		delete(r.workflows, digest)
		r.workflowBytes -= len(old.content)
	}
	r.workflows[w.Digest] = w
	r.workflowBytes += len(w.content)
}

func compileWorkflow(text string, reg *spec.Registry) (*plan.Plan, spec.Problems) {
	a, problems := spec.ParseWorkflow(spec.File{Name: "workflow", Content: []byte(text)}, spec.Options{})
	if a == nil || problems.HasErrors() {
		return nil, problems
	}
	return plan.Compile(a, nil, reg)
}

// Plan implements engine.Plans: the plan that a run began with.
func (r *Registry) Plan(ctx context.Context, run *store.Run) (*plan.Plan, error) {
	if run.Entity != "" {
		s, err := r.snapshot(ctx, run.Snapshot)
		if err != nil {
			return nil, err
		}
		if p := s.Plan(run.Entity, run.Action); p != nil {
			return p, nil
		}
		return nil, fault.New(fault.Internal, "the registry %.12s has no action %s of %s", run.Snapshot, run.Action, run.Entity)
	}
	r.mu.Lock()
	w := r.workflows[run.Snapshot]
	r.mu.Unlock()
	if w != nil {
		return w.Plan, nil
	}
	content, err := r.store.Snapshot(ctx, run.Snapshot)
	if err != nil {
		return nil, fmt.Errorf("read the workflow %.12s: %w", run.Snapshot, err)
	}
	var d workflowDocuments
	if err := json.Unmarshal(content, &d); err != nil {
		return nil, fault.Wrap(err, fault.Internal, "the stored workflow %.12s is damaged: %v", run.Snapshot, err)
	}
	base, err := r.snapshot(ctx, d.Base)
	if err != nil {
		return nil, err
	}
	p, problems := compileWorkflow(d.Workflow.Content, base.Registry)
	if p == nil {
		return nil, fault.Wrap(problems.Err(), fault.Internal, "the stored workflow %.12s is not valid any more: %v", run.Snapshot, problems.Err())
	}
	r.keepWorkflow(&Workflow{Digest: run.Snapshot, Plan: p, content: content, kept: true})
	return p, nil
}
