-- The six views. Columns keep their names and meanings on every database.

-- One row an execution type. success_rate is over ended jobs, 0 to 1; percentiles are by
-- nearest rank over the durations of ended jobs.
CREATE VIEW jobs.v_execution_performance_by_type AS
WITH ranked AS (
    SELECT execution_type, duration_seconds,
           row_number() OVER (PARTITION BY execution_type ORDER BY duration_seconds) AS place,
           count(*) OVER (PARTITION BY execution_type) AS n
    FROM tb_job_run
    WHERE duration_seconds IS NOT NULL
), durations AS (
    SELECT execution_type,
           avg(duration_seconds) AS avg_duration_seconds,
           min(CASE WHEN place >= n * 0.50 THEN duration_seconds END) AS p50_duration_seconds,
           min(CASE WHEN place >= n * 0.95 THEN duration_seconds END) AS p95_duration_seconds,
           min(CASE WHEN place >= n * 0.99 THEN duration_seconds END) AS p99_duration_seconds,
           max(duration_seconds) AS max_duration_seconds
    FROM ranked
    GROUP BY execution_type
), counts AS (
    SELECT execution_type,
           count(*) AS total_jobs,
           count(*) FILTER (WHERE status = 'completed') AS completed,
           count(*) FILTER (WHERE status = 'failed') AS failed,
           count(*) FILTER (WHERE status = 'cancelled') AS cancelled,
           count(*) FILTER (WHERE status IN ('pending', 'running')) AS active,
           avg(attempts) FILTER (WHERE attempts > 0) AS avg_attempts,
           max(created_at) AS last_job_at
    FROM tb_job_run
    GROUP BY execution_type
)
SELECT c.execution_type, c.total_jobs, c.completed, c.failed, c.cancelled, c.active,
       c.completed * 1.0 / nullif(c.completed + c.failed + c.cancelled, 0) AS success_rate,
       d.avg_duration_seconds, d.p50_duration_seconds, d.p95_duration_seconds, d.p99_duration_seconds,
       d.max_duration_seconds, c.avg_attempts, c.last_job_at
FROM counts c LEFT JOIN durations d ON d.execution_type = c.execution_type
ORDER BY c.execution_type;

-- One row a runner and execution type. Only jobs with measured figures count; a figure that
-- no job measured is null.
CREATE VIEW jobs.v_resource_usage_by_runner AS
SELECT execution_type,
       security_context ->> '$.runner' AS runner,
       count(*) AS measured_jobs,
       avg(resource_usage ->> '$.cpu_seconds') AS avg_cpu_seconds,
       sum(resource_usage ->> '$.cpu_seconds') AS total_cpu_seconds,
       avg(resource_usage ->> '$.cpu_usage_percent') AS avg_cpu_usage_percent,
       avg(resource_usage ->> '$.memory_mb') AS avg_memory_mb,
       avg(resource_usage ->> '$.peak_memory_mb') AS avg_peak_memory_mb,
       max(resource_usage ->> '$.peak_memory_mb') AS max_peak_memory_mb,
       sum(resource_usage ->> '$.disk_read_mb') AS total_disk_read_mb,
       sum(resource_usage ->> '$.disk_write_mb') AS total_disk_write_mb,
       sum(resource_usage ->> '$.network_rx_mb') AS total_network_rx_mb,
       sum(resource_usage ->> '$.network_tx_mb') AS total_network_tx_mb,
       avg(resource_usage ->> '$.duration_seconds') AS avg_duration_seconds,
       count(*) FILTER (WHERE resource_usage ->> '$.oom_killed') AS oom_killed_jobs,
       max(completed_at) AS last_job_at
FROM tb_job_run
WHERE resource_usage IS NOT NULL
GROUP BY execution_type, runner
ORDER BY execution_type, runner;

-- One row a way of failing: operation and error code. failure_rate is over the ended jobs of
-- the operation; last_error_message is the newest.
CREATE VIEW jobs.v_runner_failure_patterns AS
WITH ended AS (
    SELECT execution_type, service_name, operation, count(*) AS n
    FROM tb_job_run
    WHERE status IN ('completed', 'failed', 'cancelled')
    GROUP BY execution_type, service_name, operation
), failed AS (
    SELECT execution_type, service_name, operation, coalesce(error_code, 'INTERNAL') AS error_code,
           run_id, attempts, error_message, coalesce(completed_at, updated_at) AS seen_at,
           row_number() OVER (PARTITION BY execution_type, service_name, operation, coalesce(error_code, 'INTERNAL')
               ORDER BY coalesce(completed_at, updated_at) DESC, id DESC) AS place
    FROM tb_job_run
    WHERE status = 'failed'
), failures AS (
    SELECT execution_type, service_name, operation, error_code,
           count(*) AS failures,
           count(DISTINCT run_id) AS affected_runs,
           avg(attempts) AS avg_attempts,
           min(seen_at) AS first_seen_at,
           max(seen_at) AS last_seen_at,
           max(error_message) FILTER (WHERE place = 1) AS last_error_message
    FROM failed
    GROUP BY execution_type, service_name, operation, error_code
)
SELECT f.execution_type, f.service_name, f.operation, f.error_code, f.failures, f.affected_runs,
       f.failures * 1.0 / e.n AS failure_rate,
       f.avg_attempts, f.first_seen_at, f.last_seen_at, f.last_error_message
FROM failures f JOIN ended e
  ON e.execution_type = f.execution_type AND e.service_name = f.service_name AND e.operation = f.operation
ORDER BY f.failures DESC, f.last_seen_at DESC;

-- One row an execution type. waiting_for_retry are running jobs between two attempts; overdue
-- are running jobs past all the time that their attempts may take.
CREATE VIEW jobs.v_job_queue_health AS
SELECT execution_type,
       count(*) FILTER (WHERE status = 'pending') AS pending,
       count(*) FILTER (WHERE status = 'running') AS running,
       count(*) FILTER (WHERE status IN ('pending', 'running')
           AND next_attempt_at > strftime('%Y-%m-%d %H:%M:%f', 'now')) AS waiting_for_retry,
       count(*) FILTER (WHERE status = 'running' AND timeout_seconds > 0
           AND (julianday('now') - julianday(started_at)) * 86400 > timeout_seconds * max(max_attempts, 1)) AS overdue,
       max((julianday('now') - julianday(created_at)) * 86400) FILTER (WHERE status = 'pending') AS oldest_pending_seconds,
       max((julianday('now') - julianday(started_at)) * 86400) FILTER (WHERE status = 'running') AS longest_running_seconds,
       count(*) FILTER (WHERE status = 'completed'
           AND completed_at > datetime('now', '-1 hour')) AS completed_last_hour,
       count(*) FILTER (WHERE status = 'failed'
           AND completed_at > datetime('now', '-1 hour')) AS failed_last_hour,
       avg((julianday(started_at) - julianday(created_at)) * 86400) FILTER (WHERE started_at IS NOT NULL
           AND created_at > datetime('now', '-1 hour')) AS avg_wait_seconds_last_hour
FROM tb_job_run
GROUP BY execution_type
ORDER BY execution_type;

-- One row a service with a price: only jobs whose cost is known count.
CREATE VIEW jobs.v_cost_by_service AS
SELECT service_name, execution_type,
       count(*) AS priced_jobs,
       sum(resource_usage ->> '$.cost_usd') AS total_cost_usd,
       avg(resource_usage ->> '$.cost_usd') AS avg_cost_usd,
       max(resource_usage ->> '$.cost_usd') AS max_cost_usd,
       sum(resource_usage ->> '$.billed_duration_ms') AS billed_duration_ms,
       coalesce(sum(resource_usage ->> '$.cost_usd') FILTER (WHERE created_at > datetime('now', '-1 hour')), 0.0) AS cost_usd_last_hour,
       coalesce(sum(resource_usage ->> '$.cost_usd') FILTER (WHERE created_at > datetime('now', '-1 day')), 0.0) AS cost_usd_last_day,
       min(created_at) AS first_job_at,
       max(created_at) AS last_job_at
FROM tb_job_run
WHERE resource_usage ->> '$.cost_usd' IS NOT NULL
GROUP BY service_name, execution_type
ORDER BY total_cost_usd DESC, service_name;

-- One row a check that denied; a violation without recorded checks has one row too.
CREATE VIEW jobs.v_security_violations AS
SELECT j.id AS job_id, j.run_id, j.step_path, j.service_name, j.operation, j.execution_type,
       c.value ->> '$.rule' AS rule,
       c.value ->> '$.subject' AS attempted,
       coalesce(c.value ->> '$.detail', j.error_message) AS detail,
       j.security_context ->> '$.policy_digest' AS policy_digest,
       j.security_context ->> '$.runner' AS runner,
       coalesce(j.security_context ->> '$.subject', j.triggered_by) AS subject,
       j.tenant_id,
       coalesce(j.completed_at, j.updated_at) AS occurred_at
FROM tb_job_run j
LEFT JOIN json_each(j.security_context, '$.checks') c ON NOT coalesce(c.value ->> '$.allowed', 0)
WHERE j.error_code = 'POLICY_VIOLATION'
ORDER BY occurred_at DESC, j.id;
