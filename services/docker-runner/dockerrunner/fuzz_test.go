package dockerrunner

import (
	"encoding/json"
	"path/filepath"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/runnertest"
)

// FuzzRPC sends hostile requests to a runner whose engine is away: whatever comes through would run.
func FuzzRPC(f *testing.F) {
	dir := f.TempDir()
	r, err := New(Options{
		Host: "unix://" + filepath.Join(dir, "no-engine.sock"), StateDir: filepath.Join(dir, "state"),
		Ceiling: &Policy{AllowedImages: []string{"fuzz/*"}},
	})
	require.NoError(f, err)
	f.Cleanup(r.Close)
	job := func(config, policy, operation, input string) *runnerv1.Job {
		return &runnerv1.Job{
			Service:   &runnerv1.Service{Name: "s", ExecutionType: "docker", RunnerConfig: []byte(config), SecurityPolicy: []byte(policy)},
			Operation: &runnerv1.Operation{Name: "o", Config: []byte(operation)}, Input: []byte(input),
		}
	}
	runnertest.Fuzz(
		f, r,
		job(`{"image":"fuzz/a:1","pull_policy":"never"}`, `{"allowed_images":["fuzz/a:1"]}`, `{"command":["x","$input.a"]}`, `{"a":1}`),
		job(`{"image":"fuzz/a@sha256:00","tmpfs":["/x:size=64m:exec"],"volumes":[{"host_path":"/tmp","container_path":"/x"}],"user":"0:0"}`,
			`{"allowed_images":["fuzz/*"],"volume_restrictions":{"allowed_host_paths":["/tmp"],"max_volumes":1},"resource_limits":{"memory_mb":6}}`, `{}`, `{}`),
		job(`{"image":"ubuntu","network_mode":"host"}`, `{"allowed_images":["ubuntu:latest"],"allowed_networks":["host"]}`, `{}`, `[]`),
	)
}

func FuzzImage(f *testing.F) {
	for _, seed := range []string{"alpine", "a/b:1", "host:5000/a@sha256:" + "00", "repo/*", "*", "a:b@c", "sha256:0"} {
		f.Add(seed, seed)
	}
	f.Fuzz(func(t *testing.T, name, pattern string) {
		p, errPattern := parsePattern(pattern)
		n, err := parseImage(name)
		if err != nil {
			return
		}
		again, err := parseImage(n.String())
		require.NoError(t, err, "%q reads as %q", name, n)
		require.Equal(t, n, again)
		require.NotEmpty(t, n.registry())
		if errPattern == nil && p.matches(n, "", nil) {
			require.True(t, p.mayMatch(n), "what matches may match")
		}
	})
}

func FuzzOutput(f *testing.F) {
	for _, seed := range []string{"", "{}", "x\n{}", "[[[[", `{"a":` + "\xff" + `}`, "1", "null\n"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if out, err := fileOutput(data); err == nil {
			require.True(t, json.Valid(out) && utf8.Valid(out))
		}
		if out, err := streamOutput(data, "", 0); err == nil {
			require.True(t, json.Valid(out) && utf8.Valid(out))
		}
		_, _ = parseTmpfs(string(data))
		_, _ = parseSize(string(data))
	})
}

// FuzzPolicy reads an operator's policy.
func FuzzPolicy(f *testing.F) {
	f.Add([]byte(`{"allowed_images":["a/*"],"volume_restrictions":{"max_volumes":0},"resource_limits":{"memory_mb":6.5}}`))
	f.Fuzz(func(_ *testing.T, text []byte) {
		policy, err := runner.Decode[Policy](text)
		if err != nil {
			return
		}
		_ = policy.check(nil)
	})
}
