-- Check execution performance
SELECT * FROM jobs.v_execution_performance_by_type;

-- Monitor resource usage
SELECT * FROM jobs.v_resource_usage_by_runner;

-- Track failure patterns
SELECT * FROM jobs.v_runner_failure_patterns;
