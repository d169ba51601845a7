package faults

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// effect is a request that arrived at the recorder: what a step did to the world outside.
type effect struct {
	// Run, Step and Before are what the step was given: Before is the key of the step before it.
	Run    string `json:"run"`
	Step   string `json:"step"`
	Before string `json:"before"`
	Key    string `json:"-"`
	Began  time.Time
	// Ended is when it was answered; zero where nobody waited for the answer any more, which was noticed at Gone.
	Ended time.Time
	Gone  time.Time
}

// recorder is the service behind the runners. It answers each request with the key that it came with, after a delay, so that
// the next step can be asked whether it got the result of the one before.
type recorder struct {
	url    string
	server *http.Server

	mu      sync.Mutex
	effects []*effect
	// delay of the answer to the nth request.
	delay   func(n int) time.Duration
	held    map[string]chan struct{} // by step
	changed chan struct{}            // closed and replaced with each arrival and end
}

func newRecorder(t testing.TB) *recorder {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	r := &recorder{
		url: "http://" + lis.Addr().String(), delay: func(int) time.Duration { return 0 },
		held: map[string]chan struct{}{}, changed: make(chan struct{}),
	}
	r.server = &http.Server{Handler: r, ReadHeaderTimeout: time.Minute}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = r.server.Serve(lis)
	}()
	t.Cleanup(func() {
		r.releaseAll()
		_ = r.server.Close()
		<-done
	})
	return r
}

// ServeHTTP implements http.Handler.
func (r *recorder) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	raw, err := io.ReadAll(req.Body)
	e := &effect{Key: req.Header.Get("Idempotency-Key"), Began: time.Now()}
	if err != nil || json.Unmarshal(raw, e) != nil {
		http.Error(w, "no body", http.StatusBadRequest)
		return
	}
	r.mu.Lock()
	r.effects = append(r.effects, e)
	delay, held := r.delay(len(r.effects)), r.held[e.Step]
	r.notify()
	r.mu.Unlock()
	if held != nil {
		select {
		case <-held:
		case <-req.Context().Done():
		}
	}
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-req.Context().Done():
	}
	ended := req.Context().Err() == nil
	if ended {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]string{"token": e.Key})
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if ended {
		e.Ended = time.Now()
	} else {
		e.Gone = time.Now()
	}
	r.notify()
}

func (r *recorder) notify() {
	close(r.changed)
	r.changed = make(chan struct{})
}

// slow sets how long each answer takes.
func (r *recorder) slow(d time.Duration) {
	r.slowly(func(int) time.Duration { return d })
}

// slowly sets how long the answer to the nth request takes.
func (r *recorder) slowly(f func(n int) time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.delay = f
}

// hold leaves requests of a step without an answer until release.
func (r *recorder) hold(step string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.held[step] = make(chan struct{})
}

// release answers the requests of a step that are held, and those that come.
func (r *recorder) release(step string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if held := r.held[step]; held != nil {
		close(held)
		delete(r.held, step)
	}
}

func (r *recorder) releaseAll() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for step, held := range r.held {
		close(held)
		delete(r.held, step)
	}
}

// all are the requests so far.
func (r *recorder) all() []effect {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]effect, 0, len(r.effects))
	for _, e := range r.effects {
		out = append(out, *e)
	}
	return out
}

// of are the requests of one step, of all runs or of one.
func (r *recorder) of(run, step string) []effect {
	return slices.DeleteFunc(r.all(), func(e effect) bool { return run != "" && e.Run != run || e.Step != step })
}

// arrived waits until so many requests have arrived, all in all.
func (r *recorder) arrived(ctx context.Context, n int) error {
	return r.wait(ctx, fmt.Sprintf("request %d", n), func() bool { return len(r.effects) >= n })
}

// begun waits until n requests of a step have arrived.
func (r *recorder) begun(ctx context.Context, step string, n int) error {
	return r.wait(ctx, fmt.Sprintf("request %d of step %s", n, step), func() bool {
		count := 0
		for _, e := range r.effects {
			if e.Step == step {
				count++
			}
		}
		return count >= n
	})
}

// wait waits until what has arrived satisfies a condition.
func (r *recorder) wait(ctx context.Context, what string, condition func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		r.mu.Lock()
		done, changed := condition(), r.changed
		r.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("%s did not come within %s", what, patience)
		}
	}
}

// lines are the lines of a text.
func lines(text string) func(func(string) bool) { return strings.SplitSeq(text, "\n") }
