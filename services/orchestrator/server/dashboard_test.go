package server_test

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/durationpb"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/pkg/telemetry"
	"github.com/specql/mesh/pkg/telemetry/scrape"
	"github.com/specql/mesh/services/orchestrator/server"
)

const figuresRegistry = `
services:
  - name: svc
    type: t
    category: c
    execution_type: echo
    operations:
      - {name: say}
      - {name: charge}
      - {name: flaky}
      - {name: deny}
`

// Each metric that the dashboard asks for is there on a mesh that has done a bit of everything.
func TestTheDashboardAsksForWhatThereIs(t *testing.T) {
	t.Parallel()
	figures := scrape.NewRegistry()
	s := startWith(t, t.TempDir(), runner.Options{MaxConcurrency: 2, DrainTimeout: time.Millisecond, Registerer: figures}, func(o *server.Options) {
		o.Registry = &spec.File{Name: "registry.yaml", Content: []byte(figuresRegistry)}
		o.Entities = nil
	})
	for operation, want := range map[string]specqlv1.Status{
		"say": specqlv1.Status_STATUS_COMPLETED, "charge": specqlv1.Status_STATUS_COMPLETED, "flaky": specqlv1.Status_STATUS_COMPLETED, "deny": specqlv1.Status_STATUS_FAILED,
	} {
		run := s.execute(&specqlv1.ExecuteActionRequest{Workflow: workflow(operation), Wait: durationpb.New(time.Minute)})
		require.Equal(t, want, run.GetStatus(), "%s: %v", operation, run.GetError())
	}
	there := map[string]bool{}
	web := httptest.NewServer(telemetry.Handler(figures, nil))
	defer web.Close()
	for _, url := range []string{web.URL, "http://" + s.metrics} {
		resp, err := http.Get(url + "/metrics")
		require.NoError(t, err)
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		for line := range strings.Lines(string(body)) {
			if name := regexp.MustCompile(`^[a-z_]+`).FindString(line); name != "" {
				there[name] = true
			}
		}
	}
	raw, err := os.ReadFile("../../../deploy/grafana/specql.json")
	require.NoError(t, err)
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	require.NoError(t, json.Unmarshal(raw, &dashboard))
	asked := map[string]bool{}
	for _, p := range dashboard.Panels {
		for _, target := range p.Targets {
			for _, name := range regexp.MustCompile(`\b(specql|process|go)_[a-z_]+`).FindAllString(target.Expr, -1) {
				require.True(t, there[name], "%s: %s", p.Title, name)
				asked[name] = true
			}
		}
	}
	require.Greater(t, len(asked), 20)
	for name := range there {
		base := regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(name, "")
		if strings.HasPrefix(name, "specql_") {
			doc, err := os.ReadFile("../../../docs/observability.md")
			require.NoError(t, err)
			require.Contains(t, string(doc), "`"+base+"`", "the page names each metric")
		}
	}
}
