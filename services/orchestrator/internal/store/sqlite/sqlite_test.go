package sqlite

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/specql/mesh/services/orchestrator/internal/store"
	"github.com/specql/mesh/services/orchestrator/internal/store/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testLogLines is small, since under the race detector SQLite writes lines slowly.
const testLogLines = 1000

func openAt(t testing.TB, path string) *Store {
	t.Helper()
	st, err := Open(t.Context(), Options{Path: path, MaxLogLines: testLogLines})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, st.Close()) })
	return st
}

func openTest(t testing.TB) *Store {
	t.Helper()
	return openAt(t, filepath.Join(t.TempDir(), "data", "specql.db"))
}

// exec runs statements on the connection that writes.
func exec(t testing.TB, st *Store, statement string) error {
	t.Helper()
	return st.write(t.Context(), func(w *writer) error {
		_, err := w.conn.ExecContext(t.Context(), statement)
		return err
	})
}

func TestStore(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Store { return openTest(t) },
		storetest.RawSQL(func(t *testing.T, st store.Store, statement string) error {
			return exec(t, st.(*Store), statement)
		}),
		storetest.MaxLogLines(testLogLines))
}

func TestCrash(t *testing.T) {
	storetest.RunCrash(t, filepath.Join(t.TempDir(), "specql.db"), func(t *testing.T, place string) store.Store {
		return openAt(t, place)
	})
}

func TestReplaceIsRefused(t *testing.T) {
	st := openTest(t)
	require.NoError(t, exec(t, st, "INSERT INTO jobs.tb_workflow_run (id, status) VALUES ('r', 'completed')"))
	require.Error(t, exec(t, st, "INSERT OR REPLACE INTO jobs.tb_workflow_run (id, status) VALUES ('r', 'pending')"))
	require.NoError(t, exec(t, st, "INSERT INTO jobs.tb_job_run (id, identifier, service_name, operation, status) VALUES ('j', 'j', 's', 'o', 'completed')"))
	require.Error(t, exec(t, st, "INSERT OR REPLACE INTO jobs.tb_job_run (id, identifier, service_name, operation, status) VALUES ('j', 'j', 's', 'o', 'pending')"))
}

func TestDurability(t *testing.T) {
	st := openTest(t)
	pragma := func(name string) (value string) {
		require.NoError(t, st.write(t.Context(), func(w *writer) error {
			return w.conn.QueryRowContext(t.Context(), "PRAGMA "+name).Scan(&value)
		}))
		return value
	}
	require.NoError(t, exec(t, st, "INSERT INTO jobs.tb_workflow_run (id) VALUES ('r')"))
	require.NoError(t, st.AppendLogs(t.Context(), []*store.LogLine{{RunID: "r", Sequence: 1}}))
	require.Equal(t, "2", pragma("jobs.synchronous"), "FULL, also after log lines")
	require.Equal(t, "wal", pragma("jobs.journal_mode"))
	require.Equal(t, "1", pragma("foreign_keys"))
}

func TestFolderIsLocked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "specql.db")
	st := openAt(t, path)
	_, err := Open(t.Context(), Options{Path: path})
	require.ErrorContains(t, err, fmt.Sprintf("is in use by process %d", os.Getpid()))
	require.NoError(t, st.Close())
	again := openAt(t, path)
	require.NoError(t, again.Close())
}

func TestFilesAreOurs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "data", "specql.db")
	openAt(t, path)
	for _, name := range []string{path, path + "-wal", filepath.Join(filepath.Dir(path), lockName)} {
		info, err := os.Stat(name)
		require.NoError(t, err)
		require.Equal(t, os.FileMode(0o600), info.Mode().Perm(), name)
	}
}

func TestOpenErrors(t *testing.T) {
	_, err := Open(t.Context(), Options{})
	require.ErrorContains(t, err, "the path is empty")

	folder := t.TempDir()
	path := filepath.Join(folder, "specql.db")
	require.NoError(t, os.WriteFile(path, []byte("this is not a database, and long enough to be read as a header of one, which has 100 bytes: 0123456789"), 0o600))
	_, err = Open(t.Context(), Options{Path: path})
	require.ErrorContains(t, err, "not a database")

	// The lock is free again after a failure.
	require.NoError(t, os.Remove(path))
	st := openAt(t, path)
	require.NoError(t, exec(t, st, "INSERT INTO jobs.tb_schema_version (version, name) VALUES (1000, 'later')"))
	require.NoError(t, st.Close())
	_, err = Open(t.Context(), Options{Path: path})
	require.ErrorContains(t, err, "written by a newer version")
}

func TestReopen(t *testing.T) {
	// A name that would be an option or a URI, were it not a path.
	path := filepath.Join(t.TempDir(), "file:a ?b='c'.db")
	st := openAt(t, path)
	require.NoError(t, exec(t, st, "INSERT INTO jobs.tb_workflow_run (id) VALUES ('r')"))
	require.NoError(t, st.Close())
	run, err := openAt(t, path).Run(t.Context(), "r")
	require.NoError(t, err)
	require.Equal(t, store.Pending, run.Status)
	require.False(t, run.CreatedAt.IsZero())
	require.FileExists(t, path)
}
