package cgroup

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// realGroup makes a group of the running kernel.
func realGroup(t *testing.T, l Limits) *Group {
	t.Helper()
	if mode, reason := Detect(); mode == None {
		t.Fatalf("run as root, or with control groups delegated: %s", reason)
	}
	g, err := New("test", strings.NewReplacer("/", "_", "#", "_").Replace(t.Name()), l)
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, g.Kill())
		require.NoError(t, g.Remove())
		require.NoError(t, g.Remove(), "twice is fine")
		for _, d := range g.dirs {
			require.NoDirExists(t, d.path)
		}
	})
	return g
}

// inGroup starts a program in the group and gives back a function that waits for its end.
func inGroup(t *testing.T, g *Group, argv ...string) (*exec.Cmd, func() error) {
	t.Helper()
	cmd := exec.Command(argv[0], argv[1:]...)
	started := make(chan error)
	ended := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := g.Start(cmd)
		started <- err
		if err == nil {
			ended <- cmd.Wait()
		}
	}()
	require.NoError(t, <-started)
	return cmd, func() error { return <-ended }
}

func TestMeasuresAShortProcess(t *testing.T) {
	g := realGroup(t, Limits{CPUCores: 1, MemoryMB: 64, Processes: 1})
	_, wait := inGroup(t, g, "/bin/true")
	require.NoError(t, wait())
	u, err := g.Stat()
	require.NoError(t, err)
	require.NotNil(t, u.CPUSeconds)
	require.Positive(t, *u.CPUSeconds)
	require.NotNil(t, u.PeakMemoryMB)
	require.Positive(t, *u.PeakMemoryMB)
	require.Less(t, *u.PeakMemoryMB, 8.0, "the runner's own memory must not count")
	require.Zero(t, u.OOMKills)
	pids, err := g.PIDs()
	require.NoError(t, err)
	require.Empty(t, pids)
}

func TestProcessLimit(t *testing.T) {
	g := realGroup(t, Limits{Processes: 1})
	_, wait := inGroup(t, g, "/bin/sh", "-c", "/bin/true; exit 0")
	require.Error(t, wait(), "the shell cannot fork")
	require.Positive(t, g.ProcessLimitHits())
}

func TestOutOfMemoryIsCounted(t *testing.T) {
	g := realGroup(t, Limits{MemoryMB: 16})
	_, wait := inGroup(t, g, "/bin/sh", "-c", `x=0123456789abcdef; while :; do x=$x$x; done`)
	require.Error(t, wait())
	u, err := g.Stat()
	require.NoError(t, err)
	require.Positive(t, u.OOMKills)
	require.InDelta(t, 16, *u.PeakMemoryMB, 1)
}

func TestLimitsAreSetAnew(t *testing.T) {
	g := realGroup(t, Limits{CPUCores: 1, MemoryMB: 64, Processes: 9})
	memory, processes := "memory.limit_in_bytes", "pids.max"
	if g.Mode() == V2 {
		memory = "memory.max"
	}
	none := read(t, filepath.Dir(g.dirOf("memory")), memory)
	for _, l := range []Limits{{MemoryMB: 32, Processes: 8}, {MemoryMB: 128, CPUCores: 0.5}, {MemoryMB: 128}, {}, {MemoryMB: 16, CPUCores: 2, Processes: 1}} {
		require.NoError(t, g.SetLimits(l))
		want := strconv.FormatInt(l.MemoryMB<<20, 10)
		if l.MemoryMB == 0 {
			want = none
		}
		require.Equal(t, want, read(t, g.dirOf("memory"), memory))
		want = strconv.FormatInt(l.Processes, 10)
		if l.Processes == 0 {
			want = "max"
		}
		require.Equal(t, want, read(t, g.dirOf("pids"), processes))
		if g.Mode() == V1 {
			want = strconv.FormatInt(int64(l.CPUCores*100_000), 10)
			if l.CPUCores == 0 {
				want = "-1"
			}
			require.Equal(t, want, read(t, g.dirOf("cpu"), "cpu.cfs_quota_us"))
		}
	}
}

func TestKillEndsDaemons(t *testing.T) {
	g := realGroup(t, Limits{})
	fifo := filepath.Join(t.TempDir(), "up")
	require.NoError(t, syscall.Mkfifo(fifo, 0o600))
	_, wait := inGroup(t, g, "/bin/sh", "-c", `setsid sh -c 'setsid sh -c "echo up >$1; exec sleep 1000" x "$1" &' x "$1"`, "x", fifo)
	require.NoError(t, wait())
	up, err := os.ReadFile(fifo)
	require.NoError(t, err)
	require.Equal(t, "up\n", string(up))
	pids, err := g.PIDs()
	require.NoError(t, err)
	require.NotEmpty(t, pids)
	require.NoError(t, g.Kill())
	for _, pid := range pids {
		require.Eventually(t, func() bool { return !alive(pid) }, 5*time.Second, time.Millisecond)
	}
}

func TestKillEndsAForkBomb(t *testing.T) {
	g := realGroup(t, Limits{Processes: 50, CPUCores: 0.5})
	_, wait := inGroup(t, g, "/usr/bin/python3", "-c", "import os\nwhile True:\n try: os.fork()\n except OSError: pass")
	require.Eventually(t, func() bool { pids, err := g.PIDs(); return err == nil && len(pids) == 50 }, 20*time.Second, time.Millisecond)
	require.NoError(t, g.Kill())
	_ = wait()
	pids, err := g.PIDs()
	require.NoError(t, err)
	require.Empty(t, pids)
}

func TestGroupsBelowAreKilledAndRemoved(t *testing.T) {
	g := realGroup(t, Limits{})
	child := filepath.Join(g.dirs[0].path, "container")
	require.NoError(t, os.Mkdir(child, 0o755))
	cmd, wait := inGroup(t, g, "/bin/sleep", "1000")
	require.NoError(t, write(filepath.Join(child, "cgroup.procs"), strconv.Itoa(cmd.Process.Pid)))
	pids, err := g.PIDs()
	require.NoError(t, err)
	require.Equal(t, []int{cmd.Process.Pid}, pids)
	require.NoError(t, g.Kill())
	require.Error(t, wait())
}

func TestAddPID(t *testing.T) {
	g := realGroup(t, Limits{})
	cmd := exec.Command("/bin/sleep", "1000")
	require.NoError(t, cmd.Start())
	require.NoError(t, g.AddPID(cmd.Process.Pid))
	require.NoError(t, g.Kill())
	require.Error(t, cmd.Wait())
}

func TestLeftoversOfADeadRunner(t *testing.T) {
	alive := realGroup(t, Limits{})
	m := machine()
	// A process that has ended stands for the crashed runner.
	dead := exec.Command("/bin/true")
	require.NoError(t, dead.Run())
	crashed := newManager("/proc")
	crashed.instance = fmt.Sprintf("%d-12345-%s", dead.Process.Pid, m.pidNamespace())
	g, err := crashed.newGroup("test", "left", Limits{})
	require.NoError(t, err)
	cmd, wait := inGroup(t, g, "/bin/sleep", "1000")
	_ = cmd

	n, err := RemoveLeftovers("test")
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.Error(t, wait(), "killed")
	for _, d := range g.dirs {
		require.NoDirExists(t, filepath.Dir(d.path))
	}
	for _, d := range alive.dirs {
		require.DirExists(t, d.path)
	}
	n, err = RemoveLeftovers("test")
	require.NoError(t, err)
	require.Zero(t, n)
}

func TestNamesStayInTheirPlace(t *testing.T) {
	for _, id := range []string{"", ".", "..", "../x", "a/b", "a\x00b", ".procs", strings.Repeat("x", 200)} {
		_, err := New("test", id, Limits{})
		require.Error(t, err, "%q", id)
	}
}

func TestTheSameIDTwice(t *testing.T) {
	g := realGroup(t, Limits{})
	_, err := New("test", filepath.Base(g.path), Limits{})
	require.Error(t, err)
	require.DirExists(t, g.dirs[0].path, "the first keeps its group")
}

func alive(pid int) bool { return syscall.Kill(pid, 0) == nil }
