package engine_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/plan"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

var errLocked = errors.New("database is locked")

// spyJournal sees every record before and after it is written; before may refuse it.
type spyJournal struct {
	*store.Journal
	before func(r *store.Record) error
	after  func(r *store.Record)
}

func (s *spyJournal) Append(ctx context.Context, r *store.Record) error {
	if s.before != nil {
		if err := s.before(r); err != nil {
			return err
		}
	}
	err := s.Journal.Append(ctx, r)
	if s.after != nil && err == nil {
		s.after(r)
	}
	return err
}

// life is an engine and its journal, which a test may end before the test ends.
type life struct {
	*engine.Engine
	w       *world
	journal *store.Journal
	ended   bool
}

// begin opens an engine on a spied journal; change may set other options.
func (w *world) begin(spy *spyJournal, change func(*engine.Options)) *life {
	w.t.Helper()
	spy.Journal = store.NewJournal(w.store, store.JournalOptions{})
	o := engine.Options{
		Journal: spy, Store: w.store, Plans: w, Dispatcher: w, Clock: fastClock{}, Logger: slog.New(slog.DiscardHandler),
		Owner: fmt.Sprintf("owner-%p", spy),
	}
	if change != nil {
		change(&o)
	}
	l := &life{Engine: engine.New(o), w: w, journal: spy.Journal}
	w.t.Cleanup(l.kill)
	return l
}

// kill ends an engine without waiting for what it does.
func (l *life) kill() {
	gone, cancel := context.WithCancel(context.Background())
	cancel()
	l.end(gone)
}

// end drains an engine until ctx ends.
func (l *life) end(ctx context.Context) {
	if l.ended {
		return
	}
	l.ended = true
	l.Close(ctx)
	require.NoError(l.w.t, l.journal.Close())
}

func maxRuns(n int) func(*engine.Options) { return func(o *engine.Options) { o.MaxRuns = n } }

// finish waits for the end of a run and reads it.
func (w *world) finish(e *engine.Engine, id string) *store.Run {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), wait)
	defer cancel()
	require.NoError(w.t, e.Wait(ctx, id))
	r, err := w.store.Run(w.t.Context(), id)
	require.NoError(w.t, err)
	return r
}

// operations are the operations called so far, in order of arrival.
func (w *world) operations() []string {
	var out []string
	for _, c := range w.seen() {
		out = append(out, c.operation)
	}
	return out
}

// answers makes an operation answer with its input.
func (w *world) answers(operation string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.behave[operation] = func(_ context.Context, c *engine.Call, _ map[string]any) *engine.Outcome {
		return &engine.Outcome{Output: c.Job.Input}
	}
}

// entityRequest is a request for an action of an entity, whose row it makes from values.
func (w *world) entityRequest(text, action, id string, values map[string]any) *engine.StartRequest {
	w.t.Helper()
	entity, problems := spec.ParseEntity(spec.File{Name: "entity.yaml", Content: []byte(text)}, spec.Options{})
	require.NoError(w.t, problems.Err())
	require.NoError(w.t, w.store.EnsureEntities(w.t.Context(), []*spec.Entity{entity}))
	p, problems := plan.Compile(entity.Action(action), entity, w.registry)
	require.NoError(w.t, problems.Err())
	row, err := entity.NewRow(values, func() string { return id })
	require.NoError(w.t, err)
	w.mu.Lock()
	w.plans[action] = p
	w.mu.Unlock()
	return &engine.StartRequest{Plan: p, Snapshot: action, Action: action, EntityID: id, Row: row, Insert: true, Input: map[string]any{}}
}
