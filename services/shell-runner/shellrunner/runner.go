// Package shellrunner runs allowed commands and scripts on the runner's own machine: by
// argument list and never through a shell, in a clean environment, held and measured by a
// control group where there are any, with nothing left of the process tree at the end.
package shellrunner

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/cgroup"
	"github.com/specql/mesh/services/shell-runner/internal/sandbox"
)

// Type is the execution type that this runner serves.
const Type = "shell"

const (
	groupParent = "shell"
	tempPrefix  = "specql-shell-"
	// mostTidying is how many jobs may be over and answered while the kernel still takes down
	// what held them. Beyond it a job waits for its own.
	mostTidying = 64
)

// Options configure a [Runner].
type Options struct {
	// Ceiling is the operator's policy; nil for none. A list that it leaves out narrows nothing.
	Ceiling *Policy
	Logger  *slog.Logger
	// TempDir is where the private directories of jobs lie; empty for the system's own place.
	TempDir string
	// ReapOrphans takes the status of any ended process that this process is the parent of and
	// did not start, and not of those of jobs alone. It is for a runner that is the first process of a container, and only for
	// a program that starts no processes of its own.
	ReapOrphans bool
	// UIDBase is the first of the 65536 users that jobs become where the runner is root; 0 for
	// 1879100000. Runners of one machine should have different ones.
	UIDBase int
	// RequireIsolation names ways of holding a job without which [New] fails, as Describe names
	// them; "all" stands for every one.
	RequireIsolation []string

	without []string // ways of holding a job that a test leaves away
}

// Runner runs shell jobs. It implements [runner.JobRunner].
type Runner struct {
	ceiling *Policy
	log     *slog.Logger
	temp    string // of this runner alone
	reap    bool
	scripts []interpreter
	groups  cgroup.Mode
	noGroup string // why there are no control groups
	noNet   error  // why commands cannot be given a network of their own
	noLoop  error  // why they cannot be given a loopback of their own
	box     *holder
	found   []runner.Feature // features, which do not change
	names   atomic.Int64     // of private directories that are none of the machine's
	// types never change.
	types []runner.Type

	texts texts

	mu   sync.Mutex
	live map[*attempt]bool // those with a process

	reaping sync.Mutex

	groupsMade atomic.Int64
	lastLimits atomic.Pointer[cgroup.Limits]
	// tidying is what is done behind answers, places bounds how much.
	tidying sync.WaitGroup
	places  chan struct{}
}

// background does something behind the answer of a job, unless too much is done there already.
func (r *Runner) background(f func()) {
	select {
	case r.places <- struct{}{}:
	default:
		f()
		return
	}
	r.tidying.Go(func() {
		defer func() { <-r.places }()
		f()
	})
}

// New makes a runner and removes what crashed runners left on this machine. [Runner.Close]
// removes its own directory.
//
// The process becomes the one that orphans are handed to (PR_SET_CHILD_SUBREAPER) and
// shuts other processes of its user out (PR_SET_DUMPABLE), debuggers without CAP_SYS_PTRACE among
// them. Both stay.
func New(o Options) (*Runner, error) {
	if o.Ceiling != nil {
		if problem := o.Ceiling.ResourceLimits.check(); problem != "" {
			return nil, fmt.Errorf("the operator's policy: %s", problem)
		}
	}
	r := &Runner{
		ceiling: o.Ceiling, log: o.Logger, reap: o.ReapOrphans, scripts: interpreters(), live: map[*attempt]bool{}, places: make(chan struct{}, mostTidying),
		types: []runner.Type{{
			Name: Type, ConfigSchema: runner.SchemaOf[Config](), PolicySchema: runner.SchemaOf[Policy](), OperationSchema: runner.SchemaOf[Operation](),
		}},
	}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	r.groups, r.noGroup = cgroup.Detect()
	if slices.Contains(o.without, isolationCgroup) {
		r.groups, r.noGroup = cgroup.None, "it is not wanted"
	}
	if r.groups == cgroup.None {
		r.log.Warn("no control groups: limits hold by process and less is measured", "reason", r.noGroup)
	}
	if err := hideMemory(); err != nil {
		return nil, err
	}
	if err := adoptOrphans(); err != nil {
		return nil, err
	}
	if o.TempDir == "" {
		o.TempDir = os.TempDir()
	}
	r.removeLeftovers(o.TempDir)
	var err error
	if r.temp, err = os.MkdirTemp(o.TempDir, tempPrefix+cgroup.Instance()+"-"); err != nil {
		return nil, fmt.Errorf("make the directory for jobs: %w", err)
	}
	o.Logger = r.log
	if r.box, err = newHolder(r, o); err != nil {
		return nil, errors.Join(err, removeAll(r.temp), cgroup.Release(groupParent))
	}
	r.noNet, r.noLoop = r.box.networkMissing()
	r.found = r.features()
	if err := runner.Require(r.found, o.RequireIsolation); err != nil {
		r.box.close()
		return nil, errors.Join(err, removeAll(r.temp), cgroup.Release(groupParent))
	}
	return r, nil
}

// removeLeftovers ends and removes what runners left that were killed.
func (r *Runner) removeLeftovers(temp string) {
	n, err := cgroup.RemoveLeftovers(groupParent)
	if err != nil {
		r.log.Warn("control groups of a crashed runner remain", "error", err)
	}
	if n > 0 {
		r.log.Info("ended jobs of a crashed runner", "jobs", n)
	}
	entries, err := os.ReadDir(temp)
	if err != nil {
		return // making our own directory says why
	}
	for _, e := range entries {
		name, ok := strings.CutPrefix(e.Name(), tempPrefix)
		at := strings.LastIndexByte(name, '-')
		if !ok || at < 0 || !e.IsDir() || !cgroup.InstanceGone(name[:at]) {
			continue
		}
		if err := removeAll(filepath.Join(temp, e.Name())); err != nil {
			r.log.Warn("a directory of a crashed runner remains", "error", err)
		}
	}
}

// Close removes what the runner keeps on the machine. Jobs must have ended.
func (r *Runner) Close() error {
	r.tidying.Wait()
	r.box.close()
	err := errors.Join(removeAll(r.temp), cgroup.Release(groupParent))
	if err != nil {
		return fmt.Errorf("close the shell runner: %w", err)
	}
	return nil
}

// Describe implements [runner.JobRunner].
func (r *Runner) Describe(context.Context) (*runner.Description, error) {
	return &runner.Description{Name: "shell-runner", Types: r.types, Isolation: r.found}, nil
}

// features are the ways of holding a job, those that are missing here among them.
func (r *Runner) features() []runner.Feature {
	groups := r.noGroup
	if r.groups != cgroup.None {
		groups = r.groups.String()
	}
	features := []runner.Feature{
		{Name: isolationProcessGroup, Available: true},
		{Name: isolationPrivateTemp, Available: true},
		{Name: isolationRlimit, Available: true, Detail: r.unlimited()},
		{Name: isolationCgroup, Available: r.groups != cgroup.None, Detail: groups},
	}
	quota := runner.Feature{Name: isolationDiskQuota, Available: r.box.contained()}
	if !quota.Available {
		quota.Detail = "without a mount name space, the size of the private temporary directory is looked at once a second and at the end"
	}
	features = append(features, quota)
	for _, f := range r.box.features() {
		if f.Name == sandbox.NetworkNamespace && r.noNet != nil {
			f.Available = false
		}
		features = append(features, runner.Feature{Name: f.Name, Available: f.Available, Detail: f.Detail})
	}
	return features
}

// The names of what holds a job, besides those of the sandbox.
const (
	isolationProcessGroup = "process_group"
	isolationPrivateTemp  = "private_tmp"
	isolationRlimit       = "rlimit"
	isolationCgroup       = "cgroup"
	isolationDiskQuota    = "disk_quota"
)

// unlimited says which limit holds for nobody here; empty if all hold.
func (r *Runner) unlimited() string {
	if r.groups == cgroup.None && !r.box.contained() && os.Getuid() == 0 {
		return "resource_limits.processes is not enforced: without control groups and name spaces the kernel does not bind root's processes"
	}
	return ""
}

// own tells whether someone waits for a process's status.
func (r *Runner) own(pid int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for a := range r.live {
		if a.process.pid == pid {
			return true
		}
	}
	return false
}

func (r *Runner) setLive(a *attempt, live bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if live {
		r.live[a] = true
	} else {
		delete(r.live, a)
	}
}
