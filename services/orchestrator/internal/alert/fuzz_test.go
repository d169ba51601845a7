package alert

import (
	"encoding/json"
	"math"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// FuzzAlert reads an alert of a registry, and decides it on any figures.
func FuzzAlert(f *testing.F) {
	for _, condition := range []string{
		"http_error_rate > 0.05", "cost_per_hour / shell_failures > -1", "any_p95_seconds * 1e308 > 1.0 && resource_violations % 2 == 0", "!(shell_failures > 6) || docker_failures in [1.0]",
		"http_failures > http_p99_seconds ? true : false", "[1].all(x, x > http_failures)", "cost_per_hour - 5", "((((((",
	} {
		f.Add(condition, "http", "1h", int64(110), int64(10), 1.5, 9.0)
	}
	f.Add("cost_per_hour > 1", "any", "1ns", int64(math.MaxInt64), int64(1), math.Inf(1), math.MaxFloat64)
	f.Add("http_p50_seconds > 1", "my.type", "876000h", int64(-1), int64(math.MinInt64), math.NaN(), math.NaN())
	f.Fuzz(func(t *testing.T, condition, executionType, window string, completed, failed int64, seconds, cost float64) {
		text, err := json.Marshal(map[string]any{"alerts": []any{map[string]any{"name": "a", "condition": condition, "execution_type": executionType, "window": window}}})
		require.NoError(t, err)
		registry, problems := spec.ParseRegistry(spec.File{Name: "alerts.yaml", Content: text}, spec.Options{})
		if registry == nil || len(problems) > 0 || len(registry.Alerts) != 1 {
			return
		}
		a := registry.Alerts[0]
		require.Positive(t, a.Window)
		w := store.WindowFigures{Completed: completed, Failed: failed, Resource: failed, Security: completed, CostUSD: cost, P50: &seconds, P95: &seconds, P99: &seconds}
		typed := w
		typed.ExecutionType = "http"
		v := evaluate(a, figuresOf([]*store.WindowFigures{&w, &typed}))
		_, err = json.Marshal(v.values)
		require.NoError(t, err, "what is kept of an alert is JSON")
		evaluate(a, figuresOf(nil))
		_, _ = Threshold(a.Condition)
		_ = PromQL(a)
	})
}
