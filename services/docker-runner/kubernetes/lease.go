package kubernetes

import (
	"context"
	"errors"
	"log/slog"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	// leaseTime is for how long a runner counts as alive after it has said so.
	leaseTime = 30 * time.Second
	// renewInterval is how often it says so.
	renewInterval = 10 * time.Second
	// orphanTime is how long a Job whose runner is gone waits for another that goes on with it.
	orphanTime = 2 * time.Minute
	// sweepInterval is how often leftovers are looked for.
	sweepInterval = time.Minute
	leasePrefix   = "specql-runner-"
)

func newInstance() string { return randomName() }

// live tells others that this runner is alive, and looks for what others left behind.
func (r *Runner) live(ctx context.Context) {
	renew := time.NewTicker(renewInterval)
	defer renew.Stop()
	sweep := time.NewTicker(sweepInterval)
	defer sweep.Stop()
	for {
		if err := r.renew(ctx); err != nil && ctx.Err() == nil {
			r.log.Warn("renew the runner's lease", slog.Any("error", err))
		}
		select {
		case <-ctx.Done():
			return
		case <-renew.C:
		case <-sweep.C:
			if n, err := r.Sweep(ctx); err != nil && ctx.Err() == nil {
				r.log.Warn("look for leftovers", slog.Any("error", err))
			} else if n > 0 {
				r.log.Info("removed what runners that are gone left behind", slog.Int("leftovers", n))
			}
		}
	}
}

// renew begins the runner's lease anew.
func (r *Runner) renew(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, renewInterval)
	defer cancel()
	now := metav1.NowMicro()
	lease := &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{Name: leasePrefix + r.instance, Labels: map[string]string{labelManagedBy: managedBy}},
		Spec:       coordinationv1.LeaseSpec{HolderIdentity: &r.instance, LeaseDurationSeconds: new(int32(leaseTime / time.Second)), RenewTime: &now},
	}
	found, err := r.api.leases.Get(ctx, lease.Name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		_, err = r.api.leases.Create(ctx, lease, metav1.CreateOptions{})
	case err == nil:
		lease.ResourceVersion = found.ResourceVersion
		_, err = r.api.leases.Update(ctx, lease, metav1.UpdateOptions{})
	}
	return r.api.fault(err, "renew a Lease")
}

// Sweep removes Jobs whose runner is gone and that nobody went on with, and the leases of runners
// that are gone and have none, and returns how many Jobs there were. It runs by itself every minute.
func (r *Runner) Sweep(ctx context.Context) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	ours := metav1.ListOptions{LabelSelector: labelManagedBy + "=" + managedBy}
	leases, err := r.api.leases.List(ctx, ours)
	if err != nil {
		return 0, r.api.fault(err, "list Leases")
	}
	jobs, err := r.api.jobs.List(ctx, ours)
	if err != nil {
		return 0, r.api.fault(err, "list Jobs")
	}
	now := time.Now()
	removed := 0
	var errs []error
	for _, j := range orphans(jobs.Items, leases.Items, r.instance, now) {
		err := r.api.jobs.Delete(ctx, j.Name, metav1.DeleteOptions{
			PropagationPolicy: new(metav1.DeletePropagationBackground),
			Preconditions:     &metav1.Preconditions{UID: &j.UID, ResourceVersion: &j.ResourceVersion},
		})
		switch {
		case err == nil:
			removed++
		case !apierrors.IsNotFound(err) && !apierrors.IsConflict(err): // somebody goes on with it
			errs = append(errs, r.api.fault(err, "remove a Job"))
		}
	}
	used := map[string]bool{}
	for i := range jobs.Items {
		used[jobs.Items[i].Labels[labelRunner]] = true
	}
	for i := range leases.Items {
		l := &leases.Items[i]
		if l.Spec.HolderIdentity == nil || used[*l.Spec.HolderIdentity] || *l.Spec.HolderIdentity == r.instance || !goneFor(l, now, orphanTime) {
			continue
		}
		if err := r.api.leases.Delete(ctx, l.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &l.UID, ResourceVersion: &l.ResourceVersion}}); err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
			errs = append(errs, r.api.fault(err, "remove a Lease"))
		}
	}
	return removed, errors.Join(errs...)
}

// goneFor says whether the holder of a lease has been gone for at least that long.
func goneFor(l *coordinationv1.Lease, now time.Time, least time.Duration) bool {
	return l.Spec.RenewTime == nil || now.Sub(l.Spec.RenewTime.Time) > leaseTime+least
}

// orphans are the Jobs that nobody will go on with. A Job without a trace of its runner counts
// from when it was made.
func orphans(jobs []batchv1.Job, leases []coordinationv1.Lease, self string, now time.Time) []*batchv1.Job {
	gone := map[string]bool{}
	for i := range leases {
		if l := &leases[i]; l.Spec.HolderIdentity != nil {
			gone[*l.Spec.HolderIdentity] = goneFor(l, now, orphanTime)
		}
	}
	var found []*batchv1.Job
	for i := range jobs {
		j := &jobs[i]
		owner := j.Labels[labelRunner]
		if owner == self || j.DeletionTimestamp != nil {
			continue
		}
		if is, known := gone[owner]; is || !known && now.Sub(j.CreationTimestamp.Time) > leaseTime+orphanTime {
			found = append(found, j)
		}
	}
	return found
}
