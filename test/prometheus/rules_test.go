// Package prometheus holds the rules that `specql alerts --prometheus` writes to Prometheus itself: what
// promtool checks, and what they say of series as orchestrators have them.
package prometheus

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/promql/promqltest"
	"github.com/stretchr/testify/require"
)

// written is what cmd/specql's TestAlerts holds the command to.
func written(t *testing.T) map[string]rulefmt.Rule {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", "rules.yaml"))
	require.NoError(t, err)
	groups, errs := rulefmt.Parse(text, false, model.UTF8Validation, parser.NewParser(parser.Options{}), slog.New(slog.DiscardHandler))
	require.Empty(t, errs)
	require.Len(t, groups.Groups, 1)
	rules := map[string]rulefmt.Rule{}
	for _, r := range groups.Groups[0].Rules {
		rules[r.Alert] = r
	}
	require.Len(t, rules, 5)
	return rules
}

func TestRulesAreValid(t *testing.T) {
	for name, r := range written(t) {
		require.Positive(t, r.For, name)
		require.Equal(t, 5*r.For, r.KeepFiringFor, name)
	}
}

// Each rule fires where its condition holds, and is silent where it does not, or with too few samples.
func TestRulesFire(t *testing.T) {
	rules := written(t)
	for name, c := range map[string]struct {
		rule   string
		series string
		want   string
	}{
		"a tenth fails": {"High HTTP Error Rate", `
			specql_jobs_total{execution_type="http",service="a",status="completed",code="OK",instance="1"} 0+9x60
			specql_jobs_total{execution_type="http",service="a",status="failed",code="REMOTE_ERROR",instance="2"} 0+1x60`, "{} 0.1"},
		"none fails": {"High HTTP Error Rate", `
			specql_jobs_total{execution_type="http",service="a",status="completed",code="OK"} 0+9x60`, ""},
		"too few": {"High HTTP Error Rate", `
			specql_jobs_total{execution_type="http",service="a",status="failed",code="REMOTE_ERROR"} 0x30 3x29`, ""},
		"no series": {"High HTTP Error Rate", "", ""},
		"many failures": {"Shell Command Failures", `
			specql_jobs_total{execution_type="shell",service="a",status="failed",code="REMOTE_ERROR",instance="1"} 0+1x60
			specql_jobs_total{execution_type="shell",service="a",status="failed",code="TIMEOUT",instance="2"} 0+1x60
			specql_jobs_total{execution_type="http",service="a",status="failed",code="TIMEOUT",instance="2"} 0+100x60`, "{} 120"},
		"few failures": {"Shell Command Failures", `
			specql_jobs_total{execution_type="shell",service="a",status="failed",code="REMOTE_ERROR"} 0x30 5x30`, ""},
		"limits": {"Resource Limit Violations", `
			specql_jobs_total{execution_type="shell",service="a",status="failed",code="RESOURCE_EXCEEDED"} 0+1x60
			specql_jobs_total{execution_type="docker",service="b",status="failed",code="RESOURCE_EXCEEDED"} 0+1x60
			specql_jobs_total{execution_type="docker",service="b",status="failed",code="TIMEOUT"} 0+9x60`, "{} 120"},
		"dear": {"Slow or {{ dear }}", `
			specql_job_cost_usd_total{execution_type="serverless",service="f"} 0+0.1x60`, "{} 6"},
		"slow": {"Slow or {{ dear }}", `
			specql_jobs_total{execution_type="http",service="a",status="completed",code="OK"} 0+9x60
			specql_job_duration_seconds_bucket{execution_type="http",status="completed",le="1"} 0x60
			specql_job_duration_seconds_bucket{execution_type="http",status="completed",le="4"} 0+9x60
			specql_job_duration_seconds_bucket{execution_type="http",status="completed",le="+Inf"} 0+9x60`, "{} 3.85"},
		"neither": {"Slow or {{ dear }}", `
			specql_jobs_total{execution_type="http",service="a",status="completed",code="OK"} 0+9x60
			specql_job_duration_seconds_bucket{execution_type="http",status="completed",le="1"} 0+9x60
			specql_job_duration_seconds_bucket{execution_type="http",status="completed",le="+Inf"} 0+9x60`, ""},
	} {
		t.Run(name, func(t *testing.T) {
			script := "load 1m" + c.series + "\n\neval instant at 60m " + rules[c.rule].Expr + "\n    " + c.want + "\n"
			promqltest.RunTest(t, script, promqltest.NewTestEngine(t, false, 0, promqltest.DefaultMaxSamplesPerQuery))
		})
	}
}
