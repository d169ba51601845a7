package kubernetes

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"path"
	"strconv"
	"strings"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/services/docker-runner/dockerrunner"
	"github.com/specql/mesh/services/docker-runner/internal/shim"
)

// Labels and annotations of what the runner makes.
const (
	// labelManagedBy tells the runner's objects from all others.
	labelManagedBy = "app.kubernetes.io/managed-by"
	managedBy      = "specql-docker-runner"
	// labelRunner is the runner that goes on with the Job; it changes.
	labelRunner = "specql.dev/runner"
	// labelJob is the Job's name, on its pod.
	labelJob = "specql.dev/job"
	// labelNetwork is none or bridge: the chart's network policies go by it.
	labelNetwork = "specql.dev/network"
	// annotationID is the id of the call, annotationCall a digest of all that it is.
	annotationID   = "specql.dev/id"
	annotationCall = "specql.dev/call"
)

// Names in a pod.
const (
	containerJob  = "job"
	containerShim = "shim"
	volumeJob     = "job"
	volumeShim    = "shim"
	volumeOutput  = "output"
)

const (
	// maxPart is the largest part of an input in bytes: a Secret holds no more than 1 MiB.
	maxPart = 768 << 10
	// maxOutput bounds stdout and output.json, in bytes.
	maxOutput = 4 << 20
	// defaultOutputQuota bounds /specql, in bytes.
	defaultOutputQuota = 16 << 20
	// deadlineGrace is how long after a call's last moment the cluster ends its Job by itself:
	// clocks differ, and a living runner ends it long before.
	deadlineGrace = 5 * time.Minute
	// keepEnded is how long, in seconds, a Job stays that has ended and that nobody took away.
	keepEnded = 600
	// shimMemory and shimCPU are what the init container that places the shim needs.
	shimMemory, shimCPU = "32Mi", "50m"
	// The users that Jobs run as which name none: one for each, so that the kernel's bound of a
	// user's processes is the Job's.
	firstUser, users = 1 << 20, 1 << 29
	mebibyte         = 1 << 20
)

// nameOf is the name of a call's Job: whoever asks for the call finds it.
func nameOf(id string) string {
	sum := sha256.Sum256([]byte(id))
	return "specql-" + hex.EncodeToString(sum[:10])
}

// callOf is a digest of all that a call is. A Job with another one is another attempt's.
func callOf(job *runner.Job, policies string) string {
	return runner.Digest([]any{
		job.ID, job.Attempt, job.IdempotencyKey, job.Service.Name, job.Operation.Name, runner.Digest(job.Service.Config), runner.Digest(job.Operation.Config),
		runner.Digest(job.Input), policies,
	})
}

// numericUser reads uid or uid:gid. Kubernetes must know that it is not root.
func numericUser(text string) (uid, gid int64, err error) {
	if text == "" {
		return 0, 0, nil
	}
	user, group, both := strings.Cut(text, ":")
	if uid, err = strconv.ParseInt(user, 10, 32); err != nil || uid < 1 {
		return 0, 0, fmt.Errorf("%.100q is not a number above 0: a cluster has to know before it pulls an image that it does not run as root", user)
	}
	gid = uid
	if both {
		if gid, err = strconv.ParseInt(group, 10, 32); err != nil || gid < 1 {
			return 0, 0, fmt.Errorf("%.100q is not a number above 0: a cluster has to know before it pulls an image that it does not run as root", group)
		}
	}
	return uid, gid, nil
}

func randomName() string { return strings.ToLower(rand.Text()[:16]) }

// drawUser draws a user for one Job.
func drawUser() int64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // it never fails
	return firstUser + int64(binary.LittleEndian.Uint64(b[:])%users)
}

// work is all that is made for one call.
type work struct {
	job *batchv1.Job
	// inputs are Secrets with the job's file and the parts of its input; credentials is that of a
	// registry, nil for none. They are the Job's: they go with it.
	inputs      []*corev1.Secret
	credentials *corev1.Secret
	isolation   []string
	// key is what the shim's last words have.
	key string
}

// keyOf is the key of a Job that another runner made; empty where it has none.
func keyOf(j *batchv1.Job) string {
	for _, c := range j.Spec.Template.Spec.Containers {
		for _, v := range c.Env {
			if c.Name == containerJob && v.Name == shim.KeyVariable {
				return v.Value
			}
		}
	}
	return ""
}

// compose makes the objects of a call, which go for themselves.
func (r *Runner) compose(ctx context.Context, job *runner.Job, p *dockerrunner.Prepared, sink runner.Sink) (*work, error) {
	cfg := &p.Config
	image, err := p.Pinned()
	if err != nil {
		return nil, err
	}
	entrypoint, args, err := p.Arguments()
	if err != nil {
		return nil, err
	}
	program := append(append([]string{}, entrypoint...), args...)
	if len(program) == 0 {
		return nil, fault.New(fault.Validation, "a cluster does not tell what an image runs by itself; give runner_config.command with the program in front")
	}
	uid, gid, err := numericUser(cfg.User)
	if err != nil {
		return nil, fault.New(fault.Validation, "runner_config.user: %v", err)
	}
	spec := shim.Spec{Program: program, Environment: p.Environment(ctx), NoNetwork: p.Network() == dockerrunner.NetworkNone, MaxOutput: maxOutput}
	if uid == 0 {
		uid = drawUser()
		gid = uid
		spec.Processes = p.Limits.Processes
	}
	if p.Limits.DiskMB > 0 {
		spec.FileBytes = bytesOf(p.Limits.DiskMB)
	}
	w := &work{key: rand.Text(), isolation: []string{"kubernetes_job", "capabilities_dropped", "no_new_privileges", "private_namespaces", "seccomp", "run_as_non_root", "cgroup"}}
	add := func(name string, held bool) {
		if held {
			w.isolation = append(w.isolation, name)
		}
	}
	add("read_only_root", cfg.IsReadOnly())
	add("no_network", spec.NoNetwork)
	add("processes_limit", spec.Processes > 0)
	add("memory_limit", p.Limits.MemoryMB > 0)
	add("cpu_limit", p.Limits.CPUCores > 0)
	add("disk_limit", p.Limits.DiskMB > 0)
	add("own_kernel", r.o.Pod.RuntimeClassName != "")

	name := nameOf(job.ID)
	suffix := randomName()
	labels := map[string]string{labelManagedBy: managedBy, labelRunner: r.instance}
	podLabels := map[string]string{labelManagedBy: managedBy, labelJob: name, labelNetwork: p.Network()}
	sources, err := w.secrets(name+"-"+suffix, &spec, p.Input)
	if err != nil {
		return nil, err
	}
	mounts, volumes, err := places(p, sources)
	if err != nil {
		return nil, err
	}
	pulls := make([]corev1.LocalObjectReference, 0, len(r.o.PullSecrets)+1)
	for _, secret := range r.o.PullSecrets {
		pulls = append(pulls, corev1.LocalObjectReference{Name: secret})
	}
	if auth := cfg.RegistryAuth; auth != nil {
		if w.credentials, err = credentials(p, auth, name+"-"+suffix+"-registry", sink); err != nil {
			return nil, err
		}
		pulls = append(pulls, corev1.LocalObjectReference{Name: w.credentials.Name})
	}
	small := corev1.ResourceList{corev1.ResourceMemory: resource.MustParse(shimMemory), corev1.ResourceCPU: resource.MustParse(shimCPU)}
	locked := &corev1.SecurityContext{
		AllowPrivilegeEscalation: new(false), ReadOnlyRootFilesystem: new(true), Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
	}
	held := locked.DeepCopy()
	held.ReadOnlyRootFilesystem = new(cfg.IsReadOnly())
	pod := corev1.PodSpec{
		RestartPolicy:                 corev1.RestartPolicyNever,
		TerminationGracePeriodSeconds: new(int64(1)),
		ServiceAccountName:            r.o.ServiceAccount,
		AutomountServiceAccountToken:  new(false),
		EnableServiceLinks:            new(false),
		Hostname:                      "job",
		ImagePullSecrets:              pulls,
		NodeSelector:                  r.o.Pod.NodeSelector,
		Tolerations:                   r.o.Pod.Tolerations,
		Volumes:                       volumes,
		SecurityContext: &corev1.PodSecurityContext{
			RunAsNonRoot: new(true), RunAsUser: new(uid), RunAsGroup: new(gid), FSGroup: new(gid),
			SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
		},
		InitContainers: []corev1.Container{{
			Name: containerShim, Image: r.o.ShimImage, ImagePullPolicy: corev1.PullIfNotPresent, Command: []string{"/shim", shim.CommandInstall, shim.Program},
			SecurityContext: locked, Resources: corev1.ResourceRequirements{Requests: small, Limits: small},
			VolumeMounts: []corev1.VolumeMount{{Name: volumeShim, MountPath: shim.Place}},
		}},
		Containers: []corev1.Container{{
			Name: containerJob, Image: image, ImagePullPolicy: pullPolicy(cfg.PullPolicy), Command: []string{shim.Program}, Args: []string{shim.CommandRun, shim.JobPlace},
			// The shim keeps it to itself. The program's own variables go by the job's file: the cluster expands what is here.
			Env:        []corev1.EnvVar{{Name: shim.KeyVariable, Value: w.key}},
			WorkingDir: cfg.WorkingDir, SecurityContext: held, Resources: resources(&p.Limits), VolumeMounts: mounts,
			TerminationMessagePath: shim.TerminationLog, TerminationMessagePolicy: corev1.TerminationMessageReadFile,
		}},
	}
	if r.o.Pod.RuntimeClassName != "" {
		pod.RuntimeClassName = new(r.o.Pod.RuntimeClassName)
	}
	w.job = &batchv1.Job{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels, Annotations: map[string]string{annotationID: clip(job.ID), annotationCall: callOf(job, p.Digest())}},
		Spec: batchv1.JobSpec{
			// It is let go once what it needs is there.
			Suspend: new(true), BackoffLimit: new(int32(0)), Completions: new(int32(1)), Parallelism: new(int32(1)), TTLSecondsAfterFinished: new(int32(keepEnded)),
			PodReplacementPolicy: new(batchv1.Failed),
			Template:             corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: podLabels}, Spec: pod},
		},
	}
	if deadline, ok := ctx.Deadline(); ok {
		w.job.Spec.ActiveDeadlineSeconds = new(int64(max(time.Until(deadline), 0)+deadlineGrace) / int64(time.Second))
	}
	return w, nil
}

// secrets packs the job's file and its input, and gives what a volume is made of.
func (w *work) secrets(name string, spec *shim.Spec, input []byte) ([]corev1.VolumeProjection, error) {
	for rest := input; len(rest) > 0; spec.Parts++ {
		n := min(len(rest), maxPart)
		w.inputs = append(w.inputs, secret(name+"-"+strconv.Itoa(spec.Parts), shim.InputPart+strconv.Itoa(spec.Parts), rest[:n]))
		rest = rest[n:]
	}
	text, err := json.Marshal(spec)
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, "the job cannot be packed")
	}
	if len(text) > maxPart {
		return nil, fault.New(fault.Validation, "command and environment take %d bytes, more than the %d that a Job may have; pass large data by the input", len(text), maxPart)
	}
	w.inputs = append(w.inputs, secret(name, shim.JobFile, text))
	sources := make([]corev1.VolumeProjection, 0, len(w.inputs))
	for _, s := range w.inputs {
		sources = append(sources, corev1.VolumeProjection{Secret: &corev1.SecretProjection{LocalObjectReference: corev1.LocalObjectReference{Name: s.Name}}})
	}
	return sources, nil
}

func secret(name, key string, data []byte) *corev1.Secret {
	return &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{labelManagedBy: managedBy}},
		Immutable:  new(true), Type: corev1.SecretTypeOpaque, Data: map[string][]byte{key: data},
	}
}

// credentials packs those of a registry as kubelets read them.
func credentials(p *dockerrunner.Prepared, auth *dockerrunner.RegistryAuth, name string, sink runner.Sink) (*corev1.Secret, error) {
	user, err := runner.ResolveSecret(sink, auth.UsernameEnvVar)
	if err != nil {
		return nil, fmt.Errorf("registry_auth: %w", err)
	}
	password, err := runner.ResolveSecret(sink, auth.PasswordEnvVar)
	if err != nil {
		return nil, fmt.Errorf("registry_auth: %w", err)
	}
	_, registry := p.Image()
	if registry == "docker.io" {
		registry = "https://index.docker.io/v1/" // as kubelets look for it
	}
	text, err := json.Marshal(map[string]any{"auths": map[string]any{registry: map[string]string{"auth": base64.StdEncoding.EncodeToString([]byte(user + ":" + password))}}})
	if err != nil {
		return nil, fault.New(fault.Validation, "the credentials of registry_auth cannot be sent")
	}
	s := secret(name, corev1.DockerConfigJsonKey, text)
	s.Type = corev1.SecretTypeDockerConfigJson
	return s, nil
}

// places are the volumes of a pod and where the job's container has them.
func places(p *dockerrunner.Prepared, job []corev1.VolumeProjection) ([]corev1.VolumeMount, []corev1.Volume, error) {
	quota := int64(defaultOutputQuota)
	if p.Limits.DiskMB > 0 {
		quota = min(quota, bytesOf(p.Limits.DiskMB))
	}
	volumes := []corev1.Volume{
		{Name: volumeShim, VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{SizeLimit: size(64 << 20)}}},
		{Name: volumeJob, VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: job, DefaultMode: new(int32(0o440))}}},
		{Name: volumeOutput, VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{SizeLimit: size(quota)}}},
	}
	mounts := []corev1.VolumeMount{
		{Name: volumeShim, MountPath: shim.Place, ReadOnly: true},
		{Name: volumeJob, MountPath: shim.JobPlace, ReadOnly: true},
		{Name: volumeOutput, MountPath: shim.OutputPlace},
	}
	directories, err := p.Directories()
	if err != nil {
		return nil, nil, fmt.Errorf("in-memory directories: %w", err)
	}
	for i, d := range directories {
		if within(d.Path, path.Dir(shim.Place)) {
			return nil, nil, fault.New(fault.Validation, "tmpfs %s: the runner's own files are there; mount it elsewhere", clip(d.Path))
		}
		name := "memory-" + strconv.Itoa(i)
		volumes = append(volumes, corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: corev1.StorageMediumMemory, SizeLimit: size(d.Bytes)}}})
		mounts = append(mounts, corev1.VolumeMount{Name: name, MountPath: d.Path})
	}
	return mounts, volumes, nil
}

func within(p, dir string) bool { return p == dir || strings.HasPrefix(p, dir+"/") }

func size(bytes int64) *resource.Quantity { return resource.NewQuantity(bytes, resource.BinarySI) }

// bytesOf gives MiB as bytes; what is absurdly many stays a number.
func bytesOf(mb float64) int64 {
	const most = 1 << 30
	return int64(min(mb, most) * mebibyte)
}

// resources are the limits, which are asked for as well: what a Job may use is there for it.
func resources(l *dockerrunner.ResourceLimits) corev1.ResourceRequirements {
	list := corev1.ResourceList{}
	if l.CPUCores > 0 {
		const mostCores = 1 << 20
		list[corev1.ResourceCPU] = *resource.NewMilliQuantity(max(int64(min(l.CPUCores, mostCores)*1000), 1), resource.DecimalSI)
	}
	if l.MemoryMB > 0 {
		list[corev1.ResourceMemory] = *size(bytesOf(l.MemoryMB))
	}
	if l.DiskMB > 0 {
		list[corev1.ResourceEphemeralStorage] = *size(bytesOf(l.DiskMB))
	}
	if len(list) == 0 {
		return corev1.ResourceRequirements{}
	}
	return corev1.ResourceRequirements{Limits: list, Requests: list.DeepCopy()}
}

func pullPolicy(policy string) corev1.PullPolicy {
	switch policy {
	case "always":
		return corev1.PullAlways
	case "never":
		return corev1.PullNever
	default:
		return corev1.PullIfNotPresent
	}
}

// refuse says what of a call a cluster has no meaning for; nil for nothing.
func refuse(p *dockerrunner.Prepared, checks *runner.Checks) error {
	for _, problem := range unsupported(&p.Config) {
		return fault.New(fault.Validation, "%s: %s; %s", problem.Path, problem.Message, problem.Mend)
	}
	if p.Config.User != "" && p.Limits.Processes > 0 {
		if rule, where := p.LimitRule("processes"); rule != "" {
			return checks.Deny(rule, strconv.FormatInt(p.Limits.Processes, 10),
				"a cluster cannot hold one Job of a user that others have, too, to it; take runner_config.user out, or the limit out of "+where)
		}
	}
	return nil
}
