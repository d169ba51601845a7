// Package report writes what load tests measured as one HTML file with plots, which loads nothing
// from anywhere.
package report

import (
	_ "embed"
	"fmt"
	"html/template"
	"io"
	"math"
	"strings"
	"time"

	"github.com/specql/mesh/cmd/specql/internal/load"
)

// Test is a load test and what it measured.
type Test struct {
	// Name is what was called, such as stripe.create_charge.
	Name                              string
	Service, Operation, ExecutionType string
	// Load says how it was called, for people.
	Load   string
	Result *load.Result
	// Phases say where the time went; empty for a test that did not ask.
	Phases []Phase
}

// Phase is a part of the calls' time; its times are in seconds.
type Phase struct {
	Name, Meaning         string
	Share, Mean, P95, Max float64
}

// phase is one in the table.
type phase struct {
	Colour                  int
	Name, Meaning           string
	Offset, Width           float64 // of 100
	Percent, Mean, P95, Max string
}

// phases puts the shares side by side.
func phases(t Test) []phase {
	var out []phase
	at := 0.0
	for i, p := range t.Phases {
		width := 100 * min(max(p.Share, 0), 1)
		out = append(out, phase{
			Colour: i % colours, Name: p.Name, Meaning: p.Meaning, Offset: at, Width: width, Percent: number(100*p.Share) + " %",
			Mean: Seconds(p.Mean), P95: Seconds(p.P95), Max: Seconds(p.Max),
		})
		at += width
	}
	return out
}

//go:embed report.html.tmpl
var page string

var document = template.Must(template.New("report").Parse(page))

// Write writes the report of one test, or of several side by side.
func Write(w io.Writer, title string, at time.Time, tests []Test) error {
	d := struct {
		Title, At string
		Rows      []row
		Charts    []chart
		Usage     []usage
		Failures  []failure
		Phases    []phase
	}{Title: title, At: at.UTC().Format("2006-01-02 15:04:05 UTC")}
	for i, t := range tests {
		d.Phases = append(d.Phases, phases(t)...)
		d.Rows = append(d.Rows, newRow(i, t))
		for _, f := range t.Result.Failures {
			d.Failures = append(d.Failures, failure{Test: t.Name, Failure: f})
		}
	}
	d.Charts = []chart{histogram(tests), throughput(tests), latency(tests)}
	d.Usage = usages(tests)
	if err := document.Execute(w, d); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	return nil
}

// row is a test in the table.
type row struct {
	Colour                                    int
	Name, ExecutionType, Load                 string
	Requests, Failed, Unsent                  int
	Interrupted                               bool
	Throughput, P50, P90, P95, P99, Max, Mean string
}

type failure struct {
	Test string
	load.Failure
}

// colours is how many the style sheet has.
const colours = 8

func newRow(i int, t Test) row {
	l := t.Result.Latencies()
	at := func(p float64) string { return Seconds(load.Percentile(l, p)) }
	return row{
		Colour: i % colours, Name: t.Name, ExecutionType: t.ExecutionType, Load: t.Load,
		Requests: len(t.Result.Samples), Failed: t.Result.Failed(), Unsent: t.Result.Unsent, Interrupted: t.Result.Interrupted, Throughput: number(t.Result.Throughput()) + "/s",
		P50: at(0.50), P90: at(0.90), P95: at(0.95), P99: at(0.99), Max: at(1), Mean: Seconds(load.Mean(l)),
	}
}

// Seconds writes a length of time in a unit that suits it.
func Seconds(v float64) string {
	switch {
	case math.IsNaN(v):
		return "–"
	case v == 0:
		return "0 s"
	case v < 1e-3:
		return number(v*1e6) + " µs"
	case v < 1:
		return number(v*1e3) + " ms"
	case v < 120:
		return number(v) + " s"
	}
	return number(v/60) + " min"
}

// secondsMark is a round length of time, as [Seconds] without the zeros behind the point.
func secondsMark(v float64) string {
	n, unit, _ := strings.Cut(Seconds(v), " ")
	return trim(n) + " " + unit
}

// mark is a round number.
func mark(v float64) string { return trim(number(v)) }

func trim(n string) string {
	if strings.Contains(n, ".") && !strings.Contains(n, "e") {
		return strings.TrimRight(strings.TrimRight(n, "0"), ".")
	}
	return n
}

// number has three digits that count.
func number(v float64) string {
	switch a := math.Abs(v); {
	case math.IsNaN(v):
		return "–"
	case a >= 100 || a == 0:
		return fmt.Sprintf("%.0f", v)
	case a >= 10:
		return fmt.Sprintf("%.1f", v)
	case a >= 1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3g", v)
}

// usage is a figure of all tests, as bars.
type usage struct {
	Name string
	Bars []bar
}

type bar struct {
	Colour                   int
	Test, Mean, P95, Max     string
	MeanWidth, P95Width, Top float64 // of 100
	Samples                  int
}

// Figures are the measured figures that are shown, with their units.
var Figures = []struct {
	Name, Title string
	Write       func(float64) string
}{
	{"durationSeconds", "Time in the runner", Seconds},
	{"cpuSeconds", "Processor time", Seconds},
	{"peakMemoryMb", "Peak memory", mebibytes},
	{"diskReadMb", "Read from disk", mebibytes},
	{"diskWriteMb", "Written to disk", mebibytes},
	{"networkRxMb", "Received", mebibytes},
	{"networkTxMb", "Sent", mebibytes},
	{"requestBytes", "Request body", bytesOf},
	{"responseBytes", "Response body", bytesOf},
	{"billedDurationMs", "Billed", unit("ms")},
	{"costUsd", "Cost", unit("USD")},
}

func mebibytes(v float64) string { return bytesOf(v * (1 << 20)) }

// bytesOf writes a size in a unit that suits it.
func bytesOf(v float64) string {
	switch {
	case math.Abs(v) >= 1<<20:
		return number(v/(1<<20)) + " MiB"
	case math.Abs(v) >= 1<<10:
		return number(v/(1<<10)) + " KiB"
	}
	return mark(v) + " bytes"
}

func unit(name string) func(float64) string {
	return func(v float64) string { return number(v) + " " + name }
}

func usages(tests []Test) []usage {
	var out []usage
	for _, f := range Figures {
		u := usage{Name: f.Title}
		most := 0.0
		for _, t := range tests {
			if v := t.Result.Figure(f.Name); len(v) > 0 {
				most = max(most, v[len(v)-1])
			}
		}
		if most == 0 {
			continue // nobody measured it, or all measured nothing
		}
		for i, t := range tests {
			v := t.Result.Figure(f.Name)
			if len(v) == 0 {
				u.Bars = append(u.Bars, bar{Colour: i % colours, Test: t.Name, Mean: "not measured"})
				continue
			}
			mean, p95, top := load.Mean(v), load.Percentile(v, 0.95), v[len(v)-1]
			u.Bars = append(u.Bars, bar{
				Colour: i % colours, Test: t.Name, Samples: len(v), Mean: f.Write(mean), P95: f.Write(p95), Max: f.Write(top),
				MeanWidth: round(100 * mean / most), P95Width: round(100 * p95 / most), Top: round(100 * top / most),
			})
		}
		out = append(out, u)
	}
	return out
}
