package main

import (
	"net/url"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/test/pgtest"
)

type diagnosis struct {
	Healthy bool
	Checks  []struct{ Group, Name, Status, Message, Mend string }
}

// of are the messages of a group's checks with a status.
func (d diagnosis) of(group, status string) map[string]string {
	all := map[string]string{}
	for _, c := range d.Checks {
		if c.Group == group && c.Status == status {
			all[c.Name] = c.Message
		}
	}
	return all
}

func TestDoctorWithoutAMesh(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	closed := "127.0.0.1:1"
	r := withEnv(t, nil, "doctor", "-o", "json")
	d := decode[diagnosis](t, r.out)
	require.NotEmpty(t, d.of("machine", "ok")["system"])
	require.Empty(t, r.err)
	for _, c := range d.Checks {
		require.NotEmpty(t, c.Message, c)
		require.Equal(t, c.Status == "ok", c.Mend == "", "what is amiss has its mend, and nothing else has one: %v", c)
	}
	// Somebody's mesh may answer at the default address; none does at this one, which was asked for.
	r = specql(t, dir, "doctor", "--address", closed)
	require.Equal(t, 1, r.status, r.out)
	require.Contains(t, r.out, "error    orchestrator: no server answers at 127.0.0.1:1")
	require.Regexp(t, `\n1 error, \d+ warnings?\n$`, r.out)

	for _, args := range [][]string{{"-o", "xml"}, {"--tls-cert", "x"}, {"--database", "sqlite:x"}, {"word"}} {
		r = specql(t, dir, append([]string{"doctor"}, args...)...)
		require.Equal(t, 2, r.status, r.err)
		require.Empty(t, r.out)
	}
}

func TestDoctorOfAMesh(t *testing.T) {
	t.Parallel()
	address, _ := dev(t)
	dir, database := t.TempDir(), pgtest.Database(t)
	require.Equal(t, 0, specql(t, dir, "migrate-schema", "--database", database).status)
	require.Equal(t, 0, specql(t, dir, "certs", "certs").status)
	look := func(status int, args ...string) diagnosis {
		r := specql(t, dir, append([]string{"doctor", "-o", "json", "--address", address, "--database", database, "--certs", "certs"}, args...)...)
		require.Equal(t, status, r.status, r.out+r.err)
		return decode[diagnosis](t, r.out)
	}
	d := look(0)
	require.True(t, d.Healthy)
	mesh := d.of("mesh", "ok")
	for _, name := range []string{"orchestrator", "orchestrator's clock", "http runner", "shell runner", "docker runner", "serverless runner", "shell runner's clock"} {
		require.NotEmpty(t, mesh[name], name)
	}
	require.Contains(t, d.of("database", "ok"), "schema")
	require.Contains(t, d.of("database", "ok"), "rights")
	require.Contains(t, d.of("database", "ok"), "clock")
	require.Len(t, d.of("certificates", "ok"), 7)
	require.Contains(t, d.of("registry", "ok"), "the one in force")

	// What is amiss is found.
	pgtest.Shared(t).Psql(t, database, "DROP VIEW jobs.v_cost_by_service")
	require.NoError(t, os.Rename(filepath.Join(dir, "certs", "http-runner.crt"), filepath.Join(dir, "certs", "shell-runner.crt")))
	require.NoError(t, os.Chmod(filepath.Join(dir, "certs", "client.key"), 0o644)) //nolint:gosec // the point
	other := t.TempDir()
	require.Equal(t, 0, specql(t, other, "certs", "certs").status)
	for _, name := range []string{"docker-runner.crt", "docker-runner.key"} {
		text, err := os.ReadFile(filepath.Join(other, "certs", name))
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(dir, "certs", name), text, 0o600))
	}
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "registry"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "registry", "service_registry.yaml"),
		[]byte("services:\n  - {name: a, type: t, category: c, execution_type: shel, operations: [{name: o}]}\n"), 0o600))
	d = look(1)
	require.False(t, d.Healthy)
	require.Contains(t, d.of("database", "error")["schema"], "v_cost_by_service")
	certificates := d.of("certificates", "error")
	require.Contains(t, certificates["certs/shell-runner.crt"], "private key does not match")
	require.Contains(t, certificates["certs/docker-runner.crt"], "does not come from the CA")
	require.Contains(t, d.of("certificates", "warning")["certs/client.key"], "mode 644")
	require.Len(t, d.of("registry", "error"), 1)

	u, err := url.Parse(database)
	require.NoError(t, err)
	u.User = url.UserPassword("nobody", "s3cret-word")
	u.Host = "127.0.0.1:1"
	r := specql(t, dir, "doctor", "--address", address, "--database", u.String())
	require.Equal(t, 1, r.status)
	require.Contains(t, r.out, "error    server:")
	require.NotContains(t, r.out+r.err, "s3cret")
}

// TestDoctorSeesClocks: a machine whose clock is wrong is told from one that answers slowly.
func TestDoctorSeesClocks(t *testing.T) {
	t.Parallel()
	cluster, database := pgtest.Shared(t), pgtest.Database(t)
	require.Equal(t, 0, specql(t, t.TempDir(), "migrate-schema", "--database", database).status)
	cluster.Psql(t, database, `CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS $$ SELECT pg_catalog.clock_timestamp() + interval '1 hour' $$`)
	u, err := url.Parse(database)
	require.NoError(t, err)
	q := u.Query()
	q.Set("search_path", "public,pg_catalog")
	u.RawQuery = q.Encode()
	r := withEnv(t, nil, "doctor", "-o", "json", "--database", u.String())
	require.Equal(t, 1, r.status, r.out+r.err)
	message := decode[diagnosis](t, r.out).of("database", "error")["clock"]
	require.Regexp(t, `^(1h0m0|59m59)(\.\d+)?s ahead of this machine's`, message)
}

// TestDoctorSeesUnsetVariables: a runner alone knows its environment, and is asked.
func TestDoctorSeesUnsetVariables(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "registry"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "registry", "service_registry.yaml"), []byte(`services:
  - name: billing
    type: t
    category: c
    runner_config:
      base_url: "http://127.0.0.1:1"
      auth_type: bearer
      auth_config:
        token_env_var: BILLING_TOKEN
    security_policy: {allow_private_networks: true}
    operations: [{name: charge}]
`), 0o600))
	warnings := func(env ...string) map[string]string {
		address, _ := devWith(t, dir, env, "--data", filepath.Join(t.TempDir(), "data"))
		r := specql(t, dir, "doctor", "-o", "json", "--address", address)
		require.Equal(t, 0, r.status, r.out+r.err)
		require.NotContains(t, r.out, "sk_of_the_test")
		return decode[diagnosis](t, r.out).of("registry", "warning")
	}
	found := warnings()
	require.Len(t, found, 1)
	for place, message := range found {
		require.Regexp(t, `service_registry\.yaml:9:\d+$`, place)
		require.Contains(t, message, "BILLING_TOKEN is not set in the runner's environment")
	}
	require.Empty(t, warnings("BILLING_TOKEN=sk_of_the_test"))
}
