package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// launcherMain is the whole life of a launcher.
func launcherMain(mode, kind string) int {
	runtime.LockOSThread()
	if mode == modeStage {
		return stage(kind)
	}
	if mode == modeHold {
		var b [1]byte
		_, _ = unix.Read(launcherSocket, b[:]) // until the runner has what it wants
		return 0
	}
	kind, filtered := strings.CutSuffix(kind, filteredSuffix)
	l := &launcher{descriptors: kind == kindDescriptors, filtered: filtered}
	if err := l.run(mode); err != nil {
		answer := reply{Err: err.Error()}
		answer.Errno, _ = errors.AsType[syscall.Errno](err)
		_ = send(launcherSocket, answer, nil) // the runner sees the end if it cannot be told
		return 1
	}
	return 0
}

// stage starts a launcher for a runner without privileges. Such a runner hides its memory from
// its own user, by which the kernel denies it the maps of its children's user name spaces.
func stage(kind string) int {
	kind, filtered := strings.CutSuffix(kind, filteredSuffix)
	launcherKind := kindPaths
	if filtered {
		launcherKind += filteredSuffix
	}
	uid, gid := os.Getuid(), os.Getgid()
	cmd := &exec.Cmd{
		Path: "/proc/self/exe", Args: []string{launcherName, modeSpaces, launcherKind}, Env: launcherEnvironment, Dir: "/",
		ExtraFiles: []*os.File{os.NewFile(launcherSocket, "runner")}, SysProcAttr: spaces(kind == kindNetwork),
	}
	cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}}
	cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: gid, HostID: gid, Size: 1}}
	answer := reply{}
	err := cmd.Start()
	if err != nil {
		answer.Err = "start a launcher: " + err.Error()
		answer.Errno, _ = errors.AsType[syscall.Errno](err)
	} else {
		answer.PID = cmd.Process.Pid
	}
	_ = send(launcherSocket, answer, nil) // the runner sees the end if it cannot be told
	_ = unix.Close(launcherSocket)
	if err == nil {
		_ = cmd.Wait() // the runner hears from the launcher itself
	}
	return 0
}

// spaces are the name spaces of a launcher.
func spaces(ownNetwork bool) *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		Setsid:     true, Pdeathsig: syscall.SIGKILL,
		AmbientCaps: []uintptr{unix.CAP_SETPCAP, unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN},
	}
	if ownNetwork {
		attr.Cloneflags |= unix.CLONE_NEWNET
	}
	return attr
}

type launcher struct {
	descriptors bool
	filtered    bool
	rules       *ruleset // of the system's directories, made ahead
	home        int      // the private directory that was made ahead
	temp        string
	starter     *starter
}

// starter is the thread that starts the program: what a process inherits from its maker's thread
// is set on it, all but the job's own rules ahead of the job. It lives as long as the launcher,
// since it is in the job's control groups.
type starter struct {
	jobs    chan *job
	started chan start
}

type start struct {
	pid int
	err error
}

// newStarter makes the thread and waits until it is ready.
func (l *launcher) newStarter(groups []int) error {
	l.starter = &starter{jobs: make(chan *job), started: make(chan start)}
	go func() {
		runtime.LockOSThread() // and never unlocks it: the thread must not be used for anything else
		err := join(groups)
		if err == nil {
			err = confine(l.filtered, false)
		}
		l.starter.started <- start{err: err}
		for j := range l.starter.jobs {
			pid, err := 0, j.restrict()
			if err == nil {
				pid, err = syscall.ForkExec(j.spec.Path, j.spec.Argv, &syscall.ProcAttr{ //nolint:gosec // what the policy allows
					Dir: j.spec.Dir, Env: j.spec.Env, Files: []uintptr{uintptr(j.stdio[0]), uintptr(j.stdio[1]), uintptr(j.stdio[2])}, //nolint:gosec // descriptors
					Sys: &syscall.SysProcAttr{Setsid: true},
				})
			}
			l.starter.started <- start{pid, err}
		}
	}()
	return (<-l.starter.started).err
}

func (l *launcher) run(mode string) error {
	// Neither the job nor another process of this user gets to see the launcher's memory.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("hide the launcher: %w", err)
	}
	if err := unix.CloseRange(launcherSocket, 1<<31-1, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("keep the descriptors: %w", err)
	}
	abi, _ := landlockABI()
	if mode == modeSpaces {
		var a ahead
		groups, err := receive(launcherSocket, &a)
		if err != nil {
			return nil // the runner has no use for this launcher any more
		}
		if len(groups) != a.Groups {
			return errors.New("too few descriptors came")
		}
		if err := l.prepare(abi); err != nil {
			return err
		}
		if err := l.newStarter(groups); err != nil {
			return err
		}
		for _, fd := range groups {
			_ = unix.Close(fd)
		}
		warmUp()
		if err := send(launcherSocket, reply{Ready: true}, nil); err != nil {
			return err
		}
	}
	var s spec
	files, err := receive(launcherSocket, &s)
	if err != nil {
		return nil // the runner has no use for this launcher any more
	}
	if len(files) < 3+s.Groups {
		return errors.New("too few descriptors came")
	}
	job := &job{spec: &s, stdio: files[:3], groups: files[3 : 3+s.Groups], mounts: files[3+s.Groups:], launcher: l}
	if mode == modeBare {
		return job.become()
	}
	return job.carry()
}

// job is a job in its launcher.
type job struct {
	spec                  *spec
	stdio, groups, mounts []int
	launcher              *launcher
}

// carry starts the program as a child and stays until it ends. All other processes of the job
// end with the launcher.
func (j *job) carry() error {
	if err := j.launcher.fit(j); err != nil {
		return err
	}
	if j.spec.Network == OwnLoopback {
		if err := raiseLoopback(); err != nil {
			return err
		}
	}
	if err := j.setLimits(func(which int) bool { return which != unix.RLIMIT_DATA }); err != nil {
		return err
	}
	if err := j.addRules(); err != nil {
		return err
	}
	j.launcher.starter.jobs <- j
	s := <-j.launcher.starter.started
	if s.err != nil {
		return s.err
	}
	if err := j.limitData(s.pid); err != nil {
		return err
	}
	for _, fd := range append(append(j.stdio, j.groups...), j.mounts...) {
		_ = unix.Close(fd)
	}
	if err := send(launcherSocket, reply{}, nil); err != nil {
		return err
	}
	asked := make(chan struct{})
	go func() { // anything that the runner says, and its end, is the end of the job
		var b [1]byte
		_, _ = unix.Read(launcherSocket, b[:])
		_ = unix.Kill(-1, unix.SIGKILL)
		close(asked)
	}()
	for {
		var status unix.WaitStatus
		var used unix.Rusage
		pid, err := unix.Wait4(-1, &status, unix.WALL, &used)
		if errors.Is(err, unix.EINTR) || err == nil && (pid != s.pid || !status.Exited() && !status.Signaled()) {
			continue // an orphan of the job
		}
		if err != nil {
			return fmt.Errorf("wait for the program: %w", err)
		}
		if err := endAll(); err != nil {
			return err
		}
		if err := send(launcherSocket, reply{OwnPeak: ownPeak(), Ended: &ended{
			Status: uint32(status), Utime: used.Utime.Nano(), Stime: used.Stime.Nano(), MaxRSS: used.Maxrss, Inblock: used.Inblock, Oublock: used.Oublock,
			TempUsed: j.launcher.tempUsed(),
		}}, nil); err != nil {
			return err
		}
		<-asked // the runner ends this process when it has answered
		return nil
	}
}

// endAll ends every other process of the job and returns when none is left: this process is the
// one that the orphans of its name space are handed to.
func endAll() error {
	for options := unix.WALL | unix.WNOHANG; ; {
		switch pid, err := unix.Wait4(-1, nil, options, nil); {
		case errors.Is(err, unix.ECHILD):
			return nil
		case err != nil && !errors.Is(err, unix.EINTR):
			return fmt.Errorf("wait for the job's processes: %w", err)
		case err == nil && pid == 0: // some live
			if err := unix.Kill(-1, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("end the job's processes: %w", err)
			}
			options = unix.WALL
		default:
			options = unix.WALL | unix.WNOHANG
		}
	}
}

// become executes the program in the launcher's place.
func (j *job) become() error {
	if j.spec.OwnNetwork {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make a network name space: %w", err)
		}
		if j.spec.Network == OwnLoopback {
			if err := raiseLoopback(); err != nil {
				return err
			}
		}
	}
	if j.spec.ABI > 0 {
		var err error
		if j.launcher.rules, err = newRuleset(j.spec.ABI); err != nil {
			return err
		}
		if err := j.launcher.rules.allowSystem(); err != nil {
			return err
		}
	}
	if err := os.Chdir(j.spec.Dir); err != nil {
		return err
	}
	for i, fd := range j.stdio {
		if err := unix.Dup3(fd, i, 0); err != nil {
			return fmt.Errorf("set descriptor %d: %w", i, err)
		}
	}
	if err := j.setLimits(func(int) bool { return true }); err != nil {
		return err
	}
	if err := j.addRules(); err != nil {
		return err
	}
	// The groups come first, so that what the rest costs is the job's.
	if err := join(j.groups); err != nil {
		return err
	}
	if err := confine(!j.spec.NoFilter, j.spec.NoSockets); err != nil {
		return err
	}
	if err := j.restrict(); err != nil {
		return err
	}
	if err := send(launcherSocket, reply{OwnPeak: ownPeak()}, nil); err != nil {
		return err
	}
	return syscall.Exec(j.spec.Path, j.spec.Argv, j.spec.Env) //nolint:gosec // what the policy allows
}

// join puts this thread, and what it starts, into control groups.
func join(groups []int) error {
	for _, fd := range groups {
		if _, err := unix.Write(fd, []byte("0")); err != nil {
			return fmt.Errorf("join the control group: %w", err)
		}
	}
	return nil
}

// addRules completes the Landlock rules for the job.
func (j *job) addRules() error {
	if j.launcher.rules == nil || j.spec.ABI == 0 {
		return nil
	}
	for _, r := range j.spec.Rules {
		if err := j.launcher.rules.allow(r.Path, r.Access); err != nil {
			return err
		}
	}
	return nil
}

// restrict applies the rules. It needs no_new_privs.
func (j *job) restrict() error {
	if j.launcher.rules == nil || j.spec.ABI == 0 {
		return nil
	}
	return j.launcher.rules.apply()
}

// confine takes from this thread, and from what it starts, what no job is to have.
func confine(filtered, noSockets bool) error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	if err := dropCapabilities(); err != nil {
		return err
	}
	if !filtered {
		return nil
	}
	program, err := systemCalls(noSockets)
	if err != nil {
		return err
	}
	return applyFilter(program)
}

// warmUp reads a description once, so that the first one that counts is read by code that has
// run before.
func warmUp() {
	body, err := json.Marshal(spec{
		Argv: []string{""}, Env: []string{""}, Mounts: []mount{{}}, Links: []link{{}}, Temp: &temp{}, Rules: []rule{{}}, Limits: []Limit{{}},
	})
	if err == nil {
		_ = json.Unmarshal(body, new(spec)) // nothing depends on it
	}
}

// ownPeak is this process's largest memory, in KiB.
func ownPeak() int64 {
	var ru unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &ru); err != nil {
		return 1 << 40
	}
	return ru.Maxrss
}

// setLimits sets those limits of this process that are wanted. The program inherits them.
func (j *job) setLimits(wanted func(which int) bool) error {
	for _, l := range j.spec.Limits {
		if !wanted(l.Which) {
			continue
		}
		var now unix.Rlimit
		if err := unix.Getrlimit(l.Which, &now); err != nil {
			return fmt.Errorf("read limit %d: %w", l.Which, err)
		}
		if err := unix.Setrlimit(l.Which, &unix.Rlimit{Cur: min(l.Soft, now.Max), Max: min(l.Hard, now.Max)}); err != nil {
			return fmt.Errorf("set limit %d: %w", l.Which, err)
		}
	}
	return nil
}

// limitData bounds the memory of a program that was started. The launcher, which may need more
// than the job is to have, cannot bound its own. It is only asked for where there is no control
// group, which holds a job from the first instruction on.
func (j *job) limitData(pid int) error {
	for _, l := range j.spec.Limits {
		if l.Which != unix.RLIMIT_DATA {
			continue
		}
		if err := unix.Prlimit(pid, l.Which, &unix.Rlimit{Cur: l.Soft, Max: l.Hard}, nil); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("set limit %d: %w", l.Which, err)
		}
	}
	return nil
}

// dropCapabilities takes every capability from this thread, and the way to any.
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
