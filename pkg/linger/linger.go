// Package linger finds what lasts longer than most: one timer watches all of it, so that what is over soon, which
// is nearly all, costs no timer of its own.
package linger

import (
	"slices"
	"sync"
	"time"
)

// Queue calls a function for each value, on a goroutine of its own, a time after it was added and at most a quarter of that later: where
// many are added, it looks a few times within that time, and not once for each of them. It is for
// the function to see whether that is of interest still.
type Queue[T any] struct {
	after time.Duration
	call  func(T)

	mu   sync.Mutex
	list []item[T] // the oldest first
	next *time.Timer
	// spare is the room of a list that was given away.
	spare []item[T]
}

type item[T any] struct {
	value T
	due   time.Time
}

// New makes a queue.
func New[T any](after time.Duration, call func(T)) *Queue[T] {
	return &Queue[T]{after: after, call: call}
}

// Add adds a value at a time, which is now.
func (q *Queue[T]) Add(now time.Time, value T) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.list = append(q.list, item[T]{value, now.Add(q.after)})
	if len(q.list) == 1 {
		q.wait(q.after)
	}
}

// wait sweeps after a time. q.mu is held.
func (q *Queue[T]) wait(d time.Duration) {
	if q.next == nil {
		q.next = time.AfterFunc(d, q.sweep)
		return
	}
	q.next.Reset(d)
}

// sweep calls for what is due. Whoever adds to an empty queue starts it again.
func (q *Queue[T]) sweep() {
	q.mu.Lock()
	now := time.Now()
	n := 0
	for n < len(q.list) && !q.list[n].due.After(now) {
		n++
	}
	due := append(q.spare[:0], q.list[:n]...)
	q.spare = nil
	q.list = slices.Delete(q.list, 0, n) // what goes is cleared
	if len(q.list) > 0 {
		q.wait(max(q.list[0].due.Sub(now), q.after/4))
	}
	q.mu.Unlock()
	for _, d := range due {
		q.call(d.value)
	}
	clear(due)
	q.mu.Lock()
	q.spare = due[:0]
	q.mu.Unlock()
}
