package command

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/specql/mesh/cmd/specql/internal/jsonform"
	"github.com/specql/mesh/cmd/specql/internal/load"
	"github.com/specql/mesh/cmd/specql/internal/report"
	"github.com/specql/mesh/cmd/specql/internal/terminal"
	"github.com/specql/mesh/cmd/specql/internal/tree"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/client"
	"github.com/specql/mesh/pkg/fault"
)

// Bounds of profiles.
const (
	defaultProfiled = 20
	maxProfiled     = 10_000
	// profileWait is how long a call may take at most: the longest that the server waits.
	profileWait = time.Hour
)

// phaseMeanings are the phases that this program knows, in the order in which a call comes to them.
var phaseMeanings = []struct{ name, meaning string }{
	{phaseClient, "between client and orchestrator, and in the client"},
	{"orchestrator", "the orchestrator's own work: the request, the plan, the input"},
	{"journal", "waiting until what happens is durable"},
	{"queue", "waiting for a runner with room"},
	{"dispatch", "between orchestrator and runner"},
	{"pause", "between two attempts"},
	{"runner", "the runner's own work"},
	{"policy", "policy checks"},
	{"image", "finding or pulling the image"},
	{"sandbox", "making the sandbox or the container"},
	{"dns", "looking the name up"},
	{"connect", "connecting, or waiting for a connection that is there"},
	{"tls", "the TLS handshake"},
	{"send", "sending the request"},
	{"first_byte", "waiting for the answer's first byte"},
	{"body", "reading the answer's body"},
	{"remote", "the program, container or function at work"},
	{"cleanup", "ending and removing what was started"},
	{"output_check", "checking the output"},
	{"answer", "making the answer"},
	{phaseUnaccounted, "nobody measured it"},
}

const (
	phaseClient      = "client"
	phaseUnaccounted = "unaccounted"
)

func meaning(phase string) string {
	for _, m := range phaseMeanings {
		if m.name == phase {
			return m.meaning
		}
	}
	return ""
}

func place(phase string) int {
	for i, m := range phaseMeanings {
		if m.name == phase {
			return i
		}
	}
	return len(phaseMeanings) // those of custom runners come last
}

// profiled is a call and where its time went, in seconds.
type profiled struct {
	total  float64
	phases map[string]float64
}

// newProfiled divides the client's time of a call. What the server does not say, and what its
// clocks say beyond that time, shows as unaccounted.
func newProfiled(total time.Duration, p *specqlv1.Profile) profiled {
	out := profiled{total: total.Seconds(), phases: map[string]float64{}}
	sum := 0.0
	for _, phase := range p.GetPhases() {
		v := phase.GetDuration().AsDuration().Seconds()
		out.phases[phase.GetName()] += v
		sum += v
	}
	served := p.GetTotal().AsDuration().Seconds()
	out.phases[phaseClient] = max(out.total-served, 0)
	out.phases[phaseUnaccounted] = out.total - out.phases[phaseClient] - sum
	if math.Abs(out.phases[phaseUnaccounted]) < 1e-9 { // nanoseconds as fractions of a second
		out.phases[phaseUnaccounted] = 0
	}
	return out
}

// profile is what the calls of one operation showed.
type profile struct {
	target *target
	calls  []profiled
	// without are calls of which the server gave no profile.
	without int
	latency *load.Result
}

func (p *profile) total() []float64 {
	out := make([]float64, 0, len(p.calls))
	for _, c := range p.calls {
		out = append(out, c.total)
	}
	slices.Sort(out)
	return out
}

// phase gives a phase's times over all calls, 0 where a call had none.
func (p *profile) phase(name string) []float64 {
	out := make([]float64, 0, len(p.calls))
	for _, c := range p.calls {
		out = append(out, c.phases[name])
	}
	slices.Sort(out)
	return out
}

// phases are the names of all phases that took time, in the order of a call.
func (p *profile) phases() []string {
	seen := map[string]bool{}
	var names []string
	for _, c := range p.calls {
		for name := range c.phases {
			if !seen[name] {
				seen[name] = true
				names = append(names, name)
			}
		}
	}
	slices.SortFunc(names, func(a, b string) int {
		if n := place(a) - place(b); n != 0 {
			return n
		}
		return bytes.Compare([]byte(a), []byte(b))
	})
	return names
}

func newProfile(s IO) *cobra.Command {
	l := loadFlags{concurrency: 1}
	cmd := &cobra.Command{
		Use:   "profile --service S [--operation O]",
		Short: "Tells where the time of a call goes, phase by phase",
		Long: "Calls an operation some times, one call after the other, each in a run of its own, and tells where their time went:\n" +
			"in the client and on the way, in the orchestrator, its journal and its queue, in the runner, its policy checks and its\n" +
			"sandbox, and in what is called. The calls are real. The phases of a call follow one another and add up to what the\n" +
			"client waited; what nobody measured is shown as unaccounted. Exit status 1 if no call could be measured.",
		Example: "  specql profile --service stripe --operation get_charge\n" +
			"  specql profile --service csv_processor --requests 50 --input @input.json --report profile.html -o json",
		Args: cobra.NoArgs,
	}
	l.registerTarget(cmd.Flags())
	cmd.Flags().IntVar(&l.requests, "requests", defaultProfiled, "make so many calls")
	l.registerCalls(cmd.Flags())
	return withClient(s, cmd, func(cmd *cobra.Command, c *client.Client, _ *connection, out *output, _ []string) error {
		if l.requests < 1 || l.requests > maxProfiled {
			return misuse("--requests must be between 1 and %d", maxProfiled)
		}
		l.duration = time.Second // no flag of this command
		t, err := s.prepare(cmd.Context(), c, &l)
		if err != nil {
			return err
		}
		p, err := s.profile(cmd.Context(), c, &l, t)
		if err != nil {
			return err
		}
		return s.printProfile(out, &l, p)
	})
}

// profile calls a target and asks each call where its time went.
func (s IO) profile(ctx context.Context, c *client.Client, l *loadFlags, t *target) (*profile, error) {
	s.say("calling %s (%s): %s", terminal.Clean(t.name()), terminal.Clean(t.service.GetExecutionType()), count(l.requests, "call"))
	p := &profile{target: t}
	var err error
	p.latency, err = s.callAgain(ctx, l, t, func(ctx context.Context, a client.Action) (*client.Run, error) {
		req, err := a.Request()
		if err != nil {
			return nil, err
		}
		req.Wait, req.Profile, req.CorrelationId = durationpb.New(profileWait), true, "profile"
		began := time.Now()
		res, err := c.Orchestrator().ExecuteAction(ctx, req)
		took := time.Since(began)
		if err != nil {
			return nil, fault.FromError(err)
		}
		if res.GetProfile() == nil {
			p.without++
		} else {
			p.calls = append(p.calls, newProfiled(took, res.GetProfile())) // one call at a time
		}
		return res.GetRun(), client.Outcome(res.GetRun())
	})
	return p, err
}

func (s IO) printProfile(out *output, l *loadFlags, p *profile) error {
	if l.report != "" {
		var b bytes.Buffer
		title := "specql profile " + p.target.name()
		test := report.Test{
			Name: p.target.name(), Service: p.target.service.GetName(), Operation: p.target.operation.GetName(),
			ExecutionType: p.target.service.GetExecutionType(), Load: "one after the other", Result: p.latency, Phases: p.report(),
		}
		if err := report.Write(&b, title, time.Now(), []report.Test{test}); err != nil {
			return err
		}
		if err := writeFile(l.report, b.Bytes(), 0o644); err != nil {
			return err
		}
		s.say("wrote %s", terminal.Clean(l.report))
	}
	var err error
	if out.json() {
		err = s.print(p.document())
	} else {
		err = s.lines(p.lines(s.out()), "")
	}
	if err == nil && len(p.calls) == 0 {
		return errShown
	}
	return err
}

func (p *profile) report() []report.Phase {
	total := load.Mean(p.total())
	var out []report.Phase
	for _, name := range p.phases() {
		v := p.phase(name)
		out = append(out, report.Phase{Name: name, Meaning: meaning(name), Share: load.Mean(v) / total, Mean: load.Mean(v), P95: load.Percentile(v, 0.95), Max: load.Percentile(v, 1)})
	}
	return out
}

func (p *profile) document() jsonform.Object {
	phases := []jsonform.Object{}
	total := load.Mean(p.total())
	for _, name := range p.phases() {
		v := p.phase(name)
		phases = append(phases, append(jsonform.Object{
			{Name: "name", Value: name}, {Name: "share", Value: figure(load.Mean(v) / total)},
		}, spreadDocument(v)...))
	}
	failures := make([]jsonform.Object, 0, len(p.latency.Failures))
	for _, f := range p.latency.Failures {
		failures = append(failures, jsonform.Object{{Name: "code", Value: f.Code}, {Name: "count", Value: f.Count}, {Name: "message", Value: f.Message}})
	}
	return jsonform.Object{
		{Name: "service", Value: p.target.service.GetName()},
		{Name: "operation", Value: p.target.operation.GetName()},
		{Name: "executionType", Value: p.target.service.GetExecutionType()},
		{Name: "requests", Value: len(p.latency.Samples)},
		{Name: "profiled", Value: len(p.calls)},
		{Name: "failed", Value: p.latency.Failed()},
		{Name: "interrupted", Value: p.latency.Interrupted},
		{Name: "totalSeconds", Value: spreadDocument(p.total())},
		{Name: "phases", Value: phases},
		{Name: "errors", Value: failures},
	}
}

func (p *profile) lines(screen terminal.Screen) []string {
	total := p.total()
	table := tree.Table{Head: []string{"PHASE", "SHARE", "MEAN", "P50", "P95", "MAX", "IS"}, Right: map[int]bool{1: true, 2: true, 3: true, 4: true, 5: true}}
	row := func(name, share string, v []float64, what string) {
		table.Rows = append(table.Rows, []string{
			name, share, report.Seconds(load.Mean(v)), report.Seconds(load.Percentile(v, 0.50)), report.Seconds(load.Percentile(v, 0.95)), report.Seconds(load.Percentile(v, 1)), what,
		})
	}
	for _, name := range p.phases() {
		v := p.phase(name)
		row(terminal.Clean(name), fmt.Sprintf("%.1f%%", 100*load.Mean(v)/load.Mean(total)), v, meaning(name))
	}
	row("total", "100%", total, "what the client waited")
	lines := table.Lines(screen)
	for _, f := range p.latency.Failures {
		lines = append(lines, "", fmt.Sprintf("%s failed with %s, the first one: %s", count(f.Count, "call"), f.Code, terminal.Cut(terminal.Clean(f.Message), 200)))
	}
	if p.without > 0 {
		lines = append(lines, "", fmt.Sprintf("%s told nothing of their time: their runs waited for a place, or another orchestrator walked them", count(p.without, "call")))
	}
	if p.latency.Interrupted {
		lines = append(lines, "", terminal.Clean(p.target.name())+": the calls were ended early")
	}
	return lines
}
