package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/types/known/durationpb"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/runnertest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newRunner(t *testing.T) *wasmRunner {
	t.Helper()
	jr, err := build(t.Context(), &runner.Env{})
	require.NoError(t, err)
	w, ok := jr.(*wasmRunner)
	require.True(t, ok)
	t.Cleanup(func() { assert.NoError(t, w.Close()) })
	return w
}

// program compiles the guest to WebAssembly.
func program(t *testing.T) string {
	t.Helper()
	file, err := filepath.EvalSymlinks(t.TempDir())
	require.NoError(t, err)
	file = filepath.Join(file, "program.wasm")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-ldflags=-s -w", "-o", file, "./testdata/program")
	cmd.Env = append(os.Environ(), "GOOS=wasip1", "GOARCH=wasm")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	return file
}

func job(module, operation, input string) *runnerv1.Job {
	return &runnerv1.Job{
		Id: "job-" + operation, RunId: "run", Attempt: 1,
		Service: &runnerv1.Service{
			Name: "guest", ExecutionType: "wasm",
			RunnerConfig:   fmt.Appendf(nil, `{"module": %q}`, module),
			SecurityPolicy: fmt.Appendf(nil, `{"allowed_modules": [%q], "resource_limits": {"memory_mb": 32}}`, module),
		},
		Operation: &runnerv1.Operation{Name: operation},
		Input:     []byte(input),
		Timeout:   durationpb.New(time.Minute),
	}
}

func TestWasm(t *testing.T) {
	module := program(t)
	w := newRunner(t)

	t.Run("conformance", func(t *testing.T) {
		runnertest.Conformance(t, w, runnertest.Cases{
			Good: job(module, "greet", `{"name":"Ada"}`),
			Check: func(t *testing.T, o *runnertest.Outcome) {
				require.JSONEq(t, `{"greeting":"hello Ada"}`, string(o.Finished.GetOutput()))
				require.Contains(t, o.Lines("stderr"), "greeting Ada")
				require.Positive(t, o.Finished.GetUsage().GetPeakMemoryMb())
				require.Nil(t, o.Finished.GetUsage().CpuSeconds, "not measured, so absent")
			},
			Slow: job(module, "spin", `{}`),
			Big:  job(module, "big", `{}`),
		})
	})

	client := runnertest.Start(t, w)
	for _, tt := range []struct {
		name, code, message string
		change              func(j *runnerv1.Job)
	}{
		{name: "text", code: "REMOTE_ERROR", message: "no JSON"},
		{name: "nonsense", code: "REMOTE_ERROR", message: "cannot nonsense"},
		{name: "hog", code: "REMOTE_ERROR"},
		{name: "greet", code: "POLICY_VIOLATION", message: "add it", change: func(j *runnerv1.Job) { j.Service.SecurityPolicy = nil }},
		{name: "greet", code: "VALIDATION", message: "no such file", change: func(j *runnerv1.Job) { j.Service.RunnerConfig = []byte(`{"module":"/none.wasm"}`) }},
		{name: "greet", code: "VALIDATION", message: "did you mean", change: func(j *runnerv1.Job) { j.Service.RunnerConfig = []byte(`{"modul":"/none.wasm"}`) }},
		{name: "greet", code: "VALIDATION", message: "exports no function", change: func(j *runnerv1.Job) {
			j.Service.RunnerConfig = fmt.Appendf(nil, `{"module":%q,"function":"none"}`, module)
		}},
		{name: "sleep", code: "TIMEOUT", change: func(j *runnerv1.Job) { j.Timeout = durationpb.New(200 * time.Millisecond) }},
	} {
		t.Run(tt.name+" "+tt.code, func(t *testing.T) {
			j := job(module, tt.name, `{"name":"Ada"}`)
			j.Id = t.Name()
			if tt.change != nil {
				tt.change(j)
			}
			o := runnertest.Execute(t, client, j)
			require.NoError(t, o.Err)
			require.Equal(t, tt.code, o.Code(), o.Finished.GetError().GetMessage())
			require.Contains(t, o.Finished.GetError().GetMessage(), tt.message)
		})
	}

	t.Run("spy", func(t *testing.T) {
		o := runnertest.Execute(t, client, job(module, "spy", `{}`))
		require.JSONEq(t, `{"environment":0,"file":true,"dir":true}`, string(o.Finished.GetOutput()), "nothing of this machine is in reach")
	})
}

func TestValidate(t *testing.T) {
	w := newRunner(t)
	problems, err := w.Validate(t.Context(), &runner.Service{
		Name: "guest", ExecutionType: "wasm", Config: []byte(`{"module":"x.wasm","functon":"f"}`), Policy: []byte(`{"resource_limits":{"memory_mb":0}}`),
		Operations: []runner.Operation{{Name: "greet", Config: []byte(`{"arguments":[]}`)}},
	})
	require.NoError(t, err)
	paths := map[string]string{}
	for _, p := range problems {
		paths[p.Path] = p.Mend
	}
	require.Contains(t, paths["runner_config.functon"], "function")
	require.Contains(t, paths, "runner_config.module")
	require.Contains(t, paths, "security_policy.resource_limits.memory_mb")
	require.Contains(t, paths, "operations.greet.arguments")
}
