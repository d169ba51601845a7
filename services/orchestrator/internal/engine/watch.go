package engine

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// Event is one change of a run. One of Run, Job and Log is set; they are copies.
type Event struct {
	Sequence int64
	Time     time.Time
	Run      *store.Run
	Job      *store.Job
	Log      *store.LogLine
}

// subscription is a bounded queue of events. One that falls behind is cut off and its
// watcher reads what it missed from the store.
type subscription struct {
	events chan *Event
	lagged chan struct{}
	once   sync.Once
}

const subscriptionSize = 1024

type hub struct {
	mu     sync.Mutex
	subs   map[string]map[*subscription]struct{}
	closed bool
}

func newHub() *hub { return &hub{subs: map[string]map[*subscription]struct{}{}} }

func (h *hub) subscribe(id string) *subscription {
	s := &subscription{events: make(chan *Event, subscriptionSize), lagged: make(chan struct{})}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		s.cut()
		return s
	}
	if h.subs[id] == nil {
		h.subs[id] = map[*subscription]struct{}{}
	}
	h.subs[id][s] = struct{}{}
	return s
}

func (h *hub) unsubscribe(id string, s *subscription) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.subs[id], s)
	if len(h.subs[id]) == 0 {
		delete(h.subs, id)
	}
}

func (s *subscription) cut() { s.once.Do(func() { close(s.lagged) }) }

func (h *hub) watched(id string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.subs[id]) > 0
}

func (h *hub) publish(id string, events ...*Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for s := range h.subs[id] {
		for _, ev := range events {
			select {
			case s.events <- ev:
			default:
				s.cut()
			}
		}
	}
}

func (h *hub) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for _, subs := range h.subs {
		for s := range subs {
			s.cut()
		}
	}
}

// Watch sends what changed after a sequence, then what happens, until the run has ended or
// ctx or send does. Events come in the order of their sequences.
func (e *Engine) Watch(ctx context.Context, id string, after int64, logs bool, send func(*Event) error) error {
	for {
		ended, last, err := e.watchOnce(ctx, id, after, logs, send)
		if ended || err != nil {
			return err
		}
		after = last
		select {
		case <-e.base.Done():
			return errDraining()
		default:
		}
	}
}

func (e *Engine) watchOnce(ctx context.Context, id string, after int64, logs bool, send func(*Event) error) (ended bool, last int64, err error) {
	sub := e.hub.subscribe(id)
	defer e.hub.unsubscribe(id, sub)
	// What was published before the subscription is in the store once the logs are written.
	if logs {
		if err := e.Journal.Flush(ctx); err != nil {
			return false, after, fmt.Errorf("wait for the log: %w", err)
		}
	}
	run, last, err := e.catchUp(ctx, id, after, logs, send)
	if err != nil || run.Status.Final() {
		return err == nil, last, err
	}
	for {
		select {
		case ev := <-sub.events:
			// The state of the run is sent even when the store was ahead of it already.
			if (ev.Sequence <= last && ev.Run == nil) || (ev.Log != nil && !logs) {
				continue
			}
			if err := send(ev); err != nil {
				return false, last, err
			}
			last = max(last, ev.Sequence)
			if ev.Run != nil && ev.Run.Status.Final() {
				return true, last, nil
			}
		case <-sub.lagged:
			return false, last, nil
		case <-ctx.Done():
			return false, last, context.Cause(ctx)
		}
	}
}

// catchUp sends the state that changed after a sequence, read from the store.
func (e *Engine) catchUp(ctx context.Context, id string, after int64, logs bool, send func(*Event) error) (*store.Run, int64, error) {
	run, err := e.Store.Run(ctx, id)
	if err != nil {
		return nil, after, err
	}
	jobs, err := e.Store.Jobs(ctx, id, after)
	if err != nil {
		return nil, after, fmt.Errorf("read the jobs of run %s: %w", id, err)
	}
	var events []*Event
	for _, j := range jobs {
		events = append(events, &Event{Sequence: j.Sequence, Time: jobTime(j), Job: j})
	}
	last := after
	emit := func(ev *Event) error {
		last = max(last, ev.Sequence)
		return send(ev)
	}
	// Log lines come in pages, merged with the jobs by sequence.
	for page := after; logs; {
		lines, err := e.Store.Logs(ctx, id, page, 1000)
		if err != nil {
			return nil, after, fmt.Errorf("read the log of run %s: %w", id, err)
		}
		for _, l := range lines {
			for len(events) > 0 && events[0].Sequence < l.Sequence {
				if err := emit(events[0]); err != nil {
					return nil, last, err
				}
				events = events[1:]
			}
			if err := emit(&Event{Sequence: l.Sequence, Time: l.Time, Log: l}); err != nil {
				return nil, last, err
			}
			page = l.Sequence
		}
		if len(lines) < 1000 {
			break
		}
	}
	for _, ev := range events {
		if err := emit(ev); err != nil {
			return nil, last, err
		}
	}
	if after == 0 || run.Sequence > after || run.Status.Final() {
		ev := &Event{Sequence: max(last, run.Sequence), Time: runTime(run), Run: run}
		if err := emit(ev); err != nil {
			return nil, last, err
		}
	}
	return run, last, nil
}

func jobTime(j *store.Job) time.Time {
	switch {
	case !j.CompletedAt.IsZero():
		return j.CompletedAt
	case !j.StartedAt.IsZero():
		return j.StartedAt
	}
	return j.CreatedAt
}

func runTime(r *store.Run) time.Time {
	switch {
	case !r.CompletedAt.IsZero():
		return r.CompletedAt
	case !r.StartedAt.IsZero():
		return r.StartedAt
	}
	return r.CreatedAt
}
