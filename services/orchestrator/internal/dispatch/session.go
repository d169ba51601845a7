package dispatch

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/runner/wire"
)

const (
	// mostIdle is how many streams of an execution type wait for a job.
	mostIdle = 512
	// idleFor is how long a stream waits for one.
	idleFor = 10 * time.Second
	// longestSession is about how old a stream gets: then another one takes its place, which may go to a replica that
	// joined since. With the time until its address is seen, a new replica has its share within 20 s; to open a stream
	// costs about what four jobs on one do.
	longestSession = 6 * time.Second
	// farewell is how long a runner may take to end a stream that has no more jobs.
	farewell = 5 * time.Second
)

// session is a stream to one replica. It carries one job after the other: to open a stream costs both sides several
// times what a job's messages do. No two jobs share one at a time, so that each has its own flow control, and
// what breaks a stream fails one job.
type session struct {
	in     *sessions
	stream grpc.BidiStreamingClient[runnerv1.ExecuteRequest, runnerv1.ExecuteResponse]
	ctx    context.Context
	cancel context.CancelCauseFunc
	until  time.Time // it is given no job after that
	idle   time.Time // since when it waits

	sending sync.Mutex // Send is not safe for concurrent use
	mu      sync.Mutex
	turn    *turn // of the job that has the stream; nil for none
}

// open opens the stream where it is new. It waits for a connection.
func (s *session) open() (err error) {
	if s.stream == nil {
		s.stream, err = s.in.client.Execute(s.ctx, grpc.WaitForReady(true), grpc.ForceCodecV2(wire.Codec()))
	}
	return err
}

// turn is the use of a session by one job. What comes too late, when another job has the stream, does nothing.
type turn struct {
	s    *session
	over chan struct{} // closed at its end
}

func (s *session) begin() *turn {
	t := &turn{s: s, over: make(chan struct{})}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.turn = t
	return t
}

var errOver = errors.New("another job has the stream by now")

func (t *turn) send(m *runnerv1.ExecuteRequest) error {
	t.s.sending.Lock()
	defer t.s.sending.Unlock()
	t.s.mu.Lock()
	mine := t.s.turn == t
	t.s.mu.Unlock()
	if !mine {
		return errOver
	}
	return t.s.stream.Send(m)
}

// stop breaks the stream.
func (t *turn) stop(cause error) {
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	if t.s.turn == t {
		t.s.cancel(cause)
	}
}

// end gives the stream back where another job may follow on it, and breaks it otherwise.
func (t *turn) end(again bool) {
	s := t.s
	close(t.over)
	// One whose last words still wait to be sent is not given to another job: they would be taken for that one's.
	again = again && s.sending.TryLock()
	s.mu.Lock()
	s.turn = nil
	s.mu.Unlock()
	if !again {
		s.cancel(nil)
		return
	}
	s.sending.Unlock()
	s.in.put(s)
}

// finish ends a session in good order.
func (s *session) finish() {
	if s.ctx.Err() != nil || s.stream.CloseSend() != nil {
		s.cancel(nil)
		return
	}
	timer := time.AfterFunc(farewell, func() { s.cancel(nil) })
	go func() {
		for {
			if _, err := s.stream.Recv(); err != nil {
				timer.Stop()
				s.cancel(nil)
				return
			}
		}
	}()
}

// sessions are the streams of an execution type that wait for a job.
type sessions struct {
	client runnerv1.RunnerServiceClient

	mu     sync.Mutex
	idle   []*session // the one that has waited longest is first
	sweep  *time.Timer
	closed bool
}

// take gives the stream that has waited longest, so that all replicas get work, or a new one, which is not opened yet. One
// for a single job carries the headers of ctx.
func (p *sessions) take(ctx context.Context, single bool) (s *session, reused bool) {
	base := context.Background()
	if single {
		base = context.WithoutCancel(ctx)
	} else if s := p.waiting(); s != nil {
		return s, true
	}
	life := time.Duration(float64(longestSession) * (0.75 + 0.5*rand.Float64())) //nolint:gosec // jitter
	s = &session{in: p, until: time.Now().Add(life)}
	s.ctx, s.cancel = context.WithCancelCause(base)
	return s, false
}

func (p *sessions) waiting() *session {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.idle) > 0 {
		s := p.idle[0]
		p.idle[0] = nil
		p.idle = p.idle[1:]
		if s.ctx.Err() == nil && time.Now().Before(s.until) {
			return s
		}
		s.finish()
	}
	return nil
}

func (p *sessions) put(s *session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s.idle = time.Now()
	switch {
	case p.closed:
		s.cancel(nil)
		return
	case s.ctx.Err() != nil || len(p.idle) >= mostIdle || s.idle.After(s.until):
		s.finish()
		return
	}
	p.idle = append(p.idle, s)
	if p.sweep == nil {
		p.sweep = time.AfterFunc(idleFor, p.prune)
	}
}

// prune ends the streams that have waited too long.
func (p *sessions) prune() {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for n < len(p.idle) && time.Since(p.idle[n].idle) >= idleFor {
		p.idle[n].finish()
		p.idle[n] = nil
		n++
	}
	if p.idle = p.idle[n:]; len(p.idle) == 0 {
		p.sweep = nil
		return
	}
	p.sweep.Reset(idleFor - time.Since(p.idle[0].idle) + time.Millisecond)
}

func (p *sessions) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	if p.sweep != nil {
		p.sweep.Stop()
	}
	for _, s := range p.idle {
		s.cancel(nil)
	}
	p.idle = nil
}
