// Package runnertest drives a runner over a real gRPC connection with mutual TLS, as the
// orchestrator does, and holds the conformance tests that every runner must pass.
package runnertest

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/mesh"
	"github.com/specql/mesh/pkg/runner"
)

// Patience is how long the functions here wait for what must come.
const Patience = 30 * time.Second

// Start serves a runner on loopback with mutual TLS until the test ends, and gives a client
// whose certificate says orchestrator. Of several options the last ones count.
func Start(t testing.TB, jr runner.JobRunner, options ...runner.Options) runnerv1.RunnerServiceClient {
	t.Helper()
	client, stop := Serve(t, jr, options...)
	t.Cleanup(stop)
	return client
}

// Serve is [Start] with a function that drains the server and waits for its end. The
// function may be called more than once.
func Serve(t testing.TB, jr runner.JobRunner, options ...runner.Options) (client runnerv1.RunnerServiceClient, stop func()) {
	t.Helper()
	conn, stop := connect(t, jr, options...)
	return runnerv1.NewRunnerServiceClient(conn), stop
}

func connect(t testing.TB, jr runner.JobRunner, options ...runner.Options) (*grpc.ClientConn, func()) {
	t.Helper()
	o := runner.Options{DrainTimeout: time.Second}
	for _, given := range options {
		o = given
	}
	authority, err := mesh.NewAuthority()
	require.NoError(t, err)
	server, err := authority.Issue("test-runner")
	require.NoError(t, err)
	orchestrator, err := authority.Issue(mesh.RoleOrchestrator)
	require.NoError(t, err)
	var listen net.ListenConfig
	lis, err := listen.Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan struct{})
	var served error
	go func() {
		defer close(ended)
		served = runner.Serve(ctx, lis, jr, server, o)
	}()
	conn, err := mesh.Dial(lis.Addr().String(), orchestrator, mesh.DialOptions{ServerRole: "test-runner"})
	require.NoError(t, err)
	return conn, func() {
		cancel()
		<-ended
		_ = conn.Close() // closed already when called again
		require.NoError(t, served)
	}
}

// Outcome is all that a stream said of a job.
type Outcome struct {
	Started *runnerv1.Started
	Logs    []*runnerv1.Log
	Usages  []*runnerv1.ResourceUsage
	// Finished is nil when the stream ended without it.
	Finished *runnerv1.Finished
	// Err is how the stream ended; nil after finished. It is a *fault.Error.
	Err error
}

// Code is the code of the job's error, or "" for a success.
func (o *Outcome) Code() string { return o.Finished.GetError().GetCode() }

// Lines are the log's texts of one of stdout, stderr and runner, or of all for "".
func (o *Outcome) Lines(stream string) []string {
	var lines []string
	for _, l := range o.Logs {
		if stream == "" || l.GetStream() == stream {
			lines = append(lines, l.GetText())
		}
	}
	return lines
}

// Execute runs a job to its end.
func Execute(t testing.TB, client runnerv1.RunnerServiceClient, job *runnerv1.Job) *Outcome {
	t.Helper()
	return Begin(t, client, job).Wait()
}

// Call is a job in flight.
type Call struct {
	t      testing.TB
	stream grpc.BidiStreamingClient[runnerv1.ExecuteRequest, runnerv1.ExecuteResponse]
	cancel context.CancelFunc
	events chan *runnerv1.ExecuteResponse
	err    error // set before events is closed
	seen   []*runnerv1.ExecuteResponse
}

// Begin sends a job.
func Begin(t testing.TB, client runnerv1.RunnerServiceClient, job *runnerv1.Job) *Call {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	t.Cleanup(cancel)
	stream, err := client.Execute(ctx)
	require.NoError(t, err)
	c := &Call{t: t, stream: stream, cancel: cancel, events: make(chan *runnerv1.ExecuteResponse, 1)}
	c.send(&runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Start{Start: job}})
	go func() {
		defer close(c.events)
		for {
			e, err := stream.Recv()
			if err != nil {
				if !errors.Is(err, io.EOF) {
					c.err = err
				}
				return
			}
			for _, e := range runner.Events(e) {
				select {
				case c.events <- e:
				case <-ctx.Done():
					c.err = ctx.Err()
					return
				}
			}
		}
	}()
	return c
}

func (c *Call) send(req *runnerv1.ExecuteRequest) {
	c.t.Helper()
	// A stream that ended says why when it is read.
	if err := c.stream.Send(req); err != nil && !errors.Is(err, io.EOF) {
		require.NoError(c.t, err)
	}
}

// Cancel asks for the job's end.
func (c *Call) Cancel(reason string) {
	c.t.Helper()
	c.send(&runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Cancel{Cancel: &runnerv1.Cancel{Reason: reason}}})
}

// Renew renews the lease.
func (c *Call) Renew() {
	c.t.Helper()
	c.send(&runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Renew{Renew: &runnerv1.Renew{}}})
}

// Break cuts the stream off, as a caller that dies does.
func (c *Call) Break() { c.cancel() }

// Until reads until an event that the function accepts, and gives it. Wait gives all that was read too.
func (c *Call) Until(accept func(*runnerv1.ExecuteResponse) bool) *runnerv1.ExecuteResponse {
	c.t.Helper()
	deadline := time.After(Patience)
	for {
		select {
		case e, ok := <-c.events:
			if !ok {
				require.FailNow(c.t, "the stream ended before the event that was waited for", "%v", c.err)
			}
			c.seen = append(c.seen, e)
			if accept(e) {
				return e
			}
		case <-deadline:
			require.FailNow(c.t, "the event that was waited for did not come")
		}
	}
}

// Started waits for the first message.
func (c *Call) Started() *runnerv1.Started {
	c.t.Helper()
	return c.Until(func(e *runnerv1.ExecuteResponse) bool { return e.GetStarted() != nil }).GetStarted()
}

// Line waits for a log line with exactly this text.
func (c *Call) Line(text string) {
	c.t.Helper()
	c.Until(func(e *runnerv1.ExecuteResponse) bool { return e.GetLog() != nil && e.GetLog().GetText() == text })
}

// Wait reads to the stream's end.
func (c *Call) Wait() *Outcome {
	c.t.Helper()
	deadline := time.After(Patience)
	for open := true; open; {
		var e *runnerv1.ExecuteResponse
		select {
		case e, open = <-c.events:
			if open {
				c.seen = append(c.seen, e)
			}
		case <-deadline:
			require.FailNow(c.t, "the stream did not end")
		}
	}
	out := &Outcome{Err: c.err}
	for _, e := range c.seen {
		switch e := e.GetEvent().(type) {
		case *runnerv1.ExecuteResponse_Started:
			out.Started = e.Started
		case *runnerv1.ExecuteResponse_Log:
			out.Logs = append(out.Logs, e.Log)
		case *runnerv1.ExecuteResponse_Usage:
			out.Usages = append(out.Usages, e.Usage)
		case *runnerv1.ExecuteResponse_Finished:
			out.Finished = e.Finished
		}
	}
	return out
}

// Connect is [Start] that gives the connection itself.
func Connect(t testing.TB, jr runner.JobRunner, options ...runner.Options) *grpc.ClientConn {
	t.Helper()
	conn, stop := connect(t, jr, options...)
	t.Cleanup(stop)
	return conn
}
