package dockerrunner

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/client"

	"github.com/specql/mesh/pkg/runner/cgroup"
)

// Labels of every container that a runner makes.
const (
	// labelRunner is the runner's instance.
	labelRunner = "dev.specql.runner"
	// labelJob is the job's id.
	labelJob = "dev.specql.job"
	// labelHost names the host, its boot and the PID namespace that labelProcess is in.
	labelHost = "dev.specql.host"
	// labelProcess is the runner's process: its id and when it started.
	labelProcess = "dev.specql.process"
	// labelExpires is when the job's time is over in any case, in Unix seconds.
	labelExpires = "dev.specql.expires"
)

// expiryGrace is how long after a job's last moment its container may be removed by any
// runner, on whatever host: clocks differ, and a living runner removes it long before.
const expiryGrace = 5 * time.Minute

// owner names a runner so that others can tell whether it still lives.
type owner struct {
	instance string
	host     string
	process  string
}

func newOwner() (owner, error) {
	host, err := hostIdentity()
	if err != nil {
		return owner{}, err
	}
	started, err := processStart(os.Getpid())
	if err != nil {
		return owner{}, fmt.Errorf("read own start time: %w", err)
	}
	return owner{instance: randomName(), host: host, process: strconv.Itoa(os.Getpid()) + "/" + started}, nil
}

// labels of a container. The zero time means that the job has no end. All of them are always
// there: what is missing, an image could bring.
func (o owner) labels(job string, deadline time.Time) map[string]string {
	labels := map[string]string{labelRunner: o.instance, labelJob: clip(job), labelHost: o.host, labelProcess: o.process, labelExpires: ""}
	if !deadline.IsZero() {
		labels[labelExpires] = strconv.FormatInt(deadline.Add(expiryGrace).Unix(), 10)
	}
	return labels
}

// dead says whether the owner of something with these labels is surely gone: a process of
// this very boot and PID namespace that is no more, or one whose job should have ended long
// ago. It never guesses about a process elsewhere.
func (o owner) dead(labels map[string]string, now time.Time) bool {
	if labels[labelRunner] == o.instance {
		return false
	}
	if expires, err := strconv.ParseInt(labels[labelExpires], 10, 64); err == nil && now.Unix() > expires {
		return true
	}
	return o.processGone(labels[labelHost], labels[labelProcess])
}

func (o owner) processGone(host, process string) bool {
	if host != o.host {
		return false
	}
	text, started, ok := strings.Cut(process, "/")
	pid, err := strconv.Atoi(text)
	if !ok || err != nil || pid <= 0 {
		return false
	}
	now, err := processStart(pid)
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	return now != started
}

func randomName() string { return strings.ToLower(rand.Text()[:16]) }

// containerPrefix begins the names of containers.
const containerPrefix = "specql-"

// groupParent names the runner's control groups.
const groupParent = "docker"

func (r *Runner) sweepForever(ctx context.Context) {
	tick := time.NewTicker(sweepInterval)
	defer tick.Stop()
	for {
		if n, err := r.Sweep(ctx); err != nil && ctx.Err() == nil {
			r.log.Debug("look for leftovers", slogError(err))
		} else if n > 0 {
			r.log.Info("removed what crashed runners left behind", slog.Int("leftovers", n))
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		r.ahead.expire(time.Now())
		r.refresh(ctx)
		r.vetted.Clear()
	}
}

// Sweep removes containers, control groups and directories whose runner is gone, and returns
// how many there were. It runs by itself at start and every minute.
func (r *Runner) Sweep(ctx context.Context) (int, error) {
	// Files and groups first: they need no engine. Containers keep theirs busy, so what is
	// left of those goes with the next sweep.
	if err := r.allowed(); err != nil {
		return 0, err
	}
	removed, err := r.sweepContainers(ctx)
	groups, groupErr := cgroup.RemoveLeftovers(groupParent)
	dirs, dirErr := r.state.sweep()
	volumes, volumeErr := r.sweepVolumes(ctx)
	return removed + groups + dirs + volumes, errors.Join(err, groupErr, dirErr, volumeErr)
}

// sweepVolumes removes the volumes of containers that somebody else has removed.
func (r *Runner) sweepVolumes(ctx context.Context) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	list, err := r.client.VolumeList(ctx, client.VolumeListOptions{Filters: make(client.Filters).Add("label", labelRunner).Add("dangling", "true")})
	if err != nil {
		return 0, engineFault(err, "list volumes")
	}
	removed := 0
	var errs []error
	for _, v := range list.Items {
		if !r.owner.dead(v.Labels, time.Now()) {
			continue
		}
		if _, err := r.client.VolumeRemove(ctx, v.Name, client.VolumeRemoveOptions{}); err != nil && !cerrdefs.IsNotFound(err) {
			errs = append(errs, engineFault(err, "remove a volume"))
			continue
		}
		removed++
	}
	return removed, errors.Join(errs...)
}

func (r *Runner) sweepContainers(ctx context.Context) (int, error) {
	listCtx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	list, err := r.client.ContainerList(listCtx, client.ContainerListOptions{All: true, Filters: make(client.Filters).Add("label", labelRunner)})
	if err != nil {
		return 0, engineFault(err, "list containers")
	}
	removed := 0
	var errs []error
	for _, c := range list.Items {
		if ctx.Err() != nil {
			break
		}
		// Labels may come from an image that somebody else runs, names do not.
		ours := slices.ContainsFunc(c.Names, func(name string) bool { return strings.HasPrefix(name, "/"+containerPrefix) })
		if !ours || !r.owner.dead(c.Labels, time.Now()) {
			continue
		}
		if err := r.removeContainer(ctx, c.ID); err != nil {
			errs = append(errs, err)
			continue
		}
		removed++
	}
	return removed, errors.Join(errs...)
}

func releaseGroups(log *slog.Logger) {
	if mode, _ := cgroup.Detect(); mode == cgroup.None {
		return
	}
	if err := cgroup.Release(groupParent); err != nil {
		log.Debug("remove control groups", slogError(err))
	}
}

func slogError(err error) slog.Attr { return slog.Any("error", err) }
