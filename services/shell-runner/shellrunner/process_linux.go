package shellrunner

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner/cgroup"
	"github.com/specql/mesh/services/shell-runner/internal/sandbox"
)

// holder shuts commands in.
type holder struct{ box *sandbox.Sandbox }

func newHolder(r *Runner, o Options) (*holder, error) {
	so := sandbox.Options{Logger: o.Logger, UIDBase: o.UIDBase, Without: o.without}
	if r.groups != cgroup.None {
		so.NewRoom = r.roomAhead
	}
	box, err := sandbox.New(so)
	if err != nil {
		return nil, err
	}
	return &holder{box}, nil
}

func (h *holder) close() { h.box.Close() }

func (h *holder) features() []sandbox.Feature { return h.box.Features() }

func (h *holder) networkMissing() (alone, loopback error) { return h.box.NetworkMissing() }

func (h *holder) contained() bool { return h.box.Contained() }

// holdsFiles tells whether file_access is enforced.
func (h *holder) holdsFiles() bool { return h.box.Contained() || h.box.Executes() }

// holdsSockets tells whether a command without a network name space is kept off the network.
func (h *holder) holdsSockets() bool { return h.box.Sockets() }

// process is a started command.
type process struct {
	*sandbox.Process
	pid int
	// contained tells that nothing outlives the command.
	contained bool
	// exited is closed when the command has ended. Its number stays taken until wait.
	exited chan struct{}
	// gone is closed when nothing is left of what held a contained one.
	gone  chan struct{}
	notes []string
}

// start starts the command. It is held by its group, its limits and its name spaces before its
// first instruction.
func (a *attempt) start(l *launch) (*process, error) {
	job := &sandbox.Job{
		Path: l.command.path, Argv: l.command.argv, Env: l.env, WorkDir: l.command.dir, Script: l.command.script,
		Access:  map[string]sandbox.Access{fileRead: sandbox.ReadAccess, fileReadWrite: sandbox.FullAccess}[a.policy.Files],
		Private: a.private, Hidden: a.r.temp, Programs: l.command.programs, Network: l.network,
		Stdin: l.stdin, Stdout: l.stdout, Stderr: l.stderr,
	}
	if mb := a.policy.Limits.DiskMB; mb > 0 {
		job.TempBytes = mb<<20 + tempSlack
	}
	job.Limits = a.limits()
	if err := a.place(job); err != nil {
		return nil, err
	}
	p, err := a.r.box.box.Start(job)
	if err != nil {
		return nil, err
	}
	return &process{Process: p, pid: p.PID, contained: p.Contained, exited: p.Exited, gone: p.Gone, notes: p.Notes}, nil
}

// place says how the job gets into its control group.
func (a *attempt) place(job *sandbox.Job) error {
	switch {
	case a.r.groups == cgroup.None:
		return nil
	case a.r.box.contained():
		job.Enter = func(g sandbox.Room) error { return a.enter(g.(*room)) } //nolint:forcetypeassert // there is no other
	default:
		g, err := a.r.newRoom()
		if err != nil {
			return fault.Wrap(err, fault.Internal, "the job's limits cannot be set: %v", err)
		}
		if err := a.enter(g); err != nil {
			return err
		}
		job.Groups = g.joins
	}
	if a.r.groups == cgroup.V2 { // no thread moves alone there
		job.Join = a.join
	}
	return nil
}

func (p *process) wait() *sandbox.State { return p.Wait() }

func (p *process) tempUsed() (int64, bool) { return p.TempUsed() }

// join moves a launcher into the job's group as a whole. Its threads do not count.
func (a *attempt) join(pid int) error {
	if err := a.group.AddPID(pid); err != nil || !a.r.box.contained() {
		return err
	}
	const more = 2 // threads that it may start yet
	threads := more
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return err
	}
	if _, after, ok := bytes.Cut(status, []byte("\nThreads:")); ok {
		line, _, _ := bytes.Cut(after, []byte("\n"))
		n, err := strconv.Atoi(string(bytes.TrimSpace(line)))
		if err != nil {
			return fmt.Errorf("count the threads of process %d: %w", pid, err)
		}
		threads += n
	}
	return a.group.SetProcesses(a.policy.Limits.Processes + int64(threads))
}

// limits are those that the kernel holds each process to.
func (a *attempt) limits() []sandbox.Limit {
	l := a.policy.Limits
	limits := []sandbox.Limit{{Which: unix.RLIMIT_CORE}, {Which: unix.RLIMIT_NOFILE, Soft: softFiles, Hard: maxFiles}}
	if s := l.CPUSeconds; s > 0 {
		// The group's count is exact; this holds where there is none. First the signal that says why.
		limits = append(limits, sandbox.Limit{Which: unix.RLIMIT_CPU, Soft: uint64(s) + 1, Hard: uint64(s) + 2})
	}
	if l.DiskMB > 0 {
		size := uint64(cutSize(l.DiskMB)) //nolint:gosec // bounded by the schema
		limits = append(limits, sandbox.Limit{Which: unix.RLIMIT_FSIZE, Soft: size, Hard: size})
	}
	if a.r.groups == cgroup.None {
		if l.MemoryMB > 0 {
			size := uint64(l.MemoryMB) << 20
			limits = append(limits, sandbox.Limit{Which: unix.RLIMIT_DATA, Soft: size, Hard: size})
		}
		n := uint64(l.Processes) + launcherThreads //nolint:gosec // a count
		if !a.r.box.contained() {
			n = uint64(l.Processes) + uint64(ownThreads()) //nolint:gosec // counts
		}
		limits = append(limits, sandbox.Limit{Which: unix.RLIMIT_NPROC, Soft: n, Hard: n})
	}
	return limits
}

// launcherThreads is how many threads a launcher has that count as its job's user's.
const launcherThreads = 8

// pipe makes a pipe. An end that this process waits at is one for the runtime's poller; the command's
// are as it expects them.
func pipe(pollR, pollW bool) (r, w *os.File, err error) {
	var ends [2]int
	if err := unix.Pipe2(ends[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, err
	}
	for i, poll := range []bool{pollR, pollW} {
		if poll {
			err = errors.Join(err, unix.SetNonblock(ends[i], true))
		}
	}
	r, w = os.NewFile(uintptr(ends[0]), "|0"), os.NewFile(uintptr(ends[1]), "|1") //nolint:gosec // descriptors
	if err != nil {
		closeAll(r, w)
		return nil, nil, err
	}
	return r, w, nil
}

// ticks is the time since the machine's start in the kernel's ticks.
func ticks() uint64 {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return 0
	}
	const perSecond = 100
	return uint64(now.Nano() / (int64(time.Second) / perSecond)) //nolint:gosec // never negative
}

// hideMemory keeps jobs from reading this process's memory and environment, and from tracing it.
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
