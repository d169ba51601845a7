package engine

import (
	"container/heap"
	"context"
	"math"
	"slices"
	"time"

	"github.com/google/uuid"
)

// parking is a run that sleeps for long. Its walk has ended: replay brings the run back to where it sleeps. So it costs some
// dozens of bytes, where a walk costs goroutines, contexts and all that the run has seen. There is no pointer in it: the garbage
// collector does not look at those who sleep.
type parking struct {
	// due is when it wakes, since the engine began; forever for one that only a signal wakes.
	due time.Duration
	// signal is the highest id of a signal that the walk has seen; those it does not wait for do not wake it again.
	signal int64
}

const forever = time.Duration(math.MaxInt64)

// parkedRuns are the runs that sleep for long. The engine's lock guards them.
type parkedRuns struct {
	began time.Time
	runs  map[uuid.UUID]parking
	// retries are the execution types of the attempts that runs sleep before.
	retries map[uuid.UUID]string
	wakes   wakes
	// timer calls wake when the first is due.
	timer *time.Timer
	wake  func()
}

func newParkedRuns(wake func()) *parkedRuns {
	return &parkedRuns{began: time.Now(), runs: map[uuid.UUID]parking{}, retries: map[uuid.UUID]string{}, wake: wake}
}

// wake is one that is due. Those whose run has gone, or sleeps until another time, are left where they are until then.
type wake struct {
	due time.Duration
	id  uuid.UUID
}

// wakes is a heap: the next one is first.
type wakes []wake

func (w wakes) Len() int           { return len(w) }
func (w wakes) Less(i, j int) bool { return w[i].due < w[j].due }
func (w wakes) Swap(i, j int)      { w[i], w[j] = w[j], w[i] }

// Push implements [heap.Interface].
func (w *wakes) Push(x any) { *w = append(*w, x.(wake)) }

// Pop implements [heap.Interface].
func (w *wakes) Pop() any {
	last := len(*w) - 1
	x := (*w)[last]
	*w = (*w)[:last]
	return x
}

// add parks a run for so long, or for ever.
func (p *parkedRuns) add(id uuid.UUID, sleep time.Duration, signal int64, retries string) {
	k := parking{due: forever, signal: signal}
	if now := time.Since(p.began); sleep < forever-now {
		k.due = now + max(sleep, 0)
		heap.Push(&p.wakes, wake{k.due, id})
		p.trim()
		if p.wakes[0].id == id {
			p.reset()
		}
	}
	p.runs[id] = k
	if retries != "" {
		p.retries[id] = retries
	}
}

// trim drops wakes of runs that sleep no more, once they are most of all.
func (p *parkedRuns) trim() {
	const few = 1000
	if len(p.wakes) < few || len(p.wakes) < 2*len(p.runs) {
		return
	}
	p.wakes = slices.DeleteFunc(p.wakes, func(w wake) bool { k, ok := p.runs[w.id]; return ok && k.due != w.due || !ok })
	heap.Init(&p.wakes)
}

// reset sets the timer to the first that is due.
func (p *parkedRuns) reset() {
	if len(p.wakes) == 0 {
		return
	}
	sleep := max(p.wakes[0].due-time.Since(p.began), 0)
	if p.timer == nil {
		p.timer = time.AfterFunc(sleep, p.wake)
		return
	}
	p.timer.Reset(sleep)
}

// due takes away the runs whose time has come.
func (p *parkedRuns) due() (ids []string) {
	now := time.Since(p.began)
	for len(p.wakes) > 0 && p.wakes[0].due <= now {
		w := heap.Pop(&p.wakes).(wake)
		if k, ok := p.runs[w.id]; ok && k.due == w.due {
			ids = append(ids, w.id.String())
			p.drop(w.id)
		}
	}
	p.reset()
	return ids
}

func (p *parkedRuns) drop(id uuid.UUID) {
	delete(p.runs, id)
	delete(p.retries, id)
}

// clear takes all runs away, and gives their ids.
func (p *parkedRuns) clear() []string {
	ids := make([]string, 0, len(p.runs))
	for id := range p.runs {
		ids = append(ids, id.String())
	}
	clear(p.runs)
	clear(p.retries)
	p.wakes = nil
	if p.timer != nil {
		p.timer.Stop()
	}
	return ids
}

// mayPark tells whether a run that sleeps until a time, a zero one for ever, is parked, and has its walk end for that. Everything
// the walk has to say is durable by then. executionType is that of the attempt that it sleeps before, if it does.
func (r *run) mayPark(ctx context.Context, until time.Time, executionType string) bool {
	after := r.e.ParkAfter
	if after <= 0 || !until.IsZero() && until.Sub(r.e.Clock.Now()) < after {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case uuid.Validate(r.id) != nil: // the key of those who sleep
	case ctx.Err() != nil || r.e.drain.Err() != nil || r.lost != nil || r.fatal != nil || r.asked:
	case r.forks > 0 || r.live != 1 || r.asleep != 1:
	case r.next.dirty || r.inflight != nil || r.pumping || len(r.out) > 0:
	default:
		r.parks, r.wakeAt, r.retries = true, until, executionType
	}
	return r.parks
}

// park parks a run whose walk has ended for that, or tells that it has to be walked again at once. e.mu is held.
func (e *Engine) park(r *run) (again bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.parks || r.lost != nil {
		return false
	}
	r.left = true
	switch {
	case e.draining:
		e.handOver(r.id)
		return false
	case r.asked, r.retries != "" && e.disabled(r.retries):
		return true
	}
	id, err := uuid.Parse(r.id)
	if err != nil {
		return true // mayPark has looked
	}
	var signal int64
	for _, s := range r.signals {
		signal = max(signal, s.ID)
	}
	sleep := forever
	if !r.wakeAt.IsZero() {
		sleep = r.wakeAt.Sub(e.Clock.Now())
	}
	e.parked.add(id, sleep, signal, r.retries)
	return false
}

// wakeDue walks the parked runs again whose time has come.
func (e *Engine) wakeDue() {
	e.mu.Lock()
	ids := e.parked.due()
	e.mu.Unlock()
	for _, id := range ids {
		e.resume(id)
	}
}

// unpark walks a parked run again. signal is the id of one that has come, 0 for none.
func (e *Engine) unpark(id string, signal int64) {
	key, err := uuid.Parse(id)
	if err != nil {
		return
	}
	e.mu.Lock()
	k, wakes := e.parked.runs[key]
	if wakes = wakes && (signal == 0 || signal > k.signal); wakes {
		e.parked.drop(key)
	}
	e.mu.Unlock()
	if wakes {
		e.resume(id)
	}
}

// unparkDisabled walks the parked runs again whose next attempt is of a disabled execution type: it fails at once.
func (e *Engine) unparkDisabled() {
	var ids []string
	e.mu.Lock()
	for id, executionType := range e.parked.retries {
		if e.disabled(executionType) {
			ids = append(ids, id.String())
		}
	}
	e.mu.Unlock()
	for _, id := range ids {
		e.unpark(id, 0)
	}
}

// dropParked forgets a parked run. e.mu is held.
func (e *Engine) dropParked(id string) {
	if key, err := uuid.Parse(id); err == nil {
		e.parked.drop(key)
	}
}

func (e *Engine) isParked(id string) bool {
	key, err := uuid.Parse(id)
	if err != nil {
		return false
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	_, parked := e.parked.runs[key]
	return parked
}
