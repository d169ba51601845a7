package sandbox

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

const (
	// DefaultUIDBase is the first user of jobs where the runner is root: beyond those that
	// systems give to people, services and containers.
	DefaultUIDBase = 1_879_100_000
	// UIDs is how many users there are from the first on; as many jobs can run at once.
	UIDs = 65_536
	// ready is how many launchers wait for jobs.
	ready = 4
	// startTimeout is how long a launcher may take to be ready, on a machine that is very busy.
	startTimeout = 30 * time.Second
	killTimeout  = 5 * time.Second
	// refillAfter is how long a job goes on before launchers are made for others.
	refillAfter = 50 * time.Millisecond
	// answerFirst is how long the launcher of a job that is over waits for its end, which takes a
	// processor longer than the answer does.
	answerFirst = 2 * time.Millisecond
	maxIDMaps   = 1024
)

// launcherEnvironment is the whole environment of a launcher. A launcher lives for one job.
var launcherEnvironment = []string{"GOMAXPROCS=1", "GOGC=off", "GORACE=atexit_sleep_ms=0"}

// Options configure a [Sandbox].
type Options struct {
	Logger *slog.Logger
	// UIDBase is the first of the [UIDs] users that jobs of root's runner become; 0 for
	// [DefaultUIDBase].
	UIDBase int
	// Without are ways of holding a job to leave away, as on a machine that lacks them:
	// [UserNamespace] stands for all name spaces, [Landlock] and [Seccomp] for themselves.
	Without []string
	// NewRoom makes a place for a launcher made ahead; nil for none.
	NewRoom func() (Room, error)
}

// Room is what the thread that starts a job is in ahead of it, such as control groups. It is
// used once.
type Room interface {
	// Joins are the files through which the thread joins, by writing 0 to each.
	Joins() []*os.File
	// Close takes away a room that no job got.
	Close()
}

// Sandbox starts jobs. Its methods are safe for concurrent use.
type Sandbox struct {
	log     *slog.Logger
	base    int
	newRoom func() (Room, error)
	// spaces tells that jobs get name spaces, ownUID that each becomes a user of its own.
	spaces, ownUID bool
	noSpaces       error
	noUID          error
	abi            int
	noLandlock     error
	noSeccomp      error
	noNet, noLoop  error // of bare jobs

	work chan func() // for the thread that starts launchers
	done chan struct{}

	mu     sync.Mutex
	closed bool
	idle   map[bool][]*launched // by whether they have a network of their own
	making map[bool]int
	slots  map[int]bool // taken
	maps   map[idMap]int
	filled sync.WaitGroup
}

type idMap struct{ uid, gid, to int }

// launched is a launcher as its runner sees it.
type launched struct {
	cmd    *exec.Cmd // the launcher, or the stage that has started it
	pid    int
	socket int
	slot   int // -1 for none
	uid    int // of the job
	room   Room

	mu sync.Mutex
	fd int // by which a stage's launcher is ended; -1 for none
	// gone tells that the launcher has ended and socket is closed.
	gone bool
}

// New finds out what this machine can hold jobs with. Close ends what it started.
func New(o Options) (*Sandbox, error) {
	s := &Sandbox{
		log: o.Logger, base: cmp.Or(o.UIDBase, DefaultUIDBase), newRoom: o.NewRoom, work: make(chan func()), done: make(chan struct{}),
		idle: map[bool][]*launched{}, making: map[bool]int{}, slots: map[int]bool{}, maps: map[idMap]int{},
	}
	if s.base < 1 || s.base > 1<<31-UIDs {
		return nil, fmt.Errorf("--uid-base is %d, and must be 1 to %d", s.base, 1<<31-UIDs)
	}
	s.abi, s.noLandlock = landlockABI()
	s.noSeccomp = haveSeccomp()
	OnOwnThread(s.startLaunchers)
	without := errors.New("it is not wanted")
	if slices.Contains(o.Without, Landlock) {
		s.abi, s.noLandlock = 0, without
	}
	if slices.Contains(o.Without, Seccomp) {
		s.noSeccomp = without
	}
	if slices.Contains(o.Without, UserNamespace) {
		s.noSpaces = without
	} else if err := s.probe(); err != nil {
		s.Close()
		return nil, err
	}
	if !s.spaces {
		s.noNet, s.noLoop = networkNamespaces()
	}
	return s, nil
}

// startLaunchers is the thread that launchers are started by. They end with it.
func (s *Sandbox) startLaunchers() {
	for {
		select {
		case f := <-s.work:
			f()
		case <-s.done:
			return
		}
	}
}

// onStarter runs f on the thread of the launchers; false once the sandbox is closed.
func (s *Sandbox) onStarter(f func()) bool {
	ended := make(chan struct{})
	select {
	case s.work <- func() { defer close(ended); f() }:
		<-ended
		return true
	case <-s.done:
		return false
	}
}

// probe starts the first launcher in the strictest way that works. That no room can be made says
// nothing of name spaces, and is an error.
func (s *Sandbox) probe() error {
	var noRoom *roomError
	if os.Geteuid() == 0 {
		s.ownUID = true
		l, err := s.spawn(true)
		if err == nil {
			s.spaces, s.idle[true] = true, []*launched{l}
			return nil
		}
		if errors.As(err, &noRoom) {
			return err
		}
		s.ownUID, s.noUID = false, err
	} else {
		s.noUID = errors.New("only root can give jobs users of their own; a job has the runner's, in a user name space of its own")
	}
	l, err := s.spawn(true)
	if errors.As(err, &noRoom) {
		return err
	}
	if err != nil {
		s.noSpaces = err
		return nil
	}
	s.spaces, s.idle[true] = true, []*launched{l}
	return nil
}

// roomError is that no room could be made.
type roomError struct{ err error }

func (e *roomError) Error() string { return e.err.Error() }

func (e *roomError) Unwrap() error { return e.err }

// Features are the ways of holding a job, those that are missing here among them.
func (s *Sandbox) Features() []Feature {
	need := "; unprivileged user name spaces must be allowed, and Linux be 5.12 or later"
	f := []Feature{feature(NoNewPrivileges, nil, ""), feature(NoCapabilities, nil, "")}
	for _, name := range []string{UserNamespace, PIDNamespace, MountNamespace, IPCNamespace, UTSNamespace, PrivateProc} {
		f = append(f, feature(name, s.noSpaces, need))
	}
	net := s.noNet
	if net != nil {
		net = fmt.Errorf("network_access none is not enforced by a name space and localhost is refused (%w)", net)
	}
	return append(f, feature(NetworkNamespace, net, "; run the runner as root or with CAP_SYS_ADMIN"), feature(OwnUID, cmp.Or(s.noUID, s.noSpaces), ""),
		feature(Landlock, s.noLandlock, ""), feature(Seccomp, s.noSeccomp, ""))
}

func feature(name string, missing error, mend string) Feature {
	if missing == nil {
		return Feature{Name: name, Available: true}
	}
	return Feature{Name: name, Detail: missing.Error() + mend}
}

// Contained tells whether jobs get name spaces.
func (s *Sandbox) Contained() bool { return s.spaces }

// OwnUID tells whether jobs get users of their own.
func (s *Sandbox) OwnUID() bool { return s.ownUID }

// Executes tells whether what a program executes is held to the allowed programs.
func (s *Sandbox) Executes() bool { return s.abi > 0 }

// NetworkMissing says why jobs cannot be given a network of their own, with nothing in it and
// with a loopback; nil where they can.
func (s *Sandbox) NetworkMissing() (alone, loopback error) { return s.noNet, s.noLoop }

// Sockets tells whether a job without a network name space is kept from all but local sockets.
func (s *Sandbox) Sockets() bool { return s.noSeccomp == nil }

// Close ends the launchers that have no job. Jobs must have ended.
func (s *Sandbox) Close() {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return
	}
	s.closed = true
	var all []*launched
	for _, ls := range s.idle {
		all = append(all, ls...)
	}
	s.idle = map[bool][]*launched{}
	s.mu.Unlock()
	for _, l := range all {
		s.discard(l)
	}
	s.filled.Wait()
	close(s.done)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, fd := range s.maps {
		_ = unix.Close(fd)
	}
	clear(s.maps)
}

// discard ends a launcher that has no job.
func (s *Sandbox) discard(l *launched) {
	l.kill()
	_ = unix.Close(l.socket)
	l.wait()
	s.free(l.slot)
	if l.room != nil {
		l.room.Close()
	}
}

func (s *Sandbox) slot() (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range UIDs {
		if !s.slots[i] {
			s.slots[i] = true
			return i, nil
		}
	}
	return -1, errors.New("all users for jobs are taken")
}

func (s *Sandbox) free(slot int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.slots, slot)
}

// spawn starts a launcher with name spaces and waits until it is ready.
func (s *Sandbox) spawn(ownNetwork bool) (*launched, error) {
	l := &launched{slot: -1, fd: -1, uid: os.Geteuid()}
	var err error
	if s.ownUID {
		if l.slot, err = s.slot(); err != nil {
			return nil, err
		}
		l.uid = s.base + l.slot
		attr := spaces(ownNetwork)
		attr.Credential = &syscall.Credential{Uid: uint32(l.uid), Gid: uint32(l.uid)} //nolint:gosec // bounded by New
		attr.GidMappingsEnableSetgroups = true
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: l.uid, HostID: l.uid, Size: 1}}
		attr.GidMappings = attr.UidMappings
		err = s.exec(l, modeSpaces, s.filtered(kindDescriptors), attr)
	} else {
		kind := kindHost
		if ownNetwork {
			kind = kindNetwork
		}
		err = s.exec(l, modeStage, s.filtered(kind), &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL})
	}
	if err != nil {
		s.free(l.slot)
		return nil, err
	}
	if err := s.furnish(l); err != nil {
		s.discard(l)
		return nil, err
	}
	if err := l.prepared(!s.ownUID); err != nil {
		s.discard(l)
		return nil, fmt.Errorf("make name spaces: %w", err)
	}
	return l, nil
}

// furnish gives a launcher its room.
func (s *Sandbox) furnish(l *launched) error {
	var files []int
	if s.newRoom != nil {
		room, err := s.newRoom()
		if err != nil {
			return &roomError{err}
		}
		l.room = room
		for _, f := range l.room.Joins() {
			files = append(files, int(f.Fd())) //nolint:gosec // a descriptor
		}
	}
	return send(l.socket, ahead{Groups: len(files)}, files)
}

func (s *Sandbox) filtered(kind string) string {
	if s.noSeccomp != nil {
		return kind
	}
	return kind + filteredSuffix
}

// prepared waits until a launcher is ready for a job. That of a stage tells it and the stage its
// number, in any order.
func (l *launched) prepared(staged bool) error {
	for ready := false; !ready || staged && l.fd < 0; {
		r, err := l.answer(startTimeout)
		if err != nil {
			return err
		}
		ready = ready || r.Ready
		if r.PID > 0 {
			l.pid = r.PID
			if l.fd, err = unix.PidfdOpen(l.pid, 0); err != nil {
				return fmt.Errorf("watch the launcher: %w", err)
			}
		}
	}
	return nil
}

// kill ends a launcher, and with it its job.
func (l *launched) kill() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fd >= 0 {
		_ = unix.PidfdSendSignal(l.fd, unix.SIGKILL, nil, 0) // ended already is as good
		return
	}
	_ = l.cmd.Process.Kill()
}

// ask has a launcher end its job.
func (l *launched) ask() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.gone {
		_, _ = unix.SendmsgN(l.socket, []byte{0}, nil, nil, unix.MSG_NOSIGNAL) // else it has ended
	}
}

// wait returns when the launcher is gone, with all of its job.
func (l *launched) wait() {
	_ = l.cmd.Wait() // the state says it
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fd >= 0 {
		_ = unix.Close(l.fd)
		l.fd = -1
	}
}

// exec starts this program as a launcher.
func (s *Sandbox) exec(l *launched, mode, kind string, attr *syscall.SysProcAttr) error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("make a socket: %w", err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "launcher") //nolint:gosec // a descriptor
	defer func() { _ = theirs.Close() }()
	l.socket = pair[0]
	l.cmd = &exec.Cmd{
		Path: "/proc/self/exe", Args: []string{launcherName, mode, kind}, Env: launcherEnvironment, Dir: "/",
		ExtraFiles: []*os.File{theirs}, SysProcAttr: attr,
	}
	err = os.ErrClosed
	s.onStarter(func() { err = l.cmd.Start() })
	if err != nil {
		_ = unix.Close(l.socket)
		return fmt.Errorf("start a launcher: %w", err)
	}
	l.pid = l.cmd.Process.Pid
	return nil
}

// answer waits for a launcher's word that all is well.
func (l *launched) answer(timeout time.Duration) (*reply, error) {
	limit := unix.NsecToTimeval(timeout.Nanoseconds())
	if err := unix.SetsockoptTimeval(l.socket, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit); err != nil {
		return nil, fmt.Errorf("bound the wait: %w", err)
	}
	var r reply
	if _, err := receive(l.socket, &r); err != nil {
		return nil, fmt.Errorf("the launcher ended: %w", err)
	}
	return &r, r.error()
}

func (r *reply) error() error {
	switch {
	case r.Err == "":
		return nil
	case r.Errno != 0:
		return &launchError{r.Err, r.Errno}
	}
	return errors.New(r.Err)
}

// launchError is what went wrong in a launcher.
type launchError struct {
	text string
	err  error
}

func (e *launchError) Error() string { return e.text }

func (e *launchError) Unwrap() error { return e.err }

// take gives a launcher that is ready, or makes one.
func (s *Sandbox) take(ownNetwork bool) (*launched, error) {
	for {
		s.mu.Lock()
		if len(s.idle[ownNetwork]) == 0 {
			s.mu.Unlock()
			return s.spawn(ownNetwork)
		}
		l := s.idle[ownNetwork][0]
		s.idle[ownNetwork] = s.idle[ownNetwork][1:]
		s.mu.Unlock()
		if l.waits() {
			return l, nil
		}
		s.discard(l) // ended by someone, such as a kernel short of memory
	}
}

// waits tells whether a launcher without a job is there: it says nothing until it gets one.
func (l *launched) waits() bool {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(l.socket), Events: unix.POLLIN}}, 0) //nolint:gosec // a descriptor
	return n == 0 && (err == nil || errors.Is(err, unix.EINTR))
}

// refill has launchers made for the next jobs, at a time when that slows this one least.
func (s *Sandbox) refill(ownNetwork bool, gone <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.making[ownNetwork] > 0 || len(s.idle[ownNetwork]) >= ready {
		return
	}
	s.making[ownNetwork]++
	wait := len(s.idle[ownNetwork]) > 0
	s.filled.Go(func() {
		if wait {
			select {
			case <-gone:
			case <-s.done:
			case <-time.After(refillAfter):
			}
		}
		s.fill(ownNetwork)
	})
}

// fill makes launchers until enough are ready.
func (s *Sandbox) fill(ownNetwork bool) {
	for {
		s.mu.Lock()
		if s.closed || len(s.idle[ownNetwork]) >= ready {
			s.making[ownNetwork]--
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
		l, err := s.spawn(ownNetwork)
		if err == nil && s.ownUID {
			_, err = s.idMap(0, 0, l.uid) // most directories are root's
			if err != nil {
				s.discard(l)
			}
		}
		s.mu.Lock()
		if err != nil {
			s.making[ownNetwork]--
			s.mu.Unlock()
			s.log.Warn("no launcher could be made ahead", "error", err)
			return
		}
		if !s.closed {
			s.idle[ownNetwork] = append(s.idle[ownNetwork], l)
			s.mu.Unlock()
			continue
		}
		s.making[ownNetwork]--
		s.mu.Unlock()
		s.discard(l)
		return
	}
}

// idMap gives a user name space in which files of uid and gid are those of a job's user.
func (s *Sandbox) idMap(uid, gid, to int) (int, error) {
	key := idMap{uid, gid, to}
	s.mu.Lock()
	fd, ok := s.maps[key]
	s.mu.Unlock()
	if ok {
		return fd, nil
	}
	l := &launched{slot: -1, fd: -1}
	if err := s.exec(l, modeHold, kindHost, &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER, Pdeathsig: syscall.SIGKILL,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: uid, HostID: to, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: gid, HostID: to, Size: 1}},
	}); err != nil {
		return -1, err
	}
	defer s.discard(l)
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/user", l.cmd.Process.Pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open a user name space: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.maps) >= maxIDMaps || s.closed {
		for k, fd := range s.maps {
			_ = unix.Close(fd)
			delete(s.maps, k)
		}
	}
	if old, ok := s.maps[key]; ok {
		_ = unix.Close(fd)
		return old, nil
	}
	s.maps[key] = fd
	return fd, nil
}

// Job says what to start, and in what.
type Job struct {
	// Path is the program, resolved; Argv and Env are all that it gets.
	Path      string
	Argv, Env []string
	// WorkDir is the working directory, resolved; empty for Private.
	WorkDir string
	Access  Access
	// Script is a file that may be read whatever Access is; empty for none.
	Script string
	// Private is the job's own directory on the machine. The job sees it by this path.
	Private string
	// Hidden is a directory that holds those of other jobs.
	Hidden string
	// TempBytes is the size of the place for temporary files; 0 for that of the machine's disk.
	TempBytes int64
	// Programs may be executed.
	Programs              []Program
	Network               Network
	Limits                []Limit
	Stdin, Stdout, Stderr *os.File
	// Enter is told the room of the job's launcher, where it has one, before the job is told to
	// the launcher. From then on the room is the job's.
	Enter func(Room) error
	// Groups are the files through which the thread of a job without name spaces joins its control
	// groups, and Join moves a process; one of them, or neither.
	Groups []*os.File
	Join   func(pid int) error
}

// Process is a job that was started.
type Process struct {
	// PID is that of the job's launcher, which is the job itself where there are no name spaces.
	PID int
	// Contained tells that no process outlives the job's end.
	Contained bool
	// Exited is closed when the job has ended. The number of one that is not contained stays taken
	// until Wait.
	Exited chan struct{}
	// Gone is closed when nothing is left of a contained job's launcher either, which is some time
	// after the job's end: the kernel takes its name spaces down.
	Gone chan struct{}
	// Notes are what the job's author should know.
	Notes []string

	l      *launched
	s      *Sandbox
	state  State
	asked  sync.Once
	reaped chan struct{}
	reap   chan struct{}
	temp   string
	// ownPeak is the launcher's memory before the program took its place, in KiB.
	ownPeak int64
}

// Start starts a job. An error of the kernel's on executing the program is in the error's chain.
func (s *Sandbox) Start(j *Job) (*Process, error) {
	if err := checkText(j); err != nil {
		return nil, err
	}
	if !s.spaces {
		return s.startBare(j)
	}
	l, err := s.take(j.Network != HostNetwork)
	if err != nil {
		return nil, err
	}
	p := &Process{PID: l.pid, Contained: true, Exited: make(chan struct{}), Gone: make(chan struct{}), l: l, s: s}
	b := &building{s: s, job: j, process: p, spec: s.newSpec(j)}
	defer b.close()
	err = b.tree()
	if err == nil && l.room != nil && j.Enter != nil {
		room := l.room
		l.room = nil
		err = j.Enter(room)
	}
	if err == nil && j.Join != nil {
		err = j.Join(p.PID)
	}
	if err == nil {
		err = send(l.socket, b.spec, b.files())
	}
	if err == nil {
		_, err = l.answer(0)
	}
	if err != nil {
		s.discard(l)
		return nil, err
	}
	if j.TempBytes > 0 {
		p.temp = fmt.Sprintf("/proc/%d/root%s", p.PID, j.Private)
	}
	go p.watch()
	s.refill(j.Network != HostNetwork, p.Gone)
	return p, nil
}

// checkText refuses what cannot be told to a launcher as it is.
func checkText(j *Job) error {
	for _, list := range [][]string{{j.Path, j.WorkDir, j.Script, j.Private}, j.Argv, j.Env} {
		for _, s := range list {
			if !utf8.ValidString(s) {
				return fmt.Errorf("%q is not valid UTF-8: %w", s, syscall.EILSEQ)
			}
		}
	}
	return nil
}

func (s *Sandbox) newSpec(j *Job) *spec {
	sp := &spec{Path: j.Path, Argv: j.Argv, Env: j.Env, Dir: cmp.Or(j.WorkDir, j.Private), Groups: len(j.Groups), Network: j.Network, Limits: j.Limits, ABI: s.abi, NoFilter: s.noSeccomp != nil}
	if s.abi == 0 {
		return sp
	}
	for _, path := range executed(j.Programs) {
		sp.Rules = append(sp.Rules, rule{path, execFile})
	}
	for _, p := range j.Programs {
		for _, path := range support(p) {
			sp.Rules = append(sp.Rules, rule{path, readFiles})
		}
	}
	places := []string{j.Private}
	if s.spaces {
		places = append(places, "/tmp", "/dev/shm")
	}
	switch {
	case j.WorkDir == "":
	case j.Access == FullAccess:
		places = append(places, j.WorkDir)
	case j.Access == ReadAccess:
		sp.Rules = append(sp.Rules, rule{j.WorkDir, readFiles})
	}
	if j.Script != "" {
		sp.Rules = append(sp.Rules, rule{j.Script, readFiles})
	}
	for _, path := range places {
		sp.Rules = append(sp.Rules, rule{path, writeFiles})
	}
	return sp
}

// executed are the files that the kernel may execute for a job: the allowed programs, the
// interpreters that their #! lines name, and their loaders.
func executed(programs []Program) []string {
	var all []string
	for _, p := range programs {
		all = append(append(all, p.Path), interpreters(p.Path, 0)...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// building puts a job's tree together.
type building struct {
	s       *Sandbox
	job     *Job
	process *Process
	spec    *spec
	opened  []int
}

func (b *building) close() {
	for _, fd := range b.opened {
		_ = unix.Close(fd)
	}
}

func (b *building) files() []int {
	var all []int
	for _, f := range append([]*os.File{b.job.Stdin, b.job.Stdout, b.job.Stderr}, b.job.Groups...) {
		all = append(all, int(f.Fd())) //nolint:gosec // a descriptor
	}
	return append(all, b.opened...)
}

func (b *building) tree() error {
	j := b.job
	b.spec.Temp = &temp{Home: j.Private}
	if j.TempBytes > 0 {
		b.spec.Temp.Bytes = j.TempBytes
	} else {
		if b.s.ownUID {
			if err := os.Chown(j.Private, b.process.l.uid, b.process.l.uid); err != nil {
				return fmt.Errorf("give the private directory to the job: %w", err)
			}
			if err := b.open(j.Private, false); err != nil {
				return err
			}
		} else {
			b.spec.Temp.Source = j.Private
		}
	}
	if j.WorkDir != "" {
		if j.Access == NoAccess {
			b.spec.Mounts = append(b.spec.Mounts, mount{Target: j.WorkDir, Empty: true})
		} else if err := b.show(mount{Target: j.WorkDir, ReadOnly: j.Access == ReadAccess, NoExec: j.Access == FullAccess && b.s.abi > 0}, true); err != nil {
			return err
		}
		if j.Hidden != "" && below(j.WorkDir, j.Hidden) {
			b.spec.Mounts = append(b.spec.Mounts, mount{Target: j.Hidden, Empty: true})
		}
	}
	if j.Script != "" && (j.Access == NoAccess || !below(j.WorkDir, j.Script)) {
		if err := b.show(mount{Target: j.Script, ReadOnly: true}, true); err != nil {
			return err
		}
	}
	shown := map[string]bool{}
	for _, p := range j.Programs {
		for _, path := range append(executed([]Program{p}), support(p)...) {
			if inSystem(path) || shown[path] {
				continue
			}
			shown[path] = true
			if err := b.show(mount{Target: path, ReadOnly: true}, true); err != nil {
				return err
			}
		}
		if p.Listed != p.Path && !inSystem(p.Listed) {
			b.spec.Links = append(b.spec.Links, link{At: p.Listed, Target: p.Path})
		}
	}
	return nil
}

// show adds a mount of the machine's path at the same path.
func (b *building) show(m mount, mapped bool) error {
	if !b.s.ownUID {
		m.Source = m.Target
	} else if err := b.open(m.Target, mapped); err != nil {
		return err
	}
	b.spec.Mounts = append(b.spec.Mounts, m)
	return nil
}

// open takes a detached tree of a path, in which its owner's files are the job's.
func (b *building) open(path string, mapped bool) error {
	if len(b.opened) > maxFiles-16 {
		return errors.New("the job needs too many directories; allow fewer commands outside /usr")
	}
	fd, err := cloneTree(path)
	if err != nil {
		return fmt.Errorf("show %s: %w", path, err)
	}
	b.opened = append(b.opened, fd)
	if !mapped {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("show %s: %w", path, err)
	}
	space, err := b.s.idMap(int(st.Uid), int(st.Gid), b.process.l.uid)
	if err != nil {
		return err
	}
	mapping := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(space)} //nolint:gosec // a descriptor
	whole := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, mapping)
	if whole == nil {
		return nil
	}
	// One file system below that cannot map users is no reason to map none.
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, mapping); err == nil {
		b.process.Notes = append(b.process.Notes, fmt.Sprintf("what is mounted below %s keeps its owners, and the command is none of them (a file system there cannot map users: %v)", path, whole))
	} else {
		b.process.Notes = append(b.process.Notes, fmt.Sprintf("the files of %s keep their owners, and the command is none of them (the file system cannot map users: %v); "+
			"what it needs there must be open to all users", path, err))
	}
	return nil
}

// watch waits for the job's end, and then for its launcher's. A launcher tells of the end when it
// has seen every other process of its name space gone; where it cannot, its own end says it.
func (p *Process) watch() {
	var r reply
	_, err := receive(p.l.socket, &r)
	if err == nil && r.Ended != nil {
		e := r.Ended
		p.state = State{
			Status: syscall.WaitStatus(e.Status), User: time.Duration(e.Utime), System: time.Duration(e.Stime), PeakKB: above(e.MaxRSS, r.OwnPeak),
			Inblock: e.Inblock, Oublock: e.Oublock, TempUsed: e.TempUsed,
		}
		close(p.Exited)
		select {
		case <-p.s.done:
		case <-time.After(answerFirst):
		}
		p.l.kill()
		p.l.wait()
	} else { // the launcher was ended itself, and the job with it
		p.l.kill() // it has closed the socket, and does not tell more
		p.l.wait()
		if status, ok := p.l.cmd.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signaled() {
			p.state.Status = status
		} else {
			p.state.Status = syscall.WaitStatus(unix.SIGKILL)
			p.s.log.Warn("a launcher did not tell how its job ended", "error", errors.Join(err, r.error()))
		}
		close(p.Exited)
	}
	p.s.free(p.l.slot)
	p.l.mu.Lock()
	p.l.gone = true
	_ = unix.Close(p.l.socket)
	p.l.mu.Unlock()
	close(p.Gone)
}

// Kill ends every process of a contained job, or the program of another. Wait for Exited.
func (p *Process) Kill() {
	if !p.Contained {
		_ = unix.Kill(p.PID, unix.SIGKILL) // gone already is as good
		return
	}
	select {
	case <-p.Exited:
		return
	default:
	}
	p.asked.Do(p.l.ask)
	select {
	case <-p.Exited:
	case <-time.After(killTimeout):
		p.l.kill()
	}
}

// Wait takes the state of a job that has ended and frees its number.
func (p *Process) Wait() *State {
	<-p.Exited
	if p.Contained {
		return &p.state
	}
	close(p.reap)
	<-p.reaped
	return &p.state
}

// TempUsed is what the place for temporary files holds now, in bytes; false where it has no size
// or the job has ended.
func (p *Process) TempUsed() (int64, bool) {
	var st unix.Statfs_t
	if p.temp == "" || unix.Statfs(p.temp, &st) != nil {
		return 0, false
	}
	return int64(st.Blocks-st.Bfree) * st.Bsize, true //nolint:gosec // of a file system with a size
}

// startBare starts a job whose launcher becomes it.
func (s *Sandbox) startBare(j *Job) (*Process, error) {
	l := &launched{slot: -1, fd: -1}
	p := &Process{Exited: make(chan struct{}), reaped: make(chan struct{}), reap: make(chan struct{}), l: l, s: s}
	b := &building{s: s, job: j, process: p, spec: s.newSpec(j)}
	if j.Network != HostNetwork {
		b.spec.OwnNetwork = s.noNet == nil
		b.spec.NoSockets = s.noNet != nil
	}
	if err := s.exec(l, modeBare, kindPaths, &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}); err != nil {
		return nil, err
	}
	p.PID = l.cmd.Process.Pid
	var err error
	if j.Join != nil {
		err = j.Join(p.PID)
	}
	if err == nil {
		err = send(l.socket, b.spec, b.files())
	}
	if err == nil {
		err = p.replaced()
	}
	_ = unix.Close(l.socket)
	if err != nil {
		_ = l.cmd.Process.Kill()
		_ = l.cmd.Wait() // killed
		return nil, err
	}
	go func() {
		waitExit(p.PID)
		close(p.Exited)
		<-p.reap
		_ = l.cmd.Wait() // the state says it
		p.state.from(l.cmd.ProcessState, p.ownPeak)
		close(p.reaped)
	}()
	return p, nil
}

// replaced waits until the program has taken its launcher's place, when the socket ends.
func (p *Process) replaced() error {
	for {
		var r reply
		if _, err := receive(p.l.socket, &r); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if err := r.error(); err != nil {
			return err
		}
		p.ownPeak = r.OwnPeak
	}
}

// above gives a peak that was measured: the kernel counts a process's memory on from that of
// what executed it.
func above(peak, own int64) int64 {
	const slack = 1 << 10
	if peak <= own+slack {
		return 0
	}
	return peak
}

func (s *State) from(ps *os.ProcessState, ownPeak int64) {
	s.Status, _ = ps.Sys().(syscall.WaitStatus)
	if ru, ok := ps.SysUsage().(*syscall.Rusage); ok {
		s.User, s.System = time.Duration(ru.Utime.Nano()), time.Duration(ru.Stime.Nano())
		s.PeakKB, s.Inblock, s.Oublock = above(ru.Maxrss, ownPeak), ru.Inblock, ru.Oublock
	}
}

// OnOwnThread runs f on a thread that ends with it, and which is not the process's first: that
// one stands for the whole process in its control groups.
func OnOwnThread(f func()) {
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

// waitExit waits until a process has ended, and leaves its status to be taken.
func waitExit(pid int) {
	for {
		var info unix.Siginfo
		if err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOWAIT, nil); !errors.Is(err, syscall.EINTR) {
			return
		}
	}
}

// networkNamespaces tells whether a bare job can be given a network of its own, with nothing in
// it and with a loopback.
func networkNamespaces() (alone, loopback error) {
	done := make(chan struct{})
	OnOwnThread(func() {
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
