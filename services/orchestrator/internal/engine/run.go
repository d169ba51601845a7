package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/telemetry"
	"github.com/specql/mesh/services/orchestrator/internal/plan"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// errEnded: a run that was to be resumed has ended.
var errEnded = errors.New("the run has ended")

// cancelledError is the cause of a walk that was cancelled on request.
type cancelledError struct{ reason string }

func (e *cancelledError) Error() string {
	if e.reason == "" {
		return "cancelled on request"
	}
	return "cancelled on request: " + e.reason
}

// run is one walk of a run.
type run struct {
	e    *Engine
	id   string
	plan *plan.Plan
	ctx  context.Context
	stop context.CancelCauseFunc
	span trace.Span    // of the run
	gone chan struct{} // closed when the engine has forgotten the walk
	// creation ends when nobody waits for the run to be created any more.
	creation context.Context
	withdraw context.CancelCauseFunc

	mu     sync.Mutex
	state  store.Run
	input  map[string]any
	jobs   map[string]*store.Job  // latest generation by key
	steps  map[string]*store.Step // latest generation by key
	active map[string]*store.Step
	// results are outputs and errors of calls, and payloads of signals, by key.
	results map[string]*result
	counts  map[string]int // iterations of a foreach, by key
	// entityRow is the row as the run sees it.
	entityRow map[string]any
	signals   []*store.Signal
	signalled chan struct{} // closed and replaced at each arrival

	// whole says that the run began here, so that no job of it is in the store alone; written, that
	// its end is durable as it is here.
	whole, written bool

	// parks says that the walk ends because the run sleeps until wakeAt, zero for ever; left, that it was parked; asked, that
	// somebody wanted something of the walk meanwhile.
	parks, left, asked bool
	wakeAt             time.Time
	retries            string // the execution type of the attempt that it sleeps before, if it does

	// lost is why the journal took no record; the walk ends and someone else goes on.
	lost error
	// fatal is why the database will never take a record; the run fails with it. refused are
	// the jobs whose states it held, by id.
	fatal   *fault.Error
	refused map[string]refusedJob

	// The append in progress and the one that gathers meanwhile.
	next     *batch
	inflight *batch
	// out are lines and the append in progress, in the order of their sequences: that is the
	// order in which they reach the journal. moved is closed, and made anew, when some did.
	out     []outgoing
	pumping bool
	moved   chan struct{}
	// settling says that the run's end comes next, and takes what gathers with it.
	settling bool

	// live branches, those of them that sleep, and whether the slot was given back.
	live, asleep int
	slotless     bool
	// forks is how many parallel steps and loops the walk is in.
	forks int
}

// outgoing is a log line or a record on its way to the journal.
type outgoing struct {
	line  *Event
	batch *batch
}

// maxOutgoing is how many lines of one run may wait for the journal; its jobs wait beyond.
const maxOutgoing = 1000

// refusedJob is a job of a record that the database will never take.
type refusedJob struct {
	job   *store.Job
	isNew bool // its row is not there
}

// batch is a record in the making.
type batch struct {
	rec    *store.Record
	dirty  bool
	wanted bool
	done   chan struct{}
	err    error
	// what to tell watchers once it is durable
	jobs []*store.Job
	// places are those of the jobs by id, once they are many.
	places map[string]int
	row    store.Run
	// rowErr says that the entity's table refused the row; the rest was written.
	rowErr error
}

// result is what a call or a signal gave.
type result struct {
	output any
	err    *fault.Error
}

func newRun(e *Engine, row *store.Run, p *plan.Plan) *run {
	r := &run{
		e: e, id: row.ID, plan: p, state: *row, jobs: map[string]*store.Job{}, steps: map[string]*store.Step{},
		active: map[string]*store.Step{}, results: map[string]*result{}, counts: map[string]int{},
		signalled: make(chan struct{}), gone: make(chan struct{}), moved: make(chan struct{}), live: 1, refused: map[string]refusedJob{},
	}
	r.ctx, r.stop = context.WithCancelCause(e.base)
	r.span = trace.SpanFromContext(r.ctx)
	r.creation, r.withdraw = context.WithCancelCause(context.Background())
	r.next = r.newBatch()
	return r
}

func (r *run) newBatch() *batch {
	return &batch{
		rec: &store.Record{RunID: r.id, Epoch: r.state.Epoch}, done: make(chan struct{}),
	}
}

// row returns a copy of the run's row.
func (r *run) row() *store.Run {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := r.state
	return &out
}

// errGone: a run that was to be resumed is not there any more.
var errGone = errors.New("the run is gone")

// restore reads a run from the store; retry sets a failed one to running again. A
// *refusedError says that it can never be walked.
func (r *run) restore(ctx context.Context, retry bool) error {
	h, err := r.e.Store.History(ctx, r.id)
	if errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("%w: %w", errGone, err)
	}
	if err != nil {
		return err
	}
	if h.Run.Status.Final() && !retry {
		return errEnded
	}
	if h.Run.Owner != r.e.owner() {
		return store.ErrFenced
	}
	r.remember(h)
	var admit *StartRequest
	if h.Run.Status == store.Pending && h.Run.Snapshot == "" && r.e.Intake != nil {
		if admit, err = r.admit(ctx, h.Run); err != nil {
			return err
		}
	}
	p, err := r.e.Plans.Plan(ctx, h.Run)
	if f, ok := fault.As(err); ok && f.Code != fault.Unavailable {
		return &refusedError{f}
	}
	if errors.Is(err, store.ErrNotFound) {
		return &refusedError{fault.Wrap(err, fault.Internal, "what the run began with is not there: %v", err)}
	}
	if err != nil {
		return fmt.Errorf("make the plan of run %s: %w", r.id, err)
	}
	input, err := decodeObject(h.Run.Input)
	if err != nil {
		return &refusedError{fault.Wrap(err, fault.Validation, "the input is no JSON object: %v", err)}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.plan, r.input = p, input
	if len(h.Run.EntityRow) > 0 {
		if r.entityRow, err = decodeObject(h.Run.EntityRow); err != nil {
			return &refusedError{fault.Wrap(err, fault.Internal, "the entity's row is no JSON object: %v", err)}
		}
	}
	r.state.Snapshot, r.state.Entity, r.state.EntityID = h.Run.Snapshot, h.Run.Entity, h.Run.EntityID
	r.state.EntitySchema, r.state.EntityRow, r.state.Input = h.Run.EntitySchema, h.Run.EntityRow, h.Run.Input
	now := r.e.Clock.Now()
	switch {
	case retry:
		r.state.Status, r.state.Retries = store.Running, r.state.Retries+1
		r.state.Output, r.state.Err, r.state.CompletedAt = nil, nil, time.Time{}
		r.state.CancelRequested, r.state.CancelReason = false, ""
		r.next.rec.Run = &store.RunChange{Status: store.Running, Retry: true}
		r.next.dirty = true
	case r.state.Status == store.Pending:
		r.state.Status, r.state.StartedAt = store.Running, now
		r.next.rec.Run = &store.RunChange{Status: store.Running, StartedAt: now}
		r.next.dirty = true
		if admit != nil {
			row := h.Run
			r.next.rec.Run.Admit = &store.Admission{
				Snapshot: row.Snapshot, EntityID: row.EntityID, EntitySchema: row.EntitySchema, EntityRow: row.EntityRow, Input: row.Input,
			}
			if admit.Insert {
				r.next.rec.InsertRow = &store.EntityRow{Schema: row.EntitySchema, Entity: row.Entity, ID: row.EntityID, Values: admit.Row}
			}
		}
	}
	r.startTrace(ctx)
	if r.state.CancelRequested {
		r.stop(&cancelledError{r.state.CancelReason})
	}
	return nil
}

// remember takes over what is recorded of the run.
func (r *run) remember(h *store.History) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.state = *h.Run
	for _, j := range h.Jobs {
		if j.Generation > h.Run.Retries {
			continue // no walk made it
		}
		if old := r.jobs[j.StepPath]; old == nil || old.Generation <= j.Generation {
			r.jobs[j.StepPath] = j
		}
		r.state.Sequence = max(r.state.Sequence, j.Sequence)
	}
	for _, s := range h.Steps {
		if old := r.steps[s.StepPath]; old == nil || old.Generation <= s.Generation {
			r.steps[s.StepPath] = s
		}
		r.state.Sequence = max(r.state.Sequence, s.Sequence)
	}
	known := map[int64]bool{}
	for _, s := range h.Signals {
		known[s.ID] = true
	}
	for _, s := range r.signals {
		if !known[s.ID] {
			h.Signals = append(h.Signals, s)
		}
	}
	r.signals = h.Signals
	// Log lines of the walk before may have had sequences above the last record's.
	r.state.Sequence += 2 * store.MaxLogLines
	r.next = r.newBatch()
}

// refusedError says why a run that a client inserted by SQL cannot begin.
type refusedError struct{ err *fault.Error }

func (e *refusedError) Error() string { return e.err.Error() }

// admit fills in the row of a run that a client inserted by SQL.
func (r *run) admit(ctx context.Context, row *store.Run) (*StartRequest, error) {
	req, err := r.e.Intake.PrepareRun(ctx, row)
	if err == nil {
		row.Snapshot, row.EntityID = req.Snapshot, req.EntityID
		if e := req.Plan.Entity; e != nil {
			row.Entity, row.EntitySchema = e.Name, e.Schema
		}
		_, _, err = payloads(req, row)
	}
	if f, ok := fault.As(err); ok && f.Code == fault.Validation {
		return nil, &refusedError{f}
	}
	return req, err
}

// refuse ends a run that cannot begin. The caller holds a slot and the run is registered.
func (r *run) refuse(err *fault.Error) {
	defer r.end()
	r.note(func(rec *store.Record) { rec.Run = &store.RunChange{StartedAt: r.e.Clock.Now()} })
	r.conclude(err)
}

// errTakenBack: nobody waits for a run that has not begun.
var errTakenBack = errors.New("the caller went away before the run was durable")

// takeBack ends a walk of which nothing is on its way to the disk.
func (r *run) takeBack() { r.withdraw(errTakenBack) }

// lose lets go of the run: it is another owner's by now.
func (r *run) lose(owner string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.state.Owner != "" && r.state.Owner != owner {
		return
	}
	if r.lost == nil {
		r.lost = fmt.Errorf("%w: it was taken over", store.ErrFenced)
	}
	r.stop(fmt.Errorf("%w: %w", ErrHandBack, r.lost))
}

// cancel ends the walk; false where it has ended already because the run is parked.
func (r *run) cancel(reason string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.asked = true
	r.stop(&cancelledError{reason})
	return !r.left
}

// deliver gives the walk a signal; false where it has ended already because the run is parked.
func (r *run) deliver(s *store.Signal) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, have := range r.signals {
		if have.ID == s.ID {
			return true
		}
	}
	if r.left {
		return false
	}
	r.asked = true
	r.signals = append(r.signals, s)
	close(r.signalled)
	r.signalled = make(chan struct{})
	return true
}

func (r *run) waiting() []*store.Step {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]*store.Step, 0, len(r.active))
	for _, s := range r.active {
		c := *s
		out = append(out, &c)
	}
	return out
}

// noteJob adds a job's state to the next record.
func (r *run) noteJob(j *store.Job, isNew bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.noteJobLocked(j, isNew)
}

// noteJobLocked is noteJob with r.mu held.
func (r *run) noteJobLocked(j *store.Job, isNew bool) {
	c := *j
	r.jobs[j.StepPath] = j
	b := r.next
	b.dirty = true
	if i := b.place(c.ID); i >= 0 {
		*b.jobs[i] = c // the record holds this very pointer
		if at := slices.Index(b.rec.ChangedJobs, b.jobs[i]); isNew && at >= 0 {
			b.rec.ChangedJobs = slices.Delete(b.rec.ChangedJobs, at, at+1)
			b.rec.NewJobs = append(b.rec.NewJobs, b.jobs[i])
		}
		return
	}
	b.add(&c)
	if isNew {
		b.rec.NewJobs = append(b.rec.NewJobs, &c)
	} else {
		b.rec.ChangedJobs = append(b.rec.ChangedJobs, &c)
	}
}

// fewJobs are found without a map: most records hold two, the one that has ended and the next.
const fewJobs = 8

// place finds a job; -1 where it is not there.
func (b *batch) place(id string) int {
	if b.places == nil {
		return slices.IndexFunc(b.jobs, func(j *store.Job) bool { return j.ID == id })
	}
	if i, ok := b.places[id]; ok {
		return i
	}
	return -1
}

func (b *batch) add(j *store.Job) {
	b.jobs = append(b.jobs, j)
	switch {
	case b.places != nil:
		b.places[j.ID] = len(b.jobs) - 1
	case len(b.jobs) > fewJobs:
		b.places = make(map[string]int, 2*len(b.jobs))
		for i, j := range b.jobs {
			b.places[j.ID] = i
		}
	}
}

// noteStep adds a step's state to the next record.
func (r *run) noteStep(s *store.Step) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.noteStepLocked(s)
}

// noteStepLocked is noteStep with r.mu held.
func (r *run) noteStepLocked(s *store.Step) {
	c := *s
	r.steps[s.StepPath] = s
	if s.Status == store.Running {
		r.active[s.StepPath] = &c
	} else {
		delete(r.active, s.StepPath)
	}
	for i, have := range r.next.rec.Steps {
		if have.StepPath == c.StepPath && have.Generation == c.Generation {
			r.next.rec.Steps[i] = &c
			return
		}
	}
	r.next.rec.Steps = append(r.next.rec.Steps, &c)
	r.next.dirty = true
}

// note changes the next record.
func (r *run) note(f func(rec *store.Record)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f(r.next.rec)
	r.next.dirty = true
}

// flush makes everything noted so far durable. Appends of one run follow each other: while
// one is in progress, what all branches note meanwhile gathers in the next.
func (r *run) flush(ctx context.Context) error {
	r.mu.Lock()
	b, err := r.want()
	if b == nil || err != nil {
		r.mu.Unlock()
		return err
	}
	// Where nothing goes before the record, who waits for it passes it on itself: no goroutine has to be begun and woken for it.
	own := !r.pumping && len(r.out) > 0
	r.pumping = r.pumping || own
	r.mu.Unlock()
	_, span := telemetry.Start(ctx, "journal")
	defer span.End()
	before := telemetry.Enter(ctx, "journal")
	defer telemetry.Enter(ctx, before)
	if own {
		if r.pump(b); b.err != nil {
			return b.err
		}
		return context.Cause(ctx)
	}
	select {
	case <-b.done:
		return b.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// forward puts everything noted so far on its way, and waits for nothing.
func (r *run) forward() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, err := r.want()
	r.startPump()
	return err
}

// want asks for everything noted so far to be written, and returns what is to be waited for; nil for nothing. It is for the
// caller to see to it that what is on its way then is passed on. r.mu is held.
func (r *run) want() (*batch, error) {
	if r.lost != nil {
		return nil, fmt.Errorf("%w: %w", ErrHandBack, r.lost)
	}
	if !r.next.dirty {
		return r.inflight, nil
	}
	b := r.next
	b.wanted = true
	if r.inflight == nil {
		r.inflight = b
		if b.rec.UpdateRow != nil {
			r.take() // what its table refuses is this step's alone
		}
		r.out = append(r.out, outgoing{batch: b})
	}
	return b, nil
}

// settle waits for the append in progress, whose outcome decides how the run ends, and returns with r.mu held. What gathers
// meanwhile is written with the end, even if it was to follow at once.
func (r *run) settle() {
	r.mu.Lock()
	for b := r.inflight; b != nil && b != r.next; b = r.inflight {
		r.settling = true
		r.mu.Unlock()
		<-b.done
		r.mu.Lock()
	}
	r.settling = false
}

// outgone waits until nothing is on its way to the journal: the next owner has to find it there.
func (r *run) outgone() {
	for {
		r.mu.Lock()
		b := r.inflight
		r.mu.Unlock()
		if b == nil {
			return
		}
		<-b.done
	}
}

// take closes the record that gathers: its parts get their sequences. r.mu is held.
func (r *run) take() {
	b := r.next
	next := func() int64 { r.state.Sequence++; return r.state.Sequence }
	for _, j := range b.jobs {
		j.Sequence = next()
	}
	for _, s := range b.rec.Steps {
		s.Sequence = next()
	}
	// Each record raises the sequence: that tells one that was written from one that was not.
	if b.rec.Create != nil || b.rec.Run != nil || len(b.jobs)+len(b.rec.Steps) == 0 {
		next()
	}
	b.rec.Sequence = r.state.Sequence
	b.rec.Epoch = r.state.Epoch
	if b.rec.Create != nil {
		b.rec.Create.Sequence = r.state.Sequence
	}
	b.row = r.state
	r.next = r.newBatch()
}

// refusedForGood tells a record that the database will never take from one that it could
// not take now.
func refusedForGood(err error) bool {
	if err == nil || errors.Is(err, store.ErrFenced) || errors.Is(err, store.ErrClosed) {
		return false
	}
	if _, dup := errors.AsType[*store.DuplicateError](err); dup {
		return false
	}
	_, rule := fault.As(err)
	return rule || errors.Is(err, store.ErrRefused) || errors.Is(err, store.ErrState) || errors.Is(err, store.ErrNotFound)
}

// append appends a batch. A row that its table refuses does not hold back what else the
// record says: the step that set it fails, and the calls that ended have ended.
func (r *run) append(b *batch) error {
	// The journal decides how long to go on trying; the walk's end does not undo a write.
	ctx := context.WithoutCancel(r.ctx)
	if b.rec.Create != nil {
		ctx = r.creation // a caller who goes away takes back what still waits
	}
	err := r.e.Journal.Append(ctx, b.rec)
	if err != nil && ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return errTakenBack
	}
	if !refusedForGood(err) || b.rec.UpdateRow == nil {
		return err
	}
	b.rowErr = err
	b.rec.UpdateRow = nil
	b.rec.Steps = slices.DeleteFunc(b.rec.Steps, func(s *store.Step) bool { return s.Kind == stepUpdate })
	return r.e.Journal.Append(ctx, b.rec)
}

// push puts something on its way to the journal. r.mu is held.
func (r *run) push(o outgoing) {
	r.out = append(r.out, o)
	r.startPump()
}

// startPump sees to it that what waits is passed on. r.mu is held.
func (r *run) startPump() {
	if !r.pumping && len(r.out) > 0 {
		r.pumping = true
		go r.pump(nil)
	}
}

// pump passes on to the journal what waits, in order, until nothing does. It returns once the batch own is written, for which its
// caller waits; another one goes on with what has come meanwhile.
func (r *run) pump(own *batch) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(r.out) > 0 {
		if b := r.out[0].batch; b != nil && b == r.next {
			r.gather()
			r.take()
			// Lines that came meanwhile have lower sequences.
			r.out = append(r.out[1:], r.out[0])
			continue
		}
		if b := r.out[0].batch; b != nil {
			r.shift(1)
			r.mu.Unlock()
			b.err = r.append(b)
			r.mu.Lock()
			if r.appended(b); b == own {
				r.pumping = false
				r.startPump()
				return
			}
			continue
		}
		var lines []*store.LogLine
		var events []*Event
		for _, o := range r.out {
			if o.batch != nil {
				break
			}
			lines, events = append(lines, o.line.Log), append(events, o.line)
		}
		r.shift(len(lines))
		r.e.hub.publish(r.id, events...)
		r.mu.Unlock()
		if err := r.e.Journal.AppendLogs(r.ctx, lines); err != nil && r.ctx.Err() == nil {
			r.e.Logger.WarnContext(r.ctx, "log lines were not stored", "lines", len(lines), "error", err)
		}
		r.mu.Lock()
	}
	r.pumping = false
}

// mostGathered is how often a record waits for what other branches do at the same time.
const mostGathered = 20

// gather lets other branches go on first, for as long as they have something for the record that gathers: where they all begin
// at once, or the answers to several calls have come, one record says so. It waits for nothing. r.mu is held.
func (r *run) gather() {
	if r.forks == 0 {
		return
	}
	for had, n := -1, 0; had < len(r.next.jobs) && n < mostGathered; n++ {
		had = len(r.next.jobs)
		r.mu.Unlock()
		runtime.Gosched()
		r.mu.Lock()
	}
}

// shift takes the first n of what waits away. r.mu is held.
func (r *run) shift(n int) {
	if len(r.out) >= maxOutgoing { // somebody may wait for room
		close(r.moved)
		r.moved = make(chan struct{})
	}
	r.out = slices.Delete(r.out, 0, n)
}

// appended sees to what follows a batch, and takes the next one where it is wanted by then.
// r.mu is held.
func (r *run) appended(b *batch) {
	if b.err == nil {
		r.publishBatch(b)
	} else {
		r.fail(b)
	}
	r.inflight = nil
	var failed *batch
	switch {
	case !r.next.wanted, r.settling && r.lost == nil:
	case r.lost == nil:
		r.inflight = r.next
		r.push(outgoing{batch: r.inflight})
	default:
		failed = r.next
		r.next = r.newBatch()
	}
	close(b.done)
	if failed != nil {
		failed.err = b.err
		close(failed.done)
	}
}

// fail ends the walk because a batch was not written. r.mu is held.
func (r *run) fail(b *batch) {
	if !refusedForGood(b.err) || b.rec.Create != nil {
		r.lost = b.err
		r.stop(fmt.Errorf("%w: %w", ErrHandBack, b.err))
		return
	}
	isNew := map[*store.Job]bool{}
	for _, j := range b.rec.NewJobs {
		isNew[j] = true
	}
	for _, j := range b.jobs {
		r.refused[j.ID] = refusedJob{j, isNew[j] || r.refused[j.ID].isNew}
	}
	r.fatal = fault.Wrap(b.err, fault.Internal, "the database does not take what the run holds: %v", b.err)
	r.stop(r.fatal)
}

// publishBatch tells watchers what has become durable. r.mu is held.
func (r *run) publishBatch(b *batch) {
	if !r.e.hub.watched(r.id) {
		return
	}
	now := r.e.Clock.Now()
	events := make([]*Event, 0, len(b.jobs)+1)
	for _, j := range b.jobs {
		events = append(events, &Event{Sequence: j.Sequence, Time: now, Job: j})
	}
	if b.rec.Create != nil || b.rec.Run != nil || len(b.rec.Steps) > 0 {
		events = append(events, &Event{Sequence: b.rec.Sequence, Time: now, Run: &b.row})
	}
	r.e.hub.publish(r.id, events...)
}

// log takes a line of a job: it is told to watchers in order and stored in a while. It waits
// while too many lines wait for the journal.
func (r *run) log(j *store.Job, line int64, stream, text string, at time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(r.out) >= maxOutgoing {
		moved := r.moved
		r.mu.Unlock()
		select {
		case <-moved:
		case <-r.ctx.Done():
		}
		r.mu.Lock()
		if r.ctx.Err() != nil && len(r.out) >= maxOutgoing {
			return
		}
	}
	r.state.Sequence++
	l := &store.LogLine{
		RunID: r.id, Sequence: r.state.Sequence, JobID: j.ID, StepPath: j.StepPath, Attempt: j.Attempts,
		Line: line, Stream: stream, Text: text, Time: at,
	}
	r.push(outgoing{line: &Event{Sequence: l.Sequence, Time: at, Log: l}})
}

// walk walks the run to its end. The caller holds a slot and the run is registered.
func (r *run) walk() {
	defer r.end()
	err := r.protect(r.body)
	if r.handedBack(err) {
		return
	}
	r.conclude(err)
}

// end gives the slot back and forgets the run.
func (r *run) end() {
	r.mu.Lock()
	slotless := r.slotless
	r.mu.Unlock()
	if !slotless {
		r.e.slots.release()
	}
	r.stop(nil)
	r.e.forget(r)
}

// protect turns a panic into an error: a defect met by one run must not end the others.
func (r *run) protect(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			r.e.Logger.ErrorContext(r.ctx, "a walk panicked", "panic", p, "stack", string(debug.Stack()))
			err = fault.New(fault.Internal, "the orchestrator met a defect in this run; its log has the cause")
		}
	}()
	return f()
}

// conclude writes the run's end. Where the database does not take it, it is written without
// the payloads that it refused, and at last alone.
func (r *run) conclude(err error) {
	output, err := r.output(err)
	r.endLeftovers()
	for try := range 3 {
		r.settle()
		change := &store.RunChange{CompletedAt: r.e.Clock.Now()}
		asked, cancelled := errors.AsType[*cancelledError](context.Cause(r.ctx))
		switch {
		case r.fatal != nil:
			change.Status, change.Err = store.Failed, r.fatal
		case err == nil:
			change.Status, change.Output = store.Completed, output
		case cancelled:
			change.Status, change.Err = store.Cancelled, fault.New(fault.Cancelled, "%s", asked.Error())
		default:
			change.Status, change.Err = store.Failed, fault.From(err)
		}
		if try == 0 && r.next.rec.Run != nil {
			change.StartedAt, change.Retry = r.next.rec.Run.StartedAt, r.next.rec.Run.Retry
		}
		refused := r.refused
		r.refused = map[string]refusedJob{}
		if try < 2 {
			for _, j := range refused {
				bare := *j.job
				bare.Input, bare.Output, bare.OutputValue, bare.ResourceUsage, bare.SecurityContext, bare.Usage, bare.Security = nil, nil, nil, nil, nil, nil, nil
				bare.Status, bare.Err, bare.CompletedAt = store.Failed, r.fatal, change.CompletedAt
				r.noteJobLocked(&bare, j.isNew)
			}
		}
		r.state.Status, r.state.Output, r.state.Err, r.state.CompletedAt = change.Status, change.Output, change.Err, change.CompletedAt
		if r.next.rec.Create != nil {
			// Nothing was durable before the end: the run is created as it ended.
			row := r.state
			r.next.rec.Create = &row
		} else {
			r.next.rec.Run = change
		}
		r.next.dirty = true
		r.mu.Unlock()
		ferr := r.flush(context.WithoutCancel(r.ctx))
		if ferr == nil {
			r.mu.Lock()
			r.written = r.fatal == nil
			began := r.state.StartedAt
			r.mu.Unlock()
			r.endTrace(change)
			r.e.Observer.RunEnded(r.ctx, change.Status, change.CompletedAt.Sub(began))
			return
		}
		if r.handedBack(ferr) {
			return
		}
	}
	r.e.Logger.ErrorContext(r.ctx, "the end of a run could not be written")
}

// endLeftovers ends the jobs and steps of an earlier walk that this one did not come to,
// because it was cancelled or another branch failed first.
func (r *run) endLeftovers() {
	now := r.e.Clock.Now()
	var jobs []*store.Job
	isNew := map[*store.Job]bool{}
	r.mu.Lock()
	for _, s := range r.steps {
		if !s.Status.Final() {
			c := *s
			c.Status, c.CompletedAt = store.Cancelled, now
			r.noteStepLocked(&c)
		}
	}
	for _, j := range r.jobs {
		if !j.Status.Final() {
			c := *j
			c.Status, c.CompletedAt, c.NextAttemptAt = store.Cancelled, now, time.Time{}
			c.Err = fault.New(fault.Cancelled, "its run ended")
			jobs, isNew[&c] = append(jobs, &c), j.Adopted && j.Status == store.Pending
		}
	}
	r.mu.Unlock()
	for _, j := range jobs {
		r.noteJob(j, isNew[j])
		r.note(func(rec *store.Record) {
			rec.Ends = append(rec.Ends, orphaned(j))
		})
	}
}

// handedBack reports whether a walk ended without an end of the run, and sees to it that
// someone goes on.
func (r *run) handedBack(err error) bool {
	r.mu.Lock()
	lost, parks := r.lost, r.parks
	r.mu.Unlock()
	if lost == nil {
		if errors.Is(err, ErrHandBack) && parks {
			return true
		}
		if errors.Is(err, ErrHandBack) {
			r.outgone()
			r.e.handOver(r.id)
			return true
		}
		return false
	}
	_, dup := errors.AsType[*store.DuplicateError](lost)
	if dup || errors.Is(lost, errTakenBack) || errors.Is(lost, store.ErrFenced) || errors.Is(lost, store.ErrClosed) || refusedForGood(lost) {
		return true
	}
	r.e.Logger.Error("a run's record could not be written; the run is taken up again", "run_id", r.id, "error", lost)
	r.e.retryLater(r.id)
	return true
}

// output is the run's output as JSON, or the error that it ends with.
func (r *run) output(err error) (json.RawMessage, error) {
	if err != nil {
		return nil, err
	}
	var v any = map[string]any{}
	if r.plan.Output != nil {
		if v, err = r.eval(r.plan.Output, nil); err != nil {
			return nil, fault.Wrap(err, fault.Validation, "output: %v", err)
		}
	} else {
		// The last call of the document that completed: branches end in any order, and the
		// output must not depend on it.
		r.mu.Lock()
		for _, n := range slices.Backward(r.plan.Calls()) {
			if given, ok := r.response(n, nil); ok {
				v = given
				break
			}
		}
		r.mu.Unlock()
	}
	b, err := json.Marshal(v)
	if err != nil {
		return nil, fault.Wrap(err, fault.Validation, "the output is not JSON: %v", err)
	}
	if len(b) > MaxPayload {
		return nil, fault.New(fault.Validation, "the output has %d bytes; at most %d are kept", len(b), MaxPayload)
	}
	return b, nil
}

// sleep says that a branch only waits now; a run of which every branch waits needs no slot.
func (r *run) sleep() {
	r.mu.Lock()
	r.asleep++
	free := r.asleep == r.live && !r.slotless
	if free {
		r.slotless = true
	}
	r.mu.Unlock()
	if free {
		r.e.slots.release()
	}
}

// wake says that a branch goes on, once the run has a slot.
func (r *run) wake(ctx context.Context) error {
	r.mu.Lock()
	r.asleep--
	if r.parks {
		r.mu.Unlock()
		return ErrHandBack
	}
	need := r.slotless
	if need {
		r.slotless = false
	}
	r.mu.Unlock()
	if !need {
		return nil
	}
	// The slot may come after a cancel has ended the wait; then it goes on to the next run.
	var mu sync.Mutex
	var gone bool
	got := make(chan struct{})
	r.e.slots.onFree(func() {
		mu.Lock()
		defer mu.Unlock()
		if gone {
			go r.e.slots.release()
			return
		}
		close(got)
	})
	select {
	case <-got:
		return context.Cause(ctx)
	case <-ctx.Done():
	}
	mu.Lock()
	defer mu.Unlock()
	select {
	case <-got:
	default:
		gone = true
		r.mu.Lock()
		r.slotless = true
		r.mu.Unlock()
	}
	return context.Cause(ctx)
}

func (r *run) fork(n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.forks += n
}

// branches changes how many branches are live.
func (r *run) branches(n int) {
	r.mu.Lock()
	r.live += n
	free := r.asleep == r.live && r.asleep > 0 && !r.slotless
	if free {
		r.slotless = true
	}
	r.mu.Unlock()
	if free {
		r.e.slots.release()
	}
}
