package dockerrunner

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/client"
	"go.opentelemetry.io/otel/propagation"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

const (
	// maxInputVariable is the largest input that SPECQL_INPUT also holds, in bytes.
	maxInputVariable = 100 << 10
	// defaultOutputQuota bounds /specql where it is a mount of the runner's, in bytes.
	defaultOutputQuota = 16 << 20
	// oomScore has the kernel end containers before the host's own services where the host's
	// memory is full.
	oomScore = 500
	// mostProcesses is more than a job has use for, and less than kernels take for none at all.
	mostProcesses = 1 << 20
	// minTmpfs is the least that an in-memory directory gets, in bytes.
	minTmpfs = 1 << 20
)

// What is hidden and what is read-only of the kernel's files, as current engines have it: older
// ones leave some of it open.
var (
	maskedPaths = []string{
		"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug",
		"/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware",
	}
	readonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

// bytesOf gives MiB as bytes; what is absurdly many stays a number.
func bytesOf(mb float64) int64 {
	const most = 1 << 30
	return int64(min(mb, most) * mebibyte)
}

// environment is the whole environment besides what the image brings: nothing of the
// runner's own gets in.
func environment(ctx context.Context, cfg *Config, job *runner.Job, input []byte) []string {
	env := make([]string, 0, len(cfg.Environment)+8)
	for _, name := range slices.Sorted(maps.Keys(cfg.Environment)) {
		env = append(env, name+"="+string(cfg.Environment[name]))
	}
	if cfg.CreatedAhead > 0 {
		// Nobody knows the job yet. A name alone takes away what the image says.
		return append(env, "SPECQL_IDEMPOTENCY_KEY", "SPECQL_INPUT", "SPECQL_INPUT_TOO_LARGE", "SPECQL_JOB_FILE="+outputMount+"/"+jobFile,
			"SPECQL_JOB_ID", "SPECQL_RUN_ID", "TRACEPARENT", "TRACESTATE")
	}
	env = append(env,
		"SPECQL_IDEMPOTENCY_KEY="+withoutNUL(job.IdempotencyKey),
		"SPECQL_JOB_ID="+withoutNUL(job.ID),
		"SPECQL_RUN_ID="+withoutNUL(job.RunID),
	)
	if len(input) <= maxInputVariable {
		env = append(env, "SPECQL_INPUT="+string(input))
	} else {
		env = append(env, "SPECQL_INPUT_TOO_LARGE=1")
	}
	carrier := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, carrier)
	for _, name := range slices.Sorted(maps.Keys(carrier)) {
		env = append(env, strings.ToUpper(name)+"="+carrier[name])
	}
	return env
}

func withoutNUL(s string) string { return strings.ReplaceAll(s, "\x00", "") }

// spec makes the container's description.
func (a *attempt) spec(ctx context.Context, e *engine, img image, mounts []hostMount) (client.ContainerCreateOptions, error) {
	entrypoint := a.cfg.Entrypoint
	if len(entrypoint) == 0 {
		entrypoint = img.entrypoint
	}
	_, args, err := a.prepared.arguments(entrypoint)
	if err != nil {
		return client.ContainerCreateOptions{}, err
	}
	if len(args)+len(a.cfg.Entrypoint) == 0 && !img.runs {
		return client.ContainerCreateOptions{}, fault.New(fault.Validation, "the image %s names no program; give runner_config.command", a.name)
	}
	dir := a.cfg.WorkingDir
	if dir == "" {
		dir = img.workingDir
	}
	if kernelTarget(dir) {
		return client.ContainerCreateOptions{}, fault.New(fault.Validation, "the image %s works in %q, and %s; set runner_config.working_dir", a.name, clip(dir), kernelTargetText)
	}
	cfg := &container.Config{
		Hostname:     "job",
		User:         a.cfg.User,
		AttachStdin:  true,
		AttachStdout: true,
		AttachStderr: true,
		OpenStdin:    true,
		StdinOnce:    true,
		Env:          a.prepared.Environment(ctx),
		Cmd:          args,
		Entrypoint:   a.cfg.Entrypoint,
		Image:        img.id,
		WorkingDir:   a.cfg.WorkingDir,
		Healthcheck:  &container.HealthConfig{Test: []string{"NONE"}},
		Labels:       a.labels,
	}
	host := &container.HostConfig{
		LogConfig:      container.LogConfig{Type: "none"}, // the attached stream is all there is
		NetworkMode:    container.NetworkMode(a.network),
		RestartPolicy:  container.RestartPolicy{Name: container.RestartPolicyDisabled},
		CapDrop:        []string{"ALL"},
		SecurityOpt:    []string{"no-new-privileges:true"},
		ReadonlyRootfs: a.cfg.readOnly(),
		CgroupnsMode:   container.CgroupnsModePrivate,
		IpcMode:        container.IPCModePrivate,
		ShmSize:        defaultTmpfs,
		MaskedPaths:    maskedPaths,
		ReadonlyPaths:  readonlyPaths,
		OomScoreAdj:    oomScore,
		Init:           new(true), // ends orphans, and lets signals have their usual effect
	}
	if a.group != nil {
		host.CgroupParent = a.group.DockerParent()
	}
	if a.limits.DiskMB > 0 {
		host.ShmSize = min(host.ShmSize, bytesOf(a.limits.DiskMB))
	}
	a.limit(&host.Resources, e)
	host.Mounts = a.mounts(mounts)
	if host.Tmpfs, err = a.tmpfs(img, mounts); err != nil {
		return client.ContainerCreateOptions{}, err
	}
	if !a.cfg.readOnly() && a.limits.DiskMB > 0 && !a.r.storageMissing.Load() {
		host.StorageOpt = map[string]string{"size": strconv.FormatInt(bytesOf(a.limits.DiskMB), 10)}
	}
	return client.ContainerCreateOptions{Name: containerPrefix + randomName(), Config: cfg, HostConfig: host}, nil
}

func (a *attempt) limit(r *container.Resources, e *engine) {
	l := a.limits
	r.PidsLimit = new(min(l.Processes, mostProcesses) + 1) // the init process counts as well
	r.OomKillDisable = new(false)
	r.Ulimits = []*container.Ulimit{{Name: "core"}}
	if l.MemoryMB > 0 {
		r.Memory = bytesOf(l.MemoryMB)
		r.MemorySwap = r.Memory // no swap beyond it
	}
	if cores := l.CPUCores; cores > 0 {
		if e.info.NCPU > 0 {
			cores = min(cores, float64(e.info.NCPU)) // engines refuse more than there are
		}
		r.NanoCPUs = int64(cores * 1e9)
	}
	if l.DiskMB > 0 {
		size := bytesOf(l.DiskMB)
		r.Ulimits = append(r.Ulimits, &container.Ulimit{Name: "fsize", Soft: size, Hard: size})
	}
}

func (a *attempt) mounts(volumes []hostMount) []mount.Mount {
	all := make([]mount.Mount, 0, len(volumes)+1)
	for _, v := range volumes {
		all = append(all, mount.Mount{
			Type: mount.TypeBind, Source: v.source, Target: v.target, ReadOnly: v.readOnly,
			BindOptions: &mount.BindOptions{Propagation: mount.PropagationRPrivate},
		})
	}
	if a.output.volume {
		return append(all, mount.Mount{Type: mount.TypeVolume, Target: outputMount, VolumeOptions: &mount.VolumeOptions{NoCopy: true, Labels: a.labels}})
	}
	return append(all, mount.Mount{
		Type: mount.TypeBind, Source: a.output.dir.path, Target: outputMount,
		BindOptions: &mount.BindOptions{Propagation: mount.PropagationRPrivate},
	})
}

// tmpfs are the in-memory directories: those of the service, /tmp where the root cannot be
// written, and the image's own volumes, which would else be unbounded directories of the host.
func (a *attempt) tmpfs(img image, volumes []hostMount) (map[string]string, error) {
	list, err := a.directories(img, volumes)
	if err != nil {
		return nil, err
	}
	mounts := make(map[string]string, len(list))
	for _, t := range list {
		options := fmt.Sprintf("rw,nosuid,nodev,size=%d,mode=1777", t.bytes)
		if !t.exec {
			options += ",noexec"
		} else {
			options += ",exec"
		}
		mounts[path.Clean(t.target)] = options
	}
	return mounts, nil
}

// directories are the in-memory directories, each with its bound.
func (a *attempt) directories(img image, volumes []hostMount) ([]tmpfs, error) {
	taken := map[string]bool{outputMount: true}
	for _, v := range volumes {
		taken[v.target] = true
	}
	var list []tmpfs
	for _, text := range a.cfg.Tmpfs {
		t, err := parseTmpfs(text)
		if err != nil {
			return nil, fault.New(fault.Validation, "runner_config.tmpfs: %v", err)
		}
		list, taken[path.Clean(t.target)] = append(list, t), true
	}
	if err := a.imageVolumes(img, volumes); err != nil {
		return nil, err
	}
	extra := slices.Clone(img.volumes)
	if a.cfg.readOnly() {
		extra = append(extra, "/tmp")
	}
	slices.Sort(extra)
	for _, target := range extra {
		target = path.Clean(target)
		if taken[target] {
			continue
		}
		list, taken[target] = append(list, tmpfs{target: target, bytes: defaultTmpfs}), true
	}
	budget := bytesOf(a.limits.DiskMB)
	for i := range list {
		t := &list[i]
		if budget > 0 {
			// disk_mb is for all of them; those that follow keep their least.
			room := budget - int64(len(list)-i-1)*minTmpfs
			if t.sized && t.bytes > room {
				return nil, fault.New(fault.Validation, "tmpfs %s of %d MiB does not fit into resource_limits.disk_mb, %g for all", clip(t.target), t.bytes>>20, a.limits.DiskMB)
			}
			t.bytes = max(min(t.bytes, room), minTmpfs)
			budget = max(budget-t.bytes, minTmpfs)
		}
	}
	return list, nil
}

// imageVolumes refuses what an image declares as volumes where no bounded directory can take
// their place: the engine would make unbounded ones on the host.
func (a *attempt) imageVolumes(img image, volumes []hostMount) error {
	if len(img.volumes) > maxVolumes {
		return fault.New(fault.Validation, "the image %s declares %d volumes, more than %d", a.name, len(img.volumes), maxVolumes)
	}
	for _, target := range img.volumes {
		clean := path.Clean(target)
		if clean == outputMount {
			continue
		}
		if !containerPath(target) || systemTarget(clean) {
			return fault.New(fault.Validation, "the image %s declares a volume at %q, which is not to be covered; build it without", a.name, clip(target))
		}
		for _, v := range volumes {
			if !v.readOnly && clean != v.target && within(clean, v.target) {
				return fault.New(fault.Validation, "the image %s declares a volume at %q, in the writable volume %s; mount that elsewhere", a.name, clip(target), clip(v.target))
			}
		}
	}
	return nil
}

// accountFiles are the files of an image that an engine reads itself when it starts a container.
var accountFiles = []string{"/etc/passwd", "/etc/group"}

// maxAccounts bounds them, in bytes.
const maxAccounts = 1 << 20

// verifyAccounts refuses an image whose files of accounts are pipes or devices: an engine that
// opens one waits for ever, and can neither end the container nor remove it any more.
func (a *attempt) verifyAccounts(ctx context.Context, id string, img image) error {
	covered := slices.ContainsFunc(a.cfg.Volumes, func(v Volume) bool { return within(path.Clean(v.ContainerPath), "/etc") })
	if _, known := a.r.vetted.Load(img.id); known && !covered {
		return nil
	}
	for _, name := range accountFiles {
		const links = 8
		for at, n := name, 0; ; n++ {
			found, err := a.r.client.ContainerStatPath(ctx, id, client.ContainerStatPathOptions{Path: at})
			if cerrdefs.IsNotFound(err) {
				break
			}
			if cerrdefs.IsInternal(err) { // what the engine cannot follow, or mount over
				return fault.Wrap(err, fault.Validation, "the engine cannot look at %s of the image %s, so that no container of it can start: look for links that lead nowhere, and for files where a directory is mounted", name, a.name)
			}
			if err != nil {
				return engineFault(err, "look at "+name+" of the image")
			}
			if stat := found.Stat; stat.Mode&os.ModeSymlink != 0 && n < links && stat.LinkTarget != "" && stat.LinkTarget != at {
				at = stat.LinkTarget // resolved in the container's root
				continue
			} else if !stat.Mode.IsRegular() || stat.Size > maxAccounts {
				return fault.New(fault.Validation, "%s of the image %s must be a regular file of at most %d bytes; build it with one, or without", name, a.name, maxAccounts)
			}
			break
		}
	}
	a.r.vetted.Store(img.id, struct{}{})
	return nil
}

// verifyMounts looks whether the engine mounts something that nobody asked for: a link in an
// image can lead one of its volumes past what takes its place.
func (a *attempt) verifyMounts(ctx context.Context, id string, img image) error {
	if len(img.volumes) == 0 {
		return nil
	}
	found, err := a.r.client.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
	if err != nil {
		return engineFault(err, "look at the container")
	}
	for _, m := range found.Container.Mounts {
		if m.Type == mount.TypeVolume && !(a.output.volume && m.Destination == outputMount) {
			return fault.New(fault.Validation, "the engine would give the image %s an unbounded volume at %q; build it without", a.name, clip(m.Destination))
		}
	}
	return nil
}
