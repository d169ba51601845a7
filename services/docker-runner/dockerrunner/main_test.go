package dockerrunner

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/moby/moby/client"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/runner/runnertest"
	"github.com/specql/mesh/services/docker-runner/dockerrunner/imagebuild"
)

// bench is what the tests share: an engine, an image on it and a runner.
type bench struct {
	// away says why there is no engine; empty where one answers.
	away   string
	image  string
	binary []byte
	runner *Runner
}

var shared bench

func TestMain(m *testing.M) {
	if os.Getenv(crashingRunner) != "" {
		os.Exit(crash())
	}
	code, err := runTests(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func runTests(m *testing.M) (code int, err error) {
	ctx := context.Background()
	if shared.runner, err = New(Options{}); err != nil {
		return 1, err
	}
	switch err := shared.runner.Ping(ctx); {
	case err != nil:
		shared.away = err.Error()
	default:
		if shared.binary, err = buildProbe(); err != nil {
			return 1, err
		}
		shared.image = "specql-test/probe:" + randomName()
		if err := imagebuild.FromBinary(ctx, "", shared.image, map[string][]byte{"/probe": shared.binary}, []string{"/probe"}); err != nil {
			return 1, err
		}
	}
	code = m.Run()
	shared.runner.Close()
	if shared.image != "" {
		if err := imagebuild.Remove(ctx, "", shared.image); err != nil {
			return 1, err
		}
	}
	if code == 0 {
		err = goleak.Find()
	}
	return code, err
}

func buildProbe() ([]byte, error) {
	dir, err := os.MkdirTemp("", "probe")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	out := filepath.Join(dir, "probe")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, "./testdata/probe")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the probe: %w\n%s", err, text)
	}
	return os.ReadFile(out)
}

// needEngine skips a test where no Docker engine answers: nothing else can be done there.
func needEngine(t *testing.T) {
	t.Helper()
	if shared.away != "" {
		t.Skipf("no Docker engine answers, so no container can run: %s", shared.away)
	}
}

func newRunner(t *testing.T, o Options) *Runner {
	t.Helper()
	r, err := New(o)
	require.NoError(t, err)
	t.Cleanup(r.Close)
	return r
}

type object = map[string]any

// call describes a job of a test.
type call struct {
	args   []string
	config object
	policy object
	input  any
	id     string
}

func (c call) job(t *testing.T) *runnerv1.Job {
	t.Helper()
	config := object{"image": shared.image}
	maps.Copy(config, c.config)
	policy := object{"allowed_images": []string{"specql-test/*"}}
	maps.Copy(policy, c.policy)
	operation := object{}
	if c.args != nil {
		operation["command"] = c.args
	}
	if c.input == nil {
		c.input = object{}
	}
	if c.id == "" {
		c.id = "job-" + randomName()
	}
	return &runnerv1.Job{
		Id: c.id, RunId: "run-1", Attempt: 1, IdempotencyKey: "key-1",
		Service:   &runnerv1.Service{Name: "probe", ExecutionType: ExecutionType, RunnerConfig: raw(t, config), SecurityPolicy: raw(t, policy)},
		Operation: &runnerv1.Operation{Name: "op", Config: raw(t, operation)},
		Input:     raw(t, c.input),
	}
}

func raw(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	require.NoError(t, err)
	return b
}

// run runs a job on the shared runner, over gRPC.
func (c call) run(t *testing.T) *runnertest.Outcome {
	t.Helper()
	return c.runOn(t, shared.runner)
}

func (c call) runOn(t *testing.T, r *Runner) *runnertest.Outcome {
	t.Helper()
	needEngine(t)
	job := c.job(t)
	out := runnertest.Execute(t, runnertest.Start(t, r), job)
	require.NoError(t, out.Err)
	requireGone(t, job.GetId())
	return out
}

// output is a successful job's output.
func (c call) output(t *testing.T) object {
	t.Helper()
	return decoded(t, c.run(t))
}

func decoded(t *testing.T, out *runnertest.Outcome) object {
	t.Helper()
	require.Nil(t, out.Finished.GetError(), "the job succeeds: %v", out.Finished.GetError())
	var v object
	require.NoError(t, json.Unmarshal(out.Finished.GetOutput(), &v), "%s", out.Finished.GetOutput())
	return v
}

// fails runs a job that must fail with a code, and gives its outcome and message.
func (c call) fails(t *testing.T, code string) (*runnertest.Outcome, string) {
	t.Helper()
	return failed(t, c.run(t), code)
}

func failed(t *testing.T, out *runnertest.Outcome, code string) (*runnertest.Outcome, string) {
	t.Helper()
	require.Equal(t, code, out.Code(), "%v; output %s", out.Finished.GetError(), out.Finished.GetOutput())
	require.Empty(t, out.Finished.GetOutput())
	return out, out.Finished.GetError().GetMessage()
}

// containersOf lists the containers of a job by its label, as the engine knows them.
func containersOf(t *testing.T, job string) []string {
	t.Helper()
	list, err := shared.runner.client.ContainerList(cleanup(t), client.ContainerListOptions{All: true, Filters: make(client.Filters).Add("label", labelJob+"="+job)})
	require.NoError(t, err)
	ids := []string{}
	for _, c := range list.Items {
		ids = append(ids, c.ID)
	}
	return ids
}

func requireGone(t *testing.T, job string) {
	t.Helper()
	require.Empty(t, containersOf(t, job), "no container of the job is left")
}
