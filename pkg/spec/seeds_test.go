package spec_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/spec"
)

// readFile reads a file of testdata.
func readFile(t testing.TB, name string) spec.File {
	t.Helper()
	content, err := os.ReadFile(filepath.Join("testdata", name)) //nolint:gosec // names come from the tests
	require.NoError(t, err)
	return spec.File{Name: name, Content: content}
}

func seedFiles(t testing.TB, prefix string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join("testdata", "seeds", prefix+"*.yaml"))
	require.NoError(t, err)
	require.NotEmpty(t, names)
	for i, name := range names {
		names[i] = strings.TrimPrefix(filepath.ToSlash(name), "testdata/")
	}
	return names
}

func TestRegistryFilesOfTheGuidesAreValid(t *testing.T) {
	for _, name := range seedFiles(t, "registry_") {
		t.Run(name, func(t *testing.T) {
			env := ""
			if _, after, ok := strings.Cut(name, "overlay_"); ok {
				env = strings.TrimSuffix(after, ".yaml")
			}
			r, problems := spec.ParseRegistry(readFile(t, name), spec.Options{Env: env})
			require.NoError(t, problems.Err())
			require.NotNil(t, r)
			require.NotEmpty(t, len(r.Services)+len(r.Alerts))
			for _, p := range problems {
				t.Log(p)
			}
		})
	}
}

func TestWorkflowFilesOfTheGuidesAreValid(t *testing.T) {
	for _, name := range seedFiles(t, "workflow_") {
		t.Run(name, func(t *testing.T) {
			a, problems := spec.ParseWorkflow(readFile(t, name), spec.Options{})
			require.NoError(t, problems.Err())
			require.NotEmpty(t, a.Steps)
			require.Equal(t, strings.TrimSuffix(filepath.Base(name), ".yaml"), a.Name)
			for _, p := range problems {
				t.Log(p)
			}
		})
	}
}
