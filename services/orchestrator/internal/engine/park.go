package engine

import (
	"context"
	"time"
)

// parking is a run that sleeps for long. Its walk has ended: replay brings the run back to where it sleeps. So it costs a
// few hundred bytes, where a walk costs goroutines, contexts and all that the run has seen.
type parking struct {
	timer *time.Timer // nil for one that only a signal wakes
	// signal is the highest id of a signal that the walk has seen; those it does not wait for do not wake it again.
	signal int64
	// retries is the execution type of the attempt that the run sleeps before; empty for another sleep.
	retries string
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
	p := &parking{retries: r.retries}
	for _, s := range r.signals {
		p.signal = max(p.signal, s.ID)
	}
	if !r.wakeAt.IsZero() {
		id := r.id
		p.timer = time.AfterFunc(r.wakeAt.Sub(e.Clock.Now()), func() { e.unpark(id, 0) })
	}
	e.parked[r.id] = p
	return false
}

// unpark walks a parked run again. signal is the id of one that has come, 0 for none.
func (e *Engine) unpark(id string, signal int64) {
	e.mu.Lock()
	p := e.parked[id]
	wakes := p != nil && (signal == 0 || signal > p.signal)
	if wakes {
		e.dropParked(id)
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
	for id, p := range e.parked {
		if p.retries != "" && e.disabled(p.retries) {
			ids = append(ids, id)
		}
	}
	e.mu.Unlock()
	for _, id := range ids {
		e.unpark(id, 0)
	}
}

// dropParked forgets a parked run. e.mu is held.
func (e *Engine) dropParked(id string) {
	if p := e.parked[id]; p != nil {
		if p.timer != nil {
			p.timer.Stop()
		}
		delete(e.parked, id)
	}
}

func (e *Engine) isParked(id string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.parked[id] != nil
}
