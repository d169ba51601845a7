package e2e

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// An application of its own, outside of the repository, uses the client in under 15 lines.
func TestApplicationUsesTheClient(t *testing.T) {
	source := read(t, "testdata", "application", "main.go.txt")
	require.Less(t, strings.Count(source, "\n"), 15)
	d, r := withServices(t)
	r.says("worker.work", http.StatusOK, map[string]any{"done": true})

	dir := t.TempDir()
	module := fmt.Sprintf(`module example.com/application

go 1.26.0

require github.com/specql/mesh/pkg v0.0.0

replace github.com/specql/mesh/pkg => %s

replace github.com/specql/mesh/gen => %s
`, absolute(t, root, "pkg"), absolute(t, root, "gen"))
	for name, content := range map[string]string{"main.go": source, "go.mod": module, "go.sum": read(t, root, "pkg", "go.sum")} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600))
	}
	program := filepath.Join(dir, "application")
	build := exec.CommandContext(t.Context(), "go", "build", "-mod=mod", "-o", program, ".")
	build.Dir, build.Env = dir, append(os.Environ(), "GOWORK=off", "GOFLAGS=")
	out, err := build.CombinedOutput()
	require.NoError(t, err, "%s", out)

	out, err = exec.CommandContext(t.Context(), program, d.api, oneCall+"output: $work").CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Equal(t, "STATUS_COMPLETED map[done:true] <nil>\n", string(out))
}
