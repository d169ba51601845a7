package main

import (
	"errors"
	"fmt"
)

// bound is what a figure must keep to, whatever the machine: it is a count, or a ratio to a floor that was
// measured right before. The margins are wide: what goes beyond is a defect and no noise.
type bound struct {
	workload workload
	what     string
	get      func(*result) float64
	// limit is the most, or with atLeast the least.
	limit   float64
	atLeast bool
}

func bounds() []bound {
	writes := func(r *result) float64 { return r.Writes }
	one, forty, hundred := workload{shape: "1 step"}, workload{shape: "40 sequential"}, workload{shape: "100 parallel"}
	at := func(w workload, n int) workload { w.system, w.concurrency = ours, n; return w }
	return []bound{
		{at(one, 1), "write transactions", writes, 2.3, false},
		{at(one, 32), "write transactions", writes, 0.5, false},
		{at(one, 32), "workflows a second / F32", (*result).rate, 0.1, true},
		{at(forty, 1), "write transactions", writes, 43, false},
		{at(forty, 32), "write transactions", writes, 6, false},
		{at(forty, 32), "workflows a second / F32", (*result).rate, 0.004, true},
		{at(hundred, 1), "write transactions", writes, 20, false},
		{at(hundred, 32), "workflows a second / F32", (*result).rate, 0.002, true},
		{at(hundred, 32), "CPU of a step, in bare echoes", func(r *result) float64 { return r.stepCPU() / r.EchoMs }, 20, false},
	}
}

// check fails where a median is beyond its bound.
func (b *bench) check() error {
	_, results := group(b.results, func(r *result) workload { return workload{r.System, r.Shape, r.Concurrency} })
	var errs []error
	for _, l := range bounds() {
		all := results[l.workload]
		if len(all) == 0 {
			continue // it was not asked for
		}
		s := spreadOf(all, l.get)
		sign, bad := "at most", s.median > l.limit
		if l.atLeast {
			sign, bad = "at least", s.median < l.limit
		}
		line := fmt.Sprintf("%s x %d: %s: %s, %s %g", l.workload.shape, l.workload.concurrency, l.what, s.text(4), sign, l.limit)
		if b.sayf("%s", line); bad {
			errs = append(errs, errors.New(line))
		}
	}
	return errors.Join(errs...)
}
