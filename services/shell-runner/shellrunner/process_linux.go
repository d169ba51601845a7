package shellrunner

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/specql/mesh/pkg/runner/cgroup"
)

// launch says how a command is started and what holds it.
type launch struct {
	command               *command
	env                   []string
	dir                   string
	stdin, stdout, stderr *os.File
	limits                Limits
	group                 *cgroup.Group // nil where there are none
	network               network
}

// process is a started command.
type process struct {
	pid int
	// exited is closed when the command has ended. Its number stays taken until reap, so that
	// nothing else can be killed in its place.
	exited chan struct{}
	reaped chan struct{}
	reap   chan struct{}
	state  *os.ProcessState
}

// build gives the process to start. What a job is shut into is decided here, in confine and in
// setLimits.
func (l *launch) build(traced bool) *exec.Cmd {
	return &exec.Cmd{
		Path: l.command.path, Args: l.command.argv, Env: l.env, Dir: l.dir,
		Stdin: l.stdin, Stdout: l.stdout, Stderr: l.stderr,
		SysProcAttr: &syscall.SysProcAttr{
			Setsid: true,
			// Should the runner be killed, the command goes with it. The signal comes when the
			// thread ends that started the command, so that thread waits for it.
			Pdeathsig: syscall.SIGKILL,
			Ptrace:    traced,
		},
	}
}

// confine takes from this thread, and from what it starts, what a job is not to have. The
// network comes first: a name space needs the capabilities that are dropped last.
func (l *launch) confine() error {
	if l.network != hostNetwork {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make a network name space: %w", err)
		}
	}
	if l.network == ownLoopback {
		if err := raiseLoopback(); err != nil {
			return err
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	return dropCapabilities()
}

// dropCapabilities takes every capability from this thread. A command of root's then is held
// to the permission bits of files like any user's, and cannot look into a process that is
// hidden, as the runner is by hideMemory.
func dropCapabilities() error {
	for c := uintptr(0); ; c++ {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if errors.Is(err, syscall.EINVAL) { // beyond the last
			break
		}
		if errors.Is(err, syscall.EPERM) { // the runner may not; no_new_privs keeps the set from giving any
			break
		}
		if err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	// With nothing inheritable, the ambient set is empty, too.
	var none [2]unix.CapUserData
	if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0]); err != nil {
		return fmt.Errorf("drop the capabilities: %w", err)
	}
	return nil
}

// raiseLoopback makes 127.0.0.1 and ::1 usable in the thread's network.
func raiseLoopback() error {
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("raise the loopback: %w", err)
	}
	defer func() { _ = unix.Close(socket) }()
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("raise the loopback: %w", err)
	}
	lo.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(socket, unix.SIOCSIFFLAGS, lo); err != nil {
		return fmt.Errorf("raise the loopback: %w", err)
	}
	return nil
}

// start starts the command. It is held by its group, its limits and its name spaces before its
// first instruction.
//
// No helper program comes in between, which would cost time and count as the job's memory:
// what a process inherits from its maker's thread is set on a thread made for the job, and the
// rest while the command stands traced at its beginning.
func (l *launch) start() (*process, error) {
	p := &process{exited: make(chan struct{}), reaped: make(chan struct{}), reap: make(chan struct{})}
	started := make(chan error, 1)
	onOwnThread(func() {
		cmd, err := l.launch()
		if err != nil {
			started <- err
			return
		}
		p.pid = cmd.Process.Pid
		started <- nil
		waitExit(p.pid)
		close(p.exited)
		<-p.reap
		_ = cmd.Wait() // the status is in ProcessState
		p.state = cmd.ProcessState
		close(p.reaped)
	})
	if err := <-started; err != nil {
		return nil, err
	}
	return p, nil
}

// wait takes the command's status once it has ended and frees its number.
func (p *process) wait() *os.ProcessState {
	close(p.reap)
	<-p.reaped
	return p.state
}

func (l *launch) launch() (*exec.Cmd, error) {
	if err := l.confine(); err != nil {
		return nil, err
	}
	run := func(traced bool) (*exec.Cmd, error) {
		cmd := l.build(traced)
		if l.group != nil {
			return cmd, l.group.Start(cmd)
		}
		return cmd, cmd.Start()
	}
	traced := true
	cmd, err := run(traced)
	if errors.Is(err, syscall.EPERM) { // a container may forbid to trace
		traced = false
		cmd, err = run(traced)
	}
	if err != nil {
		return nil, err
	}
	pid := cmd.Process.Pid
	if traced && !waitStop(pid) {
		return cmd, nil // ended already, its status is for Wait
	}
	err = l.setLimits(pid)
	if traced {
		if detachErr := syscall.PtraceDetach(pid); err == nil && !errors.Is(detachErr, syscall.ESRCH) {
			err = detachErr
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("hold the command: %w", err), cmd.Process.Kill(), ignoreExit(cmd.Wait()))
	}
	return cmd, nil
}

func (l *launch) setLimits(pid int) error {
	limits := map[int]uint64{unix.RLIMIT_CORE: 0}
	if s := l.limits.CPUSeconds; s > 0 {
		limits[unix.RLIMIT_CPU] = uint64(s) + 1 // the group's count is exact; this holds where there is none
	}
	if mb := l.limits.DiskMB; mb > 0 {
		limits[unix.RLIMIT_FSIZE] = uint64(cutSize(mb)) //nolint:gosec // bounded by the schema
	}
	if l.group == nil {
		if mb := l.limits.MemoryMB; mb > 0 {
			limits[unix.RLIMIT_DATA] = uint64(mb) << 20
		}
		if n := l.limits.Processes; n > 0 {
			limits[unix.RLIMIT_NPROC] = uint64(n) + uint64(ownThreads()) //nolint:gosec // counts
		}
	}
	for which, value := range limits {
		hard := value
		if which == unix.RLIMIT_CPU {
			hard++ // first the signal that says why
		}
		var now unix.Rlimit
		if err := unix.Prlimit(pid, which, nil, &now); err != nil {
			return ignoreGone(err)
		}
		if err := unix.Prlimit(pid, which, &unix.Rlimit{Cur: min(value, now.Max), Max: min(hard, now.Max)}, nil); err != nil {
			return ignoreGone(err)
		}
	}
	return nil
}

// onOwnThread runs f on a thread that ends with it, and which is not the process's first: that
// one stands for the whole process in its control groups.
func onOwnThread(f func()) {
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != os.Getpid() {
			f()
			return // still locked, so that the thread ends, with all that was set on it
		}
		taken := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			close(taken)
			f()
		}()
		<-taken
		runtime.UnlockOSThread()
	}()
}

// waitStop waits until a traced process stands at its beginning; false if it has ended.
func waitStop(pid int) bool {
	info, err := waitid(pid, unix.WSTOPPED|unix.WEXITED|unix.WNOWAIT)
	const stopped, trapped = 5, 4 // CLD_STOPPED, CLD_TRAPPED
	return err == nil && (info.Code == stopped || info.Code == trapped)
}

// waitExit waits until a process has ended, and leaves its status to be taken.
func waitExit(pid int) { _, _ = waitid(pid, unix.WEXITED|unix.WNOWAIT) }

func waitid(pid, options int) (unix.Siginfo, error) {
	for {
		var info unix.Siginfo
		err := unix.Waitid(unix.P_PID, pid, &info, options, nil)
		if !errors.Is(err, syscall.EINTR) {
			return info, err
		}
	}
}

// keepDescriptors keeps what this process was given by the one that started it, such as a
// terminal's or a service manager's descriptors, from the commands. All else that a Go program
// opens is kept already.
func keepDescriptors() error {
	return unix.CloseRange(3, 1<<31-1, unix.CLOSE_RANGE_CLOEXEC)
}

// networkNamespaces tells whether a command can be given a network of its own, with nothing in
// it and with a loopback.
func networkNamespaces() (alone, loopback error) {
	done := make(chan struct{})
	onOwnThread(func() {
		defer close(done)
		if alone = unix.Unshare(unix.CLONE_NEWNET); alone != nil {
			loopback = alone
			return
		}
		loopback = raiseLoopback()
	})
	<-done
	return alone, loopback
}

// hideMemory keeps jobs from reading this process's memory and environment, and from tracing it.
// That this process has capabilities that a job lacks is not enough: a job's own thread of it has
// none, is this user's, and leads to the same memory.
func hideMemory() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("hide the process from its own user: %w", err)
	}
	return nil
}

// adoptOrphans makes this process the parent of what jobs leave without one, so that it is
// found wherever it has gone.
func adoptOrphans() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("adopt orphans: %w", err)
	}
	return nil
}

func ignoreGone(err error) error {
	if errors.Is(err, syscall.ESRCH) {
		return nil
	}
	return err
}

func ignoreExit(err error) error {
	if _, ok := errors.AsType[*exec.ExitError](err); ok {
		return nil
	}
	return err
}
