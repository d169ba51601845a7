package command

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"google.golang.org/protobuf/types/known/timestamppb"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/client"
)

// insightOf is the stub of the reports.
func insightOf(c *client.Client) specqlv1.InsightServiceClient {
	return specqlv1.NewInsightServiceClient(c.Conn())
}

// since is a flag that says how far back a report looks.
type since struct{ text string }

func (f *since) register(fs *pflag.FlagSet, without string) {
	fs.StringVar(&f.text, "since", without, "look at calls from this time on: 90m, 24h, 7d ago, or a time such as 2026-01-31T12:00:00Z; all for every call that is kept")
}

// time is when the report begins; nil for no bound.
func (f *since) time(now time.Time) (*timestamppb.Timestamp, error) {
	if f.text == "all" {
		return nil, nil
	}
	if at, err := time.Parse(time.RFC3339, f.text); err == nil {
		since := timestamppb.New(at)
		if err := since.CheckValid(); err != nil { // the year 0
			return nil, misuse("--since %q is no time of the years 1 to 9999", f.text)
		}
		return since, nil
	}
	text := f.text
	if days, ok := strings.CutSuffix(text, "d"); ok {
		if n, err := strconv.ParseFloat(days, 64); err == nil {
			text = strconv.FormatFloat(n*24, 'f', -1, 64) + "h"
		}
	}
	ago, err := time.ParseDuration(text)
	if err != nil || ago < 0 {
		return nil, misuse("--since %q is neither a time nor a length of time: write 90m, 24h, 7d, 2026-01-31T12:00:00Z or all", f.text)
	}
	return timestamppb.New(now.Add(-ago)), nil
}

// changes are values to be written into a service of the registry, by their keys.
type changes map[string]any

// set puts a value at a path such as security_policy.resource_limits.memory_mb.
func (c changes) set(path string, value any) {
	first, rest, nested := strings.Cut(path, ".")
	if !nested {
		c[first] = value
		return
	}
	below, ok := c[first].(changes)
	if !ok {
		below = changes{}
		c[first] = below
	}
	below.set(rest, value)
}

// yaml is what a registry or an overlay has to say for the changes.
func (c changes) yaml(service string) []string {
	return append([]string{"services:", "  - name: " + scalar(service)}, c.lines("    ")...)
}

func (c changes) lines(indent string) []string {
	var out []string
	for _, key := range slices.Sorted(maps.Keys(c)) {
		if below, ok := c[key].(changes); ok {
			out = append(append(out, indent+key+":"), below.lines(indent+"  ")...)
			continue
		}
		out = append(out, indent+key+": "+scalar(c[key]))
	}
	return out
}

// scalar is a value as YAML in one line, which JSON is.
func scalar(v any) string {
	if list, ok := v.([]any); ok {
		parts := make([]string, len(list))
		for i, item := range list {
			parts[i] = scalar(item)
		}
		return "[" + strings.Join(parts, ", ") + "]"
	}
	var b strings.Builder
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return strconv.Quote(fmt.Sprint(v))
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// at looks into nested maps; nil where there is nothing.
func at(m map[string]any, path string) any {
	first, rest, nested := strings.Cut(path, ".")
	if !nested {
		return m[first]
	}
	below, _ := m[first].(map[string]any)
	return at(below, rest)
}
