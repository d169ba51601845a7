package alert

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/pkg/spec/expr"
)

// The orchestrators' metrics that rules are made of; docs/observability.md lists them.
const (
	jobDuration = "specql_job_duration_seconds"
	jobsTotal   = "specql_jobs_total"
	jobCost     = "specql_job_cost_usd_total"
)

// PromQL says a condition in PromQL, over the metrics of all orchestrators; empty where it has no form there.
func PromQL(a *spec.Alert) string {
	f := a.Condition.Formula()
	if f == nil {
		return ""
	}
	text, kind := promQL(a, f)
	if kind != vectorKind || !logical(f) {
		return ""
	}
	return text
}

// logical says whether the outermost operator compares, or joins what compares: anything else is no condition.
func logical(f *expr.Formula) bool {
	return comparison(f.Op) || f.Op == "&&" || f.Op == "||"
}

type promKind int

const (
	noKind promKind = iota
	scalarKind
	vectorKind
)

func promQL(a *spec.Alert, f *expr.Formula) (string, promKind) {
	switch {
	case f.Op == "" && f.Root == "":
		return strconv.FormatFloat(f.Number, 'g', -1, 64), scalarKind
	case f.Op == "":
		m, ok := metricOf(f.Root, a)
		if !ok {
			return "", noKind
		}
		return m.promQL(a.Window), vectorKind
	case f.Op == "-" && len(f.Args) == 1:
		text, kind := promQL(a, f.Args[0])
		return "-" + text, kind
	case len(f.Args) != 2:
		return "", noKind
	}
	left, lk := promQL(a, f.Args[0])
	right, rk := promQL(a, f.Args[1])
	if lk == noKind || rk == noKind {
		return "", noKind
	}
	op := f.Op
	switch f.Op {
	case "&&", "||":
		// Both sides are vectors without labels, empty where a comparison does not hold.
		if lk != vectorKind || rk != vectorKind || !logical(f.Args[0]) || !logical(f.Args[1]) {
			return "", noKind
		}
		op = map[string]string{"&&": "and", "||": "or"}[f.Op]
	default:
		if logical(f.Args[0]) || logical(f.Args[1]) {
			return "", noKind // a truth is no number there
		}
		if lk == scalarKind && rk == scalarKind && comparison(f.Op) {
			op += " bool" // two numbers compare so alone, which is no vector either
		}
	}
	kind := vectorKind
	if lk == scalarKind && rk == scalarKind {
		kind = scalarKind
	}
	return "(" + left + " " + op + " " + right + ")", kind
}

func (m metric) promQL(window time.Duration) string {
	over := "[" + promDuration(window) + "]"
	labels := func(more ...string) string {
		if m.executionType != anyType {
			more = append([]string{fmt.Sprintf("execution_type=%q", m.executionType)}, more...)
		}
		return "{" + strings.Join(more, ",") + "}"
	}
	const ended = `status=~"completed|failed"`
	count := func(selector string) string { return "sum(increase(" + jobsTotal + selector + over + "))" }
	enough := func(text string) string {
		return fmt.Sprintf("(%s and %s >= %d)", text, count(labels(ended)), MinSamples)
	}
	orZero := func(text string) string { return "(" + text + " or vector(0))" }
	quantile := func(q string) string {
		return enough("histogram_quantile(" + q + ", sum by (le) (increase(" + jobDuration + "_bucket" + labels(ended) + over + ")))")
	}
	code := func(code string) string {
		return orZero("sum(increase(" + jobsTotal + labels(`status="failed"`, fmt.Sprintf("code=%q", code)) + over + "))")
	}
	switch m.kind {
	case suffixErrorRate:
		return enough(orZero(count(labels(`status="failed"`))) + " / " + count(labels(ended)))
	case suffixFailures:
		return orZero(count(labels(`status="failed"`)))
	case suffixP50:
		return quantile("0.5")
	case suffixP95:
		return quantile("0.95")
	case suffixP99:
		return quantile("0.99")
	case resourceViolations:
		return code("RESOURCE_EXCEEDED")
	case securityViolations:
		return code("POLICY_VIOLATION")
	}
	return orZero("sum(increase("+jobCost+labels()+over+"))") + " / " + strconv.FormatFloat(window.Hours(), 'g', -1, 64)
}

// promDuration writes a duration as PromQL reads it.
func promDuration(d time.Duration) string {
	if d%time.Second == 0 {
		return strconv.FormatInt(int64(d/time.Second), 10) + "s"
	}
	return strconv.FormatInt(max(d.Milliseconds(), 1), 10) + "ms"
}
