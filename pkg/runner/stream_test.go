package runner_test

import (
	"context"
	"io"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/runnertest"
)

type stream = grpc.BidiStreamingClient[runnerv1.ExecuteRequest, runnerv1.ExecuteResponse]

func say(t *testing.T, s stream, j *runnerv1.Job) {
	t.Helper()
	require.NoError(t, s.Send(&runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Start{Start: j}}))
}

// hear reads to the end of a job.
func hear(t *testing.T, s stream) (*runnerv1.Started, *runnerv1.Finished) {
	t.Helper()
	var started *runnerv1.Started
	for {
		m, err := s.Recv()
		require.NoError(t, err)
		if m.GetStarted() != nil {
			started = m.GetStarted()
		}
		if m.GetFinished() != nil {
			require.NotNil(t, started)
			return started, m.GetFinished()
		}
	}
}

func more(id string) *runnerv1.Job {
	j := job(id)
	j.More = true
	return j
}

// One job follows the other on a stream where both sides want it; what was meant for one does nothing to the next.
func TestJobsFollowEachOtherOnAStream(t *testing.T) {
	t.Parallel()
	client := runnertest.Start(t, one(func(_ context.Context, j *runner.Job, _ runner.Sink) (*runner.Result, error) {
		return &runner.Result{Output: j.Input}, nil
	}))
	s, err := client.Execute(t.Context())
	require.NoError(t, err)
	for _, id := range []string{"a", "b", "c"} {
		j := more(id)
		j.Input = []byte(`{"id":"` + id + `"}`)
		say(t, s, j)
		started, finished := hear(t, s)
		require.True(t, started.GetMore())
		require.JSONEq(t, string(j.GetInput()), string(finished.GetOutput()))
		// They come when the job has ended.
		require.NoError(t, s.Send(&runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Cancel{Cancel: &runnerv1.Cancel{}}}))
		require.NoError(t, s.Send(&runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Renew{Renew: &runnerv1.Renew{}}}))
	}
	say(t, s, job("last"))
	started, _ := hear(t, s)
	require.False(t, started.GetMore())
	_, err = s.Recv()
	require.ErrorIs(t, err, io.EOF)
}

func TestAStreamThatWaitsEndsWithItsClientAndWithADrain(t *testing.T) {
	t.Parallel()
	quick := one(func(context.Context, *runner.Job, runner.Sink) (*runner.Result, error) { return &runner.Result{}, nil })
	client, stop := runnertest.Serve(t, quick)
	s, err := client.Execute(t.Context())
	require.NoError(t, err)
	say(t, s, more("a"))
	hear(t, s)
	require.NoError(t, s.CloseSend())
	_, err = s.Recv()
	require.ErrorIs(t, err, io.EOF)

	s, err = client.Execute(t.Context())
	require.NoError(t, err)
	say(t, s, more("b"))
	hear(t, s)
	began := time.Now()
	stop()
	_, err = s.Recv()
	require.ErrorIs(t, err, io.EOF)
	require.Less(t, time.Since(began), 20*time.Second, "the drain waited for a stream without a job")
}

func TestASecondStartBeforeTheFirstHasFinishedIsRefused(t *testing.T) {
	t.Parallel()
	client := runnertest.Start(t, one(func(ctx context.Context, _ *runner.Job, _ runner.Sink) (*runner.Result, error) {
		<-ctx.Done()
		return &runner.Result{}, nil
	}))
	s, err := client.Execute(t.Context())
	require.NoError(t, err)
	say(t, s, more("a"))
	_, err = s.Recv()
	require.NoError(t, err)
	say(t, s, more("b"))
	_, err = s.Recv()
	require.Equal(t, codes.InvalidArgument, status.Code(err), "%v", err)
}
