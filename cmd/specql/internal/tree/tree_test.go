package tree

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/specql/mesh/cmd/specql/internal/terminal"
	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
)

var update = flag.Bool("update", false, "write the golden files")

func golden(t *testing.T, name string, lines []string) {
	t.Helper()
	file := filepath.Join("testdata", name+".txt")
	got := strings.Join(lines, "\n") + "\n"
	if *update {
		require.NoError(t, os.MkdirAll("testdata", 0o750))
		require.NoError(t, os.WriteFile(file, []byte(got), 0o600))
	}
	want, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Empty(t, cmp.Diff(string(want), got))
}

var start = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

func at(ms int) *timestamppb.Timestamp {
	return timestamppb.New(start.Add(time.Duration(ms) * time.Millisecond))
}

func job(path, name, kind string, status specqlv1.Status, from, to int) *specqlv1.Job {
	service, operation, _ := strings.Cut(name, ".")
	j := &specqlv1.Job{Id: path, StepPath: path, Service: service, Operation: operation, ExecutionType: kind, Status: status, Attempts: 1}
	if from >= 0 {
		j.StartedAt = at(from)
	}
	if to >= 0 {
		j.CompletedAt = at(to)
	}
	return j
}

const (
	pending   = specqlv1.Status_STATUS_PENDING
	running   = specqlv1.Status_STATUS_RUNNING
	done      = specqlv1.Status_STATUS_COMPLETED
	failed    = specqlv1.Status_STATUS_FAILED
	cancelled = specqlv1.Status_STATUS_CANCELLED
)

func sample() *specqlv1.Run {
	declined := job("steps[1].branches[1]", "stripe.create_charge", "http", failed, 300, 900)
	declined.Attempts = 3
	declined.Error = &runnerv1.Error{Code: "REMOTE_ERROR", Message: "402 the card was declined, and here is a long text that does not fit"}
	used := job("steps[0]", "orders.clean", "shell", done, 0, 250)
	used.ResourceUsage = &runnerv1.ResourceUsage{
		DurationSeconds: new(0.2512), CpuSeconds: new(0.0041), PeakMemoryMb: new(11.25), Source: "cgroup",
	}
	function := job("steps[1].branches[2].steps[1]", "images.resize", "serverless", done, 400, 450)
	function.ResourceUsage = &runnerv1.ResourceUsage{DurationSeconds: new(64.0), CostUsd: new(0.0000021)}
	return &specqlv1.Run{
		Id: "r1", Entity: "order", Action: "close", Status: running, StartedAt: at(0),
		Jobs: []*specqlv1.Job{
			used, declined,
			job("steps[1].branches[0]", "ml.classify", "docker", running, 300, -1),
			job("steps[1].branches[2].steps[0]", "bucket.get", "http", done, 300, 390), function,
			job("steps[1].branches[1].on_failure[0]", "paypal.charge", "http", done, 900, 1000),
			job("steps[1].branches[1].on_failure[0].on_success[0]", "mail.send", "http", pending, -1, -1),
			job("steps[2].else[0]", "report.pdf", "shell", cancelled, 1100, 1200),
		},
		Waiting: []*specqlv1.Step{{StepPath: "steps[3]", Kind: "await_signal", Signal: "approved"}},
	}
}

func view(width int) View {
	return View{Screen: terminal.Screen{Unicode: true}, Width: width, Now: start.Add(2 * time.Second)}
}

func TestRender(t *testing.T) {
	m := New(sample())
	golden(t, "unicode", m.Render(view(100)))
	golden(t, "narrow", m.Render(view(48)))
	ascii := view(100)
	ascii.Screen = terminal.Screen{}
	golden(t, "ascii", m.Render(ascii))
	colour := view(100)
	colour.Screen = terminal.Screen{Unicode: true, Colour: true, Live: true}
	golden(t, "colour", m.Render(colour))
}

func TestRenderForeach(t *testing.T) {
	run := &specqlv1.Run{Id: "r1", Action: "import", Status: running, StartedAt: at(0)}
	for i := range 500 {
		status := done
		switch i {
		case 400:
			status = failed
		case 450:
			status = running
		}
		run.Jobs = append(run.Jobs, job(fmt.Sprintf("steps[0].items[%d].do[0]", i), "orders.load", "http", status, i, i+1))
	}
	golden(t, "foreach", New(run).Render(view(80)))
}

func TestRenderIsAsWideAsTheView(t *testing.T) {
	run := sample()
	run.Jobs[0].Service = strings.Repeat("日本", 40)
	run.Jobs[1].StepPath = "not.a[path"
	for width := range 120 {
		for _, l := range New(run).Render(view(width)) {
			require.LessOrEqual(t, terminal.Width(l), width, "%q", l)
		}
	}
}

func TestHostileTextIsHarmless(t *testing.T) {
	run := sample()
	run.Action = "a\x1b[2J"
	run.Error = &runnerv1.Error{Code: "INTERNAL", Message: "\x1b]0;owned\x07"}
	for _, j := range run.GetJobs() {
		j.Service = "s\x1b[31m\u202e"
		j.ExecutionType = "t\r\n\x9b"
		j.StepPath += "\x1b[1A"
		j.Error = &runnerv1.Error{Code: "X\x1b[5m", Message: "line\nline\x07\x1b[2J"}
	}
	m := New(run)
	text := strings.Join(m.Render(view(200)), "") + strings.Join(Usage(m.Jobs()).Lines(terminal.Screen{}), "")
	for _, j := range m.Jobs() {
		text += Line(&specqlv1.WatchRunResponse{Event: &specqlv1.WatchRunResponse_Job{Job: j}}, start)
	}
	text += Line(&specqlv1.WatchRunResponse{Event: &specqlv1.WatchRunResponse_Run{Run: run}}, start)
	require.False(t, strings.ContainsFunc(text, func(r rune) bool { return r < 0x20 || (r >= 0x7f && r < 0xa0) || r == 0x202e }), "%q", text)
}

func TestModelFollowsARun(t *testing.T) {
	m := New(&specqlv1.Run{Id: "r1", Action: "x", Status: pending})
	for _, j := range sample().GetJobs() {
		m.Apply(&specqlv1.WatchRunResponse{Event: &specqlv1.WatchRunResponse_Job{Job: j}})
	}
	again := job("steps[0]", "orders.clean", "shell", running, 3000, -1)
	again.Id = "of the retry"
	m.Apply(&specqlv1.WatchRunResponse{Event: &specqlv1.WatchRunResponse_Job{Job: again}})
	m.Apply(&specqlv1.WatchRunResponse{Event: &specqlv1.WatchRunResponse_Run{Run: &specqlv1.Run{Id: "r1", Action: "x", Status: done}}})
	require.Len(t, m.Jobs(), 8)
	require.Equal(t, "of the retry", m.Jobs()[0].GetId())
	require.Equal(t, done, m.Run().GetStatus())
}

func TestUsage(t *testing.T) {
	table := Usage(sample().GetJobs(), [3]string{"video.transcode", "docker", "no Docker engine answers"})
	golden(t, "usage", table.Lines(terminal.Screen{Unicode: true}))
}

func TestLine(t *testing.T) {
	for _, tt := range []struct {
		event *specqlv1.WatchRunResponse
		want  string
	}{
		{&specqlv1.WatchRunResponse{Event: &specqlv1.WatchRunResponse_Job{Job: sample().GetJobs()[0]}}, "steps[0] orders.clean completed in 250 ms"},
		{&specqlv1.WatchRunResponse{Event: &specqlv1.WatchRunResponse_Job{Job: sample().GetJobs()[2]}}, "steps[1].branches[0] ml.classify running"},
		{&specqlv1.WatchRunResponse{Event: &specqlv1.WatchRunResponse_Run{Run: sample()}}, "run r1 order.close running"},
		{&specqlv1.WatchRunResponse{}, ""},
	} {
		require.Equal(t, tt.want, Line(tt.event, start))
	}
}

func TestFormatDuration(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0.0 ms", 4200 * time.Microsecond: "4.2 ms", 250 * time.Millisecond: "250 ms", 1240 * time.Millisecond: "1.24 s",
		123 * time.Second: "2m 3s", 3*time.Hour + 4*time.Minute: "3h 4m",
	} {
		require.Equal(t, want, FormatDuration(d))
	}
}
