package postgres

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

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

var viewNames = []string{
	"v_execution_performance_by_type", "v_resource_usage_by_runner", "v_runner_failure_patterns",
	"v_job_queue_health", "v_cost_by_service", "v_security_violations", "v_denials",
}

func TestViewsOfNothing(t *testing.T) {
	st := openTest(t)
	for _, name := range append([]string{"tb_job_run"}, viewNames...) {
		require.Empty(t, view(t, st, "SELECT * FROM jobs."+name), name)
	}
}

const (
	runOne = "00000000-0000-4000-8000-000000000001"
	runTwo = "00000000-0000-4000-8000-000000000002"
)

func jobID(i int) string { return fmt.Sprintf("00000000-0000-4000-9000-%012d", i) }

// fillViews makes jobs of every kind. It is what the test of the embedded database's views makes.
func fillViews(t *testing.T, st *Store) {
	t.Helper()
	require.NoError(t, run(t, st, "INSERT INTO jobs.tb_workflow_run (id) VALUES ('"+runOne+"'), ('"+runTwo+"')"))
	job := func(i int, columns, values string) {
		t.Helper()
		runID := runOne
		if i%2 == 1 {
			runID = runTwo
		}
		require.NoError(t, run(t, st, fmt.Sprintf(`INSERT INTO jobs.tb_job_run (id, identifier, run_id, operation, %s)
			VALUES ('%s', 'j%d', '%s', 'op', %s)`, columns, jobID(i), i, runID, values)))
	}
	for i := range 100 {
		job(i, "service_name, execution_type, status, attempts, duration_seconds, resource_usage, security_context",
			fmt.Sprintf(`'api', 'http', 'completed', 1, %d, '{"cpu_seconds": 0.5, "peak_memory_mb": %d}', '{"runner": "http-runner@a"}'`, i+1, i+1))
	}
	for i := 100; i < 104; i++ {
		job(i, "service_name, execution_type, status, attempts, error_code, error_message, completed_at, resource_usage",
			fmt.Sprintf(`'sh', 'shell', 'failed', 2, 'TIMEOUT', 'slow %d', '2026-01-01 00:00:0%d.000000Z', '{"oom_killed": true, "cpu_seconds": "no number"}'`, i, i-100))
	}
	job(104, "service_name, execution_type, status, error_code, error_message, security_context",
		`'sh', 'shell', 'failed', 'POLICY_VIOLATION', 'no',
		'{"policy_digest": "d", "runner": "shell-runner@b", "subject": "ann", "checks": [
			{"rule": "allowed_commands", "subject": "/bin/rm", "detail": "not allowed"},
			{"rule": "file_access", "subject": "/tmp", "allowed": true},
			{"rule": "network_access", "subject": "x", "allowed": false, "detail": "none"}]}'`)
	job(105, "service_name, execution_type, status, error_code, error_message", `'sh', 'shell', 'failed', 'POLICY_VIOLATION', 'no checks'`)
	job(106, "service_name, execution_type, status", `'fn', 'serverless', 'pending'`)
	job(107, "service_name, execution_type, status, started_at, timeout_seconds", `'fn', 'serverless', 'running', '2026-01-01 00:00:00Z', 1`)
	job(108, "service_name, execution_type, status, next_attempt_at", `'fn', 'serverless', 'running', '9999-01-01 00:00:00Z'`)
	job(109, "service_name, execution_type, status, resource_usage", `'fn', 'serverless', 'completed', '{"cost_usd": 0.25, "billed_duration_ms": 100}'`)
	job(110, "service_name, execution_type, status, resource_usage", `'fn', 'serverless', 'completed', '{"cost_usd": 0.5}'`)
}

func checkViews(t *testing.T, st *Store) {
	t.Helper()
	performance := view(t, st, "SELECT * FROM jobs.v_execution_performance_by_type")
	require.Len(t, performance, 3)
	http := performance[0]
	require.Equal(t, []any{"http", int64(100), int64(100), int64(0), 1.0, 50.5, 100.0, 1.0}, []any{
		http["execution_type"], http["total_jobs"], http["completed"], http["failed"], http["success_rate"], http["avg_duration_seconds"],
		http["max_duration_seconds"], http["avg_attempts"],
	})
	for name, want := range map[string]float64{"p50_duration_seconds": 50, "p95_duration_seconds": 95, "p99_duration_seconds": 99} {
		require.InEpsilon(t, want, http[name], 0.01, name)
	}
	require.Equal(t, []any{int64(5), int64(2), int64(3), 1.0}, []any{
		performance[1]["total_jobs"], performance[1]["completed"], performance[1]["active"], performance[1]["success_rate"],
	})
	require.Nil(t, performance[2]["p95_duration_seconds"])

	usage := view(t, st, "SELECT * FROM jobs.v_resource_usage_by_runner")
	require.Len(t, usage, 3)
	require.Equal(t, "http-runner@a", usage[0]["runner"])
	require.InDelta(t, 50.0, usage[0]["total_cpu_seconds"], 1e-9)
	require.InDelta(t, 50.5, usage[0]["avg_peak_memory_mb"], 1e-9)
	require.EqualValues(t, 100, usage[0]["max_peak_memory_mb"])
	require.Nil(t, usage[0]["total_network_rx_mb"], "nobody measured it")
	require.EqualValues(t, 4, usage[2]["oom_killed_jobs"])
	require.Nil(t, usage[2]["avg_cpu_seconds"], "what is no number was not measured")

	failures := view(t, st, "SELECT * FROM jobs.v_runner_failure_patterns")
	require.Len(t, failures, 2)
	require.Equal(t, []any{"TIMEOUT", int64(4), int64(2), 4.0 / 6, "slow 103", time.Date(2026, 1, 1, 0, 0, 3, 0, time.UTC)}, []any{
		failures[0]["error_code"], failures[0]["failures"], failures[0]["affected_runs"], failures[0]["failure_rate"],
		failures[0]["last_error_message"], failures[0]["last_seen_at"].(time.Time).UTC(),
	})

	health := view(t, st, "SELECT * FROM jobs.v_job_queue_health WHERE execution_type = 'serverless'")
	require.Len(t, health, 1)
	require.Equal(t, []any{int64(1), int64(2), int64(1), int64(1), int64(2)}, []any{
		health[0]["pending"], health[0]["running"], health[0]["waiting_for_retry"], health[0]["overdue"], health[0]["completed_last_hour"],
	})
	require.Greater(t, health[0]["longest_running_seconds"], 1e6)

	cost := view(t, st, "SELECT * FROM jobs.v_cost_by_service")
	require.Len(t, cost, 1)
	require.Equal(t, []any{"fn", int64(2), 0.75, 0.5, 0.75, 0.75, 100.0}, []any{
		cost[0]["service_name"], cost[0]["priced_jobs"], cost[0]["total_cost_usd"], cost[0]["max_cost_usd"],
		cost[0]["cost_usd_last_hour"], cost[0]["cost_usd_last_day"], cost[0]["billed_duration_ms"],
	})

	violations := view(t, st, "SELECT * FROM jobs.v_security_violations ORDER BY job_id, rule")
	require.Len(t, violations, 3)
	require.Equal(t, []any{"allowed_commands", "/bin/rm", "not allowed", "ann"},
		[]any{violations[0]["rule"], violations[0]["attempted"], violations[0]["detail"], violations[0]["subject"]})
	require.Equal(t, "network_access", violations[1]["rule"])
	require.Equal(t, []any{nil, "no checks"}, []any{violations[2]["rule"], violations[2]["detail"]})
}

// TestViews: what they say is the same before and after the sums are put together, and where all is counted anew.
func TestViews(t *testing.T) {
	st := openTest(t)
	fillViews(t, st)
	checkViews(t, st)
	require.NoError(t, st.Maintain(t.Context(), 0))
	checkViews(t, st)
	require.Less(t, view(t, st, "SELECT count(*) AS n FROM jobs.tb_job_stat")[0]["n"], int64(15))
	require.NoError(t, run(t, st, "SELECT jobs.fn_stat_recount()"))
	checkViews(t, st)
	require.NoError(t, st.Maintain(t.Context(), 0))
	checkViews(t, st)
}

// TestStatistics: they follow every change, whoever makes it.
func TestStatistics(t *testing.T) {
	st := openTest(t)
	fillViews(t, st)
	counts := func() string {
		t.Helper()
		p := view(t, st, "SELECT string_agg(execution_type || ' ' || total_jobs || ' ' || completed || ' ' || failed || ' ' || cancelled || ' ' || active, ', ') AS t FROM jobs.v_execution_performance_by_type")
		return p[0]["t"].(string)
	}
	require.Equal(t, "http 100 100 0 0 0, serverless 5 2 0 0 3, shell 6 0 6 0 0", counts())
	require.NoError(t, run(t, st, "UPDATE jobs.tb_job_run SET status = 'cancelled', attempts = 5 WHERE status = 'running'"))
	require.Equal(t, "http 100 100 0 0 0, serverless 5 2 0 2 1, shell 6 0 6 0 0", counts())
	require.NoError(t, run(t, st, "DELETE FROM jobs.tb_job_run WHERE duration_seconds > 50"))
	require.Equal(t, "http 50 50 0 0 0, serverless 5 2 0 2 1, shell 6 0 6 0 0", counts())
	p := view(t, st, "SELECT * FROM jobs.v_execution_performance_by_type")[0]
	require.InDelta(t, 25.5, p["avg_duration_seconds"], 1e-9)
	require.InEpsilon(t, 48.0, p["p95_duration_seconds"], 0.01)
	require.NoError(t, run(t, st, "INSERT INTO jobs.tb_job_run (service_name, operation, status) VALUES ('loose', 'op', 'pending'), ('loose', 'op', 'running'), ('loose', 'op', 'failed')"))
	require.Equal(t, "http 53 50 1 0 2, serverless 5 2 0 2 1, shell 6 0 6 0 0", counts())
	h := view(t, st, "SELECT pending, running FROM jobs.v_job_queue_health WHERE execution_type = 'http'")[0]
	require.Equal(t, []any{int64(1), int64(1)}, []any{h["pending"], h["running"]})
	require.NoError(t, run(t, st, "DELETE FROM jobs.tb_workflow_run"))
	require.Equal(t, "http 3 0 1 0 2", counts())
	require.NoError(t, run(t, st, "TRUNCATE jobs.tb_job_run CASCADE"))
	require.Empty(t, view(t, st, "SELECT * FROM jobs.v_execution_performance_by_type"))
	require.NoError(t, run(t, st, "SELECT jobs.fn_stat_compact()"))
	require.Empty(t, view(t, st, "SELECT * FROM jobs.tb_job_stat"))
}

// TestStatisticsWithoutTimes: jobs that end together and never began are in no histogram.
func TestStatisticsWithoutTimes(t *testing.T) {
	st := openTest(t)
	require.NoError(t, run(t, st, "INSERT INTO jobs.tb_workflow_run (id) VALUES ('"+runOne+"')"))
	require.NoError(t, run(t, st, `INSERT INTO jobs.tb_job_run (run_id, step_path, service_name, operation, execution_type, status)
		SELECT '`+runOne+`', i::text, 'a', 'op', 'http', 'running' FROM generate_series(1, 3) AS i`))
	require.NoError(t, run(t, st, "UPDATE jobs.tb_job_run SET status = 'cancelled', duration_seconds = CASE WHEN step_path = '3' THEN 2 END"))
	sums := func() any {
		t.Helper()
		return []any{
			view(t, st, "SELECT sum(jobs) AS jobs, coalesce(sum(timed_jobs), 0) AS timed FROM jobs.tb_job_stat"),
			view(t, st, "SELECT slot, sum(n) AS n FROM jobs.tb_job_stat, unnest(slots, slot_jobs) AS u (slot, n) WHERE n IS NOT NULL GROUP BY slot ORDER BY slot"),
			view(t, st, "SELECT p95_duration_seconds FROM jobs.v_execution_performance_by_type"),
		}
	}
	followed := sums()
	require.NoError(t, run(t, st, "SELECT jobs.fn_stat_recount()"))
	require.Equal(t, sums(), followed)
}

// TestStatisticsOfOneRow: statements of one row and of several leave the sums that counting anew gives, whatever they change.
func TestStatisticsOfOneRow(t *testing.T) {
	st := openTest(t)
	// Infinite times are refused; rows from before that rule have them.
	require.NoError(t, run(t, st, "ALTER TABLE jobs.tb_job_run DISABLE TRIGGER tr_job_run_check"))
	const seed, jobs, statements = 7, 24, 200
	random := rand.New(rand.NewPCG(seed, seed)) //nolint:gosec // the same each time
	pick := func(values ...string) string { return values[random.IntN(len(values))] }
	figure := func(name string) string {
		return pick("", `"`+name+`": 0.25, `, `"`+name+`": 3, `, `"`+name+`": null, `, `"`+name+`": "no number", `)
	}
	columns := []string{
		"jobs", "tried_jobs", "attempts", "timed_jobs", "duration", "waited_jobs", "wait", "measured_jobs", "cpu_jobs", "cpu", "percent_jobs", "percent",
		"memory_jobs", "memory", "peak_jobs", "peak", "disk_read", "disk_write", "network_rx", "network_tx", "span_jobs", "span", "oom_jobs", "priced_jobs", "cost", "billed",
	}
	sums := func() any {
		t.Helper()
		require.NoError(t, run(t, st, "SELECT jobs.fn_stat_compact()"))
		list := ""
		for _, c := range columns {
			list += fmt.Sprintf(", coalesce(round(sum(%s)::numeric, 6), 0)::double precision AS %[1]s", c)
		}
		figures := view(t, st, `SELECT execution_type, service_name, status, runner`+list+` FROM jobs.tb_job_stat WHERE status IS NOT NULL GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4`)
		slots := view(t, st, "SELECT execution_type, slot, n FROM jobs.tb_job_stat, unnest(slots, slot_jobs) AS u (slot, n) ORDER BY 1, 2")
		return []any{figures, slots}
	}
	require.NoError(t, run(t, st, "INSERT INTO jobs.tb_workflow_run (id) VALUES ('"+runOne+"')"))
	job := func(i int) {
		t.Helper()
		require.NoError(t, run(t, st, fmt.Sprintf(`INSERT INTO jobs.tb_job_run (id, run_id, service_name, operation, execution_type, status)
			VALUES ('%s', %s, '%s', 'op', '%s', 'pending') ON CONFLICT DO NOTHING`, jobID(i), pick("NULL", "'"+runOne+"'", "'"+runOne+"'"), pick("a", "b"), pick("http", "shell"))))
	}
	for n := range statements {
		first := random.IntN(jobs)
		job(first)
		last := first + random.IntN(2)*random.IntN(4)
		where := fmt.Sprintf(" WHERE id BETWEEN '%s' AND '%s'", jobID(first), jobID(last))
		if random.IntN(8) == 0 {
			require.NoError(t, run(t, st, "DELETE FROM jobs.tb_job_run"+where))
			continue
		}
		status := pick("running", "completed", "failed", "cancelled")
		require.NoError(t, run(t, st, fmt.Sprintf(`UPDATE jobs.tb_job_run SET status = CASE WHEN status = 'pending' OR status = 'running' AND '%s' <> 'running' THEN '%[1]s' ELSE status END,
			attempts = %d, duration_seconds = %s, started_at = %s, completed_at = %s, resource_usage = %s, security_context = %s`+where, status,
			random.IntN(3), pick("NULL", "0", "1e-9", "0.5", "70"), pick("NULL", "created_at + interval '1 s'", "'infinity'"), pick("NULL", "created_at + interval '3 s'"),
			pick("NULL", "'{"+figure("cpu_seconds")+figure("cpu_usage_percent")+figure("memory_mb")+figure("peak_memory_mb")+figure("disk_read_mb")+figure("disk_write_mb")+
				figure("network_rx_mb")+figure("network_tx_mb")+figure("duration_seconds")+figure("cost_usd")+figure("billed_duration_ms")+`"oom_killed": `+pick("true", "false", `"true"`)+"}'"),
			pick("NULL", `'{"runner": "r@a"}'`))), "%d", n)
		if n%20 == 19 {
			counted := sums()
			require.NoError(t, run(t, st, "SELECT jobs.fn_stat_recount()"))
			require.Equal(t, sums(), counted, "%d", n)
		}
	}
}

// TestQueriesOfTheDocuments run as they were written.
func TestQueriesOfTheDocuments(t *testing.T) {
	st := openTest(t)
	fillViews(t, st)
	rows := view(t, st, `SELECT
    execution_type,
    avg(duration_seconds) as avg_duration,
    count(*) as total_jobs,
    count(*) filter (where status = 'completed')::float / count(*) as success_rate
FROM jobs.tb_job_run
WHERE created_at > now() - interval '1 hour'
GROUP BY execution_type;`)
	require.Len(t, rows, 3)
	_, err := st.pool.Exec(t.Context(), "UPDATE jobs.tb_job_run SET resource_usage = NULL WHERE execution_type = 'shell'")
	require.NoError(t, err)
	rows = view(t, st, `SELECT
    execution_type,
    avg((resource_usage->>'cpu_usage_percent')::numeric) as avg_cpu,
    avg((resource_usage->>'memory_mb')::numeric) as avg_memory
FROM jobs.tb_job_run
WHERE resource_usage IS NOT NULL
GROUP BY execution_type;`)
	require.Len(t, rows, 2)
}

func TestQueryOnlyReads(t *testing.T) {
	st := openTest(t)
	require.NoError(t, run(t, st, "INSERT INTO jobs.tb_workflow_run (id) VALUES ('"+runOne+"')"))
	for _, statement := range []string{
		"DELETE FROM jobs.tb_workflow_run", "UPDATE jobs.tb_workflow_run SET status = 'failed'",
		"DROP TABLE jobs.tb_workflow_run", "INSERT INTO jobs.tb_workflow_run DEFAULT VALUES", "no SQL",
	} {
		_, _, err := st.Query(t.Context(), statement)
		require.Error(t, err, statement)
	}
	_, _, err := st.Query(t.Context(), "SELECT generate_series(1, 20000)")
	require.ErrorContains(t, err, "add a LIMIT")
	require.Len(t, view(t, st, "SELECT * FROM jobs.tb_workflow_run WHERE status = 'pending'"), 1)
}
