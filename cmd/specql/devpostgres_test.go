package main

import (
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/test/pgtest"
)

// TestDevOnPostgreSQL: the whole way from an empty database to an action that SQL starts.
func TestDevOnPostgreSQL(t *testing.T) {
	t.Parallel()
	dir, database := project(t), pgtest.Database(t)
	cluster := pgtest.Shared(t)
	listen := []string{"--data", filepath.Join(t.TempDir(), "data"), "--listen", "127.0.0.1:0", "--console", "127.0.0.1:0", "--database", database}
	r := specql(t, dir, append([]string{"dev"}, listen...)...)
	require.NotEqual(t, 0, r.status)
	require.Contains(t, r.err, "specql migrate-schema")

	require.Equal(t, 0, specql(t, dir, "migrate-schema", "--database", database).status)
	schema := specql(t, dir, "generate-schema", "entities")
	require.Equal(t, 0, schema.status, schema.err)
	cluster.Psql(t, database, schema.out)
	address, p := dev(t, "--database", database)

	cluster.Psql(t, database, `BEGIN; SELECT app.echo(input => '{"text": "never"}'); ROLLBACK`)
	id := cluster.Psql(t, database, `SELECT app.echo(input => '{"text": "by SQL"}')`)
	require.Eventually(t, func() bool {
		return cluster.Psql(t, database, "SELECT status FROM jobs.tb_workflow_run WHERE id = '"+id+"'") == "completed"
	}, time.Minute, 20*time.Millisecond)
	r = specql(t, dir, "runs", "show", id, "-o", "json", "--address", address)
	require.Equal(t, 0, r.status, r.err)
	got := decode[run](t, r.out)
	require.JSONEq(t, `{"said": "by SQL"}`, string(got.Output))
	require.Len(t, got.Jobs, 1)
	require.Equal(t, "1", cluster.Psql(t, database, "SELECT count(*) FROM jobs.tb_workflow_run"), "what was rolled back is not there")
	require.Equal(t, 0, p.end(syscall.SIGTERM), p.err.String())
}

// migrated is a database with the mesh's schema.
func migrated(t *testing.T, dir string) string {
	t.Helper()
	database := pgtest.Database(t)
	r := specql(t, dir, "migrate-schema", "--database", database)
	require.Equal(t, 0, r.status, r.err)
	return database
}
