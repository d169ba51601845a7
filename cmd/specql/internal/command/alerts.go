package command

import (
	"cmp"
	"fmt"
	"maps"
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

func newAlerts(s IO) *cobra.Command {
	var prometheus bool
	req := &specqlv1.ListAlertsRequest{}
	cmd := &cobra.Command{
		Use:   "alerts [NAME]",
		Short: "Tells how the alerts of the registry stand, or writes them as Prometheus rules",
		Long: "Lists the alerts of the registry in force: the state of each, since when, and the figures of its condition.\n" +
			"With a name, that alert alone and its last changes. With --prometheus, a file of rules for a Prometheus that\n" +
			"scrapes the orchestrators; a condition that has no form there is left out and said on standard error.",
		Example: "  specql alerts\n  specql alerts \"High HTTP Error Rate\"\n  specql alerts --prometheus > rules.yaml && promtool check rules rules.yaml",
		Args:    cobra.MaximumNArgs(1),
	}
	cmd.Flags().BoolVar(&prometheus, "prometheus", false, "write Prometheus rules")
	cmd.Flags().Int32Var(&req.History, "history", 0, "how many past changes to show of each alert, up to 100 (10 for one alert)")
	return withClient(s, cmd, func(cmd *cobra.Command, c *client.Client, _ *connection, out *output, args []string) error {
		if req.GetHistory() < 0 || req.GetHistory() > 100 {
			return misuse("--history must be between 0 and 100")
		}
		if len(args) == 1 {
			if req.Name = args[0]; !cmd.Flags().Changed("history") {
				req.History = 10
			}
		}
		res, err := insightOf(c).ListAlerts(cmd.Context(), req)
		if err != nil {
			return fault.FromError(err)
		}
		switch {
		case prometheus && out.json():
			return s.print(rules(res.GetAlerts()))
		case prometheus:
			for _, a := range res.GetAlerts() {
				if a.GetPrometheus() == "" {
					s.say("%s: the condition %s has no form in PromQL and is left out", terminal.Clean(a.GetName()), terminal.Clean(a.GetCondition()))
				}
			}
			return s.lines(ruleLines(res.GetAlerts()), "")
		case out.json():
			doc, err := jsonform.Message(res)
			if err != nil {
				return err
			}
			return s.print(doc)
		}
		return s.lines(alertLines(res, s.out()), "")
	})
}

// rules is the rule file as JSON, which is YAML as well.
func rules(alerts []*specqlv1.Alert) jsonform.Object {
	list := []jsonform.Object{}
	for _, a := range alerts {
		if a.GetPrometheus() != "" {
			list = append(list, rule(a))
		}
	}
	return jsonform.Object{{Name: "groups", Value: []jsonform.Object{{{Name: "name", Value: "specql"}, {Name: "rules", Value: list}}}}}
}

func rule(a *specqlv1.Alert) jsonform.Object {
	annotations := jsonform.Object{
		{Name: "summary", Value: template(a.GetCondition()) + " over " + a.GetWindow().AsDuration().String()},
		{Name: "source", Value: template(a.GetSource())},
	}
	return jsonform.Object{
		{Name: "alert", Value: a.GetName()},
		{Name: "expr", Value: a.GetPrometheus()},
		{Name: "for", Value: promDuration(a.GetPendingFor().AsDuration())},
		{Name: "keep_firing_for", Value: promDuration(a.GetFiringFor().AsDuration())},
		{Name: "labels", Value: jsonform.Object{{Name: "execution_type", Value: a.GetExecutionType()}}},
		{Name: "annotations", Value: annotations},
	}
}

// template keeps a text of the registry from being a template of Prometheus.
func template(text string) string { return strings.ReplaceAll(text, "{{", "{ {") }

func promDuration(d time.Duration) string {
	if d%time.Second == 0 {
		return strconv.FormatInt(int64(d/time.Second), 10) + "s"
	}
	return strconv.FormatInt(max(d.Milliseconds(), 1), 10) + "ms"
}

func ruleLines(alerts []*specqlv1.Alert) []string {
	lines := []string{"groups:", "  - name: specql", "    rules:"}
	n := 0
	for _, a := range alerts {
		if a.GetPrometheus() == "" {
			continue
		}
		n++
		prefix := "      - "
		for _, field := range rule(a) {
			if below, ok := field.Value.(jsonform.Object); ok {
				lines = append(lines, prefix+field.Name+":")
				for _, f := range below {
					lines = append(lines, "          "+f.Name+": "+scalar(f.Value))
				}
			} else {
				lines = append(lines, prefix+field.Name+": "+scalar(field.Value))
			}
			prefix = "        "
		}
	}
	if n == 0 {
		lines[2] = "    rules: []"
	}
	return lines
}

func alertLines(res *specqlv1.ListAlertsResponse, screen terminal.Screen) []string {
	if len(res.GetAlerts()) == 0 {
		return []string{"the registry in force has no alerts"}
	}
	table := tree.Table{Head: []string{"ALERT", "STATE", "SINCE", "CONDITION", "FIGURES", "WINDOW", "NOTIFIES"}}
	var notes []string
	for _, a := range res.GetAlerts() {
		notifies := tree.Absent
		if a.GetNotifyService() != "" {
			notifies = a.GetNotifyService() + "." + a.GetNotifyOperation()
		}
		since := tree.Absent
		if at := a.GetSince(); at != nil {
			since = at.AsTime().Local().Format(time.DateTime)
		}
		table.Rows = append(table.Rows, []string{
			a.GetName(), a.GetState(), since, a.GetCondition(), cmp.Or(figuresText(a.GetValues()), tree.Absent), a.GetWindow().AsDuration().String(), notifies,
		})
		if a.GetDetail() != "" {
			notes = append(notes, terminal.Clean(a.GetName()+": "+a.GetDetail()))
		}
	}
	lines := table.Lines(screen)
	if len(notes) > 0 {
		lines = append(append(lines, ""), notes...)
	}
	for _, a := range res.GetAlerts() {
		if len(a.GetHistory()) == 0 {
			continue
		}
		lines = append(lines, "", terminal.Clean(a.GetName()))
		for _, h := range a.GetHistory() {
			line := fmt.Sprintf("  %s  %s -> %s  %s", h.GetAt().AsTime().Local().Format(time.DateTime), h.GetFrom(), h.GetTo(), figuresText(h.GetValues()))
			if h.GetNotifyRunId() != "" {
				line += "  told by run " + h.GetNotifyRunId()
			}
			if h.GetNotifyError() != "" {
				line += "  nobody was told: " + h.GetNotifyError()
			}
			lines = append(lines, terminal.Clean(strings.TrimRight(line, " ")))
		}
	}
	if res.GetEvaluator() == "" {
		lines = append(lines, "", "note: no orchestrator evaluates alerts just now")
	}
	return lines
}

// figuresText are figures in one line.
func figuresText(values map[string]float64) string {
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(values)) {
		parts = append(parts, name+"="+strconv.FormatFloat(values[name], 'g', 4, 64))
	}
	return strings.Join(parts, " ")
}
