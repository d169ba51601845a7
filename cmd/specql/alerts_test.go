package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// The documented alerts, as they are written there, in the registry; and two more in a file of their own.
const (
	documentedAlerts = `
alerts:
  - name: "High HTTP Error Rate"
    condition: "http_error_rate > 0.05"
    execution_type: "http"

  - name: "Shell Command Failures"
    condition: "shell_failures > 10"
    execution_type: "shell"

  - name: "Resource Limit Violations"
    condition: "resource_violations > 5"
    execution_type: "any"
`
	moreAlerts = `
alerts:
  - {name: "Slow or {{ dear }}", condition: "http_p95_seconds > 2 || cost_per_hour >= 1.5", window: 15m}
  - {name: "Forbidden", condition: "security_violations != 0 && any_p99_seconds < 60", execution_type: docker, window: 90s}
  - {name: "No form", condition: "!(shell_failures < 1)"}
`
)

func TestAlerts(t *testing.T) {
	t.Parallel()
	dir, _ := busyProject(t)
	registry := filepath.Join(dir, "registry", "service_registry.yaml")
	text, err := os.ReadFile(registry)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(registry, append(text, documentedAlerts...), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "alerts.yaml"), []byte(moreAlerts), 0o600))
	r := specql(t, dir, "validate-config", "alerts.yaml")
	require.Equal(t, 0, r.status, r.out+r.err)

	address, _ := devIn(t, dir, "--data", filepath.Join(t.TempDir(), "data"), "--alerts", "alerts.yaml")
	at := func(args ...string) result { return specql(t, dir, append(args, "--address", address)...) }

	r = at("alerts")
	require.Equal(t, 0, r.status, r.err)
	require.Contains(t, r.out, "High HTTP Error Rate")
	require.Contains(t, r.out, "inactive")

	r = at("alerts", "-o", "json")
	require.Equal(t, 0, r.status, r.err)
	var doc struct {
		Alerts []struct {
			Name, Condition, ExecutionType, Window, State, Source, Prometheus string
			Threshold                                                         *float64
		}
	}
	require.NoError(t, json.Unmarshal([]byte(r.out), &doc), r.out)
	require.Len(t, doc.Alerts, 6)
	require.Equal(t, "High HTTP Error Rate", doc.Alerts[0].Name)
	require.InDelta(t, 0.05, *doc.Alerts[0].Threshold, 0)
	require.Equal(t, "3600s", doc.Alerts[0].Window)
	require.Contains(t, doc.Alerts[3].Source, "alerts.yaml:3")

	r = at("alerts", "No form", "-o", "json")
	require.Equal(t, 0, r.status, r.err)
	require.Contains(t, r.out, `"No form"`)
	require.NotContains(t, r.out, "Forbidden")
	require.Equal(t, 2, at("alerts", "nope").status)
	require.Equal(t, 2, at("alerts", "--history", "101").status)

	// test/prometheus holds what is written here to Prometheus itself.
	r = at("alerts", "--prometheus")
	require.Equal(t, 0, r.status, r.err)
	require.Contains(t, r.err, "No form: the condition !(shell_failures < 1) has no form in PromQL")
	golden := filepath.Join("..", "..", "test", "prometheus", "testdata", "rules.yaml")
	want, err := os.ReadFile(golden)
	require.NoError(t, err)
	got := strings.ReplaceAll(r.out, registry, "service_registry.yaml")
	got = strings.ReplaceAll(got, "registry/service_registry.yaml", "service_registry.yaml")
	require.Equal(t, string(want), got, "write this to %s", golden)
	r = at("alerts", "--prometheus", "-o", "json")
	require.Equal(t, 0, r.status, r.err)
	require.True(t, json.Valid([]byte(r.out)))
}
