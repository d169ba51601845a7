package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/test/pgtest"
)

// write makes files below a folder.
func write(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, text := range files {
		name = filepath.Join(dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(name), 0o700))
		require.NoError(t, os.WriteFile(name, []byte(text), 0o600))
	}
}

func TestGenerateSchema(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, dir, map[string]string{
		"entities/payment.yaml":   "entity: payment\nfields: {order: {type: uuid, references: order.id}}\nactions: {process_payment: {steps: []}}\n",
		"entities/more/order.yml": "entity: order\nschema: shop\nfields: {status: {type: string, validation: {enum: [new]}}}\n",
		"entities/README":         "not read",
	})
	r := specql(t, dir, "generate-schema", "entities/")
	require.Equal(t, 0, r.status, r.err)
	require.Empty(t, r.err)
	require.Contains(t, r.out, `CREATE TABLE IF NOT EXISTS "app"."payment"`)
	require.Contains(t, r.out, `CREATE OR REPLACE FUNCTION "app"."process_payment"(id uuid`)
	require.Contains(t, r.out, `GRANT USAGE ON SCHEMA jobs, "app" TO web`)
	require.Equal(t, r.out, specql(t, dir, "generate-schema", "entities").out, "each time the same")
	url := pgtest.Database(t)
	cluster := pgtest.Shared(t)
	cluster.Psql(t, url, r.out)

	// Files, run in the order of their names, say the same.
	files := specql(t, dir, "generate-schema", "entities", "--out", "sql")
	require.Equal(t, 0, files.status, files.err)
	names, err := filepath.Glob(filepath.Join(dir, "sql/*.sql"))
	require.NoError(t, err)
	url = pgtest.Database(t)
	var said []string
	for _, name := range names {
		text, err := os.ReadFile(name)
		require.NoError(t, err)
		cluster.Psql(t, url, string(text))
		base := filepath.Base(name)
		said = append(said, "wrote    sql/"+base)
		_, statements, _ := strings.Cut(string(text), "\n\n")
		require.Contains(t, r.out, statements)
	}
	require.Equal(t, []string{
		"wrote    sql/00_schemas.sql", "wrote    sql/10_app.payment.sql", "wrote    sql/10_shop.order.sql", "wrote    sql/20_constraints.sql", "wrote    sql/30_functions.sql",
	}, said)
	require.ElementsMatch(t, said, strings.Split(strings.TrimSpace(files.out), "\n"))
	require.Equal(t, "2", cluster.Psql(t, url, "SELECT count(*) FROM pg_tables WHERE schemaname IN ('app', 'shop')"))

	// The file of an entity that is gone goes too; other files stay.
	write(t, dir, map[string]string{
		"entities/payment.yaml": "entity: payment\n", "entities/more/order.yml": "entity: purchase\n", "sql/10_mine.sql": "-- mine\n", "sql/notes.txt": "mine",
	})
	files = specql(t, dir, "generate-schema", "entities", "--out", "sql")
	require.Equal(t, 0, files.status, files.err)
	require.Contains(t, files.out, "removed  sql/10_shop.order.sql\n")
	require.Contains(t, files.out, "removed  sql/30_functions.sql\n")
	require.NoFileExists(t, filepath.Join(dir, "sql/10_shop.order.sql"))
	require.FileExists(t, filepath.Join(dir, "sql/10_mine.sql"))
	require.FileExists(t, filepath.Join(dir, "sql/notes.txt"))

	r = specql(t, dir, "generate-schema", "entities", "-o", "json")
	require.Equal(t, 0, r.status, r.err)
	got := decode[struct {
		Files []struct{ Name, SQL string }
		Valid bool
	}](t, r.out)
	require.True(t, got.Valid)
	require.Len(t, got.Files, 4)
	require.Equal(t, "00_schemas.sql", got.Files[0].Name)
	require.Contains(t, got.Files[1].SQL, "CREATE TABLE")
}

func TestGenerateSchemaTellsProblems(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, dir, map[string]string{
		"entities/payment.yaml": "entity: payment\nfields:\n  order: {type: uuid, references: ordr.id}\n",
		"entities/order.yaml":   "entity: order\n",
		"bad/a.yaml":            "entity: a\nfields: {x: strng}\n",
		"bad/b.yaml":            "entity: b\nfields: {x: nope}\n",
		"empty/README":          "",
	})
	r := specql(t, dir, "generate-schema", "entities", "--out", "sql")
	require.Equal(t, 2, r.status)
	require.Empty(t, r.out)
	require.Equal(t, "entities/payment.yaml:3:3: error: fields.order.references: there is no entity ordr here; did you mean \"order\"?\nentities is not valid: 1 error\n", r.err)
	require.NoDirExists(t, filepath.Join(dir, "sql"))
	r = specql(t, dir, "generate-schema", "bad")
	require.Equal(t, 2, r.status)
	require.Contains(t, r.err, "bad/a.yaml:2:13: error: ")
	require.Contains(t, r.err, "bad/b.yaml:2:13: error: ")
	r = specql(t, dir, "generate-schema", "bad", "-o", "json")
	require.Equal(t, 2, r.status)
	require.Len(t, decode[struct{ Problems []struct{ File string } }](t, r.out).Problems, 2)
	for want, args := range map[string][]string{
		"holds no .yaml or .yml file": {"empty"}, "no such file": {"nowhere"}, "accepts 1 arg": {}, `--output "yaml" is not known`: {"entities", "-o", "yaml"},
	} {
		r = specql(t, dir, append([]string{"generate-schema"}, args...)...)
		require.Equal(t, 2, r.status, args)
		require.Contains(t, r.err, want)
	}
}

// TestGenerateSchemaOfTheExamples: the command of the guide, on its entities.
func TestGenerateSchemaOfTheExamples(t *testing.T) {
	t.Parallel()
	root, err := filepath.Abs("../..")
	require.NoError(t, err)
	r := specql(t, root, "generate-schema", "examples/multi-execution/entities/")
	require.Equal(t, 0, r.status, r.err)
	url := pgtest.Database(t)
	pgtest.Shared(t).Psql(t, url, r.out+r.out)
	require.Equal(t, "12", pgtest.Shared(t).Psql(t, url, "SELECT count(*) FROM pg_tables WHERE schemaname = 'examples'"))
}
