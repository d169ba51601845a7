package engine

import "sync"

// slots bounds how many runs are walked at once. Those that wait are called in order.
type slots struct {
	mu      sync.Mutex
	free    int
	waiting []func()
}

func newSlots(n int) *slots { return &slots{free: n} }

func (s *slots) tryAcquire() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.free <= 0 || len(s.waiting) > 0 {
		return false
	}
	s.free--
	return true
}

// onFree calls f with a slot taken, now or when there is one. f must not block.
func (s *slots) onFree(f func()) {
	s.mu.Lock()
	if s.free > 0 && len(s.waiting) == 0 {
		s.free--
		s.mu.Unlock()
		f()
		return
	}
	s.waiting = append(s.waiting, f)
	s.mu.Unlock()
}

func (s *slots) release() {
	s.mu.Lock()
	if len(s.waiting) == 0 {
		s.free++
		s.mu.Unlock()
		return
	}
	f := s.waiting[0]
	s.waiting[0] = nil
	s.waiting = s.waiting[1:]
	s.mu.Unlock()
	f()
}

// room is how many slots are free.
func (s *slots) room() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.waiting) > 0 {
		return 0
	}
	return s.free
}

// queued is how many wait for a slot.
func (s *slots) queued() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.waiting)
}
