// Package quota holds the lines of attempts that wait for a slot of a limit. The database gives the slots
// (store.Take); a line sees to it that attempts of one orchestrator ask in their order, one for each slot
// that may be free, and not all of them at once.
package quota

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

const (
	// askWhileFull is how long after a refusal the next one asks that holds for as long as attempts run
	// whose end nobody knows.
	askWhileFull = 200 * time.Millisecond
	// longestPause is how long the first of a line waits at most before it asks again, since slots may be given back.
	longestPause = 30 * time.Second
)

// Lines are the lines of one orchestrator, by the key of the limit.
type Lines struct {
	mu    sync.Mutex
	lines map[string]*line
}

type line struct {
	places []*Place // in the order of their tickets
	last   uint64   // the ticket of who came last
	// timer lets the first one ask when there may be room; nil for none.
	timer *time.Timer
	at    time.Time
}

// Place is one attempt's place in a line.
type Place struct {
	lines  *Lines
	key    string
	ticket uint64
	// turn has a token while the attempt may ask.
	turn   chan struct{}
	asking bool
}

// Waits says whether anybody waits in a line.
func (l *Lines) Waits(key string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lines[key] != nil
}

// Join takes a place at the end of a line. The first in a line has to be told by Refused when to ask.
func (l *Lines) Join(key string) *Place {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lines == nil {
		l.lines = map[string]*line{}
	}
	q := l.lines[key]
	if q == nil {
		q = &line{}
		l.lines[key] = q
	}
	q.last++
	p := &Place{lines: l, key: key, ticket: q.last, turn: make(chan struct{}, 1)}
	q.places = append(q.places, p)
	return p
}

// find is the index of a place; false where it has left.
func (q *line) find(p *Place) (int, bool) {
	i, ok := slices.BinarySearchFunc(q.places, p.ticket, func(other *Place, ticket uint64) int { return cmp.Compare(other.ticket, ticket) })
	return i, ok && q.places[i] == p
}

// Turn has a token when the attempt is to ask for its slot.
func (p *Place) Turn() <-chan struct{} { return p.turn }

// Ahead is how many are before it.
func (p *Place) Ahead() int {
	p.lines.mu.Lock()
	defer p.lines.mu.Unlock()
	i, _ := p.lines.lines[p.key].find(p)
	return i
}

// Refused says that there was no room, and when there may be some; zero where nobody knows. The place stays.
func (p *Place) Refused(wait time.Duration) {
	p.lines.mu.Lock()
	defer p.lines.mu.Unlock()
	p.asking = false
	q := p.lines.lines[p.key]
	if wait <= 0 {
		wait = askWhileFull
	}
	q.pause(p.lines, wait)
}

// Leave gives the place up, and lets as many others ask as there is room for; one at least, which finds out.
func (p *Place) Leave(free int64) {
	l := p.lines
	l.mu.Lock()
	defer l.mu.Unlock()
	q := l.lines[p.key]
	if q == nil {
		return
	}
	i, ok := q.find(p)
	if !ok {
		return // it has left already
	}
	q.places = slices.Delete(q.places, i, i+1)
	if len(q.places) == 0 {
		if q.timer != nil {
			q.timer.Stop()
		}
		delete(l.lines, p.key)
		return
	}
	q.call(max(free, 1))
}

// call lets the first n that do not ask yet ask.
func (q *line) call(n int64) {
	for _, p := range q.places {
		if n <= 0 {
			return
		}
		if !p.asking {
			p.asking = true
			p.turn <- struct{}{} // it was taken before asking ended
			n--
		}
	}
}

// pause lets the first one ask after a time. A sooner one that is set stays.
func (q *line) pause(l *Lines, d time.Duration) {
	d = min(d, longestPause)
	d += time.Duration(rand.Float64() * float64(min(d/50, 100*time.Millisecond))) //nolint:gosec // so that several orchestrators do not ask at once
	at := time.Now().Add(d)
	if q.timer != nil && q.at.After(time.Now()) && q.at.Before(at) {
		return
	}
	if q.timer != nil {
		q.timer.Stop()
	}
	q.at = at
	q.timer = time.AfterFunc(d, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, p := range q.places {
			if p.asking {
				return // its answer says what follows
			}
		}
		q.call(1)
	})
}
