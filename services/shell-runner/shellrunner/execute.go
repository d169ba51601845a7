package shellrunner

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/cgroup"
	"github.com/specql/mesh/pkg/telemetry"
	"github.com/specql/mesh/services/shell-runner/internal/sandbox"
)

const (
	firstSample  = 20 * time.Millisecond
	sampleEvery  = time.Second
	drainTimeout = time.Second // for pipes that an escaped process still holds
	maxTempFiles = 1 << 20
	maxWorkFiles = 20000
	// tempSlack is by how much the private temporary directory can pass its limit, so that a job
	// that needed more is told from one that has taken all.
	tempSlack = 4 << 10
	// softFiles and maxFiles are how many descriptors a process may have, at first and at most.
	softFiles = 1024
	maxFiles  = 65536
)

// Execute implements [runner.JobRunner].
func (r *Runner) Execute(ctx context.Context, job *runner.Job, sink runner.Sink) (*runner.Result, error) {
	a := &attempt{r: r, job: job, sink: sink, began: time.Now(), source: "rusage"}
	result := &runner.Result{}
	output, err := a.run(ctx)
	if err != nil {
		result.Err = fault.From(err)
	} else {
		result.Output = output
	}
	result.Usage = a.usage()
	result.Security = a.checks.Context(a.digest, a.isolation...)
	return result, nil
}

// attempt is one job while it runs.
type attempt struct {
	r         *Runner
	job       *runner.Job
	sink      runner.Sink
	began     time.Time
	source    string
	policy    effective
	digest    string
	checks    runner.Checks
	isolation []string

	group        *cgroup.Group // that of room
	room         *room
	private      string
	onDisk       bool // private is a directory of the machine, and not of a size of its own
	process      *process
	processStart uint64 // in the kernel's ticks
	dir          string // the command's working directory

	// What was measured.
	started, ended time.Time
	lastMemory     *float64
	total          *cgroup.Usage
	state          *sandbox.State
	exitCode       int
	tempFull       bool
}

// run carries the job out; whatever it started is gone when it returns.
func (a *attempt) run(ctx context.Context) (output []byte, err error) {
	telemetry.Enter(ctx, "policy")
	_, check := telemetry.Start(ctx, "policy check")
	plan, err := a.prepare(ctx)
	check.End()
	telemetry.Enter(ctx, "sandbox")
	if err != nil {
		return nil, err
	}
	// The command goes on with this span's trace.
	ctx, remote := telemetry.Start(ctx, "remote")
	defer remote.End()
	if limit := a.policy.Limits.TimeoutSeconds; limit > 0 {
		d := time.Duration(limit * float64(time.Second))
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, d, fault.New(fault.Timeout, "the attempt took longer than resource_limits.timeout_seconds of %gs", limit))
		defer cancel()
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err := a.makePrivate(); err != nil {
		return nil, err
	}
	defer a.removePrivate(ctx)
	env, err := environment(ctx, plan.config, a.job, plan.input, a.private)
	if err != nil {
		return nil, err
	}
	if err := checkSizes(plan.command.argv, env); err != nil {
		return nil, err
	}
	a.noteHolds()
	defer a.release()
	return a.supervise(ctx, &launch{
		command: plan.command, env: env, network: a.network(),
	}, plan.input)
}

// makePrivate chooses the place of the job's own directory. Where the sandbox gives it a size, it
// lies in memory and is gone with the job, and no more than its name is needed.
func (a *attempt) makePrivate() error {
	if a.r.box.contained() && a.policy.Limits.DiskMB > 0 {
		a.private = filepath.Join(a.r.temp, "job-"+strconv.FormatInt(a.r.names.Add(1), 10))
		return nil
	}
	var err error
	if a.private, err = os.MkdirTemp(a.r.temp, "job-"); err != nil {
		return fault.Wrap(err, fault.Internal, "the job's private directory cannot be made")
	}
	a.onDisk = true
	return nil
}

func (a *attempt) removePrivate(ctx context.Context) {
	if !a.onDisk {
		return
	}
	if err := removeAll(a.private); err != nil {
		a.r.log.ErrorContext(ctx, "a job's private directory remains", "error", err)
	}
}

// plan is a job that was checked.
type plan struct {
	config  Config
	command *command
	input   []byte
}

func (a *attempt) prepare(ctx context.Context) (*plan, error) {
	d, err := a.r.decode(a.job)
	a.policy, a.digest = d.effective, d.digest
	if err != nil {
		return nil, err
	}
	input, err := decodeInput(a.job.Input)
	if err != nil {
		return nil, err
	}
	raw := []byte(a.job.Input)
	if len(raw) == 0 {
		raw = []byte("{}")
	}
	resolver := &resolver{policy: d.policy, ceiling: a.r.ceiling, checks: &a.checks, scripts: a.r.scripts}
	cmd, err := resolver.resolve(d.config, a.job.Operation.Name, d.operation, input)
	if err != nil {
		a.r.log.DebugContext(ctx, "job refused", "error", err)
		return nil, err
	}
	if a.policy.Network == networkLocalhost && a.r.noLoop != nil {
		return nil, a.checks.Deny("network_access", networkLocalhost, fmt.Sprintf("this runner can give a command no loopback of its own (%v), and would have to give it the whole network; write none, or run the runner as root or with CAP_SYS_ADMIN", a.r.noLoop))
	}
	a.checks.Allow("network_access", a.policy.Network)
	a.checks.Allow("file_access", a.policy.Files)
	return &plan{config: d.config, command: cmd, input: raw}, nil
}

// launch says how a command is started and what holds it.
type launch struct {
	command               *command
	env                   []string
	stdin, stdout, stderr *os.File
	network               sandbox.Network
}

func (a *attempt) network() sandbox.Network {
	switch a.policy.Network {
	case networkAll:
		return sandbox.HostNetwork
	case networkLocalhost:
		return sandbox.OwnLoopback
	}
	return sandbox.NoNetwork
}

// at says where in the service an error is.
func at(place string, err error) error {
	f := fault.From(err)
	return &fault.Error{Code: f.Code, Message: place + ": " + f.Message, Retryable: f.Retryable, Cause: f}
}

// noteHolds notes what holds the job, and tells it of what does not.
func (a *attempt) noteHolds() {
	limits := a.policy.Limits
	for _, f := range a.r.found {
		switch {
		case !f.Available, f.Name == isolationCgroup: // said below
		case f.Name == sandbox.NetworkNamespace && a.network() == sandbox.HostNetwork:
		case f.Name == isolationDiskQuota && limits.DiskMB == 0:
		default:
			a.isolation = append(a.isolation, f.Name)
		}
	}
	if a.policy.Network == networkNone && a.r.noNet != nil && !a.r.box.holdsSockets() {
		a.sink.Log("runner", "network_access none is not enforced on this machine: "+a.r.noNet.Error())
	}
	if a.policy.Files != fileReadWrite && !a.r.box.holdsFiles() {
		a.sink.Log("runner", "file_access "+a.policy.Files+" is not enforced on this machine: it has neither name spaces nor Landlock")
	}
	if a.r.groups == cgroup.None {
		if limits.CPUCores > 0 {
			a.sink.Log("runner", "resource_limits.cpu_cores is not enforced on this machine: "+a.r.noGroup)
		}
		if text := a.r.unlimited(); text != "" {
			a.sink.Log("runner", text)
		}
		return
	}
	a.isolation = append(a.isolation, isolationCgroup)
}

// supervise starts the command, watches it to its end, and ends all that it started.
func (a *attempt) supervise(ctx context.Context, l *launch, input []byte) ([]byte, error) {
	stdout := newStream("stdout", a.sink, maxStdout, false)
	stderr := newStream("stderr", a.sink, keptStderr, true)
	pipes, err := openPipes(input)
	if err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, "the runner has no pipes left: %v", err)
	}
	l.stdin, l.stdout, l.stderr = pipes.stdinR, pipes.stdoutW, pipes.stderrW
	a.dir = cmp.Or(l.command.dir, a.private)
	a.processStart = ticks()
	a.started = time.Now()
	a.process, err = a.start(l)
	pipes.closeChild()
	if err != nil {
		pipes.closeOwn()
		return nil, a.startError(l, err)
	}
	for _, note := range a.process.notes {
		a.sink.Log("runner", note)
	}
	a.r.setLive(a, true)
	var io sync.WaitGroup
	if pipes.stdinW != nil {
		io.Add(1)
		go feed(pipes.stdinW, input, &io)
	}
	io.Add(2)
	go stdout.read(pipes.stdoutR, &io)
	go stderr.read(pipes.stderrR, &io)

	telemetry.Enter(ctx, "remote")
	failure := a.watch(ctx, stdout)
	telemetry.Enter(ctx, "cleanup")
	hits := 0
	if a.group != nil && !a.process.contained {
		hits = a.group.ProcessLimitHits() // the kill makes hits of its own
	}
	killErr := a.kill()
	if killErr == nil {
		<-a.process.exited
		a.state = a.process.wait()
		a.exitCode = exitCode(a.state)
		a.ended = time.Now()
	}
	a.r.setLive(a, false)
	// With every process gone the pipes have ended; one that escaped must not hold the job.
	_ = pipes.stdinW.SetDeadline(time.Now()) // where there is one
	_ = pipes.stdoutR.SetReadDeadline(time.Now().Add(drainTimeout))
	_ = pipes.stderrR.SetReadDeadline(time.Now().Add(drainTimeout))
	io.Wait()
	if killErr != nil {
		return nil, fault.Wrap(killErr, fault.Internal, "the job's processes cannot be ended: %v", killErr)
	}
	a.measure(ctx)
	if a.group != nil && a.process.contained && a.exitCode != 0 {
		hits = a.group.ProcessLimitHits()
	}
	return a.outcome(failure, stdout, stderr, hits)
}

// watch waits for the command's end, or for a reason to end it.
func (a *attempt) watch(ctx context.Context, stdout *stream) error {
	next := time.NewTimer(a.pause(firstSample))
	defer next.Stop()
	for every := firstSample; ; {
		select {
		case <-a.process.exited:
			select {
			case <-stdout.over:
				return tooMuchOutput()
			default:
				return nil
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-stdout.over:
			return tooMuchOutput()
		case <-next.C:
			if err := a.sample(every == sampleEvery); err != nil {
				return err
			}
			every = min(10*every, sampleEvery)
			next.Reset(a.pause(every))
		}
	}
}

func tooMuchOutput() error {
	return fault.New(fault.ResourceExceeded, "the command wrote more than %d MiB to stdout; write less, or to a file", maxStdout>>20)
}

// pause is how long to wait for the next sample: no longer than it can take to use up the CPU
// time that is left.
func (a *attempt) pause(want time.Duration) time.Duration {
	limit := a.policy.Limits.CPUSeconds
	if limit == 0 || a.total == nil || a.total.CPUSeconds == nil {
		return want
	}
	cores := float64(cpus())
	if c := a.policy.Limits.CPUCores; c > 0 {
		cores = min(cores, max(c, 0.01))
	}
	left := time.Duration((limit - *a.total.CPUSeconds) / cores * float64(time.Second))
	return min(want, max(left, 10*time.Millisecond))
}

// sample measures the running job, reports it, and tells whether a limit is passed.
func (a *attempt) sample(report bool) error {
	_, _ = a.r.reapOrphans() // a long job may leave many
	if limit := a.policy.Limits.DiskMB; limit > 0 && report && a.tempSize() > limit<<20 {
		a.tempFull = true
		return a.diskError()
	}
	if a.group == nil {
		return nil
	}
	u, err := a.group.Stat()
	if err != nil {
		return nil
	}
	a.total, a.lastMemory = &u, u.MemoryMB
	if u.OOMKills > 0 {
		return a.memoryError() // what is left of the job has no result to trust
	}
	if limit := a.policy.Limits.CPUSeconds; limit > 0 && u.CPUSeconds != nil && *u.CPUSeconds >= limit {
		return a.cpuError()
	}
	if report {
		a.sink.Usage(a.usage())
	}
	return nil
}

// measure takes the last figures, when all processes are gone.
func (a *attempt) measure(ctx context.Context) {
	if a.group == nil {
		return
	}
	u, err := a.group.Stat()
	if err != nil {
		a.r.log.WarnContext(ctx, "a job could not be measured", "error", err)
		return
	}
	a.total = &u
}

// outcome is the job's output or error.
func (a *attempt) outcome(failure error, stdout, stderr *stream, processHits int) ([]byte, error) {
	if a.total != nil && a.total.OOMKills > 0 {
		return nil, a.memoryError()
	}
	if failure != nil {
		return nil, failure
	}
	status := a.state.Status
	if status.Signaled() {
		switch status.Signal() {
		case syscall.SIGXCPU:
			return nil, a.cpuError()
		case syscall.SIGXFSZ:
			return nil, a.diskError()
		default:
			if a.outOfCPU() {
				return nil, a.cpuError()
			}
			return nil, remoteError(fmt.Sprintf("the command was ended by signal %d (%s)", status.Signal(), status.Signal()), stderr)
		}
	}
	if a.exitCode != 0 && a.outOfCPU() {
		return nil, a.cpuError()
	}
	if limit := a.policy.Limits.DiskMB; limit > 0 && (a.tempSize() > limit<<20 || a.cutFile()) {
		return nil, a.diskError()
	}
	if a.exitCode != 0 {
		if processHits > 0 {
			limit := a.policy.Limits.Processes
			return nil, a.exceeded("processes", fmt.Sprintf("more than %d processes", limit), float64(limit), func(l Limits) float64 { return float64(l.Processes) },
				"the job needed more processes than its limit of %d, and exited with status %d: %s; raise resource_limits.processes",
				limit, a.exitCode, end(stderr.bytes()))
		}
		message := fmt.Sprintf("the command exited with status %d", a.exitCode)
		if a.exitCode == exitNotExecutable {
			message += " (by which shells say that a program may not be executed: what the command itself executes must be in allowed_commands, too)"
		}
		return nil, remoteError(message, stderr)
	}
	raw, err := result(stdout.bytes(), stderr.bytes(), a.exitCode)
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, "the output has no JSON form")
	}
	return raw, nil
}

// outOfCPU tells whether a command without a control group used its CPU time up, and ended by
// another signal than that which says so, or by a status of its own.
func (a *attempt) outOfCPU() bool {
	limit := a.policy.Limits.CPUSeconds
	return limit > 0 && a.group == nil && (a.state.User+a.state.System).Seconds() >= limit
}

// exitNotExecutable is the status of a shell that may not execute a program.
const exitNotExecutable = 126

func remoteError(message string, stderr *stream) error {
	if tail := end(stderr.bytes()); tail != "" {
		message += ": " + tail
	}
	return fault.New(fault.RemoteError, "%s", message)
}

// exceeded notes which limit a job has passed, and gives the error.
func (a *attempt) exceeded(key, tried string, limit float64, of func(Limits) float64, format string, args ...any) error {
	key = "resource_limits." + key
	var changes []*runnerv1.PolicyChange
	// Of a limit that neither policy says the service's own can be raised.
	if n := of(a.policy.Policy.ResourceLimits); n == limit || a.r.ceiling == nil || of(a.r.ceiling.ResourceLimits) != limit {
		changes = append(changes, runner.RaiseAbove(false, key, limit))
	}
	if a.r.ceiling != nil && of(a.r.ceiling.ResourceLimits) == limit {
		changes = append(changes, runner.RaiseAbove(true, key, limit))
	}
	err := fault.New(fault.ResourceExceeded, format, args...)
	a.checks.DenyOnce(key, tried, err.Message, changes...)
	return err
}

func (a *attempt) memoryError() error {
	peak := ""
	if a.total != nil && a.total.PeakMemoryMB != nil {
		peak = fmt.Sprintf(" (peak %.1f MiB)", *a.total.PeakMemoryMB)
	}
	if limit := a.policy.Limits.MemoryMB; limit > 0 {
		return a.exceeded("memory_mb", fmt.Sprintf("more than %d MiB%s", limit, peak), float64(limit), func(l Limits) float64 { return float64(l.MemoryMB) },
			"the job needed more memory than its limit of %d MiB%s and the kernel ended it; raise resource_limits.memory_mb", limit, peak)
	}
	return fault.New(fault.ResourceExceeded, "the machine ran out of memory%s and the kernel ended the job; set resource_limits.memory_mb to what the machine has for it", peak)
}

func (a *attempt) cpuError() error {
	used := ""
	if a.total != nil && a.total.CPUSeconds != nil {
		used = fmt.Sprintf(" (used %.2f s)", *a.total.CPUSeconds)
	}
	limit := a.policy.Limits.CPUSeconds
	return a.exceeded("cpu_seconds", fmt.Sprintf("more than %g s%s", limit, used), limit, func(l Limits) float64 { return l.CPUSeconds },
		"the job needed more CPU time than its limit of %g s%s; raise resource_limits.cpu_seconds", limit, used)
}

func (a *attempt) diskError() error {
	limit := a.policy.Limits.DiskMB
	return a.exceeded("disk_mb", fmt.Sprintf("more than %d MiB", limit), float64(limit), func(l Limits) float64 { return float64(l.DiskMB) },
		"the job wrote more than its limit of %d MiB to a file or to its temporary directory; raise resource_limits.disk_mb", limit)
}

// startError says why a command could not be started.
func (a *attempt) startError(l *launch, err error) error {
	if f, ok := errors.AsType[*fault.Error](err); ok {
		return f
	}
	path := l.command.path
	switch {
	case errors.Is(err, syscall.ENOENT):
		return fault.Wrap(err, fault.Validation, "%s cannot be run: it, its interpreter or the working directory does not exist", path)
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.ENOTDIR):
		return fault.Wrap(err, fault.Validation, "%s cannot be run: permission denied", path)
	case errors.Is(err, syscall.ENOEXEC):
		return fault.Wrap(err, fault.Validation, "%s cannot be run: it is neither a program of this machine nor a script with a #! line", path)
	case errors.Is(err, syscall.E2BIG):
		return fault.Wrap(err, fault.Validation, "%s cannot be run: arguments and environment are too long; read the values from stdin", path)
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, syscall.ENOMEM):
		return fault.Wrap(err, fault.ResourceExceeded, "%s cannot be started within its limits (%v); raise resource_limits", path, err)
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		return fault.Wrap(err, fault.Unavailable, "the runner has no file descriptors left")
	}
	return fault.Wrap(err, fault.Internal, "%s cannot be started: %v", path, err)
}

// usage gives what is measured so far.
func (a *attempt) usage() *runnerv1.ResourceUsage {
	now := time.Now()
	u := &runnerv1.ResourceUsage{DurationSeconds: new(now.Sub(a.began).Seconds()), Source: a.source}
	if a.started.IsZero() || a.process == nil {
		return u
	}
	if a.total != nil {
		u.CpuSeconds, u.PeakMemoryMb = a.total.CPUSeconds, a.total.PeakMemoryMB
		u.DiskReadMb, u.DiskWriteMb = a.total.DiskReadMB, a.total.DiskWriteMB
		u.MemoryMb = a.lastMemory
	}
	if a.state != nil {
		u.ExitCode = new(int32(a.exitCode)) //nolint:gosec // below 256
		if a.total != nil {
			u.OomKilled = new(a.total.OOMKills > 0)
		}
		a.addRusage(u)
	}
	wall := now.Sub(a.started)
	if !a.ended.IsZero() {
		wall = a.ended.Sub(a.started)
	}
	if u.CpuSeconds != nil && wall > 0 {
		u.CpuUsagePercent = new(u.GetCpuSeconds() / wall.Seconds() * 100)
	}
	return u
}

// addRusage completes the figures by what the kernel tells of the command and of those of its
// children that it waited for.
func (a *attempt) addRusage(u *runnerv1.ResourceUsage) {
	const mebibyte = 1 << 20
	s := a.state
	read, written := float64(s.Inblock)*512/mebibyte, float64(s.Oublock)*512/mebibyte
	if a.group == nil {
		u.CpuSeconds = new((s.User + s.System).Seconds())
		u.DiskReadMb, u.DiskWriteMb = new(read), new(written)
		if s.PeakKB > 0 {
			u.PeakMemoryMb = new(float64(s.PeakKB) / 1024)
		}
		return
	}
	if a.group.Mode() == cgroup.V1 && u.DiskWriteMb != nil && written > u.GetDiskWriteMb() {
		u.DiskWriteMb = new(written) // v1 does not count what goes through the page cache
	}
}

func exitCode(state *sandbox.State) int {
	if state.Status.Signaled() {
		return 128 + int(state.Status.Signal())
	}
	return state.Status.ExitStatus()
}

// cutSize is where the kernel cuts a file off: one byte above the limit, so that a file as
// large as the limit is told from one that was cut.
func cutSize(diskMB int64) int64 { return diskMB<<20 + 1 }

// cutFile tells whether the kernel cut a file of the job off: the signal that says so goes to
// the process that wrote, whose end is not always told to the runner. Files elsewhere than in
// the private and the working directory are not found, nor any beyond the first 20000.
func (a *attempt) cutFile() bool {
	size, cut := cutSize(a.policy.Limits.DiskMB), false
	since := a.started.Add(-20 * time.Millisecond) // the kernel's clock for files is coarse
	for _, dir := range slices.Compact([]string{a.private, a.dir}) {
		files := 0
		_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
			if files++; files > maxWorkFiles || cut {
				return fs.SkipAll
			}
			if err != nil || !d.Type().IsRegular() {
				return nil
			}
			info, err := d.Info()
			cut = err == nil && info.Size() == size && info.ModTime().After(since)
			return nil
		})
	}
	return cut
}

// tempSize is what the private directory takes, in bytes.
func (a *attempt) tempSize() int64 {
	if a.process.contained {
		if a.state != nil {
			return a.state.TempUsed
		}
		used, _ := a.process.tempUsed()
		return used
	}
	var total int64
	files := 0
	_ = filepath.WalkDir(a.private, func(_ string, d fs.DirEntry, err error) error {
		if files++; files > maxTempFiles {
			return fs.SkipAll
		}
		if err != nil {
			return nil
		}
		if info, err := d.Info(); err == nil {
			if st, ok := info.Sys().(*syscall.Stat_t); ok {
				total += st.Blocks * 512
			}
		}
		return nil
	})
	return total
}
