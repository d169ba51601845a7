package main

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/specql/mesh/pkg/client"
)

// ramps start workflows at a fixed rate, whether or not those before have ended, and measure each from the moment at which it was to
// begin: a system that falls behind shows it.
func (b *bench) ramps(ctx context.Context, m *meter, c *client.Client) error {
	for _, sh := range shapes()[:2] {
		for _, rate := range []int{100, 500, 2000} {
			floors, err := b.before(ctx)
			if err != nil {
				return err
			}
			before, err := m.read(ctx)
			if err != nil {
				return err
			}
			all, most, err := openLoop(ctx, rate, b.duration, func(ctx context.Context) error { return execute(ctx, c, sh) })
			if err != nil {
				return fmt.Errorf("%s, %d a second: %w", sh.name, rate, err)
			}
			after, err := m.read(ctx)
			if err != nil {
				return err
			}
			spent := before.until(after)
			n := float64(len(all))
			b.sayf("%-14s %5d a second for %s: all %d ended %.2f s after the first began; p50 %.2f, p99 %.2f, longest %.2f ms; %d at once at most; %.3f write transactions, %.2f CPU-ms each; F32 %.0f",
				sh.name, rate, b.duration, len(all), spent.took.Seconds(), ms(all.quantile(0.5)), ms(all.quantile(0.99)), ms(all.quantile(1)), most,
				float64(spent.writes)/n, ms(spent.total())/n, floors.f32)
		}
	}
	return nil
}

// openLoop gives how long each took, and how many were under way at once at most.
func openLoop(ctx context.Context, rate int, d time.Duration, one func(ctx context.Context) error) (samples, int64, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	n := int(d.Seconds() * float64(rate))
	all := make(samples, n)
	var wg sync.WaitGroup
	var now, most atomic.Int64
	begin := time.Now()
	for i := range n {
		at := begin.Add(time.Duration(i) * time.Second / time.Duration(rate))
		if wait := time.Until(at); wait > 0 {
			timer := time.NewTimer(wait)
			select {
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
			}
		}
		if ctx.Err() != nil {
			break
		}
		wg.Go(func() {
			under := now.Add(1)
			for seen := most.Load(); under > seen && !most.CompareAndSwap(seen, under); seen = most.Load() {
			}
			if err := one(ctx); err != nil {
				cancel(err)
			}
			all[i] = time.Since(at)
			now.Add(-1)
		})
	}
	wg.Wait()
	return all, most.Load(), context.Cause(ctx)
}
