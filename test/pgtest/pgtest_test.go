package pgtest_test

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/specql/mesh/test/pgtest"
)

// childVariable makes the test program a process that starts a cluster and waits to be killed.
const childVariable = "PGTEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childVariable) != "" {
		c, err := pgtest.New("")
		if err != nil {
			panic(err)
		}
		fmt.Println(c.PID(), c.Address())
		select {}
	}
	code := m.Run()
	if err := pgtest.Shutdown(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func TestDataOutlivesACrash(t *testing.T) {
	t.Parallel()
	c := pgtest.Start(t, "max_connections=20")
	url := c.NewDatabase(t)
	require.Equal(t, "on|on|on|20", c.Psql(t, url, `SELECT current_setting('fsync'), current_setting('synchronous_commit'),
		current_setting('full_page_writes'), current_setting('max_connections')`))
	c.Psql(t, url, "CREATE TABLE kept (n int); INSERT INTO kept SELECT generate_series(1, 1000)")

	first := c.PID()
	require.NoError(t, c.Stop(pgtest.Immediate))
	require.Zero(t, c.PID())
	_, err := c.Run(url, "SELECT 1")
	require.Error(t, err, "a stopped server answers nobody")

	require.NoError(t, c.Start())
	require.NotEqual(t, first, c.PID())
	require.Equal(t, "1000|500500", c.Psql(t, url, "SELECT count(*), sum(n) FROM kept"))
	require.Error(t, c.Start(), "it runs already")

	require.NoError(t, c.Stop(pgtest.Fast))
	require.NoError(t, c.Start())
	require.Equal(t, "1000", c.Psql(t, url, "SELECT count(*) FROM kept"))
}

func TestAFolderKeepsItsData(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "pgtest-") //nolint:usetesting // the socket's path is bounded, a test's folder is not
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o755))

	c, err := pgtest.New(dir)
	require.NoError(t, err)
	_, err = c.Run(c.URL("postgres"), "CREATE TABLE kept (n int); INSERT INTO kept VALUES (7)")
	require.NoError(t, err)
	require.NoError(t, c.Close())

	again, err := pgtest.New(dir)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, again.Close()) })
	require.Equal(t, "7", again.Psql(t, again.URL("postgres"), "SELECT n FROM kept"))
}

func TestDatabasesAreApart(t *testing.T) {
	t.Parallel()
	first, second := pgtest.Database(t), pgtest.Database(t)
	require.NotEqual(t, first, second)
	c := pgtest.Shared(t)
	c.Psql(t, first, "CREATE TABLE t (n int)")
	_, err := c.Run(second, "SELECT * FROM t")
	require.ErrorContains(t, err, `relation "t" does not exist`)
}

// A process that is killed takes its server with it, and the folder too.
func TestTheServerEndsWithItsProcess(t *testing.T) {
	t.Parallel()
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), childVariable+"=1")
	child.Stderr = os.Stderr
	out, err := child.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, child.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	pid, err := strconv.Atoi(strings.Fields(line)[0])
	require.NoError(t, err)
	require.NoError(t, syscall.Kill(pid, 0), "the server runs")
	dir, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid))
	if err != nil {
		dir = "" // no /proc: only the server is looked at
	}

	require.NoError(t, child.Process.Kill())
	_ = child.Wait()
	require.Eventually(t, func() bool {
		return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH)
	}, time.Minute, 20*time.Millisecond)
	if dir != "" {
		require.Eventually(t, func() bool {
			_, err := os.Stat(dir)
			return errors.Is(err, os.ErrNotExist)
		}, time.Minute, 20*time.Millisecond)
	}
}
