package command

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/specql/mesh/cmd/specql/internal/jsonform"
	"github.com/specql/mesh/cmd/specql/internal/load"
	"github.com/specql/mesh/cmd/specql/internal/report"
	"github.com/specql/mesh/cmd/specql/internal/terminal"
	"github.com/specql/mesh/cmd/specql/internal/tree"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/client"
	"github.com/specql/mesh/pkg/fault"
)

// Bounds of load tests.
const (
	maxConcurrency  = 5000
	maxRate         = 100_000
	defaultDuration = 10 * time.Second
	// loadSlots is how many spans of time -o json has.
	loadSlots = 60
)

// loadFlags are what load-test and benchmark share.
type loadFlags struct {
	flags       *pflag.FlagSet
	concurrency int
	requests    int
	duration    time.Duration
	rate        float64
	input       string
	report      string
	allowCost   bool
	// service and operation are what load-test and profile call.
	service, operation string
}

func (l *loadFlags) register(fs *pflag.FlagSet) {
	fs.IntVar(&l.concurrency, "concurrency", 10, "calls in flight at most")
	fs.IntVar(&l.requests, "requests", 0, "make so many calls")
	fs.DurationVar(&l.duration, "duration", defaultDuration, "begin calls for so long, such as 30s or 5m; not together with --requests")
	fs.Float64Var(&l.rate, "rate", 0, "begin so many calls a second, whatever becomes of them; latencies count from the time at which a call was to begin")
	l.registerCalls(fs)
}

// registerCalls registers the flags of every command that calls an operation again and again.
func (l *loadFlags) registerCalls(fs *pflag.FlagSet) {
	l.flags = fs
	fs.StringVar(&l.input, "input", "", "the calls' input: JSON, @FILE, or - for standard input; without it an example is made from the operation's input_schema")
	fs.StringVar(&l.report, "report", "", "write a report with plots to this HTML file")
	fs.BoolVar(&l.allowCost, "allow-cost", false, "do not warn of calls that cost money")
}

// registerTarget registers the flags of commands that call one operation.
func (l *loadFlags) registerTarget(fs *pflag.FlagSet) {
	fs.StringVar(&l.service, "service", "", "the service to call")
	fs.StringVar(&l.operation, "operation", "", "the operation to call; the only one if the service has one")
}

func (l *loadFlags) check() error {
	switch {
	case l.concurrency < 1 || l.concurrency > maxConcurrency:
		return misuse("--concurrency must be between 1 and %d", maxConcurrency)
	case l.flags.Changed("requests") && l.flags.Changed("duration"):
		return misuse("--requests and --duration both end the test: give one of them")
	case l.flags.Changed("requests") && (l.requests < 1 || l.requests > load.MaxRequests):
		return misuse("--requests must be between 1 and %d", load.MaxRequests)
	case l.duration <= 0 || l.duration > 24*time.Hour:
		return misuse("--duration must be above 0, and 24h at most")
	case l.flags.Changed("rate") && !(l.rate > 0 && l.rate <= maxRate):
		return misuse("--rate must be above 0, and %d a second at most", maxRate)
	}
	if l.report != "" {
		// Better now than after the test.
		if info, err := os.Stat(l.report); err == nil && info.IsDir() {
			return misuse("--report: %s is a folder; name a file", l.report)
		}
		if err := writable(l.report); err != nil {
			return misuse("--report: %w", err)
		}
	}
	if l.flags.Changed("requests") {
		l.duration = 0
	}
	return nil
}

// writable says why a file cannot be written next to others of its folder.
func writable(name string) error {
	f, err := os.CreateTemp(filepath.Dir(name), ".specql-report.*")
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), os.Remove(f.Name()))
}

// describe says how the calls are made.
func (l *loadFlags) describe() string {
	how := count(l.concurrency, "caller")
	if l.rate > 0 {
		how = fmt.Sprintf("%g calls a second, %d in flight at most", l.rate, l.concurrency)
	}
	if l.requests > 0 {
		return how + ", " + count(l.requests, "call")
	}
	return how + ", for " + l.duration.String()
}

// target is an operation to be called.
type target struct {
	service   *specqlv1.ServiceInfo
	operation *specqlv1.OperationInfo
	input     json.RawMessage
	generated bool
}

func (t *target) name() string { return t.service.GetName() + "." + t.operation.GetName() }

// findService finds a service of the registry in force.
func findService(services []*specqlv1.ServiceInfo, name string) (*specqlv1.ServiceInfo, error) {
	names := make([]string, 0, len(services))
	for _, s := range services {
		if strings.EqualFold(s.GetName(), name) {
			return s, nil
		}
		names = append(names, s.GetName())
	}
	if len(names) == 0 {
		return nil, misuse("there is no service %q: the registry in force has none", name)
	}
	return nil, misuse("there is no service %q; the registry in force has: %s", name, strings.Join(names, ", "))
}

// splitTarget divides SERVICE.OPERATION. The names of services may hold dots, too: the last one is before the operation.
func splitTarget(services []*specqlv1.ServiceInfo, name string) (service, operation string) {
	if _, err := findService(services, name); err == nil {
		return name, ""
	}
	if i := strings.LastIndexByte(name, '.'); i > 0 {
		return name[:i], name[i+1:]
	}
	return name, ""
}

// findTarget finds an operation of a service, the only one where none is named, and its input.
// How says how this command names an operation.
func findTarget(services []*specqlv1.ServiceInfo, service, operation, how string, input json.RawMessage) (*target, error) {
	s, err := findService(services, service)
	if err != nil {
		return nil, err
	}
	t := &target{service: s, input: input}
	names := make([]string, 0, len(s.GetOperations()))
	for _, o := range s.GetOperations() {
		names = append(names, o.GetName())
		if strings.EqualFold(o.GetName(), operation) || operation == "" && len(s.GetOperations()) == 1 {
			t.operation = o
		}
	}
	switch {
	case t.operation != nil:
	case len(names) == 0:
		return nil, misuse("the service %s has no operations", s.GetName())
	case operation == "":
		return nil, misuse("the service %s has several operations: say which %s: %s", s.GetName(), how, strings.Join(names, ", "))
	default:
		return nil, misuse("the service %s has no operation %q; it has: %s", s.GetName(), operation, strings.Join(names, ", "))
	}
	if t.input == nil {
		t.generated = true
		if t.input, err = json.Marshal(load.Example(t.operation.GetInputSchema().AsMap())); err != nil {
			return nil, fmt.Errorf("make an example of the input: %w", err)
		}
	}
	return t, nil
}

// workflow makes the call, with the run's input as its own.
func (t *target) workflow() (string, error) {
	raw, err := json.Marshal(map[string]any{"actions": []any{map[string]any{"call_service": map[string]any{
		"service": t.service.GetName(), "operation": t.operation.GetName(), "input": "$input",
	}}}})
	return string(raw), err // JSON is YAML
}

// prepare checks the flags, and finds what they say is to be called in the registry in force.
func (s IO) prepare(ctx context.Context, c *client.Client, l *loadFlags) (*target, error) {
	if l.service == "" {
		return nil, misuse("--service is needed: the service to call")
	}
	services, input, err := s.prepareCalls(ctx, c, l)
	if err != nil {
		return nil, err
	}
	if s, o := splitTarget(services, l.service); o != "" && l.operation == "" {
		if _, err := findService(services, s); err == nil {
			return nil, misuse("there is no service %q; write --service %s --operation %s", l.service, s, o)
		}
	}
	t, err := findTarget(services, l.service, l.operation, "with --operation", input)
	if err != nil {
		return nil, err
	}
	s.warnOfCost(l, t)
	return t, nil
}

// prepareCalls checks the flags, reads the input, and gives the services of the registry in force.
func (s IO) prepareCalls(ctx context.Context, c *client.Client, l *loadFlags) ([]*specqlv1.ServiceInfo, json.RawMessage, error) {
	if err := l.check(); err != nil {
		return nil, nil, err
	}
	input, err := s.readJSON("input", l.input)
	if err != nil {
		return nil, nil, err
	}
	services, err := registryServices(ctx, c)
	return services, input, err
}

// loadTest calls a target and shows how far it is.
func (s IO) loadTest(ctx context.Context, c *client.Client, l *loadFlags, t *target) (*load.Result, error) {
	return s.callAgain(ctx, l, t, c.ExecuteAndWait)
}

// callAgain calls a target in the way that is given.
func (s IO) callAgain(ctx context.Context, l *loadFlags, t *target, execute func(context.Context, client.Action) (*client.Run, error)) (*load.Result, error) {
	workflow, err := t.workflow()
	if err != nil {
		return nil, err
	}
	action := client.Action{Workflow: workflow, Input: t.input, CorrelationID: "load-test"}
	var fine atomic.Bool // a call was taken
	call := func(ctx context.Context) (load.Outcome, error) {
		run, err := execute(ctx, action)
		var out load.Outcome
		if jobs := run.GetJobs(); len(jobs) > 0 {
			out.Usage = jobs[0].GetResourceUsage()
		}
		if err == nil {
			fine.Store(true)
			return out, nil
		}
		f := fault.From(err)
		out.Code, out.Message = string(f.Code), f.Message
		if f.Code == fault.Validation && !fine.Load() {
			// All calls are the same: none would be taken.
			message := t.name() + ": " + f.Message
			if t.generated {
				message += fmt.Sprintf(" (the input %s was made from the input_schema; --input gives another)", terminal.Cut(string(t.input), 200))
			}
			return out, fault.New(fault.Validation, "%s", message)
		}
		return out, nil
	}
	calls, cut := context.WithCancel(ctx)
	defer cut()
	begin, stop := context.WithCancel(ctx)
	defer stop()
	interrupts := make(chan os.Signal, 2)
	signal.Notify(interrupts, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(interrupts)

	type end struct {
		result *load.Result
		err    error
	}
	p := &load.Progress{}
	ended := make(chan end, 1)
	go func() {
		r, err := load.Run(calls, begin, load.Options{Concurrency: l.concurrency, Requests: l.requests, Duration: l.duration, Rate: l.rate, Call: call}, p)
		ended <- end{r, err}
	}()
	var bar *terminal.Progress
	if screen := s.err(); screen.Live {
		bar = terminal.NewProgress(s.Err, screen, l.whole())
		defer bar.End()
	}
	ticker := time.NewTicker(frame)
	defer ticker.Stop()
	for {
		select {
		case e := <-ended:
			return e.result, e.err
		case <-ticker.C:
			if bar != nil {
				l.draw(bar, p, t.name())
			}
		case <-interrupts:
			if begin.Err() == nil {
				s.say("no more calls are begun; waiting for those in flight. Ctrl-C again leaves them")
				stop()
			} else {
				cut()
			}
		}
	}
}

// draw shows how far a test is.
func (l *loadFlags) draw(bar *terminal.Progress, p *load.Progress, name string) {
	ended, failed, elapsed := p.Now()
	done := elapsed.Milliseconds()
	if l.requests > 0 {
		done = int64(ended)
	}
	text := fmt.Sprintf("%s  %d ended", terminal.Clean(name), ended)
	if s := elapsed.Seconds(); s > 0 {
		text += fmt.Sprintf("  %.1f/s", float64(ended)/s)
	}
	if failed > 0 {
		text += fmt.Sprintf("  %d failed", failed)
	}
	bar.Draw(text, done)
}

// whole is how much there is to do for a bar.
func (l *loadFlags) whole() int64 {
	if l.requests > 0 {
		return int64(l.requests)
	}
	return max(l.duration.Milliseconds(), 1)
}

// warnOfCost warns of calls that somebody bills.
func (s IO) warnOfCost(l *loadFlags, targets ...*target) {
	for _, t := range targets {
		if t.service.GetExecutionType() == "serverless" && !l.allowCost {
			s.say("%s: each call of %s may cost money, which its cost_limits bound; --allow-cost says that you know",
				s.err().Paint(terminal.Yellow, "warning"), terminal.Clean(t.name()))
		}
	}
}

func newLoadTest(s IO) *cobra.Command {
	var l loadFlags
	cmd := &cobra.Command{
		Use:   "load-test --service S [--operation O]",
		Short: "Calls an operation again and again, and tells how long the calls took and what they used",
		Long: "Calls an operation of a service again and again, each time in a run of its own, and prints percentiles of\n" +
			"the latency, the throughput, error codes, and what the runners measured. The calls are real. Without --rate each\n" +
			"caller begins its next call when its last has ended; with it calls begin at that rate, and waiting for a free\n" +
			"caller counts as latency. Ctrl-C ends the test early. Exit status 1 if no call succeeded.",
		Example: "  specql load-test --service stripe --operation get_charge --concurrency 50 --duration 30s --report report.html\n" +
			"  specql load-test --service csv_processor --rate 20 --requests 1000 --input @input.json -o json",
		Args: cobra.NoArgs,
	}
	l.registerTarget(cmd.Flags())
	l.register(cmd.Flags())
	return withClient(s, cmd, func(cmd *cobra.Command, c *client.Client, _ *connection, out *output, _ []string) error {
		t, err := s.prepare(cmd.Context(), c, &l)
		if err != nil {
			return err
		}
		test, err := s.measure(cmd.Context(), c, &l, t)
		if err != nil {
			return err
		}
		return s.printTests(out, &l, "specql load-test "+t.name(), []report.Test{test}, false)
	})
}

func registryServices(ctx context.Context, c *client.Client) ([]*specqlv1.ServiceInfo, error) {
	res, err := c.Registry().GetRegistry(ctx, &specqlv1.GetRegistryRequest{})
	if err != nil {
		return nil, fault.FromError(err)
	}
	return res.GetServices(), nil
}

// measure tests one target.
func (s IO) measure(ctx context.Context, c *client.Client, l *loadFlags, t *target) (report.Test, error) {
	s.say("calling %s (%s): %s", terminal.Clean(t.name()), terminal.Clean(t.service.GetExecutionType()), l.describe())
	r, err := s.loadTest(ctx, c, l, t)
	return report.Test{Name: t.name(), Service: t.service.GetName(), Operation: t.operation.GetName(), ExecutionType: t.service.GetExecutionType(), Load: l.describe(), Result: r}, err
}

// printTests prints what tests measured, and writes the report.
func (s IO) printTests(out *output, l *loadFlags, title string, tests []report.Test, several bool) error {
	if l.report != "" {
		var b bytes.Buffer
		if err := report.Write(&b, title, time.Now(), tests); err != nil {
			return err
		}
		if err := writeFile(l.report, b.Bytes(), 0o644); err != nil {
			return err
		}
		s.say("wrote %s", terminal.Clean(l.report))
	}
	var err error
	switch {
	case out.json() && several:
		docs := make([]jsonform.Object, 0, len(tests))
		for _, t := range tests {
			docs = append(docs, testDocument(t))
		}
		err = s.print(jsonform.Object{{Name: "tests", Value: docs}})
	case out.json():
		err = s.print(testDocument(tests[0]))
	default:
		err = s.lines(testLines(tests, s.out()), "")
	}
	if err != nil {
		return err
	}
	for _, t := range tests {
		if len(t.Result.Samples) == t.Result.Failed() {
			return errShown
		}
	}
	return nil
}

// figure is a number of a document; null where there is none.
func figure(v float64) any {
	if math.IsNaN(v) || math.IsInf(v, 0) {
		return nil
	}
	return v
}

// spreadDocument is a distribution of sorted values.
func spreadDocument(v []float64) jsonform.Object {
	return jsonform.Object{
		{Name: "samples", Value: len(v)},
		{Name: "average", Value: figure(load.Mean(v))},
		{Name: "p50", Value: figure(load.Percentile(v, 0.50))},
		{Name: "p90", Value: figure(load.Percentile(v, 0.90))},
		{Name: "p95", Value: figure(load.Percentile(v, 0.95))},
		{Name: "p99", Value: figure(load.Percentile(v, 0.99))},
		{Name: "max", Value: figure(load.Percentile(v, 1))},
	}
}

// testDocument is a test as JSON.
func testDocument(t report.Test) jsonform.Object {
	r := t.Result
	failures := make([]jsonform.Object, 0, len(r.Failures))
	for _, f := range r.Failures {
		failures = append(failures, jsonform.Object{{Name: "code", Value: f.Code}, {Name: "count", Value: f.Count}, {Name: "message", Value: f.Message}})
	}
	usage := jsonform.Object{}
	for _, f := range r.Figures {
		usage = append(usage, jsonform.Field{Name: f.Name, Value: append(spreadDocument(f.Values), jsonform.Field{Name: "total", Value: load.Sum(f.Values)})})
	}
	timeline := []jsonform.Object{}
	for _, slot := range r.Timeline(loadSlots) {
		timeline = append(timeline, jsonform.Object{
			{Name: "startSeconds", Value: slot.Start.Seconds()},
			{Name: "seconds", Value: slot.Width.Seconds()},
			{Name: "ended", Value: slot.Ended},
			{Name: "failed", Value: slot.Failed},
			{Name: "p50", Value: figure(slot.P50)},
			{Name: "p95", Value: figure(slot.P95)},
		})
	}
	return jsonform.Object{
		{Name: "service", Value: t.Service},
		{Name: "operation", Value: t.Operation},
		{Name: "executionType", Value: t.ExecutionType},
		{Name: "load", Value: t.Load},
		{Name: "requests", Value: len(r.Samples)},
		{Name: "completed", Value: len(r.Samples) - r.Failed()},
		{Name: "failed", Value: r.Failed()},
		{Name: "unsent", Value: r.Unsent},
		{Name: "interrupted", Value: r.Interrupted},
		{Name: "elapsedSeconds", Value: r.Elapsed.Seconds()},
		{Name: "throughputPerSecond", Value: r.Throughput()},
		{Name: "latencySeconds", Value: spreadDocument(r.Latencies())},
		{Name: "errors", Value: failures},
		{Name: "resourceUsage", Value: usage},
		{Name: "timeline", Value: timeline},
	}
}

// testLines are tests side by side, for people.
func testLines(tests []report.Test, screen terminal.Screen) []string {
	calls := tree.Table{
		Head:  []string{"CALLED", "TYPE", "CALLS", "FAILED", "PER SECOND", "P50", "P90", "P95", "P99", "MAX"},
		Right: map[int]bool{2: true, 3: true, 4: true, 5: true, 6: true, 7: true, 8: true, 9: true},
	}
	used := tree.Table{Head: []string{"CALLED", "USED BY A CALL", "MEAN", "P50", "P95", "P99", "MAX"}, Right: map[int]bool{2: true, 3: true, 4: true, 5: true, 6: true}}
	failures := tree.Table{Head: []string{"CALLED", "ERROR", "CALLS", "THE FIRST ONE'S MESSAGE"}, Right: map[int]bool{2: true}}
	var notes []string
	width, _ := screen.Size()
	for _, t := range tests {
		r := t.Result
		v := r.Latencies()
		row := []string{t.Name, t.ExecutionType, fmt.Sprint(len(v)), fmt.Sprint(r.Failed()), fmt.Sprintf("%.1f", r.Throughput())}
		for _, p := range []float64{0.50, 0.90, 0.95, 0.99, 1} {
			row = append(row, report.Seconds(load.Percentile(v, p)))
		}
		calls.Rows = append(calls.Rows, row)
		for _, f := range report.Figures {
			v := r.Figure(f.Name)
			if len(v) == 0 {
				continue
			}
			row := []string{t.Name, f.Title, f.Write(load.Mean(v))}
			for _, p := range []float64{0.50, 0.95, 0.99, 1} {
				row = append(row, f.Write(load.Percentile(v, p)))
			}
			used.Rows = append(used.Rows, row)
		}
		for _, f := range r.Failures {
			failures.Rows = append(failures.Rows, []string{t.Name, f.Code, fmt.Sprint(f.Count), terminal.Cut(terminal.Clean(f.Message), max(width-50, 60))})
		}
		if r.Unsent > 0 {
			notes = append(notes, fmt.Sprintf("%s: %d calls were due by the rate and not made: no caller was free in time; raise --concurrency or lower --rate", terminal.Clean(t.Name), r.Unsent))
		}
		if r.Interrupted {
			notes = append(notes, terminal.Clean(t.Name)+": the test was ended early")
		}
	}
	lines := calls.Lines(screen)
	if len(used.Rows) > 0 {
		lines = append(append(lines, ""), used.Lines(screen)...)
	}
	if len(failures.Rows) > 0 {
		lines = append(append(lines, ""), failures.Lines(screen)...)
	}
	if len(notes) > 0 {
		lines = append(append(lines, ""), notes...)
	}
	return lines
}
