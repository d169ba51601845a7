package shellrunner

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/cgroup"
	"github.com/specql/mesh/pkg/runner/runnertest"
	"github.com/specql/mesh/services/shell-runner/internal/sandbox"
)

// hostile is an attempt of a job on what it is not to have.
type hostile struct {
	// attack is what it tries, of attacks.
	attack string
	// want are the answers that every try must get, one of them each.
	want string
	// code is how the job must fail; empty for one that completes, with all tries answered.
	code string
	text string
	// weak is the code where there are no control groups, if it is another.
	weak string
	// bare tells that the attempt must fail without name spaces as well.
	bare bool
	with func(p *Policy)
}

// out are the answers where what is tried is not even there, or may not be had.
const out = "ENOENT EACCES EPERM EROFS"

func limited(set func(l *Limits)) func(*Policy) { return func(p *Policy) { set(&p.ResourceLimits) } }

func reaching(access string) func(*Policy) { return func(p *Policy) { p.NetworkAccess = access } }

func smallDisk(l *Limits) { l.DiskMB = 8 }

func filing(access string) func(*Policy) { return func(p *Policy) { p.FileAccess = access } }

// suite are the attempts.
var suite = []hostile{
	{attack: "password files", want: out, bare: true},
	{attack: "a file of the machine", want: out, bare: true},
	{attack: "a file of the machine", want: out, bare: true, with: filing(fileRead)},
	{attack: "a file of the machine", want: out, bare: true, with: filing(fileNone)},
	{attack: "symbolic links", want: out, bare: true},
	{attack: "hard links", want: out + " EXDEV"},
	{attack: "other jobs", want: out, bare: true},
	{attack: "system files", want: out + " EXDEV EBUSY", bare: true},
	{attack: "modes of system files", want: out},
	{attack: "the allowed program", want: out + " EXDEV EBUSY ETXTBSY"},
	{attack: "devices", want: out, bare: true},
	{attack: "files that run as their owner", want: "EPERM ENOSYS EINVAL"},
	{attack: "file handles", want: "EPERM", bare: true},
	{attack: "mounts", want: "EPERM", bare: true},
	{attack: "chroot", want: "EPERM", bare: true},
	{attack: "inherited descriptors", want: "EBADF", bare: true},

	{attack: "the network", want: "ENETUNREACH EAFNOSUPPORT EADDRNOTAVAIL EPERM", bare: true},
	{attack: "the network", want: "ENETUNREACH EAFNOSUPPORT EADDRNOTAVAIL", with: reaching(networkLocalhost), bare: true},
	{attack: "names", want: "ENETUNREACH EPERM", bare: true},
	{attack: "services of the machine", want: "ENETUNREACH EADDRNOTAVAIL EPERM", bare: true},
	{attack: "services of the machine", want: "ECONNREFUSED", with: reaching(networkLocalhost), bare: true},
	{attack: "abstract sockets", want: "ECONNREFUSED EPERM", bare: true},
	{attack: "abstract sockets", want: "EPERM", with: reaching(networkAll), bare: true},
	{attack: "sockets with paths", want: "ENOENT EACCES EPERM", with: reaching(networkAll)},
	{attack: "raw sockets", want: "EPERM", with: reaching(networkAll), bare: true},
	{attack: "other families of sockets", want: "EPERM", with: reaching(networkAll), bare: true},
	{attack: "the network's settings", want: "EPERM EACCES EROFS"},

	{attack: "kill others", want: "EPERM ESRCH"},
	{attack: "look into others", want: out + " ESRCH EINVAL", bare: true},
	{attack: "see others", want: "ESRCH"},
	{attack: "shared memory of others", want: "ENOENT"},
	{attack: "leave daemons", want: "DONE", bare: true},
	{attack: "be a daemon", bare: true},
	{attack: "stop itself", code: "TIMEOUT", text: "timeout_seconds", with: limited(func(l *Limits) { l.TimeoutSeconds = 1 }), bare: true},
	{attack: "never end", code: "TIMEOUT", text: "timeout_seconds", with: limited(func(l *Limits) { l.TimeoutSeconds = 1 }), bare: true},
	{attack: "wait, deaf", code: "TIMEOUT", text: "timeout_seconds", with: limited(func(l *Limits) { l.TimeoutSeconds = 1 }), bare: true},
	{attack: "control group", want: out},
	{attack: "priority", want: out, bare: true},
	{attack: "fork bomb", code: "RESOURCE_EXCEEDED", text: "processes", weak: "REMOTE_ERROR", with: limited(func(l *Limits) { l.Processes = 48 })},

	{attack: "become root", want: "EPERM EINVAL EACCES ENOENT"},
	{attack: "name spaces", want: "EPERM ENOSYS EROFS EACCES EBADF", bare: true},
	{attack: "capabilities", want: "EPERM EINVAL", bare: true},

	{attack: "other programs", want: "EACCES ENOENT", bare: true},
	{attack: "other programs by link", want: "EACCES ENOENT", bare: true},
	{attack: "copies of programs", want: "EACCES", bare: false},
	{attack: "scripts", want: "EACCES", bare: true},
	{attack: "the loader", want: "EACCES", bare: true},
	{attack: "programs in memory", want: "EPERM EACCES", bare: true},
	{attack: "code from written files", want: "EPERM"},

	{attack: "memory", code: "RESOURCE_EXCEEDED", text: "memory_mb", weak: "REMOTE_ERROR", with: limited(func(l *Limits) { l.MemoryMB = 128 })},
	{attack: "memory of many", code: "RESOURCE_EXCEEDED", text: "memory_mb", weak: "-", with: limited(func(l *Limits) { l.MemoryMB = 128 })},
	{attack: "temporary directory", code: "RESOURCE_EXCEEDED", text: "disk_mb", with: limited(smallDisk)},
	{attack: "/tmp", code: "RESOURCE_EXCEEDED", text: "disk_mb", with: limited(smallDisk)},
	{attack: "shared memory", code: "RESOURCE_EXCEEDED", text: "disk_mb", with: limited(smallDisk)},
	{attack: "one file", code: "RESOURCE_EXCEEDED", text: "disk_mb", with: limited(smallDisk), bare: true},
	{attack: "one file, signalled", code: "RESOURCE_EXCEEDED", text: "disk_mb", with: limited(smallDisk), bare: true},
	{attack: "many files", want: "ENOSPC", with: limited(smallDisk)},
	{attack: "processor time", code: "RESOURCE_EXCEEDED", text: "cpu_seconds", with: limited(func(l *Limits) { l.CPUSeconds = 0.3 }), bare: true},
	{attack: "processor time, deaf", code: "RESOURCE_EXCEEDED", text: "cpu_seconds", with: limited(func(l *Limits) { l.CPUSeconds = 0.3 }), bare: true},
	{attack: "processor time of many", code: "RESOURCE_EXCEEDED", text: "cpu_seconds", weak: "TIMEOUT", with: limited(func(l *Limits) { l.CPUSeconds, l.TimeoutSeconds = 0.5, 10 })},
	{attack: "descriptors", want: "EMFILE EPERM", bare: true},
	{attack: "limits", want: "EPERM ESRCH", with: limited(func(l *Limits) { l.CPUSeconds, l.DiskMB = 60, 8 })},
	{attack: "output", code: "RESOURCE_EXCEEDED", text: "stdout", bare: true},
	{attack: "error output", code: "REMOTE_ERROR", text: "status 9", bare: true},

	{attack: "settings of the kernel", want: out + " EIO"},
	{attack: "memory of the kernel", want: out},
	{attack: "system calls", want: "EPERM", bare: true},
	{attack: "system calls by other numbers", want: "ENOSYS", bare: true},
	{attack: "terminals", want: "EPERM", bare: true},
}

// arena is what an attacker finds around it.
type arena struct {
	*shell
	target
	program string // the attacker's file
}

func newArena(t *testing.T, o Options) *arena {
	t.Helper()
	a := &arena{shell: newShell(t, o)}
	top := t.TempDir()
	a.Secret = file(t, top, "secret", "the machine's")
	require.NoError(t, os.Chmod(top, 0o755))
	require.NoError(t, os.Chmod(a.Secret, 0o644))
	self, err := os.ReadFile("/proc/self/exe")
	require.NoError(t, err)
	a.program = filepath.Join(t.TempDir(), "attacker")
	require.NoError(t, os.WriteFile(a.program, self, 0o755))
	a.Runner, a.Temp = os.Getpid(), a.r.temp

	listen := func(network, address string) net.Listener {
		l, err := net.Listen(network, address)
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, l.Close()) })
		return l
	}
	a.Port = listen("tcp", "127.0.0.1:0").Addr().(*net.TCPAddr).Port
	a.Abstract = fmt.Sprintf("specql-hostile-%d", os.Getpid())
	listen("unix", "@"+a.Abstract)
	a.Socket = filepath.Join(top, "socket")
	listen("unix", a.Socket)
	require.NoError(t, os.Chmod(a.Socket, 0o777))
	a.Key = 0x5bec + os.Getpid()
	id, err := unix.SysvShmGet(a.Key, 4096, unix.IPC_CREAT|0o666)
	require.NoError(t, err)
	t.Cleanup(func() { _, err := unix.SysvShmCtl(id, unix.IPC_RMID, nil); require.NoError(t, err) })

	// It outlasts all attempts, however slow the machine is.
	c := a.call(hostile{attack: "victim", with: func(p *Policy) { p.ResourceLimits.TimeoutSeconds = 3600 }}, t.TempDir())
	c.Operation.Command[1] = victimArgument
	other := runnertest.Begin(t, a.client, a.job(c))
	other.Until(func(e *runnerv1.ExecuteResponse) bool { a.Victim = e.GetLog().GetText(); return a.Victim != "" })
	require.Contains(t, a.Victim, "/job-")
	t.Cleanup(func() { other.Cancel("enough"); other.Wait() })
	return a
}

// call is the attempt as a job, in a directory that has the attacker's program in it.
func (a *arena) call(h hostile, dir string) call {
	a.t.Helper()
	program := filepath.Join(dir, "attacker")
	require.NoError(a.t, os.Link(a.program, program))
	p := Policy{AllowedCommands: []string{program}, ResourceLimits: Limits{TimeoutSeconds: 120}}
	if h.with != nil {
		h.with(&p)
	}
	return call{
		// Under the race detector a program sleeps for a second before it ends, if nothing says otherwise.
		Config: Config{WorkingDirectory: dir, Environment: map[string]runner.Scalar{"GORACE": "atexit_sleep_ms=0"}}, Policy: p, Operation: Operation{Command: []string{program, attackArgument, h.attack}},
		Input: a.target,
	}
}

func (h hostile) name() string {
	p := Policy{}
	if h.with != nil {
		h.with(&p)
	}
	return strings.Join(strings.Fields(h.attack+" "+p.NetworkAccess+" "+p.FileAccess), " ")
}

// mounts are those of the machine that lie in a directory.
func mounts(t *testing.T, dir string) []string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	return slices.DeleteFunc(strings.Split(string(text), "\n"), func(line string) bool { return !strings.Contains(line, dir) })
}

// attempt makes one attempt and requires that it gets nothing and leaves nothing.
func (a *arena) attempt(t *testing.T, h hostile) {
	t.Helper()
	dir := t.TempDir()
	refused := h.with != nil && strings.HasSuffix(h.name(), networkLocalhost) && a.r.noLoop != nil
	o := runnertest.Execute(t, a.client, a.job(a.call(h, dir)))
	require.NoError(t, o.Err)
	if refused {
		require.Equal(t, "POLICY_VIOLATION", o.Code(), "there is no loopback to give")
		return
	}
	code := h.code
	if a.r.groups == cgroup.None && h.weak != "" {
		code = h.weak
	}
	if code != "-" {
		require.Equal(t, code, o.Code(), "%v %s", o.Finished.GetError(), o.Finished.GetOutput())
	}
	if code == h.code {
		require.Contains(t, o.Finished.GetError().GetMessage(), h.text)
	}
	if o.Code() == "" && h.want != "" {
		var answer struct{ Got map[string]string }
		require.NoError(t, json.Unmarshal(o.Finished.GetOutput(), &answer), "%s", o.Finished.GetOutput())
		require.NotEmpty(t, answer.Got, "%s", o.Finished.GetOutput())
		for try, got := range answer.Got {
			require.Contains(t, strings.Fields(h.want), got, "%s: %s (%v)", h.attack, try, answer.Got)
		}
	}
	// What it used is known.
	u := o.Finished.GetUsage()
	require.NotNil(t, u.CpuSeconds, "%v", o.Finished.GetError())
	require.NotNil(t, u.ExitCode)
	require.Positive(t, u.GetDurationSeconds())
	if a.r.groups != cgroup.None {
		require.Equal(t, "cgroup", u.GetSource())
		require.Positive(t, u.GetPeakMemoryMb())
	}
	// What held it is told.
	isolation := o.Finished.GetSecurity().GetIsolation()
	require.Contains(t, isolation, sandbox.Seccomp)
	require.Contains(t, isolation, sandbox.Landlock)
	require.Equal(t, a.r.box.contained(), slices.Contains(isolation, sandbox.MountNamespace))
	// Nothing of it is left.
	requireNone(t, attackArgument+" ")
	left, err := os.ReadDir(a.r.temp)
	require.NoError(t, err)
	require.Len(t, left, 1, "the victim's directory")
	require.Empty(t, mounts(t, dir))
	require.Empty(t, mounts(t, a.r.temp))
	// No process is in its control group, which is removed behind the answer.
	const launchers = 2 * (4 + 1) // that wait or are being made, each with a group of its own
	_, inUse := jobGroups(t, a.r)
	require.LessOrEqual(t, len(inUse), 1, "the victim's control group: %v", inUse)
	a.r.tidying.Wait()
	all, _ := jobGroups(t, a.r)
	require.LessOrEqual(t, len(all), 1+launchers, "%v", all)
}

// TestHostile lets jobs attempt what they can think of, as the jobs of this user's runner.
func TestHostile(t *testing.T) {
	a := newArena(t, Options{})
	require.True(t, a.r.box.contained(), "%+v", a.r.features())
	require.Equal(t, os.Getuid() == 0, a.r.box.box.OwnUID())
	for _, h := range suite {
		t.Run(h.name(), func(t *testing.T) { a.attempt(t, h) })
	}
}

// TestHostileWithoutNamespaces makes those attempts that Landlock and the filter must stop alone.
func TestHostileWithoutNamespaces(t *testing.T) {
	a := newArena(t, Options{without: []string{sandbox.UserNamespace}})
	require.False(t, a.r.box.contained())
	for _, h := range suite {
		if h.bare {
			t.Run(h.name(), func(t *testing.T) { a.attempt(t, h) })
		}
	}
}

// TestHostileAsAnotherUser makes all attempts on a runner without privileges.
func TestHostileAsAnotherUser(t *testing.T) {
	const nobody = 65534
	dir, err := os.MkdirTemp("/tmp", "hostile-") //nolint:usetesting // t.TempDir lies where another user does not get
	require.NoError(t, err)
	defer func() { require.NoError(t, os.RemoveAll(dir)) }()
	cmd := exec.Command("/proc/self/exe", "-test.run=^(TestHostile|TestHostileWithoutNamespaces)$", "-test.v")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "TMPDIR="+dir, "HOME="+dir)
	if os.Getuid() == 0 { // else this user is one without privileges
		require.NoError(t, os.Chown(dir, nobody, -1))
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	text, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", text)
	require.GreaterOrEqual(t, strings.Count(string(text), "--- PASS: TestHostile/"), len(suite), "%s", text)
}
