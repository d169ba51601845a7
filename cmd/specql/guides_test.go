package main

import (
	"os"
	"regexp"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/test/pgtest"
)

var guideSQL = regexp.MustCompile("(?ms)^```sql\n(.*?)^```$|`(SELECT [^`]+)`")

// The guides' way with psql makes the schema, and their queries run on it.
func TestGuideSQLRuns(t *testing.T) {
	t.Parallel()
	database, cluster := pgtest.Database(t), pgtest.Shared(t)
	cluster.Psql(t, database, read(t, "../../migrations/001_multi_execution.sql"))
	for _, command := range []string{"validate-schema", "check-permissions"} {
		r := specql(t, t.TempDir(), command, "--database", database)
		require.Equal(t, 0, r.status, r.out+r.err)
	}
	for _, guide := range []string{"../../docs/guides/MULTI_EXECUTION_MIGRATION.md", "../../docs/troubleshooting/MULTI_EXECUTION_TROUBLESHOOTING.md"} {
		raw, err := os.ReadFile(guide)
		require.NoError(t, err)
		found := guideSQL.FindAllSubmatch(raw, -1)
		require.NotEmpty(t, found, guide)
		for _, m := range found {
			cluster.Psql(t, database, string(m[1])+string(m[2]))
		}
	}
}
