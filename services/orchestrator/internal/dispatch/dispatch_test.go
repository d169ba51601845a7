package dispatch_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/dispatch"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/plan"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// mute listens, takes connections and never says a word; reached tells of the first.
func mute(t *testing.T) (address string, reached <-chan struct{}) {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	first := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		var conns []net.Conn
		for {
			c, err := l.Accept()
			if err != nil {
				break
			}
			if conns = append(conns, c); len(conns) == 1 {
				close(first)
			}
		}
		for _, c := range conns {
			_ = c.Close()
		}
	}()
	t.Cleanup(func() {
		require.NoError(t, l.Close())
		<-done
	})
	return l.Addr().String(), first
}

// refusing is an address at which nobody listens any more.
func refusing(t *testing.T) string {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, l.Close())
	return l.Addr().String()
}

func TestCancelWhileTheRunnerIsUnreachableIsQuick(t *testing.T) {
	t.Parallel()
	cause := errors.New("cancelled on request: enough")
	execute := func(t *testing.T, ctx context.Context, address string) {
		d, err := dispatch.New(dispatch.Options{Runners: map[string]string{"http": address}, Logger: slog.New(slog.DiscardHandler)})
		require.NoError(t, err)
		defer d.Close()
		ended := make(chan *engine.Outcome, 1)
		go func() {
			ended <- d.Execute(ctx, &engine.Call{Job: &store.Job{ExecutionType: "http", Timeout: time.Minute}, Node: &plan.Call{}}, func(int64, string, string, time.Time) {})
		}()
		<-ctx.Done()
		cancelled := time.Now()
		out := <-ended
		require.Less(t, time.Since(cancelled), 2*time.Second)
		require.Equal(t, fault.Cancelled, out.Err.Code)
		require.Contains(t, out.Err.Message, "enough")
		require.False(t, out.Unknown, "the job was never sent")
	}
	t.Run("it refuses connections", func(t *testing.T) {
		t.Parallel()
		ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, cause)
		defer cancel()
		execute(t, ctx, refusing(t))
	})
	t.Run("it never answers", func(t *testing.T) {
		t.Parallel()
		address, reached := mute(t)
		ctx, cancel := context.WithCancelCause(t.Context())
		defer cancel(nil)
		go func() {
			<-reached
			cancel(cause)
		}()
		execute(t, ctx, address)
	})
}

func TestCallWithoutARunnerIsNotRepeated(t *testing.T) {
	t.Parallel()
	d, err := dispatch.New(dispatch.Options{Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	defer d.Close()
	out := d.Execute(t.Context(), &engine.Call{Job: &store.Job{ExecutionType: "wasm", Timeout: time.Minute}, Node: &plan.Call{}}, func(int64, string, string, time.Time) {})
	require.Equal(t, fault.Unavailable, out.Err.Code)
	require.False(t, out.Err.Retryable)
	require.Contains(t, out.Err.Message, "--runner wasm=ADDRESS")
}

// full is a runner that never has room.
type full struct {
	runnerv1.UnimplementedRunnerServiceServer

	asked chan struct{}
}

func (f full) Execute(grpc.BidiStreamingServer[runnerv1.ExecuteRequest, runnerv1.ExecuteResponse]) error {
	select {
	case f.asked <- struct{}{}:
	default:
	}
	return status.Error(codes.ResourceExhausted, "no room")
}

// A job that waits for a runner with room waits no more once its execution type is disabled.
func TestDisablingEndsTheWaitForARunner(t *testing.T) {
	t.Parallel()
	lis, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s, runner := grpc.NewServer(), full{asked: make(chan struct{}, 3)}
	runnerv1.RegisterRunnerServiceServer(s, runner)
	served := make(chan error, 1)
	go func() { served <- s.Serve(lis) }()
	d, err := dispatch.New(dispatch.Options{Runners: map[string]string{"http": lis.Addr().String()}, Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	defer func() {
		d.Close()
		s.Stop()
		require.NoError(t, <-served)
	}()
	disabled, ended := make(chan struct{}), make(chan *engine.Outcome, 1)
	go func() {
		job := &store.Job{ExecutionType: "http", Timeout: time.Minute}
		ended <- d.Execute(t.Context(), &engine.Call{Job: job, Node: node("o", `{}`), Disabled: disabled}, func(int64, string, string, time.Time) {})
	}()
	for range cap(runner.asked) {
		<-runner.asked
	}
	require.Empty(t, ended)
	close(disabled)
	select {
	case out := <-ended:
		require.Equal(t, fault.Disabled, out.Err.Code)
		require.True(t, out.Unused)
		require.False(t, out.Unknown)
	case <-time.After(20 * time.Second):
		require.Fail(t, "the job waits on")
	}
}
