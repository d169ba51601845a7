package dispatch_test

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/runnertest"
	"github.com/specql/mesh/services/orchestrator/internal/dispatch"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/plan"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// patience is how long the tests wait for what must come.
const patience = time.Minute

// worker is a runner whose jobs last until the test lets them go on, or they are ended.
type worker struct {
	address string
	began   chan *runner.Job
	release chan struct{}
	ended   chan error // why a job was ended
}

func (w *worker) Describe(context.Context) (*runner.Description, error) {
	return &runner.Description{Name: "worker", Types: []runner.Type{{Name: "http"}}}, nil
}

func (w *worker) Validate(context.Context, *runner.Service) ([]runner.Problem, error) {
	return nil, nil
}

func (w *worker) Execute(ctx context.Context, job *runner.Job, sink runner.Sink) (*runner.Result, error) {
	w.began <- job
	sink.Log("stdout", "running")
	select {
	case <-w.release:
		return &runner.Result{Output: json.RawMessage(`"done"`)}, nil
	case <-ctx.Done():
		w.ended <- context.Cause(ctx)
		return &runner.Result{}, nil
	}
}

// work starts a worker that ends with the test.
func work(t *testing.T) *worker {
	t.Helper()
	w := &worker{began: make(chan *runner.Job, 100), release: make(chan struct{}), ended: make(chan error, 100)}
	lis, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	w.address = lis.Addr().String()
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	served := make(chan error, 1)
	go func() { served <- runner.Serve(ctx, lis, w, nil, runner.Options{DrainTimeout: time.Millisecond}) }()
	t.Cleanup(func() {
		stop()
		require.NoError(t, <-served)
	})
	return w
}

// begin executes a call at an address, and gives what tells its outcome.
func begin(t *testing.T, ctx context.Context, address string, o dispatch.Options) <-chan *engine.Outcome {
	t.Helper()
	return beginHeard(t, ctx, address, o, func() {})
}

// beginHeard also calls heard with each line of the job, which tells that it has begun.
func beginHeard(t *testing.T, ctx context.Context, address string, o dispatch.Options, heard func()) <-chan *engine.Outcome {
	t.Helper()
	o.Runners, o.Logger = map[string]string{"http": address}, slog.New(slog.DiscardHandler)
	d, err := dispatch.New(o)
	require.NoError(t, err)
	out, ended := make(chan *engine.Outcome, 1), make(chan struct{})
	ctx, stop := context.WithCancelCause(ctx)
	go func() {
		defer close(ended)
		job := &store.Job{ID: "j", IdempotencyKey: "key", ExecutionType: "http", Attempts: 1, Timeout: time.Hour}
		out <- d.Execute(ctx, &engine.Call{Job: job, Node: &plan.Call{}, Epoch: 1}, func(int64, string, string, time.Time) { heard() })
	}()
	t.Cleanup(func() {
		stop(engine.ErrHandBack)
		<-ended
		d.Close()
	})
	return out
}

// within gives what a channel gives.
func within[T any](t *testing.T, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		require.FailNow(t, "it did not come: "+what)
		panic("not reached")
	}
}

func requireDone(t *testing.T, out *engine.Outcome) {
	t.Helper()
	require.Nil(t, out.Err)
	require.Equal(t, `"done"`, string(out.Output))
}

func TestRenewalsOutliveTheLease(t *testing.T) {
	t.Parallel()
	const lease = 2 * time.Second
	w := work(t)
	asked := make(chan struct{}, 100)
	out := begin(t, t.Context(), w.address, dispatch.Options{Lease: lease, Renew: func() bool {
		asked <- struct{}{}
		return true
	}})
	within(t, "the job", w.began)
	for range 10 { // once before the start, and three times a lease
		within(t, "a renewal", asked)
	}
	w.release <- struct{}{}
	requireDone(t, within(t, "the outcome", out))
	require.Empty(t, w.ended)
	require.Empty(t, w.began, "it ran once")
}

func TestAJobEndsWhenItsOrchestratorNoLongerOwnsIt(t *testing.T) {
	t.Parallel()
	w := work(t)
	var lost atomic.Bool
	refused := make(chan struct{}, 1000)
	out := begin(t, t.Context(), w.address, dispatch.Options{Lease: time.Second, Renew: func() bool {
		if lost.Load() {
			refused <- struct{}{}
		}
		return !lost.Load()
	}})
	first := within(t, "the job", w.began)
	lost.Store(true)
	require.ErrorContains(t, within(t, "the job's end", w.ended), "the lease of 1s lapsed")
	for range 5 {
		within(t, "a question", refused)
	}
	require.Empty(t, w.began, "while it is not known who owns the run, nothing is sent")
	require.Empty(t, out)

	// It owned the run all the time: the job runs again, in the same attempt.
	lost.Store(false)
	again := within(t, "the job", w.began)
	require.Equal(t, first.Attempt, again.Attempt)
	require.Equal(t, first.IdempotencyKey, again.IdempotencyKey)
	close(w.release)
	requireDone(t, within(t, "the outcome", out))
}

func TestALostOrchestratorLetsGo(t *testing.T) {
	t.Parallel()
	w := work(t)
	var lost atomic.Bool
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	out := begin(t, ctx, w.address, dispatch.Options{Lease: time.Second, Renew: func() bool { return !lost.Load() }})
	within(t, "the job", w.began)
	lost.Store(true)
	within(t, "the job's end", w.ended)
	cancel(engine.ErrHandBack)
	require.NotNil(t, within(t, "the outcome", out).Err)
	require.Empty(t, w.began)
}

func TestAJobIsFoundAgainAfterItsConnectionBroke(t *testing.T) {
	t.Parallel()
	w := work(t)
	link := runnertest.NewLink(t, w.address)
	heard := make(chan struct{}, 1)
	out := beginHeard(t, t.Context(), link.Address, dispatch.Options{Lease: 20 * time.Second}, func() { heard <- struct{}{} })
	within(t, "the job's line", heard)
	link.Cut()
	w.release <- struct{}{}
	requireDone(t, within(t, "the outcome", out))
	require.Len(t, w.began, 1, "it ran once")
}

func TestAJobThatEndedWhileItsConnectionWasBrokenIsFound(t *testing.T) {
	t.Parallel()
	w, other := work(t), work(t)
	link := runnertest.NewLink(t, w.address)
	out := begin(t, t.Context(), link.Address, dispatch.Options{Lease: 20 * time.Second})
	within(t, "the job", w.began)
	link.Switch(other.address) // which does not have it, and does not begin it
	link.Cut()
	w.release <- struct{}{}
	require.Eventually(t, func() bool { return link.Reached(other.address) }, patience, 5*time.Millisecond)
	link.Switch(w.address)
	link.Cut()
	requireDone(t, within(t, "the outcome", out))
	require.Empty(t, w.began)
	require.Empty(t, other.began)
}

func TestAJobThatNobodyHasAnyMoreIsLost(t *testing.T) {
	t.Parallel()
	w, other := work(t), work(t)
	link := runnertest.NewLink(t, w.address)
	const lease = time.Second
	heard := make(chan struct{}, 1)
	out := beginHeard(t, t.Context(), link.Address, dispatch.Options{Lease: lease}, func() { heard <- struct{}{} })
	within(t, "the job's line", heard)
	link.Switch(other.address)
	cut := time.Now()
	link.Cut()
	lost := within(t, "the outcome", out)
	require.Equal(t, fault.Unavailable, lost.Err.Code)
	require.Contains(t, lost.Err.Message, "lost in the middle of the job")
	require.True(t, lost.Unknown)
	require.GreaterOrEqual(t, time.Since(cut), lease, "another attempt must not run beside it")
	require.ErrorContains(t, within(t, "the job's end", w.ended), "lapsed")
	require.Empty(t, other.began, "a search begins nothing")
}

// silent is a runner service that takes jobs and never says that they have begun.
type silent struct {
	runnerv1.UnimplementedRunnerServiceServer
	took chan struct{}
}

func (s *silent) Execute(stream grpc.BidiStreamingServer[runnerv1.ExecuteRequest, runnerv1.ExecuteResponse]) error {
	if _, err := stream.Recv(); err != nil {
		return err
	}
	s.took <- struct{}{}
	<-stream.Context().Done()
	return nil
}

func TestAJobThatMayHaveBegunRunsElsewhereOnceItsLeaseIsOver(t *testing.T) {
	t.Parallel()
	lis, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s := &silent{took: make(chan struct{}, 100)}
	server := grpc.NewServer()
	runnerv1.RegisterRunnerServiceServer(server, s)
	served := make(chan error, 1)
	go func() { served <- server.Serve(lis) }()
	t.Cleanup(func() {
		server.Stop()
		require.NoError(t, <-served)
	})
	other := work(t)
	link := runnertest.NewLink(t, lis.Addr().String())
	const lease = time.Second
	out := begin(t, t.Context(), link.Address, dispatch.Options{Lease: lease})
	within(t, "the job", s.took)
	link.Switch(other.address)
	cut := time.Now()
	link.Cut()
	within(t, "the job", other.began)
	require.GreaterOrEqual(t, time.Since(cut), lease, "the first may have begun it, and holds it for so long")
	close(other.release)
	requireDone(t, within(t, "the outcome", out))
}

func TestARunnerThatStoppedAnsweringIsLost(t *testing.T) {
	t.Parallel()
	w := work(t)
	link := runnertest.NewLink(t, w.address)
	renewed := make(chan struct{}, 1000)
	out := begin(t, t.Context(), link.Address, dispatch.Options{Lease: 1500 * time.Millisecond, Renew: func() bool {
		renewed <- struct{}{}
		return true
	}})
	within(t, "the job", w.began)
	for range 4 {
		within(t, "a renewal", renewed)
	}
	link.Freeze()
	lost := within(t, "the outcome", out)
	require.Equal(t, fault.Unavailable, lost.Err.Code)
	require.Contains(t, lost.Err.Message, "does not answer any more")
	require.True(t, lost.Unknown)
	require.ErrorContains(t, within(t, "the job's end", w.ended), "lapsed")
}

func TestACancelReachesAJobWhoseConnectionBroke(t *testing.T) {
	t.Parallel()
	w := work(t)
	link := runnertest.NewLink(t, w.address)
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	out := begin(t, ctx, link.Address, dispatch.Options{Lease: 20 * time.Second})
	within(t, "the job", w.began)
	link.Cut()
	cancel(errors.New("enough"))
	require.ErrorContains(t, within(t, "the job's end", w.ended), "CANCELLED: enough")
	require.Equal(t, fault.Cancelled, within(t, "the outcome", out).Err.Code)
}

func TestASearchEndsWhenTheRunIsHandedBack(t *testing.T) {
	t.Parallel()
	w := work(t)
	link := runnertest.NewLink(t, w.address)
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	out := begin(t, ctx, link.Address, dispatch.Options{Lease: time.Hour})
	within(t, "the job", w.began)
	link.Down()
	cancel(engine.ErrHandBack)
	let := within(t, "the outcome", out)
	require.ErrorIs(t, let.Err, engine.ErrHandBack)
	require.True(t, let.Unknown)
	require.Empty(t, w.ended, "the job waits for its next owner")
}
