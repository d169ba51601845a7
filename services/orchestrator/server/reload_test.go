package server_test

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/durationpb"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/schema"
	"github.com/specql/mesh/services/orchestrator/server"
	"github.com/specql/mesh/test/pgtest"
)

// files are a registry's files that a test changes.
type files struct {
	mu       sync.Mutex
	registry string
	err      error
}

func (f *files) set(registry string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.registry, f.err = registry, err
}

func (f *files) read(o *server.Options) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	o.Registry = &spec.File{Name: "registry.yaml", Content: []byte(f.registry)}
	o.Entities = []spec.File{{Name: "thing.yaml", Content: []byte(echoEntity)}}
	return f.err
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, http.NoBody)
	require.NoError(t, err)
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	return resp.StatusCode, string(body)
}

func TestChangedFilesComeIntoForce(t *testing.T) {
	t.Parallel()
	f := &files{registry: echoRegistry}
	s := start(t, t.TempDir(), func(o *server.Options) { o.Reload, o.ReloadEvery = f.read, 10*time.Millisecond })
	inForce := func() string {
		resp, err := s.r.GetRegistry(t.Context(), &specqlv1.GetRegistryRequest{})
		require.NoError(t, err)
		return resp.GetDigest()
	}
	counted := func(line string) func() bool {
		return func() bool {
			_, body := get(t, "http://"+s.metrics+"/metrics")
			return strings.Contains(body, line)
		}
	}
	first := inForce()

	f.set(strings.ReplaceAll(echoRegistry, "name: say", "name: say_it")+"  - nonsense\n", nil)
	require.Eventually(t, counted(`specql_registry_reloads_total{outcome="invalid"} 1`), 30*time.Second, 10*time.Millisecond)
	require.Equal(t, first, inForce(), "what was in force stays")

	f.set("", errors.New("it is being written"))
	require.Eventually(t, counted(`specql_registry_reloads_total{outcome="unreadable"} 1`), 30*time.Second, 10*time.Millisecond)
	require.Equal(t, first, inForce())

	f.set(echoRegistry+"      - {name: shout}\n", nil)
	require.Eventually(t, counted(`specql_registry_reloads_total{outcome="applied"} 1`), 30*time.Second, 10*time.Millisecond)
	require.NotEqual(t, first, inForce())
	run := s.execute(&specqlv1.ExecuteActionRequest{Workflow: workflow("shout"), Wait: durationpb.New(time.Minute)})
	require.Equal(t, specqlv1.Status_STATUS_COMPLETED, run.GetStatus(), "%v", run.GetError())
	_, body := get(t, "http://"+s.metrics+"/metrics")
	require.Contains(t, body, `specql_registry_reloads_total{outcome="invalid"} 1`, "what is wrong is told once")
}

func TestWaitsForTheSchema(t *testing.T) {
	t.Parallel()
	url := pgtest.Database(t)
	var migrated sync.WaitGroup
	s := start(t, t.TempDir(), func(o *server.Options) {
		o.Database, o.SchemaWait = url, time.Hour
		metrics := o.Metrics.Addr().String()
		migrated.Go(func() {
			for {
				if status, body := get(t, "http://"+metrics+"/readyz"); status == http.StatusServiceUnavailable && strings.Contains(body, "specql migrate-schema") {
					break
				}
			}
			status, _ := get(t, "http://"+metrics+"/healthz")
			if status != http.StatusOK {
				t.Errorf("healthz answers %d", status)
			}
			if _, err := schema.Migrate(t.Context(), url, nil); err != nil {
				t.Error(err)
			}
		})
	})
	migrated.Wait()
	status, _ := get(t, "http://"+s.metrics+"/readyz")
	require.Equal(t, http.StatusOK, status)
}
