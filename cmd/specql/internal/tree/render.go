package tree

import (
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/specql/mesh/cmd/specql/internal/terminal"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
)

// View says how a tree is drawn.
type View struct {
	Screen terminal.Screen
	// Width is the number of columns.
	Width int
	// Now is the time that running calls are measured to; it turns the spinner, too.
	Now time.Time
}

// line is one line of the tree before the columns are aligned.
type line struct {
	indent string
	mark   string
	style  terminal.Style
	label  string
	kind   string // the execution type
	took   string
	note   string
}

// Render draws the tree, one string a line, each no wider than the view.
func (m *Model) Render(v View) []string {
	lines := m.lines(v)
	labels, kinds, tooks := 0, 0, 0
	for _, l := range lines {
		labels = max(labels, terminal.Width(l.indent)+2+terminal.Width(l.label))
		kinds = max(kinds, terminal.Width(l.kind))
		tooks = max(tooks, terminal.Width(l.took))
	}
	labels = min(labels, max(20, v.Width-kinds-tooks-20))
	out := make([]string, 0, len(lines)+1)
	out = append(out, m.head(v))
	for _, l := range lines {
		out = append(out, v.line(l, labels, kinds, tooks))
	}
	return out
}

func (v View) line(l line, labels, kinds, tooks int) string {
	// Parts are cut before they are painted, so that no escape sequence is cut in two.
	left := max(0, v.Width-1)
	var b strings.Builder
	put := func(style terminal.Style, text string, width int) {
		text = terminal.Pad(terminal.Cut(text, min(width, left)), min(width, left))
		left -= terminal.Width(text)
		b.WriteString(v.Screen.Paint(style, text))
	}
	indent := terminal.Width(l.indent)
	put(terminal.Dim, l.indent, indent)
	put(l.style, l.mark, 2)
	put(terminal.Plain, l.label, max(0, labels-indent-2))
	if l.kind != "" || l.took != "" || l.note != "" {
		put(terminal.Plain, "", 2)
		put(terminal.Dim, l.kind, kinds)
		put(terminal.Plain, "", 2)
		put(terminal.Plain, terminal.PadLeft(l.took, tooks), tooks)
	}
	if l.note != "" {
		put(terminal.Plain, "", 2)
		put(l.style, l.note, terminal.Width(l.note))
	}
	return strings.TrimRight(b.String(), " ")
}

func (m *Model) head(v View) string {
	name := terminal.Clean(Name(m.run))
	state := StatusText(m.run.GetStatus())
	text := name
	if d, ok := duration(m.run.GetStartedAt(), m.run.GetCompletedAt(), v.Now); ok {
		state += "  " + FormatDuration(d)
	}
	state = terminal.Cut(state, v.Width-1)
	text = terminal.Cut(text, max(0, v.Width-3-terminal.Width(state)))
	if text == "" {
		return v.Screen.Paint(style(m.run.GetStatus()), state)
	}
	return v.Screen.Paint(terminal.Bold, text) + "  " + v.Screen.Paint(style(m.run.GetStatus()), state)
}

// Name of a run: its action, with its entity where it has one.
func Name(run *specqlv1.Run) string {
	switch {
	case run.GetEntity() != "":
		return run.GetEntity() + "." + run.GetAction()
	case run.GetAction() != "":
		return run.GetAction()
	}
	return "workflow"
}

func (m *Model) lines(v View) []line {
	var out []line
	v.children(m.build(), "", &out)
	return out
}

// most is how many iterations or branches of one step are drawn.
const most = 12

func (v View) children(n *node, indent string, out *[]line) {
	shown, left := n.children, 0
	if len(shown) > most {
		shown, left = choose(shown)
	}
	tee, corner, bar := "├─ ", "└─ ", "│  "
	if !v.Screen.Unicode {
		tee, corner, bar = "|- ", "`- ", "|  "
	}
	section := ""
	for i, c := range shown {
		last := i == len(shown)-1 && left == 0
		head, below := tee, bar
		if last {
			head, below = corner, "   "
		}
		l := v.describe(c)
		if n.job != nil && c.name == "on_failure" && section != c.name {
			l.label = "on failure: " + l.label
		}
		if c.name == "else" {
			l.label = "else: " + l.label
		}
		section = c.name
		l.indent = indent + head
		*out = append(*out, l)
		v.children(c, indent+below, out)
	}
	if left > 0 {
		*out = append(*out, line{indent: indent + corner, label: fmt.Sprintf("and %d more", left)})
	}
}

// choose takes the children that are worth a line: those at work or failed first.
func choose(all []*node) (shown []*node, left int) {
	for _, want := range []bool{true, false} {
		for _, c := range all {
			if (c.status() != specqlv1.Status_STATUS_COMPLETED) == want && len(shown) < most {
				shown = append(shown, c)
			}
		}
	}
	return shown, len(all) - len(shown)
}

func (v View) describe(n *node) line {
	status := n.status()
	l := line{mark: v.mark(status), style: style(status)}
	if n.job == nil {
		l.label = n.prefix + n.label()
		if w := n.waiting; w != nil {
			l.label = "waiting"
			if w.GetSignal() != "" {
				l.label = terminal.Clean("waiting for the signal " + w.GetSignal())
			}
			if w.GetUntil() != nil {
				l.note = "until " + w.GetUntil().AsTime().Local().Format(time.DateTime)
			}
		}
		return l
	}
	j := n.job
	l.label = terminal.Clean(n.prefix + j.GetService() + "." + j.GetOperation())
	l.kind = terminal.Clean(j.GetExecutionType())
	if d, ok := duration(j.GetStartedAt(), j.GetCompletedAt(), v.Now); ok {
		l.took = FormatDuration(d)
	}
	var notes []string
	if j.GetAttempts() > 1 {
		notes = append(notes, fmt.Sprintf("%d attempts", j.GetAttempts()))
	}
	if e := j.GetError(); e != nil {
		notes = append(notes, terminal.Clean(e.GetCode()+": "+e.GetMessage()))
	}
	l.note = strings.Join(notes, ", ")
	return l
}

// label of a step that is known only from what stands in it.
func (n *node) label() string {
	switch n.name {
	case iteration:
		return fmt.Sprintf("#%d", n.index+1)
	case "branches":
		return fmt.Sprintf("branch %d", n.index+1)
	}
	for _, c := range n.children {
		switch c.name {
		case "branches":
			return "parallel"
		case "then", "else":
			return "if"
		case iteration:
			return "foreach"
		}
	}
	return terminal.Clean(n.name)
}

func (v View) mark(s specqlv1.Status) string {
	if !v.Screen.Unicode {
		return map[specqlv1.Status]string{
			specqlv1.Status_STATUS_PENDING: ".", specqlv1.Status_STATUS_RUNNING: ">", specqlv1.Status_STATUS_COMPLETED: "+",
			specqlv1.Status_STATUS_FAILED: "x", specqlv1.Status_STATUS_CANCELLED: "-",
		}[s]
	}
	switch s {
	case specqlv1.Status_STATUS_PENDING:
		return "○"
	case specqlv1.Status_STATUS_RUNNING:
		if !v.Screen.Live {
			return "●"
		}
		frames := []rune("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏")
		return string(frames[int(v.Now.UnixMilli()/100)%len(frames)])
	case specqlv1.Status_STATUS_COMPLETED:
		return "✓"
	case specqlv1.Status_STATUS_FAILED:
		return "✗"
	case specqlv1.Status_STATUS_CANCELLED:
		return "⊘"
	case specqlv1.Status_STATUS_UNSPECIFIED:
	}
	return " "
}

func style(s specqlv1.Status) terminal.Style {
	switch s {
	case specqlv1.Status_STATUS_RUNNING:
		return terminal.Cyan
	case specqlv1.Status_STATUS_COMPLETED:
		return terminal.Green
	case specqlv1.Status_STATUS_FAILED:
		return terminal.Red
	case specqlv1.Status_STATUS_CANCELLED:
		return terminal.Yellow
	case specqlv1.Status_STATUS_PENDING, specqlv1.Status_STATUS_UNSPECIFIED:
	}
	return terminal.Dim
}

// StatusText is a state as people and scripts read it, such as completed.
func StatusText(s specqlv1.Status) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "STATUS_"))
}

func duration(started, ended *timestamppb.Timestamp, now time.Time) (time.Duration, bool) {
	if started == nil {
		return 0, false
	}
	if ended != nil {
		now = ended.AsTime()
	}
	return max(0, now.Sub(started.AsTime())), true
}

// FormatDuration writes a duration with three figures at most: 4.2 ms, 1.24 s, 2m 3s.
func FormatDuration(d time.Duration) string {
	switch {
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < time.Minute:
		return fmt.Sprintf("%.2f s", d.Seconds())
	case d < time.Hour:
		return fmt.Sprintf("%dm %ds", int(d.Minutes()), int(d.Seconds())%60)
	}
	return fmt.Sprintf("%dh %dm", int(d.Hours()), int(d.Minutes())%60)
}

// Line says one change in one line, for outputs that are not terminals. It is empty for a
// change that says nothing new.
func Line(e *specqlv1.WatchRunResponse, now time.Time) string {
	switch event := e.GetEvent().(type) {
	case *specqlv1.WatchRunResponse_Run:
		return stateLine("run "+event.Run.GetId(), Name(event.Run), event.Run.GetStatus(), event.Run.GetStartedAt(), event.Run.GetCompletedAt(), now, errorText(event.Run))
	case *specqlv1.WatchRunResponse_Job:
		j := event.Job
		return stateLine(j.GetStepPath(), j.GetService()+"."+j.GetOperation(), j.GetStatus(), j.GetStartedAt(), j.GetCompletedAt(), now, errorText(j))
	}
	return ""
}

func stateLine(place, name string, s specqlv1.Status, started, ended *timestamppb.Timestamp, now time.Time, failure string) string {
	text := place + " " + name + " " + StatusText(s)
	if d, ok := duration(started, ended, now); ok && ended != nil {
		text += " in " + FormatDuration(d)
	}
	if failure != "" {
		text += ": " + failure
	}
	return terminal.Clean(text)
}
