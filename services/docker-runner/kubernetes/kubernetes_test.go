package kubernetes

import (
	"encoding/json"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	batchv1 "k8s.io/api/batch/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/services/docker-runner/dockerrunner"
	"github.com/specql/mesh/services/docker-runner/internal/shim"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type object = map[string]any

type sink struct {
	lines   []string
	secrets []string
}

func (s *sink) Log(stream, line string)          { s.lines = append(s.lines, stream+": "+line) }
func (*sink) Usage(*runnerv1.ResourceUsage)      {}
func (s *sink) Secret(value string)              { s.secrets = append(s.secrets, value) }
func raw(t *testing.T, v object) json.RawMessage { t.Helper(); return must(t, v) }

func must(t *testing.T, v any) json.RawMessage {
	t.Helper()
	if v == nil {
		return nil
	}
	text, err := json.Marshal(v)
	require.NoError(t, err)
	return text
}

func jobOf(t *testing.T, config, policy object) *runner.Job {
	t.Helper()
	full := object{"image": "registry.example.org/tools/convert:1.2", "command": []string{"convert", "$input.name"}}
	for k, v := range config {
		if full[k] = v; v == nil {
			delete(full, k)
		}
	}
	allowed := object{"allowed_images": []string{"registry.example.org/tools/*"}}
	maps.Copy(allowed, policy)
	return &runner.Job{
		ID: "run/step", RunID: "run", Attempt: 1, IdempotencyKey: "key", Input: json.RawMessage(`{"name":"a b; c"}`),
		Service:   runner.Service{Name: "convert", ExecutionType: "docker", Config: raw(t, full), Policy: raw(t, allowed)},
		Operation: runner.Operation{Name: "run", Config: json.RawMessage("{}")},
	}
}

func composed(t *testing.T, job *runner.Job, o Options) (*work, *sink, error) {
	t.Helper()
	s, checks := &sink{}, &runner.Checks{}
	p, err := dockerrunner.Prepare(job, o.Ceiling, checks)
	if err == nil {
		err = refuse(p, checks)
	}
	if err != nil {
		return nil, s, err
	}
	if o.ShimImage == "" {
		o.ShimImage = "specql/docker-runner:1"
	}
	r := &Runner{o: o, instance: "me"}
	w, err := r.compose(t.Context(), job, p, s)
	return w, s, err
}

func specOf(t *testing.T, w *work) (spec shim.Spec) {
	t.Helper()
	for _, s := range w.inputs {
		if text, ok := s.Data[shim.JobFile]; ok {
			require.NoError(t, json.Unmarshal(text, &spec))
			return spec
		}
	}
	require.Fail(t, "no job file")
	return spec
}

// TestRestricted: every pod is what the restricted Pod Security allows, whatever a service says.
func TestRestricted(t *testing.T) {
	t.Parallel()
	for name, config := range map[string]object{
		"nothing said": nil,
		"all said": {
			"user": "1000:1001", "read_only": false, "tmpfs": []string{"/cache:size=8m"}, "network_mode": "bridge", "working_dir": "/work", "entrypoint": []string{"/bin/tool"},
		},
	} {
		w, _, err := composed(t, jobOf(t, config, object{"allowed_networks": []string{"bridge"}}), Options{})
		require.NoError(t, err, name)
		pod := w.job.Spec.Template.Spec
		require.False(t, *pod.AutomountServiceAccountToken)
		require.False(t, *pod.EnableServiceLinks)
		require.False(t, pod.HostNetwork || pod.HostPID || pod.HostIPC)
		require.Equal(t, corev1.RestartPolicyNever, pod.RestartPolicy)
		require.True(t, *pod.SecurityContext.RunAsNonRoot)
		require.Positive(t, *pod.SecurityContext.RunAsUser)
		require.Equal(t, corev1.SeccompProfileTypeRuntimeDefault, pod.SecurityContext.SeccompProfile.Type)
		for _, c := range append(pod.InitContainers, pod.Containers...) {
			require.False(t, *c.SecurityContext.AllowPrivilegeEscalation)
			require.Equal(t, []corev1.Capability{"ALL"}, c.SecurityContext.Capabilities.Drop)
			require.Nil(t, c.SecurityContext.Privileged)
			for _, v := range c.Env {
				require.Equal(t, shim.KeyVariable, v.Name, "variables are expanded by the cluster; they go by the job's file")
			}
		}
		for _, v := range pod.Volumes {
			require.True(t, v.EmptyDir != nil || v.Projected != nil, "%v", v)
		}
		require.Equal(t, name != "all said", *pod.Containers[0].SecurityContext.ReadOnlyRootFilesystem)
		require.Equal(t, int32(0), *w.job.Spec.BackoffLimit)
		require.True(t, *w.job.Spec.Suspend)
	}
}

func TestWhatAJobIs(t *testing.T) {
	t.Parallel()
	job := jobOf(t, object{"environment": object{"LEVEL": "$(PATH)"}, "user": "1000:1001", "working_dir": "/work"},
		object{"resource_limits": object{"cpu_cores": 0.5, "memory_mb": 64, "disk_mb": 8}})
	w, _, err := composed(t, job, Options{
		ServiceAccount: "jobs", PullSecrets: []string{"registry"}, Pod: Placement{NodeSelector: map[string]string{"pool": "jobs"}, RuntimeClassName: "gvisor"},
	})
	require.NoError(t, err)
	require.Equal(t, nameOf("run/step"), w.job.Name)
	require.Equal(t, "me", w.job.Labels[labelRunner])
	template := w.job.Spec.Template
	require.Equal(t, "none", template.Labels[labelNetwork])
	pod := template.Spec
	require.Equal(t, "jobs", pod.ServiceAccountName)
	require.Equal(t, []corev1.LocalObjectReference{{Name: "registry"}}, pod.ImagePullSecrets)
	require.Equal(t, map[string]string{"pool": "jobs"}, pod.NodeSelector)
	require.Equal(t, "gvisor", *pod.RuntimeClassName)
	require.EqualValues(t, 1000, *pod.SecurityContext.RunAsUser)
	require.EqualValues(t, 1001, *pod.SecurityContext.RunAsGroup)
	c := pod.Containers[0]
	require.Equal(t, "registry.example.org/tools/convert:1.2", c.Image)
	require.Equal(t, []string{shim.Program}, c.Command)
	require.Equal(t, "/work", c.WorkingDir)
	for _, list := range []corev1.ResourceList{c.Resources.Limits, c.Resources.Requests} {
		require.Equal(t, "500m", list.Cpu().String())
		require.Equal(t, "64Mi", list.Memory().String())
		require.Equal(t, "8Mi", list.StorageEphemeral().String())
	}
	spec := specOf(t, w)
	require.Equal(t, []string{"convert", "a b; c"}, spec.Program)
	require.Contains(t, spec.Environment, "LEVEL=$(PATH)")
	require.Contains(t, spec.Environment, `SPECQL_INPUT={"name":"a b; c"}`)
	require.True(t, spec.NoNetwork)
	require.EqualValues(t, 8<<20, spec.FileBytes)
	require.Zero(t, spec.Processes, "others may have this user, too")
	require.Subset(t, w.isolation, []string{"memory_limit", "cpu_limit", "disk_limit", "no_network", "own_kernel"})

	other := jobOf(t, nil, nil)
	a, _, err := composed(t, other, Options{})
	require.NoError(t, err)
	b, _, err := composed(t, other, Options{})
	require.NoError(t, err)
	require.NotEqual(t, keyOf(a.job), keyOf(b.job))
	require.Equal(t, a.key, keyOf(a.job), "whoever goes on with the Job knows its shim's last words")
	require.NotContains(t, string(must(t, specOf(t, a))), a.key)
	require.Empty(t, keyOf(&batchv1.Job{}))
	require.NotEqual(t, *a.job.Spec.Template.Spec.SecurityContext.RunAsUser, *b.job.Spec.Template.Spec.SecurityContext.RunAsUser, "each Job has a user of its own")
	require.EqualValues(t, 512, specOf(t, a).Processes)
	require.Equal(t, a.job.Annotations[annotationCall], b.job.Annotations[annotationCall])
	other.Attempt = 2
	b, _, err = composed(t, other, Options{})
	require.NoError(t, err)
	require.Equal(t, a.job.Name, b.job.Name)
	require.NotEqual(t, a.job.Annotations[annotationCall], b.job.Annotations[annotationCall], "another attempt is another Job of the same name")
}

func TestLargeInputsAreSplit(t *testing.T) {
	t.Parallel()
	job := jobOf(t, object{"command": []string{"wc"}}, nil)
	job.Input = must(t, object{"data": strings.Repeat("x", 3<<20)})
	w, _, err := composed(t, job, Options{})
	require.NoError(t, err)
	var joined []byte
	for i := range specOf(t, w).Parts {
		for key, data := range w.inputs[i].Data {
			require.True(t, strings.HasPrefix(key, shim.InputPart))
			require.LessOrEqual(t, len(data), 1<<20)
			joined = append(joined, data...)
		}
	}
	require.Equal(t, []byte(job.Input), joined)
	require.Contains(t, specOf(t, w).Environment, "SPECQL_INPUT_TOO_LARGE=1")
	require.Len(t, w.job.Spec.Template.Spec.Volumes[1].Projected.Sources, len(w.inputs))
}

func TestImagesArePinned(t *testing.T) {
	t.Parallel()
	const repo = "registry.example.org/tools/convert"
	one, two := "sha256:"+strings.Repeat("1", 64), "sha256:"+strings.Repeat("2", 64)
	for name, c := range map[string]struct {
		image            string
		allowed, ceiling []string
		runs, code       string
	}{
		"by a tag":                     {repo + ":1.2", []string{repo + ":1.2"}, nil, repo + ":1.2", ""},
		"by its pin":                   {repo + ":1.2", []string{repo + ":1.2@" + one}, nil, repo + "@" + one, ""},
		"by the pin of the ceiling":    {repo + ":1.2", []string{repo + ":*"}, []string{repo + "@" + one}, repo + "@" + one, ""},
		"by the pin that both allow":   {repo + ":1.2", []string{repo + "@" + one, repo + "@" + two}, []string{repo + "@" + two}, repo + "@" + two, ""},
		"pins that exclude each other": {repo + ":1.2", []string{repo + "@" + one}, []string{repo + "@" + two}, "", "POLICY_VIOLATION"},
		"another digest":               {repo + "@" + two, []string{repo + "@" + one}, nil, "", "POLICY_VIOLATION"},
		"an image ID":                  {one, []string{one}, nil, "", "VALIDATION"},
		"a pin of an engine's ID":      {repo + ":1.2", []string{one}, nil, "", "POLICY_VIOLATION"},
		"not listed":                   {"elsewhere.example.org/x:1", []string{repo + ":*"}, nil, "", "POLICY_VIOLATION"},
	} {
		var o Options
		if c.ceiling != nil {
			o.Ceiling = &dockerrunner.Policy{AllowedImages: c.ceiling}
		}
		w, _, err := composed(t, jobOf(t, object{"image": c.image}, object{"allowed_images": c.allowed}), o)
		if c.code != "" {
			require.Error(t, err, name)
			require.Equal(t, c.code, string(fault.From(err).Code), "%s: %v", name, err)
			continue
		}
		require.NoError(t, err, name)
		require.Equal(t, c.runs, w.job.Spec.Template.Spec.Containers[0].Image, name)
	}
}

func TestRefused(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		config, policy object
		code, says     string
	}{
		"a volume": {
			object{"volumes": []object{{"host_path": "/data", "container_path": "/data"}}},
			object{"volume_restrictions": object{"allowed_host_paths": []string{"/data"}}},
			"VALIDATION", "no one host",
		},
		"a network of an engine":          {object{"network_mode": "mine"}, object{"allowed_networks": []string{"mine"}}, "VALIDATION", "there are none and bridge"},
		"a network that no policy allows": {object{"network_mode": "bridge"}, nil, "POLICY_VIOLATION", "allowed_networks"},
		"the host's network":              {object{"network_mode": "host"}, object{"allowed_networks": []string{"*"}}, "POLICY_VIOLATION", "never shared"},
		"root":                            {object{"user": "0"}, nil, "VALIDATION", "not a number above 0"},
		"root's group":                    {object{"user": "5:0"}, nil, "VALIDATION", "not a number above 0"},
		"a user's name":                   {object{"user": "www-data"}, nil, "VALIDATION", "write uid or uid:gid in digits"},
		"no program":                      {object{"command": nil}, nil, "VALIDATION", "give runner_config.command"},
		"processes of a shared user":      {object{"user": "1000"}, object{"resource_limits": object{"processes": 10}}, "POLICY_VIOLATION", "runner_config.user"},
		"the shim's own place":            {object{"tmpfs": []string{"/.specql"}}, nil, "VALIDATION", "the runner's own files"},
		"code from the input":             {object{"command": []string{"sh", "-c", "echo $input.name"}}, nil, "VALIDATION", "run as code"},
		"created ahead":                   {object{"created_ahead": 2, "command": []string{"run"}}, nil, "VALIDATION", "leave it out"},
		"too much of environment":         {object{"environment": object{"A": strings.Repeat("x", 1<<20)}}, nil, "VALIDATION", "pass large data by the input"},
	} {
		_, _, err := composed(t, jobOf(t, c.config, c.policy), Options{})
		require.Error(t, err, name)
		require.Equal(t, c.code, string(fault.From(err).Code), "%s: %v", name, err)
		require.ErrorContains(t, err, c.says, name)
	}
	// validate-config tells it before anything runs.
	job := jobOf(t, object{"volumes": []object{{"host_path": "/data", "container_path": "/data"}}, "network_mode": "mine", "user": "root"}, nil)
	problems, err := (&Runner{}).Validate(t.Context(), &job.Service)
	require.NoError(t, err)
	var paths []string
	for _, p := range problems {
		if !p.Warning {
			paths = append(paths, p.Path)
		}
	}
	require.ElementsMatch(t, []string{"runner_config.network_mode", "runner_config.user", "runner_config.volumes"}, paths)
}

func TestCredentials(t *testing.T) {
	t.Setenv("TEST_REGISTRY_USER", "alice")
	t.Setenv("TEST_REGISTRY_PASSWORD", "s3cr3t-word")
	job := jobOf(t, object{"registry_auth": object{"username_env_var": "TEST_REGISTRY_USER", "password_env_var": "TEST_REGISTRY_PASSWORD"}}, nil)
	w, s, err := composed(t, job, Options{})
	require.NoError(t, err)
	require.Equal(t, corev1.SecretTypeDockerConfigJson, w.credentials.Type)
	require.JSONEq(t, `{"auths":{"registry.example.org":{"auth":"YWxpY2U6czNjcjN0LXdvcmQ="}}}`, string(w.credentials.Data[corev1.DockerConfigJsonKey]))
	require.Contains(t, s.secrets, "s3cr3t-word")
	require.Contains(t, w.job.Spec.Template.Spec.ImagePullSecrets, corev1.LocalObjectReference{Name: w.credentials.Name})
	require.NotContains(t, string(must(t, w.job)), "s3cr3t", "the Job itself has no secret")
	for _, v := range w.job.Spec.Template.Spec.Volumes {
		require.NotContains(t, string(must(t, v)), w.credentials.Name, "the program does not see it")
	}
}

func podThatEnded(reason, message string, code int32) *corev1.Pod {
	return &corev1.Pod{Status: corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{
		Name: containerJob, ImageID: "x@sha256:1", State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{Reason: reason, Message: message, ExitCode: code}},
	}}}}
}

func TestWhatPodsSay(t *testing.T) {
	t.Parallel()
	p, err := dockerrunner.Prepare(jobOf(t, nil, nil), nil, &runner.Checks{})
	require.NoError(t, err)
	waiting := func(reason, message string) corev1.PodStatus {
		return corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{Name: containerJob, State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}}}}}
	}
	ended := func(reason, message string, code int32) corev1.PodStatus {
		return podThatEnded(reason, message, code).Status
	}
	for name, c := range map[string]struct {
		status     corev1.PodStatus
		code, says string
		started    bool
	}{
		"being made":             {waiting("ContainerCreating", ""), "", "", false},
		"the shim comes first":   {waiting("PodInitializing", ""), "", "", false},
		"no such image":          {waiting("ErrImagePull", "manifest unknown"), "VALIDATION", "has no image", false},
		"a registry that is off": {waiting("ImagePullBackOff", "dial tcp: i/o timeout"), "UNAVAILABLE", "could not be reached", false},
		"a limit of pulls":       {waiting("ErrImagePull", "toomanyrequests: slow down"), "RATE_LIMITED", "limits how often", false},
		"never pulled":           {waiting("ErrImageNeverPull", "x"), "VALIDATION", "pull_policy is never", false},
		"no name":                {waiting("InvalidImageName", "x"), "VALIDATION", "for no image", false},
		"no working directory":   {waiting("CreateContainerError", "mkdir /proc/x: no such file"), "VALIDATION", "working_dir", false},
		"no shim":                {corev1.PodStatus{InitContainerStatuses: []corev1.ContainerStatus{{Name: containerShim, State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ErrImagePull"}}}}}, "UNAVAILABLE", "--kube-shim-image", false},
		"a shim that fails":      {corev1.PodStatus{InitContainerStatuses: []corev1.ContainerStatus{{Name: containerShim, State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 125, Message: "no"}}}}}, "UNAVAILABLE", "could not be placed", false},
		"too much on disk":       {corev1.PodStatus{Phase: corev1.PodFailed, Reason: "Evicted", Message: "Pod ephemeral local storage usage exceeds the total limit of containers 8Mi."}, "RESOURCE_EXCEEDED", "disk_mb", false},
		"a node in need":         {corev1.PodStatus{Phase: corev1.PodFailed, Reason: "Evicted", Message: "The node was low on resource: memory."}, "UNAVAILABLE", "the node ended the pod", false},
		"a node that leaves":     {corev1.PodStatus{Phase: corev1.PodFailed, Reason: "Terminated"}, "UNAVAILABLE", "Terminated", false},
		"its time is over":       {corev1.PodStatus{Phase: corev1.PodFailed, Reason: "DeadlineExceeded"}, "TIMEOUT", "after its time", false},
		"done":                   {ended("Completed", "{}", 0), "", "", true},
		"failed":                 {ended("Error", "{}", 3), "", "", true},
		"no start":               {ended("StartError", "no such file", 128), "VALIDATION", "no such file", true},
		"a node that is lost":    {ended("ContainerStatusUnknown", "", 137), "UNAVAILABLE", "was lost", true},
	} {
		s := look(t.Context(), &corev1.Pod{Status: c.status}, p)
		require.Equal(t, c.started, s.started, name)
		if c.code == "" {
			require.NoError(t, s.failed, name)
			continue
		}
		require.Error(t, s.failed, name)
		require.Equal(t, c.code, string(fault.From(s.failed).Code), "%s: %v", name, s.failed)
		require.ErrorContains(t, s.failed, c.says, name)
	}
}

func TestOrphans(t *testing.T) {
	t.Parallel()
	now := time.Now()
	job := func(name, owner string, age time.Duration) batchv1.Job {
		return batchv1.Job{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{labelRunner: owner}, CreationTimestamp: metav1.NewTime(now.Add(-age))}}
	}
	lease := func(owner string, age time.Duration) coordinationv1.Lease {
		at := metav1.NewMicroTime(now.Add(-age))
		return coordinationv1.Lease{Spec: coordinationv1.LeaseSpec{HolderIdentity: &owner, RenewTime: &at}}
	}
	going := job("going", "dead", time.Hour)
	going.DeletionTimestamp = &metav1.Time{Time: now}
	found := orphans([]batchv1.Job{
		job("mine", "me", time.Hour), job("of one alive", "alive", time.Hour), job("of one just gone", "late", time.Hour), job("of one gone", "dead", time.Hour),
		job("of one unknown", "nobody", time.Hour), job("of one that begins", "new", time.Second), going,
	}, []coordinationv1.Lease{lease("alive", time.Second), lease("late", time.Minute), lease("dead", time.Hour)}, "me", now)
	var names []string
	for _, j := range found {
		names = append(names, j.Name)
	}
	require.Equal(t, []string{"of one gone", "of one unknown"}, names)
}

func TestOptions(t *testing.T) {
	t.Parallel()
	for says, o := range map[string]Options{
		"--kube-namespace":  {ShimImage: "x", Namespace: "Jobs!"},
		"--kube-shim-image": {Namespace: "jobs"},
		"where the API":     {Namespace: "jobs", ShimImage: "x"},
		"allowed_images[0]": {Namespace: "jobs", ShimImage: "x", Ceiling: &dockerrunner.Policy{AllowedImages: []string{"*x"}}},
	} {
		_, err := New(o)
		require.ErrorContains(t, err, says)
	}
}

func TestTheReportDecides(t *testing.T) {
	t.Parallel()
	for says, r := range map[string]shim.Report{
		"there is no program":   {Start: `there is no program "x"`},
		"an output may have":    {Full: true},
		"not a regular file":    {Irregular: true},
		"where a node is drain": {Ended: true, ExitCode: 137},
	} {
		require.ErrorContains(t, shimFault(&r), says)
	}
	require.NoError(t, shimFault(&shim.Report{ExitCode: 3}))
}
