package e2e

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestSeedRegistriesAreValid(t *testing.T) {
	files, err := filepath.Glob(filepath.Join("testdata", "seeds", "registry_*.yaml"))
	require.NoError(t, err)
	require.Len(t, files, 10)
	for _, file := range files {
		status, out, errs := run(t, "", nil, "validate-config", file)
		require.Zero(t, status, "%s\n%s%s", file, out, errs)
	}
	for _, env := range []string{"development", "production"} {
		file := filepath.Join("testdata", "seeds", "registry_overlay_"+env+".yaml")
		status, out, errs := run(t, "", nil, "validate-config", file, "--env", env)
		require.Zero(t, status, "%s\n%s%s", env, out, errs)
		status, out, errs = run(t, "", []string{"SPECQL_ENV=" + env}, "validate-config", file, "--verbose")
		require.Zero(t, status, "%s\n%s%s", env, out, errs)
	}
}

// The registry of 25 mistakes says `# N: what` in the line of each.
func TestEveryPlantedMistakeIsToldWithItsLine(t *testing.T) {
	file := filepath.Join(root, "pkg", "spec", "testdata", "mistakes.yaml")
	planted := map[int]bool{}
	for i, line := range strings.Split(read(t, file), "\n") {
		if _, comment, ok := strings.Cut(line, "# "); ok && strings.Contains(comment, ": ") && comment[0] >= '0' && comment[0] <= '9' {
			planted[i+1] = true
		}
	}
	require.Len(t, planted, 25)
	status, out, errs := run(t, "", nil, "validate-config", file, "-o", "json")
	require.Equal(t, 2, status, "%s%s", out, errs)
	var answer struct {
		Problems []struct {
			File           string
			Line, Column   int
			Message, Mend  string
			Severity, Path string
		}
	}
	require.NoError(t, json.Unmarshal([]byte(out), &answer), "%s", out)
	for _, p := range answer.Problems {
		require.Positive(t, p.Column)
		require.NotEmpty(t, p.Message)
		delete(planted, p.Line)
	}
	require.Empty(t, planted, "lines of which nothing is said; %s", out)
}

// Every document of the examples is valid, in every environment.
func TestExamplesAreValid(t *testing.T) {
	dir := filepath.Join(root, "examples", "multi-execution")
	for _, env := range []string{"", "development", "production"} {
		args := []string{"validate-config", filepath.Join(dir, "registry", "service_registry.yaml"), "--entities", filepath.Join(dir, "entities")}
		if env != "" {
			args = append(args, "--env", env)
		}
		status, out, errs := run(t, "", []string{"SPECQL_EXAMPLES_DIR=" + absolute(t, dir)}, args...)
		require.Zero(t, status, "%s\n%s%s", env, out, errs)
	}
}
