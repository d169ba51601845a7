package kubernetes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/telemetry"
	"github.com/specql/mesh/services/docker-runner/dockerrunner"
	"github.com/specql/mesh/services/docker-runner/internal/shim"
)

const (
	// removeTimeout bounds the wait for a pod that was told to go.
	removeTimeout = time.Minute
	// logTimeout bounds the wait for the last words of a container that has ended.
	logTimeout = 20 * time.Second
	// pause is the time between two looks at what changes without telling.
	pause = 200 * time.Millisecond
	// patience is how long a pod may not be there before the job's log says so, and before its Job is looked at again.
	patience = 10 * time.Second
)

// attempt is one call's run.
type attempt struct {
	r      *Runner
	job    *runner.Job
	sink   runner.Sink
	p      *dockerrunner.Prepared
	checks *runner.Checks

	name, uid string
	// key is what the last words of the Job's shim have.
	key       string
	isolation []string
	image     string
	usage     *shim.Usage
	exitCode  *int32
	oom       *bool
}

// Execute implements [runner.JobRunner].
func (r *Runner) Execute(ctx context.Context, job *runner.Job, sink runner.Sink) (*runner.Result, error) {
	began := time.Now()
	a := &attempt{r: r, job: job, sink: sink, checks: &runner.Checks{}, name: nameOf(job.ID)}
	result := &runner.Result{}
	result.Output, result.Err = a.run(ctx)
	result.Usage = a.measured()
	result.Usage.DurationSeconds = new(time.Since(began).Seconds())
	var digest string
	if a.p != nil {
		digest = a.p.Digest()
	}
	result.Security = a.checks.Context(digest, a.isolation...)
	if result.Err != nil {
		result.Output = nil
	}
	return result, nil
}

// measured gives the figures of the shim; one that it did not measure is absent.
func (a *attempt) measured() *runnerv1.ResourceUsage {
	u := &runnerv1.ResourceUsage{Source: "kubernetes"}
	if a.usage != nil {
		u = figures(a.usage)
	}
	if a.image != "" {
		u.ExecutedVersion = new(a.image)
	}
	u.ExitCode, u.OomKilled = a.exitCode, a.oom
	return u
}

func figures(u *shim.Usage) *runnerv1.ResourceUsage {
	p := &runnerv1.ResourceUsage{
		Source: "kubernetes", CpuSeconds: u.CPUSeconds, MemoryMb: u.MemoryMB, PeakMemoryMb: u.PeakMemoryMB,
		DiskReadMb: u.DiskReadMB, DiskWriteMb: u.DiskWriteMB, NetworkRxMb: u.NetworkRxMB, NetworkTxMb: u.NetworkTxMB,
	}
	if u.CPUSeconds != nil && u.Seconds > 0 {
		p.CpuUsagePercent = new(*u.CPUSeconds / u.Seconds * 100)
	}
	return p
}

func (a *attempt) run(ctx context.Context) (json.RawMessage, error) {
	telemetry.Enter(ctx, "policy")
	_, check := telemetry.Start(ctx, "policy check")
	var err error
	a.p, err = dockerrunner.Prepare(a.job, a.r.o.Ceiling, a.checks)
	if err == nil {
		err = refuse(a.p, a.checks)
	}
	check.End()
	if err != nil {
		return nil, err
	}
	return a.p.Run(ctx, a.runBounded)
}

func (a *attempt) runBounded(ctx context.Context) (_ json.RawMessage, err error) {
	telemetry.Enter(ctx, "sandbox")
	if err := a.r.synced(ctx); err != nil {
		return nil, err
	}
	// The container goes on with this span's trace.
	ctx, remote := telemetry.Start(ctx, "remote")
	defer remote.End()
	w, err := a.r.compose(ctx, a.job, a.p, a.sink)
	if err != nil {
		return nil, err
	}
	a.isolation = w.isolation
	// Before the Job, so that nothing is missed.
	wake, leave := a.r.watchers.join(a.name)
	defer leave()
	defer func() {
		telemetry.Enter(ctx, "cleanup")
		if runner.HandedBack(ctx) {
			return // another runner goes on with the Job
		}
		if left := a.remove(ctx, err != nil, wake); left != nil {
			err = &dockerrunner.LeftError{Err: left}
		}
	}()
	if err := a.ensure(ctx, w); err != nil {
		return nil, err
	}
	telemetry.Enter(ctx, "remote")
	return a.follow(ctx, wake)
}

// ensure makes the Job, or takes over the one that is there for this very call.
func (a *attempt) ensure(ctx context.Context, w *work) error {
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		made, err := a.create(ctx, w)
		if err == nil {
			a.uid, a.key = string(made.UID), w.key
			return a.release(ctx, made, w)
		}
		if !apierrors.IsAlreadyExists(err) {
			return a.r.api.fault(err, "make a Job")
		}
		found, err := a.r.api.jobs.Get(ctx, a.name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return a.r.api.fault(err, "look at a Job")
		}
		switch {
		case found.Labels[labelManagedBy] != managedBy:
			return fault.New(fault.Unavailable, "the namespace %s has a Job %s that is not the runner's; take it away", a.r.o.Namespace, a.name)
		case found.DeletionTimestamp == nil && found.Annotations[annotationCall] == w.job.Annotations[annotationCall] && !suspended(found):
			return a.attach(ctx, found)
		default:
			// An earlier attempt's, or one that was never let go.
			if err := a.delete(ctx, found); err != nil {
				return err
			}
			if err := a.settle(ctx); err != nil {
				return err
			}
		}
	}
}

func suspended(j *batchv1.Job) bool { return j.Spec.Suspend != nil && *j.Spec.Suspend }

// settle waits a moment for what changes without telling.
func (a *attempt) settle(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(pause):
		return nil
	}
}

// create asks for the Job. It is not given up half-way, which could leave one behind.
func (a *attempt) create(ctx context.Context, w *work) (*batchv1.Job, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
	defer cancel()
	return a.r.api.jobs.Create(ctx, w.job, metav1.CreateOptions{})
}

// release makes what the Job needs, as a part of it, and lets it go.
func (a *attempt) release(ctx context.Context, made *batchv1.Job, w *work) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	secrets := w.inputs
	if w.credentials != nil {
		secrets = append(secrets, w.credentials)
	}
	for _, s := range secrets {
		s.OwnerReferences = []metav1.OwnerReference{{APIVersion: "batch/v1", Kind: "Job", Name: made.Name, UID: made.UID}}
		if _, err := a.r.api.secrets.Create(ctx, s, metav1.CreateOptions{}); err != nil {
			return a.r.api.fault(err, "make a Secret")
		}
	}
	if _, err := a.r.api.jobs.Patch(ctx, made.Name, types.MergePatchType, []byte(`{"spec":{"suspend":false}}`), metav1.PatchOptions{}); err != nil {
		return a.r.api.fault(err, "start a Job")
	}
	return nil
}

// attach goes on with a Job that another runner began, or this one before it began anew.
func (a *attempt) attach(ctx context.Context, found *batchv1.Job) error {
	a.uid, a.key = string(found.UID), keyOf(found)
	if found.Labels[labelRunner] != a.r.instance {
		patch := fmt.Sprintf(`{"metadata":{"uid":%q,"labels":{%q:%q}}}`, found.UID, labelRunner, a.r.instance)
		if _, err := a.r.api.jobs.Patch(ctx, found.Name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
			return a.r.api.fault(err, "take over a Job")
		}
	}
	a.r.log.InfoContext(ctx, "go on with a Job in flight", slog.String("job", a.name))
	a.sink.Log("runner", "going on with the Job "+a.name)
	return nil
}

// follow waits for the Job's end and makes the result of it.
func (a *attempt) follow(ctx context.Context, wake <-chan struct{}) (json.RawMessage, error) {
	capture := dockerrunner.NewCapture(a.sink)
	reading, stopReading := context.WithCancel(context.WithoutCancel(ctx))
	defer stopReading()
	transcript := &transcript{a: a, capture: capture}
	var read chan error
	done := make(chan struct{})
	defer func() {
		stopReading()
		if read != nil {
			<-done
		}
	}()
	late := time.NewTimer(patience)
	defer late.Stop()
	said, seen, told := "", false, false
	for {
		pod := a.r.podOf(a.name, a.uid)
		var s sight
		if pod != nil {
			seen = true
			s = look(ctx, pod, a.p)
			if s.image != "" {
				a.image = s.image
			}
			if s.waiting != "" && s.waiting != said && s.waiting != "PodInitializing" && s.waiting != "ContainerCreating" {
				said = s.waiting
				a.sink.Log("runner", "the pod waits: "+s.waiting)
			}
		} else if seen {
			return nil, fault.New(fault.Unavailable, "somebody took the pod of the Job %s away", a.name)
		}
		if s.failed != nil && s.ended == nil {
			return nil, s.failed
		}
		if s.started && read == nil {
			read = make(chan error, 1)
			go func() {
				defer close(done)
				read <- transcript.read(reading, pod.Name)
			}()
		}
		if s.ended != nil {
			return a.result(ctx, &s, transcript, read)
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-wake:
		case <-late.C:
			if seen {
				continue
			}
			if err := a.gone(ctx); err != nil {
				return nil, err
			}
			if !told {
				told = true
				a.sink.Log("runner", "the cluster has made no pod for the Job yet; kubectl describe job "+a.name+" in "+a.r.o.Namespace+" says why")
			}
			late.Reset(patience)
		}
	}
}

// gone says why no pod will come of the Job any more, which no pod tells; nil while one may.
func (a *attempt) gone(ctx context.Context) error {
	found, err := a.r.api.jobs.Get(ctx, a.name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) || err == nil && string(found.UID) != a.uid {
		return fault.New(fault.Unavailable, "somebody took the Job %s away", a.name)
	}
	if err != nil {
		return nil //nolint:nilerr // it is asked again
	}
	for _, c := range found.Status.Conditions {
		if c.Status != corev1.ConditionTrue || c.Type != batchv1.JobFailed && c.Type != batchv1.JobComplete {
			continue
		}
		// The watch may be late, or away.
		pods, err := a.r.api.pods.List(ctx, metav1.ListOptions{LabelSelector: labelJob + "=" + a.name})
		if err != nil || len(pods.Items) > 0 {
			return nil //nolint:nilerr // it is asked again
		}
		return fault.New(fault.Unavailable, "the Job %s has ended (%s), and its pod is gone with what it said: %s", a.name, c.Type, clip(c.Message))
	}
	return nil
}

// result makes the result of a container that has ended.
func (a *attempt) result(ctx context.Context, s *sight, t *transcript, read <-chan error) (json.RawMessage, error) {
	var lost error
	select {
	case lost = <-read:
	case <-time.After(logTimeout):
		lost = fault.New(fault.Unavailable, "the last output of the pod did not come within %s", logTimeout)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if s.failed != nil {
		return nil, s.failed
	}
	killed := s.ended.Reason == "OOMKilled"
	report := t.report
	if report == nil && !killed {
		// The last words stay where the log is gone. Only the shim's are believed, which have its key:
		// a program can leave words of its own there, and find a way to end the shim.
		if words, err := shim.ParseWords([]byte(s.ended.Message), a.key); err == nil && int32(words.ExitCode) == s.ended.ExitCode { //nolint:gosec // an exit status fits
			report = words
		}
	}
	if report == nil {
		report = &shim.Report{ExitCode: int(s.ended.ExitCode), Usage: a.usage}
		if !killed {
			return nil, fault.New(fault.Unavailable, "the container ended with status %d (%s) and without the shim's report", s.ended.ExitCode, s.ended.Reason)
		}
	}
	if report.Usage != nil {
		a.usage = report.Usage
	}
	oom := killed || report.OOM
	a.exitCode, a.oom = new(int32(report.ExitCode)), &oom //nolint:gosec // an exit status fits
	if !oom {
		if err := shimFault(report); err != nil {
			return nil, err
		}
	}
	t.capture.Flush()
	var peak *float64
	if a.usage != nil {
		peak = a.usage.PeakMemoryMB
	}
	if err := a.p.Verdict(report.ExitCode, oom, peak, t.capture.ErrorTail()); err != nil {
		return nil, err
	}
	if lost != nil {
		return nil, lost
	}
	return t.capture.Output(t.file, report.ExitCode)
}

// transcript is what the shim has told.
type transcript struct {
	a       *attempt
	capture *dockerrunner.Capture
	next    uint64
	gap     bool
	file    []byte
	report  *shim.Report
}

// read takes the frames of a pod, through as many connections as it takes, until the report. Its
// error is that of the output, which is not whole.
func (t *transcript) read(ctx context.Context, pod string) error {
	var last error
	for ctx.Err() == nil {
		stream, err := t.a.r.api.log(ctx, pod, containerJob)
		if err == nil {
			err = t.take(stream)
			_ = stream.Close()
		}
		if t.report != nil {
			if t.gap {
				return fault.New(fault.Unavailable, "a part of the pod's output was gone before it was read, as where a node keeps too little of its logs")
			}
			return nil
		}
		if err != nil {
			last = err
			if apierrors.IsNotFound(err) {
				break
			}
		}
		if p := t.a.r.podOf(t.a.name, t.a.uid); p == nil || look(ctx, p, t.a.p).ended != nil && err == nil {
			break // it has ended, and all that is left was read
		}
		if t.a.settle(ctx) != nil {
			break
		}
	}
	if last != nil {
		return fault.Wrap(last, fault.Unavailable, "the output of the pod could not be read to its end: %s", clip(last.Error()))
	}
	return fault.New(fault.Unavailable, "the output of the pod ended without the shim's report")
}

// take takes frames until the end of a connection; those that came before are passed over.
func (t *transcript) take(stream io.Reader) error {
	frames := shim.NewFrameReader(stream)
	for {
		f, err := frames.Next()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case errors.Is(err, shim.ErrFrame):
			t.a.r.log.Debug("a line of a pod that is not the shim's", slog.Any("error", err))
			continue
		case err != nil:
			return fmt.Errorf("read the pod's log: %w", err)
		}
		if f.Number < t.next {
			continue
		}
		t.gap = t.gap || f.Number > t.next
		t.next = f.Number + 1
		if err := t.frame(f); err != nil {
			return err
		}
		if t.report != nil {
			return nil
		}
	}
}

func (t *transcript) frame(f shim.Frame) error {
	line := func(take func([]byte), end bool) {
		take(f.Text)
		if end {
			take([]byte{'\n'})
		}
	}
	switch f.Kind {
	case shim.KindStdout, shim.KindStdoutPart:
		line(t.capture.Stdout, f.Kind == shim.KindStdout)
	case shim.KindStderr, shim.KindStderrPart:
		line(t.capture.Stderr, f.Kind == shim.KindStderr)
	case shim.KindFile, shim.KindFilePart:
		if len(t.file) <= maxOutput {
			line(func(b []byte) { t.file = append(t.file, b...) }, f.Kind == shim.KindFile)
		}
	case shim.KindUsage:
		var u shim.Usage
		if err := json.Unmarshal(f.Text, &u); err != nil {
			return fmt.Errorf("read the shim's figures: %w", err)
		}
		t.a.sink.Usage(figures(&u))
	case shim.KindReport:
		report, err := shim.ParseReport(f.Text)
		if err != nil {
			return fmt.Errorf("read the shim's report: %w", err)
		}
		t.report = report
	}
	return nil
}

// remove takes the Job away with all that belongs to it, unless another runner goes on with it.
// Where the job may still run, it waits until the pod is gone.
func (a *attempt) remove(ctx context.Context, mayRun bool, wake <-chan struct{}) error {
	if a.uid == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
	defer cancel()
	for {
		found, err := a.r.api.jobs.Get(ctx, a.name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) || err == nil && (string(found.UID) != a.uid || found.Labels[labelRunner] != a.r.instance) {
			break
		}
		if err == nil && found.DeletionTimestamp == nil {
			err = a.delete(ctx, found)
		}
		if err == nil {
			break
		}
		if a.settle(ctx) != nil {
			return fault.Wrap(err, fault.Unavailable, "the Job %s could not be removed: %s; remove it with kubectl delete job", a.name, clip(err.Error()))
		}
	}
	if !mayRun {
		return nil
	}
	for {
		pod := a.r.podOf(a.name, a.uid)
		if pod == nil || ended(pod) {
			return nil
		}
		select {
		case <-wake:
		case <-ctx.Done():
			return fault.New(fault.Unavailable, "the pod of the Job %s did not end within %s; look at its node", a.name, removeTimeout)
		}
	}
}

// ended says whether no process of a pod runs any more.
func ended(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
}

// delete removes the very Job that was looked at; one that has changed or gone is left.
func (a *attempt) delete(ctx context.Context, found *batchv1.Job) error {
	err := a.r.api.jobs.Delete(ctx, found.Name, metav1.DeleteOptions{
		PropagationPolicy: new(metav1.DeletePropagationBackground),
		Preconditions:     &metav1.Preconditions{UID: &found.UID, ResourceVersion: &found.ResourceVersion},
	})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if apierrors.IsConflict(err) {
		return fault.Wrap(err, fault.Unavailable, "the Job %s is being changed by others", found.Name)
	}
	return a.r.api.fault(err, "remove a Job")
}
