//go:build kube

package kubernetes

import (
	"encoding/json"
	"maps"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/durationpb"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/runnertest"
)

// These tests run on a real cluster: make kube-test brings one up, with the image of the probe and
// the runner's own on its node.
func node(t *testing.T) *Runner {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", os.Getenv("KUBECONFIG"))
	require.NoError(t, err)
	r, err := New(Options{Config: config, Namespace: os.Getenv("SPECQL_TEST_NAMESPACE"), ShimImage: os.Getenv("SPECQL_TEST_SHIM_IMAGE")})
	require.NoError(t, err)
	t.Cleanup(r.Close)
	require.NoError(t, r.Ping(t.Context()))
	return r
}

// onNode describes a job of the probe.
type onNode struct {
	args           []string
	config, policy object
	input          any
	id             string
	timeout        time.Duration
}

func (c onNode) job(t *testing.T) *runnerv1.Job {
	t.Helper()
	config := object{"image": os.Getenv("SPECQL_TEST_IMAGE"), "command": append([]string{"/probe"}, c.args...), "pull_policy": "never"}
	maps.Copy(config, c.config)
	policy := object{"allowed_images": []string{"specql-test/*"}}
	maps.Copy(policy, c.policy)
	input := c.input
	if input == nil {
		input = object{}
	}
	if c.id == "" {
		c.id = randomName()
	}
	if c.timeout == 0 {
		c.timeout = 2 * time.Minute
	}
	return &runnerv1.Job{
		Id: c.id, RunId: "run", Attempt: 1, IdempotencyKey: c.id, Timeout: durationpb.New(c.timeout), Input: must(t, input),
		Service:   &runnerv1.Service{Name: "probe", ExecutionType: "docker", RunnerConfig: must(t, config), SecurityPolicy: must(t, policy)},
		Operation: &runnerv1.Operation{Name: "run", Config: []byte("{}")},
	}
}

func (c onNode) run(t *testing.T, client runnerv1.RunnerServiceClient) *runnertest.Outcome {
	t.Helper()
	out := runnertest.Execute(t, client, c.job(t))
	require.NoError(t, out.Err)
	return out
}

func output(t *testing.T, o *runnertest.Outcome) (v object) {
	t.Helper()
	require.Empty(t, o.Code(), "%s", o.Finished.GetError().GetMessage())
	require.NoError(t, json.Unmarshal(o.Finished.GetOutput(), &v))
	return v
}

func (r *Runner) jobsLeft(t *testing.T) []string {
	t.Helper()
	list, err := r.api.jobs.List(t.Context(), metav1.ListOptions{LabelSelector: labelRunner + "=" + r.instance})
	require.NoError(t, err)
	var names []string
	for i := range list.Items {
		names = append(names, list.Items[i].Name)
	}
	return names
}

func TestNodeConformance(t *testing.T) {
	r := node(t)
	runnertest.Conformance(t, r, runnertest.Cases{
		Good:     onNode{args: []string{"echo-input"}, input: object{"name": "ada"}}.job(t),
		Slow:     onNode{args: []string{"ignore-signals"}}.job(t),
		SlowLine: "sleeping",
		Big:      onNode{args: []string{"flood"}}.job(t),
		Promptly: 10 * time.Second, // the kubelet has a say
		HandedOver: func(t *testing.T) {
			t.Helper()
			left := r.jobsLeft(t)
			require.Len(t, left, 1, "the Job goes on")
			found, err := r.api.jobs.Get(t.Context(), left[0], metav1.GetOptions{})
			require.NoError(t, err)
			require.Nil(t, found.DeletionTimestamp)
			pod := r.podOf(found.Name, string(found.UID))
			require.NotNil(t, pod)
			require.Equal(t, corev1.PodRunning, pod.Status.Phase)
			require.NoError(t, r.api.jobs.Delete(t.Context(), found.Name, metav1.DeleteOptions{PropagationPolicy: new(metav1.DeletePropagationForeground)}))
		},
		Gone: func(t *testing.T) {
			t.Helper()
			require.Eventually(t, func() bool { return len(r.jobsLeft(t)) == 0 }, 30*time.Second, 100*time.Millisecond)
		},
	})
}

func TestNodeInputOutputAndUsage(t *testing.T) {
	client := runnertest.Start(t, node(t))
	input := object{"name": "ada's $(reboot) \"file\"", "n": 12345678901234567}
	out := onNode{args: []string{"echo-input", "$input.name"}, input: input, policy: object{"resource_limits": object{"memory_mb": 128, "cpu_cores": 1}}}.run(t, client)
	v := output(t, out)
	require.Equal(t, true, v["same"])
	require.Equal(t, []any{input["name"]}, v["args"])
	u := out.Finished.GetUsage()
	require.Equal(t, "kubernetes", u.GetSource())
	require.Positive(t, u.GetCpuSeconds())
	require.Positive(t, u.GetPeakMemoryMb())
	require.EqualValues(t, 0, u.GetExitCode())
	require.NotEmpty(t, u.GetExecutedVersion())
	require.Subset(t, out.Finished.GetSecurity().GetIsolation(), []string{"kubernetes_job", "no_network", "memory_limit", "run_as_non_root"})
	t.Logf("usage: %v", u)

	large := onNode{args: []string{"count-input"}, input: object{"text": strings.Repeat("x", 3<<20)}}.run(t, client)
	require.Greater(t, output(t, large)["bytes"], float64(3<<20))

	burnt := onNode{args: []string{"burn", "1500ms"}}.run(t, client)
	require.Greater(t, burnt.Finished.GetUsage().GetCpuSeconds(), 0.5)
	require.NotEmpty(t, burnt.Usages, "figures come while it runs")

	file := onNode{args: []string{"write", "/specql/output.json", `{"from":"file"}`}}.run(t, client)
	require.Equal(t, object{"from": "file"}, output(t, file))
}

func TestNodeEnds(t *testing.T) {
	client := runnertest.Start(t, node(t))
	for name, c := range map[string]struct {
		job        onNode
		code, says string
	}{
		"status":              {onNode{args: []string{"exit", "3"}}, "REMOTE_ERROR", "status 3"},
		"memory":              {onNode{args: []string{"hog", "200"}, policy: object{"resource_limits": object{"memory_mb": 64}}}, "RESOURCE_EXCEEDED", "its limit is 64 MiB"},
		"a child's memory":    {onNode{args: []string{"hog-child", "200"}, policy: object{"resource_limits": object{"memory_mb": 64}}}, "RESOURCE_EXCEEDED", "its limit is 64 MiB"},
		"time":                {onNode{args: []string{"sleep", "60s"}, timeout: 8 * time.Second}, "TIMEOUT", ""},
		"no program":          {onNode{config: object{"command": []string{"/no-such"}}}, "VALIDATION", "no program"},
		"no image":            {onNode{args: []string{"args"}, config: object{"image": "specql-test/none:1"}}, "VALIDATION", "pull_policy is never"},
		"too much stdout":     {onNode{args: []string{"flood"}}, "RESOURCE_EXCEEDED", "MiB that an output may have"},
		"a link as output":    {onNode{args: []string{"symlink", "/etc/passwd", "/specql/output.json"}}, "VALIDATION", "not a regular file"},
		"more than its files": {onNode{args: []string{"write-mb", "/specql/full", "30"}, policy: object{"resource_limits": object{"disk_mb": 8}}}, "REMOTE_ERROR", ""},
	} {
		t.Run(name, func(t *testing.T) {
			out := c.job.run(t, client)
			require.Equal(t, c.code, out.Code(), "%s", out.Finished.GetError().GetMessage())
			require.Contains(t, out.Finished.GetError().GetMessage(), c.says)
			if c.code == string(fault.ResourceExceeded) && strings.Contains(name, "memory") {
				require.True(t, out.Finished.GetUsage().GetOomKilled())
				t.Logf("usage: %v", out.Finished.GetUsage())
			}
		})
	}
}

// TestNodeRunnersGoOn: a runner is handed the Job that another one began and let go of, and one
// that finds the Job of a runner that crashed goes on with it.
func TestNodeRunnersGoOn(t *testing.T) {
	first, second := node(t), node(t)
	job := onNode{args: []string{"lines", "sleeping"}, id: randomName()}.job(t)
	job.Service.RunnerConfig = must(t, object{"image": os.Getenv("SPECQL_TEST_IMAGE"), "command": []string{"/probe", "sleep", "12s"}, "pull_policy": "never"})
	client, stop := runnertest.Serve(t, first, runner.Options{DrainTimeout: time.Millisecond})
	call := runnertest.Begin(t, client, job)
	call.Started()
	name := nameOf(job.GetId())
	var uid string
	require.Eventually(t, func() bool {
		found, err := first.api.jobs.Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return false
		}
		uid = string(found.UID)
		pod := first.podOf(name, uid)
		return pod != nil && pod.Status.Phase == corev1.PodRunning
	}, 60*time.Second, 100*time.Millisecond)
	stop() // the drain is over at once
	require.True(t, call.Wait().Finished.GetHandedBack())
	found, err := second.api.jobs.Get(t.Context(), name, metav1.GetOptions{})
	require.NoError(t, err, "the Job goes on")
	require.Equal(t, uid, string(found.UID))

	out := runnertest.Execute(t, runnertest.Start(t, second), job)
	require.Empty(t, out.Code(), "%s", out.Finished.GetError().GetMessage())
	require.Contains(t, out.Lines("runner"), "going on with the Job "+name)
	require.Positive(t, out.Finished.GetUsage().GetCpuSeconds())
	require.Eventually(t, func() bool { return len(second.jobsLeft(t)) == 0 }, 30*time.Second, 100*time.Millisecond)
}

func TestNodeHoldsTheProgram(t *testing.T) {
	client := runnertest.Start(t, node(t))
	v := output(t, onNode{args: []string{"env"}}.run(t, client))
	text, err := json.Marshal(v)
	require.NoError(t, err)
	require.NotContains(t, string(text), "KUBERNETES_")
	v = output(t, onNode{args: []string{"status"}}.run(t, client))
	t.Logf("status: %v", v)
	out := onNode{args: []string{"fork", "200"}, policy: object{"resource_limits": object{"processes": 60}}}.run(t, client)
	t.Logf("fork: %s", out.Finished.GetOutput())
}
