package dispatch_test

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"math"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/internal/dispatch"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/plan"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// limiter is a runner that has limits, and says of each job what it was told to.
type limiter struct {
	worker
	mu     sync.Mutex
	asked  []string
	limits []runner.Limit
	err    error
	result runner.Result
	jobs   []*runner.Job
}

func (l *limiter) Limits(_ context.Context, s *runner.Service) ([]runner.Limit, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.asked = append(l.asked, s.Name+"."+s.Operations[0].Name+" "+string(s.Policy))
	return l.limits, l.err
}

func (l *limiter) Execute(_ context.Context, job *runner.Job, _ runner.Sink) (*runner.Result, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.jobs = append(l.jobs, job)
	result := l.result
	return &result, nil
}

func (l *limiter) say(limits []runner.Limit, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.limits, l.err = limits, err
}

func (l *limiter) times() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.asked)
}

// serveAt serves a runner until the end of the test, and gives a dispatcher to it.
func serveAt(t *testing.T, jr runner.JobRunner) *dispatch.Dispatcher {
	t.Helper()
	lis, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	served := make(chan error, 1)
	go func() { served <- runner.Serve(ctx, lis, jr, nil, runner.Options{DrainTimeout: time.Millisecond}) }()
	d, err := dispatch.New(dispatch.Options{Runners: map[string]string{"http": lis.Addr().String()}, Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	t.Cleanup(func() {
		d.Close()
		stop()
		require.NoError(t, <-served)
	})
	return d
}

func node(operation, policy string) *plan.Call {
	return &plan.Call{
		Service: &spec.Service{Name: "svc", ExecutionType: "http"}, Operation: &spec.Operation{Name: operation},
		RunnerConfig: []byte(`{}`), SecurityPolicy: []byte(policy), OperationConfig: []byte(`{}`),
	}
}

func TestLimitsAreAskedOnce(t *testing.T) {
	t.Parallel()
	l := &limiter{limits: []runner.Limit{{Key: "service/svc", Window: time.Minute, MaxAttempts: 5, Rule: "the rate of svc"}, {Key: "all", Window: time.Hour, MaxCost: 3, Cost: 0.5, Budget: true}}}
	d := serveAt(t, l)
	want := []engine.Limit{
		{Limit: store.Limit{Key: "http:service/svc", Window: time.Minute, MaxAttempts: 5}, Rule: "the rate of svc"},
		{Limit: store.Limit{Key: "http:all", Window: time.Hour, MaxCost: 3, Cost: 0.5}, Budget: true, Rule: "all"},
	}
	for range 3 {
		got, err := d.Limits(t.Context(), node("a", `{"x": 1}`), false)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	require.Equal(t, []string{`svc.a {"x": 1}`}, l.asked)
	// Another operation, or another policy, is another question; so is one whose answer is known to be wrong.
	for _, n := range []*plan.Call{node("b", `{"x": 1}`), node("a", `{"x": 2}`)} {
		_, err := d.Limits(t.Context(), n, false)
		require.NoError(t, err)
	}
	l.say(nil, nil)
	got, err := d.Limits(t.Context(), node("a", `{"x": 1}`), true)
	require.NoError(t, err)
	require.Empty(t, got)
	require.Equal(t, 4, l.times())
	// A runner that does not answer when the answer is known to be wrong is not guessed at.
	l.say(nil, fault.New(fault.Unavailable, "no"))
	_, err = d.Limits(t.Context(), node("a", `{"x": 1}`), true)
	f, ok := fault.As(err)
	require.True(t, ok)
	require.Equal(t, fault.Unavailable, f.Code)
	require.True(t, f.Retryable)
	_, err = d.Limits(t.Context(), node("a", `{"x": 1}`), false)
	require.NoError(t, err, "what is known is taken for true for a minute")
}

func TestRunnersWithoutLimits(t *testing.T) {
	t.Parallel()
	w := work(t)
	d, err := dispatch.New(dispatch.Options{Runners: map[string]string{"http": w.address}, Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	defer d.Close()
	got, err := d.Limits(t.Context(), node("a", `{}`), false)
	require.NoError(t, err)
	require.Empty(t, got)
	// One that is not there is not taken for one without limits.
	gone, err := dispatch.New(dispatch.Options{Runners: map[string]string{"http": refusing(t)}, Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	defer gone.Close()
	away := node("a", `{}`)
	away.Timeout = 100 * time.Millisecond // it is waited for
	_, err = gone.Limits(t.Context(), away, false)
	require.ErrorContains(t, err, "does not tell the limits of svc.a")
}

// dispatchTo gives a dispatcher to an address, and a listener there that the test answers at.
func dispatchTo(t *testing.T) (*dispatch.Dispatcher, net.Listener) {
	t.Helper()
	lis, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = lis.Close() })
	d, err := dispatch.New(dispatch.Options{Runners: map[string]string{"http": lis.Addr().String()}, Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	t.Cleanup(d.Close)
	return d, lis
}

// TestLimitsOfARunnerThatIsBeingStarted: it is waited for, as it is with a job, so that a call that may not be repeated does not fail.
func TestLimitsOfARunnerThatIsBeingStarted(t *testing.T) {
	t.Parallel()
	d, lis := dispatchTo(t)
	type answer struct {
		limits []engine.Limit
		err    error
	}
	answered := make(chan answer, 1)
	go func() {
		limits, err := d.Limits(t.Context(), node("a", `{}`), false)
		answered <- answer{limits, err}
	}()
	c, err := lis.Accept()
	require.NoError(t, err)
	require.NoError(t, c.Close())
	require.NoError(t, lis.Close())
	lis, err = (&net.ListenConfig{}).Listen(t.Context(), "tcp", lis.Addr().String())
	require.NoError(t, err)
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	served := make(chan error, 1)
	go func() {
		served <- runner.Serve(ctx, lis, &limiter{limits: []runner.Limit{{Key: "k", Window: time.Minute, MaxAttempts: 5}}}, nil, runner.Options{DrainTimeout: time.Millisecond})
	}()
	got := <-answered
	stop()
	require.NoError(t, <-served)
	require.NoError(t, got.err)
	require.Len(t, got.limits, 1)
}

// TestLimitsOfARunnerThatHangs: who waits for its answer does so together with the others, and no longer than its run lives.
func TestLimitsOfARunnerThatHangs(t *testing.T) {
	t.Parallel()
	d, lis := dispatchTo(t)
	first, endFirst := context.WithCancel(t.Context())
	defer endFirst()
	asked := make(chan error, 1)
	go func() {
		_, err := d.Limits(first, node("a", `{}`), false)
		asked <- err
	}()
	c, err := lis.Accept() // it asks now
	require.NoError(t, err)
	defer func() { _ = c.Close() }()
	enough := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(enough)
	_, err = d.Limits(ctx, node("a", `{}`), false)
	require.ErrorIs(t, err, enough)
	select {
	case err := <-asked:
		t.Fatalf("it was waited until the other one gave up: %v", err)
	default:
	}
	endFirst()
	require.Error(t, <-asked)

	const callers = 20
	done := make(chan error, callers)
	brief := node("b", `{}`)
	brief.Timeout = 100 * time.Millisecond
	for range callers {
		go func() {
			_, err := d.Limits(t.Context(), brief, false)
			done <- err
		}()
	}
	late := time.After(30 * time.Second) // one after the other they would take minutes
	for range callers {
		select {
		case err := <-done:
			require.Error(t, err)
		case <-late:
			t.Fatal("the callers wait one after the other")
		}
	}
}

// TestHostileLimits: a runner may be anybody's.
func TestHostileLimits(t *testing.T) {
	t.Parallel()
	l := &limiter{}
	d := serveAt(t, l)
	for name, limits := range map[string][]runner.Limit{
		"no key":          {{Window: time.Minute}},
		"a long key":      {{Key: strings.Repeat("k", 2000), Window: time.Minute}},
		"no window":       {{Key: "k"}},
		"a window of old": {{Key: "k", Window: -time.Minute}},
		"a long window":   {{Key: "k", Window: 1000 * 24 * time.Hour}},
		"one key twice":   {{Key: "k", Window: time.Minute}, {Key: "k", Window: time.Minute}},
		"no number":       {{Key: "k", Window: time.Minute, MaxCost: math.NaN()}},
		"no end":          {{Key: "k", Window: time.Minute, MaxCost: 1, Cost: math.Inf(1)}},
		"too many":        make([]runner.Limit, 100),
	} {
		l.say(limits, nil)
		_, err := d.Limits(t.Context(), node(name, `{}`), false)
		require.Error(t, err, name)
	}
	l.say([]runner.Limit{{Key: "k", Window: time.Minute, MaxAttempts: -5, MaxCost: -1, Cost: -1, Rule: strings.Repeat("r", 10_000)}}, nil)
	got, err := d.Limits(t.Context(), node("negative", `{}`), false)
	require.NoError(t, err)
	require.Equal(t, []engine.Limit{{Limit: store.Limit{Key: "http:k", Window: time.Minute}, Rule: "k"}}, got)
}

// TestWhatARunnerSaysOfSlots reaches the engine.
func TestWhatARunnerSaysOfSlots(t *testing.T) {
	t.Parallel()
	failure := fault.New(fault.RateLimited, "429")
	failure.RetryAfter = time.Minute
	l := &limiter{result: runner.Result{Err: failure, Closes: true}}
	d := serveAt(t, l)
	execute := func(id string, reserved *float64) *engine.Outcome {
		job := &store.Job{ID: id, IdempotencyKey: id, ExecutionType: "http", Attempts: 1, Timeout: time.Minute}
		return d.Execute(t.Context(), &engine.Call{Job: job, Node: node("a", `{}`), Epoch: 1, Reserved: reserved}, func(int64, string, string, time.Time) {})
	}
	out := execute("1", new(0.25))
	require.True(t, out.Closes)
	require.False(t, out.Unused)
	require.Equal(t, time.Minute, out.Err.RetryAfter)
	require.InDelta(t, 0.25, *l.jobs[0].ReservedCost, 0)
	l.result = runner.Result{Err: errors.New("larger"), LimitsChanged: true}
	out = execute("2", nil)
	require.True(t, out.Again && out.LimitsChanged && out.Unused)
	require.Nil(t, l.jobs[1].ReservedCost)
	l.result = runner.Result{Err: fault.New(fault.PolicyViolation, "no"), Unused: true, Closes: true}
	out = execute("3", nil)
	require.True(t, out.Unused)
	require.False(t, out.Closes, "nobody said for how long")
	l.result = runner.Result{Output: json.RawMessage(`1`)}
	out = execute("4", nil)
	require.False(t, out.Unused || out.Again || out.Closes)
}

// TestALimitedJobThatIsHandedBackIsBegunByTheEngine: it may have called something, so that it takes another slot.
func TestALimitedJobThatIsHandedBackIsBegunByTheEngine(t *testing.T) {
	t.Parallel()
	w := &worker{began: make(chan *runner.Job, 10), release: make(chan struct{}), ended: make(chan error, 10)}
	lis, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	defer stop()
	served := make(chan error, 1)
	go func() { served <- runner.Serve(ctx, lis, w, nil, runner.Options{DrainTimeout: time.Millisecond}) }()
	d, err := dispatch.New(dispatch.Options{Runners: map[string]string{"http": lis.Addr().String()}, Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	defer d.Close()
	out := make(chan *engine.Outcome, 1)
	go func() {
		job := &store.Job{ID: "j", IdempotencyKey: "j", ExecutionType: "http", Attempts: 1, Timeout: time.Minute}
		out <- d.Execute(t.Context(), &engine.Call{Job: job, Node: node("a", `{}`), Epoch: 1, Reserved: new(0.0)}, func(int64, string, string, time.Time) {})
	}()
	within(t, "the job", w.began)
	stop() // the runner drains, and ends it
	got := within(t, "the outcome", out)
	require.True(t, got.Again)
	require.False(t, got.Unused)
	require.NoError(t, <-served)
}
