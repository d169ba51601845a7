package e2e

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/client"
	"github.com/specql/mesh/pkg/spec"
)

// hanging starts a run whose script waits for a file. It gives what the script writes: a process and a key for each call.
func hanging(t *testing.T, d *dev, dir string) (*client.Run, func() [][2]string) {
	t.Helper()
	log, until := filepath.Join(dir, "log"), filepath.Join(dir, "until")
	run, err := d.Execute(t.Context(), client.Action{
		Workflow: "actions: [{call_service: {service: data_processor, operation: hang, input: $input}}]\noutput: $hang\n",
		Input:    map[string]any{"log": log, "until": until},
	})
	require.NoError(t, err)
	return run, func() [][2]string {
		raw, err := os.ReadFile(log)
		if err != nil {
			return nil
		}
		var calls [][2]string
		for line := range lines(strings.TrimSpace(string(raw))) {
			if pid, key, ok := strings.Cut(line, " "); ok {
				calls = append(calls, [2]string{pid, key})
			}
		}
		return calls
	}
}

// gone says whether a process has ended; one that nobody has waited for yet counts as ended.
func gone(pid string) bool {
	raw, err := os.ReadFile(filepath.Join("/proc", pid, "stat"))
	if err != nil {
		return true
	}
	_, state, _ := strings.Cut(string(raw), ") ")
	return strings.HasPrefix(state, "Z") || strings.HasPrefix(state, "X")
}

func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	require.Eventually(t, condition, 30*time.Second, 10*time.Millisecond, what)
}

// running are the processes that run the script of the mesh. What a script says of its own number holds in its name space alone.
func running(t *testing.T, m mesh) []string {
	t.Helper()
	found, err := filepath.Glob("/proc/[0-9]*/cmdline")
	require.NoError(t, err)
	var pids []string
	for _, path := range found {
		line, err := os.ReadFile(path)
		if err == nil && strings.Contains(string(line), filepath.Join(m.scripts, "hang.py")) {
			pids = append(pids, filepath.Base(filepath.Dir(path)))
		}
	}
	return pids
}

func TestCancelledRunLeavesNoProcess(t *testing.T) {
	m := services(t, newRecorder(t))
	d := start(t, m)
	run, calls := hanging(t, d, m.scripts)
	eventually(t, "the script begins", func() bool { return len(calls()) == 1 })
	process := running(t, m)
	require.Len(t, process, 1)
	cancelled, err := d.Cancel(t.Context(), run.GetId(), "enough")
	require.NoError(t, err)
	require.Equal(t, specqlv1.Status_STATUS_CANCELLED, cancelled.GetStatus())
	require.True(t, gone(process[0]), "the process is there although the run has ended")
}

func TestKilledMeshLeavesNoProcess(t *testing.T) {
	m := services(t, newRecorder(t))
	m.data = filepath.Join(t.TempDir(), "data")
	dir := m.scripts
	first := start(t, m)
	run, calls := hanging(t, first, dir)
	eventually(t, "the script begins", func() bool { return len(calls()) == 1 })
	process := running(t, m)
	require.Len(t, process, 1)
	first.kill()

	second := start(t, m)
	eventually(t, "the call is made again", func() bool { return len(calls()) == 2 })
	before, again := calls()[0], calls()[1]
	require.Equal(t, before[1], again[1], "the same key")
	eventually(t, "the process of the mesh that was killed is gone", func() bool { return gone(process[0]) })
	require.NoError(t, os.WriteFile(filepath.Join(dir, "until"), nil, 0o600))
	done, err := second.Wait(t.Context(), run.GetId())
	require.NoError(t, err)
	require.Equal(t, again[0], fmt.Sprint(done.GetOutput().GetStructValue().AsMap()["pid"]))
}

// A run that fails is mended and goes on from the step that failed.
func TestRetryGoesOnFromTheFailedStep(t *testing.T) {
	d, r := withServices(t)
	r.says("backup_api.process", http.StatusBadRequest, map[string]any{})
	run, err := d.ExecuteAndWait(t.Context(), client.Action{Workflow: `
actions:
  - call_service: {service: worker, operation: work, input: {n: 1}}
  - call_service: {service: backup_api, operation: process}
`})
	require.Error(t, err)
	r.says("backup_api.process", http.StatusOK, map[string]any{})
	_, err = d.Retry(t.Context(), run.GetId())
	require.NoError(t, err)
	done, err := d.Wait(t.Context(), run.GetId())
	require.NoError(t, err)
	require.Equal(t, specqlv1.Status_STATUS_COMPLETED, done.GetStatus())
	require.Equal(t, []string{"worker.work", "backup_api.process", "backup_api.process"}, r.calls())
}

func TestExitStatusOfTheCommand(t *testing.T) {
	d, r := withServices(t)
	r.says("worker.work", http.StatusBadRequest, map[string]any{})
	dir := t.TempDir()
	env := []string{"SPECQL_ADDRESS=" + d.api}
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	fails, unknown := write("fails.yaml", oneCall), write("unknown.yaml", "actions: [{call_service: {service: wrker, operation: work}}]")
	for _, c := range []struct {
		args   []string
		status int
		says   string
	}{
		{[]string{"execute-job", "--file", fails}, 1, "REMOTE_ERROR"},
		{[]string{"execute-job", "--file", unknown}, 2, `did you mean worker`},
		{[]string{"execute-job", "--file", filepath.Join(dir, "none.yaml")}, 2, "none.yaml"},
		{[]string{"execute-job", "--entity", "paymnt", "--action", "x"}, 2, "paymnt"},
		{[]string{"execute-job"}, 2, "--entity"},
		{[]string{"execute-job", "--file", fails, "--input", "{"}, 2, "input"},
		{[]string{"execute-job", "--file", fails, "--address", "127.0.0.1:1"}, 1, "specql dev"},
		{[]string{"runs", "show", "none"}, 2, "none"},
		{[]string{"validate-config", unknown}, 2, `unknown key "actions"`},
		{[]string{"nonsense"}, 2, "nonsense"},
		{[]string{"runners"}, 0, "shell"},
		{[]string{"--version"}, 0, "specql"},
	} {
		status, out, errs := run(t, dir, env, c.args...)
		t.Logf("%q: %d\n%s%s", c.args, status, out, errs)
		if status != c.status || !strings.Contains(out+errs, c.says) {
			t.Errorf("%q ended with %d, want %d with %q", c.args, status, c.status, c.says)
		}
	}
}

// Where no Docker engine answers, the demo says so, leaves the container out, and is well.
func TestDemoWithoutDocker(t *testing.T) {
	env := []string{"DOCKER_HOST=unix:///nonexistent/docker.sock"}
	status, out, errs := run(t, t.TempDir(), env, "demo")
	require.Zero(t, status, "%s%s", out, errs)
	require.Contains(t, errs, "Docker is skipped")
	require.Contains(t, out, "skipped", "the table shows it, too")
	require.Contains(t, out, "report_generator.generate_pdf")

	status, out, errs = run(t, t.TempDir(), env, "demo", "-o", "json")
	require.Zero(t, status, "%s%s", out, errs)
	require.True(t, json.Valid([]byte(out)), out)
	require.NotContains(t, out, "ml_predictor")
}

// Ten thousand random changes of the examples' documents: what is wrong is told, and nothing panics.
func TestDamagedDocumentsAreTold(t *testing.T) {
	const changes = 10_000
	const signs = "{}[]:&*!|>'\"%@`$,#-\t\n"
	type document struct {
		name  string
		raw   []byte
		parse func(spec.File) spec.Problems
	}
	var documents []document
	examples := filepath.Join(root, "examples", "multi-execution")
	add := func(pattern string, parse func(spec.File) spec.Problems) {
		names, err := filepath.Glob(filepath.Join(examples, pattern))
		require.NoError(t, err)
		require.NotEmpty(t, names)
		for _, name := range names {
			documents = append(documents, document{name: name, raw: []byte(read(t, name)), parse: parse})
		}
	}
	options := spec.Options{Env: "development", LookupEnv: func(string) (string, bool) { return "x", true }}
	add("registry/*.yaml", func(f spec.File) spec.Problems { _, p := spec.ParseRegistry(f, options); return p })
	add("entities/*.yaml", func(f spec.File) spec.Problems { _, p := spec.ParseEntity(f, options); return p })
	add("workflows/*.yaml", func(f spec.File) spec.Problems { _, p := spec.ParseWorkflow(f, options); return p })
	for _, d := range documents {
		require.False(t, d.parse(spec.File{Name: d.name, Content: d.raw}).HasErrors(), d.name)
	}
	random := rand.New(rand.NewPCG(1, 2))
	for n := range changes {
		d := documents[n%len(documents)]
		raw := append([]byte(nil), d.raw...)
		for range 1 + random.IntN(4) {
			at := random.IntN(len(raw))
			switch random.IntN(4) {
			case 0:
				raw[at] = byte(random.Uint32())
			case 1:
				raw = append(raw[:at], raw[at+1:]...)
			case 2:
				raw = append(raw[:at], append([]byte{signs[random.IntN(len(signs))]}, raw[at:]...)...)
			default:
				end := min(len(raw), at+random.IntN(40))
				raw = append(raw[:end], raw[at:]...)
			}
		}
		for _, p := range d.parse(spec.File{Name: d.name, Content: raw}) {
			if p.Line < 1 || p.Message == "" {
				t.Fatalf("a problem without a place or text: %+v in\n%s", p, raw)
			}
		}
	}
}
