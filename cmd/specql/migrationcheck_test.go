package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const oldRegistry = `# Ours since the beginning
services:
  - name: stripe_api # money
    type: payment
    category: financial
    operations:
      - name: create_charge
        input_schema: {amount: integer}
  - name: mail
    type: mail
    category: talk
    # where
    runner_config:
      base_url: "https://API.example.com/v1" # theirs
      headers:
        Authorization: "Bearer sk_live_topsecret"

    # what it does
    operations:
      - {name: send}
  - name: files
    type: script
    category: automation
    execution_type: shell
    security_policy: {allowed_commands: [/bin/ls]}
    operations: [{name: list, command: [/bin/ls]}]
development:
  services:
    - name: mail
      runner_config:
        base_url: "https://dev.example.com"
`

const modernRegistry = `# Ours since the beginning
services:
  - name: stripe_api # money
    type: payment
    category: financial
    execution_type: http
    runner_config:
      base_url: "${SPECQL_STRIPE_API_BASE_URL:-}"
    operations:
      - name: create_charge
        input_schema: {amount: integer}
  - name: mail
    type: mail
    category: talk
    execution_type: http
    # where
    runner_config:
      base_url: "https://API.example.com/v1" # theirs
      headers:
        Authorization: "Bearer sk_live_topsecret"
    security_policy:
      allowed_domains: ["api.example.com"]

    # what it does
    operations:
      - {name: send}
  - name: files
    type: script
    category: automation
    execution_type: shell
    security_policy: {allowed_commands: [/bin/ls]}
    operations: [{name: list, command: [/bin/ls]}]
development:
  services:
    - name: mail
      security_policy:
        allowed_domains: ["dev.example.com"]
      runner_config:
        base_url: "https://dev.example.com"
`

type findings struct {
	Valid    bool
	Problems []struct{ Path, Message string }
	Findings []struct {
		File, Path, Pattern, Message, Modern string
		Line, Column                         int
		Fixable, Written                     bool
	}
}

func TestMigrationCheck(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "registry.yaml")
	require.NoError(t, os.WriteFile(file, []byte(oldRegistry), 0o600))
	require.NoError(t, os.Chmod(file, 0o640)) //nolint:gosec // the mode that must stay
	before := specql(t, dir, "validate-config", "registry.yaml")
	require.Equal(t, 0, before.status, before.out)

	r := specql(t, dir, "migration-check", "registry.yaml")
	require.Equal(t, 0, r.status, r.err)
	require.Contains(t, r.out, "registry.yaml:3:5: old: services[0]: the execution type is not said, and http is meant; write `execution_type: http`\n")
	require.Contains(t, r.out, "registry.yaml:3:5: old: services[0]: there is no base_url")
	require.Contains(t, r.out, "SPECQL_STRIPE_API_BASE_URL")
	require.Contains(t, r.out, "registry.yaml:16:9: old: services[1].runner_config.headers.Authorization: a credential is written into a header")
	require.Contains(t, r.out, "registry.yaml has 6 old patterns; --fix writes 5\n")
	require.NotContains(t, r.out+r.err, "topsecret")
	require.Equal(t, oldRegistry, read(t, file), "nothing is written without --fix")

	r = specql(t, dir, "migration-check", "registry.yaml", "--fix", "-o", "json")
	require.Equal(t, 0, r.status, r.err)
	require.NotContains(t, r.out+r.err, "topsecret")
	got := decode[findings](t, r.out)
	require.True(t, got.Valid)
	require.Len(t, got.Findings, 6)
	for _, f := range got.Findings {
		require.Equal(t, f.Pattern != "literal_secret", f.Written, f.Path)
		require.Equal(t, f.Fixable, f.Written, f.Path)
	}
	require.Equal(t, modernRegistry, read(t, file))
	info, err := os.Stat(file)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o640), info.Mode().Perm())
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, entries, 1, "nothing is left behind")

	r = specql(t, dir, "migration-check", "registry.yaml", "--fix")
	require.Equal(t, 0, r.status, r.err)
	require.Contains(t, r.out, "registry.yaml: 1 old pattern left to you, nothing to write\n")
	require.Equal(t, modernRegistry, read(t, file), "a second run writes nothing")
	after := specql(t, dir, "validate-config", "registry.yaml")
	require.Equal(t, 0, after.status, after.out)
	require.Equal(t, strings.Count(before.out, "warning:"), strings.Count(after.out, "warning:"), after.out)
}

func TestMigrationCheckOfWhatIsNotValid(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "registry.yaml")
	text := "services:\n  - name: a\n    type: t\n    category: c\n    retries: 3\n    runner_config:\n      base_url: https://a.example.com\n" +
		"      auth_type: bearer\n      auth_config: {token: topsecret}\n    operations: [{name: o}]\n"
	require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
	r := specql(t, dir, "migration-check", "registry.yaml", "--fix")
	require.Equal(t, 2, r.status, r.out)
	require.Contains(t, r.out, "registry.yaml:5:5: error: services[0].retries: unknown key \"retries\"")
	require.Contains(t, r.out, "registry.yaml:9:21: old: services[0].runner_config.auth_config.token: a secret belongs in the runner's environment")
	require.Contains(t, r.out, "`token_env_var:`")
	require.Contains(t, r.out, "nothing was written")
	require.NotContains(t, r.out+r.err, "topsecret")
	require.Equal(t, text, read(t, file))

	for name, content := range map[string]string{"broken": "services: [", "empty": "", "scalar": "5", "loop": "services: &a\n  - *a\n", "two": "services: []\n---\nservices: []\n"} {
		require.NoError(t, os.WriteFile(file, []byte(content), 0o600))
		r := specql(t, dir, "migration-check", "registry.yaml", "--fix", "-o", "json")
		require.Equal(t, 2, r.status, name+r.err)
		require.False(t, decode[findings](t, r.out).Valid, name)
		require.NotContains(t, r.err, "panic")
		require.Equal(t, content, read(t, file), name)
	}
	require.Equal(t, 2, specql(t, dir, "migration-check", "none.yaml").status)
	require.Equal(t, 2, specql(t, dir, "migration-check").status)
}

func TestMigrationCheckLeavesALinkALink(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "real.yaml"), []byte(oldRegistry), 0o600))
	require.NoError(t, os.Symlink("real.yaml", filepath.Join(dir, "registry.yaml")))
	r := specql(t, dir, "migration-check", "registry.yaml", "--fix")
	require.Equal(t, 0, r.status, r.err)
	require.Equal(t, modernRegistry, read(t, filepath.Join(dir, "real.yaml")))
	target, err := os.Readlink(filepath.Join(dir, "registry.yaml"))
	require.NoError(t, err)
	require.Equal(t, "real.yaml", target)
}

// An overlay that makes another kind of service of one would not take the keys of an HTTP service.
func TestMigrationCheckSparesOverlays(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "registry.yaml")
	text := "services:\n  - name: a\n    type: t\n    category: c\n    execution_type: http\n    runner_config: {base_url: \"https://a.example.com\"}\n    operations: [{name: o}]\n" +
		"  - name: b\n    type: t\n    category: c\n    runner_config: {base_url: \"https://b.example.com\"}\n    operations: [{name: o}]\n" +
		"local:\n  services:\n    - name: a\n      execution_type: shell\n      runner_config: {working_directory: /srv}\n      security_policy: {allowed_commands: [/bin/cat]}\n"
	require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
	before := specql(t, dir, "validate-config", "registry.yaml", "--env", "local", "-o", "json")
	r := specql(t, dir, "migration-check", "registry.yaml", "--fix")
	require.Equal(t, 0, r.status, r.err)
	require.Contains(t, r.out, "2 modern forms written, 1 old pattern left to you")
	require.Equal(t, 1, strings.Count(read(t, file), "allowed_domains"))
	require.Contains(t, read(t, file), "b.example.com\"]")
	after := specql(t, dir, "validate-config", "registry.yaml", "--env", "local", "-o", "json")
	require.Len(t, decode[findings](t, after.out).Problems, len(decode[findings](t, before.out).Problems), after.out)
}

func read(t *testing.T, name string) string {
	t.Helper()
	raw, err := os.ReadFile(name)
	require.NoError(t, err)
	return string(raw)
}
