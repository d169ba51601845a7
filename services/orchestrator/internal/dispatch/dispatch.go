// Package dispatch carries calls to runner services. It is the only importer of the runner
// stubs: it finds a replica, starts the job, renews its lease, cancels it, and turns what
// comes back into an outcome.
package dispatch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"sort"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/mesh"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
)

const (
	// lease is how long a runner goes on with a job after it lost the orchestrator.
	lease = 15 * time.Second
	// startWait is how long a runner may take to be reached and to say that a job has begun.
	startWait = 15 * time.Second
	// fullWait is how long a call waits for a runner that is not full.
	fullWait = time.Hour
	// grace is how much longer than the job's timeout a runner may take to report it.
	grace = 15 * time.Second
	// cancelWait is how long a runner may take to end a job.
	cancelWait = 30 * time.Second
	// describeWait is how long a runner may take to describe itself to a call.
	describeWait = 3 * time.Second
	// describePause is how long a runner that did not answer is left alone.
	describePause = 15 * time.Second
)

// Options of a dispatcher.
type Options struct {
	// Runners are the addresses by execution type.
	Runners map[string]string
	// Credentials are shown to runners; nil is plaintext, on loopback alone.
	Credentials *mesh.Credentials
	Logger      *slog.Logger
}

// Dispatcher carries calls to runners.
type Dispatcher struct {
	o       Options
	runners map[string]*target
}

// target is the service behind one execution type.
type target struct {
	executionType string
	address       string
	conn          *grpc.ClientConn
	client        runnerv1.RunnerServiceClient

	mu         sync.Mutex
	maxRetries *int      // default of a custom type, once it is known
	askAgain   time.Time // not before then, after it did not answer
}

// builtIn are the execution types whose runner's certificate must say its role.
var builtIn = map[string]string{
	"http": "http-runner", "shell": "shell-runner", "docker": "docker-runner", "serverless": "serverless-runner",
}

// New makes a dispatcher. Connections are made when they are first used.
func New(o Options) (*Dispatcher, error) {
	d := &Dispatcher{o: o, runners: map[string]*target{}}
	for executionType, address := range o.Runners {
		conn, err := mesh.Dial(address, o.Credentials, mesh.DialOptions{ServerRole: builtIn[executionType]})
		if err != nil {
			d.Close()
			return nil, fmt.Errorf("runner %s: %w", executionType, err)
		}
		d.runners[executionType] = &target{
			executionType: executionType, address: address, conn: conn, client: runnerv1.NewRunnerServiceClient(conn),
		}
	}
	return d, nil
}

// Close ends the connections.
func (d *Dispatcher) Close() {
	for _, t := range d.runners {
		if err := t.conn.Close(); err != nil {
			d.o.Logger.Debug("a connection to a runner did not close", "execution_type", t.executionType, "error", err)
		}
	}
}

// ExecutionTypes are the types that have a runner, sorted.
func (d *Dispatcher) ExecutionTypes() []string {
	out := make([]string, 0, len(d.runners))
	for t := range d.runners {
		out = append(out, t)
	}
	sort.Strings(out)
	return out
}

// Address of an execution type's runner; empty for none.
func (d *Dispatcher) Address(executionType string) string {
	if t := d.runners[executionType]; t != nil {
		return t.address
	}
	return ""
}

// Describe asks the runner of an execution type what it is.
func (d *Dispatcher) Describe(ctx context.Context, executionType string) (*runnerv1.DescribeResponse, error) {
	t := d.runners[executionType]
	if t == nil {
		return nil, d.noRunner(executionType)
	}
	return t.client.Describe(ctx, &runnerv1.DescribeRequest{})
}

// Validate asks the runner of a service's execution type to check it.
func (d *Dispatcher) Validate(ctx context.Context, req *runnerv1.ValidateRequest) ([]*runnerv1.Problem, error) {
	t := d.runners[req.GetService().GetExecutionType()]
	if t == nil {
		return nil, d.noRunner(req.GetService().GetExecutionType())
	}
	resp, err := t.client.Validate(ctx, req)
	if err != nil {
		return nil, err
	}
	return resp.GetProblems(), nil
}

func (d *Dispatcher) noRunner(executionType string) *fault.Error {
	f := fault.New(fault.Unavailable, "no runner serves execution type %q; start the orchestrator with --runner %s=ADDRESS", executionType, executionType)
	f.Retryable = false
	return f
}

// DefaultMaxRetries implements engine.Dispatcher. Those of the built-in types are part of the
// contract; a custom runner is asked once.
func (d *Dispatcher) DefaultMaxRetries(executionType string) int {
	switch executionType {
	case "http", "serverless":
		return 3
	case "shell", "docker":
		return 0
	}
	t := d.runners[executionType]
	if t == nil {
		return 0
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.maxRetries == nil && time.Now().Before(t.askAgain) {
		return 0
	}
	if t.maxRetries == nil {
		ctx, cancel := context.WithTimeout(context.Background(), describeWait)
		defer cancel()
		desc, err := t.client.Describe(ctx, &runnerv1.DescribeRequest{})
		if err != nil {
			t.askAgain = time.Now().Add(describePause)
			return 0
		}
		n := 0
		for _, typ := range desc.GetTypes() {
			if typ.GetName() == executionType {
				n = int(typ.GetDefaultMaxRetries())
			}
		}
		t.maxRetries = &n
	}
	return *t.maxRetries
}

// Execute implements engine.Dispatcher.
func (d *Dispatcher) Execute(ctx context.Context, c *engine.Call, sink engine.LogSink) *engine.Outcome {
	t := d.runners[c.Job.ExecutionType]
	if t == nil {
		return &engine.Outcome{Err: d.noRunner(c.Job.ExecutionType)}
	}
	began := time.Now()
	for n := 0; ; n++ {
		out, next := d.try(ctx, t, c, sink)
		waited := time.Since(began)
		if next == ended || (next == unreached && waited > startWait) || waited > fullWait {
			return out
		}
		// Nothing was begun: another replica, or this one in a moment, takes the job, and no
		// attempt is counted.
		pause := time.Duration(float64(min(time.Second, 5*time.Millisecond<<min(n, 8))) * (0.5 + rand.Float64())) //nolint:gosec // jitter
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return &engine.Outcome{Err: fault.New(fault.Cancelled, "%v", context.Cause(ctx))}
		}
	}
}

// session is one stream of one attempt.
type session struct {
	stream grpc.BidiStreamingClient[runnerv1.ExecuteRequest, runnerv1.ExecuteResponse]
	mu     sync.Mutex // Send is not safe for concurrent use
}

func (s *session) send(m *runnerv1.ExecuteRequest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stream.Send(m)
}

// causes of a stream that this side breaks.
var (
	errNotStarted = errors.New("no runner took the job in time")
	errSilent     = errors.New("the runner did not report the job's end in time")
	errNoCancel   = errors.New("the runner did not end the job in time")
)

// next is what follows a try.
type next int

const (
	ended     next = iota // the attempt has its outcome
	full                  // the replica is full or hands the job back
	unreached             // no replica took the job
)

// try sends the job to one replica.
func (d *Dispatcher) try(ctx context.Context, t *target, c *engine.Call, sink engine.LogSink) (*engine.Outcome, next) {
	// The stream outlives ctx: a cancel is asked for, and its end waited for.
	sctx, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	defer stop(nil)
	notStarted := time.AfterFunc(min(startWait, c.Job.Timeout), func() { stop(errNotStarted) })
	defer notStarted.Stop()
	// Until the job is sent there is nothing to be ended over there.
	unsent := context.AfterFunc(ctx, func() { stop(context.Cause(ctx)) })
	defer unsent()
	stream, err := t.client.Execute(sctx, grpc.WaitForReady(true))
	if err != nil {
		return d.broken(sctx, t, c, err, false)
	}
	s := &session{stream: stream}
	if err := s.send(&runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Start{Start: job(c)}}); err != nil && !errors.Is(err, io.EOF) {
		return d.broken(sctx, t, c, err, false)
	}
	unsent()
	unwatch := context.AfterFunc(ctx, func() {
		if errors.Is(context.Cause(ctx), engine.ErrHandBack) {
			stop(engine.ErrHandBack)
			return
		}
		if s.send(&runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Cancel{Cancel: &runnerv1.Cancel{Reason: context.Cause(ctx).Error()}}}) != nil {
			return // Recv says why
		}
		timer := time.NewTimer(cancelWait)
		defer timer.Stop()
		select {
		case <-timer.C:
			stop(errNoCancel)
		case <-sctx.Done():
		}
	})
	defer unwatch()
	silent := time.AfterFunc(c.Job.Timeout+grace, func() { stop(errSilent) })
	defer silent.Stop()
	var renew *time.Timer
	var renewMu sync.Mutex
	renewMu.Lock()
	renew = time.AfterFunc(lease/3, func() {
		if s.send(&runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Renew{Renew: &runnerv1.Renew{}}}) == nil {
			renewMu.Lock()
			renew.Reset(lease / 3)
			renewMu.Unlock()
		}
	})
	renewMu.Unlock()
	defer func() {
		renewMu.Lock()
		renew.Stop()
		renewMu.Unlock()
	}()

	started := false
	for {
		m, err := stream.Recv()
		if err != nil {
			return d.broken(sctx, t, c, err, started)
		}
		switch ev := m.GetEvent().(type) {
		case *runnerv1.ExecuteResponse_Started:
			started = true
			notStarted.Stop()
		case *runnerv1.ExecuteResponse_Log:
			at := ev.Log.GetTime().AsTime()
			if ev.Log.GetTime() == nil {
				at = time.Now()
			}
			sink(ev.Log.GetLine(), ev.Log.GetStream(), ev.Log.GetText(), at)
		case *runnerv1.ExecuteResponse_Usage:
		case *runnerv1.ExecuteResponse_Finished:
			if ev.Finished.GetHandedBack() && context.Cause(ctx) == nil {
				return finished(ev.Finished), full
			}
			return finished(ev.Finished), ended
		}
	}
}

func finished(f *runnerv1.Finished) *engine.Outcome {
	out := &engine.Outcome{Output: f.GetOutput(), Err: fault.FromProto(f.GetError()), Usage: f.GetUsage(), Security: f.GetSecurity()}
	if out.Err != nil {
		out.Output = nil
		out.Err.RetryAfter = f.GetRetryAfter().AsDuration()
	}
	return out
}

// broken is the outcome of a stream that ended without a finished.
func (d *Dispatcher) broken(sctx context.Context, t *target, c *engine.Call, err error, started bool) (*engine.Outcome, next) {
	cause := context.Cause(sctx)
	switch {
	case errors.Is(cause, engine.ErrHandBack):
		return &engine.Outcome{Err: fault.Wrap(cause, fault.Unavailable, "handed back"), Unknown: true}, ended
	case errors.Is(cause, errNotStarted):
		return &engine.Outcome{Err: fault.Wrap(err, fault.Unavailable, "no %s runner at %s took the job within %s", t.executionType, t.address, min(startWait, c.Job.Timeout))}, ended
	case errors.Is(cause, errSilent):
		return &engine.Outcome{Err: fault.Wrap(err, fault.Timeout, "the %s runner did not report the job's end within its timeout of %s and %s more", t.executionType, c.Job.Timeout, grace), Unknown: true}, ended
	case errors.Is(cause, errNoCancel):
		return &engine.Outcome{Err: fault.Wrap(err, fault.Cancelled, "the %s runner did not confirm the cancel within %s", t.executionType, cancelWait), Unknown: true}, ended
	}
	f := fault.FromError(err)
	if !started && cause != nil {
		return &engine.Outcome{Err: fault.Wrap(cause, fault.Cancelled, "%v", cause)}, ended
	}
	if !started {
		switch status.Code(statusOf(f, err)) { //nolint:exhaustive // the rest is an answer
		case codes.ResourceExhausted:
			return &engine.Outcome{Err: fault.New(fault.Unavailable, "every %s runner at %s is full", t.executionType, t.address)}, full
		case codes.Unavailable:
			return &engine.Outcome{Err: fault.New(fault.Unavailable, "the %s runner at %s could not be reached: %s", t.executionType, t.address, f.Message)}, unreached
		}
		return &engine.Outcome{Err: f}, ended
	}
	d.o.Logger.Warn("a runner was lost in the middle of a job", "execution_type", t.executionType, "job_id", c.Job.ID, "error", err)
	return &engine.Outcome{
		Err:     fault.Wrap(err, fault.Unavailable, "the %s runner was lost in the middle of the job: %s", t.executionType, f.Message),
		Unknown: true,
	}, ended
}

// statusOf finds the gRPC error behind a fault.
func statusOf(f *fault.Error, err error) error {
	if f.Cause != nil {
		return f.Cause
	}
	return err
}

// job is a call as the runner gets it.
func job(c *engine.Call) *runnerv1.Job {
	return &runnerv1.Job{
		Id: c.Job.ID, RunId: c.Job.RunID, StepPath: c.Job.StepPath,
		Attempt:        int32(c.Job.Attempts), //nolint:gosec // attempts are bounded
		IdempotencyKey: c.Job.IdempotencyKey, Epoch: c.Epoch,
		Service: &runnerv1.Service{
			Name: c.Job.Service, ExecutionType: c.Job.ExecutionType,
			RunnerConfig: c.Node.RunnerConfig, SecurityPolicy: c.Node.SecurityPolicy,
		},
		Operation: &runnerv1.Operation{Name: c.Job.Operation, Config: c.Node.OperationConfig},
		Input:     c.Job.Input, Timeout: durationpb.New(c.Job.Timeout), Lease: durationpb.New(lease),
		Subject: c.Subject, TenantId: c.Job.TenantID, CorrelationId: c.Job.CorrelationID,
	}
}
