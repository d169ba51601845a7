package main

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// samples are durations.
type samples []time.Duration

func (s samples) quantile(q float64) time.Duration {
	if len(s) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(s))
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

// result is one workload, measured once.
type result struct {
	System      string  `json:"system"`
	Shape       string  `json:"shape"`
	Steps       int     `json:"steps"`
	Concurrency int     `json:"concurrency"`
	F1          float64 `json:"f1"`
	F32         float64 `json:"f32"`
	// EchoMs is a bare gRPC call, taken right before.
	EchoMs    float64 `json:"echo_ms"`
	Workflows int     `json:"workflows"`
	Seconds   float64 `json:"seconds"`
	P50Ms     float64 `json:"p50_ms"`
	P99Ms     float64 `json:"p99_ms"`
	// PerSecond is in workflows.
	PerSecond float64 `json:"per_second"`
	// Writes are transactions that wrote, WAL bytes of the database's log, CPUMs processor time: a workflow.
	Writes float64            `json:"writes"`
	WAL    float64            `json:"wal_bytes"`
	CPUMs  float64            `json:"cpu_ms"`
	CPU    map[string]float64 `json:"cpu_ms_by_part"`
}

// rate is workflows a second in transactions a second that the database is capable of.
func (r *result) rate() float64 { return r.PerSecond / r.F32 }

// stepCPU is processor time a step, in ms.
func (r *result) stepCPU() float64 { return r.CPUMs / float64(r.Steps) }

// load is a closed loop: so many clients, each of whom starts a workflow when its last one has ended.
type load struct {
	concurrency int
	// duration ends it, and so does most where it is not 0; each client starts one workflow at least.
	duration time.Duration
	most     int64
}

// measure drives one workflow after the other, and reads the meter around it.
func (l load) measure(ctx context.Context, m *meter, one func(ctx context.Context) error) (*result, error) {
	before, err := m.read(ctx)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var started atomic.Int64
	all := make([]samples, l.concurrency)
	var wg sync.WaitGroup
	end := time.Now().Add(l.duration)
	for i := range l.concurrency {
		wg.Go(func() {
			for first := true; first || time.Now().Before(end); first = false {
				if n := started.Add(1); l.most > 0 && n > l.most {
					return
				}
				t := time.Now()
				if err := one(ctx); err != nil {
					cancel(err)
					return
				}
				all[i] = append(all[i], time.Since(t))
			}
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	after, err := m.read(ctx)
	if err != nil {
		return nil, err
	}
	var sum samples
	for _, s := range all {
		sum = append(sum, s...)
	}
	r := &result{Concurrency: l.concurrency, Workflows: len(sum), P50Ms: ms(sum.quantile(0.5)), P99Ms: ms(sum.quantile(0.99))}
	r.spend(before.until(after))
	return r, nil
}

// spend puts down what was spent on the workflows.
func (r *result) spend(s spent) {
	n := float64(r.Workflows)
	r.Seconds, r.PerSecond = s.took.Seconds(), n/s.took.Seconds()
	r.Writes, r.WAL, r.CPUMs, r.CPU = float64(s.writes)/n, float64(s.wal)/n, ms(s.total())/n, map[string]float64{}
	for name, d := range s.cpu {
		r.CPU[name] = ms(d) / n
	}
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
