package dispatch_test

import (
	"fmt"
	"log/slog"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner/runnertest"
	"github.com/specql/mesh/services/orchestrator/internal/dispatch"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/plan"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// doomed is a runner whose jobs end it before it has said anything, and which comes back empty; or that hands its jobs to
// somebody else.
type doomed struct {
	runnerv1.UnimplementedRunnerServiceServer

	end   func() error
	began atomic.Int64
	batch atomic.Bool
}

func (s *doomed) Execute(stream grpc.BidiStreamingServer[runnerv1.ExecuteRequest, runnerv1.ExecuteResponse]) error {
	m, err := stream.Recv()
	if err != nil {
		return err
	}
	if m.GetStart().GetAttachOnly() {
		return status.Error(codes.NotFound, "not here")
	}
	s.batch.Store(m.GetStart().GetBatch())
	s.began.Add(1)
	return s.end()
}

// doom starts a dispatcher with a doomed runner, whose connections it can cut.
func doom(t *testing.T, s *doomed) (*dispatch.Dispatcher, *runnertest.Link) {
	t.Helper()
	lis, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	server := grpc.NewServer()
	runnerv1.RegisterRunnerServiceServer(server, s)
	go func() { _ = server.Serve(lis) }()
	t.Cleanup(server.Stop)
	link := runnertest.NewLink(t, lis.Addr().String())
	d, err := dispatch.New(dispatch.Options{
		Runners: map[string]string{"shell": link.Address}, Lease: 500 * time.Millisecond, Logger: slog.New(slog.DiscardHandler),
	})
	require.NoError(t, err)
	t.Cleanup(d.Close)
	return d, link
}

// TestAJobThatKillsItsRunnerIsOneAttempt: also within the time in which nobody has been told that it began, and with slots of limits.
func TestAJobThatKillsItsRunnerIsOneAttempt(t *testing.T) {
	t.Parallel()
	for _, reserved := range []*float64{nil, new(1.0)} {
		t.Run(fmt.Sprint(reserved != nil), func(t *testing.T) {
			t.Parallel()
			s := &doomed{}
			d, link := doom(t, s)
			s.end = func() error {
				link.Cut()
				return nil
			}
			c := &engine.Call{Job: &store.Job{ID: "j", ExecutionType: "shell", MaxAttempts: 2, Timeout: time.Minute}, Node: &plan.Call{}, Reserved: reserved}
			out := d.Execute(t.Context(), c, func(int64, string, string, time.Time) {})
			require.True(t, s.batch.Load())
			require.EqualValues(t, 1, s.began.Load())
			require.Equal(t, fault.Unavailable, out.Err.Code)
			require.True(t, out.Unknown)
			require.False(t, out.Again || out.Unused)
		})
	}
}

// TestAJobWithOneAttemptIsToldOfAtOnce: nobody can begin it again by mistake.
func TestAJobWithOneAttemptIsToldOfAtOnce(t *testing.T) {
	t.Parallel()
	s := &doomed{end: func() error { return status.Error(codes.InvalidArgument, "no") }}
	d, _ := doom(t, s)
	c := &engine.Call{Job: &store.Job{ID: "j", ExecutionType: "shell", MaxAttempts: 1, Timeout: time.Minute}, Node: &plan.Call{}}
	require.Error(t, d.Execute(t.Context(), c, func(int64, string, string, time.Time) {}).Err)
	require.False(t, s.batch.Load())
}

// TestAJobThatIsTakenOverGoesOnElsewhere: whether or not it was told to have begun.
func TestAJobThatIsTakenOverGoesOnElsewhere(t *testing.T) {
	t.Parallel()
	s := &doomed{end: func() error { return status.Error(codes.Aborted, "epoch 2 took the job over") }}
	d, _ := doom(t, s)
	c := &engine.Call{Job: &store.Job{ID: "j", ExecutionType: "shell", MaxAttempts: 2, Timeout: time.Minute}, Node: &plan.Call{}}
	out := d.Execute(t.Context(), c, func(int64, string, string, time.Time) {})
	require.True(t, out.Unknown)
	require.False(t, out.Unused)
	require.EqualValues(t, 1, s.began.Load())
}
