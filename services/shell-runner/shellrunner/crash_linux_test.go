package shellrunner

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/cgroup"
	"github.com/specql/mesh/pkg/runner/runnertest"
)

func TestLeftoversOfACrashedRunner(t *testing.T) {
	temp := t.TempDir()
	path := filepath.Join(temp, "fifo")
	require.NoError(t, syscall.Mkfifo(path, 0o600))
	stderr, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
	require.NoError(t, err)
	defer func() { require.NoError(t, stderr.Close()) }()
	crash := exec.Command("/proc/self/exe")
	crash.Env = append(os.Environ(), crashVariable+"="+temp)
	crash.Stderr = stderr
	require.NoError(t, crash.Start())
	pid := pidFrom(t, path)
	require.NoError(t, crash.Process.Kill())
	require.Error(t, crash.Wait())
	before, err := filepath.Glob(filepath.Join(temp, tempPrefix+"*", "job-*"))
	require.NoError(t, err)
	require.Len(t, before, 1, "the crashed runner's directory is there")

	r := newRunner(t, Options{TempDir: temp})
	dirs, err := filepath.Glob(filepath.Join(temp, tempPrefix+"*"))
	require.NoError(t, err)
	require.Equal(t, []string{r.temp}, dirs)
	if r.groups == cgroup.None {
		t.Fatal("run as root, or with control groups delegated: without them a daemon of a crashed runner cannot be found")
	}
	requireGone(t, pid)
}

// waitExit waits until a process has ended, and leaves its status to be taken.
func waitExit(pid int) {
	_ = unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
}

func TestOrphansAreReaped(t *testing.T) {
	r := newRunner(t, Options{})
	path := fifo(t)
	gate := path + ".gate"
	require.NoError(t, syscall.Mkfifo(gate, 0o600))
	ended := make(chan error, 1)
	operation := raw(t, Operation{Command: []string{"/bin/sh", "-c", daemonize(path) + "; read -r x <" + gate}})
	service := runner.Service{Config: raw(t, Config{WorkingDirectory: filepath.Dir(path)}), Policy: raw(t, Policy{AllowedCommands: tools})}
	go func() {
		result, err := r.Execute(t.Context(), &runner.Job{
			ID:        "orphan",
			Service:   service,
			Operation: runner.Operation{Config: operation},
		}, discard{})
		ended <- errors.Join(err, result.Err)
	}()
	daemon := pidFrom(t, path)
	require.NoError(t, os.WriteFile(gate, []byte("go\n"), 0o600))
	require.NoError(t, <-ended)
	require.NotContains(t, processes(), daemon)
	require.Empty(t, r.live)
	alive, reaped := r.reapOrphans()
	require.Empty(t, alive)
	require.Zero(t, reaped)
}

func TestOrphansAreReapedWhileTheJobRuns(t *testing.T) {
	s := newShell(t, Options{})
	path := fifo(t)
	c := runnertest.Begin(t, s.client, s.job(sh(`(sh -c 'echo $$ >`+path+`; exec cat `+path+`' &); sleep 1000`).in(filepath.Dir(path))))
	orphan := pidFrom(t, path)
	require.NoError(t, os.WriteFile(path, []byte("end\n"), 0o600))
	require.Eventually(t, func() bool { _, there := processes()[orphan]; return !there }, 5*time.Second, 5*time.Millisecond)
	c.Cancel("enough")
	require.Equal(t, "CANCELLED", c.Wait().Code())
}

func TestForeignChildrenAreLeftAlone(t *testing.T) {
	s := newShell(t, Options{})
	ended := exec.Command("/bin/true")
	ended.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	require.NoError(t, ended.Start())
	waitExit(ended.Process.Pid)
	running := exec.Command("/bin/sleep", "1000")
	running.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	require.NoError(t, running.Start())
	s.ok(sh("true"))
	require.NoError(t, ended.Wait(), "its status was there to take")
	require.NoError(t, running.Process.Signal(syscall.SIGTERM))
	var exit *exec.ExitError
	require.ErrorAs(t, running.Wait(), &exit)
	require.Equal(t, syscall.SIGTERM, exit.Sys().(syscall.WaitStatus).Signal())
}
