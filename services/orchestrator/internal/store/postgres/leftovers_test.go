package postgres

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/services/orchestrator/internal/store"
	"github.com/specql/mesh/test/pgtest"
)

// TestLegacyPartialKeys: keys that a partial unique index kept apart stay apart.
func TestLegacyPartialKeys(t *testing.T) {
	c := pgtest.Shared(t)
	url := pgtest.Database(t)
	const tenant = "6a8f9d0e-0000-4000-8000-000000000001"
	c.Psql(t, url, "CREATE SCHEMA jobs; "+legacyTables["bare"]+`; CREATE UNIQUE INDEX u ON jobs.tb_job_run (tenant_id, idempotency_key) WHERE idempotency_key IS NOT NULL;
		INSERT INTO jobs.tb_job_run (id, service_name, operation, idempotency_key, tenant_id, status) VALUES (gen_random_uuid(), 'a', 'b', 'k', '`+tenant+`', 'completed')`)
	_, err := Migrate(t.Context(), Options{URL: url})
	require.NoError(t, err)
	_, err = c.Run(url, "INSERT INTO jobs.tb_job_run (service_name, operation, idempotency_key, tenant_id) VALUES ('a', 'b', 'k', '"+tenant+"')")
	require.ErrorContains(t, err, "ux_job_run_idempotency_key")
	problems, err := Validate(t.Context(), Options{URL: url})
	require.NoError(t, err)
	require.Empty(t, problems)
}

// TestLegacyStates: an enumeration without all states is refused before anything is changed, with the mend, which works.
func TestLegacyStates(t *testing.T) {
	c := pgtest.Shared(t)
	url := pgtest.Database(t)
	c.Psql(t, url, "CREATE SCHEMA jobs; CREATE TYPE jobs.state AS ENUM ('pending', 'running', 'completed', 'failed'); "+
		strings.Replace(legacyTables["bare"], "status text", "status jobs.state", 1))
	_, err := Migrate(t.Context(), Options{URL: url})
	require.ErrorContains(t, err, "has no value 'cancelled'; nothing was changed")
	require.ErrorContains(t, err, "ALTER TYPE jobs.state ADD VALUE 'cancelled'")
	require.Equal(t, "1|0", c.Psql(t, url, `SELECT (SELECT count(*) FROM pg_class WHERE relnamespace = 'jobs'::regnamespace AND relkind = 'r'),
		(SELECT count(*) FROM pg_proc WHERE pronamespace = 'jobs'::regnamespace)`))
	c.Psql(t, url, "ALTER TYPE jobs.state ADD VALUE 'cancelled'")
	_, err = Migrate(t.Context(), Options{URL: url})
	require.NoError(t, err)
	c.Psql(t, url, "INSERT INTO jobs.tb_job_run (id, service_name, operation, status) VALUES (gen_random_uuid(), 'a', 'b', 'cancelled')")
}

// TestLegacyInfinity: old rows with infinite times are upgraded, counted and read.
func TestLegacyInfinity(t *testing.T) {
	c := pgtest.Shared(t)
	url := pgtest.Database(t)
	c.Psql(t, url, "CREATE SCHEMA jobs; "+legacyTables["bare"]+`; INSERT INTO jobs.tb_job_run (id, service_name, operation, status, completed_at, started_at) VALUES
		(gen_random_uuid(), 'a', 'b', 'completed', 'infinity', now()), (gen_random_uuid(), 'a', 'b', 'failed', now(), '-infinity'), (gen_random_uuid(), 'a', 'b', 'pending', NULL, 'infinity')`)
	_, err := Migrate(t.Context(), Options{URL: url})
	require.NoError(t, err)
	st := openAt(t, url)
	jobs, err := st.ClaimJobs(t.Context(), "a", 10)
	require.NoError(t, err)
	require.Len(t, jobs, 1)
	p, err := st.Performance(t.Context(), store.JobFilter{})
	require.NoError(t, err)
	require.EqualValues(t, 3, p[0].Jobs)
	require.NoError(t, st.Maintain(t.Context(), 0))
}

// TestLegacyLeftovers: rules of an old table that may refuse what the engine writes are named, with the mend.
func TestLegacyLeftovers(t *testing.T) {
	c := pgtest.Shared(t)
	url := pgtest.Database(t)
	rules := `, CONSTRAINT two CHECK (status IN ('pending', 'running', 'completed', 'failed') AND attempts >= 0), CONSTRAINT three UNIQUE (service_name, operation, idempotency_key))`
	c.Psql(t, url, "CREATE SCHEMA jobs; "+strings.TrimSuffix(legacyTables["bare"], ")")+rules)
	_, err := Migrate(t.Context(), Options{URL: url})
	require.NoError(t, err)
	problems, err := Validate(t.Context(), Options{URL: url})
	require.NoError(t, err)
	require.Len(t, problems, 2)
	require.Contains(t, problems[0].What, "constraint two")
	require.Contains(t, problems[0].Mend, "ALTER TABLE jobs.tb_job_run DROP CONSTRAINT two")
	require.Contains(t, problems[1].What, "index three")
	require.Contains(t, problems[1].Mend, "ALTER TABLE jobs.tb_job_run DROP CONSTRAINT three")
	c.Psql(t, url, "ALTER TABLE jobs.tb_job_run DROP CONSTRAINT two, DROP CONSTRAINT three")
	problems, err = Validate(t.Context(), Options{URL: url})
	require.NoError(t, err)
	require.Empty(t, problems)
}
