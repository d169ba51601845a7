-- Performance by execution type
SELECT
    execution_type,
    avg(duration_seconds) as avg_duration,
    count(*) as total_jobs,
    count(*) filter (where status = 'completed')::float / count(*) as success_rate
FROM jobs.tb_job_run
WHERE created_at > now() - interval '1 hour'
GROUP BY execution_type;

-- Resource usage tracking
SELECT
    execution_type,
    avg((resource_usage->>'cpu_usage_percent')::numeric) as avg_cpu,
    avg((resource_usage->>'memory_mb')::numeric) as avg_memory
FROM jobs.tb_job_run
WHERE resource_usage IS NOT NULL
GROUP BY execution_type;
