package shellrunner

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/trace"

	"github.com/specql/mesh/pkg/runner"
)

func FuzzArgument(f *testing.F) {
	for _, seed := range []string{"$input", "$input.a", "$input.a.b[0].c", "a$input.a-b", "$$input", "$inputs", "$input.", "$input[", "$input[0", "$input..a", "$", "", "$input.a[99999999999999]", "é$input.ü", "$input\x00", "$$$input", "$$inputs"} {
		f.Add(seed, `{"a":{"b":[{"c":"x"}]}}`)
	}
	f.Fuzz(func(t *testing.T, arg, input string) {
		pieces, err := parseArgument(arg)
		if err != nil || strings.ContainsRune(arg, 0) { // Validate refuses that one
			return
		}
		// Nothing of the argument is lost: the pieces are the argument, but for doubled dollars.
		var b strings.Builder
		for _, p := range pieces {
			b.WriteString(p.text)
		}
		others := func(s string) string { return strings.ReplaceAll(s, "$", "") }
		require.Equal(t, others(arg), others(b.String()))
		lost := strings.Count(arg, "$") - strings.Count(b.String(), "$")
		require.True(t, lost >= 0 && lost <= strings.Count(arg, "$$input"), "%q became %q", arg, b.String())
		if v, err := decodeInput(json.RawMessage(input)); err == nil {
			out, err := fill(arg, v)
			if err == nil {
				require.NotContains(t, out, "\x00")
			}
		}
	})
}

func FuzzResult(f *testing.F) {
	for _, seed := range []string{"", "{}", "x\n{}", "{\"a\":1}\n\n", "{", "}{", "\xff", "{\"\xff\":1}", "[]"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, stdout []byte) {
		before := slices.Clone(stdout)
		out, err := result(stdout, nil, 0)
		require.NoError(t, err)
		require.True(t, json.Valid(out))
		require.True(t, utf8.Valid(out))
		require.Equal(t, before, stdout)
		require.LessOrEqual(t, len(end(stdout)), errorTail+len("… "))
	})
}

func TestTraceContextIsPassedOn(t *testing.T) {
	parent := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}, TraceFlags: trace.FlagsSampled})
	env, err := environment(trace.ContextWithSpanContext(context.Background(), parent), Config{}, &runner.Job{IdempotencyKey: "a\x00b"}, []byte(`{}`), "/tmp")
	require.NoError(t, err)
	require.Contains(t, env, "TRACEPARENT=00-01000000000000000000000000000000-0200000000000000-01")
	require.False(t, slices.ContainsFunc(env, func(v string) bool { return strings.HasPrefix(v, "SPECQL_IDEMPOTENCY_KEY") }), "what no variable can hold is left out")
}

func TestNarrow(t *testing.T) {
	registry := Policy{NetworkAccess: "all", FileAccess: "read", ResourceLimits: Limits{CPUCores: 2, MemoryMB: 100}}
	e := narrow(registry, nil)
	require.Equal(t, "all", e.Network)
	require.EqualValues(t, defaultProcesses, e.Limits.Processes)
	e = narrow(registry, &Policy{NetworkAccess: "localhost", FileAccess: "read_write", ResourceLimits: Limits{MemoryMB: 200, CPUCores: 1, DiskMB: 5}})
	require.Equal(t, "localhost", e.Network)
	require.Equal(t, "read", e.Files)
	require.Equal(t, Limits{CPUCores: 1, MemoryMB: 100, DiskMB: 5, Processes: defaultProcesses}, e.Limits)
	require.Equal(t, "none", narrow(Policy{NetworkAccess: "nonsense"}, &Policy{NetworkAccess: "all"}).Network, "the narrowest where a value is unknown")
	require.Equal(t, "none", narrow(Policy{}, nil).Network)
	require.Equal(t, "read_write", narrow(Policy{}, nil).Files)
}

func BenchmarkTrue(b *testing.B) {
	for name, policy := range map[string]string{
		"network none": `{"allowed_commands":["/bin/true"],"resource_limits":{"memory_mb":64,"processes":8,"cpu_cores":1}}`,
		"network all":  `{"allowed_commands":["/bin/true"],"network_access":"all","resource_limits":{"memory_mb":64,"processes":8,"cpu_cores":1}}`,
	} {
		b.Run(name, func(b *testing.B) {
			r := newRunner(b, Options{})
			job := &runner.Job{
				ID: "bench", Service: runner.Service{Policy: []byte(policy)},
				Operation: runner.Operation{Config: []byte(`{"command":["/bin/true"]}`)},
			}
			least := time.Hour
			for b.Loop() {
				begin := time.Now()
				result, err := r.Execute(b.Context(), job, discard{})
				require.NoError(b, err)
				require.NoError(b, result.Err)
				least = min(least, time.Since(begin))
			}
			b.ReportMetric(float64(least.Microseconds())/1000, "least-ms")
		})
	}
}
