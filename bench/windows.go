package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"
)

// contestant is one of several ways to make a call, whose rates are measured.
type contestant struct {
	name string
	call func(context.Context) error
}

// window is how long one is driven before it is another one's turn.
const window = 500 * time.Millisecond

// windows drives the contestants in turn, so many calls at once, and says for each its rate, that as a share of the first
// one's, and the processor time of a call: that of this process and of those given.
func (s *steps) windows(ctx context.Context, n, rounds int, processes []*program, contestants ...contestant) error {
	rates, cpus := make([][]float64, len(contestants)), make([]float64, len(contestants))
	shares, took, calls := make([][]float64, len(contestants)), make([]samples, len(contestants)), make([]float64, len(contestants))
	for round := range rounds + 1 {
		for i, c := range contestants {
			before, err := cpuOf(processes)
			if err != nil {
				return err
			}
			began := time.Now()
			rate, p50, err := spin(ctx, n, window, c.call)
			if err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
			seconds := time.Since(began).Seconds()
			after, err := cpuOf(processes)
			if err != nil {
				return err
			}
			if round == 0 { // it warms up
				continue
			}
			rates[i], took[i] = append(rates[i], rate), append(took[i], p50)
			shares[i] = append(shares[i], rate/rates[0][len(rates[0])-1])
			cpus[i], calls[i] = cpus[i]+(after-before).Seconds(), calls[i]+rate*seconds
		}
	}
	var b strings.Builder
	for i, c := range contestants {
		fmt.Fprintf(&b, "\n    %-45s %7.0f a second (p50 %.3f ms), %5.1f CPU-us, %.3f of the first (%.3f–%.3f)", c.name, middle(rates[i]), ms(took[i].quantile(0.5)),
			cpus[i]/calls[i]*1e6, middle(shares[i]), slices.Min(shares[i]), slices.Max(shares[i]))
	}
	s.sayf("%d at once:%s", n, b.String())
	return nil
}

// cpuOf is the processor time that this process and others have used.
func cpuOf(processes []*program) (time.Duration, error) {
	sum, err := ownTime()
	for _, p := range processes {
		if err != nil {
			break
		}
		var d time.Duration
		d, _, err = stat(p.cmd.Process.Pid)
		sum += d
	}
	return sum, err
}

func middle(values []float64) float64 {
	return slices.Sorted(slices.Values(values))[len(values)/2]
}
