package engine_test

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/plan"
	"github.com/specql/mesh/services/orchestrator/internal/store"
	"github.com/specql/mesh/services/orchestrator/internal/store/postgres"
	"github.com/specql/mesh/services/orchestrator/internal/store/sqlite"
	"github.com/specql/mesh/test/pgtest"
)

// Random workflows write to a real database each; -rapid.checks says otherwise.
const randomChecks = "40"

func TestMain(m *testing.M) {
	// A flag of the command line is parsed later and goes before this.
	if err := flag.Set("rapid.checks", randomChecks); err != nil {
		panic(err)
	}
	code := m.Run()
	if err := pgtest.Shutdown(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	if err := goleak.Find(); code == 0 && err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// testRegistry has operations whose behaviour the fake dispatcher takes from their names.
const testRegistry = `
services:
  - name: svc
    type: t
    category: c
    operations:
      - {name: echo}
      - {name: other}
      - {name: fail}
      - {name: flaky, max_retries: 3}
      - {name: hang}
      - name: typed
        input_schema: {n: integer}
        output_schema: {n: integer}
  - name: store
    type: t
    category: c
    operations:
      - {name: save}
`

const testEntity = `
entity: order
fields:
  status: {type: string, default: pending}
  total: {type: integer, default: 5}
actions:
  pay:
    input: {by: "string?"}
    preconditions: ["$entity.status == 'pending'"]
    steps:
      - call_service: {service: svc, operation: echo, input: {amount: "$order.total"}}
      - update: {set: {status: paid, total: "$echo.amount"}}
    output: {status: "$entity.status", amount: "$echo.amount"}
`

// world is a store and the calls that arrived, which outlive engines.
type world struct {
	t        *testing.T
	store    store.Store
	registry *spec.Registry
	entity   *spec.Entity

	mu    sync.Mutex
	calls []call
	plans map[string]*plan.Plan
	// behave overrides what an operation does.
	behave map[string]func(ctx context.Context, c *engine.Call, input map[string]any) *engine.Outcome
	arrive chan string
	// limits are those of operations; none for others.
	limits map[string]func() ([]engine.Limit, error)
	// lostPlans says that a plan that is not known is known to be nowhere.
	lostPlans bool
}

type call struct{ key, step, operation string }

func newWorld(t *testing.T) *world {
	t.Helper()
	st, err := sqlite.Open(t.Context(), sqlite.Options{Path: filepath.Join(t.TempDir(), "specql.db"), Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	return newWorldOn(t, st)
}

// onEachDatabase runs a test on every database that there is.
func onEachDatabase(t *testing.T, test func(t *testing.T, w *world)) {
	t.Helper()
	t.Run("SQLite", func(t *testing.T) { test(t, newWorld(t)) })
	t.Run("PostgreSQL", func(t *testing.T) {
		url := pgtest.Database(t)
		_, err := postgres.Migrate(t.Context(), postgres.Options{URL: url})
		require.NoError(t, err)
		st, err := postgres.Open(t.Context(), postgres.Options{URL: url})
		require.NoError(t, err)
		test(t, newWorldOn(t, st))
	})
}

func newWorldOn(t *testing.T, st store.Store) *world {
	t.Helper()
	t.Cleanup(func() { require.NoError(t, st.Close()) })
	reg, problems := spec.ParseRegistry(spec.File{Name: "registry.yaml", Content: []byte(testRegistry)}, spec.Options{})
	require.NoError(t, problems.Err())
	entity, problems := spec.ParseEntity(spec.File{Name: "order.yaml", Content: []byte(testEntity)}, spec.Options{})
	require.NoError(t, problems.Err())
	require.NoError(t, st.EnsureEntities(t.Context(), []*spec.Entity{entity}))
	return &world{
		t: t, store: st, registry: reg, entity: entity, plans: map[string]*plan.Plan{},
		behave: map[string]func(context.Context, *engine.Call, map[string]any) *engine.Outcome{}, arrive: make(chan string, 10_000),
		limits: map[string]func() ([]engine.Limit, error){},
	}
}

// Plan implements engine.Plans.
func (w *world) Plan(_ context.Context, r *store.Run) (*plan.Plan, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	p := w.plans[r.Snapshot]
	if p == nil && w.lostPlans {
		return nil, fmt.Errorf("no such plan: %w", store.ErrNotFound)
	}
	if p == nil {
		return nil, errors.New("no such plan")
	}
	return p, nil
}

// DefaultMaxRetries implements engine.Dispatcher.
func (*world) DefaultMaxRetries(string) int { return 0 }

// Limits implements engine.Dispatcher.
func (w *world) Limits(_ context.Context, n *plan.Call, _ bool) ([]engine.Limit, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if f := w.limits[n.Operation.Name]; f != nil {
		return f()
	}
	return nil, nil
}

// Execute implements engine.Dispatcher.
func (w *world) Execute(ctx context.Context, c *engine.Call, sink engine.LogSink) *engine.Outcome {
	var input map[string]any
	if err := json.Unmarshal(c.Job.Input, &input); err != nil {
		return &engine.Outcome{Err: fault.New(fault.Internal, "%v", err)}
	}
	w.mu.Lock()
	w.calls = append(w.calls, call{key: c.Job.IdempotencyKey, step: c.Job.StepPath, operation: c.Job.Operation})
	f := w.behave[c.Job.Operation]
	w.mu.Unlock()
	w.arrive <- c.Job.Operation
	sink(1, "stdout", "working on "+c.Job.Operation, time.Now())
	if f != nil {
		return f(ctx, c, input)
	}
	switch c.Job.Operation {
	case "fail":
		return &engine.Outcome{Err: fault.New(fault.RemoteError, "the target said no")}
	case "flaky":
		if c.Job.Attempts < 3 {
			return &engine.Outcome{Err: fault.New(fault.Unavailable, "not now")}
		}
	case "hang":
		<-ctx.Done()
		return &engine.Outcome{Err: fault.From(context.Cause(ctx))}
	}
	return &engine.Outcome{Output: c.Job.Input}
}

func (w *world) seen() []call {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]call(nil), w.calls...)
}

// fastClock makes pauses short; deadlines stay ordered.
type fastClock struct{ engine.SystemClock }

func (c fastClock) Sleep(ctx context.Context, d time.Duration) error {
	return c.SystemClock.Sleep(ctx, d/1000)
}

func (w *world) engine(journal engine.Journal) *engine.Engine {
	w.t.Helper()
	e := engine.New(engine.Options{
		Journal: journal, Store: w.store, Plans: w, Dispatcher: w, Clock: fastClock{}, Logger: slog.New(slog.DiscardHandler),
		Owner: fmt.Sprintf("owner-%p", journal),
	})
	return e
}

// start opens an engine for one test.
func (w *world) start() *engine.Engine {
	w.t.Helper()
	j := store.NewJournal(w.store, store.JournalOptions{})
	e := w.engine(j)
	w.t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		e.Close(ctx)
		require.NoError(w.t, j.Close())
	})
	return e
}

func (w *world) request(text string, input map[string]any) *engine.StartRequest {
	w.t.Helper()
	a, problems := spec.ParseWorkflow(spec.File{Name: "workflow", Content: []byte(text)}, spec.Options{})
	require.NoError(w.t, problems.Err())
	p, problems := plan.Compile(a, nil, w.registry)
	require.NoError(w.t, problems.Err())
	if input == nil {
		input = map[string]any{}
	}
	require.NoError(w.t, p.CheckInput(input).Err())
	w.mu.Lock()
	w.plans[text] = p
	w.mu.Unlock()
	return &engine.StartRequest{Plan: p, Snapshot: text, Action: a.Name, Input: input}
}

// waiting are the steps that hold a run up.
func (w *world) waiting(e interface {
	Waiting(ctx context.Context, run *store.Run) ([]*store.Step, error)
}, id string,
) []*store.Step {
	w.t.Helper()
	run, err := w.store.Run(w.t.Context(), id)
	require.NoError(w.t, err)
	steps, err := e.Waiting(w.t.Context(), run)
	require.NoError(w.t, err)
	return steps
}

// run starts a workflow and waits for its end.
func (w *world) run(e *engine.Engine, text string, input map[string]any) *store.Run {
	w.t.Helper()
	r, err := e.Start(w.t.Context(), w.request(text, input))
	require.NoError(w.t, err)
	require.NoError(w.t, e.Wait(w.t.Context(), r.ID))
	r, err = w.store.Run(w.t.Context(), r.ID)
	require.NoError(w.t, err)
	return r
}
