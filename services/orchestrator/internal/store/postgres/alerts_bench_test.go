package postgres

import (
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
)

// BenchmarkWindowFigures is what an evaluation of alerts reads, beside a million jobs of a day.
func BenchmarkWindowFigures(b *testing.B) {
	st := openTest(b)
	for _, statement := range []string{
		`INSERT INTO jobs.tb_workflow_run (id, action, status, owner, epoch, created_at, started_at, completed_at)
		SELECT ('00000000-0000-7000-8000-' || lpad(to_hex(i), 12, '0'))::uuid, 'a', 'completed', 'o', 1, at, at, at + interval '1 second'
		FROM (SELECT i, now() - i * interval '86.4 milliseconds' AS at FROM generate_series(1, 1000000) AS i) AS g`,
		`INSERT INTO jobs.tb_job_run (id, identifier, run_id, step_path, service_name, operation, execution_type, status, attempts, by_sql, error_code, created_at, started_at, completed_at, duration_seconds)
		SELECT ('00000000-0000-7000-9000-' || lpad(to_hex(i), 12, '0'))::uuid, i::text, ('00000000-0000-7000-8000-' || lpad(to_hex(i), 12, '0'))::uuid, 'steps[0]', 'svc', 'op',
			(array['http', 'shell', 'docker'])[1 + i % 3], CASE WHEN i % 20 = 0 THEN 'failed' ELSE 'completed' END, 1, false, CASE WHEN i % 20 = 0 THEN 'REMOTE_ERROR' END,
			at, at, at + interval '1 second', 1 + i % 100
		FROM (SELECT i, now() - i * interval '86.4 milliseconds' AS at FROM generate_series(1, 1000000) AS i) AS g`,
		"ANALYZE jobs.tb_workflow_run", "ANALYZE jobs.tb_job_run",
	} {
		_, err := st.pool.Exec(b.Context(), "SET statement_timeout = 0; "+statement, pgx.QueryExecModeSimpleProtocol)
		require.NoError(b, err)
	}
	for _, window := range []time.Duration{time.Minute, 15 * time.Minute, time.Hour, 24 * time.Hour} {
		b.Run(window.String(), func(b *testing.B) {
			for b.Loop() {
				rows, err := st.WindowFigures(b.Context(), time.Now().Add(-window))
				require.NoError(b, err)
				require.Len(b, rows, 4)
			}
		})
	}
}
