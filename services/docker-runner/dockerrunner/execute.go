package dockerrunner

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/cgroup"
	"github.com/specql/mesh/pkg/telemetry"
)

const (
	// endTimeout bounds the wait for a killed container's end.
	endTimeout = 20 * time.Second
	// drainTimeout bounds the wait for the last output of a container that has ended.
	drainTimeout = 5 * time.Second
)

// attempt is one job's run.
type attempt struct {
	r        *Runner
	job      *runner.Job
	sink     runner.Sink
	prepared *Prepared
	input    json.RawMessage
	cfg      Config
	op       Operation
	policies *policies
	checks   *runner.Checks
	limits   ResourceLimits
	name     imageName
	// network as the engine knows it.
	network string

	room
	held   []string // mount points of the volumes
	labels map[string]string
	meter  meter
	// replenish has what was created ahead and used made anew; nil where nothing is to be.
	replenish func()

	imageID   string
	exitCode  *int32
	oomKilled *bool
	isolation []string
}

// room is what a container has of the runner's own: where it is measured, and where it leaves its output.
type room struct {
	group  *cgroup.Group // nil: none
	output outputPlace
}

// remove takes it away. The container is gone by now.
func (r *room) remove() error {
	err := r.output.dir.remove()
	if r.group != nil {
		err = errors.Join(err, r.group.Remove())
	}
	return err
}

// Execute implements [runner.JobRunner].
func (r *Runner) Execute(ctx context.Context, job *runner.Job, sink runner.Sink) (*runner.Result, error) {
	began := time.Now()
	a := &attempt{r: r, job: job, sink: sink, checks: &runner.Checks{}, meter: meter{oom: make(chan struct{})}}
	result := &runner.Result{}
	result.Output, result.Err = a.run(ctx)
	a.settle(result.Err)
	result.Usage = a.usage()
	result.Usage.DurationSeconds = new(time.Since(began).Seconds())
	var digest string
	if a.policies != nil {
		digest = a.policies.digest()
	}
	result.Security = a.checks.Context(digest, a.isolation...)
	if result.Err != nil {
		result.Output = nil
	}
	return result, nil
}

// run carries the job out. Nothing that it made is left when it returns.
func (a *attempt) run(ctx context.Context) (json.RawMessage, error) {
	telemetry.Enter(ctx, "policy")
	_, check := telemetry.Start(ctx, "policy check")
	err := a.configure()
	check.End()
	if err != nil {
		return nil, err
	}
	return a.prepared.Run(ctx, a.runBounded)
}

// configure reads the configuration and checks what can be checked without an engine.
func (a *attempt) configure() error {
	p, err := prepare(a.job, a.r.ceiling, a.r.denied(), a.checks)
	a.prepared, a.cfg, a.op, a.limits, a.name, a.policies, a.input = p, p.Config, p.Operation, p.Limits, p.name, p.policies, p.Input
	a.network = a.cfg.network()
	return err
}

// at says where an error of the configuration is.
func at(place string, err error) error {
	f := *fault.From(err)
	f.Message = place + ": " + f.Message
	return &f
}

func (a *attempt) runBounded(ctx context.Context) (json.RawMessage, error) {
	if err := a.r.allowed(); err != nil {
		return nil, err
	}
	telemetry.Enter(ctx, "image")
	img, err := a.r.resolveImage(ctx, a.name, &a.cfg, a.sink)
	if err != nil {
		return nil, err
	}
	if err := a.policies.imageContent(a.name, img.id, img.digests); err != nil {
		return nil, err
	}
	telemetry.Enter(ctx, "sandbox")
	e, err := a.r.inspectEngine(ctx, img.id)
	if err != nil {
		return nil, err
	}
	if err := a.r.stillHeld(e); err != nil {
		return nil, err
	}
	if err := a.policies.enforceable(e); err != nil {
		return nil, err
	}
	a.policies.denied = a.r.denied() // the engine's own directory is known now
	mounts, err := a.policies.volumes(a.cfg.Volumes, e.reach())
	if err != nil {
		return nil, err
	}
	defer closeMounts(mounts)
	if err := a.resolveNetwork(ctx); err != nil {
		return nil, err
	}
	defer a.release()
	// The container goes on with this span's trace.
	ctx, remote := telemetry.Start(ctx, "remote")
	defer remote.End()
	if a.cfg.CreatedAhead > 0 {
		output, err := a.runAhead(ctx, e, img)
		if !errors.Is(err, errNoSpare) {
			return output, err
		}
	}
	if err := a.acquire(e, mounts); err != nil {
		return nil, err
	}
	deadline, _ := ctx.Deadline()
	a.labels = a.r.owner.labels(a.job.ID, deadline)
	spec, err := a.spec(ctx, e, img, mounts)
	if err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	id, err := a.createContainer(ctx, spec)
	if err != nil {
		return nil, err
	}
	return a.runContainer(ctx, id, e, img, a.verify)
}

// resolveNetwork finds the network that a name stands for, and runs on that very one.
func (a *attempt) resolveNetwork(ctx context.Context) error {
	if a.network == networkNone || a.network == networkBridge {
		return nil
	}
	found, err := a.r.client.NetworkInspect(ctx, a.network, client.NetworkInspectOptions{})
	if err != nil {
		f := engineFault(err, "look up the network "+clip(a.network))
		if f.Code == fault.Validation {
			f = fault.Wrap(err, fault.Validation, "the engine has no network %q; make it with docker network create, or correct network_mode", clip(a.network))
		}
		return f
	}
	if found.Network.Driver == "host" {
		return a.checks.Deny("network_mode", a.network, "the host's network namespace is never shared with a container")
	}
	if found.Network.Name != a.network {
		// An ID, or the beginning of one, would pass by the list of names.
		return a.checks.Deny("allowed_networks", a.network, fmt.Sprintf("write the network's name, %q", found.Network.Name))
	}
	a.network = found.Network.ID
	return nil
}

// acquire makes the directory, the mounts and the control group of the job.
func (a *attempt) acquire(e *engine, mounts []hostMount) error {
	if err := a.hold(mounts); err != nil {
		return err
	}
	if a.output.volume = !e.quota; e.quota {
		quota := int64(defaultOutputQuota)
		if a.limits.DiskMB > 0 {
			quota = min(quota, bytesOf(a.limits.DiskMB))
		}
		var err error
		if a.output.dir, err = a.r.state.newDir(quota); err != nil {
			return fault.Wrap(err, fault.Unavailable, "the runner cannot make a directory for output: %v", err)
		}
	}
	if !a.r.groups(e) {
		return nil
	}
	group, err := cgroup.New(groupParent, randomName(), cgroup.Limits{})
	if err != nil {
		a.r.log.Warn("no control group for a job; the stats API measures it", slogError(err))
		return nil
	}
	if group.DockerParent() == "" {
		return group.Remove()
	}
	a.group = group
	return nil
}

// hold binds the volumes that were checked to paths of the runner's own. The engine resolves
// a path once more when it starts a container, and what lies below a directory that another
// container may write can be another thing by then.
func (a *attempt) hold(mounts []hostMount) error {
	for i := range mounts {
		m := &mounts[i]
		if m.file == nil {
			continue
		}
		place, err := a.r.state.hold(m.file, m.readOnly)
		if err != nil {
			return fault.Wrap(err, fault.Unavailable, "the runner cannot hold the volume %s: %v", clip(m.source), err)
		}
		a.held = append(a.held, place)
		if err := a.policies.mountsIn(place, m.source); err != nil {
			return err
		}
		m.source = place
	}
	return nil
}

// release takes away what acquire made. The container is gone by now.
func (a *attempt) release() {
	var errs []error
	for _, place := range a.held {
		errs = append(errs, letGo(place))
	}
	if a.meter.group != nil && !a.meter.freeze() && !a.r.cgroupsMissing.Swap(true) {
		a.r.log.Warn("the engine does not put containers into the runner's control groups; the stats API measures them")
	}
	errs = append(errs, a.remove())
	if err := errors.Join(errs...); err != nil {
		// The work is done and the sweep tries again: no reason to fail the job.
		a.r.log.Warn("clean up after a job", slogError(err))
	}
}

func (a *attempt) createContainer(ctx context.Context, spec client.ContainerCreateOptions) (string, error) {
	id, err := a.r.create(ctx, spec)
	if err != nil && spec.HostConfig.StorageOpt != nil && strings.Contains(strings.ToLower(err.Error()), "storage") {
		a.r.storageMissing.Store(true)
		spec.HostConfig.StorageOpt = nil
		id, err = a.r.create(ctx, spec)
	}
	if err != nil {
		return "", engineFault(err, "make the container")
	}
	return id, nil
}

// isolate notes what holds the container.
func (a *attempt) isolate(e *engine) {
	a.isolation = []string{"container", "capabilities_dropped", "no_new_privileges", "private_namespaces"}
	add := func(name string, held bool) {
		if held {
			a.isolation = append(a.isolation, name)
		}
	}
	for _, f := range a.r.held(e) {
		add(f.Name, f.Available)
	}
	add("read_only_root", a.cfg.readOnly())
	add("no_network", a.network == networkNone)
	add("memory_limit", a.limits.MemoryMB > 0)
	add("cpu_limit", a.limits.CPUCores > 0)
	add("disk_limit", a.limits.DiskMB > 0 && !a.output.volume && (a.cfg.readOnly() || !a.r.storageMissing.Load()))
	add("cgroup", a.group != nil)
	add("held_volumes", len(a.held) > 0)
}

// verify looks whether a container that was created is safe to start.
func (a *attempt) verify(ctx context.Context, id string, img image) error {
	if err := a.verifyMounts(ctx, id, img); err != nil {
		return err
	}
	return a.verifyAccounts(ctx, id, img)
}

// runContainer runs a container that was created, to its end, and removes it. The check is what it has still to pass.
func (a *attempt) runContainer(ctx context.Context, id string, e *engine, img image, check func(context.Context, string, image) error) (_ json.RawMessage, err error) {
	a.imageID = img.id
	a.meter.group, a.meter.buffered = a.group, e.info.CgroupVersion != "2"
	a.isolate(e)
	if !a.cfg.readOnly() && a.limits.DiskMB > 0 && a.r.storageMissing.Load() {
		a.sink.Log("runner", "the engine's storage driver cannot bound the root file system: disk_mb holds for single files and in-memory directories alone")
	}
	removed := false
	remove := func() error {
		if removed {
			return nil
		}
		removed = true
		if err := a.r.removeContainer(ctx, id); err != nil {
			return &LeftError{Err: err}
		}
		return nil
	}
	defer func() {
		if failed := remove(); failed != nil {
			err = failed
		}
	}()
	if err := check(ctx, id, img); err != nil {
		return nil, err
	}
	job, err := a.described(ctx)
	if err != nil {
		return nil, err
	}
	if err := a.output.prime(ctx, a.r.client, id, job); err != nil {
		return nil, a.r.notThere(ctx, id, err)
	}
	stdout, stderr := newHead(), &tail{}
	telemetry.Enter(ctx, "remote")
	state, err := a.follow(ctx, id, stdout, stderr)
	telemetry.Enter(ctx, "cleanup")
	if err != nil {
		return nil, err
	}
	var file []byte
	if a.output.volume && state.ExitCode == 0 {
		if file, err = a.output.fromVolume(ctx, a.r.client, id); err != nil {
			return nil, err
		}
	}
	if err := remove(); err != nil {
		return nil, err
	}
	if err := a.verdict(state, stderr); err != nil {
		return nil, err
	}
	if !a.output.volume {
		if file, err = a.output.fromDir(); err != nil {
			return nil, err
		}
	}
	if len(bytes.TrimSpace(file)) > 0 {
		return fileOutput(file)
	}
	return streamOutput(stdout.bytes(), stderr.last(maxErrorTail), state.ExitCode)
}

// follow starts the container, feeds it, passes on what it writes and waits for its end. A
// container that must end is killed.
func (a *attempt) follow(ctx context.Context, id string, stdout *head, stderr *tail) (*container.State, error) {
	cli := a.r.client
	detached, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	conn, err := cli.ContainerAttach(ctx, id, client.ContainerAttachOptions{Stream: true, Stdin: true, Stdout: true, Stderr: true})
	if err != nil {
		return nil, engineFault(a.r.notThere(ctx, id, err), "attach to the container")
	}
	defer conn.Close()
	ended := wait(detached, cli, id)
	a.meter.start()
	if _, err := cli.ContainerStart(ctx, id, client.ContainerStartOptions{}); err != nil {
		return nil, startFault(err)
	}
	fed := make(chan struct{})
	go func() {
		defer close(fed)
		feed(&conn, a.input)
	}()
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		a.drain(conn.Reader, stdout, stderr)
	}()
	sampled := a.sample(detached, cli, id)

	var failed error
	over := false
	select {
	case <-a.meter.oom:
		over = true
	case <-ctx.Done():
		failed = context.Cause(ctx)
	case <-stdout.full:
		failed = fault.New(fault.ResourceExceeded, "the container wrote more than the %d MiB to stdout that an output may have; write large results to a volume and give their place", maxOutput>>20)
	case end := <-ended:
		ended <- end
	}
	if over = over || failed != nil; over {
		quick, cancel := context.WithTimeout(detached, engineTimeout)
		defer cancel()
		if _, err := cli.ContainerKill(quick, id, client.ContainerKillOptions{Signal: "KILL"}); err != nil {
			a.r.log.Debug("kill a container", slogError(err)) // it may have ended; its removal kills it as well
		}
	}
	state, err := a.end(detached, id, ended, over)
	if failed == nil && err != nil {
		failed = err
	}
	select {
	case <-drained:
	case <-time.After(drainTimeout):
	}
	stop()
	conn.Close()
	<-drained
	<-fed
	<-sampled
	if state != nil {
		a.meter.finish(state.FinishedAt)
		a.exitCode, a.oomKilled = new(int32(state.ExitCode)), new(state.OOMKilled) //nolint:gosec // an exit status fits
	}
	return state, failed
}

// end waits for the container's end and asks how it ended.
func (a *attempt) end(ctx context.Context, id string, ended <-chan error, killed bool) (*container.State, error) {
	var timeout <-chan time.Time
	if killed {
		timeout = time.After(endTimeout)
	}
	select {
	case err := <-ended:
		a.meter.end()
		if err != nil {
			return nil, engineFault(err, "wait for the container")
		}
	case <-timeout:
		return nil, fault.New(fault.Unavailable, "the Docker engine did not end the container in %s", endTimeout)
	}
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	found, err := a.r.client.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
	if err != nil {
		return nil, engineFault(err, "ask how the container ended")
	}
	if found.Container.State == nil {
		return nil, fault.New(fault.Internal, "the Docker engine does not say how the container ended")
	}
	return found.Container.State, nil
}

// wait gives the container's end: nil, or the error of the engine.
func wait(ctx context.Context, cli *client.Client, id string) chan error {
	ended := make(chan error, 1)
	result := cli.ContainerWait(ctx, id, client.ContainerWaitOptions{Condition: container.WaitConditionNextExit})
	go func() {
		select {
		case response := <-result.Result:
			if response.Error != nil && response.Error.Message != "" {
				ended <- errors.New(response.Error.Message)
				return
			}
			ended <- nil
		case err := <-result.Error:
			ended <- err
		}
	}()
	return ended
}

// feed writes the input. A container that does not read it, or closes stdin, is no failure.
func feed(conn *client.ContainerAttachResult, input []byte) {
	if _, err := conn.Conn.Write(append(bytes.Clone(input), '\n')); err == nil {
		_ = conn.CloseWrite()
	}
}

func (a *attempt) drain(r io.Reader, stdout *head, stderr *tail) {
	out := &stream{name: "stdout", sink: a.sink, keep: stdout.add}
	errs := &stream{name: "stderr", sink: a.sink, keep: stderr.add}
	if _, err := stdcopy.StdCopy(out, errs, r); err != nil {
		a.r.log.Debug("read a container's output", slogError(err)) // its end tells the cause
	}
	out.flush()
	errs.flush()
}

// sample passes on what is measured while the job runs.
func (a *attempt) sample(ctx context.Context, cli *client.Client, id string) <-chan struct{} {
	done := make(chan struct{})
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		if a.group == nil || a.network != networkNone {
			a.meter.watch(ctx, cli, id)
		}
	}()
	go func() {
		defer close(done)
		look := time.NewTicker(memoryInterval)
		defer look.Stop()
		tell := time.NewTicker(usageInterval)
		defer tell.Stop()
		for {
			u, _, _ := a.meter.usage()
			select {
			case <-ctx.Done():
				<-watched
				return
			case <-look.C:
			case <-tell.C:
				a.sink.Usage(u)
			}
		}
	}()
	return done
}

// endedForMemory tells whether the kernel ended a process of a container that ended by itself for its memory. The engine hears of it
// apart from the end, and so sometimes later; the kernel's own count goes, with control groups v1, with the container's group.
// Where both are too late, a program that was killed with all of its memory in use was killed for that.
func endedForMemory(state *container.State, kills int, peakMB *float64, limitMB float64) bool {
	const killed, all = 128 + 9, 0.99
	return state.OOMKilled || kills > 0 ||
		state.ExitCode == killed && limitMB > 0 && peakMB != nil && *peakMB >= all*limitMB
}

// verdict says why a container that ended by itself failed; nil where it did not.
func (a *attempt) verdict(state *container.State, stderr *tail) error {
	u, kills, _ := a.meter.usage()
	oom := endedForMemory(state, kills, u.PeakMemoryMb, a.limits.MemoryMB)
	a.oomKilled = &oom
	if !oom && state.ExitCode != 0 && a.meter.refusedProcesses() {
		return fault.New(fault.ResourceExceeded, "the container needed more processes than its limit of %d, and exited with status %d: %s; raise resource_limits.processes",
			a.limits.Processes, state.ExitCode, strings.TrimSpace(stderr.last(errorTail)))
	}
	return a.prepared.Verdict(state.ExitCode, oom, u.PeakMemoryMb, strings.TrimSpace(stderr.last(errorTail)))
}

// startFault tells a program that cannot be started from an engine that cannot start one.
func startFault(err error) error {
	f := engineFault(err, "start the container")
	text := err.Error()
	if strings.Contains(text, "docker-init") {
		return fault.Wrap(err, fault.Unavailable, "the container cannot start: the engine has no docker-init; install it on the engine's host (package docker-init or tini)")
	}
	for _, wrong := range []string{"executable file not found", "cannot be mounted", "no such file or directory", "permission denied", "unable to find user", "no matching entries", "exec format error", "is a directory", "not a directory", "argument list too long"} {
		if strings.Contains(text, wrong) && f.Code != fault.Unavailable {
			return fault.Wrap(err, fault.Validation, "the container cannot start: %s; check the image, command, working_dir and user", clip(text))
		}
	}
	return f
}

// usage gives what was measured.
func (a *attempt) usage() *runnerv1.ResourceUsage {
	u := a.meter.final()
	if a.imageID != "" {
		u.ExecutedVersion = new(a.imageID)
	}
	u.ExitCode, u.OomKilled = a.exitCode, a.oomKilled
	return u
}
