package tree

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/specql/mesh/cmd/specql/internal/terminal"
	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
)

// Absent stands for a figure that was not measured.
const Absent = "–"

// Table is text in columns.
type Table struct {
	Head []string
	Rows [][]string
	// Right says which columns are figures, aligned on the right.
	Right map[int]bool
}

// Lines writes a table; cells are made harmless.
func (t Table) Lines(screen terminal.Screen) []string {
	widths := make([]int, len(t.Head))
	clean := func(row []string) []string {
		out := make([]string, len(t.Head))
		for i := range out {
			if i < len(row) {
				out[i] = terminal.Clean(row[i])
			}
			if !screen.Unicode && out[i] == Absent {
				out[i] = "-"
			}
			widths[i] = max(widths[i], terminal.Width(out[i]))
		}
		return out
	}
	rows := [][]string{clean(t.Head)}
	for _, r := range t.Rows {
		rows = append(rows, clean(r))
	}
	lines := make([]string, 0, len(rows))
	for n, row := range rows {
		for i, cell := range row {
			if t.Right[i] {
				row[i] = terminal.PadLeft(cell, widths[i])
			} else {
				row[i] = terminal.Pad(cell, widths[i])
			}
		}
		text := strings.TrimRight(strings.Join(row, "  "), " ")
		if n == 0 {
			text = screen.Paint(terminal.Bold, text)
		}
		lines = append(lines, text)
	}
	return lines
}

// Usage is the table of what each call of a run used. skipped are rows for steps that did
// not run: the step, its type and why.
func Usage(jobs []*specqlv1.Job, skipped ...[3]string) Table {
	t := Table{
		Head:  []string{"STEP", "TYPE", "STATUS", "ATTEMPTS", "DURATION", "CPU", "PEAK MEMORY", "COST"},
		Right: map[int]bool{3: true, 4: true, 5: true, 6: true, 7: true},
	}
	for _, j := range jobs {
		u := j.GetResourceUsage()
		if u == nil {
			u = &runnerv1.ResourceUsage{}
		}
		t.Rows = append(t.Rows, []string{
			stepName(j), j.GetExecutionType(), StatusText(j.GetStatus()),
			strconv.Itoa(int(j.GetAttempts())), seconds(u.DurationSeconds), seconds(u.CpuSeconds), megabytes(u.PeakMemoryMb), dollars(u.CostUsd),
		})
	}
	for _, s := range skipped {
		t.Rows = append(t.Rows, []string{s[0], s[1], "skipped: " + s[2], Absent, Absent, Absent, Absent, Absent})
	}
	return t
}

// stepName is a call's name; a fallback is marked.
func stepName(j *specqlv1.Job) string {
	name := j.GetService() + "." + j.GetOperation()
	if path := parse(j.GetStepPath()); path[len(path)-1].name == "on_failure" {
		name += " (on failure)"
	}
	return name
}

func seconds(v *float64) string {
	if v == nil {
		return Absent
	}
	return FormatDuration(time.Duration(*v * float64(time.Second)))
}

func megabytes(v *float64) string {
	if v == nil {
		return Absent
	}
	return fmt.Sprintf("%.1f MiB", *v)
}

func dollars(v *float64) string {
	if v == nil {
		return Absent
	}
	return fmt.Sprintf("$%.7f", *v)
}

// errorText of a run or a job, empty where it has no error.
func errorText(m interface{ GetError() *runnerv1.Error }) string {
	if e := m.GetError(); e != nil {
		return e.GetCode() + ": " + e.GetMessage()
	}
	return ""
}
