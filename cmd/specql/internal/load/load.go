// Package load makes the same call again and again, by so many callers as fast as they can or at
// a rate, and keeps how long each took and what came of it.
package load

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/reflect/protoreflect"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
)

// MaxRequests bounds what one test keeps.
const MaxRequests = 1_000_000

// Options say what to do. Either Requests or Duration ends the test.
type Options struct {
	// Concurrency is how many calls are in flight at most.
	Concurrency int
	// Requests is how many calls are made; 0 for as many as Duration allows, up to MaxRequests.
	Requests int
	// Duration is for how long calls are begun; 0 for as long as Requests takes.
	Duration time.Duration
	// Rate is how many calls a second are to begin. Latencies then count from the time at which a
	// call was to begin, so that waiting for a free caller is not hidden. 0 lets each caller begin
	// its next call when its last has ended.
	Rate float64
	// Call makes a call. An error ends the test: nothing is measured by going on.
	Call func(ctx context.Context) (Outcome, error)
}

// Outcome is what came of a call.
type Outcome struct {
	// Code is the error code; empty for success.
	Code string
	// Message is the error's.
	Message string
	// Usage is what the call used; nil where it is not known.
	Usage *runnerv1.ResourceUsage
}

// Sample is a call that has ended.
type Sample struct {
	// Start is when it was to begin, from the start of the test.
	Start   time.Duration
	Latency time.Duration
	Failed  bool
}

// End is when the call ended, from the start of the test.
func (s Sample) End() time.Duration { return s.Start + s.Latency }

// Failure is an error code and how often it came.
type Failure struct {
	Code  string
	Count int
	// Message is the first one's.
	Message string
}

// Figure is a measured figure of the calls: the name of its field in ResourceUsage's JSON form.
type Figure struct {
	Name   string
	Values []float64 // sorted
}

// Result is what a test measured.
type Result struct {
	// Elapsed is from the start to the end of the last call.
	Elapsed time.Duration
	// Samples are in the order of their ends.
	Samples []Sample
	// Unsent are calls that were to begin, by the rate, and for which no caller was free in time.
	Unsent int
	// Failures by count, the most frequent first.
	Failures []Failure
	// Figures are in the order of ResourceUsage's fields.
	Figures []Figure
	// Interrupted: the context ended the test before its time.
	Interrupted bool
}

// Progress is how far a test has come. It is safe for concurrent use.
type Progress struct {
	mu             sync.Mutex
	begun          time.Time
	ended, failing int
}

// Now returns how many calls have ended, how many of them failed, and for how long the test runs.
func (p *Progress) Now() (ended, failed int, elapsed time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.begun.IsZero() {
		return 0, 0, 0
	}
	return p.ended, p.failing, time.Since(p.begun)
}

// test is a test that runs.
type test struct {
	Options
	progress *Progress
	begun    time.Time

	mu       sync.Mutex
	next     int // calls begun so far
	err      error
	samples  []Sample
	failures map[string]*Failure
	figures  map[protoreflect.FieldNumber]*Figure
}

// Run does a test. When stop ends, no call is begun any more, and Run returns when those that were begun
// have ended; when ctx ends, they end too. progress may be nil.
func Run(ctx, stop context.Context, o Options, progress *Progress) (*Result, error) { //nolint:revive // two contexts, in the order of their strength
	if o.Concurrency < 1 || o.Call == nil || o.Requests < 0 || o.Rate < 0 || o.Requests == 0 && o.Duration <= 0 {
		return nil, errors.New("a load test needs a call, at least one caller, and an end")
	}
	if progress == nil {
		progress = &Progress{}
	}
	if o.Requests == 0 || o.Requests > MaxRequests {
		o.Requests = MaxRequests
	}
	t := &test{Options: o, progress: progress, begun: time.Now(), failures: map[string]*Failure{}, figures: map[protoreflect.FieldNumber]*Figure{}}
	progress.mu.Lock()
	progress.begun = t.begun
	progress.mu.Unlock()
	ending, end := context.WithCancel(stop)
	defer end()
	var callers sync.WaitGroup
	for range min(o.Concurrency, o.Requests) {
		callers.Go(func() {
			for t.one(ctx, ending) {
			}
			if t.failed() {
				end()
			}
		})
	}
	callers.Wait()
	if t.err != nil {
		return nil, t.err
	}
	return t.result(stop.Err() != nil || ctx.Err() != nil), nil
}

func (t *test) failed() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err != nil
}

// one makes the next call, if there is one.
func (t *test) one(ctx, ending context.Context) bool { //nolint:revive // as Run
	t.mu.Lock()
	start := time.Since(t.begun)
	if t.Rate > 0 {
		start = t.intended(t.next)
	}
	if ending.Err() != nil || t.err != nil || t.next >= t.Requests || t.Duration > 0 && max(start, time.Since(t.begun)) >= t.Duration {
		t.mu.Unlock()
		return false
	}
	t.next++
	t.mu.Unlock()
	if wait := start - time.Since(t.begun); wait > 0 {
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ending.Done():
			timer.Stop()
			return false
		}
	}
	out, err := t.Call(ctx)
	s := Sample{Start: start, Latency: time.Since(t.begun) - start, Failed: out.Code != ""}
	if ctx.Err() != nil {
		return false // it was cut off: what came of it says nothing
	}
	t.keep(s, out, err)
	return true
}

// intended is when a call is to begin.
func (t *test) intended(n int) time.Duration {
	return time.Duration(float64(n) / t.Rate * float64(time.Second))
}

func (t *test) keep(s Sample, out Outcome, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err != nil {
		if t.err == nil {
			t.err = err
		}
		return
	}
	t.samples = append(t.samples, s)
	t.progress.mu.Lock()
	t.progress.ended++
	if s.Failed {
		t.progress.failing++
	}
	t.progress.mu.Unlock()
	if s.Failed {
		f := t.failures[out.Code]
		if f == nil {
			f = &Failure{Code: out.Code, Message: out.Message}
			t.failures[out.Code] = f
		}
		f.Count++
	}
	if out.Usage == nil {
		return
	}
	out.Usage.ProtoReflect().Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if f.Kind() == protoreflect.DoubleKind {
			g := t.figures[f.Number()]
			if g == nil {
				g = &Figure{Name: f.JSONName()}
				t.figures[f.Number()] = g
			}
			g.Values = append(g.Values, v.Float())
		}
		return true
	})
}

func (t *test) result(interrupted bool) *Result {
	r := &Result{Samples: t.samples, Interrupted: interrupted}
	slices.SortStableFunc(r.Samples, func(a, b Sample) int { return cmp.Compare(a.End(), b.End()) })
	if n := len(r.Samples); n > 0 {
		r.Elapsed = r.Samples[n-1].End()
	}
	if t.Rate > 0 && t.Duration > 0 && !interrupted {
		due := min(int(t.Duration.Seconds()*t.Rate), t.Requests)
		r.Unsent = max(due-t.next, 0)
	}
	for _, f := range t.failures {
		r.Failures = append(r.Failures, *f)
	}
	slices.SortFunc(r.Failures, func(a, b Failure) int { return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Code, b.Code)) })
	fields := (&runnerv1.ResourceUsage{}).ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		if g := t.figures[fields.Get(i).Number()]; g != nil {
			slices.Sort(g.Values)
			r.Figures = append(r.Figures, *g)
		}
	}
	return r
}
