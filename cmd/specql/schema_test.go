package main

import (
	"bytes"
	"errors"
	"net/url"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/test/pgtest"
)

// withEnv runs specql with more in its environment.
func withEnv(t *testing.T, env []string, args ...string) result {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := program(t.Context(), t.TempDir(), args...)
	cmd.Env = append(cmd.Env, env...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if _, ok := errors.AsType[*exec.ExitError](err); !ok {
		require.NoError(t, err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

type found struct {
	Valid    bool
	Problems []struct{ Message, Mend string }
}

func TestTheSchemaCommands(t *testing.T) {
	t.Parallel()
	dir, database := t.TempDir(), pgtest.Database(t)
	cluster := pgtest.Shared(t)

	r := specql(t, dir, "validate-schema", "--database", database)
	require.Equal(t, 1, r.status, r.err)
	require.Contains(t, r.out, "specql migrate-schema")
	require.Empty(t, r.err)

	r = specql(t, dir, "migrate-schema", "--database", database)
	require.Equal(t, 0, r.status, r.err)
	require.Regexp(t, `^applied  001_multi_execution\n(applied  \d{3}_\w+\n)*$`, r.out)
	require.Empty(t, r.err)
	r = specql(t, dir, "migrate-schema", "--database", database, "-o", "json")
	require.Equal(t, 0, r.status, r.err)
	require.JSONEq(t, `{"applied": []}`, r.out, "there was nothing to do")
	require.Contains(t, specql(t, dir, "migrate-schema", "--database", database).out, "up to date")

	// The URL may come from the environment.
	for _, env := range []string{"DATABASE_URL=" + database, "SPECQL_DATABASE=" + database} {
		r = withEnv(t, []string{env}, "validate-schema")
		require.Equal(t, 0, r.status, r.out+r.err)
		require.Equal(t, "The schema is what this version needs.\n", r.out)
	}
	r = withEnv(t, []string{"DATABASE_URL=postgres://127.0.0.1:1/nothing", "SPECQL_DATABASE=" + database}, "check-permissions", "-o", "json")
	require.Equal(t, 0, r.status, r.err)
	require.JSONEq(t, `{"valid": true, "problems": []}`, r.out)

	// What is missing is said with its mend, all at once.
	cluster.Psql(t, database, "DROP VIEW jobs.v_cost_by_service; DROP INDEX jobs.ix_workflow_run_active; ALTER TABLE jobs.tb_workflow_step DROP COLUMN until")
	r = specql(t, dir, "validate-schema", "--database", database, "-o", "json")
	require.Equal(t, 1, r.status, r.err)
	got := decode[found](t, r.out)
	require.False(t, got.Valid)
	require.Len(t, got.Problems, 3, r.out)
	for _, p := range got.Problems {
		require.Regexp(t, "v_cost_by_service|ix_workflow_run_active|until", p.Message)
		require.NotEmpty(t, p.Mend)
	}
	r = specql(t, dir, "validate-schema", "--database", database)
	require.Equal(t, 1, r.status)
	require.Equal(t, 4, strings.Count(r.out, "\n"), r.out)
	require.True(t, strings.HasSuffix(r.out, "3 problems\n"), r.out)
}

// TestTheRightsOfTheOrchestratorsRole: check-permissions asks for what is missing, and its mends are enough.
func TestTheRightsOfTheOrchestratorsRole(t *testing.T) {
	t.Parallel()
	dir, database := t.TempDir(), pgtest.Database(t)
	cluster := pgtest.Shared(t)
	require.Equal(t, 0, specql(t, dir, "migrate-schema", "--database", database).status)
	cluster.Psql(t, database, "CREATE ROLE mesh_service LOGIN PASSWORD 's3cret-of-the-service'")
	u, err := url.Parse(database)
	require.NoError(t, err)
	u.User = url.UserPassword("mesh_service", "s3cret-of-the-service")
	r := specql(t, dir, "check-permissions", "--database", u.String(), "-o", "json")
	require.Equal(t, 1, r.status, r.out+r.err)
	got := decode[found](t, r.out)
	require.NotEmpty(t, got.Problems)
	require.NotContains(t, r.out+r.err, "s3cret")
	for _, p := range got.Problems {
		require.Contains(t, p.Mend, "GRANT")
	}
	text := specql(t, dir, "check-permissions", "--database", u.String())
	require.Equal(t, 1, text.status)
	require.Contains(t, text.out, "GRANT")
	require.NotContains(t, text.out+text.err, "s3cret")
}

func TestDatabasesThatCannotBeReached(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, command := range []string{"migrate-schema", "validate-schema", "check-permissions"} {
		for name, test := range map[string]struct {
			args   []string
			status int
			want   string
		}{
			"none":     {nil, 2, "--database, SPECQL_DATABASE or DATABASE_URL is needed"},
			"sqlite":   {[]string{"--database", "sqlite:x.db"}, 2, "makes its tables by itself"},
			"no URL":   {[]string{"--database", "host=localhost password=s3cret-word"}, 2, "is not the URL of a PostgreSQL database"},
			"bad URL":  {[]string{"--database", "postgres://u:a/s3cret-word@h:p/d"}, 2, "%2F"},
			"no host":  {[]string{"--database", "postgres://u:s3cret-word@127.0.0.1:1/d?connect_timeout=5"}, 1, "127.0.0.1"},
			"bad flag": {[]string{"--database", "postgres://u:s3cret-word@127.0.0.1:1/d?sslmode=nonsense"}, 1, "sslmode"},
			"argument": {[]string{"x"}, 2, "unknown command"},
		} {
			r := specql(t, dir, append([]string{command}, test.args...)...)
			require.Equal(t, test.status, r.status, "%s %s: %s", command, name, r.err)
			require.Contains(t, r.err, test.want, "%s %s", command, name)
			require.Empty(t, r.out)
			require.NotContains(t, r.err, "s3cret", "%s %s", command, name)
		}
	}
}
