package cgroup

import (
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// fakeKernel is a tree of files that stands for a mounted hierarchy: a new directory is filled
// as the kernel would fill it.
type fakeKernel struct {
	root  string
	proc  string
	files map[string]string
}

var filesV2 = map[string]string{
	"cgroup.controllers": "cpuset cpu io memory pids\n", "cgroup.subtree_control": "", "cgroup.procs": "", "cgroup.kill": "",
	"memory.max": "max\n", "memory.swap.max": "max\n", "memory.oom.group": "0\n", "memory.current": "1048576\n",
	"memory.peak": "3145728\n", "memory.events": "low 0\nhigh 0\nmax 3\noom 1\noom_kill 1\noom_group_kill 1\n",
	"cpu.max": "max 100000\n", "cpu.stat": "usage_usec 1500000\nuser_usec 1000000\nsystem_usec 500000\n",
	"pids.max": "max\n", "io.stat": "8:0 rbytes=1048576 wbytes=2097152 rios=1 wios=2 dbytes=0 dios=0\n8:16 rbytes=1048576 wbytes=0 rios=1 wios=0\n",
}

func newFakeKernel(t *testing.T, files map[string]string, mountinfo, cgroup string) *fakeKernel {
	t.Helper()
	k := &fakeKernel{root: t.TempDir(), proc: t.TempDir(), files: maps.Clone(files)}
	self := filepath.Join(k.proc, "self")
	require.NoError(t, os.MkdirAll(filepath.Join(self, "ns"), 0o700))
	require.NoError(t, os.Symlink("pid:[42]", filepath.Join(self, "ns/pid")))
	for name, text := range map[string]string{
		"mountinfo": strings.ReplaceAll(mountinfo, "ROOT", k.root),
		"cgroup":    cgroup,
		"stat":      "7 (a b) c) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 777 20 21\n",
	} {
		require.NoError(t, os.WriteFile(filepath.Join(self, name), []byte(text), 0o600))
	}
	return k
}

func (k *fakeKernel) fill(path string) error {
	for name, text := range k.files {
		if err := os.WriteFile(filepath.Join(path, name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// manager is newManager on this kernel.
func (k *fakeKernel) manager(t *testing.T) *manager {
	t.Helper()
	m := &manager{
		proc: k.proc, delegated: map[string]bool{},
		mkdir: func(path string) error {
			if err := os.Mkdir(path, 0o700); err != nil {
				return err
			}
			return k.fill(path)
		},
		rmdir: func(path string) error {
			entries, err := os.ReadDir(path)
			if err != nil {
				return err
			}
			for _, e := range entries {
				if e.IsDir() {
					return syscall.EBUSY
				}
			}
			return os.RemoveAll(path)
		},
	}
	if err := m.find(); err != nil {
		m.mode, m.reason = None, err.Error()
	}
	return m
}

func read(t *testing.T, elem ...string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(elem...))
	require.NoError(t, err)
	return strings.TrimSpace(string(data))
}

const mountV2 = "30 23 0:26 / ROOT rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"

func TestV2(t *testing.T) {
	k := newFakeKernel(t, filesV2, mountV2, "0::/user.slice\n")
	require.NoError(t, k.fill(k.root))
	m := k.manager(t)
	require.Equal(t, V2, m.mode, m.reason)

	g, err := m.newGroup("shell", "job-1", Limits{CPUCores: 0.5, MemoryMB: 256, Processes: 32})
	require.NoError(t, err)
	require.Equal(t, "/specql/shell-"+m.instance+"/job-1", g.DockerParent())
	dir := filepath.Join(k.root, g.Path())
	require.Equal(t, "268435456", read(t, dir, "memory.max"))
	require.Equal(t, "0", strings.TrimSuffix(read(t, dir, "memory.swap.max"), "ax"))
	require.Equal(t, "1", read(t, dir, "memory.oom.group"))
	require.True(t, strings.HasPrefix(read(t, dir, "cpu.max"), "50000 100000"))
	require.True(t, strings.HasPrefix(read(t, dir, "pids.max"), "32"))
	for _, d := range []string{k.root, filepath.Join(k.root, "specql"), filepath.Dir(dir)} {
		require.Contains(t, read(t, d, "cgroup.subtree_control"), "+", d)
	}
	require.Empty(t, read(t, dir, "cgroup.subtree_control"), "the job's own group stays a leaf")

	u, err := g.Stat()
	require.NoError(t, err)
	require.InDelta(t, 1.5, *u.CPUSeconds, 1e-9)
	require.InDelta(t, 1, *u.MemoryMB, 1e-9)
	require.InDelta(t, 3, *u.PeakMemoryMB, 1e-9)
	require.InDelta(t, 2, *u.DiskReadMB, 1e-9)
	require.InDelta(t, 2, *u.DiskWriteMB, 1e-9)
	require.Equal(t, 1, u.OOMKills)

	require.NoError(t, g.AddPID(4711))
	require.Equal(t, "4711", read(t, dir, "cgroup.procs"))
	pids, err := g.PIDs()
	require.NoError(t, err)
	require.Equal(t, []int{4711}, pids)
	require.True(t, g.killAll())
	require.Equal(t, "1", read(t, dir, "cgroup.kill"))

	require.NoError(t, g.Remove())
	require.NoDirExists(t, dir)
	require.NoError(t, m.release("shell"))
	require.NoDirExists(t, filepath.Join(k.root, "specql"))
}

func TestV2OldKernelLeavesFiguresOut(t *testing.T) {
	files := maps.Clone(filesV2)
	for _, name := range []string{"memory.peak", "io.stat", "memory.swap.max", "cgroup.kill"} {
		delete(files, name)
	}
	k := newFakeKernel(t, files, mountV2, "0::/\n")
	require.NoError(t, k.fill(k.root))
	g, err := k.manager(t).newGroup("shell", "job", Limits{MemoryMB: 1})
	require.NoError(t, err)
	u, err := g.Stat()
	require.NoError(t, err)
	require.Nil(t, u.PeakMemoryMB)
	require.Nil(t, u.DiskReadMB)
	require.NotNil(t, u.MemoryMB)
	require.False(t, g.killAll())
}

func TestV2DelegatedGroupOfAService(t *testing.T) {
	// The top is not ours; the unit's own group is.
	k := newFakeKernel(t, filesV2, mountV2, "0::/system.slice/specql.service/specql-runner\n")
	unit := filepath.Join(k.root, "system.slice/specql.service")
	require.NoError(t, os.MkdirAll(unit, 0o700))
	require.NoError(t, k.fill(unit))
	m := k.manager(t)
	mkdir := m.mkdir
	m.used, m.all, m.delegated = nil, nil, map[string]bool{}
	m.mkdir = func(path string) error {
		if filepath.Dir(path) == k.root {
			return &fs.PathError{Op: "mkdir", Path: path, Err: syscall.EACCES}
		}
		return mkdir(path)
	}
	require.NoError(t, os.RemoveAll(filepath.Join(k.root, "specql")))
	require.NoError(t, m.find())
	g, err := m.newGroup("shell", "job", Limits{})
	require.NoError(t, err)
	require.Equal(t, "/system.slice/specql.service/specql/shell-"+m.instance+"/job", g.Path())
}

func TestV2RunnerStepsAside(t *testing.T) {
	k := newFakeKernel(t, filesV2, mountV2, "0::/\n")
	require.NoError(t, k.fill(k.root))
	require.NoError(t, os.WriteFile(filepath.Join(k.root, "cgroup.procs"), []byte("7\n"), 0o600))
	m := k.manager(t)
	require.NoError(t, m.stepAside(k.root))
	require.Equal(t, "7", read(t, k.root, "specql-runner/cgroup.procs"))
}

func TestNoneSaysWhy(t *testing.T) {
	k := newFakeKernel(t, nil, "30 23 0:26 / /proc rw - proc proc rw\n", "0::/\n")
	m := k.manager(t)
	require.Equal(t, None, m.mode)
	require.Contains(t, m.reason, "mount cgroup2")
	_, err := m.newGroup("shell", "job", Limits{})
	require.ErrorIs(t, err, ErrUnavailable)
	n, err := m.removeLeftovers("shell")
	require.NoError(t, err)
	require.Zero(t, n)
}

func TestNoMemoryControllerIsNone(t *testing.T) {
	files := maps.Clone(filesV2)
	files["cgroup.controllers"] = "cpu pids\n"
	k := newFakeKernel(t, files, mountV2, "0::/\n")
	require.NoError(t, k.fill(k.root))
	m := k.manager(t)
	require.Equal(t, None, m.mode)
	require.Contains(t, m.reason, "no memory controller")
}

// A hybrid machine has v1 controllers and an empty v2 hierarchy.
func TestV1(t *testing.T) {
	files := map[string]string{
		"cgroup.procs": "", "tasks": "",
		"memory.limit_in_bytes": "", "memory.usage_in_bytes": "1048576\n", "memory.max_usage_in_bytes": "2097152\n",
		"memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
		"cpu.cfs_quota_us":   "-1", "cpu.cfs_period_us": "", "cpuacct.usage": "2500000000\n", "pids.max": "max\n",
		"blkio.throttle.io_service_bytes": "8:0 Read 1048576\n8:0 Write 3145728\n8:0 Sync 0\n8:0 Total 4194304\nTotal 4194304\n",
	}
	k := newFakeKernel(t, files,
		"29 23 0:24 /docker/abc ROOT/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"+
			"30 23 0:25 /docker/abc ROOT/memory rw - cgroup cgroup rw,memory\n"+
			"31 23 0:26 /docker/abc ROOT/pids rw - cgroup cgroup rw,pids\n"+
			"32 23 0:27 /docker/abc ROOT/blkio rw - cgroup cgroup rw,blkio\n"+
			"33 23 0:28 / ROOT/unified rw - cgroup2 cgroup2 rw\n",
		"4:cpu,cpuacct:/docker/abc\n3:memory:/docker/abc\n2:pids:/docker/abc\n1:blkio:/docker/abc\n0::/\n")
	for _, d := range []string{"cpu", "memory", "pids", "blkio", "unified"} {
		require.NoError(t, os.Mkdir(filepath.Join(k.root, d), 0o700))
	}
	m := k.manager(t)
	require.Equal(t, V1, m.mode, m.reason)
	require.Len(t, m.used, 4)
	require.Equal(t, filepath.Join(k.root, "memory"), m.used[1].own)
	g, err := m.newGroup("docker", "job", Limits{CPUCores: 0.001, MemoryMB: 8, Processes: 3})
	require.NoError(t, err)
	require.Equal(t, "/docker/abc/specql/docker-"+m.instance+"/job", g.Path())
	require.Equal(t, "8388608", read(t, k.root, "memory/specql/docker-"+m.instance+"/job/memory.limit_in_bytes"))
	require.Equal(t, "1000", read(t, k.root, "cpu/specql/docker-"+m.instance+"/job/cpu.cfs_quota_us"), "the kernel's least")
	u, err := g.Stat()
	require.NoError(t, err)
	require.InDelta(t, 2.5, *u.CPUSeconds, 1e-9)
	require.InDelta(t, 2, *u.PeakMemoryMB, 1e-9)
	require.InDelta(t, 1, *u.DiskReadMB, 1e-9)
	require.InDelta(t, 3, *u.DiskWriteMB, 1e-9)
	require.Equal(t, 2, u.OOMKills)
	require.NoError(t, g.Remove())
	require.NoError(t, m.release("docker"))
}

func TestALimitWithoutItsControllerIsAnError(t *testing.T) {
	files := maps.Clone(filesV2)
	files["cgroup.controllers"] = "memory\n"
	k := newFakeKernel(t, files, mountV2, "0::/\n")
	require.NoError(t, k.fill(k.root))
	m := k.manager(t)
	_, err := m.newGroup("shell", "job", Limits{Processes: 1})
	require.ErrorIs(t, err, ErrUnavailable)
	require.ErrorContains(t, err, "pids")
	entries, err := os.ReadDir(filepath.Join(k.root, "specql", m.instanceName("shell")))
	require.NoError(t, err)
	for _, e := range entries {
		require.False(t, e.IsDir(), "the half-made group is gone: %s", e.Name())
	}
}

func TestWhichInstanceIsDead(t *testing.T) {
	k := newFakeKernel(t, filesV2, mountV2, "0::/\n")
	require.NoError(t, k.fill(k.root))
	m := k.manager(t)
	require.NoError(t, os.Mkdir(filepath.Join(k.proc, "100"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(k.proc, "100/stat"), []byte(read(t, k.proc, "self/stat")), 0o600))
	for name, dead := range map[string]bool{
		"shell-" + m.instance:    false,
		"shell-100-777-42":       false, // alive
		"shell-100-778-42":       true,  // the number was given to another process
		"shell-101-777-42":       true,
		"shell-101-777-43":       false, // another PID name space
		"docker-101-777-42":      false, // another kind of runner
		"shell-x-101-777-42":     false,
		"shell-../../1-777-42":   false,
		"shell-99999999999-1-42": false,
		"shell":                  false,
	} {
		require.Equal(t, dead, m.dead(name, "shell"), name)
	}
}

func TestHostileFiles(t *testing.T) {
	dir := t.TempDir()
	for _, text := range []string{"", "x", "-1", "99999999999999999999999", "8:0 Read", "a b c d\n\x00", strings.Repeat("9", 1<<16)} {
		path := filepath.Join(dir, "f")
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
		_, _ = readNumber(path)
		_, _ = readKeys(path)
		_, _, _ = readBlkio(path)
		_, _, _ = readIOStat(path)
		_, _ = readPIDs(path)
	}
	_, err := readNumber(filepath.Join(dir, "missing"))
	require.ErrorIs(t, err, fs.ErrNotExist)
}
