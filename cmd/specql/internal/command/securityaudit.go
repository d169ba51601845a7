package command

import (
	"cmp"
	"encoding/json"
	"fmt"
	"regexp"
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

// violation is what one operation attempted against one rule, however often.
type violation struct {
	operation, rule, attempted, detail string
	count                              int
	first, last                        time.Time
	subjects                           []string
	lastRun                            string
	change                             *policyChange
}

// policyChange is the smallest change of a policy that would allow something.
type policyChange struct {
	// path is the key of the security_policy.
	path string
	// add are entries for the list at path; set is its new value where it is no list.
	add []any
	set any
	// ceiling: it is the operator's policy of the runner that would have to change.
	ceiling bool
}

// audit groups violations, the most frequent first.
func audit(list []*specqlv1.SecurityViolation) []*violation {
	type key struct{ operation, rule, attempted, detail string }
	groups := map[key]*violation{}
	var out []*violation
	for _, v := range list {
		k := key{v.GetOperation(), v.GetRule(), v.GetAttempted(), v.GetDetail()}
		g := groups[k]
		if g == nil {
			at := v.GetOccurredAt().AsTime()
			g = &violation{
				operation: k.operation, rule: k.rule, attempted: k.attempted, detail: k.detail,
				first: at, last: at, lastRun: v.GetRunId(), change: changeOf(k.rule, k.attempted, k.detail),
			}
			groups[k] = g
			out = append(out, g)
		}
		g.count++
		g.first = v.GetOccurredAt().AsTime() // they come newest first
		if s := v.GetSubject(); s != "" && !slices.Contains(g.subjects, s) {
			g.subjects = append(g.subjects, s)
		}
	}
	slices.SortStableFunc(out, func(a, b *violation) int { return cmp.Or(b.count-a.count, b.last.Compare(a.last)) })
	return out
}

// What runners say is to be done. A detail without one of these has no change that a policy could make.
var (
	addEntry    = regexp.MustCompile(`(?:\b|; )adds? ("(?:[^"\\]|\\.)*"|[0-9]+)(?: to ([a-z_]+))?`)
	addVolumes  = regexp.MustCompile(`add volume_restrictions with allowed_host_paths: \[("(?:[^"\\]|\\.)*")\]`)
	listBoth    = regexp.MustCompile(`own host (\S+) may be called; list both`)
	setValue    = regexp.MustCompile(`\bset ([a-z_]+): (true|false)`)
	raiseLimit  = regexp.MustCompile(`\braise ([a-z_]+)`)
	firstNumber = regexp.MustCompile(`^[0-9]+`)
)

// changeOf derives the smallest change from what the runner said; nil where none would do.
func changeOf(rule, attempted, detail string) *policyChange {
	path, ceiling := strings.CutPrefix(rule, "ceiling.")
	c := &policyChange{path: path, ceiling: ceiling || strings.Contains(detail, "--policy")}
	if m := addVolumes.FindStringSubmatch(detail); m != nil {
		c.path, c.add = "volume_restrictions.allowed_host_paths", []any{entry(m[1])}
		return c
	}
	if m := listBoth.FindStringSubmatch(detail); m != nil {
		c.add = []any{m[1], attempted}
		return c
	}
	if strings.Contains(detail, "list it in allowed_domains") {
		c.path, c.add = "allowed_domains", []any{attempted}
		return c
	}
	if m := addEntry.FindStringSubmatch(detail); m != nil {
		if m[2] != "" && !strings.HasSuffix(path, m[2]) {
			c.path = m[2]
		}
		c.add = []any{entry(m[1])}
		return c
	}
	if m := setValue.FindStringSubmatch(detail); m != nil {
		c.path, c.set = m[1], m[2] == "true"
		return c
	}
	if m := raiseLimit.FindStringSubmatch(detail); m != nil && strings.HasSuffix(path, m[1]) {
		if n, err := strconv.ParseFloat(firstNumber.FindString(attempted), 64); err == nil {
			c.set = n
			return c
		}
	}
	return nil
}

// entry reads an entry as the runner wrote it: a quoted text, or a number.
func entry(text string) any {
	if s, err := strconv.Unquote(text); err == nil {
		return s
	}
	if n, err := strconv.ParseFloat(text, 64); err == nil {
		return n
	}
	return text
}

// text says a change in a few words.
func (c *policyChange) text() string {
	if c == nil {
		return "no entry of a policy allows it: see what the runner says"
	}
	whose := ""
	if c.ceiling {
		whose = ", in the runner's --policy file"
	}
	if c.add != nil {
		return fmt.Sprintf("add %s to %s%s", strings.Trim(scalar(c.add), "[]"), c.path, whose)
	}
	return fmt.Sprintf("set %s: %s%s", c.path, scalar(c.set), whose)
}

// auditChanges are the changes of a service's own policy that allow all violations: lists whole, as an overlay replaces them.
func auditChanges(s *specqlv1.ServiceInfo, list []*violation) changes {
	policy := s.GetSecurityPolicy().AsMap()
	lists, out := map[string][]any{}, changes{}
	for _, v := range list {
		c := v.change
		if c == nil || c.ceiling {
			continue
		}
		path := "security_policy." + c.path
		if c.add == nil {
			if before, ok := at(out.plain(), path).(float64); ok {
				if now, ok := c.set.(float64); ok && now < before {
					continue
				}
			}
			out.set(path, c.set)
			continue
		}
		if lists[path] == nil {
			lists[path], _ = at(policy, c.path).([]any)
			lists[path] = slices.Clone(lists[path])
		}
		for _, e := range c.add {
			if !slices.ContainsFunc(lists[path], func(have any) bool { return scalar(have) == scalar(e) }) {
				lists[path] = append(lists[path], e)
			}
		}
		out.set(path, lists[path])
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
	var service string
	var from since
	req := &specqlv1.GetSecurityAuditRequest{}
	cmd := &cobra.Command{
		Use:   "security-audit --service S",
		Short: "Tells what a service's calls tried against its security policy, and what would allow it",
		Long: "Lists what the calls of a service tried and its security policy, or the runner's own, forbade: which operation tried\n" +
			"what, how often, and for whom. For each it says the smallest change that would allow it, and prints the changes as\n" +
			"YAML for the registry or an overlay. Look at each before you allow it: a policy that forbids something may be right.\n" +
			"Nothing is changed.",
		Example: "  specql security-audit --service csv_processor --since 24h",
		Args:    cobra.NoArgs,
	}
	cmd.Flags().StringVar(&service, "service", "", "the service")
	cmd.Flags().Int32Var(&req.Limit, "limit", 1000, "look at the newest so many violations, up to 10,000")
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
		req.Filter = &specqlv1.JobFilter{Service: info.GetName(), Since: begin}
		res, err := insightOf(c).GetSecurityAudit(cmd.Context(), req)
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
	list := make([]jsonform.Object, 0, len(found))
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
		}
		if c := v.change; c != nil {
			change := jsonform.Object{{Name: "path", Value: c.path}, {Name: "ceiling", Value: c.ceiling}}
			if c.add != nil {
				change = append(change, jsonform.Field{Name: "add", Value: c.add})
			} else {
				change = append(change, jsonform.Field{Name: "set", Value: c.set})
			}
			o = append(o, jsonform.Field{Name: "change", Value: change})
		}
		list = append(list, o)
	}
	doc := jsonform.Object{
		{Name: "service", Value: info.GetName()},
		{Name: "executionType", Value: info.GetExecutionType()},
		{Name: "violations", Value: list},
		{Name: "truncated", Value: res.GetTruncated()},
	}
	if c := auditChanges(info, found); len(c) > 0 {
		doc = append(doc, jsonform.Field{Name: "yaml", Value: strings.Join(c.yaml(info.GetName()), "\n") + "\n"})
	}
	return s.print(doc)
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
		lines = append(lines, terminal.Clean(fmt.Sprintf("%s, %s %s: %s", v.operation, or(v.rule), or(v.attempted), v.detail)), "  → "+terminal.Clean(v.change.text()))
	}
	if c := auditChanges(info, found); len(c) > 0 {
		lines = append(lines, "", "If all of this is meant, these changes of the registry allow it:", "")
		for _, l := range c.yaml(info.GetName()) {
			lines = append(lines, terminal.Clean(l))
		}
	}
	return lines
}
