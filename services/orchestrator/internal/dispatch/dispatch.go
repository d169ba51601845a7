// Package dispatch carries calls to runner services. It is the only importer of the runner
// stubs: it finds a replica, starts the job, renews its lease, cancels it, and turns what
// comes back into an outcome.
package dispatch

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sort"
	"sync"
	"time"

	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/linger"
	"github.com/specql/mesh/pkg/mesh"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/telemetry"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
)

const (
	// defaultLease is how long a runner goes on with a job that is not renewed. The jobs of an
	// orchestrator that died or was stopped end within it, before others have long owned its
	// runs; a shorter one would end jobs over a pause of the collector, the disk or the network.
	defaultLease = 6 * time.Second
	// renewals is how many fall into a lease: two may come late or get lost.
	renewals = 3
	// mostUnanswered is how many renewals in a row a runner may leave unanswered; then it is
	// looked for anew, a lease after its last word.
	mostUnanswered = renewals - 1
	// startWait is how long a runner may take to be reached and to say that a job has begun.
	startWait = 15 * time.Second
	// answerWait is how long one replica may take to say so before another is asked: it does
	// before the work begins, so that only one that hangs takes long.
	answerWait = 5 * time.Second
	// longestPause is how long a call waits at most before it asks for a place again.
	longestPause = time.Second
	// mostHandBacks is how often a job is begun anew within one attempt.
	mostHandBacks = 20
	// fullWait is how long a call waits for a runner that is not full.
	fullWait = time.Hour
	// grace is how much longer than the job's timeout a runner may take to report it.
	grace = 15 * time.Second
	// quickly is within what most jobs end. What they take longer is watched by timers of their own.
	quickly = 100 * time.Millisecond
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
	// TracerProvider records the calls of runners; nil records nothing.
	TracerProvider trace.TracerProvider
	// Renew is asked before each renewal of a lease, and before a job is sent, whether this
	// orchestrator still owns its runs; it must not block. While it says no, nothing is renewed
	// and nothing begun, so that runners end what they run. Nil is always yes.
	Renew func() bool
	// Lease of the jobs; 6 s if zero. It is renewed three times as often.
	Lease time.Duration
}

// Dispatcher carries calls to runners.
type Dispatcher struct {
	o       Options
	runners map[string]*target
	slow    *linger.Queue[*keeper]
}

// target is the service behind one execution type.
type target struct {
	executionType string
	address       string
	conn          *grpc.ClientConn
	client        runnerv1.RunnerServiceClient
	sessions      *sessions

	limits limitCache

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
	o.Lease = cmp.Or(o.Lease, defaultLease)
	if o.Renew == nil {
		o.Renew = func() bool { return true }
	}
	d := &Dispatcher{o: o, runners: map[string]*target{}, slow: linger.New(quickly, (*keeper).look)}
	for executionType, address := range o.Runners {
		conn, err := mesh.Dial(address, o.Credentials, mesh.DialOptions{ServerRole: builtIn[executionType], TracerProvider: o.TracerProvider})
		if err != nil {
			d.Close()
			return nil, fmt.Errorf("runner %s: %w", executionType, err)
		}
		client := runnerv1.NewRunnerServiceClient(conn)
		d.runners[executionType] = &target{
			executionType: executionType, address: address, conn: conn, client: client, sessions: &sessions{client: client},
		}
	}
	return d, nil
}

// Close ends the connections.
func (d *Dispatcher) Close() {
	for _, t := range d.runners {
		t.sessions.close()
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

// Check asks a runner what a policy would say of jobs of the past.
func (d *Dispatcher) Check(ctx context.Context, req *runnerv1.CheckRequest) ([]*runnerv1.CheckedJob, error) {
	t := d.runners[req.GetService().GetExecutionType()]
	if t == nil {
		return nil, d.noRunner(req.GetService().GetExecutionType())
	}
	resp, err := t.client.Check(ctx, req)
	if err != nil {
		return nil, err
	}
	if have, want := len(resp.GetJobs()), len(req.GetJobs()); have != want {
		return nil, fault.New(fault.Internal, "the %s runner checked %d of %d jobs", req.GetService().GetExecutionType(), have, want)
	}
	return resp.GetJobs(), nil
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
		return &engine.Outcome{Err: d.noRunner(c.Job.ExecutionType), Unused: true}
	}
	began := time.Now()
	a := &attempt{d: d, t: t, call: c, sink: sink, began: began}
	_, a.queue = telemetry.Start(ctx, "queue")
	out := a.carry(ctx, began)
	a.queue.End() // where no runner began the job
	if !a.startedAt.IsZero() {
		out.Queued = a.startedAt.Sub(began)
	}
	return out
}

// batched says whether the runner may tell with the end of a quick job that it began it. One that is lost before it has said so may
// have begun it, and may have been killed by it, so that the attempt counts: that is for jobs that bear repeating, of which
// others have nothing to lose.
func (a *attempt) batched() bool { return a.call.Job.MaxAttempts > 1 }

// carry sends the job to replicas until one has ended it, or none can.
func (a *attempt) carry(ctx context.Context, began time.Time) *engine.Outcome {
	handBacks := 0
	for n := 0; ; n++ {
		telemetry.Enter(ctx, "queue")
		out, next := a.begin(ctx)
		if next == cut || next == unsure {
			out, next = a.find(ctx, out, next)
		}
		waited := time.Since(began)
		switch {
		case next == ended || (next == unreached && waited > min(startWait, a.call.Job.Timeout)) || waited > fullWait && next != handedBack:
			out.Unused = out.Unused || next != ended && !out.Unknown
			return out
		case a.call.Reserved != nil && (next == handedBack || out.Unknown || waited > startWait):
			// The call may have arrived, so that what is sent now counts anew at the limits; or its slot is so old that others may
			// soon take it for that of somebody who is gone.
			out.Again, out.Unused = true, next != handedBack && !out.Unknown
			return out
		case next == handedBack:
			if handBacks++; handBacks > mostHandBacks {
				return out
			}
			began, n = time.Now(), 0 // it was not waited for a place until now
		}
		// Nothing was begun, or what was begun does not count: another replica, or this one in a
		// moment, takes the job, and no attempt is counted.
		unknown, disabled := handBacks > 0 || out.Unknown, a.call.Disabled
		if unknown {
			disabled = nil // what may have begun goes on
		}
		if err := pause(ctx, n, longestPause, disabled); errors.Is(err, errDisabled) {
			return &engine.Outcome{Err: engine.DisabledError(a.call.Job.ExecutionType), Unused: true}
		} else if err != nil {
			return &engine.Outcome{Err: fault.New(fault.Cancelled, "%v", err), Unknown: unknown, Unused: !unknown}
		}
	}
}

// errDisabled ends a pause because no job of the type is to begin any more.
var errDisabled = errors.New("the execution type is disabled")

// pause waits a little, longer with each n and longest at most, unless something ends it.
func pause(ctx context.Context, n int, longest time.Duration, disabled <-chan struct{}) error {
	timer := time.NewTimer(time.Duration(float64(min(longest, 5*time.Millisecond<<min(n, 8))) * (0.5 + rand.Float64()))) //nolint:gosec // jitter
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-disabled:
		return errDisabled
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// attempt is one attempt of a job, which may see several streams.
type attempt struct {
	d    *Dispatcher
	t    *target
	call *engine.Call
	sink engine.LogSink
	// began is when the job was given to the dispatcher.
	began time.Time
	// silentAt is when its runner must have reported its end.
	silentAt time.Time
	// startedAt is when a runner said first that it had begun the job.
	startedAt time.Time
	queue     trace.Span // until then
}

// begin sends the job to one replica, and follows it.
func (a *attempt) begin(ctx context.Context) (*engine.Outcome, next) {
	if !a.d.o.Renew() {
		return &engine.Outcome{Err: fault.New(fault.Unavailable, "this orchestrator does not know that it still owns the run")}, unowned
	}
	a.silentAt = time.Now().Add(a.call.Job.Timeout + grace)
	for {
		// A stream that waited may have ended; each is tried once.
		if out, next := a.try(ctx, min(answerWait, a.call.Job.Timeout), false); next != stale {
			return out, next
		}
	}
}

// find looks for a job whose stream broke: all replicas are asked in turn, and begin nothing.
// Until the lease has lapsed the job may run on, cut off but well. Then it has ended by itself,
// so that what is begun next does not run beside it.
func (a *attempt) find(ctx context.Context, lost *engine.Outcome, why next) (*engine.Outcome, next) {
	until := time.Now().Add(a.d.o.Lease)
	// A cancelled job is looked for all the same, to be ended; one that is handed back is not.
	search, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	defer stop(nil)
	defer context.AfterFunc(ctx, func() {
		if errors.Is(context.Cause(ctx), engine.ErrHandBack) {
			stop(engine.ErrHandBack)
		}
	})()
	for n := 0; ; n++ {
		left := time.Until(until)
		switch {
		case errors.Is(context.Cause(search), engine.ErrHandBack):
			return letGo(engine.ErrHandBack), ended
		case left <= 0 && why == unsure && !a.batched():
			return lost, unreached
		case left <= 0:
			a.d.o.Logger.WarnContext(ctx, "a runner was lost in the middle of a job", "execution_type", a.t.executionType, "job_id", a.call.Job.ID, "error", lost.Err)
			return lost, ended
		}
		if a.d.o.Renew() {
			// One that hangs does not take all the time there is.
			switch out, next := a.try(ctx, min(left, a.d.o.Lease/renewals), true); next {
			case ended, handedBack:
				return out, next
			case cut: // it was found and got lost again
				lost, why, until, n = out, cut, time.Now().Add(a.d.o.Lease), 0
			case full, unreached, unowned, unsure, stale:
			}
		}
		_ = pause(search, n, longestPause/10, nil) // there may be many replicas
	}
}

// causes of a stream that this side breaks.
var (
	errNotStarted = errors.New("no runner took the job in time")
	errSilent     = errors.New("the runner did not report the job's end in time")
	errNoCancel   = errors.New("the runner did not end the job in time")
	errUnheard    = errors.New("the runner does not answer any more")
)

// next is what follows a try.
type next int

const (
	ended      next = iota // the attempt has its outcome
	full                   // the replica is full
	handedBack             // the replica ended the job, which is to be begun anew
	unreached              // no replica took the job
	unowned                // it was not tried
	cut                    // the stream broke in the middle of the job
	unsure                 // it broke before the replica said whether it had begun the job
	stale                  // the stream of earlier jobs had ended, and the replica has not begun this one
)

// try sends the job to one replica, which has so long to say that it runs. With attach the
// replica begins nothing.
func (a *attempt) try(ctx context.Context, wait time.Duration, attach bool) (*engine.Outcome, next) {
	// A span is told of by the headers of a stream, so that a job that is traced has one of its own.
	alone := attach || trace.SpanFromContext(ctx).IsRecording()
	s, reused := a.t.sessions.take(ctx, alone)
	t := s.begin()
	again := false // another job may follow on the stream
	defer func() { t.end(again) }()
	k := keep(a, t, wait)
	defer k.end()
	w := &watcher{ctx: ctx, t: t, attach: attach}
	defer context.AfterFunc(ctx, w.ended)()
	b := &broken{attempt: a, sctx: s.ctx, attach: attach, reused: reused}
	if err := s.open(); err != nil {
		return b.outcome(err)
	}
	start := job(a.call, a.d.o.Lease)
	start.Profile = telemetry.PhasesOf(ctx) != nil
	telemetry.Enter(ctx, "dispatch")
	start.AttachOnly, start.More, start.Batch = attach, !alone, a.batched()
	telemetry.Propagator().Inject(ctx, propagation.MapCarrier(start.GetTraceContext()))
	if !w.sends() {
		return b.outcome(context.Cause(ctx))
	}
	if err := t.send(&runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Start{Start: start}}); err != nil {
		if reused || !errors.Is(err, io.EOF) {
			return b.outcome(err) // nothing was sent: the stream had ended before, for one
		}
	}
	b.sent = true
	w.sent()
	k.sent()
	for {
		k.listen()
		m, err := s.stream.Recv()
		if err != nil {
			return b.outcome(err)
		}
		events := runner.Events(m)
		k.heard(slices.ContainsFunc(events, func(e *runnerv1.ExecuteResponse) bool { return e.GetRenewed() != nil }))
		for _, e := range events {
			switch ev := e.GetEvent().(type) {
			case *runnerv1.ExecuteResponse_Started:
				b.started, b.more = true, ev.Started.GetMore()
				if a.startedAt.IsZero() {
					a.startedAt = time.Now().Add(-min(max(ev.Started.GetHeld().AsDuration(), 0), time.Since(a.began)))
					a.queue.End(trace.WithTimestamp(a.startedAt))
				}
				k.started()
			case *runnerv1.ExecuteResponse_Log:
				at := ev.Log.GetTime().AsTime()
				if ev.Log.GetTime() == nil {
					at = time.Now()
				}
				a.sink(ev.Log.GetLine(), ev.Log.GetStream(), ev.Log.GetText(), at)
			case *runnerv1.ExecuteResponse_Finished:
				again = b.more && !alone
				within(ctx, ev.Finished)
				if ev.Finished.GetHandedBack() && context.Cause(ctx) == nil {
					return finished(ev.Finished), handedBack
				}
				return finished(ev.Finished), ended
			}
		}
	}
}

// watcher ends a try whose job is cancelled, or whose run is handed back.
type watcher struct {
	ctx    context.Context
	t      *turn
	attach bool

	mu                         sync.Mutex
	sending, isSent, cancelled bool
}

// sends says whether the job is to be sent. From then on it may have begun before its sender knows that it was sent, so
// that a cancel breaks nothing any more but waits for that.
func (w *watcher) sends() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sending = !w.cancelled || w.attach
	return w.sending
}

// sent says that there is something to be ended over there.
func (w *watcher) sent() {
	w.mu.Lock()
	w.isSent = true
	late := w.cancelled
	w.mu.Unlock()
	if late {
		go w.cancel()
	}
}

// ended is called when ctx has ended.
func (w *watcher) ended() {
	if cause := context.Cause(w.ctx); errors.Is(cause, engine.ErrHandBack) {
		w.t.stop(engine.ErrHandBack)
		return
	}
	w.mu.Lock()
	w.cancelled = true
	sent := w.isSent
	if !w.sending && !w.attach { // one that is attached to is cancelled once it is found
		w.t.stop(context.Cause(w.ctx))
	}
	w.mu.Unlock()
	if sent {
		w.cancel()
	}
}

// cancel has the runner end the job, which has so long for it.
func (w *watcher) cancel() {
	if w.t.send(&runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Cancel{Cancel: &runnerv1.Cancel{Reason: context.Cause(w.ctx).Error()}}}) != nil {
		return // Recv says why
	}
	timer := time.NewTimer(cancelWait)
	defer timer.Stop()
	select {
	case <-timer.C:
		w.t.stop(errNoCancel)
	case <-w.t.s.ctx.Done():
	case <-w.t.over:
	}
}

// keeper renews a job's lease until it is ended, and breaks the stream of a runner that lets it wait. One timer does
// for all, and a job that is quick has none: most have ended before anything is due.
type keeper struct {
	a *attempt
	t *turn

	mu    sync.Mutex
	timer *time.Timer // nil for none yet
	over  bool
	// startBy is when the runner must have said that the job has begun; zero once it has.
	startBy time.Time
	// renewAt is when the lease is renewed next; zero until the job is sent.
	renewAt  time.Time
	renewing bool // one is being sent
	// listening is false while something else than the runner is waited for.
	listening bool
	// answers tells whether the runner answers renewals at all.
	answers    bool
	unanswered int
}

// keep begins with the time that the runner has for its first word.
func keep(a *attempt, t *turn, wait time.Duration) *keeper {
	now := time.Now()
	k := &keeper{a: a, t: t, startBy: now.Add(wait)}
	if soonest := min(wait, a.d.o.Lease/renewals); soonest > quickly {
		a.d.slow.Add(now, k)
	} else {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.timer = time.AfterFunc(soonest, k.look)
	}
	return k
}

// sent begins to renew the lease.
func (k *keeper) sent() {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := time.Now()
	if k.renewAt = now.Add(k.a.d.o.Lease / renewals); !k.a.silentAt.After(k.renewAt) {
		k.wait(k.a.silentAt.Sub(now))
	}
}

// started says that the job has begun.
func (k *keeper) started() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.startBy = time.Time{}
}

// look does what is due. Lost is who does not answer any more: renewals are counted and not time, so that the answers
// that wait for a process which was stopped itself are read first.
func (k *keeper) look() {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := time.Now()
	due := func(at time.Time) bool { return !at.IsZero() && !at.After(now) }
	sent := !k.renewAt.IsZero()
	var cause error
	switch {
	case k.over:
		return
	case due(k.startBy):
		cause = errNotStarted
	case sent && due(k.a.silentAt):
		cause = errSilent
	case due(k.renewAt) && k.answers && k.listening && k.unanswered >= mostUnanswered:
		cause = errUnheard
	}
	if cause != nil {
		k.over = true
		k.t.stop(cause)
		return
	}
	if due(k.renewAt) {
		if !k.renewing && k.a.d.o.Renew() {
			k.unanswered++
			k.renewing = true
			go k.renew()
		}
		k.renewAt = now.Add(k.a.d.o.Lease / renewals)
	}
	next := now.Add(k.a.d.o.Lease / renewals)
	for _, at := range []time.Time{k.startBy, k.renewAt} {
		if !at.IsZero() && at.Before(next) {
			next = at
		}
	}
	if sent && k.a.silentAt.Before(next) {
		next = k.a.silentAt
	}
	k.wait(time.Until(next))
}

// wait looks again after a time.
func (k *keeper) wait(d time.Duration) {
	if k.timer == nil {
		k.timer = time.AfterFunc(d, k.look)
		return
	}
	k.timer.Reset(max(d, 0))
}

// renew sends a renewal, which may block. One that cannot be sent ends nothing by itself: Recv says why, or the next one
// gets through.
func (k *keeper) renew() {
	_ = k.t.send(&runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Renew{Renew: &runnerv1.Renew{}}})
	k.mu.Lock()
	defer k.mu.Unlock()
	k.renewing = false
}

// listen says that the runner's next word is waited for.
func (k *keeper) listen() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.listening = true
}

// heard says that there was one.
func (k *keeper) heard(answer bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.listening, k.unanswered = false, 0
	k.answers = k.answers || answer
}

func (k *keeper) end() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.over = true
	if k.timer != nil {
		k.timer.Stop()
	}
}

// within gives the runner's part of the time that was waited for it to the phases that it measured.
func within(ctx context.Context, f *runnerv1.Finished) {
	p := telemetry.PhasesOf(ctx)
	if p == nil {
		return
	}
	parts := make([]telemetry.Phase, 0, len(f.GetPhases()))
	for _, phase := range f.GetPhases() {
		parts = append(parts, telemetry.Phase{Name: phase.GetName(), Took: phase.GetDuration().AsDuration()})
	}
	p.Within(parts)
}

func finished(f *runnerv1.Finished) *engine.Outcome {
	out := &engine.Outcome{
		Output: f.GetOutput(), Err: fault.FromProto(f.GetError()), Usage: f.GetUsage(), Security: f.GetSecurity(),
		Unused: f.GetUnused(), Closes: f.GetCloses(), Again: f.GetLimitsChanged(), LimitsChanged: f.GetLimitsChanged(),
	}
	if out.Err != nil {
		out.Output = nil
		out.Err.RetryAfter = f.GetRetryAfter().AsDuration()
	}
	return out
}

// letGo is the outcome of an attempt that goes on without this orchestrator.
func letGo(cause error) *engine.Outcome {
	return &engine.Outcome{Err: fault.Wrap(cause, fault.Unavailable, "handed back"), Unknown: true}
}

// broken is a stream that ended without a finished.
type broken struct {
	*attempt

	sctx          context.Context
	attach        bool
	reused        bool
	sent, started bool
	more          bool
}

func (b *broken) outcome(err error) (*engine.Outcome, next) {
	t, c := b.t, b.call
	cause := context.Cause(b.sctx)
	switch {
	case errors.Is(cause, engine.ErrHandBack):
		return letGo(cause), ended
	case errors.Is(cause, errNotStarted):
		return &engine.Outcome{
			Err:     fault.Wrap(err, fault.Unavailable, "no %s runner at %s took the job within %s", t.executionType, t.address, min(startWait, c.Job.Timeout)),
			Unknown: b.sent,
		}, unreached
	case errors.Is(cause, errSilent):
		return &engine.Outcome{Err: fault.Wrap(err, fault.Timeout, "the %s runner did not report the job's end within its timeout of %s and %s more", t.executionType, c.Job.Timeout, grace), Unknown: true}, ended
	case errors.Is(cause, errNoCancel):
		return &engine.Outcome{Err: fault.Wrap(err, fault.Cancelled, "the %s runner did not confirm the cancel within %s", t.executionType, cancelWait), Unknown: true}, ended
	}
	if errors.Is(err, io.EOF) && b.reused && !b.started && cause == nil {
		// It ended in good order between two jobs, or nothing could be sent on it any more.
		return &engine.Outcome{Err: fault.New(fault.Unavailable, "the %s runner at %s ended the stream", t.executionType, t.address)}, stale
	}
	f := fault.FromError(err)
	code := status.Code(statusOf(f, err))
	if b.started {
		if errors.Is(cause, errUnheard) {
			err, f = cause, fault.New(fault.Unavailable, "%v", cause)
		}
		out := &engine.Outcome{
			Err:     fault.Wrap(err, fault.Unavailable, "the %s runner was lost in the middle of the job: %s", t.executionType, f.Message),
			Unknown: true,
		}
		if code == codes.Aborted { // another orchestrator has it
			return out, ended
		}
		return out, cut
	}
	if cause != nil {
		return &engine.Outcome{Err: fault.Wrap(cause, fault.Cancelled, "%v", cause)}, ended
	}
	if code == codes.Aborted && b.sent { // another orchestrator has it, and it may have begun
		return &engine.Outcome{Err: f, Unknown: true}, ended
	}
	unreachable := &engine.Outcome{Err: fault.New(fault.Unavailable, "the %s runner at %s could not be reached: %s", t.executionType, t.address, f.Message)}
	switch {
	case code == codes.ResourceExhausted:
		return &engine.Outcome{Err: fault.New(fault.Unavailable, "every %s runner at %s is full", t.executionType, t.address)}, full
	case code == codes.Unavailable && b.sent && !told(f, err):
		unreachable.Unknown = true
		return unreachable, unsure
	case code == codes.Unavailable || b.attach && code == codes.NotFound:
		return unreachable, unreached
	}
	return &engine.Outcome{Err: f, Unknown: b.attach}, ended
}

// told says whether an error is the runner's own word, and not that of a connection that broke.
func told(f *fault.Error, err error) bool {
	return len(status.Convert(statusOf(f, err)).Details()) > 0
}

// statusOf finds the gRPC error behind a fault.
func statusOf(f *fault.Error, err error) error {
	if f.Cause != nil {
		return f.Cause
	}
	return err
}

// job is a call as the runner gets it.
func job(c *engine.Call, lease time.Duration) *runnerv1.Job {
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
		ReservedCostUsd: c.Reserved,
		Subject:         c.Subject, TenantId: c.Job.TenantID, CorrelationId: c.Job.CorrelationID,
		TraceContext: map[string]string{},
	}
}
