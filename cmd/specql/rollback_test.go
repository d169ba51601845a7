package main

import (
	"bufio"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/cmd/specql/internal/local"
	"github.com/specql/mesh/pkg/client"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/test/pgtest"
)

const rollbackRegistry = `services:
  - {name: http_service, type: t, category: c, execution_type: http, runner_config: {base_url: "URL"}, security_policy: {allow_private_networks: true}, operations: [{name: call}]}
  - {name: shell_service, type: t, category: c, execution_type: shell, runner_config: {working_directory: "DIR"}, security_policy: {allowed_commands: ["/usr/bin/cat"]}, operations: [{name: call, command: ["/usr/bin/cat"]}]}
  - name: docker_service
    type: t
    category: c
    execution_type: docker
    runner_config: {image: "specql/demo:local", pull_policy: never}
    security_policy: {allowed_images: ["specql/demo:local"]}
    operations:
      - name: call
        command: [convert]
        input_schema: {$schema: "https://json-schema.org/draft/2020-12/schema", type: object, properties: {text: {type: string, default: hello}, from: {type: string, default: txt}, to: {type: string, default: html}}}
  - name: serverless_service
    type: t
    category: c
    execution_type: serverless
    runner_config: {provider: azure, function_name: notify, endpoint: "AZURE", auth_config: {function_key_env_var: TEST_FUNCTION_KEY}}
    operations:
      - name: call
        max_retries: 0
        input_schema: {$schema: "https://json-schema.org/draft/2020-12/schema", type: object, properties: {recipient: {type: string, default: somebody}, message: {type: string, default: hello}}}
`

// azureFunction runs the stand-in of an Azure function until the end of the test.
func azureFunction(t *testing.T, key string) (url string) {
	t.Helper()
	dir, err := filepath.Abs("../../.cache/standins")
	require.NoError(t, err)
	out, err := exec.CommandContext(t.Context(), "../../test/standins/build.sh", dir, "azure-notify").CombinedOutput()
	require.NoError(t, err, "%s", out)
	cmd := exec.Command(filepath.Join(dir, "azure-notify"), "-key", key)
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	require.NoError(t, err)
	return strings.TrimPrefix(strings.TrimSpace(line), "listening ")
}

// loadOf has specql load-test call a service until it is told to end, which gives what it found.
func loadOf(t *testing.T, dir, address, service string) (end func() loadTest) {
	t.Helper()
	cmd := program(t.Context(), dir, "load-test", "--service", service, "--concurrency", "1", "--duration", "1h", "--allow-cost", "-o", "json", "--address", address)
	var out, errs said
	cmd.Stdout, cmd.Stderr = &out, &errs
	require.NoError(t, cmd.Start())
	return func() loadTest {
		t.Helper()
		require.NoError(t, cmd.Process.Signal(syscall.SIGINT))
		require.NoError(t, cmd.Wait(), errs.String())
		return decode[loadTest](t, out.String())
	}
}

// TestRollbackUnderLoad: two orchestrators on one PostgreSQL serve calls of every type, all of which have working targets;
// from the moment at which rollback has answered, both refuse all but HTTP ones, which go on; execution-types --enable brings
// the others back; no run is lost.
func TestRollbackUnderLoad(t *testing.T) {
	kinds := []string{"http", "shell", "docker", "serverless"}
	if err := local.BuildImage(t.Context()); errors.Is(err, local.ErrNoEngine) {
		t.Logf("NOTE: no Docker engine answers: nothing is called of docker")
		kinds = []string{"http", "shell", "serverless"}
	} else {
		require.NoError(t, err)
	}
	database := pgtest.Database(t)
	dir := t.TempDir()
	require.Equal(t, 0, specql(t, dir, "migrate-schema", "--database", database).status)
	remote := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(`{}`)) }))
	t.Cleanup(remote.Close)
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "registry"), 0o700))
	text := strings.NewReplacer("URL", remote.URL, "DIR", dir, "AZURE", azureFunction(t, "the-key")).Replace(rollbackRegistry)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "registry", "service_registry.yaml"), []byte(text), 0o600))
	var addresses []string
	var clients []*client.Client
	for range 2 {
		address, _ := devWith(t, dir, []string{"TEST_FUNCTION_KEY=the-key"}, "--database", database, "--data", filepath.Join(t.TempDir(), "data"))
		c, err := client.New(address)
		require.NoError(t, err)
		t.Cleanup(func() { _ = c.Close() })
		addresses, clients = append(addresses, address), append(clients, c)
	}

	// 0 before the rollback, 1 while it is under way, 2 once it has answered, 3 and 4 the same of --enable.
	var phase atomic.Int32
	var mu sync.Mutex
	codes := map[string]int{} // service, replica, phase and code of calls that were begun and ended in one phase
	var accepted []string     // the ids of runs
	var load sync.WaitGroup
	ended := make(chan struct{})
	for i, c := range clients {
		for _, kind := range kinds {
			load.Go(func() {
				for {
					select {
					case <-ended:
						return
					default:
					}
					begun := phase.Load()
					run, err := c.ExecuteAndWait(t.Context(), client.Action{Workflow: fmt.Sprintf("actions: [{call_service: {service: %s_service, operation: call, max_retries: 0}}]\n", kind)})
					code := "completed"
					if f, ok := fault.As(err); ok {
						code = string(f.Code)
					} else if err != nil {
						code = err.Error()
					}
					mu.Lock()
					if run != nil {
						accepted = append(accepted, run.GetId())
					}
					if phase.Load() == begun {
						codes[fmt.Sprintf("%s %d %d %s", kind, i, begun, code)]++
					}
					mu.Unlock()
				}
			})
		}
	}
	ends := map[string]func() loadTest{}
	for _, kind := range kinds {
		ends[kind] = loadOf(t, dir, addresses[0], kind+"_service")
	}
	// await waits for calls of every kind on every replica that were begun and ended in a phase.
	await := func(phase int, code string) {
		t.Helper()
		require.Eventually(t, func() bool {
			mu.Lock()
			defer mu.Unlock()
			for _, kind := range kinds {
				want := code
				if kind == "http" {
					want = "completed"
				}
				for i := range clients {
					if codes[fmt.Sprintf("%s %d %d %s", kind, i, phase, want)] < 3 {
						return false
					}
				}
			}
			return true
		}, 4*time.Minute, 20*time.Millisecond, "phase %d: %v", phase, codes)
	}
	await(0, "completed")
	phase.Store(1)
	require.Equal(t, 0, specql(t, dir, "rollback", "--to", "http-only", "--address", addresses[0]).status)
	phase.Store(2)
	await(2, "DISABLED")
	// A load-test makes one call at a time, which may have been under way since before the rollback.
	require.Eventually(t, func() bool {
		return fmt.Sprint(len(kinds)-1) == pgtest.Shared(t).Psql(t, database, `SELECT count(DISTINCT j.execution_type) FROM jobs.tb_job_run j
			JOIN jobs.tb_workflow_run r ON r.id = j.run_id WHERE r.correlation_id = 'load-test' AND j.error_code = 'DISABLED'`)
	}, 4*time.Minute, 100*time.Millisecond, "a load-test was refused nothing")
	phase.Store(3)
	require.Equal(t, 0, specql(t, dir, "execution-types", "--enable", "shell", "docker", "serverless", "--address", addresses[1]).status)
	phase.Store(4)
	await(4, "completed")
	for _, kind := range kinds {
		got := ends[kind]()
		t.Logf("load-test of %s: %d calls, %d completed, errors %v", kind, got.Requests, got.Completed, got.Errors)
		require.Positive(t, got.Completed, kind)
		if kind == "http" {
			require.Zero(t, got.Failed, "%v", got.Errors)
			continue
		}
		require.Len(t, got.Errors, 1, "%s: %v", kind, got.Errors)
		require.Equal(t, "DISABLED", got.Errors[0].Code)
		require.Equal(t, got.Requests, got.Completed+got.Errors[0].Count, "no run is lost")
	}
	close(ended)
	load.Wait()

	t.Logf("%d runs; calls by type, replica, phase and outcome: %v", len(accepted), codes)
	for key := range codes {
		var kind, code string
		var replica, phase int
		_, err := fmt.Sscan(key, &kind, &replica, &phase, &code)
		require.NoError(t, err, key)
		allowed := []string{"completed"}
		switch {
		case kind == "http":
		case phase == 2:
			allowed = []string{"DISABLED"}
		case phase == 1 || phase == 3:
			allowed = []string{"completed", "DISABLED"}
		}
		require.Contains(t, allowed, code, key)
	}
	require.Greater(t, len(accepted), 3*3*len(kinds)*len(clients))
	cluster := pgtest.Shared(t)
	require.Equal(t, "0", cluster.Psql(t, database, "SELECT count(*) FROM jobs.tb_workflow_run WHERE status NOT IN ('completed', 'failed')"), "every run has ended")
	require.Equal(t, fmt.Sprint(len(accepted)),
		cluster.Psql(t, database, "SELECT count(*) FROM jobs.tb_workflow_run WHERE id IN ('"+strings.Join(accepted, "', '")+"')"), "and none is lost")
	require.Equal(t, "0", cluster.Psql(t, database, "SELECT count(*) FROM jobs.tb_job_run WHERE status NOT IN ('completed', 'failed') OR status = 'failed' AND error_code <> 'DISABLED'"))
}
