package report

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/specql/mesh/cmd/specql/internal/load"
)

// The area of a chart in the units of its drawing.
const (
	left, right, top, bottom = 60.0, 700.0, 12.0, 210.0
	// slots is how many spans of time a chart has at most.
	slots = 60
	bins  = 36
)

// chart is a plot of lines over an axis.
type chart struct {
	Title, Along, Up string
	X, Y             []tick
	Series           []series
}

// tick is a mark of an axis: where, and what it says.
type tick struct {
	At   float64
	Text string
}

// series is a line, filled below where Area is set.
type series struct {
	Colour     int
	Name       string
	Line, Area string // paths of SVG
	Dashed     bool
}

// scale maps values to places.
type scale struct{ from, to, low, high float64 }

func (s scale) at(v float64) float64 {
	if s.to <= s.from {
		return s.low
	}
	return round(s.low + (v-s.from)/(s.to-s.from)*(s.high-s.low))
}

func round(v float64) float64 { return math.Round(v*10) / 10 }

// upTo is a scale from 0 with round marks.
func upTo(most, low, high float64, write func(float64) string) (scale, []tick) {
	if most <= 0 || math.IsNaN(most) || math.IsInf(most, 0) {
		most = 1
	}
	step := math.Pow(10, math.Floor(math.Log10(most/4)))
	for _, m := range []float64{1, 2, 5, 10} {
		if most/(step*m) <= 5 {
			step *= m
			break
		}
	}
	s := scale{0, step * math.Ceil(most/step), low, high}
	var ticks []tick
	for i := 0; float64(i)*step <= s.to*1.0001; i++ {
		ticks = append(ticks, tick{s.at(float64(i) * step), write(float64(i) * step)})
	}
	return s, ticks
}

// stairs is a path of values that hold for a span each.
func stairs(edges, values []float64, x, y scale) (line, area string) {
	var b strings.Builder
	for i, v := range values {
		fmt.Fprintf(&b, "%s%.1f %.1f", map[bool]string{true: "M", false: "L"}[i == 0], x.at(edges[i]), y.at(v))
		fmt.Fprintf(&b, "L%.1f %.1f", x.at(edges[i+1]), y.at(v))
	}
	line = b.String()
	if line == "" {
		return "", ""
	}
	return line, line + fmt.Sprintf("L%.1f %.1fL%.1f %.1fZ", x.at(edges[len(values)]), y.at(0), x.at(edges[0]), y.at(0))
}

// histogram counts the calls by latency, on a logarithmic axis.
func histogram(tests []Test) chart {
	c := chart{Title: "Latency of the calls", Along: "latency", Up: "share of the calls"}
	low, high := math.Inf(1), 0.0
	for _, t := range tests {
		for _, s := range t.Result.Samples {
			low, high = min(low, max(s.Latency.Seconds(), 1e-6)), max(high, s.Latency.Seconds(), 1e-6)
		}
	}
	if high == 0 {
		return c
	}
	from, to := math.Log10(low)-0.05, math.Log10(high)+0.05
	width := (to - from) / bins
	counts, most := make([][]float64, len(tests)), 0.0
	for i, t := range tests {
		counts[i] = make([]float64, bins)
		for _, s := range t.Result.Samples {
			bin := int((math.Log10(max(s.Latency.Seconds(), 1e-6)) - from) / width)
			counts[i][min(max(bin, 0), bins-1)] += 100 / float64(len(t.Result.Samples))
		}
		for _, v := range counts[i] {
			most = max(most, v)
		}
	}
	x := scale{from, to, left, right}
	var y scale
	y, c.Y = upTo(most, bottom, top, func(v float64) string { return mark(v) + " %" })
	// Marks at 1, 2 and 5 of each power where there is room, else at fewer.
	marks := []float64{1, 2, 5}
	if to-from > 2 {
		marks = []float64{1}
	}
	for power := math.Floor(from); power <= to; power++ {
		for _, m := range marks {
			if v := power + math.Log10(m); v >= from && v <= to {
				c.X = append(c.X, tick{x.at(v), secondsMark(math.Pow(10, v))})
			}
		}
	}
	if len(c.X) < 2 {
		c.X = []tick{{x.at(from), Seconds(math.Pow(10, from))}, {x.at((from + to) / 2), Seconds(math.Pow(10, (from+to)/2))}, {x.at(to), Seconds(math.Pow(10, to))}}
	}
	edges := make([]float64, bins+1)
	for i := range edges {
		edges[i] = from + float64(i)*width
	}
	for i, t := range tests {
		if len(t.Result.Samples) == 0 {
			continue
		}
		s := series{Colour: i % colours, Name: t.Name}
		// From its first call to its last: along nothing it would cover the others.
		first := slices.IndexFunc(counts[i], positive)
		last := bins - 1
		for !positive(counts[i][last]) {
			last--
		}
		line, area := stairs(edges[first:last+2], counts[i][first:last+1], x, y)
		ground := y.at(0)
		s.Line = fmt.Sprintf("M%.1f %.1fL%sL%.1f %.1f", x.at(edges[first]), ground, strings.TrimPrefix(line, "M"), x.at(edges[last+1]), ground)
		s.Area = area
		c.Series = append(c.Series, s)
	}
	return c
}

func positive(v float64) bool { return v > 0 }

// longest is how long the longest test took, in seconds.
func longest(tests []Test) (seconds float64) {
	for _, t := range tests {
		seconds = max(seconds, t.Result.Elapsed.Seconds())
	}
	return seconds
}

// throughput counts the calls that ended, over time; failed ones are a line of their own.
func throughput(tests []Test) chart {
	c := chart{Title: "Throughput over time", Along: "time since the start", Up: "calls a second"}
	most := 0.0
	timelines := make([][]load.Slot, len(tests))
	for i, t := range tests {
		timelines[i] = t.Result.Timeline(slots)
		// The last slot is as short as chance has it.
		if n := len(timelines[i]); n > 1 && timelines[i][n-1].Width < timelines[i][0].Width/2 {
			timelines[i] = timelines[i][:n-1]
		}
		for _, s := range timelines[i] {
			most = max(most, s.Throughput())
		}
	}
	if most == 0 {
		return c
	}
	var x, y scale
	x, c.X = upTo(longest(tests), left, right, secondsMark)
	y, c.Y = upTo(most, bottom, top, mark)
	for i, t := range tests {
		edges, all, failed, any := []float64{0}, []float64{}, []float64{}, false
		for _, s := range timelines[i] {
			edges = append(edges, (s.Start + s.Width).Seconds())
			all, failed = append(all, s.Throughput()), append(failed, float64(s.Failed)/s.Width.Seconds())
			any = any || s.Failed > 0
		}
		line, area := stairs(edges, all, x, y)
		c.Series = append(c.Series, series{Colour: i % colours, Name: t.Name, Line: line, Area: area})
		if any {
			line, _ = stairs(edges, failed, x, y)
			c.Series = append(c.Series, series{Colour: i % colours, Name: t.Name + ", failed", Line: line, Dashed: true})
		}
	}
	return c
}

// latency is the median and the 95th percentile of the calls, over time.
func latency(tests []Test) chart {
	c := chart{Title: "Latency over time", Along: "time since the start", Up: "latency"}
	most := 0.0
	timelines := make([][]load.Slot, len(tests))
	for i, t := range tests {
		timelines[i] = t.Result.Timeline(slots)
		for _, s := range timelines[i] {
			if s.Ended > 0 {
				most = max(most, s.P95)
			}
		}
	}
	if most == 0 {
		return c
	}
	var x, y scale
	x, c.X = upTo(longest(tests), left, right, secondsMark)
	y, c.Y = upTo(most, bottom, top, secondsMark)
	for i, t := range tests {
		for _, p := range []struct {
			name   string
			of     func(load.Slot) float64
			dashed bool
		}{{", p50", func(s load.Slot) float64 { return s.P50 }, false}, {", p95", func(s load.Slot) float64 { return s.P95 }, true}} {
			var b strings.Builder
			pen := "M"
			for _, s := range timelines[i] {
				if s.Ended == 0 {
					continue // the line goes on to the next call
				}
				fmt.Fprintf(&b, "%s%.1f %.1f", pen, x.at((s.Start + s.Width/2).Seconds()), y.at(p.of(s)))
				if pen == "M" {
					b.WriteString("h0.1") // a lone point is seen
				}
				pen = "L"
			}
			c.Series = append(c.Series, series{Colour: i % colours, Name: t.Name + p.name, Line: b.String(), Dashed: p.dashed})
		}
	}
	return c
}
