-- One row a check that denied, of every job that a policy ended or waits for: violations and used up budgets, which have
-- a row without recorded checks too, and limits and rates of a policy. rule_source is the rule's place in the registry, allowed_by
-- the changes of policies that together would allow it.
CREATE VIEW jobs.v_denials AS
SELECT j.id AS job_id, j.run_id, j.step_path, j.service_name, j.operation, j.execution_type, j.status, j.error_code,
       c.value ->> '$.rule' AS rule,
       c.value ->> '$.rule_source' AS rule_source,
       c.value ->> '$.subject' AS attempted,
       coalesce(c.value ->> '$.detail', j.error_message) AS detail,
       c.value -> '$.allowed_by' AS allowed_by,
       j.security_context ->> '$.policy_digest' AS policy_digest,
       j.security_context ->> '$.runner' AS runner,
       coalesce(j.security_context ->> '$.subject', j.triggered_by) AS subject,
       j.tenant_id,
       coalesce(j.completed_at, j.updated_at) AS occurred_at
FROM tb_job_run j
LEFT JOIN json_each(j.security_context, '$.checks') c ON NOT coalesce(c.value ->> '$.allowed', 0)
WHERE j.error_code IN ('POLICY_VIOLATION', 'BUDGET_EXCEEDED') OR j.error_code IN ('RATE_LIMITED', 'RESOURCE_EXCEEDED') AND c.value IS NOT NULL
ORDER BY occurred_at DESC, j.id;
