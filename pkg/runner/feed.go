package runner

import (
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

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
	subs    []*subscriber
}

// subscriber is one stream that follows a job.
type subscriber struct {
	// started is what the stream is told first.
	started *runnerv1.ExecuteResponse
	next    int64
	usageAt int64
	wake    chan struct{} // holds a token when there is something new
	// quiet: there is none for events that can wait, until the job is released. since is when that began.
	quiet bool
	since time.Time
	// batch: several events may go into one message. The stream's worker sets it before others see the subscriber.
	batch   bool
	renewed bool  // a renewal is to be answered
	refused error // why the stream must end, once set
	ended   bool  // it has the job's end
}

func (f *feed) subscribe(wake chan struct{}, quiet bool, now time.Time) *subscriber {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := &subscriber{next: f.first, wake: wake, quiet: quiet}
	if quiet {
		s.since = now
	}
	f.subs = append(f.subs, s)
	return s
}

// greet sets what the stream is told first.
func (f *feed) greet(s *subscriber, started *runnerv1.ExecuteResponse) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s.started = started
}

// release has a quiet stream told what there is.
func (f *feed) release(s *subscriber) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s.quiet = false
	s.notify()
}

// unsubscribe tells whether no subscriber is left.
func (f *feed) unsubscribe(s *subscriber) (last bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.subs = slices.DeleteFunc(f.subs, func(other *subscriber) bool { return other == s })
	return len(f.subs) == 0
}

// refuse ends all streams that follow now.
func (f *feed) refuse(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.subs {
		s.refused = err
		s.notify()
	}
	f.subs = nil
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

func (f *feed) log(l *runnerv1.ExecuteResponse) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.events = append(f.events, l)
	f.bytes += len(l.GetLog().GetText())
	f.notifyAll()
}

func (f *feed) measured(u *runnerv1.ResourceUsage) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.usage = &runnerv1.ExecuteResponse{Event: &runnerv1.ExecuteResponse_Usage{Usage: u}}
	f.usageAt++
	f.notifyAll()
}

func (f *feed) finish(final *runnerv1.ExecuteResponse) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.final = final
	f.notifyAll()
}

// take gives what s has not read yet. end is set when final is among it.
func (f *feed) take(s *subscriber) (events []*runnerv1.ExecuteResponse, end bool, refused error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case s.refused != nil:
		return nil, true, s.refused
	case s.ended:
		return nil, true, nil
	}
	from := min(int(s.next-f.first), len(f.events))
	events = make([]*runnerv1.ExecuteResponse, 0, len(f.events)-from+4) // the one of each other kind
	if s.started != nil {
		if !s.since.IsZero() {
			s.started.GetStarted().Held = durationpb.New(time.Since(s.since))
		}
		events = append(events, s.started)
		s.started = nil
	}
	if s.renewed {
		s.renewed = false
		events = append(events, &runnerv1.ExecuteResponse{Event: &runnerv1.ExecuteResponse_Renewed{Renewed: &runnerv1.Renewed{}}})
	}
	events = append(events, f.events[from:]...)
	s.next = f.first + int64(len(f.events))
	if f.usage != nil && s.usageAt < f.usageAt {
		s.usageAt = f.usageAt
		events = append(events, f.usage)
	}
	if f.final != nil {
		events, end, s.ended = append(events, f.final), true, true
	}
	f.trim()
	return events, end, nil
}

// trim drops the events that every subscriber has read.
func (f *feed) trim() {
	read := f.first + int64(len(f.events))
	for _, s := range f.subs {
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
	for _, s := range f.subs {
		if !s.quiet {
			s.notify()
		}
	}
}

func (s *subscriber) notify() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}
