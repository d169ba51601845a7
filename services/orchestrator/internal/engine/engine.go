// Package engine walks plans. It writes every step that it starts or finishes into a journal,
// and recovers by replay: a run is always walked from its start, and a step with a recorded
// result takes that result. First execution, retry and recovery are this one path.
package engine

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"go.opentelemetry.io/otel/trace"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/telemetry"
	"github.com/specql/mesh/services/orchestrator/internal/plan"
	"github.com/specql/mesh/services/orchestrator/internal/quota"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// Bounds of a run.
const (
	// MaxPayload is the most bytes of JSON that an input, an output or a signal may have.
	MaxPayload = 4 << 20
	// MaxNesting is how deep JSON may be nested.
	MaxNesting = 200
	// MaxJobs is the most calls that one run may make.
	MaxJobs = 100_000
	// MaxIterations is the most items that a foreach may have.
	MaxIterations = 10_000
	// DefaultTimeout of an attempt, where neither call, operation nor service has one.
	DefaultTimeout = 5 * time.Minute
	// MaxBackoff is the longest pause between two attempts that the engine chooses itself.
	MaxBackoff = time.Minute
	// MaxRetryAfter is the longest pause that a target may ask for.
	MaxRetryAfter = time.Hour
	// maxMessage bounds the text of a job's error, in bytes.
	maxMessage = 16 << 10
)

// Journal makes records durable.
type Journal interface {
	// Append returns when the record is durable, or with the error of [store.Store.Commit].
	Append(ctx context.Context, r *store.Record) error
	// AppendLogs takes lines to be stored soon, without waiting for it; it waits for room.
	AppendLogs(ctx context.Context, lines []*store.LogLine) error
	// Flush returns when lines taken before can be read from the store.
	Flush(ctx context.Context) error
	// Hasten bounds how often what waits is tried, from now on.
	Hasten()
}

// Reader is what the engine reads from the store, and the few writes that do not belong to a walk.
type Reader interface {
	Run(ctx context.Context, id string) (*store.Run, error)
	History(ctx context.Context, id string) (*store.History, error)
	Jobs(ctx context.Context, runID string, after int64) ([]*store.Job, error)
	Logs(ctx context.Context, runID string, after int64, limit int) ([]*store.LogLine, error)
	Claim(ctx context.Context, owner string, limit int) ([]*store.Run, error)
	ClaimRun(ctx context.Context, owner, runID string) (*store.Run, error)
	RequestCancel(ctx context.Context, runID, reason string) error
	AddSignal(ctx context.Context, s *store.Signal) error

	RunStates(ctx context.Context, ids []string) (map[string]store.RunState, error)
	Heartbeat(ctx context.Context, owner string, register bool) (map[string]int64, error)
	Bury(ctx context.Context, owner string, beat int64) (bool, error)
	Release(ctx context.Context, owner string, runIDs []string) error
	Retire(ctx context.Context, owner string) error
	ClaimJobs(ctx context.Context, owner string, limit int) ([]*store.Job, error)
	Owned(ctx context.Context, owner string) (runIDs []string, jobs []*store.Job, err error)
	Requests(ctx context.Context, owner string) (*store.Requests, error)
	Listen(ctx context.Context, fn func(store.Notice)) error
	ExecutionTypes(ctx context.Context) (map[string]store.ExecutionType, error)
	Maintain(ctx context.Context, retain time.Duration) error
}

// Intake prepares what clients inserted by SQL. What is wrong with it is a *fault.Error of
// the code VALIDATION; any other error may pass.
type Intake interface {
	PrepareRun(ctx context.Context, r *store.Run) (*StartRequest, error)
	// PrepareJob also sets the job's execution type to that of its service, where there is one.
	PrepareJob(ctx context.Context, j *store.Job) (*StartRequest, error)
}

// Plans finds the plan that a run began with.
type Plans interface {
	Plan(ctx context.Context, r *store.Run) (*plan.Plan, error)
}

// Dispatcher carries calls to runners.
type Dispatcher interface {
	// Execute carries out one attempt. It returns when the attempt has ended and nothing of
	// it is left: when ctx is cancelled, only once the runner has said so, or cannot be reached.
	// With a cause of [ErrHandBack] it lets go of the attempt without ending it.
	Execute(ctx context.Context, c *Call, sink LogSink) *Outcome
	// DefaultMaxRetries of an execution type.
	DefaultMaxRetries(executionType string) int
	// Limits of a call over all orchestrators, as its runner tells them; none for most. It is quick where the runner
	// was asked before. changed says that what it answered last is known to be wrong.
	Limits(ctx context.Context, n *plan.Call, changed bool) ([]Limit, error)
}

// Limit is one that attempts take a slot of before they begin.
type Limit struct {
	store.Limit

	// Budget makes attempts for which there is no room fail with BUDGET_EXCEEDED; others wait.
	Budget bool
	// Rule names it in messages.
	Rule string
	// AttemptsKey and CostKey are the keys of the policy that its bounds are from; Ceiling says that it is the operator's.
	AttemptsKey, CostKey string
	Ceiling              bool
}

// Call is one attempt of one job.
type Call struct {
	Job     *store.Job
	Node    *plan.Call
	Epoch   int64
	Subject string
	// Reserved is the most that the attempt may cost, in US dollars; nil where it took no slot of a limit.
	Reserved *float64
	// Disabled is closed once the execution type is disabled: a job that has not begun by then does not begin. May be nil.
	Disabled <-chan struct{}
}

// LogSink takes lines of a job.
type LogSink func(line int64, stream, text string, at time.Time)

// Clock tells the time and waits.
type Clock interface {
	Now() time.Time
	// Sleep waits for d or until ctx ends, and then returns its cause.
	Sleep(ctx context.Context, d time.Duration) error
}

// SystemClock is the machine's clock.
type SystemClock struct{}

// Now implements Clock. Databases keep microseconds.
func (SystemClock) Now() time.Time { return time.Now().UTC().Truncate(time.Microsecond) }

// Sleep implements Clock.
func (SystemClock) Sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return context.Cause(ctx)
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// ErrHandBack ends a walk without ending the run: another owner, or this one after a
// restart, goes on with it.
var ErrHandBack = errors.New("the run is handed back")

// Options of an engine.
type Options struct {
	Journal    Journal
	Store      Reader
	Plans      Plans
	Dispatcher Dispatcher
	Clock      Clock
	Logger     *slog.Logger
	// Owner names this orchestrator in the store; no other one has ever had the name.
	Owner string
	// Intake may be nil: then nothing that was inserted by SQL is begun.
	Intake Intake
	// Refresh brings the registry up to date with the store. May be nil.
	Refresh func(ctx context.Context) error
	// Retain is for how long runs are kept that have ended; 0 is for ever.
	Retain time.Duration
	// ParkAfter is how long a run has to sleep to be parked: its walk ends, and begins anew when its time has come or a
	// signal arrives. One with several branches is not parked. 0 parks none.
	ParkAfter time.Duration
	// MaxRuns is how many runs are walked at once, sleeping ones not counted.
	MaxRuns int
	// Observer is told of what happens, for metrics. May be nil.
	Observer Observer
	// TracerProvider records what runs do; nil records nothing.
	TracerProvider trace.TracerProvider
}

// Engine walks runs.
type Engine struct {
	Options
	hub     *hub
	slots   *slots
	lines   quota.Lines
	members *membership
	joined  context.Context // of the loops; ends in Close
	part    context.CancelFunc
	loops   sync.WaitGroup

	mu   sync.Mutex
	runs map[string]*run
	// queued are runs that wait to be loaded, and admitting the jobs that wait to become runs.
	queued    map[string]bool
	admitting map[string]bool
	// parked are the runs that sleep for long.
	parked   *parkedRuns
	draining bool
	drain    context.Context // ends when draining begins
	endDrain context.CancelFunc
	base     context.Context
	stop     context.CancelCauseFunc
	wg       sync.WaitGroup
}

// New makes an engine. Close ends it.
func New(o Options) *Engine {
	if o.Clock == nil {
		o.Clock = SystemClock{}
	}
	if o.MaxRuns <= 0 {
		o.MaxRuns = 10_000
	}
	if o.Observer == nil {
		o.Observer = unobserved{}
	}
	e := &Engine{
		Options: o, hub: newHub(), slots: newSlots(o.MaxRuns), runs: map[string]*run{}, queued: map[string]bool{}, admitting: map[string]bool{}, members: newMembership(o.Owner),
	}
	e.parked = newParkedRuns(e.wakeDue)
	e.joined, e.part = context.WithCancel(context.Background())
	e.drain, e.endDrain = context.WithCancel(context.Background())
	e.base, e.stop = context.WithCancelCause(context.Background())
	return e
}

// StartRequest is what a run begins with.
type StartRequest struct {
	Plan *plan.Plan
	// Snapshot is the digest under which Plans finds the plan again.
	Snapshot string
	// Action is the name that the run shows.
	Action string
	// EntityID and Row are the entity's row; Insert says that the row is new.
	EntityID string
	Row      map[string]any
	Insert   bool
	// Input with its defaults filled in, already checked.
	Input          map[string]any
	IdempotencyKey string
	CorrelationID  string
	TenantID       string
	Subject        string
	// Traceparent is the span that the run belongs to; empty for none.
	Traceparent string
	// Phases measure where the run's time goes; nil for none. They make sense for a run of one call.
	Phases *telemetry.Phases
	// Adopt is the pending job, inserted by SQL, that is the plan's only call; nil for none.
	Adopt *store.Job
}

// Start begins a run and returns when it is durable. A *store.DuplicateError names the
// first run with the same idempotency key.
func (e *Engine) Start(ctx context.Context, req *StartRequest) (*store.Run, error) {
	if e.cutOff() {
		return nil, fault.New(fault.Unavailable, "the database does not answer; ask again later")
	}
	if e.slots.tryAcquire() {
		return e.begin(ctx, req)
	}
	rec, _, _, err := e.prepare(req)
	if err != nil {
		return nil, err
	}
	return e.enqueue(ctx, rec)
}

// newRow makes the row of a run that is new.
func (e *Engine) newRow(req *StartRequest) (*store.Run, error) {
	id, err := uuid.NewV7()
	if err != nil {
		return nil, fmt.Errorf("make a run id: %w", err)
	}
	return &store.Run{
		ID: id.String(), Action: req.Action, EntityID: req.EntityID, Status: store.Pending,
		Snapshot: req.Snapshot, IdempotencyKey: req.IdempotencyKey, CorrelationID: req.CorrelationID,
		TenantID: req.TenantID, Subject: req.Subject, Traceparent: req.Traceparent, Owner: e.owner(), Epoch: 1, CreatedAt: e.Clock.Now(),
	}, nil
}

// payloads are the input and the entity's row of a run: as JSON in its row, and as a walk reads
// them, which is what a replay will read.
func payloads(req *StartRequest, row *store.Run) (input, entityRow map[string]any, err error) {
	if row.Input, err = json.Marshal(req.Input); err != nil {
		return nil, nil, fault.Wrap(err, fault.Validation, "the input is not JSON")
	}
	if len(row.Input) > MaxPayload {
		return nil, nil, fault.New(fault.Validation, "the input has %d bytes; at most %d are taken", len(row.Input), MaxPayload)
	}
	if depth(row.Input) > MaxNesting {
		return nil, nil, fault.New(fault.Validation, "the input is nested deeper than %d", MaxNesting)
	}
	if input, err = decodeObject(row.Input); err != nil {
		return nil, nil, fault.Wrap(err, fault.Validation, "the input is not JSON")
	}
	if req.Row != nil {
		if row.EntityRow, err = json.Marshal(req.Row); err != nil {
			return nil, nil, fault.Wrap(err, fault.Internal, "the row of %s is not JSON", row.Entity)
		}
		if entityRow, err = decodeObject(row.EntityRow); err != nil {
			return nil, nil, fault.Wrap(err, fault.Internal, "the row of %s is not JSON", row.Entity)
		}
	}
	return input, entityRow, nil
}

// prepare makes the record that creates a run, and what its walk reads.
func (e *Engine) prepare(req *StartRequest) (rec *store.Record, input, entityRow map[string]any, err error) {
	row, err := e.newRow(req)
	if err != nil {
		return nil, nil, nil, err
	}
	if req.Plan.Entity != nil {
		row.Entity, row.EntitySchema = req.Plan.Entity.Name, req.Plan.Entity.Schema
	}
	if input, entityRow, err = payloads(req, row); err != nil {
		return nil, nil, nil, err
	}
	rec = &store.Record{RunID: row.ID, Epoch: row.Epoch, Create: row}
	if req.Insert {
		rec.InsertRow = &store.EntityRow{Schema: row.EntitySchema, Entity: row.Entity, ID: row.EntityID, Values: req.Row}
	}
	return rec, input, entityRow, nil
}

// begin is Start with a slot, which it gives back where the run does not begin.
func (e *Engine) begin(ctx context.Context, req *StartRequest) (*store.Run, error) {
	rec, input, entityRow, err := e.prepare(req)
	if err != nil {
		e.slots.release()
		return nil, err
	}
	row := rec.Create
	row.Status, row.StartedAt = store.Running, row.CreatedAt
	r := newRun(e, row, req.Plan)
	r.input, r.entityRow, r.whole = input, entityRow, true
	r.ctx = telemetry.WithPhases(r.ctx, req.Phases)
	r.startTrace(ctx)
	if req.Adopt != nil {
		j := *req.Adopt
		j.Adopted, j.RunID, j.StepPath = true, row.ID, req.Plan.Calls()[0].Path()
		r.jobs[j.StepPath] = &j
	}
	if err := e.register(r); err != nil {
		r.stop(nil)
		e.slots.release()
		return nil, err
	}
	r.mu.Lock()
	r.next.rec.Create, r.next.rec.InsertRow = rec.Create, rec.InsertRow
	r.next.dirty = true
	first := r.next
	r.mu.Unlock()
	go r.walk()
	select {
	case <-first.done:
		if first.err != nil {
			return nil, first.err
		}
		return r.row(), nil
	case <-ctx.Done():
		// A run that is not on its way to the disk yet is taken back. Another one goes on; the
		// caller finds it by its idempotency key.
		r.takeBack()
		return nil, context.Cause(ctx)
	}
}

// enqueue keeps a run for later: every slot is taken.
func (e *Engine) enqueue(ctx context.Context, rec *store.Record) (*store.Run, error) {
	e.mu.Lock()
	draining := e.draining
	e.mu.Unlock()
	if draining {
		return nil, errDraining()
	}
	if err := e.Journal.Append(ctx, rec); err != nil {
		return nil, err
	}
	e.resume(rec.RunID)
	out := *rec.Create
	return &out, nil
}

func errDraining() error {
	return fault.New(fault.Unavailable, "this orchestrator is shutting down; ask another one, or again later")
}

// register makes a run known and takes a place in the wait group for its walk.
func (e *Engine) register(r *run) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.draining {
		return errDraining()
	}
	if owner := r.state.Owner; owner != "" && owner != e.owner() {
		return fault.New(fault.Unavailable, "this orchestrator has just joined the others again; ask once more")
	}
	if _, ok := e.runs[r.id]; ok {
		return fault.New(fault.Unavailable, "run %s is just ending; ask again", r.id)
	}
	e.dropParked(r.id)
	e.runs[r.id] = r
	e.wg.Add(1)
	return nil
}

// resume walks a stored run as soon as there is a slot.
func (e *Engine) resume(id string) {
	e.mu.Lock()
	known := e.queued[id] || e.draining
	if !known {
		e.queued[id] = true
	}
	e.mu.Unlock()
	if !known {
		e.whenFree(id)
	}
}

// whenFree loads a queued run once there is a slot.
func (e *Engine) whenFree(id string) {
	e.slots.onFree(func() {
		e.mu.Lock()
		if e.draining {
			e.mu.Unlock()
			e.slots.release()
			return
		}
		e.wg.Add(1)
		e.mu.Unlock()
		go func() {
			defer e.wg.Done()
			e.load(id)
		}()
	})
}

func (e *Engine) unqueue(id string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.queued, id)
}

// load reads a queued run and walks it. The caller holds a slot, which the walk gives back.
func (e *Engine) load(id string) {
	r := newRun(e, &store.Run{ID: id}, nil)
	if err := e.register(r); err != nil {
		r.stop(nil)
		e.slots.release()
		e.retryLater(id) // an earlier walk of it, under another epoch, is just ending
		return
	}
	e.unqueue(id)
	e.walkStored(r, true)
}

// walkStored reads a registered run and walks it, or ends it where it cannot be walked.
func (e *Engine) walkStored(r *run, slot bool) {
	err := r.restore(e.base, false)
	if refused, ok := errors.AsType[*refusedError](err); ok {
		r.refuse(refused.err)
		return
	}
	if err == nil {
		r.walk()
		return
	}
	e.forget(r)
	if slot {
		e.slots.release()
	}
	if errors.Is(err, errGone) || errors.Is(err, store.ErrFenced) || errors.Is(err, errEnded) {
		return
	}
	e.Logger.Warn("a run could not be loaded; it is tried again", "run_id", r.id, "error", err)
	e.retryLater(r.id)
}

// retryLater resumes a run after a pause, for when the database did not answer.
func (e *Engine) retryLater(id string) {
	e.mu.Lock()
	if e.draining {
		e.mu.Unlock()
		return
	}
	e.queued[id] = true
	e.wg.Add(1)
	e.mu.Unlock()
	go func() {
		defer e.wg.Done()
		if e.Clock.Sleep(e.drain, time.Second) == nil {
			e.whenFree(id)
		}
	}()
}

func (e *Engine) forget(r *run) {
	r.stop(nil)
	r.withdraw(nil)
	e.mu.Lock()
	if e.runs[r.id] == r {
		delete(e.runs, r.id)
	}
	again := e.park(r)
	e.mu.Unlock()
	close(r.gone)
	if again {
		e.resume(r.id)
	}
	e.wg.Done()
}

func (e *Engine) running(id string) *run {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.runs[id]
}

// Walking is how many runs are being walked.
func (e *Engine) Walking() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.runs)
}

// Recover takes over the runs that nobody walks and returns how many there were. It leaves
// those to the others, or to later, that it could not begin soon.
func (e *Engine) Recover(ctx context.Context) (int, error) {
	n := 0
	for e.slots.queued() <= e.MaxRuns {
		runs, err := e.Store.Claim(ctx, e.owner(), claimBatch)
		if err != nil {
			return n, fmt.Errorf("claim runs: %w", err)
		}
		for _, r := range runs {
			e.resume(r.ID)
		}
		n += len(runs)
		if len(runs) < claimBatch {
			break
		}
	}
	return n, nil
}

// Cancel ends a run and returns when it has ended and nothing of it is left.
func (e *Engine) Cancel(ctx context.Context, id, reason string) error {
	if err := e.Store.RequestCancel(ctx, id, reason); err != nil {
		return err
	}
	e.cancelHere(id, reason)
	return e.Wait(ctx, id)
}

// cancelHere ends a run of this orchestrator that was cancelled.
func (e *Engine) cancelHere(id, reason string) {
	if r := e.running(id); r == nil || !r.cancel(reason) {
		e.endQueued(id)
	}
}

// endQueued ends a cancelled run that is not walked, because it waits for a slot or is parked: it needs none for that.
func (e *Engine) endQueued(id string) {
	r := newRun(e, &store.Run{ID: id}, nil)
	r.slotless = true
	if e.register(r) != nil {
		r.stop(nil)
		return // it is being walked, and finds the request there
	}
	go e.walkStored(r, false)
}

// Retry goes on with a failed or cancelled run from the step that failed.
func (e *Engine) Retry(ctx context.Context, id string) error {
	// A caller that goes away must not leave a run that nobody walks.
	ctx = context.WithoutCancel(ctx)
	if walking := e.running(id); walking != nil {
		row, err := e.Store.Run(ctx, id)
		if err != nil {
			return err
		}
		if !row.Status.Final() {
			return store.ErrState
		}
		<-walking.gone // its end is written: only the walk's own end is left
	}
	r := newRun(e, &store.Run{ID: id}, nil)
	if err := e.register(r); err != nil {
		r.stop(nil)
		return err
	}
	if _, err := e.Store.ClaimRun(ctx, e.owner(), id); err != nil {
		e.forget(r)
		return err
	}
	if err := r.restore(ctx, true); err != nil {
		e.forget(r)
		if refused, ok := errors.AsType[*refusedError](err); ok {
			return fault.Wrap(err, refused.err.Code, "the run cannot be retried: %s", refused.err.Message)
		}
		return err
	}
	// Whoever asked may be gone: once it is written, the run has to go on.
	if err := r.flush(context.WithoutCancel(ctx)); err != nil {
		e.forget(r)
		return err
	}
	e.slots.onFree(func() { go r.walk() })
	return nil
}

// Signal gives a run a signal.
func (e *Engine) Signal(ctx context.Context, id, name string, payload json.RawMessage) error {
	s := &store.Signal{RunID: id, Name: name, Payload: payload, CreatedAt: e.Clock.Now()}
	if err := e.Store.AddSignal(ctx, s); err != nil {
		return err
	}
	e.deliverHere(s)
	return nil
}

// deliverHere gives a signal to its run, if that is this orchestrator's.
func (e *Engine) deliverHere(s *store.Signal) {
	if r := e.running(s.RunID); r == nil || !r.deliver(s) {
		e.unpark(s.RunID, s.ID)
	}
}

// Wait returns when a run has ended.
func (e *Engine) Wait(ctx context.Context, id string) error {
	return e.Watch(ctx, id, 0, false, func(*Event) error { return nil })
}

// Await waits for the end of a run that is walked here from its beginning, and gives it with its jobs, in the order of
// their start, all of it durable. It gives nil for any other run, and for one that has not ended when ctx does.
func (e *Engine) Await(ctx context.Context, id string) (*store.Run, []*store.Job) {
	r := e.running(id)
	if r == nil || !r.whole {
		return nil, nil
	}
	select {
	case <-r.gone:
	case <-ctx.Done():
		return nil, nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.written {
		return nil, nil
	}
	state, jobs := r.state, make([]*store.Job, 0, len(r.jobs))
	for _, j := range r.jobs {
		jobs = append(jobs, j)
	}
	slices.SortFunc(jobs, func(a, b *store.Job) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
	return &state, jobs
}

// Waiting returns the steps other than calls that hold a run up now.
func (e *Engine) Waiting(ctx context.Context, run *store.Run) ([]*store.Step, error) {
	if r := e.running(run.ID); r != nil {
		return r.waiting(), nil
	}
	if run.Status != store.Running {
		return nil, nil
	}
	h, err := e.Store.History(ctx, run.ID) // it is walked elsewhere
	if err != nil {
		return nil, err
	}
	var out []*store.Step
	for _, s := range h.Steps {
		if s.Status == store.Running {
			out = append(out, s)
		}
	}
	return out, nil
}

// Close begins no new step, lets the calls in flight end until ctx ends, hands the rest
// back, and returns when everything has stopped.
func (e *Engine) Close(ctx context.Context) {
	e.mu.Lock()
	if !e.draining {
		e.draining = true
		e.endDrain()
	}
	e.mu.Unlock()
	e.mu.Lock()
	for id := range e.queued {
		e.handOver(id) // it waits for nothing here any more
	}
	clear(e.queued)
	for _, id := range e.parked.clear() {
		e.handOver(id)
	}
	e.mu.Unlock()
	done := make(chan struct{})
	go func() {
		e.wg.Wait()
		close(done)
	}()
	if e.hasJoined() {
		e.loops.Go(func() { e.releases(e.joined) })
	}
	select {
	case <-done:
	case <-ctx.Done():
		e.Journal.Hasten()
		e.stop(ErrHandBack)
		<-done
	}
	e.stop(ErrHandBack)
	e.leave(ctx)
	e.hub.close()
}
