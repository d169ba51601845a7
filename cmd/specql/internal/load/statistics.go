package load

import (
	"math"
	"slices"
	"time"
)

// Percentile of sorted values by nearest rank; p is from 0 to 1. NaN where there are none.
func Percentile(sorted []float64, p float64) float64 {
	if len(sorted) == 0 {
		return math.NaN()
	}
	return sorted[min(max(int(math.Ceil(p*float64(len(sorted)))), 1), len(sorted))-1]
}

// Mean of values; NaN where there are none.
func Mean(values []float64) float64 { return Sum(values) / float64(len(values)) }

// Sum of values.
func Sum(values []float64) (sum float64) {
	for _, v := range values {
		sum += v
	}
	return sum
}

// Failed is how many calls failed.
func (r *Result) Failed() (n int) {
	for _, f := range r.Failures {
		n += f.Count
	}
	return n
}

// Throughput is how many calls ended in a second, failed ones included.
func (r *Result) Throughput() float64 {
	if r.Elapsed <= 0 {
		return 0
	}
	return float64(len(r.Samples)) / r.Elapsed.Seconds()
}

// Latencies of all calls in seconds, sorted.
func (r *Result) Latencies() []float64 {
	out := make([]float64, len(r.Samples))
	for i, s := range r.Samples {
		out[i] = s.Latency.Seconds()
	}
	slices.Sort(out)
	return out
}

// Figure returns the values of a measured figure, sorted; nil where nothing measured it.
func (r *Result) Figure(name string) []float64 {
	for _, f := range r.Figures {
		if f.Name == name {
			return f.Values
		}
	}
	return nil
}

// Slot is a span of a test.
type Slot struct {
	// Start is from the start of the test; Width is how long the slot is.
	Start, Width time.Duration
	// Ended are the calls that ended in it, Failed those of them that failed.
	Ended, Failed int
	// P50 and P95 are of the latencies of the calls that ended in it, in seconds; NaN for none.
	P50, P95 float64
}

// Throughput is how many calls ended in a second of the slot.
func (s Slot) Throughput() float64 { return float64(s.Ended) / s.Width.Seconds() }

// steps are the widths of slots.
var steps = []time.Duration{
	10 * time.Millisecond, 20 * time.Millisecond, 50 * time.Millisecond, 100 * time.Millisecond, 200 * time.Millisecond, 500 * time.Millisecond,
	time.Second, 2 * time.Second, 5 * time.Second, 10 * time.Second, 30 * time.Second, time.Minute, 5 * time.Minute, 15 * time.Minute, time.Hour,
}

// Timeline cuts the test into at most n slots of a round width. The last one ends with the test.
func (r *Result) Timeline(n int) []Slot {
	if r.Elapsed <= 0 || n < 1 {
		return nil
	}
	width := steps[len(steps)-1]
	for _, s := range steps {
		if r.Elapsed <= s*time.Duration(n) {
			width = s
			break
		}
	}
	slots := make([]Slot, min(int((r.Elapsed+width-1)/width), 100*n))
	latencies := make([][]float64, len(slots))
	for i := range slots {
		start := time.Duration(i) * width
		slots[i] = Slot{Start: start, Width: min(width, r.Elapsed-start)}
	}
	for _, s := range r.Samples {
		i := min(int(s.End()/width), len(slots)-1)
		slots[i].Ended++
		if s.Failed {
			slots[i].Failed++
		}
		latencies[i] = append(latencies[i], s.Latency.Seconds())
	}
	for i := range slots {
		slices.Sort(latencies[i])
		slots[i].P50, slots[i].P95 = Percentile(latencies[i], 0.50), Percentile(latencies[i], 0.95)
	}
	return slots
}
