package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/client"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/test/pgtest"
)

const rollbackRegistry = `services:
  - {name: http_service, type: t, category: c, execution_type: http, runner_config: {base_url: "URL"}, security_policy: {allow_private_networks: true}, operations: [{name: call}]}
  - {name: shell_service, type: t, category: c, execution_type: shell, runner_config: {working_directory: "DIR"}, security_policy: {allowed_commands: ["/usr/bin/cat"]}, operations: [{name: call, command: ["/usr/bin/cat"]}]}
  - {name: docker_service, type: t, category: c, execution_type: docker, runner_config: {image: "not/there:1", pull_policy: never}, security_policy: {allowed_images: ["not/there:1"]}, operations: [{name: call}]}
  - {name: serverless_service, type: t, category: c, execution_type: serverless, runner_config: {provider: azure, function_name: f, endpoint: "URL"}, operations: [{name: call, max_retries: 0}]}
`

// TestRollbackUnderLoad: two orchestrators on one PostgreSQL serve calls of every type; from the moment at which rollback
// has answered, both refuse all but HTTP ones, which go on; execution-types --enable brings the others back; no run is lost.
func TestRollbackUnderLoad(t *testing.T) {
	database := pgtest.Database(t)
	dir := t.TempDir()
	require.Equal(t, 0, specql(t, dir, "migrate-schema", "--database", database).status)
	remote := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(`{}`)) }))
	t.Cleanup(remote.Close)
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "registry"), 0o700))
	text := strings.NewReplacer("URL", remote.URL, "DIR", dir).Replace(rollbackRegistry)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "registry", "service_registry.yaml"), []byte(text), 0o600))
	var addresses []string
	var clients []*client.Client
	for range 2 {
		address, _ := devIn(t, dir, "--database", database, "--data", filepath.Join(t.TempDir(), "data"))
		c, err := client.New(address)
		require.NoError(t, err)
		t.Cleanup(func() { _ = c.Close() })
		addresses, clients = append(addresses, address), append(clients, c)
	}

	// 0 before the rollback, 1 while it is under way, 2 once it has answered, 3 and 4 the same of --enable.
	var phase atomic.Int32
	var mu sync.Mutex
	codes := map[string]int{} // service, phase and code of calls that were begun and ended in one phase
	acknowledged := 0
	var load sync.WaitGroup
	ended := make(chan struct{})
	kinds := []string{"http", "shell", "docker", "serverless"}
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
						acknowledged++
					}
					if phase.Load() == begun {
						codes[fmt.Sprintf("%s %d %d %s", kind, i, begun, code)]++
					}
					mu.Unlock()
				}
			})
		}
	}
	seen := func(kind string, phase int, disabled bool) bool {
		mu.Lock()
		defer mu.Unlock()
		for i := range clients {
			n := 0
			for key, count := range codes {
				if strings.HasPrefix(key, fmt.Sprintf("%s %d %d ", kind, i, phase)) && strings.HasSuffix(key, "DISABLED") == disabled {
					n += count
				}
			}
			if n < 3 {
				return false
			}
		}
		return true
	}
	await := func(phase int, disabled bool) {
		t.Helper()
		require.Eventually(t, func() bool {
			for _, kind := range kinds {
				if !seen(kind, phase, disabled && kind != "http") {
					return false
				}
			}
			return true
		}, 2*time.Minute, 20*time.Millisecond, "phase %d", phase)
	}
	await(0, false)
	phase.Store(1)
	require.Equal(t, 0, specql(t, dir, "rollback", "--to", "http-only", "--address", addresses[0]).status)
	phase.Store(2)
	await(2, true)
	phase.Store(3)
	require.Equal(t, 0, specql(t, dir, "execution-types", "--enable", "shell", "docker", "serverless", "--address", addresses[1]).status)
	phase.Store(4)
	await(4, false)
	close(ended)
	load.Wait()

	for key := range codes {
		var kind, code string
		var replica, phase int
		_, err := fmt.Sscan(key, &kind, &replica, &phase, &code)
		require.NoError(t, err, key)
		require.Equal(t, phase == 2 && kind != "http" || phase == 3 && kind != "http" && code == "DISABLED" || phase == 1 && kind != "http" && code == "DISABLED",
			code == "DISABLED", "%s", key)
		if kind == "http" || kind == "shell" && code != "DISABLED" {
			require.Equal(t, "completed", code, key)
		}
	}
	require.Positive(t, acknowledged)
	cluster := pgtest.Shared(t)
	require.Equal(t, "0", cluster.Psql(t, database, "SELECT count(*) FROM jobs.tb_workflow_run WHERE status IN ('pending', 'running')"), "every run has ended")
	require.Equal(t, "t", cluster.Psql(t, database, fmt.Sprintf("SELECT count(*) >= %d FROM jobs.tb_workflow_run", acknowledged)), "and none is lost")
}
