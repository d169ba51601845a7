package command

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/specql/mesh/cmd/specql/internal/jsonform"
	"github.com/specql/mesh/cmd/specql/internal/local"
	"github.com/specql/mesh/cmd/specql/internal/terminal"
	"github.com/specql/mesh/cmd/specql/internal/tree"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/client"
	"github.com/specql/mesh/pkg/fault"
)

// Bounds of a replay.
const (
	maxReplayed  = 50_000
	replayedPage = 500
	maxGroups    = 1000
)

// replayGroup are jobs of which the policy says the same.
type replayGroup struct {
	operation, code, rule, attempted, detail string
	jobs, doubtful                           int
	last                                     time.Time
	lastRun                                  string
}

// replay is what a policy would have said of jobs of the past.
type replay struct {
	jobs                                                 int
	stillAllowed, stillDenied, newlyDenied, newlyAllowed int
	deniedGroups, allowedGroups                          []*replayGroup
	groups                                               map[[6]string]*replayGroup
	unknown                                              map[string]int
	truncated                                            bool
}

// replayPolicy asks for all pages.
func replayPolicy(ctx context.Context, c *client.Client, service string, policy map[string]any, since *timestamppb.Timestamp) (*replay, error) {
	text, err := structpb.NewStruct(policy)
	if err != nil {
		return nil, misuse("--policy: %w", err)
	}
	r := &replay{groups: map[[6]string]*replayGroup{}, unknown: map[string]int{}}
	req := &specqlv1.ReplayPolicyRequest{Filter: &specqlv1.JobFilter{Service: service, Since: since}, SecurityPolicy: text, PageSize: replayedPage}
	for {
		res, err := insightOf(c).ReplayPolicy(ctx, req)
		if err != nil {
			f := fault.FromError(err)
			if status.Code(err) == codes.InvalidArgument {
				return nil, misuse("--policy: %w", f)
			}
			return nil, f
		}
		for _, j := range res.GetJobs() {
			r.add(j)
		}
		if req.PageToken = res.GetNextPageToken(); req.GetPageToken() == "" {
			break
		}
		if r.jobs >= maxReplayed {
			r.truncated = true
			break
		}
	}
	byCount := func(a, b *replayGroup) int { return b.jobs - a.jobs }
	slices.SortStableFunc(r.deniedGroups, byCount)
	slices.SortStableFunc(r.allowedGroups, byCount)
	return r, nil
}

func (r *replay) add(j *specqlv1.ReplayedJob) {
	r.jobs++
	for _, text := range j.GetUnknown() {
		if _, known := r.unknown[text]; known || len(r.unknown) < maxGroups {
			r.unknown[text]++
		}
	}
	switch {
	case j.GetWasDenied() == j.GetWouldBeDenied():
		if j.GetWasDenied() {
			r.stillDenied++
		} else {
			r.stillAllowed++
		}
	case j.GetWouldBeDenied():
		r.newlyDenied++
		check := j.GetDenied()[0]
		r.group(&r.deniedGroups, j, [6]string{"denied", j.GetOperation(), j.GetWouldBeErrorCode(), check.GetRule(), check.GetSubject()}, check.GetDetail())
	default:
		r.newlyAllowed++
		r.group(&r.allowedGroups, j, [6]string{"allowed", j.GetOperation(), j.GetErrorCode()}, "")
	}
}

func (r *replay) group(list *[]*replayGroup, j *specqlv1.ReplayedJob, key [6]string, detail string) {
	g := r.groups[key]
	if g == nil {
		if len(r.groups) >= maxGroups {
			r.truncated = true
			return
		}
		g = &replayGroup{
			operation: key[1], code: key[2], rule: key[3], attempted: key[4], detail: detail, last: j.GetCreatedAt().AsTime(), lastRun: j.GetRunId(),
		}
		r.groups[key] = g
		*list = append(*list, g)
	}
	g.jobs++
	if len(j.GetUnknown()) > 0 {
		g.doubtful++
	}
}

// readPolicy reads the policy in question of a service: a bare security_policy, or a registry or an
// overlay of one, whose policy goes over the one in force unless the service is there as a whole.
func readPolicy(path, env string, info *specqlv1.ServiceInfo) (map[string]any, error) {
	file, err := local.ReadFile(path)
	if err != nil {
		return nil, misuse("--policy: %w", err)
	}
	var doc map[string]any
	if err := yaml.Unmarshal(file.Content, &doc); err != nil {
		return nil, misuse("--policy: %s is no map in YAML: %w", path, err)
	}
	policy, err := policyOf(doc, env, info)
	if err != nil {
		return nil, misuse("--policy: %s: %w", path, err)
	}
	expanded, err := expand(policy)
	if err != nil {
		return nil, misuse("--policy: %s: %w", path, err)
	}
	return expanded.(map[string]any), nil
}

func policyOf(doc map[string]any, env string, info *specqlv1.ServiceInfo) (map[string]any, error) {
	overlays := map[string]any{}
	for key, value := range doc {
		if m, ok := value.(map[string]any); ok && key != "services" && len(m) == 1 && m["services"] != nil {
			overlays[key] = m["services"]
		}
	}
	if doc["services"] == nil && len(overlays) == 0 {
		if inner, ok := doc["security_policy"].(map[string]any); ok && len(doc) == 1 {
			return inner, nil
		}
		if doc == nil {
			doc = map[string]any{} // a policy that says nothing
		}
		return doc, nil
	}
	names := slices.Sorted(maps.Keys(overlays))
	if env == "" && doc["services"] == nil {
		if len(names) > 1 {
			return nil, fmt.Errorf("it has the overlays %s: say which one with --env", strings.Join(names, ", "))
		}
		env = names[0]
	}
	if env != "" && len(names) > 0 && overlays[env] == nil {
		return nil, fmt.Errorf("it has no overlay %q, only %s", env, strings.Join(names, ", "))
	}
	policy, found := info.GetSecurityPolicy().AsMap(), false
	for i, list := range []any{doc["services"], overlays[env]} {
		entry := entryOf(list, info.GetName())
		if entry == nil {
			continue
		}
		found = true
		said, ok := entry["security_policy"].(map[string]any)
		if !ok && entry["security_policy"] != nil {
			return nil, errors.New("security_policy is no map")
		}
		if i == 0 && entry["operations"] != nil {
			policy = said // the whole service
			if policy == nil {
				policy = map[string]any{}
			}
			continue
		}
		policy = merge(policy, said)
	}
	if !found {
		return nil, fmt.Errorf("it says nothing of the service %s", info.GetName())
	}
	return policy, nil
}

func entryOf(list any, name string) map[string]any {
	entries, _ := list.([]any)
	for _, e := range entries {
		if m, ok := e.(map[string]any); ok {
			if text, ok := m["name"].(string); ok && strings.EqualFold(text, name) {
				return m
			}
		}
	}
	return nil
}

// merge lays a map over another as overlays do: maps deeply, anything else whole.
func merge(under, over map[string]any) map[string]any {
	out := maps.Clone(under)
	if out == nil {
		out = map[string]any{}
	}
	for key, value := range over {
		a, aok := out[key].(map[string]any)
		b, bok := value.(map[string]any)
		if aok && bok {
			value = merge(a, b)
		}
		out[key] = value
	}
	return out
}

var variable = regexp.MustCompile(`\$\{([A-Za-z_][A-Za-z0-9_]*)(:-([^}]*))?\}`)

// expand fills in ${NAME} of this process's environment, as registries do.
func expand(v any) (any, error) {
	switch v := v.(type) {
	case string:
		var missing error
		text := variable.ReplaceAllStringFunc(v, func(ref string) string {
			m := variable.FindStringSubmatch(ref)
			value, set := os.LookupEnv(m[1])
			if !set && m[2] == "" {
				missing = fmt.Errorf("the environment variable %s is not set", m[1])
			}
			if !set || value == "" && m[2] != "" {
				return m[3]
			}
			return value
		})
		return text, missing
	case map[string]any:
		out := make(map[string]any, len(v))
		for key, value := range v {
			var err error
			if out[key], err = expand(value); err != nil {
				return nil, err
			}
		}
		return out, nil
	case []any:
		out := make([]any, len(v))
		for i, value := range v {
			var err error
			if out[i], err = expand(value); err != nil {
				return nil, err
			}
		}
		return out, nil
	}
	return v, nil
}

// replay asks what a policy would have said of calls of the past, and prints it.
func (s IO) replay(ctx context.Context, c *client.Client, out *output, info *specqlv1.ServiceInfo, path, env string, since *timestamppb.Timestamp) error {
	policy, err := readPolicy(path, env, info)
	if err != nil {
		return err
	}
	r, err := during(s, "asking what the policy says of past calls", func() (*replay, error) {
		return replayPolicy(ctx, c, info.GetName(), policy, since)
	})
	if err != nil {
		return err
	}
	if out.json() {
		return s.printReplay(info, r)
	}
	return s.lines(replayLines(info, r, s.out()), "")
}

func (s IO) printReplay(info *specqlv1.ServiceInfo, r *replay) error {
	groups := func(list []*replayGroup, denied bool) []jsonform.Object {
		out := []jsonform.Object{}
		for _, g := range list {
			o := jsonform.Object{{Name: "operation", Value: g.operation}, {Name: "errorCode", Value: g.code}}
			if denied {
				o = append(o, jsonform.Field{Name: "rule", Value: g.rule}, jsonform.Field{Name: "attempted", Value: g.attempted}, jsonform.Field{Name: "detail", Value: g.detail})
			}
			out = append(out, append(o, jsonform.Field{Name: "jobs", Value: g.jobs}, jsonform.Field{Name: "withUnknowns", Value: g.doubtful},
				jsonform.Field{Name: "lastRunId", Value: g.lastRun}, jsonform.Field{Name: "lastAt", Value: g.last.Format(time.RFC3339Nano)}))
		}
		return out
	}
	unknown := []jsonform.Object{}
	for _, text := range slices.Sorted(maps.Keys(r.unknown)) {
		unknown = append(unknown, jsonform.Object{{Name: "what", Value: text}, {Name: "jobs", Value: r.unknown[text]}})
	}
	return s.print(jsonform.Object{
		{Name: "service", Value: info.GetName()},
		{Name: "executionType", Value: info.GetExecutionType()},
		{Name: "jobs", Value: r.jobs},
		{Name: "stillAllowed", Value: r.stillAllowed},
		{Name: "stillDenied", Value: r.stillDenied},
		{Name: "newlyDenied", Value: r.newlyDenied},
		{Name: "newlyAllowed", Value: r.newlyAllowed},
		{Name: "denied", Value: groups(r.deniedGroups, true)},
		{Name: "allowed", Value: groups(r.allowedGroups, false)},
		{Name: "unknown", Value: unknown},
		{Name: "truncated", Value: r.truncated},
	})
}

func replayLines(info *specqlv1.ServiceInfo, r *replay, screen terminal.Screen) []string {
	lines := []string{
		fmt.Sprintf("service %s (%s): %s under the policy", terminal.Clean(info.GetName()), terminal.Clean(info.GetExecutionType()), count(r.jobs, "past job")),
		fmt.Sprintf("  %d allowed as before, %d denied as before, %d would be denied, %d would be allowed", r.stillAllowed, r.stillDenied, r.newlyDenied, r.newlyAllowed),
	}
	if len(r.deniedGroups) > 0 {
		table := tree.Table{Head: []string{"WOULD BE DENIED", "RULE", "TRIED", "JOBS", "CODE", "LAST RUN"}, Right: map[int]bool{3: true}}
		for _, g := range r.deniedGroups {
			table.Rows = append(table.Rows, []string{g.operation, g.rule, g.attempted, strconv.Itoa(g.jobs), g.code, g.lastRun})
		}
		lines = append(append(lines, ""), table.Lines(screen)...)
	}
	if len(r.allowedGroups) > 0 {
		table := tree.Table{Head: []string{"WOULD BE ALLOWED", "WAS", "JOBS", "OF THEM UNSURE", "LAST RUN"}, Right: map[int]bool{2: true, 3: true}}
		for _, g := range r.allowedGroups {
			table.Rows = append(table.Rows, []string{g.operation, g.code, strconv.Itoa(g.jobs), strconv.Itoa(g.doubtful), g.lastRun})
		}
		lines = append(append(lines, ""), table.Lines(screen)...)
	}
	if len(r.unknown) > 0 {
		lines = append(lines, "", "What the record does not tell (jobs that are allowed as far as is known may be denied for it):")
		for _, text := range slices.Sorted(maps.Keys(r.unknown)) {
			lines = append(lines, terminal.Clean(fmt.Sprintf("  %s (%s)", text, count(r.unknown[text], "job"))))
		}
	}
	if r.truncated {
		lines = append(lines, "", fmt.Sprintf("note: there are more jobs; these are the newest %d (--since)", r.jobs))
	}
	return lines
}
