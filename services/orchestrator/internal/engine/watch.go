package engine

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
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
	logs   bool
	// state and log are the sequences of the run and of its log that the watcher has read.
	state, log atomic.Int64
}

const subscriptionSize = 1024

type hub struct {
	mu     sync.Mutex
	subs   map[string]map[*subscription]struct{}
	closed bool
	// joined has a token since somebody began to watch.
	joined chan struct{}
}

func newHub() *hub {
	return &hub{subs: map[string]map[*subscription]struct{}{}, joined: make(chan struct{}, 1)}
}

func (h *hub) subscribe(id string, logs bool) *subscription {
	s := &subscription{events: make(chan *Event, subscriptionSize), lagged: make(chan struct{}), logs: logs}
	s.state.Store(math.MaxInt64) // nothing is missed before the first read
	s.log.Store(math.MaxInt64)
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
	poke(h.joined)
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

// ids are the runs that are watched.
func (h *hub) ids() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make([]string, 0, len(h.subs))
	for id := range h.subs {
		out = append(out, id)
	}
	return out
}

// whileWatched calls look with the runs that are watched, soon after the first watcher came, then less and less often, and at
// last every followInterval, until none is left, which is the last look; and again when the next one comes, until ctx ends.
func (h *hub) whileWatched(ctx context.Context, look func(ids []string)) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-h.joined:
		}
		watched := true
		for wait := firstLook; watched; wait = min(2*wait, followInterval) {
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait):
			}
			ids := h.ids()
			look(ids)
			watched = len(ids) > 0
		}
	}
}

// behind cuts off the watchers of a run that have not read its state yet.
func (h *hub) behind(id string, state store.RunState) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for s := range h.subs[id] {
		if state.Sequence > s.state.Load() || s.logs && state.LogSequence > s.log.Load() {
			s.cut()
		}
	}
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

// cursor is how far a watcher has come.
type cursor struct {
	// after is the highest sequence up to which everything was sent.
	after int64
	// run is the sequence of the state of the run that was sent last.
	run int64
}

// Watch sends what changed after a sequence, then what happens, until the run has ended or
// ctx or send does. Events come in the order of their sequences. It does not matter which
// orchestrator walks the run.
func (e *Engine) Watch(ctx context.Context, id string, after int64, logs bool, send func(*Event) error) error {
	c := &cursor{after: after, run: after}
	for {
		ended, err := e.watchOnce(ctx, id, c, logs, send)
		if ended || err != nil {
			return err
		}
		select {
		case <-e.base.Done():
			return errDraining()
		default:
		}
	}
}

func (e *Engine) watchOnce(ctx context.Context, id string, c *cursor, logs bool, send func(*Event) error) (ended bool, err error) {
	sub := e.hub.subscribe(id, logs)
	defer e.hub.unsubscribe(id, sub)
	// What was published before the subscription is in the store once the logs are written.
	if logs && e.running(id) != nil {
		if err := e.Journal.Flush(ctx); err != nil {
			return false, fmt.Errorf("wait for the log: %w", err)
		}
	}
	run, err := e.catchUp(ctx, id, c, logs, send)
	if err != nil || run.Status.Final() {
		return err == nil, err
	}
	sub.state.Store(run.Sequence)
	sub.log.Store(c.after)
	for {
		select {
		case ev := <-sub.events:
			// The state of the run is sent even when the store was ahead of it already.
			if (ev.Sequence <= c.after && ev.Run == nil) || (ev.Log != nil && !logs) {
				continue
			}
			if err := send(ev); err != nil {
				return false, err
			}
			c.after = max(c.after, ev.Sequence)
			if ev.Log == nil {
				sub.state.Store(c.after)
			}
			sub.log.Store(c.after)
			if ev.Run != nil {
				c.run = max(c.run, ev.Sequence)
				if ev.Run.Status.Final() {
					return true, nil
				}
			}
		case <-sub.lagged:
			return false, nil
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
	}
}

// catchUp sends the state that changed since the cursor, read from the store. What the store
// has up to some sequence is complete: a run's records and lines become durable in the order
// of their sequences. What changes during the reads comes after.
func (e *Engine) catchUp(ctx context.Context, id string, c *cursor, logs bool, send func(*Event) error) (*store.Run, error) {
	run, err := e.Store.Run(ctx, id)
	if err != nil {
		return nil, err
	}
	states, err := e.Store.RunStates(ctx, []string{id})
	if err != nil {
		return nil, fmt.Errorf("read the state of run %s: %w", id, err)
	}
	upTo := max(run.Sequence, states[id].Sequence)
	if logs {
		upTo = max(upTo, states[id].LogSequence)
	}
	jobs, err := e.Store.Jobs(ctx, id, c.after)
	if err != nil {
		return nil, fmt.Errorf("read the jobs of run %s: %w", id, err)
	}
	var events []*Event
	for _, j := range jobs {
		if j.Sequence <= upTo {
			events = append(events, &Event{Sequence: j.Sequence, Time: jobTime(j), Job: j})
		}
	}
	slices.SortStableFunc(events, func(a, b *Event) int { return cmp.Compare(a.Sequence, b.Sequence) })
	last := c.after
	emit := func(ev *Event) error {
		last = max(last, ev.Sequence)
		return send(ev)
	}
	// Log lines come in pages, merged with the jobs by sequence.
	for page := c.after; logs && page < upTo; {
		lines, err := e.Store.Logs(ctx, id, page, 1000)
		if err != nil {
			return nil, fmt.Errorf("read the log of run %s: %w", id, err)
		}
		for _, l := range lines {
			page = l.Sequence
			if l.Sequence > upTo {
				break
			}
			for len(events) > 0 && events[0].Sequence < l.Sequence {
				if err := emit(events[0]); err != nil {
					return nil, err
				}
				events = events[1:]
			}
			if err := emit(&Event{Sequence: l.Sequence, Time: l.Time, Log: l}); err != nil {
				return nil, err
			}
		}
		if len(lines) < 1000 {
			break
		}
	}
	for _, ev := range events {
		if err := emit(ev); err != nil {
			return nil, err
		}
	}
	if c.run == 0 || run.Sequence > c.run || run.Status.Final() {
		if err := emit(&Event{Sequence: max(last, run.Sequence), Time: runTime(run), Run: run}); err != nil {
			return nil, err
		}
		c.run = max(c.run, run.Sequence)
	}
	c.after = max(c.after, upTo)
	return run, nil
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
