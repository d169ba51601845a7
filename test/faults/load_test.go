package faults

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/specql/mesh/pkg/client"
	"github.com/specql/mesh/pkg/fault"
)

// call is a step: its name, and the step whose key it is given.
func call(step, before string) string {
	given := `""`
	if before != "" {
		given = fmt.Sprintf("$%s.token", before)
	}
	return fmt.Sprintf("call_service: {service: worker, operation: work, as: %s, input: {run: $run.id, step: %s, before: %s}}", step, step, given)
}

// chain is a workflow of n calls, each of which needs the one before.
func chain(n int) *shape {
	s := &shape{name: fmt.Sprintf("chain of %d", n), before: map[string]string{}}
	var y strings.Builder
	y.WriteString("actions:\n")
	for i := 1; i <= n; i++ {
		step := fmt.Sprintf("s%d", i)
		fmt.Fprintf(&y, "  - %s\n", call(step, s.last))
		s.before[step], s.last = s.last, step
	}
	fmt.Fprintf(&y, "output: {token: $%s.token}\n", s.last)
	s.yaml = y.String()
	return s
}

// fan is a workflow with branches at the same time, between a first and a last call.
func fan() *shape {
	s := &shape{name: "fan", last: "join", before: map[string]string{"first": "", "b1": "first", "b2": "first", "b3": "first", "join": "b2"}}
	s.yaml = "actions:\n  - " + call("first", "") + "\n  - parallel:\n"
	for _, b := range []string{"b1", "b2", "b3"} {
		s.yaml += "      - " + call(b, "first") + "\n"
	}
	s.yaml += "  - " + call("join", "b2") + "\noutput: {token: $join.token}\n"
	return s
}

// pause is a workflow that waits between two calls.
func pause(d time.Duration) *shape {
	s := &shape{name: "pause", last: "after", before: map[string]string{"ahead": "", "after": "ahead"}}
	s.yaml = fmt.Sprintf("actions:\n  - %s\n  - wait: {seconds: %v}\n  - %s\noutput: {token: $after.token}\n", call("ahead", ""), d.Seconds(), call("after", "ahead"))
	return s
}

// load starts runs and remembers what was asked for and what was acknowledged.
type load struct {
	m *mesh

	mu           sync.Mutex
	asked        map[string]*shape // by key
	acknowledged map[string]string // ids by key
	inserted     map[string]bool   // names of calls; true for those that were committed
	refused      int
}

func newLoad(m *mesh) *load {
	return &load{m: m, asked: map[string]*shape{}, acknowledged: map[string]string{}, inserted: map[string]bool{}}
}

// begin starts a run through one orchestrator after the other, beginning with the nth, until one acknowledges it or ctx ends. It is
// one run however often it is asked for: the key says so.
func (l *load) begin(ctx context.Context, n int, key string, s *shape) error {
	l.mu.Lock()
	l.asked[key] = s
	l.mu.Unlock()
	for try := 0; ; try++ {
		o := l.m.orchestrators[(n+try)%len(l.m.orchestrators)]
		asking, cancel := context.WithTimeout(ctx, 5*time.Second)
		run, err := o.client.Execute(asking, client.Action{Workflow: s.yaml, IdempotencyKey: key})
		cancel()
		l.mu.Lock()
		if err == nil {
			l.acknowledged[key] = run.GetId()
			l.mu.Unlock()
			return nil
		}
		l.refused++
		l.mu.Unlock()
		// Whatever is broken, a client is told to ask again.
		f, said := fault.As(err)
		if ctx.Err() != nil || said && f.Code != fault.Unavailable && f.Code != fault.Timeout {
			return fmt.Errorf("start %s: %w", key, err) // it may have been started all the same
		}
	}
}

// insert has a call made by SQL, and tries again until the commit is acknowledged or ctx ends. It is one row however often that is.
func (l *load) insert(ctx context.Context, n int) error {
	name := fmt.Sprintf("%s%d", loosePrefix, n)
	l.mu.Lock()
	l.inserted[name] = false
	l.mu.Unlock()
	for {
		asking, cancel := context.WithTimeout(ctx, 5*time.Second)
		_, err := l.m.db.Exec(asking, insertJobs+" ON CONFLICT (identifier) DO NOTHING", name, 1)
		cancel()
		l.mu.Lock()
		if err == nil {
			l.inserted[name] = true
			l.mu.Unlock()
			return nil
		}
		l.refused++
		l.mu.Unlock()
		again := time.NewTimer(100 * time.Millisecond)
		select {
		case <-again.C:
		case <-ctx.Done():
			again.Stop()
			return fmt.Errorf("insert %s: %w", name, err) // it may be there all the same
		}
	}
}
