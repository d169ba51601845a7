package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/services/orchestrator/server"
)

// A mounted ConfigMap is a folder ..TIME with the files, a link ..data to it, and links to the files.
func TestEntitiesOfAMountedConfigMap(t *testing.T) {
	dir := t.TempDir()
	entities := filepath.Join(dir, "entities")
	require.NoError(t, os.MkdirAll(filepath.Join(entities, "..2026_11_28"), 0o755))
	write := func(name, text string) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	write("registry.yaml", "services: []\n")
	write("entities/..2026_11_28/order.yaml", "entity: order\n")
	write("entities/..2026_11_28/notes.txt", "no entity\n")
	require.NoError(t, os.Symlink("..2026_11_28", filepath.Join(entities, "..data")))
	require.NoError(t, os.Symlink("..data/order.yaml", filepath.Join(entities, "order.yaml")))
	require.NoError(t, os.Symlink("..data/notes.txt", filepath.Join(entities, "notes.txt")))

	s := settings{registry: filepath.Join(dir, "registry.yaml"), entities: entities}
	var o server.Options
	require.NoError(t, s.read(&o))
	require.Equal(t, "services: []\n", string(o.Registry.Content))
	require.Len(t, o.Entities, 1)
	require.Equal(t, filepath.Join(entities, "order.yaml"), o.Entities[0].Name)
	require.Equal(t, "entity: order\n", string(o.Entities[0].Content))

	t.Chdir(entities)
	s.entities = "."
	o = server.Options{}
	require.NoError(t, s.read(&o))
	require.Len(t, o.Entities, 1, "the folder itself may be named by dots")

	s.registry = filepath.Join(dir, "none.yaml")
	require.ErrorContains(t, s.read(&o), "--registry")
}
