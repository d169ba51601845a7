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

func writes(r *result) float64 { return r.Writes }

var one, forty, hundred = workload{shape: "1 step"}, workload{shape: "40 sequential"}, workload{shape: "100 parallel"}

func at(w workload, n int) workload { w.system, w.concurrency = ours, n; return w }

// targets are what is aimed at: close to what the machine is capable of, and far from what others reach. A page says which are met.
func targets() []bound {
	// floors is the time of one alone over that of so many commits and calls.
	floors := func(commits, echoes float64) func(*result) float64 {
		return func(r *result) float64 { return r.P50Ms / (commits*1000/r.F1 + echoes*r.EchoMs) }
	}
	const rate, cpu = "workflows a second / F32", "CPU-ms a step"
	return []bound{
		// Two, and the upkeep of the database and the orchestrator: three or four a second.
		{at(one, 1), "write transactions, upkeep included", writes, 2.02, false},
		{at(one, 32), "write transactions", writes, 0.2, false},
		{at(one, 32), rate, (*result).rate, 0.35, true},
		{at(one, 1), "time over 3 F1 commits and 2 echoes", floors(3, 2), 1, false},
		{at(forty, 32), rate, (*result).rate, 0.025, true},
		{at(forty, 1), "time over 41 F1 commits and 40 echoes", floors(41, 40), 1.25, false},
		{at(forty, 32), cpu, (*result).stepCPU, 0.2, false},
		{at(hundred, 32), rate, (*result).rate, 0.012, true},
		{at(hundred, 1), "time over 10 F1 commits and 100 echoes", floors(10, 100), 1, false},
		{at(hundred, 32), cpu, (*result).stepCPU, 0.2, false},
	}
}

// aims writes which targets are met.
func (b *bench) aims(p func(format string, args ...any), results map[workload][]*result) {
	p("\n| workload | at once | figure | target | measured | |\n| --- | --- | --- | --- | --- | --- |")
	for _, l := range targets() {
		all := results[l.workload]
		if len(all) == 0 {
			continue
		}
		s, sign, verdict := spreadOf(all, l.get), "at most", "met"
		if l.atLeast {
			sign = "at least"
		}
		if l.beyond(s.median) {
			verdict = "**missed**"
		}
		p("| %s | %d | %s | %s %g | %s | %s |", l.workload.shape, l.workload.concurrency, l.what, sign, l.limit, s.text(4), verdict)
	}
	for _, w := range []workload{one, {shape: "10 sequential"}, forty, hundred} {
		for _, n := range []int{1, 32} {
			w := at(w, n)
			own, theirs := results[w], results[workload{"Temporal", w.shape, n}]
			if len(own) == 0 || len(own) != len(theirs) {
				continue
			}
			rounds := make([]float64, len(own))
			for i := range own {
				rounds[i] = own[i].rate() / theirs[i].rate()
			}
			s, verdict := spreadOf(rounds, func(x float64) float64 { return x }), "met"
			if s.median < 25 {
				verdict = "**missed**"
			}
			p("| %s | %d | workflows a second / F32, over Temporal's | at least 25 | %s | %s |", w.shape, n, s.text(1), verdict)
		}
	}
}

func (l bound) beyond(x float64) bool {
	if l.atLeast {
		return x < l.limit
	}
	return x > l.limit
}

func bounds() []bound {
	return []bound{
		{at(one, 1), "write transactions", writes, 2.5, false},
		{at(one, 32), "write transactions", writes, 0.5, false},
		{at(one, 32), "workflows a second / F32", (*result).rate, 0.05, true},
		{at(forty, 1), "write transactions", writes, 46, false},
		{at(forty, 32), "write transactions", writes, 6, false},
		{at(forty, 32), "workflows a second / F32", (*result).rate, 0.002, true},
		{at(hundred, 1), "write transactions", writes, 20, false},
		{at(hundred, 32), "workflows a second / F32", (*result).rate, 0.001, true},
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
		sign, bad := "at most", l.beyond(s.median)
		if l.atLeast {
			sign = "at least"
		}
		line := fmt.Sprintf("%s x %d: %s: %s, %s %g", l.workload.shape, l.workload.concurrency, l.what, s.text(4), sign, l.limit)
		if b.sayf("%s", line); bad {
			errs = append(errs, errors.New(line))
		}
	}
	return errors.Join(errs...)
}
