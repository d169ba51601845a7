package shellrunner

import (
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/require"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/runnertest"
)

// FuzzRPC sends hostile requests to the runner. What they may run is held to two programs that do little.
func FuzzRPC(f *testing.F) {
	dir := f.TempDir()
	r, err := New(Options{TempDir: dir, Ceiling: &Policy{
		AllowedCommands: []string{"/usr/bin/true", "/usr/bin/cat"}, NetworkAccess: "none",
		WorkingDirectoryRestrictions: []string{dir}, ResourceLimits: Limits{MemoryMB: 64, DiskMB: 1, Processes: 4, TimeoutSeconds: 1},
	}})
	require.NoError(f, err)
	f.Cleanup(func() { require.NoError(f, r.Close()) })
	config, err := json.Marshal(Config{WorkingDirectory: dir})
	require.NoError(f, err)
	job := func(policy, operation, input string) *runnerv1.Job {
		return &runnerv1.Job{
			Service:   &runnerv1.Service{Name: "s", ExecutionType: Type, RunnerConfig: config, SecurityPolicy: []byte(policy)},
			Operation: &runnerv1.Operation{Name: "o", Config: []byte(operation)}, Input: []byte(input),
		}
	}
	runnertest.Fuzz(
		f, r,
		job(`{"allowed_commands":["/usr/bin/cat"],"file_access":"none"}`, `{"command":["/usr/bin/cat"]}`, `{"a":1}`),
		job(`{"allowed_commands":["/usr/bin/true"]}`, `{"command":["/usr/bin/true","$input.a[0]"]}`, `{"a":["x"]}`),
		job(`{"allowed_commands":["/usr/bin/python3"]}`, `{"script":"x.py"}`, `{}`),
	)
}

// FuzzPolicy reads an operator's policy: what is taken can be intersected and enforced.
func FuzzPolicy(f *testing.F) {
	f.Add([]byte(`{"allowed_commands":["/usr/bin/true"],"resource_limits":{"memory_mb":1}}`))
	f.Add([]byte(`{"resource_limits":{"cpu_cores":-1}}`))
	f.Fuzz(func(_ *testing.T, text []byte) {
		policy, err := runner.Decode[Policy](text)
		if err != nil {
			return
		}
		_ = policy.ResourceLimits.check()
	})
}

// FuzzProcess reads what the kernel tells of a process, whose name the process chooses.
func FuzzProcess(f *testing.F) {
	f.Add([]byte("7 (a) b) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 12345 1 1"))
	f.Add([]byte("7 (\n) R) "))
	f.Fuzz(func(t *testing.T, text []byte) {
		if p, ok := parseProcess(text); ok && p.state == 0 {
			t.Fatal("a process without a state")
		}
	})
}
