package dispatch

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/linger"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/plan"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// remote is a runner whose job lasts until it is cancelled, with hooks at the moments of one call.
type remote struct {
	runnerv1.RunnerServiceClient
	grpc.BidiStreamingClient[runnerv1.ExecuteRequest, runnerv1.ExecuteResponse]

	ctx     context.Context //nolint:containedctx // the stream's
	opened  func()
	began   func() // the sender does not know yet that the job was sent
	starts  int
	answers chan *runnerv1.ExecuteResponse
}

func (r *remote) Execute(ctx context.Context, _ ...grpc.CallOption) (grpc.BidiStreamingClient[runnerv1.ExecuteRequest, runnerv1.ExecuteResponse], error) {
	r.ctx = ctx
	r.opened()
	return r, nil
}

func (r *remote) Send(m *runnerv1.ExecuteRequest) error {
	switch c := m.GetCommand().(type) {
	case *runnerv1.ExecuteRequest_Start:
		r.starts++
		r.began()
	case *runnerv1.ExecuteRequest_Cancel:
		f := fault.New(fault.Cancelled, "told: %s", c.Cancel.GetReason())
		r.answers <- &runnerv1.ExecuteResponse{Event: &runnerv1.ExecuteResponse_Finished{Finished: &runnerv1.Finished{Error: f.ToProto()}}}
	}
	return nil
}

func (r *remote) Recv() (*runnerv1.ExecuteResponse, error) {
	select {
	case m := <-r.answers:
		return m, nil
	case <-r.ctx.Done():
		return nil, status.FromContextError(r.ctx.Err()).Err()
	}
}

// call cancels a call at a moment of it, and gives what came of it once the dispatcher has seen the cancel there.
func (r *remote) call(t *testing.T, moment *func()) *engine.Outcome {
	t.Helper()
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	r.opened, r.began, r.answers = func() {}, func() {}, make(chan *runnerv1.ExecuteResponse, 1)
	*moment = func() {
		cancel(errors.New("enough"))
		synctest.Wait()
	}
	d := &Dispatcher{
		o:       Options{Logger: slog.New(slog.DiscardHandler), Renew: func() bool { return true }, Lease: defaultLease},
		runners: map[string]*target{"shell": {executionType: "shell", client: r, sessions: &sessions{client: r}}},
		slow:    linger.New(quickly, (*keeper).look),
	}
	c := &engine.Call{Job: &store.Job{ID: "j", ExecutionType: "shell", MaxAttempts: 1, Timeout: time.Minute}, Node: &plan.Call{}}
	return d.Execute(ctx, c, func(int64, string, string, time.Time) {})
}

// A job may begin before its sender knows that it was sent: it is ended then, and not left to itself until its lease is over.
func TestACancelWhileAJobIsSentReachesIt(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &remote{}
		out := r.call(t, &r.began)
		require.EqualError(t, out.Err, "CANCELLED: told: enough")
	})
}

func TestAJobThatWasCancelledIsNotSent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &remote{}
		out := r.call(t, &r.opened)
		require.EqualError(t, out.Err, "CANCELLED: enough")
		require.False(t, out.Unknown)
		require.Zero(t, r.starts)
	})
}
