// Package imports holds the borders between the rooms: what each may reach, by any path.
package imports

import (
	"bytes"
	"os/exec"
	"strings"
	"testing"
)

const module = "github.com/specql/mesh/"

// rules say what the packages below a prefix must not depend on, by any path, and why.
var rules = []struct {
	packages string
	deny     []string
	why      string
}{
	{"gen/...", []string{"github.com/jackc", "github.com/moby", "github.com/aws", "modernc.org"}, "applications import the API and nothing else"},
	{"pkg/...", []string{"github.com/jackc", "github.com/moby", "github.com/docker", "github.com/aws", "cloud.google.com", "github.com/Azure", "modernc.org"}, "what every service shares stays light"},
	{"pkg/spec/...", []string{"google.golang.org/grpc", "net/http", "os/exec"}, "the language is pure"},
	{"migrations/...", []string{"github.com/jackc", "google.golang.org", "modernc.org", module + "pkg"}, "plain files, for psql too"},
	{"services/orchestrator/internal/plan", []string{"google.golang.org/grpc", "database/sql", "net/http", "os/exec"}, "plans are pure"},
	{"services/orchestrator/internal/engine", []string{"database/sql", "modernc.org", "github.com/jackc", module + "services/orchestrator/internal/dispatch"}, "the engine declares what it needs"},
	{"services/orchestrator/...", []string{"github.com/moby", "github.com/docker", "github.com/aws", "cloud.google.com", "github.com/Azure", "k8s.io", module + "services/http-runner", module + "services/shell-runner", module + "services/docker-runner", module + "services/serverless-runner"}, "runners are reached by address alone"},
	{"services/http-runner/...", []string{"github.com/jackc", "modernc.org", "github.com/moby", module + "services/orchestrator", "cel.dev/cel-go"}, "a runner has no database and no workflow"},
	{"services/shell-runner/...", []string{"github.com/jackc", "modernc.org", "github.com/moby", "github.com/aws", module + "services/orchestrator", "cel.dev/cel-go"}, "a runner has no database and no workflow"},
	{"services/docker-runner/...", []string{"github.com/jackc", "modernc.org", "github.com/aws", module + "services/orchestrator", "cel.dev/cel-go"}, "a runner has no database and no workflow"},
	{"services/docker-runner/dockerrunner/...", []string{"k8s.io", "sigs.k8s.io"}, "clusters are the other backend's"},
	{"services/docker-runner/shim", []string{"google.golang.org", "k8s.io", "github.com/moby", "net/http"}, "it is in every Job, and takes of its memory"},
	{"services/serverless-runner/...", []string{"github.com/jackc", "modernc.org", "github.com/moby", module + "services/orchestrator", "cel.dev/cel-go"}, "a runner has no database and no workflow"},
	{"cmd/specql/...", []string{"github.com/jackc/pgx/v5/stdlib", "k8s.io"}, "the command compiles quickly"},
	{"examples/custom-runner/...", []string{module + "services", "modernc.org", "github.com/moby"}, "a runner of one's own needs the kit alone"},
}

func TestBorders(t *testing.T) {
	t.Parallel()
	for _, r := range rules {
		t.Run(r.packages, func(t *testing.T) {
			t.Parallel()
			cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", "-f", "{{.ImportPath}}", module+r.packages)
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			out, err := cmd.Output()
			if err != nil {
				t.Fatalf("go list: %v\n%s", err, stderr.String())
			}
			deps := strings.Fields(string(out))
			if len(deps) < 5 {
				t.Fatalf("go list found %d packages: the rule holds nothing", len(deps))
			}
			for _, dep := range deps {
				for _, deny := range r.deny {
					// google/uuid brings the interfaces of values, and no database.
					if dep == "database/sql/driver" {
						continue
					}
					if dep == deny || strings.HasPrefix(dep, deny+"/") {
						t.Errorf("%s reaches %s: %s", r.packages, dep, r.why)
					}
				}
			}
		})
	}
}
