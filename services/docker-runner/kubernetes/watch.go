package kubernetes

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/docker-runner/dockerrunner"
	"github.com/specql/mesh/services/docker-runner/internal/shim"
)

// syncTimeout bounds the wait for the first sight of the pods.
const syncTimeout = 15 * time.Second

// byJob is the index of pods by their Job.
const byJob = "job"

// watchers are woken when the pods of their Job change.
type watchers struct {
	mu    sync.Mutex
	wakes map[string]map[chan struct{}]struct{}
}

// join gives a channel that has something once the Job's pods have changed. Leave it by leave.
func (w *watchers) join(job string) (wake chan struct{}, leave func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.wakes == nil {
		w.wakes = map[string]map[chan struct{}]struct{}{}
	}
	if w.wakes[job] == nil {
		w.wakes[job] = map[chan struct{}]struct{}{}
	}
	wake = make(chan struct{}, 1)
	w.wakes[job][wake] = struct{}{}
	return wake, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if delete(w.wakes[job], wake); len(w.wakes[job]) == 0 {
			delete(w.wakes, job)
		}
	}
}

func (w *watchers) wake(job string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for wake := range w.wakes[job] {
		select {
		case wake <- struct{}{}:
		default: // it is awake already
		}
	}
}

// newInformer watches the pods of all Jobs of all runners in the namespace.
func (r *Runner) newInformer() (cache.SharedIndexInformer, error) {
	selector := labelManagedBy + "=" + managedBy
	informer := cache.NewSharedIndexInformer(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.LabelSelector = selector
			return r.api.pods.List(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.LabelSelector = selector
			return r.api.pods.Watch(ctx, o)
		},
	}, &corev1.Pod{}, 0, cache.Indexers{byJob: func(object any) ([]string, error) {
		if pod, ok := object.(*corev1.Pod); ok {
			return []string{pod.Labels[labelJob]}, nil
		}
		return nil, nil
	}})
	changed := func(object any) {
		if gone, ok := object.(cache.DeletedFinalStateUnknown); ok {
			object = gone.Obj
		}
		if pod, ok := object.(*corev1.Pod); ok {
			r.watchers.wake(pod.Labels[labelJob])
		}
	}
	if _, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: changed, UpdateFunc: func(_, pod any) { changed(pod) }, DeleteFunc: changed}); err != nil {
		return nil, fmt.Errorf("watch pods: %w", err)
	}
	if err := informer.SetTransform(func(object any) (any, error) {
		if pod, ok := object.(*corev1.Pod); ok { // what is looked at, and no more: many pods are kept
			return &corev1.Pod{
				ObjectMeta: metav1.ObjectMeta{Name: pod.Name, Namespace: pod.Namespace, UID: pod.UID, ResourceVersion: pod.ResourceVersion, Labels: pod.Labels, OwnerReferences: pod.OwnerReferences},
				Status:     pod.Status,
			}, nil
		}
		return object, nil
	}); err != nil {
		return nil, fmt.Errorf("watch pods: %w", err)
	}
	if err := informer.SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) {
		r.log.Warn("watch the pods of Jobs", "error", err)
	}); err != nil {
		return nil, fmt.Errorf("watch pods: %w", err)
	}
	return informer, nil
}

// synced waits until the runner sees its pods.
func (r *Runner) synced(ctx context.Context) error {
	if r.pods.HasSynced() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, syncTimeout)
	defer cancel()
	if !cache.WaitForCacheSync(ctx.Done(), r.pods.HasSynced) {
		if err := r.Ping(context.WithoutCancel(ctx)); err != nil {
			return err
		}
		return fault.New(fault.Unavailable, "the runner does not see the pods of the namespace %s; give its service account the Role of the chart there", r.o.Namespace)
	}
	return nil
}

// podOf is the pod of a Job, by the Job's uid; nil for none.
func (r *Runner) podOf(job, uid string) *corev1.Pod {
	found, err := r.pods.GetIndexer().ByIndex(byJob, job)
	if err != nil {
		return nil
	}
	for _, object := range found {
		pod, ok := object.(*corev1.Pod)
		if !ok {
			continue
		}
		for _, owner := range pod.OwnerReferences {
			if string(owner.UID) == uid {
				return pod
			}
		}
	}
	return nil
}

// sight is what a pod's status says.
type sight struct {
	// started says that the job's container runs, or has run.
	started bool
	// waiting is why it does not run yet, for people.
	waiting string
	// ended is the end of the job's container; nil while there is none.
	ended *corev1.ContainerStateTerminated
	// image is what runs.
	image string
	// failed says why nothing will come of the pod; nil where that is not so.
	failed error
}

// look reads a pod's status.
func look(ctx context.Context, pod *corev1.Pod, p *dockerrunner.Prepared) sight {
	var s sight
	for _, c := range pod.Status.InitContainerStatuses {
		switch {
		case c.State.Terminated != nil && c.State.Terminated.ExitCode != 0:
			s.failed = fault.New(fault.Unavailable, "the shim could not be placed: %s; look at --kube-shim-image", clip(c.State.Terminated.Message))
		case c.State.Waiting != nil && strings.Contains(c.State.Waiting.Reason, "Image"):
			s.failed = fault.New(fault.Unavailable, "the image of the shim, %s, cannot be had: %s: %s; look at --kube-shim-image and --kube-pull-secret", clip(c.Image), c.State.Waiting.Reason, clip(c.State.Waiting.Message))
		}
	}
	for _, c := range pod.Status.ContainerStatuses {
		if c.Name != containerJob {
			continue
		}
		s.image = c.ImageID
		switch {
		case c.State.Terminated != nil:
			s.started, s.ended = true, c.State.Terminated
		case c.State.Running != nil:
			s.started = true
		case c.State.Waiting != nil:
			s.waiting = strings.TrimSuffix(c.State.Waiting.Reason+": "+clip(c.State.Waiting.Message), ": ")
			if s.failed == nil {
				s.failed = neverRuns(ctx, c.State.Waiting, p)
			}
		}
	}
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse {
			s.waiting = strings.TrimSuffix(c.Reason+": "+clip(c.Message), ": ")
		}
	}
	if pod.Status.Phase == corev1.PodFailed && (s.ended == nil || pod.Status.Reason != "") && s.failed == nil {
		s.failed = ousted(pod, p)
	}
	if s.ended != nil {
		switch s.ended.Reason {
		case "StartError", "ContainerCannotRun":
			s.failed = cannotStart(s.ended.Message)
		case "ContainerStatusUnknown":
			s.failed = fault.New(fault.Unavailable, "the node of the pod was lost: %s", clip(s.ended.Message))
		}
	}
	return s
}

// neverRuns tells what stays as it is from what takes its time.
func neverRuns(ctx context.Context, w *corev1.ContainerStateWaiting, p *dockerrunner.Prepared) error {
	name, _ := p.Image()
	switch w.Reason {
	case "InvalidImageName":
		return fault.New(fault.Validation, "the cluster takes %s for no image: %s", name, clip(w.Message))
	case "ErrImageNeverPull":
		return fault.New(fault.Validation, "the image %s is not on the node and pull_policy is never; load it there, or set pull_policy: if_not_present", name)
	case "ErrImagePull", "ImagePullBackOff", "RegistryUnavailable", "ImageInspectError":
		return fmt.Errorf("pull: %w", p.PullFault(ctx, fmt.Errorf("%s: %s", w.Reason, w.Message))) //nolint:err113 // the kubelet's words
	case "CreateContainerError", "RunContainerError":
		return cannotStart(w.Message)
	case "CreateContainerConfigError":
		return fault.New(fault.Validation, "the container cannot be made: %s", clip(w.Message))
	}
	return nil
}

func cannotStart(message string) error {
	return fault.New(fault.Validation, "the container cannot start: %s; check the image, command, working_dir and user", clip(message))
}

// ousted says why a pod was ended by others than its program.
func ousted(pod *corev1.Pod, p *dockerrunner.Prepared) error {
	text := clip(pod.Status.Message)
	switch pod.Status.Reason {
	case "Evicted":
		if lower := strings.ToLower(text); strings.Contains(lower, "ephemeral") || strings.Contains(lower, "emptydir") {
			return fault.New(fault.ResourceExceeded, "the container wrote more than it may: %s; raise resource_limits.disk_mb (%g MiB), or write less", text, p.Limits.DiskMB)
		}
		return fault.New(fault.Unavailable, "the node ended the pod: %s", text)
	case "DeadlineExceeded":
		return fault.New(fault.Timeout, "the cluster ended the Job after its time: %s", text)
	}
	return fault.New(fault.Unavailable, "the pod ended by itself: %s", strings.TrimSpace(pod.Status.Reason+" "+text))
}

// shimFault says what a report means that is no program's end; nil where it is one.
func shimFault(report *shim.Report) error {
	switch {
	case report.Start != "":
		return fault.New(fault.Validation, "the container cannot start: %s; a cluster does not tell an image's own entrypoint: give runner_config.entrypoint, or the program in front of command", clip(report.Start))
	case report.Full:
		return fault.New(fault.ResourceExceeded, "the container wrote more than the %d MiB that an output may have; write large results elsewhere and give their place", maxOutput>>20)
	case report.Irregular:
		return fault.New(fault.Validation, "%s/%s is not a regular file; write it as one", shim.OutputPlace, shim.OutputFile)
	case report.Ended:
		return fault.New(fault.Unavailable, "the cluster ended the pod before its program had ended, as where a node is drained")
	}
	return nil
}
