package dispatch_test

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"

	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/services/orchestrator/internal/dispatch"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/plan"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// echoing answers with its input, or ends with its context where the operation is hang.
type echoing struct{ begun chan string }

func (echoing) Describe(context.Context) (*runner.Description, error) {
	return &runner.Description{Name: "echo-runner", Types: []runner.Type{{Name: "echo"}}}, nil
}

func (echoing) Validate(context.Context, *runner.Service) ([]runner.Problem, error) { return nil, nil }

func (e echoing) Execute(ctx context.Context, j *runner.Job, _ runner.Sink) (*runner.Result, error) {
	if j.Operation.Name == "hang" {
		e.begun <- j.ID
		<-ctx.Done()
		return &runner.Result{}, nil
	}
	return &runner.Result{Output: j.Input}, nil
}

// serveEcho serves at an address until stop, and counts the streams.
func serveEcho(t *testing.T, address string, e echoing, streams *atomic.Int64) (at string, stop func()) {
	t.Helper()
	lis, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", address)
	require.NoError(t, err)
	s := grpc.NewServer(grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		streams.Add(1)
		return handler(srv, ss)
	}))
	h := runner.Register(s, e, runner.Options{MaxConcurrency: 1000})
	done := make(chan error, 1)
	go func() { done <- s.Serve(lis) }()
	stop = sync.OnceFunc(func() {
		h.Close()
		s.GracefulStop()
		require.NoError(t, <-done)
	})
	t.Cleanup(stop)
	return lis.Addr().String(), stop
}

func echoCall(id, operation string) *engine.Call {
	return &engine.Call{Epoch: 1, Node: &plan.Call{}, Job: &store.Job{
		ID: id, Service: "s", Operation: operation, ExecutionType: "echo", Attempts: 1, Timeout: time.Minute, Input: []byte(`{"id":"` + id + `"}`),
	}}
}

func noLines(int64, string, string, time.Time) {}

// Jobs take turns on streams: each gets its own result, and a stream is opened for each that runs beside others alone.
func TestJobsTakeTurnsOnStreams(t *testing.T) {
	t.Parallel()
	var streams atomic.Int64
	address, stop := serveEcho(t, "127.0.0.1:0", echoing{}, &streams)
	d, err := dispatch.New(dispatch.Options{Runners: map[string]string{"echo": address}, Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	defer d.Close()
	work := func(id string) {
		out := d.Execute(t.Context(), echoCall(id, "echo"), noLines)
		if out.Err != nil || string(out.Output) != `{"id":"`+id+`"}` {
			t.Errorf("job %s: %s, %v", id, out.Output, out.Err)
		}
	}
	for n := range 50 {
		work(fmt.Sprintf("one-%d", n))
	}
	require.EqualValues(t, 1, streams.Load())
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			for n := range 50 {
				work(fmt.Sprintf("%d-%d", worker, n))
			}
		})
	}
	wg.Wait()
	require.LessOrEqual(t, streams.Load(), int64(8))

	// The runner ends and comes again: what waited at the old one is given up at once.
	stop()
	_, _ = serveEcho(t, address, echoing{}, &streams)
	began := time.Now()
	work("after")
	require.Less(t, time.Since(began), 5*time.Second, "a lease was waited for, though nothing was begun")
}

// A cancel ends the job that it is meant for, and not the next one on the stream.
func TestACancelEndsItsOwnJobAlone(t *testing.T) {
	t.Parallel()
	var streams atomic.Int64
	e := echoing{begun: make(chan string, 1)}
	address, _ := serveEcho(t, "127.0.0.1:0", e, &streams)
	d, err := dispatch.New(dispatch.Options{Runners: map[string]string{"echo": address}, Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	defer d.Close()
	for n := range 100 {
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan *engine.Outcome, 1)
		go func() { ended <- d.Execute(ctx, echoCall(fmt.Sprintf("hang-%d", n), "hang"), noLines) }()
		<-e.begun
		cancel()
		require.NotNil(t, (<-ended).Err)
		// One that ends as it is cancelled.
		ctx, cancel = context.WithCancel(t.Context())
		go cancel()
		d.Execute(ctx, echoCall(fmt.Sprintf("quick-%d", n), "echo"), noLines)
		out := d.Execute(t.Context(), echoCall(fmt.Sprintf("next-%d", n), "echo"), noLines)
		require.Nil(t, out.Err)
	}
}
