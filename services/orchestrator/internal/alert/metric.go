// Package alert watches the conditions of the registry: it takes their figures from the store,
// keeps how each stands there, and tells of changes through ordinary calls.
package alert

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/pkg/spec/expr"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// MinSamples is how many jobs must have ended within the window before a rate or a percentile counts:
// one failure of one call is not an error rate.
const MinSamples = 10

// anyType is every execution type.
const anyType = "any"

// The names of metrics: those with the execution type before them, and those of all jobs of the alert's type.
const (
	suffixErrorRate = "_error_rate"
	suffixFailures  = "_failures"
	suffixP50       = "_p50_seconds"
	suffixP95       = "_p95_seconds"
	suffixP99       = "_p99_seconds"

	resourceViolations = "resource_violations"
	securityViolations = "security_violations"
	costPerHour        = "cost_per_hour"
)

// metric is one name in a condition.
type metric struct {
	// kind is a suffix or one of the plain names.
	kind          string
	executionType string
}

// metricOf reads a name in a condition of an alert. The registry let only these names pass.
func metricOf(name string, a *spec.Alert) (metric, bool) {
	switch name {
	case resourceViolations, securityViolations, costPerHour:
		return metric{kind: name, executionType: a.ExecutionType}, true
	}
	for _, suffix := range []string{suffixErrorRate, suffixFailures, suffixP50, suffixP95, suffixP99} {
		if t, ok := strings.CutSuffix(name, suffix); ok && t != "" {
			return metric{kind: suffix, executionType: t}, true
		}
	}
	return metric{}, false
}

// roots are the names of a condition, sorted.
func roots(c *expr.Condition) []string {
	set := map[string]bool{}
	for _, ref := range c.Refs() {
		set[ref.Root] = true
	}
	return slices.Sorted(maps.Keys(set))
}

// figures are the sums of one window, by execution type.
type figures map[string]*store.WindowFigures

func figuresOf(rows []*store.WindowFigures) figures {
	f := figures{}
	for _, r := range rows {
		f[r.ExecutionType] = r
	}
	return f
}

// value of a metric; false where there are too few samples, with how many there are.
func (f figures) value(m metric, windowHours float64) (value float64, samples int64, ok bool) {
	t := m.executionType
	if t == anyType {
		t = ""
	}
	w := f[t]
	if w == nil {
		w = &store.WindowFigures{}
	}
	ended := w.Completed + w.Failed
	quantile := func(p *float64) (float64, int64, bool) {
		if p == nil || ended < MinSamples {
			return 0, ended, false
		}
		return *p, ended, true
	}
	switch m.kind {
	case suffixErrorRate:
		if ended < MinSamples {
			return 0, ended, false
		}
		return float64(w.Failed) / float64(ended), ended, true
	case suffixFailures:
		return float64(w.Failed), ended, true
	case suffixP50:
		return quantile(w.P50)
	case suffixP95:
		return quantile(w.P95)
	case suffixP99:
		return quantile(w.P99)
	case resourceViolations:
		return float64(w.Resource), ended, true
	case securityViolations:
		return float64(w.Security), ended, true
	case costPerHour:
		return w.CostUSD / windowHours, ended, true
	}
	return 0, 0, false
}

// verdict is what a condition says now.
type verdict struct {
	holds  bool
	values map[string]float64
	detail string
}

// evaluate decides a condition. Where figures are missing that it needs, it does not hold.
func evaluate(a *spec.Alert, f figures) verdict {
	v := verdict{values: map[string]float64{}}
	scope := expr.MapScope{}
	for _, name := range roots(a.Condition) {
		m, ok := metricOf(name, a)
		if !ok {
			v.detail = fmt.Sprintf("there is no metric %s", name)
			continue
		}
		value, samples, ok := f.value(m, a.Window.Hours())
		if !ok {
			v.detail = fmt.Sprintf("%s: %d jobs ended within the window; a rate or a percentile takes %d", name, samples, MinSamples)
			continue
		}
		if math.IsNaN(value) || math.IsInf(value, 0) {
			v.detail = fmt.Sprintf("%s: what is recorded of the window's jobs adds up to no number", name)
			continue
		}
		v.values[name], scope[name] = value, value
	}
	holds, err := a.Condition.Eval(scope)
	if err != nil {
		if v.detail == "" {
			v.detail = err.Error()
		}
		return v
	}
	v.holds, v.detail = holds, ""
	return v
}

// Threshold is the number that a condition compares its figure with; false where it is not one
// comparison of a name with a number.
func Threshold(c *expr.Condition) (float64, bool) {
	f := c.Formula()
	if f == nil || len(f.Args) != 2 || !comparison(f.Op) {
		return 0, false
	}
	for i, arg := range f.Args {
		if other := f.Args[1-i]; arg.Op == "" && arg.Root != "" && other.Root == "" {
			return constant(other)
		}
	}
	return 0, false
}

// constant is the value of a tree without names.
func constant(f *expr.Formula) (float64, bool) {
	switch {
	case f.Op == "" && f.Root == "":
		return f.Number, true
	case f.Op == "-" && len(f.Args) == 1:
		n, ok := constant(f.Args[0])
		return -n, ok
	}
	return 0, false
}

func comparison(op string) bool {
	return slices.Contains([]string{"==", "!=", "<", "<=", ">", ">="}, op)
}
