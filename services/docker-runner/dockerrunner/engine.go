package dockerrunner

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/system"
	"github.com/moby/moby/client"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/cgroup"
	"github.com/specql/mesh/services/docker-runner/dockerrunner/imagebuild"
)

// engine is what is known of the engine.
type engine struct {
	info system.Info
	// shared: the engine sees the runner's files, so it is on this host and the runner can
	// resolve links, read control groups and hand it directories.
	shared bool
	// quota: a bounded file system that the runner mounts reaches the containers.
	quota bool
}

// reach says how far the runner can look at the paths of volumes.
func (e *engine) reach() reach {
	switch {
	case e.quota:
		return held
	case e.shared:
		return local
	}
	return distant
}

func (e *engine) security(name string) string {
	for _, option := range e.info.SecurityOptions {
		fields := strings.Split(option, ",")
		if slices.Contains(fields, "name="+name) {
			return option
		}
	}
	return ""
}

// seccomp says whether the engine's default profile holds its containers.
func (e *engine) seccomp() bool {
	option := e.security("seccomp")
	return option != "" && !strings.Contains(option, "profile=unconfined")
}

// cgroups says whether a parent group of the runner's making measures the containers.
func (e *engine) cgroups() (ok bool, why string) {
	mode, reason := cgroup.Detect()
	switch {
	case mode == cgroup.None:
		return false, reason
	case !e.shared:
		return false, "the engine is on another host"
	case e.security("rootless") != "":
		return false, "the engine is rootless"
	case e.info.CgroupDriver != "cgroupfs":
		return false, fmt.Sprintf("the engine's cgroup driver is %q: systemd drops a job's group, with its figures, the moment that the container ends; start the engine with --exec-opt native.cgroupdriver=cgroupfs", e.info.CgroupDriver)
	}
	return true, ""
}

// groups says whether containers get control groups of the runner's making.
func (r *Runner) groups(e *engine) bool {
	ok, _ := e.cgroups()
	return ok && !r.cgroupsMissing.Load()
}

// inspectEngine asks the engine about itself, once. Finding out whether files are shared
// takes an image, since it takes a container, which is made and never started.
func (r *Runner) inspectEngine(ctx context.Context, imageID string) (*engine, error) {
	if e := r.engine.Load(); e != nil {
		return e, nil
	}
	r.probing.Lock()
	defer r.probing.Unlock()
	if e := r.engine.Load(); e != nil {
		return e, nil
	}
	info, err := r.client.Info(ctx, client.InfoOptions{})
	if err != nil {
		return nil, engineFault(err, "ask the Docker engine about itself")
	}
	e := &engine{info: info.Info}
	if e.shared, e.quota, err = r.probeFiles(ctx, imageID); err != nil {
		return nil, err
	}
	if !e.seccomp() {
		r.log.Warn("the engine runs containers without its seccomp profile")
	}
	r.engine.Store(e)
	return e, nil
}

// probeFiles hands the engine a directory and looks through its eyes whether a file that lies
// in it is there.
func (r *Runner) probeFiles(ctx context.Context, imageID string) (shared, quota bool, err error) {
	dir, err := r.state.newDir(1 << 20)
	if err != nil {
		// Without a directory of its own, the runner treats the engine as a distant one.
		r.log.Warn("no state directory: the engine is treated as one on another host", slogError(err))
		return false, false, nil
	}
	defer func() {
		if err := dir.remove(); err != nil {
			r.log.Warn("remove the probe directory", slogError(err))
		}
	}()
	name := "probe-" + randomName()
	if err := os.WriteFile(dir.path+"/"+name, nil, 0o600); err != nil {
		return false, false, fmt.Errorf("write probe: %w", err)
	}
	created, err := r.create(ctx, client.ContainerCreateOptions{
		Name:   containerPrefix + name,
		Config: &container.Config{Image: imageID, Cmd: []string{"probe"}, Labels: r.owner.labels("probe", time.Now().Add(time.Minute))},
		HostConfig: &container.HostConfig{
			NetworkMode: networkNone,
			Mounts:      []mount.Mount{{Type: mount.TypeBind, Source: dir.path, Target: outputMount}},
		},
	})
	switch {
	case err != nil && (cerrdefs.IsInvalidArgument(err) || cerrdefs.IsNotFound(err)):
		return false, false, nil // there is no such directory over there
	case err != nil:
		return false, false, engineFault(err, "make a container")
	}
	_, err = r.client.ContainerStatPath(ctx, created, client.ContainerStatPathOptions{Path: outputMount + "/" + name})
	if removeErr := r.removeContainer(ctx, created); removeErr != nil {
		return false, false, removeErr
	}
	if err != nil && !cerrdefs.IsNotFound(err) {
		return false, false, engineFault(err, "look into a container")
	}
	return err == nil, err == nil && dir.mounted, nil
}

// refresh asks the engine about itself anew, now and then: one that was started again may hold
// its containers in another way.
func (r *Runner) refresh(ctx context.Context) {
	e := r.engine.Load()
	if e == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	info, err := r.client.Info(ctx, client.InfoOptions{})
	if err != nil {
		return // jobs will tell
	}
	now := &engine{info: info.Info, shared: e.shared, quota: e.quota}
	if e.seccomp() && !now.seccomp() {
		r.log.Warn("the engine runs containers without its seccomp profile")
	}
	r.engine.Store(now)
}

// require finds out whether the engine has the features that the operator insists on.
func (r *Runner) require(ctx context.Context, host string) error {
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	if err := r.Ping(ctx); err != nil {
		return fmt.Errorf("--require-isolation: %w", err)
	}
	// An image of nothing, to make a container of that is never started.
	tag := "specql-probe:" + randomName()
	if err := imagebuild.FromBinary(ctx, host, tag, map[string][]byte{"/probe": nil}, nil); err != nil {
		return fmt.Errorf("--require-isolation: %w", err)
	}
	defer func() {
		if err := imagebuild.Remove(context.WithoutCancel(ctx), host, tag); err != nil {
			r.log.Warn("remove the image of the probe", slogError(err))
		}
	}()
	e, err := r.inspectEngine(ctx, tag)
	if err != nil {
		return fmt.Errorf("--require-isolation: %w", err)
	}
	return runner.Require(r.known(e), r.required)
}

// stillHeld refuses to run a job once the engine has lost what the operator insists on.
func (r *Runner) stillHeld(e *engine) error {
	if len(r.required) == 0 {
		return nil
	}
	if err := runner.Require(r.known(e), r.required); err != nil {
		return fault.New(fault.Unavailable, "%v", err)
	}
	return nil
}

// held are the features that an engine gives each container, and those of this process.
func (r *Runner) held(e *engine) []runner.Feature {
	feature := func(name string, available bool, missing string) runner.Feature {
		if available {
			missing = ""
		}
		return runner.Feature{Name: name, Available: available, Detail: missing}
	}
	others := r.route.who()
	return append([]runner.Feature{
		feature("private_socket", others == "", others),
		feature("seccomp", e.seccomp(), "the engine was built or started without its default profile"),
		feature("mandatory_access_control", e.security("apparmor") != "" || e.security("selinux") != "", "the engine has neither AppArmor nor SELinux"),
		feature("user_namespace", e.security("userns") != "" || e.security("rootless") != "", "root in a container is root of the host's, without its capabilities; start the engine with userns-remap, or rootless"),
		feature("processes_limit", e.info.PidsLimit, "the engine's host has no control group for it"),
	}, r.isolation...)
}

// known are all features of an engine that was looked at closely.
func (r *Runner) known(e *engine) []runner.Feature {
	features := []runner.Feature{{Name: "docker_engine", Available: true}}
	features = append(features, always...)
	features = append(features, r.held(e)...)
	for _, limit := range []struct {
		name string
		held bool
	}{{"memory_limit", e.info.MemoryLimit}, {"cpu_limit", e.info.CPUCfsQuota}} {
		f := runner.Feature{Name: limit.name, Available: limit.held}
		if !f.Available {
			f.Detail = "the engine's host has no control group for it"
		}
		features = append(features, f)
	}
	groups := runner.Feature{Name: "cgroup"}
	if groups.Available, groups.Detail = e.cgroups(); groups.Available && r.cgroupsMissing.Load() {
		groups.Available, groups.Detail = false, "the engine keeps its control groups elsewhere; the stats API measures instead"
	}
	features = append(features, groups)
	for _, name := range []string{"output_quota", "held_volumes"} {
		f := runner.Feature{Name: name, Available: e.quota}
		if !f.Available {
			f.Detail = "the runner cannot mount what the engine sees; it takes root and the engine's own mount namespace"
		}
		features = append(features, f)
	}
	return features
}

// always are the features of every container.
var always = []runner.Feature{
	{Name: "capabilities_dropped", Available: true},
	{Name: "no_new_privileges", Available: true},
	{Name: "private_namespaces", Available: true},
	{Name: "read_only_root", Available: true},
}

// features are what Describe tells. It must be quick, so the engine gets little time. What only
// a job finds out is not told before there was one.
func (r *Runner) features(ctx context.Context) []runner.Feature {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	away := func(err error) []runner.Feature {
		features := []runner.Feature{{Name: "docker_engine", Detail: fault.From(err).Message}}
		return append(append(features, always...), r.isolation...)
	}
	if err := r.Ping(ctx); err != nil {
		return away(err)
	}
	if e := r.engine.Load(); e != nil {
		return r.known(e)
	}
	info, err := r.client.Info(ctx, client.InfoOptions{})
	if err != nil {
		return away(engineFault(err, "ask the Docker engine about itself"))
	}
	features := r.known(&engine{info: info.Info, shared: r.route.socket != ""})
	return slices.DeleteFunc(features, func(f runner.Feature) bool { return f.Name == "output_quota" || f.Name == "held_volumes" })
}

// create makes a container. It is not given up half-way, which could leave one behind.
func (r *Runner) create(ctx context.Context, o client.ContainerCreateOptions) (string, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), engineTimeout)
	defer cancel()
	created, err := r.client.ContainerCreate(ctx, o)
	if err == nil {
		return created.ID, nil
	}
	if !cerrdefs.IsInvalidArgument(err) && !cerrdefs.IsNotFound(err) && !client.IsErrConnectionFailed(err) {
		// The engine may have made it all the same; the name is ours alone.
		if removeErr := r.removeContainer(ctx, o.Name); removeErr != nil {
			r.log.Warn("remove a container that could not be made", slogError(removeErr))
		}
	}
	return "", err
}

const (
	// engineTimeout bounds a call to the engine that is to be quick.
	engineTimeout = time.Minute
	// removePause is the time between two tries to remove a container.
	removePause = 50 * time.Millisecond
)

// removeContainer kills and removes a container with its anonymous volumes, and returns once
// it is gone, whatever becomes of ctx.
func (r *Runner) removeContainer(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), engineTimeout)
	defer cancel()
	for {
		_, err := r.client.ContainerRemove(ctx, id, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
		if err == nil || cerrdefs.IsNotFound(err) {
			return nil
		}
		// A removal by another is in progress, the engine restarts, a file system is busy.
		select {
		case <-ctx.Done():
			return fault.Wrap(err, fault.Unavailable, "container %s could not be removed: %s; remove it with docker rm -f", clip(id), clip(err.Error()))
		case <-time.After(removePause):
		}
	}
}

func unavailable(err error) *fault.Error {
	if strings.Contains(err.Error(), "permission denied") || errors.Is(err, os.ErrPermission) {
		return fault.Wrap(err, fault.Unavailable, "the Docker engine's socket refuses this user; add the runner's user to the group docker, or give --docker-host another engine")
	}
	return fault.Wrap(err, fault.Unavailable, "no Docker engine answers; start it (systemctl start docker), or name another with --docker-host or DOCKER_HOST")
}

// engineFault gives an error of the engine its code.
func engineFault(err error, doing string) *fault.Error {
	if f, ok := fault.As(err); ok {
		return f
	}
	text := clip(err.Error())
	var network net.Error
	switch {
	case client.IsErrConnectionFailed(err), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed):
		return unavailable(err)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return fault.Wrap(err, fault.Unavailable, "%s: the Docker engine did not answer in time", doing)
	case errors.As(err, &network):
		return unavailable(err)
	case cerrdefs.IsInvalidArgument(err), cerrdefs.IsNotFound(err):
		return fault.Wrap(err, fault.Validation, "%s: %s", doing, text)
	case cerrdefs.IsUnavailable(err):
		return fault.Wrap(err, fault.Unavailable, "%s: %s", doing, text)
	default:
		return fault.Wrap(err, fault.Internal, "%s: %s", doing, text)
	}
}
