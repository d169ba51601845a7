package ddl

import (
	"os"
	"regexp"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/spec/ddl"
	"github.com/specql/mesh/test/pgtest"
)

// TestTheDocumentedSQLWorks runs every SQL block of the reference, one after the other.
func TestTheDocumentedSQLWorks(t *testing.T) {
	t.Parallel()
	raw, err := os.ReadFile("../../docs/reference/sql.md")
	require.NoError(t, err)
	entity := regexp.MustCompile("(?s)```yaml\n(entity:.*?)```").FindStringSubmatch(string(raw))
	require.NotNil(t, entity)
	url := pgtest.Database(t)
	mesh(t, url)
	psql(t, url, "DO $$ BEGIN IF to_regrole('web') IS NULL THEN CREATE ROLE web; END IF; END $$")
	apply(t, url, parse(t, entity[1], "entity: order\n"))
	blocks := regexp.MustCompile("(?s)```sql\n(.*?)```").FindAllStringSubmatch(string(raw), -1)
	require.Greater(t, len(blocks), 6)
	for _, b := range blocks {
		psql(t, url, b[1])
	}
	require.Equal(t, "4|1", psql(t, url, "SELECT (SELECT count(*) FROM jobs.tb_workflow_run WHERE status = 'pending'), (SELECT count(*) FROM jobs.tb_job_run WHERE status = 'pending')"))

	// A role with the right on one function and none on the table.
	psql(t, url, "SET ROLE web; SELECT app.process_payment()")
	require.Contains(t, refused(t, url, "SET ROLE web; INSERT INTO jobs.tb_workflow_run (entity, action) VALUES ('payment', 'process_payment')"), "permission denied")
	require.Equal(t, "web", psql(t, url, "SELECT triggered_by FROM jobs.tb_workflow_run ORDER BY created_at DESC LIMIT 1"))
	tables, _ := ddl.Tables(parse(t, entity[1], "entity: order\n"), ddl.Options{})
	require.Zero(t, undone(t, url, tables))
}
