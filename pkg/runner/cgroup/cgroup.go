// Package cgroup holds the work of a job in a control group: it limits the whole process
// tree, measures it, and ends it to the last process. It speaks cgroup v1 and v2 by plain
// file I/O.
//
// Groups lie at specql/<parent>-<instance>/<id>, below the top of the mounted hierarchy
// where that is writable and below the runner's own group elsewhere. The instance part
// names the process that made the group, so that [RemoveLeftovers] finds what a crashed
// runner left behind and never touches a living one's.
package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Mode is the version of control groups in use.
type Mode int

// The modes.
const (
	// None: no usable control groups.
	None Mode = iota
	// V1: one hierarchy a controller.
	V1
	// V2: the unified hierarchy.
	V2
)

// String gives v1, v2 or none.
func (m Mode) String() string {
	switch m {
	case V1:
		return "v1"
	case V2:
		return "v2"
	case None:
	}
	return "none"
}

// Limits bound a group. Zero is no limit.
type Limits struct {
	// CPUCores is how many cores' worth of time the group may use, such as 0.5.
	CPUCores float64
	// MemoryMB is the memory in MiB, swap included.
	MemoryMB int64
	// Processes counts processes and threads.
	Processes int64
}

// Usage is what a group has used; a figure the kernel does not give is nil. Sizes are MiB.
type Usage struct {
	CPUSeconds   *float64
	MemoryMB     *float64
	PeakMemoryMB *float64
	// DiskReadMB and DiskWriteMB count block device traffic. On v1 a write that goes
	// through the page cache is counted for nobody, so DiskWriteMB is a lower bound there.
	DiskReadMB  *float64
	DiskWriteMB *float64
	// OOMKills is how many processes the kernel ended because the group's memory was full.
	OOMKills int
}

// ErrUnavailable is in the chain of the errors of a machine without usable control groups.
var ErrUnavailable = errors.New("control groups are not available")

const (
	topName = "specql"
	// killTimeout is how long Kill waits for killed processes to be gone. A process in
	// uninterruptible sleep can outlast it.
	killTimeout   = 10 * time.Second
	removeTimeout = 2 * time.Second
	cpuPeriod     = 100 * time.Millisecond
	minCPUQuota   = time.Millisecond
	mebibyte      = 1 << 20
)

// machine is found once: mounts and the process's instance do not change.
var machine = sync.OnceValue(func() *manager { return newManager("/proc") })

// Detect tells which control groups are usable here and, for [None], why none are.
func Detect() (Mode, string) {
	m := machine()
	return m.mode, m.reason
}

// New makes a group for one job. The parent names the kind of runner, such as shell; the id
// must be new for this process. A limit that cannot be set is an error.
func New(parent, id string, l Limits) (*Group, error) { return machine().newGroup(parent, id, l) }

// RemoveLeftovers ends and removes the groups of this parent name whose process is gone, and
// returns how many groups there were.
func RemoveLeftovers(parent string) (int, error) { return machine().removeLeftovers(parent) }

// Release removes the directory of this process's groups of a parent name once all of its
// groups are removed. Without it, the next runner's RemoveLeftovers does that.
func Release(parent string) error { return machine().release(parent) }

// Instance names this process for as long as the machine runs: three numbers with dashes
// between them. Other leftovers of a runner than its groups can be told apart by it, too.
func Instance() string { return machine().instance }

// InstanceGone tells whether the process of an [Instance] has ended. It is false where that
// cannot be told, as for a process of another PID name space.
func InstanceGone(instance string) bool { return machine().gone(instance) }

// Group is a control group of one job. Its methods are safe for concurrent use.
type Group struct {
	m    *manager
	path string // below each base, with no leading slash
	dirs []dir
	lims Limits
}

// dir is the group's directory in one hierarchy.
type dir struct {
	path        string
	controllers []string
}

func (d dir) has(controller string) bool { return slices.Contains(d.controllers, controller) }

func (m *manager) newGroup(parent, id string, l Limits) (*Group, error) {
	if m.mode == None {
		return nil, fmt.Errorf("%w: %s", ErrUnavailable, m.reason)
	}
	if err := checkName(parent); err != nil {
		return nil, fmt.Errorf("control group parent: %w", err)
	}
	if err := checkName(id); err != nil {
		return nil, fmt.Errorf("control group id: %w", err)
	}
	g := &Group{m: m, path: filepath.Join(topName, m.instanceName(parent), id), lims: l}
	for _, h := range m.used {
		d := dir{path: filepath.Join(h.base, g.path), controllers: h.controllers}
		err := m.mkdir(d.path)
		if errors.Is(err, fs.ErrNotExist) {
			if err = m.mkParents(h, filepath.Dir(g.path)); err == nil {
				err = m.mkdir(d.path)
			}
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("make control group: %w", err), g.undo())
		}
		g.dirs = append(g.dirs, d)
	}
	if err := g.limit(l); err != nil {
		return nil, errors.Join(err, g.undo())
	}
	return g, nil
}

// undo removes what was made of a group, and no group that was there before.
func (g *Group) undo() error {
	var errs []error
	for _, d := range g.dirs {
		errs = append(errs, g.m.removeTree(d.path))
	}
	return errors.Join(errs...)
}

// mkParents makes rel below the base of a hierarchy and, on v2, hands the controllers down.
func (m *manager) mkParents(h hierarchy, rel string) error {
	path := h.base
	if m.mode == V2 {
		if err := m.delegate(h, path); err != nil {
			return err
		}
	}
	for part := range strings.SplitSeq(rel, "/") {
		path = filepath.Join(path, part)
		if err := m.mkdir(path); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if m.mode == V2 {
			if err := m.delegate(h, path); err != nil {
				return err
			}
		}
	}
	return nil
}

func (g *Group) limit(l Limits) error {
	if g.m.mode == V2 {
		// One process killed for memory ends the job: a half-dead job has no result to trust.
		if err := ignoreMissing(g.set("memory", "memory.oom.group", "1")); err != nil && g.dirOf("memory") != "" {
			return fmt.Errorf("end the whole group when memory is full: %w", err)
		}
	}
	g.lims = Limits{}
	return g.SetLimits(l)
}

// SetLimits bounds the group anew. What is as it was costs nothing.
func (g *Group) SetLimits(l Limits) error {
	was := g.lims
	if l.MemoryMB != was.MemoryMB {
		if err := g.limitMemory(was.MemoryMB, l.MemoryMB); err != nil {
			return fmt.Errorf("limit memory to %d MiB: %w", l.MemoryMB, err)
		}
	}
	if l.CPUCores != was.CPUCores {
		if err := g.limitCPU(l.CPUCores); err != nil {
			return fmt.Errorf("limit CPU to %g cores: %w", l.CPUCores, err)
		}
	}
	if l.Processes != was.Processes {
		if err := g.SetProcesses(l.Processes); err != nil {
			return err
		}
	}
	g.lims = l
	return nil
}

func (g *Group) limitMemory(was, mb int64) error {
	bytes := strconv.FormatInt(min(mb, 1<<42)*mebibyte, 10)
	if g.m.mode == V2 {
		swap := "0"
		if mb == 0 {
			bytes, swap = "max", "max"
		}
		if err := g.set("memory", "memory.max", bytes); err != nil {
			return err
		}
		return ignoreMissing(g.set("memory", "memory.swap.max", swap))
	}
	if mb == 0 {
		bytes = "-1"
	}
	memory := func() error { return g.set("memory", "memory.limit_in_bytes", bytes) }
	both := func() error { return ignoreMissing(g.set("memory", "memory.memsw.limit_in_bytes", bytes)) }
	// At no time may the limit without swap be the larger one.
	if was != 0 && (mb == 0 || mb > was) {
		memory, both = both, memory
	}
	if err := memory(); err != nil {
		return err
	}
	return both()
}

func (g *Group) limitCPU(cores float64) error {
	period := strconv.FormatInt(cpuPeriod.Microseconds(), 10)
	quota := strconv.FormatInt(max(time.Duration(cores*float64(cpuPeriod)), minCPUQuota).Microseconds(), 10)
	if g.m.mode == V2 {
		if cores == 0 {
			quota = "max"
		}
		return g.set("cpu", "cpu.max", quota+" "+period)
	}
	if cores == 0 {
		quota = "-1"
	}
	if err := g.set("cpu", "cpu.cfs_period_us", period); err != nil {
		return err
	}
	return g.set("cpu", "cpu.cfs_quota_us", quota)
}

// SetProcesses bounds the processes and threads of the group anew; 0 is no bound.
func (g *Group) SetProcesses(n int64) error {
	most := strconv.FormatInt(n, 10)
	if n == 0 {
		most = "max"
	}
	if err := g.set("pids", "pids.max", most); err != nil {
		return fmt.Errorf("limit processes to %d: %w", n, err)
	}
	return nil
}

// Mode is the mode of the group: V1 or V2.
func (g *Group) Mode() Mode { return g.m.mode }

// Path is the group's path below the top of its hierarchies, such as
// /specql/shell-1-2-3/job. It is empty where the hierarchies place the group differently.
func (g *Group) Path() string {
	path := ""
	for i, h := range g.m.used {
		p := filepath.Join("/", h.prefix, g.path)
		if i > 0 && p != path {
			return ""
		}
		path = p
	}
	return path
}

// DockerParent is what to give an engine on the same host as CgroupParent, in the form of its
// cgroupfs driver. It is empty where there is no such path.
func (g *Group) DockerParent() string { return g.Path() }

// AddPID moves a process into the group, with all of its threads.
func (g *Group) AddPID(pid int) error {
	for _, d := range g.dirs {
		if err := write(filepath.Join(d.path, "cgroup.procs"), strconv.Itoa(pid)); err != nil {
			return fmt.Errorf("move process %d into control group: %w", pid, err)
		}
	}
	return nil
}

// PIDs are the processes in the group and in the groups below it, sorted. On v1 a process
// counts when any hierarchy still has it here.
func (g *Group) PIDs() ([]int, error) {
	var pids []int
	for _, d := range g.dirs {
		if err := eachGroup(d.path, func(path string) error {
			ids, err := readPIDs(filepath.Join(path, "cgroup.procs"))
			pids = append(pids, ids...)
			return err
		}); err != nil {
			return nil, fmt.Errorf("list processes of control group: %w", err)
		}
	}
	slices.Sort(pids)
	return slices.Compact(pids), nil
}

// Kill ends every process in the group, again and again until none is left, and returns when
// they are gone. New processes cannot be made meanwhile. The group stays.
func (g *Group) Kill() error {
	deadline := time.Now().Add(killTimeout)
	pause := 200 * time.Microsecond
	_ = g.set("pids", "pids.max", "0") // no matter where there is no such controller
	for {
		pids, err := g.PIDs()
		if err != nil {
			return err
		}
		// The runner itself can only be here by mistake; it must survive that.
		pids = slices.DeleteFunc(pids, func(pid int) bool { return pid == os.Getpid() })
		if len(pids) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v of control group %s outlive SIGKILL by %s", pids, g.path, killTimeout)
		}
		if !g.killAll() {
			for _, pid := range pids {
				_ = syscall.Kill(pid, syscall.SIGKILL) // gone already is as good
			}
		}
		<-time.After(pause)
		pause = min(2*pause, 20*time.Millisecond)
	}
}

// killAll uses the kernel's own kill of a whole group, v2 since Linux 5.14.
func (g *Group) killAll() bool {
	return g.m.mode == V2 && write(filepath.Join(g.dirs[0].path, "cgroup.kill"), "1") == nil
}

// Remove takes the group away with the groups below it. Its processes must be gone. Removing
// twice is no error.
func (g *Group) Remove() error {
	var errs []error
	// An engine that was given the group as a parent makes it in hierarchies that we do not use.
	for _, h := range g.m.all {
		errs = append(errs, g.m.removeTree(filepath.Join(h.base, g.path)))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove control group: %w", err)
	}
	return nil
}

func (m *manager) removeTree(path string) error {
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	deadline := time.Now().Add(removeTimeout)
	for {
		err := eachGroup(path, m.rmdir)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		// The last task leaves a little after its process is seen dead.
		if !errors.Is(err, syscall.EBUSY) || time.Now().After(deadline) {
			return err
		}
		<-time.After(time.Millisecond)
	}
}

// eachGroup calls fn for the groups below path, deepest first, and then for path. A group that
// goes away meanwhile is passed over.
func eachGroup(path string, fn func(path string) error) error {
	if hasNoneBelow(path) {
		return ignoreMissing(fn(path))
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return ignoreMissing(err)
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := eachGroup(filepath.Join(path, e.Name()), fn); err != nil {
				return err
			}
		}
	}
	return ignoreMissing(fn(path))
}

// hasNoneBelow tells whether a group is known to have none below it: the kernel counts the links of
// its directories, and two are the directory's own.
func hasNoneBelow(path string) bool {
	var st syscall.Stat_t
	return syscall.Stat(path, &st) == nil && st.Nlink == 2
}

func (g *Group) dirOf(controller string) string {
	for _, d := range g.dirs {
		if d.has(controller) {
			return d.path
		}
	}
	return ""
}

func (g *Group) set(controller, file, value string) error {
	path := g.dirOf(controller)
	if path == "" {
		return fmt.Errorf("%w: the %s controller is not enabled for %s", ErrUnavailable, controller, topName)
	}
	return write(filepath.Join(path, file), value)
}

// checkName keeps a name to one path element that cannot be mistaken for a file of the kernel.
func checkName(name string) error {
	if name == "" || len(name) > 128 || strings.HasPrefix(name, ".") {
		return fmt.Errorf("%q is not a name: 1 to 128 characters, the first not a dot", name)
	}
	for _, r := range name {
		if (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '_' && r != '.' {
			return fmt.Errorf("%q is not a name: letters, digits, dash, dot and underscore only", name)
		}
	}
	return nil
}

func write(path, value string) error {
	fd, err := openFile(path, syscall.O_WRONLY)
	if err != nil {
		return err
	}
	_, err = ignoringEINTR(func() (int, error) { return syscall.Write(fd, []byte(value)) })
	if err != nil {
		err = &fs.PathError{Op: "write", Path: path, Err: err}
	}
	return errors.Join(err, syscall.Close(fd))
}

func ignoreMissing(err error) error {
	// A file of a group that was just removed reads as ENODEV.
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) {
		return nil
	}
	return err
}
