package registry_test

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/internal/registry"
	"github.com/specql/mesh/services/orchestrator/internal/store"
	"github.com/specql/mesh/services/orchestrator/internal/store/sqlite"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const secret = "hunter2"

func environment(name string) (string, bool) {
	switch name {
	case "DATABASE_URL":
		return secret, true
	case "SPECQL_VAR_HOST":
		return "pay.example.com", true
	}
	return "", false
}

func newRegistry(t *testing.T) (*registry.Registry, *sqlite.Store) {
	t.Helper()
	s, err := sqlite.Open(t.Context(), sqlite.Options{Path: filepath.Join(t.TempDir(), "specql.db"), Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return registry.New(s, nil, environment, time.Now), s
}

// naming is a registry whose base_url names a variable.
func naming(variable string) registry.Documents {
	text := fmt.Sprintf("services:\n  - name: a\n    type: t\n    category: c\n    runner_config: {base_url: \"http://${%s}\"}\n    operations: [{name: x}]\n", variable)
	return registry.FromFiles(spec.File{Name: "registry.yaml", Content: []byte(text)}, nil, "")
}

func TestDocumentsOfTheAPIOnlyNameVariablesMeantForThem(t *testing.T) {
	t.Parallel()
	r, s := newRegistry(t)
	smuggled := naming("DATABASE_URL")
	smuggled.Vars = map[string]string{"DATABASE_URL": "from the caller"}
	for name, apply := range map[string]func() (spec.Problems, error){
		"validate": func() (spec.Problems, error) { return r.Validate(t.Context(), naming("DATABASE_URL"), false) },
		"apply": func() (spec.Problems, error) {
			_, problems, err := r.Apply(t.Context(), naming("DATABASE_URL"))
			return problems, err
		},
		"apply with a value of its own": func() (spec.Problems, error) {
			_, problems, err := r.Apply(t.Context(), smuggled)
			return problems, err
		},
	} {
		problems, err := apply()
		require.NoError(t, err, name)
		require.True(t, problems.HasErrors(), name)
		require.Contains(t, problems.Err().Error(), "registry.yaml:5:", name)
		require.Contains(t, problems.Err().Error(), "DATABASE_URL", name)
		require.NotContains(t, problems.Err().Error(), secret, name)
	}
	require.Empty(t, r.Current().Registry.Services, "what was in force stays")
	_, _, err := s.Registry(t.Context())
	require.ErrorIs(t, err, store.ErrNotFound)

	snapshot, problems, err := r.Apply(t.Context(), naming("SPECQL_VAR_HOST"))
	require.NoError(t, err)
	require.NoError(t, problems.Err())
	require.Equal(t, "http://pay.example.com", snapshot.Registry.Services[0].RunnerConfig["base_url"])
}

func TestOperatorsFilesNameAnyVariable(t *testing.T) {
	t.Parallel()
	r, _ := newRegistry(t)
	snapshot, problems, err := r.ApplyFiles(t.Context(), naming("DATABASE_URL"))
	require.NoError(t, err)
	require.NoError(t, problems.Err())
	require.Equal(t, "http://"+secret, snapshot.Registry.Services[0].RunnerConfig["base_url"])
}

// A snapshot read back is the one that was stored, whatever the environment says by then.
func TestLoadPutsInForceWhatWas(t *testing.T) {
	t.Parallel()
	r, s := newRegistry(t)
	require.NoError(t, r.Load(t.Context()), "a store that knows none")
	before, problems, err := r.ApplyFiles(t.Context(), naming("SPECQL_VAR_HOST"))
	require.NoError(t, err)
	require.NoError(t, problems.Err())

	again := registry.New(s, nil, func(string) (string, bool) { return "elsewhere", true }, time.Now)
	require.NoError(t, again.Load(t.Context()))
	require.Equal(t, before.Digest, again.Current().Digest)
	require.Equal(t, "http://pay.example.com", again.Current().Registry.Services[0].RunnerConfig["base_url"])
	require.WithinDuration(t, time.Now(), again.Current().AppliedAt, time.Minute)
}

// A run finds its plan in another process, and however many other workflows came between.
func TestAWorkflowOfARunIsFoundAgain(t *testing.T) {
	t.Parallel()
	r, s := newRegistry(t)
	_, problems, err := r.ApplyFiles(t.Context(), naming("SPECQL_VAR_HOST"))
	require.NoError(t, err)
	require.NoError(t, problems.Err())
	keep := func(ctx context.Context, seconds int) string {
		w, problems, err := r.Workflow(fmt.Sprintf("actions: [{wait: {seconds: %d}}]", seconds))
		require.NoError(t, err)
		require.NoError(t, problems.Err())
		require.NoError(t, r.Keep(ctx, w))
		return w.Digest
	}
	first := keep(t.Context(), 0)
	for i := range 300 {
		keep(t.Context(), i+1)
	}
	other := registry.New(s, nil, environment, time.Now)
	for _, reg := range []*registry.Registry{r, other} {
		p, err := reg.Plan(t.Context(), &store.Run{Snapshot: first})
		require.NoError(t, err)
		require.Len(t, p.Nodes, 1)
		require.True(t, strings.HasPrefix(p.Nodes[0].Path(), "steps[0]"))
	}
	_, err = other.Plan(t.Context(), &store.Run{Snapshot: "no such digest"})
	require.ErrorIs(t, err, store.ErrNotFound)
}
