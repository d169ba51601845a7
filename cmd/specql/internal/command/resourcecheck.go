package command

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/specql/mesh/cmd/specql/internal/jsonform"
	"github.com/specql/mesh/cmd/specql/internal/terminal"
	"github.com/specql/mesh/cmd/specql/internal/tree"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/client"
	"github.com/specql/mesh/pkg/fault"
)

// minSamples is how many measured calls a limit is derived from at least.
const minSamples = 30

// limitRule is a limit of the registry and the figure that it bounds.
type limitRule struct {
	// path is where the registry has it, types the execution types that know it; nil for all.
	path  string
	types []string
	of    func(*specqlv1.UsageSummary) *specqlv1.Distribution
	// scale turns the figure into the limit's unit.
	scale float64
	unit  string
	// room is what is multiplied with the peak; the limit is a multiple of step and at least least.
	room, step, least float64
	// ended tells, of a service's failures, those that this limit caused.
	ended func(*failures) int64
}

// failures are calls that a limit ended.
type failures struct{ memory, time int64 }

func byMemory(f *failures) int64 { return f.memory }
func byTime(f *failures) int64   { return f.time }
func byNone(*failures) int64     { return 0 }

const resourceLimits = "security_policy.resource_limits."

var (
	processTypes = []string{"shell", "docker"}
	webCalls     = []string{"http"}
)

// limitRules are the limits that a measured figure answers to. disk_mb and processes have none.
var limitRules = []limitRule{
	{resourceLimits + "memory_mb", nil, (*specqlv1.UsageSummary).GetPeakMemoryMb, 1, " MiB", 1.5, 16, 32, byMemory},
	{resourceLimits + "cpu_cores", processTypes, (*specqlv1.UsageSummary).GetCpuUsagePercent, 0.01, "", 1.25, 0.25, 0.25, byNone},
	{resourceLimits + "cpu_seconds", []string{"shell"}, (*specqlv1.UsageSummary).GetCpuSeconds, 1, " s", 2, 1, 1, byNone},
	{resourceLimits + "timeout_seconds", []string{"shell", "docker", "serverless"}, (*specqlv1.UsageSummary).GetDurationSeconds, 1, " s", 2, 1, 2, byTime},
	{"runner_config.timeout", nil, (*specqlv1.UsageSummary).GetDurationSeconds, 1, " s", 2, 1, 2, byTime},
	{"security_policy.max_request_size", webCalls, (*specqlv1.UsageSummary).GetRequestBytes, 1, " B", 2, 1024, 1024, byNone},
	{"security_policy.max_response_size", webCalls, (*specqlv1.UsageSummary).GetResponseBytes, 1, " B", 2, 1024, 4096, byNone},
}

// limitCheck is a limit of an operation against what was measured.
type limitCheck struct {
	rule      *limitRule
	operation string
	limit     *float64
	measured  *specqlv1.Distribution
}

func (c *limitCheck) figure(v float64) float64 { return v * c.rule.scale }

// resourceCheck is what a service needs.
type resourceCheck struct {
	service *specqlv1.ServiceInfo
	checks  []limitCheck
	// suggested are limits by path; notes say what is doubtful.
	suggested map[string]float64
	notes     []string
	truncated bool
}

func checkResources(s *specqlv1.ServiceInfo, usage *specqlv1.GetResourceUsageResponse, patterns []*specqlv1.FailurePattern) *resourceCheck {
	r := &resourceCheck{service: s, suggested: map[string]float64{}, truncated: usage.GetTruncated()}
	registry := map[string]any{"runner_config": s.GetRunnerConfig().AsMap(), "security_policy": s.GetSecurityPolicy().AsMap()}
	var ended failures
	for _, u := range usage.GetUsage() {
		ended.memory += u.GetOomKilledJobs()
	}
	for _, p := range patterns {
		if p.GetErrorCode() == string(fault.Timeout) {
			ended.time += p.GetFailures()
		}
	}
	measured := map[string]bool{}
	for i := range limitRules {
		rule := &limitRules[i]
		if !rule.knownTo(s.GetExecutionType()) {
			continue
		}
		var limit *float64
		if v, ok := at(registry, rule.path).(float64); ok {
			limit = &v
		}
		if rule.path == "runner_config.timeout" && limit == nil && s.GetExecutionType() != "http" {
			continue // resource_limits.timeout_seconds is said above
		}
		samples, most := int64(0), 0.0
		for _, u := range usage.GetUsage() {
			measured[u.GetOperation()] = true
			d := rule.of(u)
			if d == nil {
				continue
			}
			r.checks = append(r.checks, limitCheck{rule, u.GetOperation(), limit, d})
			samples += d.GetSamples()
			most = max(most, d.GetMax()*rule.scale)
		}
		r.suggest(rule, limit, samples, most, rule.ended(&ended))
	}
	for _, o := range s.GetOperations() {
		if !measured[o.GetName()] {
			r.notes = append(r.notes, fmt.Sprintf("%s has no measured calls: what it needs is not known", o.GetName()))
		}
	}
	return r
}

func (l *limitRule) knownTo(executionType string) bool {
	return l.types == nil || slices.Contains(l.types, executionType)
}

func (l *limitRule) name() string { return l.path[strings.LastIndexByte(l.path, '.')+1:] }

// suggest derives a limit from the peak.
func (r *resourceCheck) suggest(rule *limitRule, limit *float64, samples int64, peak float64, ended int64) {
	if samples == 0 {
		if limit != nil {
			r.notes = append(r.notes, rule.name()+": nobody measured what it bounds")
		}
		return
	}
	if samples < minSamples {
		r.notes = append(r.notes, fmt.Sprintf("%s: %d samples are too few to derive a limit from; %d are needed", rule.name(), samples, minSamples))
		return
	}
	v := max(math.Ceil(peak*rule.room/rule.step-1e-9)*rule.step, rule.least)
	switch {
	case limit != nil && ended > 0:
		// What was ended would have used more.
		v = max(v, 2**limit)
		r.notes = append(r.notes, fmt.Sprintf("%s: the limit ended %s, so the peak is not what they need", rule.name(), count(int(ended), "call")))
	case limit != nil && peak >= 0.95**limit:
		v = max(v, 2**limit)
		r.notes = append(r.notes, rule.name()+": the peak reaches the limit, so more may be needed than was measured")
	}
	r.suggested[rule.path] = v
}

// changes are the suggested limits for the registry.
func (r *resourceCheck) changes() changes {
	out := changes{}
	for path, v := range r.suggested {
		out.set(path, v)
	}
	return out
}

func newResourceCheck(s IO) *cobra.Command {
	var service string
	var from since
	cmd := &cobra.Command{
		Use:   "resource-check --service S",
		Short: "Compares a service's limits with what its calls used, and says which limits would do",
		Long: "Compares the limits that the registry sets for a service with what the runners measured, operation by operation, and\n" +
			"prints the limits that it would set, as YAML for the registry or an overlay. They leave room above the highest\n" +
			"peak. A limit is derived from 30 measured calls at least, and is only as good as those calls: `specql load-test`\n" +
			"makes more. Nothing is changed.",
		Example: "  specql resource-check --service csv_processor --since 30d",
		Args:    cobra.NoArgs,
	}
	cmd.Flags().StringVar(&service, "service", "", "the service")
	from.register(cmd.Flags(), "7d")
	return withClient(s, cmd, func(cmd *cobra.Command, c *client.Client, _ *connection, out *output, _ []string) error {
		if service == "" {
			return misuse("--service is needed: the service to look at")
		}
		begin, err := from.time(time.Now())
		if err != nil {
			return err
		}
		services, err := registryServices(cmd.Context(), c)
		if err != nil {
			return err
		}
		info, err := findService(services, service)
		if err != nil {
			return err
		}
		filter := &specqlv1.JobFilter{Service: info.GetName(), Since: begin}
		usage, err := during(s, "looking at what the calls used", func() (*specqlv1.GetResourceUsageResponse, error) {
			return insightOf(c).GetResourceUsage(cmd.Context(), &specqlv1.GetResourceUsageRequest{Filter: filter})
		})
		if err != nil {
			return fault.FromError(err)
		}
		patterns, err := during(s, "looking at the failures", func() (*specqlv1.GetFailurePatternsResponse, error) {
			return insightOf(c).GetFailurePatterns(cmd.Context(), &specqlv1.GetFailurePatternsRequest{Filter: filter})
		})
		if err != nil {
			return fault.FromError(err)
		}
		r := checkResources(info, usage, patterns.GetPatterns())
		if out.json() {
			return s.print(r.document())
		}
		return s.lines(r.lines(s.out()), "")
	})
}

// document is the check as JSON.
func (r *resourceCheck) document() jsonform.Object {
	list := make([]jsonform.Object, 0, len(r.checks))
	for _, c := range r.checks {
		o := jsonform.Object{{Name: "operation", Value: c.operation}, {Name: "limit", Value: c.rule.path}}
		if c.limit != nil {
			o = append(o, jsonform.Field{Name: "set", Value: *c.limit})
		}
		list = append(list, append(
			o,
			jsonform.Field{Name: "samples", Value: c.measured.GetSamples()},
			jsonform.Field{Name: "p50", Value: c.figure(c.measured.GetP50())},
			jsonform.Field{Name: "p95", Value: c.figure(c.measured.GetP95())},
			jsonform.Field{Name: "p99", Value: c.figure(c.measured.GetP99())},
			jsonform.Field{Name: "peak", Value: c.figure(c.measured.GetMax())},
		))
	}
	doc := jsonform.Object{
		{Name: "service", Value: r.service.GetName()},
		{Name: "executionType", Value: r.service.GetExecutionType()},
		{Name: "limits", Value: list},
		{Name: "suggested", Value: r.changes()},
		{Name: "notes", Value: append([]string{}, r.notes...)},
		{Name: "truncated", Value: r.truncated},
	}
	if len(r.suggested) > 0 {
		doc = append(doc, jsonform.Field{Name: "yaml", Value: strings.Join(r.changes().yaml(r.service.GetName()), "\n") + "\n"})
	}
	return doc
}

// lines are the check for people.
func (r *resourceCheck) lines(screen terminal.Screen) []string {
	table := tree.Table{
		Head:  []string{"OPERATION", "LIMIT", "SET", "P50", "P95", "P99", "PEAK", "USED", "SAMPLES"},
		Right: map[int]bool{2: true, 3: true, 4: true, 5: true, 6: true, 7: true, 8: true},
	}
	for _, c := range r.checks {
		write := func(v float64) string { return short(v) + c.rule.unit }
		set, used := "none", tree.Absent
		if c.limit != nil {
			set = write(*c.limit)
			if *c.limit > 0 {
				used = fmt.Sprintf("%.0f %%", 100*c.figure(c.measured.GetMax()) / *c.limit)
			}
		}
		table.Rows = append(table.Rows, []string{
			c.operation, c.rule.name(), set, write(c.figure(c.measured.GetP50())), write(c.figure(c.measured.GetP95())),
			write(c.figure(c.measured.GetP99())), write(c.figure(c.measured.GetMax())), used, strconv.FormatInt(c.measured.GetSamples(), 10),
		})
	}
	lines := []string{fmt.Sprintf("service %s (%s)", terminal.Clean(r.service.GetName()), terminal.Clean(r.service.GetExecutionType()))}
	if len(r.checks) > 0 {
		lines = append(append(lines, ""), table.Lines(screen)...)
	}
	if len(r.notes) > 0 {
		lines = append(lines, "")
	}
	for _, n := range r.notes {
		lines = append(lines, "note: "+terminal.Clean(n))
	}
	if r.truncated {
		lines = append(lines, "note: there are more calls than were looked at; these are the newest")
	}
	lines = append(lines, "")
	if len(r.suggested) == 0 {
		return append(lines, "No limit can be derived yet. `specql load-test --service "+terminal.Clean(r.service.GetName())+"` makes calls to measure.")
	}
	lines = append(lines, "These limits would leave room above what was measured:", "")
	for _, l := range r.changes().yaml(r.service.GetName()) {
		lines = append(lines, terminal.Clean(l))
	}
	return lines
}

// short writes a figure with few digits.
func short(v float64) string {
	switch {
	case v == math.Trunc(v), v >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v >= 1:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'g', 2, 64)
}
