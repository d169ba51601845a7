package runner_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/runnertest"
)

func batch(id string) *runnerv1.Job {
	j := job(id)
	j.Batch = true
	return j
}

func moreBatches(id string) *runnerv1.Job {
	j := batch(id)
	j.More = true
	return j
}

// kinds are the names of events, in order.
func kinds(events []*runnerv1.ExecuteResponse) []string {
	var out []string
	for _, e := range events {
		switch {
		case e.GetStarted() != nil:
			out = append(out, "started")
		case e.GetLog() != nil:
			out = append(out, e.GetLog().GetText())
		case e.GetUsage() != nil:
			out = append(out, "usage")
		case e.GetFinished() != nil:
			out = append(out, "finished")
		default:
			out = append(out, fmt.Sprint(e))
		}
	}
	return out
}

func saying(_ context.Context, j *runner.Job, sink runner.Sink) (*runner.Result, error) {
	sink.Log("stdout", "one\ntwo")
	sink.Usage(&runnerv1.ResourceUsage{MemoryMb: new(1.0)})
	return &runner.Result{Output: j.Input}, nil
}

// What a quick job has to say is one message where its start allows it, and one each where it does not.
func TestAQuickJobIsOneMessage(t *testing.T) {
	t.Parallel()
	client := runnertest.Start(t, one(saying))
	s, err := client.Execute(t.Context())
	require.NoError(t, err)
	all := []string{"started", "one", "two", "usage", "finished"}
	single := 0
	for n := range 100 { // on a machine that is busy one may take longer than quick ones do
		say(t, s, moreBatches(fmt.Sprint(n)))
		var events []*runnerv1.ExecuteResponse
		messages := 0
		for len(events) == 0 || events[len(events)-1].GetFinished() == nil {
			m, err := s.Recv()
			require.NoError(t, err)
			events = append(events, runner.Events(m)...)
			messages++
		}
		require.Equal(t, all, kinds(events))
		require.True(t, events[0].GetStarted().GetMore())
		require.NotNil(t, events[0].GetStarted().GetHeld())
		if messages == 1 {
			single++
		}
	}
	require.Positive(t, single)

	say(t, s, more("plain"))
	for _, kind := range all {
		m, err := s.Recv()
		require.NoError(t, err)
		require.Equal(t, []string{kind}, kinds([]*runnerv1.ExecuteResponse{m}))
		require.Nil(t, m.GetStarted().GetHeld())
	}
}

// A job that goes on says so, and what it does, while it runs, and is steered as any other.
func TestABatchDoesNotHoldBackAJobThatGoesOn(t *testing.T) {
	t.Parallel()
	next := make(chan string)
	client := runnertest.Start(t, one(func(ctx context.Context, _ *runner.Job, sink runner.Sink) (*runner.Result, error) {
		for {
			select {
			case line := <-next:
				sink.Log("stdout", line)
			case <-ctx.Done():
				return &runner.Result{}, nil
			}
		}
	}))
	j := batch("long")
	j.Lease = durationpb.New(time.Minute)
	call := runnertest.Begin(t, client, j)
	require.Positive(t, call.Started().GetHeld().AsDuration())
	for _, line := range []string{"a", "b"} {
		next <- line
		call.Line(line)
	}
	call.Renew()
	call.Until(func(e *runnerv1.ExecuteResponse) bool { return e.GetRenewed() != nil })
	call.Cancel("enough")
	out := call.Wait()
	require.Equal(t, string(fault.Cancelled), out.Code())
	require.Equal(t, []string{"a", "b"}, out.Lines("stdout"))
}

// Quick jobs and others follow one another on a stream, whoever reads it; a cancel that comes late does nothing to the next.
func TestQuickAndLongJobsTakeTurns(t *testing.T) {
	t.Parallel()
	s := &scripted{operations: map[string]operation{"op": saying, "hang": untilEnd}}
	client := runnertest.Start(t, s)
	var streams sync.WaitGroup
	for w := range 4 {
		streams.Go(func() {
			s, err := client.Execute(t.Context())
			if err != nil {
				t.Errorf("execute: %v", err)
				return
			}
			send := func(m *runnerv1.ExecuteRequest) {
				if err := s.Send(m); err != nil {
					t.Errorf("send: %v", err)
				}
			}
			cancel := &runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Cancel{Cancel: &runnerv1.Cancel{}}}
			for n := range 60 {
				j, want := moreBatches(fmt.Sprintf("%d-%d", w, n)), ""
				j.Batch = n%7 != 0
				if n%3 == 0 {
					j.Operation.Name, want = "hang", string(fault.Cancelled)
				}
				send(&runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Start{Start: j}})
				if n%3 == 0 && n%2 == 0 {
					send(cancel) // at once, before the job is released
				}
				var events []*runnerv1.ExecuteResponse
				for len(events) == 0 || events[len(events)-1].GetFinished() == nil {
					m, err := s.Recv()
					if err != nil {
						t.Errorf("job %d: %v", n, err)
						return
					}
					if events = append(events, runner.Events(m)...); n%3 == 0 && n%2 != 0 && m.GetFinished() == nil {
						send(cancel)
					}
				}
				if kinds(events)[0] != "started" || events[len(events)-1].GetFinished().GetError().GetCode() != want {
					t.Errorf("job %d: %v", n, kinds(events))
				}
				send(cancel) // it is for nobody
			}
			if err := s.CloseSend(); err != nil {
				t.Errorf("close: %v", err)
			}
			if m, err := s.Recv(); err != io.EOF { //nolint:errorlint // as gRPC gives it
				t.Errorf("at the end: %v, %v", m, err)
			}
		})
	}
	streams.Wait()
}

// Who takes a job over ends its old stream also before that was told anything.
func TestATakeoverOfAQuietJob(t *testing.T) {
	t.Parallel()
	began := make(chan struct{}, 1)
	client := runnertest.Start(t, one(func(ctx context.Context, _ *runner.Job, _ runner.Sink) (*runner.Result, error) {
		began <- struct{}{}
		<-ctx.Done()
		return &runner.Result{}, nil
	}))
	j := batch("j")
	old := runnertest.Begin(t, client, j)
	<-began
	j = proto.CloneOf(j)
	j.Epoch = 9
	young := runnertest.Begin(t, client, j)
	require.True(t, young.Started().GetAttached())
	require.Equal(t, codes.Aborted, status.Code(old.Wait().Err))
	young.Cancel("enough")
	require.Equal(t, string(fault.Cancelled), young.Wait().Code())
}

// A stream that breaks at once ends a job without a lease, and leaves one with a lease to whoever attaches to it.
func TestAQuietJobWhoseStreamBreaks(t *testing.T) {
	t.Parallel()
	began, ended, release := make(chan struct{}, 1), make(chan error, 1), make(chan struct{})
	client := runnertest.Start(t, one(func(ctx context.Context, _ *runner.Job, _ runner.Sink) (*runner.Result, error) {
		began <- struct{}{}
		select {
		case <-ctx.Done():
		case <-release:
		}
		ended <- context.Cause(ctx)
		return &runner.Result{Output: json.RawMessage(`"done"`)}, nil
	}))
	call := runnertest.Begin(t, client, batch("free"))
	<-began
	call.Break()
	require.ErrorContains(t, <-ended, "the caller went away")

	j := batch("leased")
	j.Lease = durationpb.New(time.Minute)
	call = runnertest.Begin(t, client, j)
	<-began
	call.Break()
	call.Wait()
	j = proto.CloneOf(j)
	j.AttachOnly = true
	second := runnertest.Begin(t, client, j)
	require.True(t, second.Started().GetAttached())
	close(release)
	require.NoError(t, <-ended)
	require.Equal(t, `"done"`, string(second.Wait().Finished.GetOutput()))
}

// A lease counts from the start, also one that is shorter than events are held back.
func TestTheLeaseOfAQuietJobLapses(t *testing.T) {
	t.Parallel()
	client := runnertest.Start(t, one(untilEnd))
	for _, lease := range []time.Duration{time.Millisecond, 50 * time.Millisecond} {
		j := batch(lease.String())
		j.Lease = durationpb.New(lease)
		out := runnertest.Begin(t, client, j).Wait()
		require.Equal(t, string(fault.Unavailable), out.Code())
		require.True(t, out.Finished.GetHandedBack())
		require.NotNil(t, out.Started)
	}
}

// A timeout counts from the start as well.
func TestTheTimeoutOfAQuietJob(t *testing.T) {
	t.Parallel()
	type seen struct {
		err, cause, derived error
		left                time.Duration
	}
	ended := make(chan seen, 1)
	client := runnertest.Start(t, one(func(ctx context.Context, _ *runner.Job, _ runner.Sink) (*runner.Result, error) {
		s := seen{}
		deadline, ok := ctx.Deadline()
		if s.left = time.Until(deadline); !ok {
			s.left = time.Hour
		}
		derived, cancel := context.WithCancel(ctx)
		defer cancel()
		<-derived.Done()
		s.err, s.cause, s.derived = ctx.Err(), context.Cause(ctx), context.Cause(derived)
		ended <- s
		return &runner.Result{}, nil
	}))
	for _, timeout := range []time.Duration{time.Millisecond, 50 * time.Millisecond} {
		for _, quiet := range []bool{true, false} {
			j := job(fmt.Sprint(timeout, quiet))
			j.Timeout, j.Batch = durationpb.New(timeout), quiet
			out := runnertest.Begin(t, client, j).Wait()
			require.Equal(t, string(fault.Timeout), out.Code())
			require.Contains(t, out.Finished.GetError().GetMessage(), "its timeout of "+timeout.String())
			s := <-ended
			require.LessOrEqual(t, s.left, timeout)
			require.ErrorIs(t, s.err, context.DeadlineExceeded)
			require.Equal(t, fault.Timeout, fault.From(s.cause).Code)
			require.Equal(t, fault.From(s.cause).Message, fault.From(s.derived).Message)
		}
	}
	call := runnertest.Begin(t, client, batch("cancelled"))
	call.Cancel("enough")
	require.Equal(t, string(fault.Cancelled), call.Wait().Code())
	require.ErrorIs(t, (<-ended).err, context.Canceled)
}

// A drain hands a quiet job back, and its stream ends in good order.
func TestADrainHandsAQuietJobBack(t *testing.T) {
	t.Parallel()
	began := make(chan struct{}, 1)
	client, stop := runnertest.Serve(t, one(func(ctx context.Context, _ *runner.Job, _ runner.Sink) (*runner.Result, error) {
		began <- struct{}{}
		<-ctx.Done()
		return &runner.Result{}, nil
	}))
	j := moreBatches("j")
	j.Lease = durationpb.New(time.Minute)
	call := runnertest.Begin(t, client, j)
	<-began
	stop()
	out := call.Wait()
	require.NoError(t, out.Err)
	require.True(t, out.Finished.GetHandedBack())
}

// A long log does not become one message too large to be sent.
func TestBatchesAreBounded(t *testing.T) {
	t.Parallel()
	line := make([]byte, runner.MaxLogLine)
	for i := range line {
		line[i] = 'x'
	}
	client := runnertest.Start(t, one(func(_ context.Context, _ *runner.Job, sink runner.Sink) (*runner.Result, error) {
		for range runner.MaxLogBytes / runner.MaxLogLine {
			sink.Log("stdout", string(line))
		}
		return &runner.Result{Output: json.RawMessage(`1`)}, nil
	}))
	s, err := client.Execute(t.Context())
	require.NoError(t, err)
	say(t, s, batch("j"))
	events := 0
	for {
		m, err := s.Recv()
		if err == io.EOF { //nolint:errorlint // as gRPC gives it
			break
		}
		require.NoError(t, err)
		require.Less(t, proto.Size(m), 1<<20)
		events += len(runner.Events(m))
	}
	require.Equal(t, 1+runner.MaxLogBytes/runner.MaxLogLine+1, events)
}

// BenchmarkStream is jobs in a row on one stream, as an orchestrator sends them.
func BenchmarkStream(b *testing.B) {
	client := runnertest.Start(b, one(saying))
	s, err := client.Execute(b.Context())
	require.NoError(b, err)
	b.ReportAllocs()
	n := 0
	for b.Loop() {
		n++
		j := moreBatches(fmt.Sprint(n))
		j.Lease, j.Timeout = durationpb.New(time.Minute), durationpb.New(time.Minute)
		require.NoError(b, s.Send(&runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Start{Start: j}}))
		for over := false; !over; {
			m, err := s.Recv()
			require.NoError(b, err)
			events := runner.Events(m)
			over = events[len(events)-1].GetFinished() != nil
		}
	}
}
