package alert

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/internal/store"
	"github.com/specql/mesh/services/orchestrator/internal/store/sqlite"
)

func parse(t *testing.T, text string) []*spec.Alert {
	t.Helper()
	r, problems := spec.ParseRegistry(spec.File{Name: "alerts.yaml", Content: []byte(text)}, spec.Options{})
	require.Empty(t, problems)
	return r.Alerts
}

func one(t *testing.T, condition, executionType string) *spec.Alert {
	t.Helper()
	return parse(t, "alerts: [{name: a, condition: \""+condition+"\", execution_type: "+executionType+", window: 2h}]")[0]
}

func TestEvaluate(t *testing.T) {
	f := figuresOf([]*store.WindowFigures{
		{Completed: 110, Failed: 10, Resource: 3, Security: 2, CostUSD: 9, P50: new(1.5), P95: new(2.5), P99: new(3.5)},
		{ExecutionType: "http", Completed: 90, Failed: 10, Resource: 1, Security: 2, CostUSD: 1, P50: new(0.1), P95: new(0.2), P99: new(0.3)},
		{ExecutionType: "shell", Completed: 2, Failed: 7, P95: new(4.0)},
		{ExecutionType: "wasm", Failed: 10, P95: new(4.0)},
	})
	for _, c := range []struct {
		condition, executionType string
		holds                    bool
		values                   map[string]float64
	}{
		{"http_error_rate > 0.05", "http", true, map[string]float64{"http_error_rate": 0.1}},
		{"http_error_rate > 0.1", "http", false, map[string]float64{"http_error_rate": 0.1}},
		{"http_error_rate >= 0.1", "any", true, map[string]float64{"http_error_rate": 0.1}},
		{"0.05 < http_error_rate", "any", true, map[string]float64{"http_error_rate": 0.1}},
		{"shell_failures > 6", "shell", true, map[string]float64{"shell_failures": 7}},
		{"docker_failures > 0", "docker", false, map[string]float64{"docker_failures": 0}},
		{"shell_error_rate > 0.5", "shell", false, map[string]float64{}}, // nine jobs are no rate
		{"shell_p95_seconds > 1", "shell", false, map[string]float64{}},
		{"wasm_error_rate == 1", "wasm", true, map[string]float64{"wasm_error_rate": 1}},
		{"http_p50_seconds < http_p99_seconds", "http", true, map[string]float64{"http_p50_seconds": 0.1, "http_p99_seconds": 0.3}},
		{"any_p95_seconds > 2", "any", true, map[string]float64{"any_p95_seconds": 2.5}},
		{"resource_violations > 2", "any", true, map[string]float64{"resource_violations": 3}},
		{"resource_violations > 2", "http", false, map[string]float64{"resource_violations": 1}},
		{"security_violations == 2", "any", true, map[string]float64{"security_violations": 2}},
		{"cost_per_hour > 4", "any", true, map[string]float64{"cost_per_hour": 4.5}},
		{"cost_per_hour > 4 && shell_failures > 6", "any", true, map[string]float64{"cost_per_hour": 4.5, "shell_failures": 7}},
		{"shell_error_rate > 0.5 || shell_failures > 6", "any", true, map[string]float64{"shell_failures": 7}},
		{"!(shell_failures > 6)", "any", false, map[string]float64{"shell_failures": 7}},
	} {
		v := evaluate(one(t, c.condition, c.executionType), f)
		require.Equal(t, c.holds, v.holds, c.condition)
		require.Equal(t, c.values, v.values, c.condition)
	}
	v := evaluate(one(t, "shell_error_rate > 0.5", "shell"), f)
	require.Contains(t, v.detail, "9 jobs ended")
}

func TestThreshold(t *testing.T) {
	for condition, want := range map[string]float64{"http_failures > 10": 10, "0.5 <= http_error_rate": 0.5, "cost_per_hour > -1": -1} {
		got, ok := Threshold(one(t, condition, "any").Condition)
		require.True(t, ok, condition)
		require.InDelta(t, want, got, 0, condition)
	}
	for _, condition := range []string{"http_failures > shell_failures", "http_failures > 1 && shell_failures > 2", "http_failures in [1.0]"} {
		_, ok := Threshold(one(t, condition, "any").Condition)
		require.False(t, ok, condition)
	}
}

// An alert takes its time in both directions, and a figure that wavers makes no second alert.
func TestStep(t *testing.T) {
	const window = time.Hour // a minute to fire, five to be resolved
	begin := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	var s *store.AlertState
	for _, c := range []struct {
		after time.Duration
		holds bool
		state string
	}{
		{0, false, Inactive},
		{10 * time.Second, true, Pending},
		{69 * time.Second, true, Pending},
		{69500 * time.Millisecond, false, Inactive}, // it must hold without a break
		{80 * time.Second, true, Pending},
		{140 * time.Second, true, Firing},
		{150 * time.Second, false, Firing},
		{440 * time.Second, false, Firing},
		{445 * time.Second, true, Firing}, // wavering: the five minutes begin anew
		{450 * time.Second, false, Firing},
		{749 * time.Second, false, Firing},
		{750 * time.Second, false, Resolved},
		{800 * time.Second, false, Resolved},
		{810 * time.Second, true, Pending},
		{820 * time.Second, false, Inactive},
	} {
		s = step(s, "a", c.holds, window, begin.Add(c.after))
		require.Equal(t, c.state, s.State, c.after)
	}
	require.Equal(t, begin.Add(820*time.Second), s.Since)
}

// clock is set by the test.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (*clock) Sleep(ctx context.Context, _ time.Duration) error { return context.Cause(ctx) }

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

type told struct {
	service, operation, key string
	input                   map[string]any
}

// bench is an evaluator on a real store, with figures that the test sets.
type bench struct {
	*evaluator
	clock   *clock
	figures *fixedFigures
	told    []told
	refuse  error
}

type fixedFigures struct {
	store.Alerts
	rows []*store.WindowFigures
	took func() // what a query takes
	// failure of every query; nil for none.
	failure error
}

func (f *fixedFigures) WindowFigures(context.Context, time.Time) ([]*store.WindowFigures, error) {
	if f.took != nil {
		f.took()
	}
	return f.rows, f.failure
}

// Queries that take long are made less often, and the lease lasts from one to the next.
func TestRest(t *testing.T) {
	c := &clock{now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}
	st := openStore(t, c)
	alerts := parse(t, paged)
	a, b := newBench(t, st, c, "a", alerts), newBench(t, st, c, "b", alerts)
	for took, want := range map[time.Duration]time.Duration{time.Millisecond: 5 * time.Second, 3 * time.Second: time.Minute, 14 * time.Second: 2 * time.Minute} {
		a.figures.took = func() { c.advance(took) }
		rest, err := a.tick(t.Context())
		require.NoError(t, err)
		require.Equal(t, want, rest)
		c.advance(rest)
		_, err = b.tick(t.Context())
		require.NoError(t, err)
		leader, err := st.AlertLeader(t.Context())
		require.NoError(t, err)
		require.Equal(t, "a", leader)
	}
}

// An evaluation that outlasts its lease is lost, and the next one has the time that it takes.
func TestAnEvaluationThatOutlastsItsLease(t *testing.T) {
	c := &clock{now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}
	st := openStore(t, c)
	a := newBench(t, st, c, "a", parse(t, paged))
	a.figures.took = func() { c.advance(20 * time.Second) }
	pause, err := a.tick(t.Context())
	require.ErrorIs(t, err, store.ErrFenced)
	c.advance(pause)
	_, err = a.tick(t.Context())
	require.NoError(t, err)
	states, err := st.AlertStates(t.Context())
	require.NoError(t, err)
	require.Len(t, states, 2)
	// Queries that fail late are made no more often than those that do not.
	a.figures.failure = errors.New("canceling statement due to statement timeout")
	pause, err = a.tick(t.Context())
	require.ErrorIs(t, err, a.figures.failure)
	require.Equal(t, longestRest, pause)
}

func newBench(t *testing.T, st store.Alerts, c *clock, owner string, alerts []*spec.Alert) *bench {
	t.Helper()
	b := &bench{clock: c, figures: &fixedFigures{Alerts: st}}
	b.evaluator = &evaluator{Options: Options{
		Store: b.figures, Alerts: func() []*spec.Alert { return alerts }, Clock: c, Logger: slog.New(slog.DiscardHandler), Owner: owner,
		Changed: func(string, string) {},
		Notify: func(_ context.Context, service, operation string, input map[string]any, key string) (string, error) {
			if b.refuse != nil {
				return "", b.refuse
			}
			b.told = append(b.told, told{service, operation, key, input})
			return "run-" + key, nil
		},
	}}
	return b
}

func openStore(t *testing.T, c *clock) store.Store {
	t.Helper()
	st, err := sqlite.Open(t.Context(), sqlite.Options{Path: filepath.Join(t.TempDir(), "a.db"), Now: c.Now})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, st.Close()) })
	return st
}

const paged = `
alerts:
  - {name: "Shell Command Failures", condition: "shell_failures > 10", execution_type: shell, notify: {service: pager, operation: page}}
  - {name: Own, condition: "shell_failures > 10 && shell_error_rate > 0.1", notify: {service: pager, operation: say, input: {text: "$alert.name is $alert.state", n: "$alert.values.shell_failures"}}}
`

func failures(n int64) []*store.WindowFigures {
	return []*store.WindowFigures{{Failed: n, Completed: 5}, {ExecutionType: "shell", Failed: n, Completed: 5}}
}

func TestEvaluatorTellsOnceForEachChange(t *testing.T) {
	c := &clock{now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}
	st := openStore(t, c)
	b := newBench(t, st, c, "a", parse(t, paged))
	tick := func(d time.Duration) {
		t.Helper()
		c.advance(d)
		pause, err := b.tick(t.Context())
		require.NoError(t, err)
		require.Positive(t, pause)
	}
	b.figures.rows = failures(11)
	tick(0)
	tick(30 * time.Second)
	require.Empty(t, b.told, "pending tells nobody")
	tick(30 * time.Second)
	require.Len(t, b.told, 2)
	for range 10 {
		tick(time.Minute) // it goes on firing
	}
	require.Len(t, b.told, 2)
	first := b.told[0]
	require.Equal(t, []any{"pager", "page"}, []any{first.service, first.operation})
	require.Equal(t, map[string]any{
		"alert": "Shell Command Failures", "state": "firing", "condition": "shell_failures > 10", "execution_type": "shell", "value": 11.0,
		"values": map[string]any{"shell_failures": 11.0}, "threshold": 10.0, "window": "1h0m0s", "window_seconds": 3600.0, "since": "2026-01-01T00:01:00Z",
	}, first.input)
	require.Equal(t, map[string]any{"text": "Own is firing", "n": 11.0}, b.told[1].input)
	require.NotEqual(t, first.key, b.told[1].key)

	b.figures.rows = failures(10)
	for range 7 {
		tick(time.Minute)
	}
	require.Len(t, b.told, 4)
	require.Equal(t, "resolved", b.told[2].input["state"])
	events, err := st.AlertEvents(t.Context(), "Shell Command Failures", 10)
	require.NoError(t, err)
	var to []string
	for _, e := range events {
		to = append(to, e.To)
	}
	require.Equal(t, []string{"resolved", "firing", "pending"}, to)
	require.Equal(t, "run-alert-"+events[0].ID, events[0].NotifyRunID)
	require.JSONEq(t, `{"shell_failures": 11}`, string(events[1].Figures))
}

// A new evaluator goes on where the one before it died: with the state, and with what was not told yet.
func TestTakeover(t *testing.T) {
	c := &clock{now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}
	st := openStore(t, c)
	alerts := parse(t, paged)
	a, b := newBench(t, st, c, "a", alerts), newBench(t, st, c, "b", alerts)
	a.figures.rows, b.figures.rows = failures(11), failures(11)
	a.refuse = fault.New(fault.Unavailable, "not now")
	tick := func(e *bench) {
		t.Helper()
		_, err := e.tick(t.Context())
		require.NoError(t, err)
	}
	tick(a)
	tick(b)
	c.advance(time.Minute)
	tick(a) // fires, and cannot tell
	require.Empty(t, b.told)
	c.advance(time.Minute) // a is dead
	tick(b)
	require.Len(t, b.told, 2)
	require.Equal(t, "2026-01-01T00:01:00Z", b.told[0].input["since"])
	tick(a)
	require.Empty(t, a.told)
	states, err := st.AlertStates(t.Context())
	require.NoError(t, err)
	require.Equal(t, c.Now(), states[0].EvaluatedAt)
	require.ErrorIs(t, a.evaluate(t.Context(), alerts), store.ErrFenced)
}

func TestNotificationsThatCannotBe(t *testing.T) {
	c := &clock{now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}
	st := openStore(t, c)
	alerts := parse(t, `
alerts:
  - {name: a, condition: "shell_failures > 10", notify: {service: pager, operation: page}}
  - {name: b, condition: "shell_failures > 10", notify: {service: pager, operation: page, input: {x: "$alert.nothing"}}}
`)
	b := newBench(t, st, c, "a", alerts)
	b.figures.rows = failures(11)
	failureOf := func(name string) string {
		t.Helper()
		events, err := st.AlertEvents(t.Context(), name, 1)
		require.NoError(t, err)
		require.Equal(t, Firing, events[0].To)
		return events[0].NotifyError
	}
	tick := func(d time.Duration) {
		t.Helper()
		c.advance(d)
		_, err := b.tick(t.Context())
		require.NoError(t, err)
	}
	b.refuse = errors.New("the database is away")
	tick(0)
	tick(time.Minute)
	require.Empty(t, failureOf("a"), "it is tried again")
	require.Contains(t, failureOf("b"), "$alert.name")
	b.refuse = fault.New(fault.Validation, "there is no service pager")
	tick(time.Second)
	require.Equal(t, "there is no service pager", failureOf("a"))
	b.refuse = nil
	tick(time.Second)
	require.Empty(t, b.told, "what has failed is not tried again")
}

func TestRunStopsAndLeaves(t *testing.T) {
	c := &clock{now: time.Now()}
	st := openStore(t, c)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	evaluated := make(chan struct{})
	once := sync.OnceFunc(func() { close(evaluated) })
	alerts := parse(t, paged)
	go func() {
		defer close(done)
		Run(ctx, Options{
			Store: st, Alerts: func() []*spec.Alert { return alerts }, Clock: signalling{c, once},
			Logger: slog.New(slog.DiscardHandler), Owner: "a",
		})
	}()
	<-evaluated
	cancel()
	<-done
	leader, err := st.AlertLeader(t.Context())
	require.NoError(t, err)
	require.Empty(t, leader)
	states, err := st.AlertStates(t.Context())
	require.NoError(t, err)
	require.Len(t, states, 2)
	var figures map[string]float64
	require.NoError(t, json.Unmarshal(states[1].Figures, &figures))
	require.Equal(t, map[string]float64{"shell_failures": 0}, figures)
}

// signalling tells of its first sleep and then waits for the end.
type signalling struct {
	*clock
	slept func()
}

func (s signalling) Sleep(ctx context.Context, _ time.Duration) error {
	s.slept()
	<-ctx.Done()
	return context.Cause(ctx)
}

func TestPromQL(t *testing.T) {
	for condition, want := range map[string]string{
		"shell_failures > 10":              `((sum(increase(specql_jobs_total{execution_type="shell",status="failed"}[7200s])) or vector(0)) > 10)`,
		"5 < resource_violations":          `(5 < (sum(increase(specql_jobs_total{status="failed",code="RESOURCE_EXCEEDED"}[7200s])) or vector(0)))`,
		"http_failures in [1.0]":           "",
		"!(http_failures > 1)":             "",
		"http_failures + 1":                "",
		"(http_failures > 1) == true":      "",
		"http_failures > 1 ? true : false": "",
	} {
		r, _ := spec.ParseRegistry(spec.File{Name: "a", Content: []byte("alerts: [{name: a, window: 2h, condition: \"" + condition + "\"}]")}, spec.Options{})
		if r.Alerts[0].Condition == nil {
			continue
		}
		require.Equal(t, want, PromQL(r.Alerts[0]), condition)
	}
}
