package engine

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// Times of the membership. An owner that has not beaten for ownerLimit is taken for dead by
// those who watched it for so long; none of them compares clocks. What passes while the watcher itself
// cannot reach the database for more than awayLimit does not count.
const (
	// beatInterval is how often an orchestrator says that it lives.
	beatInterval = time.Second
	// ownerLimit is how long an owner may be silent before its runs are taken over.
	ownerLimit = 5 * time.Second
	// awayLimit is after how long between two beats of its own an orchestrator was away, and what the others have at least after
	// that to say that they live.
	awayLimit = ownerLimit / 2
	// workInterval is how often an orchestrator looks for work that no notice told of.
	workInterval = time.Second
	// askInterval is how often it asks for cancels and signals, and for what is in force, that no notice told of. Both are told of
	// by who writes them, and asked for whenever the connection for notices is new.
	askInterval = 5 * time.Second
	// detachedLimit is for how long calls in flight go on while no beat reaches the database:
	// it is probably down for everybody, but may be so for this orchestrator alone.
	detachedLimit = 2 * time.Minute
	// followInterval is how often runs are looked at that are watched here and walked elsewhere, and firstLook how soon after
	// somebody began to watch, when nobody did before.
	followInterval = 100 * time.Millisecond
	firstLook      = 10 * time.Millisecond
	// reconcileInterval is how often an orchestrator looks for runs and jobs that are its own
	// and that it does not know of: the answer to a claim may get lost.
	reconcileInterval = time.Minute
	// maintainInterval is how often old runs are deleted and statistics put together.
	maintainInterval = time.Minute
	// maintainWait bounds one turn of that.
	maintainWait = 10 * time.Minute
	// claimBatch is how many runs or jobs one claim takes at most.
	claimBatch = 256
	// maxName is how much of a name that a client wrote a run shows, in bytes.
	maxName = 255
	// storeWait bounds one question to the store of the loops here.
	storeWait = 10 * time.Second
)

// member is what this orchestrator has seen of another one.
type member struct {
	beat int64
	// silent is for how long no other beat was seen while beats were looked at.
	silent time.Duration
}

// membership says who this orchestrator is to the others, and who they are to it.
type membership struct {
	mu      sync.Mutex
	owner   string
	names   int
	beaten  time.Time // of the last beat that reached the database
	members map[string]member
	// disabled execution types.
	disabled map[string]bool
	// waits has a channel for each execution type that attempts wait with. It is closed once the type is disabled.
	waits map[string]chan struct{}

	// reconciled is when it was last seen that everything that is owned is known; zero for at once.
	reconciled time.Time

	released chan struct{} // one token: there are runs to give up
	giveUp   []string
	work     chan struct{} // one token: look for work
	requests chan struct{} // one token: look for cancels and signals
	refresh  chan struct{} // one token: look at the registry
}

func newMembership(owner string) *membership {
	token := func() chan struct{} { return make(chan struct{}, 1) }
	return &membership{
		owner: owner, members: map[string]member{}, disabled: map[string]bool{}, waits: map[string]chan struct{}{},
		released: token(), work: token(), requests: token(), refresh: token(),
	}
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// owner is the name under which runs are owned now. It changes where the others took this
// orchestrator for dead.
func (e *Engine) owner() string {
	e.members.mu.Lock()
	defer e.members.mu.Unlock()
	return e.members.owner
}

// Renew says whether leases of running jobs may be renewed: not once this orchestrator has
// been cut off from the database for so long that others surely own its runs.
func (e *Engine) Renew() bool {
	e.members.mu.Lock()
	defer e.members.mu.Unlock()
	return e.members.beaten.IsZero() || time.Since(e.members.beaten) < detachedLimit
}

// Join makes this orchestrator known to the others, takes over the runs that nobody walks,
// and from then on finds work, takes over the runs of those who died, and hears what is asked
// of its own runs. Close ends that. It returns how many runs it took over.
func (e *Engine) Join(ctx context.Context) (int, error) {
	if err := e.beat(ctx, true); err != nil {
		return 0, fmt.Errorf("join the mesh: %w", err)
	}
	if err := e.refresh(ctx); err != nil {
		return 0, fmt.Errorf("join the mesh: %w", err)
	}
	n, err := e.Recover(ctx)
	if err != nil {
		return n, err
	}
	for _, loop := range []func(context.Context){e.beats, e.works, e.hears, e.listens, e.follows, e.refreshes, e.maintains} {
		e.loops.Go(func() { loop(e.joined) })
	}
	poke(e.members.work)
	return n, nil
}

// each calls f at once for each token and at least every interval, until ctx ends.
func each(ctx context.Context, interval time.Duration, token <-chan struct{}, f func()) {
	t := time.NewTicker(interval)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		case <-token:
		}
		if ctx.Err() != nil {
			return
		}
		f()
	}
}

// beats says that this orchestrator lives, and sees who does not.
func (e *Engine) beats(ctx context.Context) {
	each(ctx, beatInterval, nil, func() {
		bctx, cancel := context.WithTimeout(ctx, storeWait)
		defer cancel()
		err := e.beat(bctx, false)
		switch {
		case err == nil || ctx.Err() != nil:
		case errors.Is(err, store.ErrFenced):
			e.evict(ctx)
		default:
			e.Logger.Warn("this orchestrator could not say that it lives; calls in flight go on", "error", err)
		}
	})
}

// beat raises the own beat and looks at the others'.
func (e *Engine) beat(ctx context.Context, register bool) error {
	m := e.members
	owner := e.owner()
	beats, err := e.Store.Heartbeat(ctx, owner, register)
	if err != nil {
		return err
	}
	now := time.Now()
	type silent struct {
		name string
		beat int64
	}
	var dead []silent
	m.mu.Lock()
	passed := now.Sub(m.beaten)
	// Who was away has seen nobody silent meanwhile: the others may have been cut off just as well, and need a while to come back.
	away := passed > awayLimit
	m.beaten = now
	for name := range m.members {
		if _, there := beats[name]; !there {
			delete(m.members, name)
		}
	}
	for name, beat := range beats {
		seen, known := m.members[name]
		switch {
		case name == owner:
		case !known || seen.beat != beat:
			m.members[name] = member{beat: beat}
		case away:
			m.members[name] = member{beat: beat, silent: min(seen.silent, ownerLimit-awayLimit)}
		default:
			seen.silent += passed
			m.members[name] = seen
			if seen.silent >= ownerLimit {
				dead = append(dead, silent{name, beat})
			}
		}
	}
	m.mu.Unlock()
	for _, d := range dead {
		buried, err := e.Store.Bury(ctx, d.name, d.beat)
		if err != nil {
			return fmt.Errorf("bury %s: %w", d.name, err)
		}
		if buried {
			e.Logger.Warn("an orchestrator is silent; its runs are taken over", "orchestrator", d.name, "silent", ownerLimit)
			poke(m.work)
		}
	}
	return nil
}

// evict lets go of every run: the others took this orchestrator for dead, and its runs are
// theirs. It joins again under another name, so that what nobody has claimed yet is not taken
// for its own.
func (e *Engine) evict(ctx context.Context) {
	m := e.members
	m.mu.Lock()
	m.names++
	old := m.owner
	m.owner = fmt.Sprintf("%s.%d", e.Owner, m.names)
	m.mu.Unlock()
	e.mu.Lock()
	var runs []*run
	for _, r := range e.runs {
		runs = append(runs, r)
	}
	e.parked.clear()
	e.mu.Unlock()
	e.Logger.Error("the others took this orchestrator for dead: it lets go of its runs and joins again", "was", old, "runs", len(runs))
	for _, r := range runs {
		r.lose(old)
	}
	bctx, cancel := context.WithTimeout(ctx, storeWait)
	defer cancel()
	if err := e.beat(bctx, true); err != nil && ctx.Err() == nil {
		e.Logger.Warn("this orchestrator could not join again; it tries on", "error", err)
	}
	poke(m.work)
}

// cutOff says whether no beat has reached the database for a while.
func (e *Engine) cutOff() bool {
	e.members.mu.Lock()
	defer e.members.mu.Unlock()
	return !e.members.beaten.IsZero() && time.Since(e.members.beaten) > 2*ownerLimit
}

// works claims runs and jobs.
func (e *Engine) works(ctx context.Context) {
	each(ctx, workInterval, e.members.work, func() {
		if e.drain.Err() != nil {
			return
		}
		wctx, cancel := context.WithTimeout(ctx, storeWait)
		defer cancel()
		for what, claim := range map[string]func(context.Context) error{
			"runs": func(ctx context.Context) error { _, err := e.Recover(ctx); return err },
			"jobs": e.admitJobs,
			"lost": e.reconcile,
		} {
			if err := claim(wctx); err != nil && ctx.Err() == nil {
				e.Logger.Warn("work could not be claimed", "what", what, "error", err)
				e.lostClaim(time.Time{})
			}
		}
	})
}

// lostClaim sets when it was last seen that everything that is owned is known.
func (e *Engine) lostClaim(at time.Time) {
	e.members.mu.Lock()
	defer e.members.mu.Unlock()
	e.members.reconciled = at
}

// reconcile takes up what this orchestrator owns and does not know of.
func (e *Engine) reconcile(ctx context.Context) error {
	e.members.mu.Lock()
	since := time.Since(e.members.reconciled)
	e.members.mu.Unlock()
	if since < reconcileInterval {
		return nil
	}
	runs, jobs, err := e.Store.Owned(ctx, e.owner())
	if err != nil {
		return err
	}
	e.lostClaim(time.Now())
	for _, id := range runs {
		if e.running(id) == nil && !e.isParked(id) {
			e.resume(id) // one that has just ended is seen to have
		}
	}
	for _, j := range jobs {
		e.admit(j)
	}
	return nil
}

// admitJobs makes runs of jobs that clients inserted by SQL, as many as there is room for.
func (e *Engine) admitJobs(ctx context.Context) error {
	if e.Intake == nil {
		return nil
	}
	for {
		room := min(claimBatch, e.slots.room())
		if room <= 0 {
			return nil
		}
		jobs, err := e.Store.ClaimJobs(ctx, e.owner(), room)
		if err != nil {
			return err
		}
		for _, j := range jobs {
			e.admit(j)
		}
		if len(jobs) < room {
			return nil
		}
	}
}

// admit begins the run of a job in the background, once there is a slot.
func (e *Engine) admit(j *store.Job) {
	e.mu.Lock()
	known := e.admitting[j.ID] || e.draining
	if !known {
		e.admitting[j.ID] = true
	}
	e.mu.Unlock()
	if !known {
		e.admitWhenFree(j, e.owner())
	}
}

func (e *Engine) admitWhenFree(j *store.Job, owner string) {
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
			// While the database is away the job is tried again, for as long as it is this owner's.
			if !e.startJob(j) && e.Clock.Sleep(e.drain, time.Second) == nil && e.owner() == owner {
				e.admitWhenFree(j, owner)
				return
			}
			e.mu.Lock()
			delete(e.admitting, j.ID)
			e.mu.Unlock()
		}()
	})
}

// startJob begins the run of a job and reports whether that is settled. The caller's slot is
// given back.
func (e *Engine) startJob(j *store.Job) (settled bool) {
	var req *StartRequest
	var err error
	if j.Err != nil {
		err = j.Err
	} else {
		req, err = e.Intake.PrepareJob(e.base, j)
	}
	if err == nil {
		_, err = e.begin(e.base, req)
	} else {
		e.slots.release()
	}
	if f, ok := fault.As(err); ok && f.Code == fault.Validation {
		err = e.refuseJob(j, f)
	}
	// One that is no longer pending is another's by now, or gone.
	if err == nil || errors.Is(err, store.ErrState) || errors.Is(err, store.ErrNotFound) || e.drain.Err() != nil {
		return true
	}
	e.Logger.Warn("a job that was inserted by SQL could not be begun; it is tried again", "job_id", j.ID, "error", err)
	return errors.Is(err, store.ErrRefused) // not before it is looked at again
}

// refuseJob ends a job that cannot become a run: it fails, as a call from the API would.
func (e *Engine) refuseJob(j *store.Job, why *fault.Error) error {
	now := e.Clock.Now()
	row, err := e.newRow(&StartRequest{Action: clip(j.Service, maxName) + "." + clip(j.Operation, maxName), CorrelationID: j.CorrelationID, TenantID: j.TenantID, Subject: j.TriggeredBy})
	if err != nil {
		return err
	}
	row.Status, row.Err, row.StartedAt, row.CompletedAt = store.Failed, why, now, now
	row.Sequence = 2
	if len(j.Input) <= MaxPayload && depth(j.Input) <= MaxNesting {
		row.Input = j.Input
	}
	why.Message = clip(why.Message, maxMessage)
	failed := *j
	failed.Adopted, failed.RunID, failed.StepPath = true, row.ID, "steps[0]"
	failed.Status, failed.Err, failed.CompletedAt, failed.Sequence = store.Failed, why, now, 1
	failed.Attempts = min(max(j.Attempts, 0), maxAttempts)
	if err := e.Journal.Append(e.base, &store.Record{RunID: row.ID, Epoch: row.Epoch, Sequence: row.Sequence, Create: row, NewJobs: []*store.Job{&failed}}); err != nil {
		return err
	}
	e.Observer.RunEnded(e.base, store.Failed, 0)
	// The names are a client's, and may be of nothing that there is.
	e.Observer.JobEnded(e.base, &JobEnd{ExecutionType: failed.ExecutionType, Status: store.Failed, Code: why.Code})
	return nil
}

// hears passes on what other orchestrators were asked of the runs that are walked here.
func (e *Engine) hears(ctx context.Context) {
	each(ctx, askInterval, e.members.requests, func() {
		wctx, cancel := context.WithTimeout(ctx, storeWait)
		defer cancel()
		req, err := e.Store.Requests(wctx, e.owner())
		if err != nil {
			if ctx.Err() == nil {
				e.Logger.Warn("requests to runs could not be read", "error", err)
			}
			return
		}
		for id, reason := range req.Cancels {
			e.cancelHere(id, reason)
		}
		for _, s := range req.Signals {
			e.deliverHere(s)
		}
	})
}

// listens turns notices of the database into tokens.
func (e *Engine) listens(ctx context.Context) {
	err := e.Store.Listen(ctx, func(n store.Notice) {
		switch n {
		case store.NoticeWork:
			poke(e.members.work)
		case store.NoticeRequest:
			poke(e.members.requests)
		case store.NoticeRegistry:
			poke(e.members.refresh)
		}
	})
	if err != nil && ctx.Err() == nil && !errors.Is(err, store.ErrClosed) {
		e.Logger.Error("notices of the database are not heard any more; it is asked from time to time", "error", err)
	}
}

// refreshes keeps up with the registry and the execution types that other replicas set.
func (e *Engine) refreshes(ctx context.Context) {
	each(ctx, askInterval, e.members.refresh, func() {
		wctx, cancel := context.WithTimeout(ctx, storeWait)
		defer cancel()
		if err := e.refresh(wctx); err != nil && ctx.Err() == nil {
			e.Logger.Warn("what is in force could not be read", "error", err)
		}
	})
}

func (e *Engine) refresh(ctx context.Context) error {
	types, err := e.Store.ExecutionTypes(ctx)
	if err != nil {
		return err
	}
	disabled := map[string]bool{}
	for name, t := range types {
		if !t.Enabled {
			disabled[name] = true
		}
	}
	e.disable(disabled)
	if e.Refresh == nil {
		return nil
	}
	return e.Refresh(ctx)
}

// Refreshed returns once what was set in the store is in force here.
func (e *Engine) Refreshed(ctx context.Context) error { return e.refresh(ctx) }

// disable has calls of these execution types fail, and of no others: those that wait, too.
func (e *Engine) disable(types map[string]bool) {
	e.members.mu.Lock()
	news := false
	for name := range types {
		if e.members.disabled[name] {
			continue
		}
		news = true
		if c := e.members.waits[name]; c != nil {
			close(c)
			delete(e.members.waits, name) // who waits from now on has a new one
		}
	}
	e.members.disabled = types
	e.members.mu.Unlock()
	if news {
		e.unparkDisabled()
	}
}

// whenDisabled gives a channel that is closed once an execution type is disabled.
func (e *Engine) whenDisabled(executionType string) <-chan struct{} {
	e.members.mu.Lock()
	defer e.members.mu.Unlock()
	if e.members.disabled[executionType] {
		c := make(chan struct{})
		close(c)
		return c
	}
	c := e.members.waits[executionType]
	if c == nil {
		c = make(chan struct{})
		e.members.waits[executionType] = c
	}
	return c
}

// errDisabled ends the wait of an attempt whose execution type was disabled.
var errDisabled = errors.New("the execution type is disabled")

// DisabledError is what an attempt of a disabled execution type fails with.
func DisabledError(executionType string) *fault.Error {
	return fault.New(fault.Disabled, "execution type %s is disabled; `specql execution-types --enable %[1]s` enables it", executionType)
}

// disabled says whether calls of an execution type fail.
func (e *Engine) disabled(executionType string) bool {
	e.members.mu.Lock()
	defer e.members.mu.Unlock()
	return e.members.disabled[executionType]
}

// maintains does what has to be done from time to time; the store sees to it that one
// orchestrator does at a time.
func (e *Engine) maintains(ctx context.Context) {
	each(ctx, maintainInterval, nil, func() {
		wctx, cancel := context.WithTimeout(ctx, maintainWait)
		defer cancel()
		if err := e.Store.Maintain(wctx, e.Retain); err != nil && ctx.Err() == nil {
			e.Logger.Warn("the database could not be maintained; it is tried again", "error", err)
		}
	})
}

// follows looks at runs that are watched here and walked elsewhere: a watcher that is behind
// reads on from the store.
func (e *Engine) follows(ctx context.Context) {
	e.hub.whileWatched(ctx, func(ids []string) { e.follow(ctx, ids) })
}

// follow looks at those of the runs that are not walked here.
func (e *Engine) follow(ctx context.Context, ids []string) {
	foreign := slices.DeleteFunc(ids, func(id string) bool { return e.running(id) != nil })
	if len(foreign) == 0 {
		return
	}
	wctx, cancel := context.WithTimeout(ctx, storeWait)
	defer cancel()
	states, err := e.Store.RunStates(wctx, foreign)
	if err != nil {
		return // the watchers' own reads tell them
	}
	for _, id := range foreign {
		s, there := states[id]
		if !there {
			s = store.RunState{Sequence: math.MaxInt64} // it is gone, which its watchers find
		}
		e.hub.behind(id, s)
	}
}

// handOver gives up a run that this orchestrator lets go of while it drains, so that another
// one goes on with it at once.
func (e *Engine) handOver(id string) {
	m := e.members
	m.mu.Lock()
	m.giveUp = append(m.giveUp, id)
	m.mu.Unlock()
	poke(m.released)
}

// releases gives up what was let go of.
func (e *Engine) releases(ctx context.Context) {
	each(ctx, workInterval, e.members.released, func() { e.release(ctx) })
}

func (e *Engine) release(ctx context.Context) {
	m := e.members
	m.mu.Lock()
	ids := m.giveUp
	m.giveUp = nil
	m.mu.Unlock()
	if len(ids) == 0 {
		return
	}
	wctx, cancel := context.WithTimeout(ctx, storeWait)
	defer cancel()
	if err := e.Store.Release(wctx, e.owner(), ids); err != nil {
		e.Logger.Warn("runs could not be handed over; they are once this orchestrator is gone", "runs", len(ids), "error", err)
	}
}

// leave ends the loops and gives up what is left.
func (e *Engine) leave(ctx context.Context) {
	e.part()
	e.loops.Wait()
	if !e.hasJoined() {
		return
	}
	wctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeWait)
	defer cancel()
	if err := e.Store.Retire(wctx, e.owner()); err != nil {
		e.Logger.Warn("this orchestrator could not say that it ends; the others see it by its silence", "error", err)
	}
}

func (e *Engine) hasJoined() bool {
	e.members.mu.Lock()
	defer e.members.mu.Unlock()
	return !e.members.beaten.IsZero()
}
