package postgres

import (
	"context"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// mine are the jobs of the tenants in the last parameter, as the sums of the views see jobs.
const mine = `WITH mine AS (SELECT j.execution_type::text AS execution_type, j.service_name::text AS service_name, j.status::text AS status,
		j.run_id, coalesce(j.attempts, 0) AS attempts, j.max_attempts, j.next_attempt_at, j.timeout_seconds::double precision AS timeout_seconds,
		j.resource_usage AS usage, j.security_context ->> 'runner' AS runner,
		jobs.fn_finite(j.created_at::timestamptz) AS born_at, jobs.fn_finite(j.started_at::timestamptz) AS started_at,
		CASE WHEN j.status::text IN ('completed', 'failed', 'cancelled') THEN jobs.fn_finite(coalesce(j.completed_at, j.updated_at)::timestamptz) END AS died_at,
		coalesce(j.duration_seconds, extract(epoch FROM jobs.fn_finite(j.completed_at::timestamptz) - jobs.fn_finite(j.started_at::timestamptz)))::double precision AS duration
	FROM jobs.tb_job_run j LEFT JOIN jobs.tb_workflow_run r ON r.id = j.run_id
	WHERE coalesce(j.tenant_id::text, r.tenant_id, '') = ANY ($%d::text[])), `

// The views over the jobs of some tenants alone, which the sums that the views read do not tell apart.
const (
	minePerformance = `v AS (SELECT execution_type, count(*) AS total_jobs,
			count(*) FILTER (WHERE status = 'completed') AS completed, count(*) FILTER (WHERE status = 'failed') AS failed,
			count(*) FILTER (WHERE status = 'cancelled') AS cancelled, count(*) FILTER (WHERE status IN ('pending', 'running')) AS active,
			(count(*) FILTER (WHERE status = 'completed'))::double precision / nullif(count(*) FILTER (WHERE died_at IS NOT NULL), 0) AS success_rate,
			avg(duration) AS avg_duration_seconds, percentile_disc(0.50) WITHIN GROUP (ORDER BY duration) AS p50_duration_seconds,
			percentile_disc(0.95) WITHIN GROUP (ORDER BY duration) AS p95_duration_seconds,
			percentile_disc(0.99) WITHIN GROUP (ORDER BY duration) AS p99_duration_seconds, max(duration) AS max_duration_seconds,
			(avg(attempts) FILTER (WHERE attempts > 0))::double precision AS avg_attempts, max(born_at) AS last_job_at
		FROM mine GROUP BY execution_type) `
	mineUsage = `v AS (SELECT execution_type, runner, count(*) AS measured_jobs,
			avg(jobs.fn_number(usage, 'cpu_seconds')) AS avg_cpu_seconds, sum(jobs.fn_number(usage, 'cpu_seconds')) AS total_cpu_seconds,
			avg(jobs.fn_number(usage, 'cpu_usage_percent')) AS avg_cpu_usage_percent, avg(jobs.fn_number(usage, 'memory_mb')) AS avg_memory_mb,
			avg(jobs.fn_number(usage, 'peak_memory_mb')) AS avg_peak_memory_mb, max(jobs.fn_number(usage, 'peak_memory_mb')) AS max_peak_memory_mb,
			sum(jobs.fn_number(usage, 'disk_read_mb')) AS total_disk_read_mb, sum(jobs.fn_number(usage, 'disk_write_mb')) AS total_disk_write_mb,
			sum(jobs.fn_number(usage, 'network_rx_mb')) AS total_network_rx_mb, sum(jobs.fn_number(usage, 'network_tx_mb')) AS total_network_tx_mb,
			avg(jobs.fn_number(usage, 'duration_seconds')) AS avg_duration_seconds,
			count(*) FILTER (WHERE usage -> 'oom_killed' = 'true') AS oom_killed_jobs, max(died_at) AS last_job_at
		FROM mine WHERE usage IS NOT NULL GROUP BY execution_type, runner) `
	mineQueue = `v AS (SELECT execution_type, count(*) FILTER (WHERE status = 'pending') AS pending, count(*) FILTER (WHERE status = 'running') AS running,
			count(*) FILTER (WHERE status IN ('pending', 'running') AND next_attempt_at > now()) AS waiting_for_retry,
			count(*) FILTER (WHERE status = 'running' AND timeout_seconds > 0
				AND extract(epoch FROM now() - started_at) > timeout_seconds * greatest(max_attempts, 1)) AS overdue,
			max(extract(epoch FROM now() - born_at)) FILTER (WHERE status = 'pending')::double precision AS oldest_pending_seconds,
			max(extract(epoch FROM now() - started_at)) FILTER (WHERE status = 'running')::double precision AS longest_running_seconds,
			count(*) FILTER (WHERE status = 'completed' AND died_at > now() - interval '1 hour') AS completed_last_hour,
			count(*) FILTER (WHERE status = 'failed' AND died_at > now() - interval '1 hour') AS failed_last_hour,
			(avg(extract(epoch FROM started_at - born_at)) FILTER (WHERE born_at > now() - interval '1 hour'))::double precision AS avg_wait_seconds_last_hour
		FROM mine GROUP BY execution_type) `
	mineCosts = `v AS (SELECT service_name, execution_type, count(*) AS priced_jobs, sum(cost) AS total_cost_usd, avg(cost) AS avg_cost_usd,
			max(cost) AS max_cost_usd, sum(jobs.fn_number(usage, 'billed_duration_ms')) AS billed_duration_ms,
			coalesce(sum(cost) FILTER (WHERE born_at > now() - interval '1 hour'), 0) AS cost_usd_last_hour,
			coalesce(sum(cost) FILTER (WHERE born_at > now() - interval '1 day'), 0) AS cost_usd_last_day,
			min(born_at) AS first_job_at, max(born_at) AS last_job_at
		FROM (SELECT *, jobs.fn_number(usage, 'cost_usd') AS cost FROM mine) AS priced WHERE cost IS NOT NULL GROUP BY service_name, execution_type) `
)

// sums reads the rows of a view, or of what is in its place for some tenants alone.
func sums[T any](ctx context.Context, s *Store, what, view, own string, f store.JobFilter, dest func(*T, *moments) []any, end func(*T, *moments), text string, args ...any) ([]*T, error) {
	if f.Tenants == nil {
		return report(ctx, s, what, dest, end, strings.Replace(text, "FROM v", "FROM jobs."+view, 1), args...)
	}
	return report(ctx, s, what, dest, end, fmt.Sprintf(mine, len(args)+1)+own+text, append(args, gather(f.Tenants, plain))...)
}

// report reads the rows of a report, which the planner may scan for, unlike what the store's
// own statements do. end completes each row with its times, which may be null.
func report[T any](ctx context.Context, s *Store, what string, dest func(*T, *moments) []any, end func(*T, *moments), text string, args ...any) ([]*T, error) {
	var rows []*T
	err := s.with(ctx, func(ctx context.Context, c *pgx.Conn) error {
		return pgx.BeginTxFunc(ctx, c, pgx.TxOptions{AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, scans, pgx.QueryExecModeSimpleProtocol); err != nil {
				return err
			}
			var err error
			rows, err = query(ctx, tx, func(row pgx.CollectableRow) (*T, error) {
				v, t := new(T), &moments{}
				if err := row.Scan(dest(v, t)...); err != nil {
					return nil, err
				}
				end(v, t)
				return v, nil
			}, text, append([]any{pgx.QueryExecModeExec}, args...)...)
			return err
		})
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return rows, nil
}

// scans lets the planner read whole tables, until the end of the transaction.
const scans = `SET LOCAL enable_seqscan = on; SET LOCAL enable_hashjoin = on; SET LOCAL enable_mergejoin = on`

// moments are the times of a row of a report.
type moments struct{ first, last moment }

// Performance implements [store.Insight].
func (s *Store) Performance(ctx context.Context, f store.JobFilter) ([]*store.Performance, error) {
	return sums(ctx, s, "performance", "v_execution_performance_by_type", minePerformance, f, func(p *store.Performance, t *moments) []any {
		return []any{
			&p.ExecutionType, &p.Jobs, &p.Completed, &p.Failed, &p.Cancelled, &p.Active, &p.SuccessRate,
			&p.Average, &p.P50, &p.P95, &p.P99, &p.Max, &p.AverageAttempts, &t.last,
		}
	}, func(p *store.Performance, t *moments) { p.LastJobAt = utc(t.last) },
		`SELECT execution_type, total_jobs, completed, failed, cancelled, active, success_rate, avg_duration_seconds,
			p50_duration_seconds, p95_duration_seconds, p99_duration_seconds, max_duration_seconds, avg_attempts, last_job_at
		FROM v WHERE $1::text = '' OR execution_type = $1 ORDER BY execution_type COLLATE "C"`, plain(f.ExecutionType))
}

// RunnerUsage implements [store.Insight].
func (s *Store) RunnerUsage(ctx context.Context, f store.JobFilter) ([]*store.RunnerUsage, error) {
	return sums(ctx, s, "usage by runner", "v_resource_usage_by_runner", mineUsage, f, func(u *store.RunnerUsage, t *moments) []any {
		return []any{
			&u.ExecutionType, &u.Runner, &u.MeasuredJobs, &u.AverageCPUSeconds, &u.TotalCPUSeconds, &u.AverageCPUPercent,
			&u.AverageMemoryMB, &u.AveragePeakMemoryMB, &u.MaxPeakMemoryMB, &u.TotalDiskReadMB, &u.TotalDiskWriteMB,
			&u.TotalNetworkRxMB, &u.TotalNetworkTxMB, &u.AverageDurationSeconds, &u.OOMKilledJobs, &t.last,
		}
	}, func(u *store.RunnerUsage, t *moments) { u.LastJobAt = utc(t.last) },
		`SELECT execution_type, coalesce(runner, ''), measured_jobs, avg_cpu_seconds, total_cpu_seconds, avg_cpu_usage_percent,
			avg_memory_mb, avg_peak_memory_mb, max_peak_memory_mb, total_disk_read_mb, total_disk_write_mb,
			total_network_rx_mb, total_network_tx_mb, avg_duration_seconds, oom_killed_jobs, last_job_at
		FROM v WHERE $1::text = '' OR execution_type = $1
		ORDER BY execution_type COLLATE "C", runner COLLATE "C" NULLS FIRST`, plain(f.ExecutionType))
}

// QueueHealth implements [store.Insight].
func (s *Store) QueueHealth(ctx context.Context, f store.JobFilter) ([]*store.QueueHealth, error) {
	return sums(ctx, s, "queue health", "v_job_queue_health", mineQueue, f, func(h *store.QueueHealth, _ *moments) []any {
		return []any{
			&h.ExecutionType, &h.Pending, &h.Running, &h.WaitingForRetry, &h.Overdue, &h.OldestPendingSeconds, &h.LongestRunningSeconds,
			&h.CompletedLastHour, &h.FailedLastHour, &h.AverageWaitSeconds,
		}
	}, func(*store.QueueHealth, *moments) {},
		`SELECT execution_type, pending, running, waiting_for_retry, overdue, oldest_pending_seconds, longest_running_seconds,
			completed_last_hour, failed_last_hour, avg_wait_seconds_last_hour
		FROM v WHERE $1::text = '' OR execution_type = $1 ORDER BY execution_type COLLATE "C"`, plain(f.ExecutionType))
}

// Costs implements [store.Insight].
func (s *Store) Costs(ctx context.Context, f store.JobFilter) ([]*store.Cost, error) {
	return sums(ctx, s, "costs", "v_cost_by_service", mineCosts, f, func(c *store.Cost, t *moments) []any {
		return []any{
			&c.Service, &c.ExecutionType, &c.PricedJobs, &c.Total, &c.Average, &c.Max, &c.BilledDurationMS, &c.LastHour, &c.LastDay, &t.first, &t.last,
		}
	}, func(c *store.Cost, t *moments) { c.FirstJobAt, c.LastJobAt = utc(t.first), utc(t.last) },
		`SELECT service_name, execution_type, priced_jobs, total_cost_usd, avg_cost_usd, max_cost_usd, billed_duration_ms,
			cost_usd_last_hour, cost_usd_last_day, first_job_at, last_job_at
		FROM v WHERE ($1::text = '' OR service_name = $1) AND ($2::text = '' OR execution_type = $2)
		ORDER BY total_cost_usd DESC, service_name COLLATE "C"`, plain(f.Service), plain(f.ExecutionType))
}

// Violations implements [store.Insight].
func (s *Store) Violations(ctx context.Context, f store.JobFilter, limit int) ([]*store.Violation, error) {
	return report(ctx, s, "security violations", func(v *store.Violation, t *moments) []any {
		return []any{
			&v.JobID, &v.RunID, &v.StepPath, &v.Service, &v.Operation, &v.ExecutionType, &v.Rule, &v.Attempted, &v.Detail,
			&v.PolicyDigest, &v.Runner, &v.Subject, &v.TenantID, &t.last, &v.ErrorCode, &v.RuleSource, jsonOf(&v.AllowedBy),
		}
	}, func(v *store.Violation, t *moments) { v.OccurredAt = utc(t.last) },
		`SELECT job_id::text, coalesce(run_id::text, ''), coalesce(step_path, ''), service_name, operation, execution_type, coalesce(rule, ''),
			coalesce(attempted, ''), coalesce(detail, ''), coalesce(policy_digest, ''), coalesce(runner, ''), coalesce(subject, ''),
			coalesce(tenant_id, ''), occurred_at::timestamptz, error_code, coalesce(rule_source, ''), allowed_by
		FROM jobs.v_denials
		WHERE ($1::text = '' OR service_name = $1) AND ($2::text = '' OR execution_type = $2)
			AND ($3::timestamptz IS NULL OR occurred_at >= $3) AND ($5::text[] IS NULL OR coalesce(tenant_id, '') = ANY ($5))
		ORDER BY occurred_at DESC, job_id::text COLLATE "C", rule COLLATE "C" NULLS FIRST, attempted COLLATE "C" NULLS FIRST LIMIT $4::bigint`,
		plain(f.Service), plain(f.ExecutionType), nullTime(f.Since), int64(limit), tenantsValue(f.Tenants))
}

// Figures implements [store.Insight].
func (s *Store) Figures(ctx context.Context, f store.JobFilter, limit int) ([]*store.JobFigures, error) {
	return report(ctx, s, "figures of jobs", func(j *store.JobFigures, t *moments) []any {
		return []any{
			&j.RunID, &j.Service, &j.Operation, &j.ExecutionType, &j.Status, &j.Attempts, &j.DurationSeconds, jsonOf(&j.ResourceUsage),
			&j.ErrorCode, &j.ErrorMessage, &t.first, &t.last,
		}
	}, func(j *store.JobFigures, t *moments) { j.CreatedAt, j.EndedAt = utc(t.first), utc(t.last) },
		`SELECT coalesce(run_id::text, ''), service_name, operation, execution_type, status::text, coalesce(attempts, 0)::bigint,
			coalesce(duration_seconds, extract(epoch FROM completed_at - started_at))::double precision, resource_usage,
			coalesce(error_code, ''), left(coalesce(error_message, ''), $6::integer), created_at::timestamptz,
			CASE WHEN status IN ('completed', 'failed', 'cancelled') THEN coalesce(completed_at, updated_at) END::timestamptz
		FROM jobs.tb_job_run
		WHERE ($1::text = '' OR service_name = $1) AND ($2::text = '' OR execution_type = $2)
			AND ($3::timestamptz IS NULL OR created_at >= $3) AND (NOT $4::boolean OR status = 'failed')
			AND ($7::text[] IS NULL OR coalesce(tenant_id::text, (SELECT r.tenant_id FROM jobs.tb_workflow_run r WHERE r.id = run_id), '') = ANY ($7))
		ORDER BY created_at DESC, id DESC LIMIT $5::bigint`,
		plain(f.Service), plain(f.ExecutionType), nullTime(f.Since), f.Failed, int64(limit), int64(store.MaxErrorMessage), tenantsValue(f.Tenants))
}

// tenantsValue is a list of tenants; null for all.
func tenantsValue(tenants []string) []string {
	if tenants == nil {
		return nil
	}
	return gather(tenants, plain)
}

// Recorded implements [store.Insight]. It goes down the primary key, and looks at each job once, whatever the pages.
func (s *Store) Recorded(ctx context.Context, f store.JobFilter, before string, limit int) ([]*store.RecordedJob, error) {
	jobs, err := all(ctx, s, func(row pgx.CollectableRow) (*store.RecordedJob, error) {
		j := &store.RecordedJob{}
		var created moment
		err := row.Scan(&j.ID, &j.RunID, &j.Operation, &j.Status, &j.ErrorCode, jsonOf(&j.Input), jsonOf(&j.RunnerConfig), jsonOf(&j.SecurityContext),
			jsonOf(&j.ResourceUsage), &j.Subject, &created, &j.Snapshot, &j.Entity, &j.Action)
		j.CreatedAt = utc(created)
		return j, err
	}, `SELECT j.id::text, coalesce(j.run_id::text, ''), j.operation, j.status::text, coalesce(j.error_code, ''),
			CASE WHEN octet_length(j.input_data::text) <= $6::integer THEN j.input_data END, j.runner_config, j.security_context, j.resource_usage,
			coalesce(r.triggered_by, j.triggered_by::text, ''), j.created_at::timestamptz, coalesce(r.snapshot, ''), coalesce(r.entity, ''), coalesce(r.action, '')
		FROM jobs.tb_job_run j LEFT JOIN jobs.tb_workflow_run r ON r.id = j.run_id
		WHERE ($1::uuid IS NULL OR j.id < $1) AND j.service_name = $2 AND j.status IN ('completed', 'failed')
			AND ($3::timestamptz IS NULL OR j.created_at >= $3) AND ($4::text[] IS NULL OR coalesce(j.tenant_id::text, r.tenant_id, '') = ANY ($4))
		ORDER BY j.id DESC LIMIT $5::bigint`, uuidValue(before), plain(f.Service), nullTime(f.Since), tenantsValue(f.Tenants), int64(limit), store.MaxRecordedInput)
	if err != nil {
		return nil, fmt.Errorf("recorded jobs: %w", err)
	}
	return jobs, nil
}
