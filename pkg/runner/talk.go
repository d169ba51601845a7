package runner

import (
	"cmp"
	"errors"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel/propagation"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/telemetry"
)

const (
	// quietFor is how long the events of a job may wait for its end, where its start allows it: most jobs
	// are over by then, and are told of in one message.
	quietFor = 10 * time.Millisecond
	// mostBatched is about how many bytes of events go into one message.
	mostBatched = 256 << 10
)

// Execute implements RunnerService.
func (h *Handler) Execute(stream grpc.BidiStreamingServer[runnerv1.ExecuteRequest, runnerv1.ExecuteResponse]) error {
	t := &talk{h: h, stream: stream, wake: make(chan struct{}, 1), done: make(chan struct{}), busy: true}
	go func() { t.work(t.first()) }()
	return t.attend()
}

// talk is one stream: one job, or one after the other.
//
// The worker reads a start, runs the job and tells its end, all on one goroutine, so that a quick job wakes no
// other. A job that takes longer is released: from then on the attendant tells what happens to it, and a third
// goroutine reads commands, until it reads the next start and is the worker. The attendant is the stream's
// handler: it ends the stream when it must, while the job may go on.
type talk struct {
	h      *Handler
	stream grpc.BidiStreamingServer[runnerv1.ExecuteRequest, runnerv1.ExecuteResponse]
	// wake is the attendant's.
	wake chan struct{}
	// done is closed when the worker has ended; err is what the stream ends with then.
	done chan struct{}
	err  error

	working sync.Mutex // held by the worker

	sending sync.Mutex // Send is not safe for concurrent use
	gone    bool       // the stream has ended

	mu sync.Mutex
	// busy: a start is waited for, or answered, whatever happens. Otherwise a stream that is closed takes none.
	busy, closed bool
	// reads is who reads. wrong says what is wrong with what was read, once nobody does.
	reads reader
	wrong error
	// handed: there is no worker until a start is read.
	handed bool
	// job and sub are what commands are for; nil between two jobs.
	job *job
	sub *subscriber
}

// reader is who reads what the client says.
type reader int

const (
	worker  reader = iota
	another        // while a job runs, and until the next one
	nobody         // the client said all it had to say
)

// errGone is why nothing can be told on a stream any more.
var errGone = errors.New("the stream has ended")

// attend ends the stream when its jobs have ended, or when it has to end before.
func (t *talk) attend() error {
	defer t.quit()
	closing := t.h.closing
	for {
		select {
		case <-t.done:
			return t.err
		case <-t.stream.Context().Done():
			return status.FromContextError(t.stream.Context().Err()).Err()
		case <-closing:
			if t.close() {
				return nil
			}
			closing = nil // the worker sees it when the job has ended
		case <-t.wake:
			t.mu.Lock()
			j, sub := t.job, t.sub
			t.mu.Unlock()
			if j == nil {
				continue
			}
			if err := t.tell(j, sub); err != nil {
				return err
			}
		}
	}
}

// quit leaves the stream to gRPC, and the job to itself.
func (t *talk) quit() {
	t.sending.Lock()
	t.gone = true
	t.sending.Unlock()
	t.mu.Lock()
	j, sub := t.job, t.sub
	t.mu.Unlock()
	if j != nil {
		t.h.leave(j, sub)
	}
}

// close has a stream between two jobs take no more.
func (t *talk) close() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = !t.busy
	return t.closed
}

// work carries jobs until none follows, or until the goroutine that reads carries the next one.
func (t *talk) work(start *runnerv1.Job, err error) {
	t.working.Lock()
	defer t.working.Unlock()
	for err == nil && start != nil {
		if err = t.carry(start); err != nil {
			break
		}
		handed := false
		if start, handed, err = t.next(start); handed {
			return
		}
	}
	t.err = err
	close(t.done)
}

func (t *talk) first() (*runnerv1.Job, error) {
	req, err := t.stream.Recv()
	if err != nil || req.GetStart() == nil {
		return nil, status.Error(codes.InvalidArgument, "the first message must be start")
	}
	return req.GetStart(), nil
}

// carry begins or joins a job and tells the client of it until its end.
func (t *talk) carry(start *runnerv1.Job) error {
	j, sub, run, err := t.admit(start)
	if err != nil {
		return fault.ToStatus(err).Err()
	}
	defer t.h.leave(j, sub)
	j.feed.greet(sub, startedEvent(run == nil, start.GetMore()))
	sub.batch = start.GetBatch()
	t.follow(j, sub)
	defer t.follow(nil, nil)
	if t.stream.Context().Err() != nil { // the attendant may have left the job to itself before there was one
		t.h.leave(j, sub)
	}
	switch {
	case run == nil:
		t.release(j)
		select {
		case <-t.h.over(j):
		case <-t.stream.Context().Done():
			return status.FromContextError(t.stream.Context().Err()).Err()
		}
	case sub.quiet:
		t.h.holds.Add(sub.since, hold{t, j})
		run()
	default:
		_ = t.tell(j, sub) // where it fails, the end cannot be told either
		t.release(j)
		run()
	}
	return t.tell(j, sub)
}

// admit lets a job in. A panic ends the stream alone.
func (t *talk) admit(start *runnerv1.Job) (j *job, sub *subscriber, run func(), err error) {
	ctx := t.stream.Context()
	defer t.h.recovered(ctx, "Execute", &err)
	var phases *telemetry.Phases
	if start.GetProfile() {
		phases = telemetry.NewPhases("runner")
	}
	asked, err := t.h.newJob(start)
	if err != nil {
		return nil, nil, nil, err
	}
	// A process that was stopped finds starts in its buffers that were given up long ago.
	if ctx.Err() != nil {
		return nil, nil, nil, status.FromContextError(ctx.Err()).Err()
	}
	if trace := start.GetTraceContext(); start.GetMore() && len(trace) > 0 { // else the stream's headers say it
		ctx = telemetry.Propagator().Extract(ctx, propagation.MapCarrier(trace))
	}
	return t.h.admit(telemetry.WithPhases(ctx, phases), asked, admission{
		lease: start.GetLease().AsDuration(), attachOnly: start.GetAttachOnly(), wake: t.wake, quiet: start.GetBatch(),
	})
}

// tell sends what there is to say of a job.
func (t *talk) tell(j *job, sub *subscriber) error {
	t.sending.Lock()
	defer t.sending.Unlock()
	if t.gone {
		return errGone
	}
	events, end, refused := j.feed.take(sub)
	if refused != nil {
		return refused
	}
	if end {
		t.forget(j) // before the client knows, who may begin the next one at once
	}
	for len(events) > 0 {
		n := 1
		if sub.batch {
			n = batched(events)
		}
		m := events[0]
		if n > 1 {
			m = batchOf(events[:n])
		}
		if err := t.stream.Send(m); err != nil {
			return err
		}
		events = events[n:]
	}
	return nil
}

// Events are what a message of a runner tells, one by one: those of a batch, or itself.
func Events(m *runnerv1.ExecuteResponse) []*runnerv1.ExecuteResponse {
	if b := m.GetBatch(); b != nil {
		return b.GetEvents()
	}
	return []*runnerv1.ExecuteResponse{m}
}

// batched is how many of the events go into one message; at least one.
func batched(events []*runnerv1.ExecuteResponse) int {
	size := 0
	for n, e := range events {
		size += len(e.GetLog().GetText()) + len(e.GetFinished().GetOutput())
		if n > 0 && size > mostBatched {
			return n
		}
	}
	return len(events)
}

// next waits for the job after one; nil where there is none. Where another goroutine reads, it is handed the work.
func (t *talk) next(last *runnerv1.Job) (_ *runnerv1.Job, handed bool, _ error) {
	if !last.GetMore() || t.h.closes() {
		return nil, false, nil
	}
	t.mu.Lock()
	t.busy = false
	t.handed = t.reads == another
	reads, wrong := t.reads, t.wrong
	t.mu.Unlock()
	switch reads {
	case another:
		return nil, true, nil
	case nobody:
		return nil, false, wrong
	case worker:
	}
	start, err := t.read()
	if !t.take() {
		return nil, false, nil
	}
	return start, false, err
}

// take says whether a start that was read is to be answered. Otherwise the client sees the stream's end.
func (t *talk) take() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.busy = true
	return !t.closed
}

// read gives the next start.
func (t *talk) read() (*runnerv1.Job, error) {
	for {
		req, err := t.stream.Recv()
		if err != nil {
			return nil, nil //nolint:nilerr // the client said all it had to say, or is gone, which the stream's context tells
		}
		switch c := req.GetCommand().(type) {
		case *runnerv1.ExecuteRequest_Start:
			return c.Start, nil
		case *runnerv1.ExecuteRequest_Cancel, *runnerv1.ExecuteRequest_Renew: // it is for the job that has just ended
		default:
			return nil, errCommand
		}
	}
}

var errCommand = status.Error(codes.InvalidArgument, "a command is start, cancel or renew")

// forget says that a job has ended, unless the next one has begun.
func (t *talk) forget(j *job) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.job == j {
		t.job, t.sub = nil, nil
	}
}

func (t *talk) follow(j *job, sub *subscriber) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.job, t.sub = j, sub
}

// release has commands read and events told as they come, unless the job has ended.
func (t *talk) release(j *job) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.job != j {
		return false
	}
	if t.reads == worker {
		t.reads = another
		go t.steer()
	}
	j.feed.release(t.sub)
	return true
}

// steer reads commands until the stream ends, or the next start.
func (t *talk) steer() {
	for {
		req, err := t.stream.Recv()
		if err != nil {
			t.stop(nil) // the client said all it had to say, or is gone, which the stream's context tells
			return
		}
		t.mu.Lock()
		j, sub := t.job, t.sub
		t.mu.Unlock()
		switch c := req.GetCommand().(type) {
		case *runnerv1.ExecuteRequest_Cancel:
			if j == nil {
				continue // it is for the job that has just ended
			}
			if !j.feed.follows(sub) {
				t.stop(nil)
				return
			}
			reason := cmp.Or(cut(strings.ToValidUTF8(c.Cancel.GetReason(), ""), maxDetailText), "cancelled")
			j.cancel(fault.New(fault.Cancelled, "%s", reason))
		case *runnerv1.ExecuteRequest_Renew:
			if j != nil {
				t.h.renew(j, sub)
			}
		case *runnerv1.ExecuteRequest_Start:
			if j == nil {
				t.takeOver(c.Start)
				return
			}
			wrong := status.Error(codes.InvalidArgument, "a start is the first message, or follows finished where started said more")
			j.feed.refuseOne(sub, wrong)
			t.stop(wrong)
			return
		default:
			if j != nil {
				j.feed.refuseOne(sub, errCommand)
			}
			t.stop(errCommand)
			return
		}
	}
}

// stop ends the reading, and the stream where no job is under way.
func (t *talk) stop(wrong error) {
	t.mu.Lock()
	t.reads, t.wrong = nobody, wrong
	handed := t.handed
	t.mu.Unlock()
	if handed {
		t.err = wrong
		close(t.done)
	}
}

// takeOver makes the goroutine that read a start the worker.
func (t *talk) takeOver(start *runnerv1.Job) {
	t.working.Lock() // the last worker has told the end of its job, and is about to leave
	t.mu.Lock()
	handed := t.handed
	t.handed, t.reads = false, worker
	t.mu.Unlock()
	t.working.Unlock()
	if !handed {
		return // it ended the stream
	}
	if !t.take() {
		start = nil
	}
	t.work(start, nil)
}

// hold is a job that was not released yet.
type hold struct {
	t *talk
	j *job
}
