package command

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/specql/mesh/cmd/specql/internal/jsonform"
	"github.com/specql/mesh/cmd/specql/internal/terminal"
	"github.com/specql/mesh/cmd/specql/internal/tree"
	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/client"
	"github.com/specql/mesh/pkg/fault"
)

// violation is what one operation attempted against one rule, however often.
type violation struct {
	operation, code, rule, source, attempted, detail string
	count                                            int
	first, last                                      time.Time
	subjects, tenants, runners                       []string
	lastRun                                          string
	changes                                          []*runnerv1.PolicyChange
}

// audit groups violations, the most frequent first.
func audit(list []*specqlv1.SecurityViolation) []*violation {
	type key struct{ operation, code, rule, source, attempted, changes string }
	groups := map[key]*violation{}
	var out []*violation
	note := func(list *[]string, text string) {
		if text != "" && !slices.Contains(*list, text) {
			*list = append(*list, text)
		}
	}
	for _, v := range list {
		k := key{v.GetOperation(), v.GetErrorCode(), v.GetRule(), v.GetRuleSource(), v.GetAttempted(), changesText(v.GetAllowedBy())}
		if len(v.GetAllowedBy()) == 0 {
			k.changes = v.GetDetail()
		}
		g := groups[k]
		if g == nil {
			at := v.GetOccurredAt().AsTime()
			g = &violation{
				operation: k.operation, code: k.code, rule: k.rule, source: k.source, attempted: k.attempted, detail: v.GetDetail(),
				first: at, last: at, lastRun: v.GetRunId(), changes: v.GetAllowedBy(),
			}
			groups[k] = g
			out = append(out, g)
		}
		g.count++
		g.first = v.GetOccurredAt().AsTime() // they come newest first
		note(&g.subjects, v.GetSubject())
		note(&g.tenants, v.GetTenantId())
		note(&g.runners, v.GetRunner())
	}
	slices.SortStableFunc(out, func(a, b *violation) int { return cmp.Or(b.count-a.count, b.last.Compare(a.last)) })
	return out
}

// changesText says in a few words which changes together allow something.
func changesText(changes []*runnerv1.PolicyChange) string {
	if len(changes) == 0 {
		return "no change of a policy allows it: see what the runner says"
	}
	parts := make([]string, len(changes))
	for i, c := range changes {
		switch {
		case len(c.GetAdd()) > 0:
			parts[i] = fmt.Sprintf("add %s to %s", strings.Trim(scalar(entries(c)), "[]"), c.GetKey())
		case c.GetSet() != nil:
			parts[i] = fmt.Sprintf("set %s: %s", c.GetKey(), scalar(c.GetSet().AsInterface()))
		default:
			parts[i] = fmt.Sprintf("raise %s above %s", c.GetKey(), scalar(c.GetAbove()))
		}
		if c.GetCeiling() {
			parts[i] += ", in the runner's --policy file"
		}
	}
	return strings.Join(parts, "; and ")
}

func entries(c *runnerv1.PolicyChange) []any {
	out := make([]any, len(c.GetAdd()))
	for i, v := range c.GetAdd() {
		out[i] = v.AsInterface()
	}
	return out
}

// auditChanges are the changes of a service's own policy that allow all violations: lists whole, as an overlay replaces them.
// Of a limit of which nobody knows what would be enough, it says twice as much.
func auditChanges(s *specqlv1.ServiceInfo, list []*violation) changes {
	policy := s.GetSecurityPolicy().AsMap()
	lists, out := map[string][]any{}, changes{}
	for _, v := range list {
		for _, c := range v.changes {
			if c.GetCeiling() {
				continue
			}
			path := "security_policy." + c.GetKey()
			if len(c.GetAdd()) == 0 {
				set := c.GetSet().AsInterface()
				if c.Above != nil {
					set = 2 * c.GetAbove()
				}
				if before, ok := at(out.plain(), path).(float64); ok {
					if now, ok := set.(float64); ok && now < before {
						continue
					}
				}
				out.set(path, set)
				continue
			}
			if lists[path] == nil {
				lists[path], _ = at(policy, c.GetKey()).([]any)
				lists[path] = slices.Clone(lists[path])
			}
			for _, e := range entries(c) {
				if !slices.ContainsFunc(lists[path], func(have any) bool { return scalar(have) == scalar(e) }) {
					lists[path] = append(lists[path], e)
				}
			}
			out.set(path, lists[path])
		}
	}
	return out
}

// plain are the changes as maps alone.
func (c changes) plain() map[string]any {
	out := map[string]any{}
	raw, err := json.Marshal(c)
	if err == nil {
		_ = json.Unmarshal(raw, &out)
	}
	return out
}

func newSecurityAudit(s IO) *cobra.Command {
	var service, policy, env string
	var from since
	req := &specqlv1.GetSecurityAuditRequest{}
	cmd := &cobra.Command{
		Use:   "security-audit --service S",
		Short: "Tells what a service's calls tried against its security policy, and what would allow it",
		Long: "Lists what the calls of a service tried and its security policy, or the runner's own, forbade: which operation tried\n" +
			"what, how often, and for whom. For each it says the smallest change that would allow it, and prints the changes as\n" +
			"YAML for the registry or an overlay. Look at each before you allow it: a policy that forbids something may be right.\n" +
			"With --policy, it tells which calls of the past another policy would have forbidden, and which forbidden ones it would\n" +
			"have allowed: the runner decides on what is recorded of each call. Nothing is changed.",
		Example: "  specql security-audit --service csv_processor --since 24h\n  specql security-audit --service csv_processor --policy new.yaml --since 30d",
		Args:    cobra.NoArgs,
	}
	cmd.Flags().StringVar(&service, "service", "", "the service")
	cmd.Flags().Int32Var(&req.Limit, "limit", 1000, "look at the newest so many violations, up to 10,000")
	cmd.Flags().StringVar(&policy, "policy", "", "replay past calls against the policy in this file: a security_policy, or a registry or an overlay with the service")
	cmd.Flags().StringVar(&env, "env", "", "the overlay of the file of --policy")
	from.register(cmd.Flags(), "all")
	return withClient(s, cmd, func(cmd *cobra.Command, c *client.Client, _ *connection, out *output, _ []string) error {
		if service == "" {
			return misuse("--service is needed: the service to look at")
		}
		if req.GetLimit() < 1 || req.GetLimit() > 10_000 {
			return misuse("--limit must be between 1 and 10000")
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
		if policy != "" {
			return s.replay(cmd.Context(), c, out, info, policy, env, begin)
		}
		req.Filter = &specqlv1.JobFilter{Service: info.GetName(), Since: begin}
		res, err := during(s, "looking at what was forbidden", func() (*specqlv1.GetSecurityAuditResponse, error) {
			return insightOf(c).GetSecurityAudit(cmd.Context(), req)
		})
		if err != nil {
			return fault.FromError(err)
		}
		found := audit(res.GetViolations())
		if out.json() {
			return s.printAudit(info, res, found)
		}
		return s.lines(auditLines(info, res, found, s.out()), "")
	})
}

func (s IO) printAudit(info *specqlv1.ServiceInfo, res *specqlv1.GetSecurityAuditResponse, found []*violation) error {
	violations := make([]jsonform.Object, 0, len(found))
	for _, v := range found {
		o := jsonform.Object{
			{Name: "operation", Value: v.operation},
			{Name: "rule", Value: v.rule},
			{Name: "attempted", Value: v.attempted},
			{Name: "detail", Value: v.detail},
			{Name: "count", Value: v.count},
			{Name: "firstAt", Value: v.first.Format(time.RFC3339Nano)},
			{Name: "lastAt", Value: v.last.Format(time.RFC3339Nano)},
			{Name: "lastRunId", Value: v.lastRun},
			{Name: "subjects", Value: append([]string{}, v.subjects...)},
			{Name: "tenants", Value: append([]string{}, v.tenants...)},
			{Name: "runners", Value: append([]string{}, v.runners...)},
			{Name: "errorCode", Value: v.code},
			{Name: "ruleSource", Value: v.source},
		}
		list := []jsonform.Object{}
		for _, c := range v.changes {
			list = append(list, changeObject(c))
		}
		o = append(o, jsonform.Field{Name: "changes", Value: list})
		violations = append(violations, o)
	}
	doc := jsonform.Object{
		{Name: "service", Value: info.GetName()},
		{Name: "executionType", Value: info.GetExecutionType()},
		{Name: "violations", Value: violations},
		{Name: "truncated", Value: res.GetTruncated()},
	}
	if c := auditChanges(info, found); len(c) > 0 {
		doc = append(doc, jsonform.Field{Name: "yaml", Value: strings.Join(c.yaml(info.GetName()), "\n") + "\n"})
	}
	return s.print(doc)
}

// changeObject is a change in JSON.
func changeObject(c *runnerv1.PolicyChange) jsonform.Object {
	o := jsonform.Object{{Name: "path", Value: c.GetKey()}, {Name: "ceiling", Value: c.GetCeiling()}}
	switch {
	case len(c.GetAdd()) > 0:
		return append(o, jsonform.Field{Name: "add", Value: entries(c)})
	case c.GetSet() != nil:
		return append(o, jsonform.Field{Name: "set", Value: c.GetSet().AsInterface()})
	}
	return append(o, jsonform.Field{Name: "above", Value: c.GetAbove()})
}

func auditLines(info *specqlv1.ServiceInfo, res *specqlv1.GetSecurityAuditResponse, found []*violation, screen terminal.Screen) []string {
	lines := []string{fmt.Sprintf("service %s (%s)", terminal.Clean(info.GetName()), terminal.Clean(info.GetExecutionType()))}
	if len(found) == 0 {
		return append(lines, screen.Paint(terminal.Green, "no violations"))
	}
	table := tree.Table{Head: []string{"OPERATION", "RULE", "TRIED", "TIMES", "LAST", "FOR"}, Right: map[int]bool{3: true}}
	or := func(text string) string { return cmp.Or(text, tree.Absent) }
	for _, v := range found {
		table.Rows = append(table.Rows, []string{
			v.operation, or(v.rule), or(v.attempted), strconv.Itoa(v.count), v.last.Local().Format(time.DateTime), or(strings.Join(v.subjects, ", ")),
		})
	}
	lines = append(append(lines, ""), table.Lines(screen)...)
	if res.GetTruncated() {
		lines = append(lines, "", "note: there are more violations than were looked at; these are the newest (--limit)")
	}
	lines = append(lines, "")
	for _, v := range found {
		text := fmt.Sprintf("%s, %s %s: %s", v.operation, or(v.rule), or(v.attempted), v.detail)
		if v.source != "" {
			text += " (the rule: " + v.source + ")"
		}
		lines = append(lines, terminal.Clean(text), "  → "+terminal.Clean(changesText(v.changes)))
	}
	if c := auditChanges(info, found); len(c) > 0 {
		lines = append(lines, "", "If all of this is meant, these changes of the registry allow it:", "")
		for _, l := range c.yaml(info.GetName()) {
			lines = append(lines, terminal.Clean(l))
		}
	}
	return lines
}
