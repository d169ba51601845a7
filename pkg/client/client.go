// Package client is the Go client of the orchestrator. It starts actions, follows them and
// steers them:
//
//	run, err := client.Execute(ctx, "127.0.0.1:7350", client.Action{
//		Entity: "payment", Action: "process_payment", Input: map[string]any{"amount": 1200},
//	})
//
// A [Client] does the same over one connection that is kept. Every error that the server
// sent is a [*fault.Error] with its code.
package client

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/fault"
)

// Run is a run with its jobs.
type Run = specqlv1.Run

// Job is one call of a run.
type Job = specqlv1.Job

// Event is one change of a run.
type Event = specqlv1.WatchRunResponse

// Client talks to an orchestrator over one connection. It is safe for concurrent use.
type Client struct {
	conn         *grpc.ClientConn
	orchestrator specqlv1.OrchestratorServiceClient
	registry     specqlv1.RegistryServiceClient
	patience     time.Duration
}

// Action says what to start: either Entity and Action, or Workflow.
type Action struct {
	// Entity and Action name an action of the registry.
	Entity, Action string
	// Workflow is a workflow of its own as YAML text, in place of Entity and Action.
	Workflow string
	// Input is anything that marshals to a JSON object: a map, a struct, a json.RawMessage.
	// Nil is an empty object.
	Input any
	// EntityID is the primary key of the entity's row; empty for a new row.
	EntityID string
	// IdempotencyKey makes two starts one run. Without one the client makes one for each
	// call of Execute, so that it may send the start again after a broken connection.
	IdempotencyKey string
	// CorrelationID is the caller's own id for what the run belongs to.
	CorrelationID string
}

// New returns a client of the orchestrator at address, such as 127.0.0.1:7350 or
// dns:///orchestrator:7350. It connects with the first call. A loopback address is spoken to
// in plaintext and any other one by TLS with the system's roots, unless an option says otherwise.
func New(address string, opts ...Option) (*Client, error) {
	var o options
	for _, opt := range opts {
		opt(&o)
	}
	dial, err := o.dialOptions(address)
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient(address, dial...)
	if err != nil {
		return nil, fault.Wrap(err, fault.Validation, "the address %q is not usable: %v", address, err)
	}
	c := &Client{
		conn:         conn,
		orchestrator: specqlv1.NewOrchestratorServiceClient(conn),
		registry:     specqlv1.NewRegistryServiceClient(conn),
		patience:     o.patience,
	}
	if c.patience <= 0 {
		c.patience = defaultPatience
	}
	return c, nil
}

// Execute starts an action at an address, waits for its end and closes the connection.
// See [Client.ExecuteAndWait].
func Execute(ctx context.Context, address string, a Action, opts ...Option) (*Run, error) {
	c, err := New(address, opts...)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close() }()
	return c.ExecuteAndWait(ctx, a)
}

// Close ends the connection and every stream on it.
func (c *Client) Close() error { return c.conn.Close() }

// Orchestrator is the generated client, for calls that have no method here.
func (c *Client) Orchestrator() specqlv1.OrchestratorServiceClient { return c.orchestrator }

// Registry is the generated client of the registry.
func (c *Client) Registry() specqlv1.RegistryServiceClient { return c.registry }

// Conn is the connection, for generated clients of other services.
func (c *Client) Conn() *grpc.ClientConn { return c.conn }

// Execute starts an action and returns as soon as its run is durable.
func (c *Client) Execute(ctx context.Context, a Action) (*Run, error) {
	req, err := a.Request()
	if err != nil {
		return nil, err
	}
	return c.start(ctx, req)
}

// ExecuteAndWait starts an action and returns when its run has ended. A run that did not
// complete is returned next to its error, a [*fault.Error] with the run's code. When ctx ends
// the run goes on: cancel it with [Client.Cancel].
func (c *Client) ExecuteAndWait(ctx context.Context, a Action) (*Run, error) {
	req, err := a.Request()
	if err != nil {
		return nil, err
	}
	// The server holds the answer back for so long at most; then the run is watched.
	req.Wait = durationpb.New(30 * time.Second)
	run, err := c.start(ctx, req)
	if err != nil {
		return nil, err
	}
	if !Ended(run.GetStatus()) {
		return c.Wait(ctx, run.GetId())
	}
	return run, Outcome(run)
}

// Wait returns when a run has ended, as [Client.ExecuteAndWait] does.
func (c *Client) Wait(ctx context.Context, id string) (*Run, error) {
	if err := c.Watch(ctx, id, func(*Event) error { return nil }); err != nil {
		return nil, err
	}
	run, err := c.Get(ctx, id)
	if err != nil {
		return nil, err
	}
	return run, Outcome(run)
}

// Ended says whether a run or job in this state has ended.
func Ended(s specqlv1.Status) bool {
	return s == specqlv1.Status_STATUS_COMPLETED || s == specqlv1.Status_STATUS_FAILED || s == specqlv1.Status_STATUS_CANCELLED
}

// Outcome is the error of a run that has ended, a [*fault.Error]; nil for one that completed.
func Outcome(run *Run) error {
	if run.GetStatus() == specqlv1.Status_STATUS_COMPLETED {
		return nil
	}
	if run.GetError() == nil {
		return fault.New(fault.Internal, "the run %s ended without saying why", run.GetId())
	}
	return fault.FromProto(run.GetError())
}

// Get returns a run with its jobs.
func (c *Client) Get(ctx context.Context, id string) (*Run, error) {
	res, err := c.orchestrator.GetRun(ctx, &specqlv1.GetRunRequest{Id: id})
	if err != nil {
		return nil, fault.FromError(err)
	}
	return res.GetRun(), nil
}

// List returns one page of runs, newest first, without their jobs, and the token of the next
// page, which is empty on the last. A nil request asks for the newest 50.
func (c *Client) List(ctx context.Context, req *specqlv1.ListRunsRequest) ([]*Run, string, error) {
	if req == nil {
		req = &specqlv1.ListRunsRequest{}
	}
	res, err := c.orchestrator.ListRuns(ctx, req)
	if err != nil {
		return nil, "", fault.FromError(err)
	}
	return res.GetRuns(), res.GetNextPageToken(), nil
}

// Cancel ends a run and returns when everything that it started is gone.
func (c *Client) Cancel(ctx context.Context, id, reason string) (*Run, error) {
	res, err := c.orchestrator.CancelRun(ctx, &specqlv1.CancelRunRequest{Id: id, Reason: reason})
	if err != nil {
		return nil, fault.FromError(err)
	}
	return res.GetRun(), nil
}

// Retry goes on with a failed or cancelled run from the step that failed.
func (c *Client) Retry(ctx context.Context, id string) (*Run, error) {
	res, err := c.orchestrator.RetryRun(ctx, &specqlv1.RetryRunRequest{Id: id})
	if err != nil {
		return nil, fault.FromError(err)
	}
	return res.GetRun(), nil
}

// Signal delivers a signal to a run. payload is anything that marshals to JSON.
func (c *Client) Signal(ctx context.Context, id, name string, payload any) (*Run, error) {
	value := structpb.NewNullValue()
	if payload != nil {
		raw, err := json.Marshal(payload)
		if err != nil {
			return nil, fault.Wrap(err, fault.Validation, "the payload is not JSON: %v", err)
		}
		value = &structpb.Value{}
		if err := protojson.Unmarshal(raw, value); err != nil {
			return nil, fault.Wrap(err, fault.Validation, "the payload is not JSON: %v", err)
		}
	}
	res, err := c.orchestrator.SignalRun(ctx, &specqlv1.SignalRunRequest{Id: id, Name: name, Payload: value})
	if err != nil {
		return nil, fault.FromError(err)
	}
	return res.GetRun(), nil
}

// start sends a start that has an idempotency key, and again where the connection broke.
func (c *Client) start(ctx context.Context, req *specqlv1.ExecuteActionRequest) (*Run, error) {
	var backoff backoff
	for {
		res, err := c.orchestrator.ExecuteAction(ctx, req)
		if err == nil {
			return res.GetRun(), nil
		}
		f := fault.FromError(err)
		if f.Code != fault.Unavailable || backoff.tries >= startRetries || backoff.wait(ctx) != nil {
			return nil, f
		}
	}
}

// Request is the action as the generated client sends it, with a key of its own where there is
// none. For what [Client.Execute] does not offer.
func (a Action) Request() (*specqlv1.ExecuteActionRequest, error) {
	input, err := toStruct(a.Input)
	if err != nil {
		return nil, err
	}
	key := a.IdempotencyKey
	if key == "" {
		key = "client-" + rand.Text()
	}
	return &specqlv1.ExecuteActionRequest{
		Entity: a.Entity, Action: a.Action, Workflow: a.Workflow, Input: input,
		EntityId: a.EntityID, IdempotencyKey: key, CorrelationId: a.CorrelationID,
	}, nil
}

func toStruct(v any) (*structpb.Struct, error) {
	switch v := v.(type) {
	case nil:
		return &structpb.Struct{}, nil
	case *structpb.Struct:
		return v, nil
	}
	raw, err := json.Marshal(v)
	if err != nil {
		return nil, fault.Wrap(err, fault.Validation, "the input is not JSON: %v", err)
	}
	s := &structpb.Struct{}
	if err := protojson.Unmarshal(raw, s); err != nil {
		return nil, fault.Wrap(err, fault.Validation, "the input must be a JSON object, such as {\"amount\": 1200}")
	}
	return s, nil
}

// errBroken is a stream that ended before its run did.
var errBroken = errors.New("the stream ended before the run did")

// Watch calls fn for every change of a run, in order, until the run has ended: first its
// state and that of its jobs, then what happens from then on. A broken stream is opened again
// from the last change seen. Watch returns early with fn's error, when ctx ends, and when the
// server could not be reached for a time ([WithPatience], 30 seconds by default).
func (c *Client) Watch(ctx context.Context, id string, fn func(*Event) error, opts ...WatchOption) error {
	w := watch{req: &specqlv1.WatchRunRequest{Id: id}, fn: fn}
	for _, o := range opts {
		o(w.req)
	}
	var backoff backoff
	lastHeard := time.Now()
	for {
		before := w.req.GetAfterSequence()
		err := w.once(ctx, c.orchestrator)
		switch {
		case err == nil:
			return nil
		case w.fnErr != nil:
			return w.fnErr
		}
		if w.req.GetAfterSequence() != before {
			backoff.tries, lastHeard = 0, time.Now()
		}
		f := fault.FromError(err)
		if errors.Is(err, errBroken) {
			f = fault.Wrap(err, fault.Unavailable, "the stream of the run %s ended before the run did", id)
			if run, getErr := c.Get(ctx, id); getErr == nil && Ended(run.GetStatus()) {
				return nil // what was asked for lies behind the run's last change
			}
		}
		if f.Code != fault.Unavailable || time.Since(lastHeard) > c.patience || backoff.wait(ctx) != nil {
			return f
		}
	}
}

type watch struct {
	req   *specqlv1.WatchRunRequest
	fn    func(*Event) error
	fnErr error
}

// once reads one stream to its end. It returns nil only when the run has ended.
func (w *watch) once(ctx context.Context, stub specqlv1.OrchestratorServiceClient) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := stub.WatchRun(ctx, w.req)
	if err != nil {
		return err
	}
	ended := false
	for {
		event, err := stream.Recv()
		if err != nil {
			if errors.Is(err, errEOF) {
				if ended {
					return nil
				}
				return errBroken
			}
			return err
		}
		if err := w.fn(event); err != nil {
			w.fnErr = err
			return err
		}
		w.req.AfterSequence = max(w.req.GetAfterSequence(), event.GetSequence())
		if run := event.GetRun(); run != nil {
			ended = Ended(run.GetStatus())
		}
	}
}

// String of an action for error messages and logs.
func (a Action) String() string {
	if a.Workflow != "" {
		return "a workflow"
	}
	return fmt.Sprintf("%s.%s", a.Entity, a.Action)
}
