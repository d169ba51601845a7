// Package drive is what the programs that drive other systems have in common: they take workloads from stdin, a JSON
// object a line, and answer each with what they measured.
package drive

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"
)

// Workload is asked for on stdin.
type Workload struct {
	Shape       string        `json:"shape"`
	Concurrency int           `json:"concurrency"`
	Duration    time.Duration `json:"duration_ns"`
}

// Measured is the answer on stdout: how many workflows ended, and how long one took.
type Measured struct {
	Workflows int     `json:"workflows"`
	Seconds   float64 `json:"seconds"`
	P50Ms     float64 `json:"p50_ms"`
	P99Ms     float64 `json:"p99_ms"`
	Error     string  `json:"error,omitempty"`
}

// Shapes are workflows by name; each runs one to its end.
type Shapes map[string]func(ctx context.Context) error

// Fibonacci computes a number of the series the slow way, as the runner of the bench does.
func Fibonacci(n int) int {
	if n < 2 {
		return n
	}
	return Fibonacci(n-1) + Fibonacci(n-2)
}

// Serve says that it is ready and measures until stdin ends.
func Serve(ctx context.Context, shapes Shapes) error {
	out := json.NewEncoder(os.Stdout)
	if err := out.Encode(map[string]bool{"ready": true}); err != nil {
		return err
	}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var w Workload
		if err := json.Unmarshal(lines.Bytes(), &w); err != nil {
			return fmt.Errorf("read a workload: %w", err)
		}
		m, err := measure(ctx, shapes[w.Shape], w)
		if err != nil {
			m.Error = err.Error()
		}
		if err := out.Encode(m); err != nil {
			return err
		}
	}
	return lines.Err()
}

// measure is a closed loop: so many clients, each of whom starts a workflow when its last one has ended.
func measure(ctx context.Context, one func(ctx context.Context) error, w Workload) (m Measured, err error) {
	if one == nil {
		return m, fmt.Errorf("no shape has the name %q", w.Shape)
	}
	var mu sync.Mutex
	var took []time.Duration
	var wg sync.WaitGroup
	began := time.Now()
	for range w.Concurrency {
		wg.Go(func() {
			var own []time.Duration
			var failed error
			for len(own) == 0 || time.Since(began) < w.Duration {
				t := time.Now()
				if failed = one(ctx); failed != nil {
					break
				}
				own = append(own, time.Since(t))
			}
			mu.Lock()
			defer mu.Unlock()
			took, err = append(took, own...), errors.Join(err, failed)
		})
	}
	wg.Wait()
	m.Workflows, m.Seconds = len(took), time.Since(began).Seconds()
	if len(took) > 0 {
		slices.Sort(took)
		at := func(q float64) float64 { return float64(took[min(int(q*float64(len(took))), len(took)-1)]) / 1e6 }
		m.P50Ms, m.P99Ms = at(0.5), at(0.99)
	}
	return m, err
}
