package sqlite

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
)

// view reads rows as maps.
func view(t *testing.T, st *Store, query string) []map[string]any {
	t.Helper()
	columns, rows, err := st.Query(t.Context(), query)
	require.NoError(t, err)
	var all []map[string]any
	for _, values := range rows {
		row := map[string]any{}
		for i, c := range columns {
			row[c] = values[i]
		}
		all = append(all, row)
	}
	return all
}

func TestViewsOfNothing(t *testing.T) {
	st := openTest(t)
	for _, name := range []string{
		"tb_job_run", "v_execution_performance_by_type", "v_resource_usage_by_runner", "v_runner_failure_patterns",
		"v_job_queue_health", "v_cost_by_service", "v_security_violations",
	} {
		require.Empty(t, view(t, st, "SELECT * FROM jobs."+name), name)
	}
}

func TestViews(t *testing.T) {
	st := openTest(t)
	require.NoError(t, exec(t, st, "INSERT INTO jobs.tb_workflow_run (id) VALUES ('r1'), ('r2')"))
	job := func(i int, columns, values string) {
		t.Helper()
		require.NoError(t, exec(t, st, fmt.Sprintf(`INSERT INTO jobs.tb_job_run (id, identifier, run_id, operation, %s)
			VALUES ('j%d', 'j%d', 'r%d', 'op', %s)`, columns, i, i, 1+i%2, values)))
	}
	for i := range 100 {
		job(i, "service_name, execution_type, status, attempts, duration_seconds, resource_usage, security_context",
			fmt.Sprintf(`'api', 'http', 'completed', 1, %d, '{"cpu_seconds": 0.5, "peak_memory_mb": %d}', '{"runner": "http-runner@a"}'`, i+1, i+1))
	}
	for i := 100; i < 104; i++ {
		job(i, "service_name, execution_type, status, attempts, error_code, error_message, completed_at, resource_usage",
			fmt.Sprintf(`'sh', 'shell', 'failed', 2, 'TIMEOUT', 'slow %d', '2026-01-01 00:00:0%d.000000', '{"oom_killed": true}'`, i, i-100))
	}
	job(104, "service_name, execution_type, status, error_code, error_message, tenant_id, security_context",
		`'sh', 'shell', 'failed', 'POLICY_VIOLATION', 'no', 'acme',
		'{"policy_digest": "d", "runner": "shell-runner@b", "subject": "ann", "checks": [
			{"rule": "allowed_commands", "subject": "/bin/rm", "detail": "not allowed"},
			{"rule": "file_access", "subject": "/tmp", "allowed": true},
			{"rule": "network_access", "subject": "x", "allowed": false, "detail": "none"}]}'`)
	job(105, "service_name, execution_type, status, error_code, error_message", `'sh', 'shell', 'failed', 'POLICY_VIOLATION', 'no checks'`)
	job(106, "service_name, execution_type, status", `'fn', 'serverless', 'pending'`)
	job(107, "service_name, execution_type, status, started_at, timeout_seconds", `'fn', 'serverless', 'running', '2026-01-01 00:00:00', 1`)
	job(108, "service_name, execution_type, status, next_attempt_at", `'fn', 'serverless', 'running', '9999-01-01 00:00:00'`)
	job(109, "service_name, execution_type, status, resource_usage", `'fn', 'serverless', 'completed', '{"cost_usd": 0.25, "billed_duration_ms": 100}'`)
	job(110, "service_name, execution_type, status, resource_usage", `'fn', 'serverless', 'completed', '{"cost_usd": 0.5}'`)

	performance := view(t, st, "SELECT * FROM jobs.v_execution_performance_by_type")
	require.Len(t, performance, 3)
	http := performance[0]
	require.Equal(t, "http", http["execution_type"])
	require.Equal(t, []any{int64(100), int64(100), int64(0), 1.0, 50.5, 50.0, 95.0, 99.0},
		[]any{
			http["total_jobs"], http["completed"], http["failed"], http["success_rate"], http["avg_duration_seconds"],
			http["p50_duration_seconds"], http["p95_duration_seconds"], http["p99_duration_seconds"],
		})
	require.Equal(t, int64(3), performance[1]["active"])
	require.Nil(t, performance[2]["p95_duration_seconds"])

	usage := view(t, st, "SELECT * FROM jobs.v_resource_usage_by_runner")
	require.Len(t, usage, 3)
	require.Equal(t, "http-runner@a", usage[0]["runner"])
	require.InDelta(t, 50.0, usage[0]["total_cpu_seconds"], 1e-9)
	require.EqualValues(t, 100, usage[0]["max_peak_memory_mb"])
	require.Nil(t, usage[0]["total_network_rx_mb"], "nobody measured it")
	require.EqualValues(t, 4, usage[2]["oom_killed_jobs"])

	failures := view(t, st, "SELECT * FROM jobs.v_runner_failure_patterns")
	require.Len(t, failures, 2)
	require.Equal(t, []any{"TIMEOUT", int64(4), int64(2), 4.0 / 6, "slow 103", "2026-01-01 00:00:03.000000"},
		[]any{
			failures[0]["error_code"], failures[0]["failures"], failures[0]["affected_runs"], failures[0]["failure_rate"],
			failures[0]["last_error_message"], failures[0]["last_seen_at"],
		})

	health := view(t, st, "SELECT * FROM jobs.v_job_queue_health WHERE execution_type = 'serverless'")
	require.Len(t, health, 1)
	require.Equal(t, []any{int64(1), int64(2), int64(1), int64(1)},
		[]any{health[0]["pending"], health[0]["running"], health[0]["waiting_for_retry"], health[0]["overdue"]})
	require.Greater(t, health[0]["longest_running_seconds"], 1e6)

	cost := view(t, st, "SELECT * FROM jobs.v_cost_by_service")
	require.Len(t, cost, 1)
	require.Equal(t, []any{"fn", int64(2), 0.75, 0.75}, []any{cost[0]["service_name"], cost[0]["priced_jobs"], cost[0]["total_cost_usd"], cost[0]["cost_usd_last_hour"]})

	violations := view(t, st, "SELECT * FROM jobs.v_security_violations ORDER BY job_id, rule")
	require.Len(t, violations, 3)
	require.Equal(t, []any{"allowed_commands", "/bin/rm", "not allowed", "ann", "acme"},
		[]any{violations[0]["rule"], violations[0]["attempted"], violations[0]["detail"], violations[0]["subject"], violations[0]["tenant_id"]})
	require.Equal(t, "network_access", violations[1]["rule"])
	require.Equal(t, []any{nil, "no checks"}, []any{violations[2]["rule"], violations[2]["detail"]})
}

func TestQueryOnlyReads(t *testing.T) {
	st := openTest(t)
	require.NoError(t, exec(t, st, "INSERT INTO jobs.tb_workflow_run (id) VALUES ('r')"))
	for _, statement := range []string{
		"DELETE FROM jobs.tb_workflow_run", "UPDATE jobs.tb_workflow_run SET status = 'failed'",
		"DROP TABLE jobs.tb_workflow_run", "INSERT INTO jobs.tb_workflow_run (id) VALUES ('s')", "no SQL",
	} {
		_, _, err := st.Query(t.Context(), statement)
		require.Error(t, err, statement)
	}
	_, _, err := st.Query(t.Context(), "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n")
	require.ErrorContains(t, err, "add a LIMIT")
	require.Len(t, view(t, st, "SELECT * FROM jobs.tb_workflow_run WHERE status = 'pending'"), 1)
}
