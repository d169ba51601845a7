package api

import (
	"cmp"
	"context"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/intake"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// GetFailurePatterns implements InsightService.
func (i *Insight) GetFailurePatterns(ctx context.Context, req *specqlv1.GetFailurePatternsRequest) (*specqlv1.GetFailurePatternsResponse, error) {
	var v intake.Violations
	f := jobFilter(ctx, &v, req.GetFilter())
	if err := v.Err(); err != nil {
		return nil, err
	}
	f.Failed = true
	jobs, more, err := i.figures(ctx, f)
	if err != nil {
		return nil, err
	}
	resp := &specqlv1.GetFailurePatternsResponse{Patterns: failurePatterns(jobs), Truncated: more}
	if len(resp.GetPatterns()) > maxPatterns {
		resp.Patterns, resp.Truncated = resp.GetPatterns()[:maxPatterns], true
	}
	return resp, nil
}

// failurePatterns groups failed jobs, the most frequent pattern first.
func failurePatterns(jobs []*store.JobFigures) []*specqlv1.FailurePattern {
	type key struct {
		operationKey
		code, shape string
	}
	type group struct {
		*specqlv1.FailurePattern
		runs            map[string]bool
		attempts, begun int64
		first, last     time.Time
	}
	groups := map[key]*group{}
	var order []*group
	shapes := map[string]string{} // most messages come often
	for _, j := range jobs {
		text, known := shapes[j.ErrorMessage]
		if !known {
			text = shape(j.ErrorMessage)
			shapes[j.ErrorMessage] = text
		}
		k := key{operationKey{j.ExecutionType, j.Service, j.Operation}, cmp.Or(j.ErrorCode, string(fault.Internal)), text}
		g := groups[k]
		if g == nil {
			g = &group{FailurePattern: &specqlv1.FailurePattern{
				ExecutionType: j.ExecutionType, Service: j.Service, Operation: j.Operation, ErrorCode: k.code, Shape: text,
			}, runs: map[string]bool{}, first: j.EndedAt}
			groups[k] = g
			order = append(order, g)
		}
		g.Failures++
		if j.RunID != "" {
			g.runs[j.RunID] = true
		}
		if j.Attempts > 0 {
			g.attempts, g.begun = g.attempts+int64(j.Attempts), g.begun+1
		}
		if j.EndedAt.Before(g.first) {
			g.first = j.EndedAt
		}
		if g.last.IsZero() || j.EndedAt.After(g.last) {
			g.last, g.LastErrorMessage, g.LastRunId = j.EndedAt, j.ErrorMessage, j.RunID
		}
	}
	slices.SortStableFunc(order, func(a, b *group) int {
		return cmp.Or(cmp.Compare(b.GetFailures(), a.GetFailures()), b.last.Compare(a.last))
	})
	out := make([]*specqlv1.FailurePattern, 0, len(order))
	for _, g := range order {
		g.AffectedRuns = int64(len(g.runs))
		g.AverageAttempts = ratio(g.attempts, g.begun)
		g.FirstSeenAt, g.LastSeenAt = timeProto(g.first), timeProto(g.last)
		out = append(out, g.FailurePattern)
	}
	return out
}

// masks turn a message into its shape, in this order.
var masks = []struct {
	find    *regexp.Regexp
	replace string
}{
	// Quoted parts. An apostrophe within a word opens none.
	{regexp.MustCompile("\"(?:[^\"\\\\\\n]|\\\\.)*\"|`[^`\\n]*`|“[^”\\n]*”"), "<text>"},
	{regexp.MustCompile(`(^|[^\pL\pN])'[^'\n]*'`), "${1}<text>"},
	// UUIDs, and words of eight letters and digits or more that have a digit and are hexadecimal or end in one.
	{regexp.MustCompile(`\b[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}\b`), "<id>"},
	{regexp.MustCompile(`\b(?:0x)?[0-9a-fA-F]*[0-9][0-9a-fA-F]*[a-fA-F][0-9a-fA-F]*\b|\b(?:0x)?[0-9a-fA-F]*[a-fA-F][0-9a-fA-F]*[0-9][0-9a-fA-F]*\b`), "<id>"},
	{regexp.MustCompile(`\b[A-Za-z]+_[0-9A-Za-z]*[0-9][0-9A-Za-z]*\b`), "<id>"},
	// Numbers, also with a unit.
	{regexp.MustCompile(`[0-9]+(?:[.,:][0-9]+)*`), "<n>"},
}

// maxShape is how many bytes a shape has at most.
const maxShape = 500

// shape is a message with all masked that differs from one occurrence to the next.
func shape(message string) string {
	message = strings.ToValidUTF8(message, "\uFFFD")
	for _, m := range masks {
		message = m.find.ReplaceAllString(message, m.replace)
	}
	message = strings.Join(strings.Fields(message), " ")
	if len(message) > maxShape {
		end := maxShape
		for !utf8.RuneStart(message[end]) {
			end--
		}
		message = message[:end] + "…"
	}
	return message
}
