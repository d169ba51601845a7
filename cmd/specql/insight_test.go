package main

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// onBothStores runs a test on a mesh with the embedded store, and on one with PostgreSQL.
func onBothStores(t *testing.T, dir string, test func(t *testing.T, address string)) {
	t.Run("embedded", func(t *testing.T) {
		t.Parallel()
		address, _ := devIn(t, dir, "--data", filepath.Join(t.TempDir(), "data"))
		test(t, address)
	})
	t.Run("postgresql", func(t *testing.T) {
		t.Parallel()
		database := migrated(t, dir)
		address, _ := devIn(t, dir, "--data", filepath.Join(t.TempDir(), "data"), "--database", database)
		test(t, address)
	})
}

func TestInsightCommands(t *testing.T) {
	t.Parallel()
	dir, _ := busyProject(t)
	onBothStores(t, dir, func(t *testing.T, address string) {
		at := func(args ...string) result { return specql(t, dir, append(args, "--address", address)...) }

		// Nothing was called yet.
		r := at("resource-check", "--service", "script")
		require.Equal(t, 0, r.status, r.err)
		require.Contains(t, r.out, "No limit can be derived yet")
		require.Contains(t, r.out, "echo has no measured calls")
		r = at("security-audit", "--service", "denied")
		require.Equal(t, 0, r.status, r.err)
		require.Contains(t, r.out, "no violations")

		for _, args := range [][]string{
			{"--service", "script", "--requests", "10"},
			{"--service", "web", "--operation", "count", "--requests", "40"},
		} {
			r = at(append([]string{"load-test"}, args...)...)
			require.Equal(t, 0, r.status, r.err)
		}
		type checks struct {
			Limits []struct {
				Operation, Limit    string
				Set                 *float64
				P50, P95, P99, Peak float64
				Samples             int
			}
			Suggested map[string]map[string]any
			Notes     []string
			YAML      string
		}
		r = at("resource-check", "--service", "script", "-o", "json")
		require.Equal(t, 0, r.status, r.err)
		got := decode[checks](t, r.out)
		require.Empty(t, got.Suggested)
		require.Contains(t, r.out, "10 samples are too few to derive a limit from; 30 are needed")

		r = at("load-test", "--service", "script", "--requests", "25")
		require.Equal(t, 0, r.status, r.err)
		r = at("resource-check", "--service", "script", "-o", "json")
		got = decode[checks](t, r.out)
		require.NotEmpty(t, got.Limits)
		found := map[string]bool{}
		for _, l := range got.Limits {
			found[l.Limit] = true
			require.Equal(t, "echo", l.Operation)
			require.Equal(t, 35, l.Samples, l.Limit)
			require.IsNonDecreasing(t, []float64{l.P50, l.P95, l.P99, l.Peak})
			if l.Limit == "security_policy.resource_limits.memory_mb" {
				require.InDelta(t, 512, *l.Set, 0)
				require.Less(t, l.Peak, 512.0)
			}
		}
		require.True(t, found["security_policy.resource_limits.timeout_seconds"] && found["runner_config.timeout"], r.out)
		require.Contains(t, got.Suggested, "security_policy")
		require.Contains(t, got.YAML, "services:\n  - name: \"script\"\n")
		r = at("resource-check", "--service", "web")
		require.Equal(t, 0, r.status, r.err)
		require.Regexp(t, `(?m)^count +max_response_size +100000 B +`, r.out)
		require.Regexp(t, `(?m)^      max_response_size: \d+$`, r.out, "as YAML")
		require.Regexp(t, `(?m)^flaky has no measured calls|note: flaky has no measured calls`, r.out)

		for range 2 {
			r = at("load-test", "--service", "denied", "--operation", "list", "--requests", "3")
			require.Equal(t, 1, r.status, r.err)
		}
		r = at("security-audit", "--service", "denied", "--output", "json")
		require.Equal(t, 0, r.status, r.err)
		audit := decode[struct {
			Violations []struct {
				Operation, Rule, Attempted, Detail, LastRunID string
				Count                                         int
				RuleSource                                    string
				Changes                                       []struct {
					Path string
					Add  []string
				}
			}
			YAML string
		}](t, r.out)
		require.Len(t, audit.Violations, 1)
		v := audit.Violations[0]
		require.Equal(t, []any{"list", "allowed_commands", 6, "allowed_commands"}, []any{v.Operation, v.Rule, v.Count, v.Changes[0].Path})
		require.NotEmpty(t, v.LastRunID)
		require.Equal(t, []string{v.Attempted}, v.Changes[0].Add)
		require.Regexp(t, `service_registry\.yaml:23:\d+$`, v.RuleSource, "the line of the list")
		require.Contains(t, audit.YAML, `allowed_commands: ["/bin/cat", "`+v.Attempted+`"]`)
		r = at("security-audit", "--service", "denied")
		require.Regexp(t, `(?m)^list +allowed_commands +/\S*bin/ls +6 +`, r.out)
		require.Contains(t, r.out, "to allowed_commands\n")
		require.Equal(t, 0, at("security-audit", "--service", "denied", "--since", "2099-01-01T00:00:00Z").status)

		for want, args := range map[string][]string{
			"--service is needed":           {"resource-check"},
			"--service is needed: the serv": {"security-audit"},
			`there is no service "x"`:       {"resource-check", "--service", "x"},
			`there is no service "y"`:       {"security-audit", "--service", "y"},
			"neither a time":                {"resource-check", "--service", "web", "--since", "soon"},
			"--limit must be":               {"security-audit", "--service", "web", "--limit", "0"},
		} {
			r = at(args...)
			require.Equal(t, 2, r.status, args)
			require.Contains(t, r.err, want)
		}
	})
}

// TestAuditsAdvice: with the change that the audit prints as an overlay, the call goes through.
func TestAuditsAdvice(t *testing.T) {
	t.Parallel()
	dir, _ := busyProject(t)
	registry := filepath.Join(dir, "registry", "service_registry.yaml")
	call := func(args ...string) result {
		address, p := devIn(t, dir, append(args, "--data", filepath.Join(t.TempDir(), "data"))...)
		defer p.end(syscall.SIGTERM)
		specql(t, dir, "load-test", "--service", "denied", "--operation", "list", "--requests", "1", "--address", address)
		return specql(t, dir, "security-audit", "--service", "denied", "-o", "json", "--address", address)
	}
	before := decode[struct {
		Violations []any
		YAML       string
	}](t, call().out)
	require.Len(t, before.Violations, 1)
	text, err := os.ReadFile(registry)
	require.NoError(t, err)
	overlay := "production:\n  " + strings.ReplaceAll(strings.TrimSpace(before.YAML), "\n", "\n  ") + "\n"
	require.NoError(t, os.WriteFile(registry, append(text, overlay...), 0o600))
	after := decode[struct{ Violations []any }](t, call("--env", "production").out)
	require.Empty(t, after.Violations)
}
