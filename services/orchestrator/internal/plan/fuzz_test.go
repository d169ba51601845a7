package plan_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/internal/plan"
)

// A workflow comes from strangers: whatever its text, it is a plan or it has problems.
func FuzzCompile(f *testing.F) {
	for _, text := range []string{
		"actions: []",
		"actions: [{call_service: {service: bank, operation: charge, as: a, input: {v: $input.x}}}]\noutput: {v: \"${ $a.v + 1 }\"}",
		"actions:\n  - call_service:\n      service: bank\n      operation: charge\n      on_success: [{call_service: {service: bank, operation: refund, input: {a: $api_response.data}}}]\n      on_failure: [{fail: {message: \"$error.code\"}}]",
		"actions: [{parallel: {on_error: wait_all, max_concurrency: 2, branches: [{wait: {seconds: 1}}, [{validate: [\"$input.a > 1\"]}]]}}]",
		"actions: [{foreach: {items: \"$input.rows\", as: row, do: [{foreach: {items: $row, do: [{call_service: {service: bank, operation: charge, input: {v: $item, i: $index}}}]}}]}}]",
		"actions: [{if: {condition: \"input.a == $b\", then: [{await_signal: {name: go, timeout: 2h, as: x}}], else: [{update: {set: {a: 1}}}]}}]\noutput: $x",
		"input: {a: {type: integer, default: 1}}\nactions: [{wait: {until: \"$run.started_at\"}}]\noutput: {a: \"$a\"}",
		"actions: &a [{parallel: *a}]",
		"\xff\xfe",
	} {
		f.Add(text)
	}
	reg, problems := spec.ParseRegistry(spec.File{Name: "registry.yaml", Content: []byte(registryText)}, spec.Options{})
	require.NoError(f, problems.Err())
	f.Fuzz(func(t *testing.T, text string) {
		a, problems := spec.ParseWorkflow(spec.File{Name: "workflow", Content: []byte(text)}, spec.Options{})
		if a == nil || problems.HasErrors() {
			require.NotEmpty(t, problems, "no action, and no reason why")
			return
		}
		p, problems := plan.Compile(a, nil, reg)
		require.Equal(t, problems.HasErrors(), p == nil, "%v", problems)
		for _, problem := range problems {
			require.NotEmpty(t, problem.Message)
		}
		if p == nil {
			return
		}
		p.CheckInput(map[string]any{"x": 1})
		p.OpenNames()
		paths := map[string]bool{}
		for _, c := range p.Calls() {
			require.False(t, paths[c.Path()], "two calls at %s", c.Path())
			paths[c.Path()] = true
		}
	})
}

func TestFiveThousandUnknownNamesAreAnsweredQuicklyWithAHundredProblems(t *testing.T) {
	t.Parallel()
	var text strings.Builder
	text.WriteString("actions:\n")
	for i := range 5000 {
		fmt.Fprintf(&text, "- call_service: {service: bank, operation: charge, as: a%d, input: {v: $unknown%d}}\n", i, i)
	}
	began := time.Now()
	p, problems := compile(t, "", text.String())
	require.NoError(t, problems.Err())
	missing := p.CheckInput(map[string]any{})
	open := p.OpenNames()
	require.Less(t, time.Since(began), 10*time.Second)
	require.Len(t, missing, 100)
	require.Len(t, open, 100)
	size := 0
	for _, problem := range missing {
		size += len(problem.String())
	}
	require.Less(t, size, 100_000, "each lists a few of the names there are")
}
