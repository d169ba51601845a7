package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestPolicyReplay: what the runners say of calls of the past under a policy that is not in force.
func TestPolicyReplay(t *testing.T) {
	t.Parallel()
	dir, _ := busyProject(t)
	onBothStores(t, dir, func(t *testing.T, address string) {
		files := t.TempDir()
		at := func(args ...string) result { return specql(t, dir, append(args, "--address", address)...) }
		policy := func(text string) string {
			path := filepath.Join(files, "new.yaml")
			require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
			return path
		}
		type group struct {
			Operation, ErrorCode, Rule, Attempted string
			Jobs                                  int
		}
		type verdict struct {
			Jobs, StillAllowed, StillDenied, NewlyDenied, NewlyAllowed int
			Denied, Allowed                                            []group
			Unknown                                                    []struct {
				What string
				Jobs int
			}
		}
		replay := func(service, text string, args ...string) verdict {
			t.Helper()
			r := at(append([]string{"security-audit", "--service", service, "--policy", policy(text), "-o", "json"}, args...)...)
			require.Equal(t, 0, r.status, r.err)
			return decode[verdict](t, r.out)
		}
		require.Zero(t, replay("script", "allowed_commands: [/bin/cat]").Jobs)
		require.Equal(t, 0, at("load-test", "--service", "script", "--requests", "4").status)
		require.Equal(t, 0, at("load-test", "--service", "web", "--operation", "count", "--requests", "3").status)
		require.Equal(t, 1, at("load-test", "--service", "denied", "--operation", "list", "--requests", "2").status)

		// The policy in force says what it said.
		v := replay("script", "allowed_commands: [/bin/cat]\nresource_limits: {memory_mb: 512}")
		require.Equal(t, []int{4, 4, 0, 0, 0}, []int{v.Jobs, v.StillAllowed, v.StillDenied, v.NewlyDenied, v.NewlyAllowed})
		require.Contains(t, v.Unknown[0].What, "what the command itself executed is not recorded")

		// A whole policy in place of it, and an overlay over it.
		v = replay("script", "allowed_commands: [/bin/ls]")
		require.Equal(t, 4, v.NewlyDenied)
		require.Equal(t, []any{"echo", "POLICY_VIOLATION", "allowed_commands", 4}, []any{v.Denied[0].Operation, v.Denied[0].ErrorCode, v.Denied[0].Rule, v.Denied[0].Jobs})
		v = replay("script", "production: {services: [{name: SCRIPT, security_policy: {resource_limits: {cpu_seconds: 0.000001}}}]}")
		require.Equal(t, 4, v.NewlyDenied, "what was measured decides")
		require.Equal(t, []string{"RESOURCE_EXCEEDED", "resource_limits.cpu_seconds"}, []string{v.Denied[0].ErrorCode, v.Denied[0].Rule})
		require.Equal(t, 4, replay("script", "services: [{name: script, security_policy: {network_access: none}}]").StillAllowed)

		v = replay("denied", "services: [{name: denied, security_policy: {allowed_commands: [/bin/cat, /bin/ls]}}]")
		require.Equal(t, []int{2, 2, 0}, []int{v.Jobs, v.NewlyAllowed, v.StillDenied})
		require.Equal(t, "POLICY_VIOLATION", v.Allowed[0].ErrorCode)
		require.Equal(t, 2, replay("denied", "{allowed_commands: [/bin/cat]}").StillDenied)

		v = replay("web", "{allow_private_networks: false}")
		require.Equal(t, 3, v.NewlyDenied, "the address that was connected to decides")
		require.Equal(t, "allow_private_networks", v.Denied[0].Rule)
		require.Contains(t, v.Denied[0].Attempted, "127.0.0.1")
		v = replay("web", "{allow_private_networks: true, allowed_domains: [api.example.com]}")
		require.Equal(t, "allowed_domains", v.Denied[0].Rule)
		v = replay("web", "{allow_private_networks: true, max_response_size: 3}")
		require.Equal(t, "RESOURCE_EXCEEDED", v.Denied[0].ErrorCode)
		require.Equal(t, 3, replay("web", "{allow_private_networks: true}").StillAllowed)
		require.Zero(t, replay("web", "{allow_private_networks: false}", "--since", "2099-01-01T00:00:00Z").Jobs)

		r := at("security-audit", "--service", "denied", "--policy", policy("{allowed_commands: [/bin/ls]}"))
		require.Equal(t, 0, r.status, r.err)
		require.Contains(t, r.out, "0 allowed as before, 0 denied as before, 0 would be denied, 2 would be allowed")
		require.Regexp(t, `(?m)^list +POLICY_VIOLATION +2 +2 `, r.out)

		for want, text := range map[string]string{
			`unknown key "commands"`:             "{commands: [/bin/ls]}",
			"says nothing of the service script": "services: [{name: other}]",
			"say which one with --env":           "a: {services: [{name: script}]}\nb: {services: [{name: script}]}",
			"is no map in YAML":                  "[1, 2]",
			"SPECQL_NOT_SET is not set":          "allowed_commands: ['${SPECQL_NOT_SET}']",
		} {
			r := at("security-audit", "--service", "script", "--policy", policy(text))
			require.Equal(t, 2, r.status, text+r.out)
			require.Contains(t, r.err, want)
		}
		require.Equal(t, 2, at("security-audit", "--service", "script", "--policy", filepath.Join(files, "nope.yaml")).status)
	})
}
