package runner

import (
	"sync"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
)

// feed holds what a job said until every subscriber has read it. With no subscriber it
// holds everything: the sink bounds how much a job can say.
type feed struct {
	mu    sync.Mutex
	first int64 // number of events[0]
	// events are the log lines not yet read by all.
	events []*runnerv1.ExecuteResponse
	bytes  int
	// usage is the latest measurement alone; the older ones tell nothing more.
	usage   *runnerv1.ExecuteResponse
	usageAt int64
	final   *runnerv1.ExecuteResponse
	subs    map[*subscriber]struct{}
}

// subscriber is one stream that follows a job.
type subscriber struct {
	next    int64
	usageAt int64
	wake    chan struct{} // holds a token when there is something new
	renewed bool          // a renewal is to be answered
	refused error         // why the stream must end, once set
}

func (f *feed) subscribe() *subscriber {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.subs == nil {
		f.subs = map[*subscriber]struct{}{}
	}
	s := &subscriber{next: f.first, wake: make(chan struct{}, 1)}
	f.subs[s] = struct{}{}
	s.wake <- struct{}{}
	return s
}

// unsubscribe tells whether no subscriber is left.
func (f *feed) unsubscribe(s *subscriber) (last bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.subs, s)
	return len(f.subs) == 0
}

// refuse ends all streams that follow now.
func (f *feed) refuse(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for s := range f.subs {
		s.refused = err
		delete(f.subs, s)
		s.notify()
	}
}

// refuseOne ends one stream.
func (f *feed) refuseOne(s *subscriber, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s.refused == nil {
		s.refused = err
	}
	s.notify()
}

// follows tells whether s may still steer the job.
func (f *feed) follows(s *subscriber) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return s.refused == nil
}

// renewed answers a renewal.
func (f *feed) renewed(s *subscriber) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s.renewed = true
	s.notify()
}

func (f *feed) log(l *runnerv1.Log) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.events = append(f.events, &runnerv1.ExecuteResponse{Event: &runnerv1.ExecuteResponse_Log{Log: l}})
	f.bytes += len(l.GetText())
	f.notifyAll()
}

func (f *feed) measured(u *runnerv1.ResourceUsage) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.usage = &runnerv1.ExecuteResponse{Event: &runnerv1.ExecuteResponse_Usage{Usage: u}}
	f.usageAt++
	f.notifyAll()
}

func (f *feed) finish(fin *runnerv1.Finished) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.final = &runnerv1.ExecuteResponse{Event: &runnerv1.ExecuteResponse_Finished{Finished: fin}}
	f.notifyAll()
}

// take gives what s has not read yet. end is set when final is among it.
func (f *feed) take(s *subscriber) (events []*runnerv1.ExecuteResponse, end bool, refused error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s.refused != nil {
		return nil, true, s.refused
	}
	if s.renewed {
		s.renewed = false
		events = append(events, &runnerv1.ExecuteResponse{Event: &runnerv1.ExecuteResponse_Renewed{Renewed: &runnerv1.Renewed{}}})
	}
	from := min(int(s.next-f.first), len(f.events))
	events = append(events, f.events[from:]...)
	s.next = f.first + int64(len(f.events))
	if f.usage != nil && s.usageAt < f.usageAt {
		s.usageAt = f.usageAt
		events = append(events, f.usage)
	}
	if f.final != nil {
		events, end = append(events, f.final), true
	}
	f.trim()
	return events, end, nil
}

// trim drops the events that every subscriber has read.
func (f *feed) trim() {
	read := f.first + int64(len(f.events))
	for s := range f.subs {
		read = min(read, s.next)
	}
	n := int(read - f.first)
	for i := range n {
		f.bytes -= len(f.events[i].GetLog().GetText())
	}
	clear(f.events[:n])
	f.events, f.first = f.events[n:], read
	if len(f.events) == 0 {
		f.events = nil
	}
}

// size is roughly what the feed holds, in bytes.
func (f *feed) size() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	const overhead = 200
	return f.bytes + overhead*(len(f.events)+1) + len(f.final.GetFinished().GetOutput())
}

func (f *feed) notifyAll() {
	for s := range f.subs {
		s.notify()
	}
}

func (s *subscriber) notify() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}
