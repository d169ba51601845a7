package postgres

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

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
func (s *Store) Performance(ctx context.Context, executionType string) ([]*store.Performance, error) {
	return report(ctx, s, "performance", func(p *store.Performance, t *moments) []any {
		return []any{
			&p.ExecutionType, &p.Jobs, &p.Completed, &p.Failed, &p.Cancelled, &p.Active, &p.SuccessRate,
			&p.Average, &p.P50, &p.P95, &p.P99, &p.Max, &p.AverageAttempts, &t.last,
		}
	}, func(p *store.Performance, t *moments) { p.LastJobAt = utc(t.last) },
		`SELECT execution_type, total_jobs, completed, failed, cancelled, active, success_rate, avg_duration_seconds,
			p50_duration_seconds, p95_duration_seconds, p99_duration_seconds, max_duration_seconds, avg_attempts, last_job_at
		FROM jobs.v_execution_performance_by_type WHERE $1::text = '' OR execution_type = $1 ORDER BY execution_type COLLATE "C"`, plain(executionType))
}

// RunnerUsage implements [store.Insight].
func (s *Store) RunnerUsage(ctx context.Context, executionType string) ([]*store.RunnerUsage, error) {
	return report(ctx, s, "usage by runner", func(u *store.RunnerUsage, t *moments) []any {
		return []any{
			&u.ExecutionType, &u.Runner, &u.MeasuredJobs, &u.AverageCPUSeconds, &u.TotalCPUSeconds, &u.AverageCPUPercent,
			&u.AverageMemoryMB, &u.AveragePeakMemoryMB, &u.MaxPeakMemoryMB, &u.TotalDiskReadMB, &u.TotalDiskWriteMB,
			&u.TotalNetworkRxMB, &u.TotalNetworkTxMB, &u.AverageDurationSeconds, &u.OOMKilledJobs, &t.last,
		}
	}, func(u *store.RunnerUsage, t *moments) { u.LastJobAt = utc(t.last) },
		`SELECT execution_type, coalesce(runner, ''), measured_jobs, avg_cpu_seconds, total_cpu_seconds, avg_cpu_usage_percent,
			avg_memory_mb, avg_peak_memory_mb, max_peak_memory_mb, total_disk_read_mb, total_disk_write_mb,
			total_network_rx_mb, total_network_tx_mb, avg_duration_seconds, oom_killed_jobs, last_job_at
		FROM jobs.v_resource_usage_by_runner WHERE $1::text = '' OR execution_type = $1
		ORDER BY execution_type COLLATE "C", runner COLLATE "C" NULLS FIRST`, plain(executionType))
}

// QueueHealth implements [store.Insight].
func (s *Store) QueueHealth(ctx context.Context, executionType string) ([]*store.QueueHealth, error) {
	return report(ctx, s, "queue health", func(h *store.QueueHealth, _ *moments) []any {
		return []any{
			&h.ExecutionType, &h.Pending, &h.Running, &h.WaitingForRetry, &h.Overdue, &h.OldestPendingSeconds, &h.LongestRunningSeconds,
			&h.CompletedLastHour, &h.FailedLastHour, &h.AverageWaitSeconds,
		}
	}, func(*store.QueueHealth, *moments) {},
		`SELECT execution_type, pending, running, waiting_for_retry, overdue, oldest_pending_seconds, longest_running_seconds,
			completed_last_hour, failed_last_hour, avg_wait_seconds_last_hour
		FROM jobs.v_job_queue_health WHERE $1::text = '' OR execution_type = $1 ORDER BY execution_type COLLATE "C"`, plain(executionType))
}

// Costs implements [store.Insight].
func (s *Store) Costs(ctx context.Context, service, executionType string) ([]*store.Cost, error) {
	return report(ctx, s, "costs", func(c *store.Cost, t *moments) []any {
		return []any{
			&c.Service, &c.ExecutionType, &c.PricedJobs, &c.Total, &c.Average, &c.Max, &c.BilledDurationMS, &c.LastHour, &c.LastDay, &t.first, &t.last,
		}
	}, func(c *store.Cost, t *moments) { c.FirstJobAt, c.LastJobAt = utc(t.first), utc(t.last) },
		`SELECT service_name, execution_type, priced_jobs, total_cost_usd, avg_cost_usd, max_cost_usd, billed_duration_ms,
			cost_usd_last_hour, cost_usd_last_day, first_job_at, last_job_at
		FROM jobs.v_cost_by_service WHERE ($1::text = '' OR service_name = $1) AND ($2::text = '' OR execution_type = $2)
		ORDER BY total_cost_usd DESC, service_name COLLATE "C"`, plain(service), plain(executionType))
}

// Violations implements [store.Insight].
func (s *Store) Violations(ctx context.Context, f store.JobFilter, limit int) ([]*store.Violation, error) {
	return report(ctx, s, "security violations", func(v *store.Violation, t *moments) []any {
		return []any{
			&v.JobID, &v.RunID, &v.StepPath, &v.Service, &v.Operation, &v.ExecutionType, &v.Rule, &v.Attempted, &v.Detail,
			&v.PolicyDigest, &v.Runner, &v.Subject, &v.TenantID, &t.last,
		}
	}, func(v *store.Violation, t *moments) { v.OccurredAt = utc(t.last) },
		`SELECT job_id::text, coalesce(run_id::text, ''), coalesce(step_path, ''), service_name, operation, execution_type, coalesce(rule, ''),
			coalesce(attempted, ''), coalesce(detail, ''), coalesce(policy_digest, ''), coalesce(runner, ''), coalesce(subject, ''),
			coalesce(tenant_id, ''), occurred_at::timestamptz
		FROM jobs.v_security_violations
		WHERE ($1::text = '' OR service_name = $1) AND ($2::text = '' OR execution_type = $2)
			AND ($3::timestamptz IS NULL OR occurred_at >= $3)
		ORDER BY occurred_at DESC, job_id::text COLLATE "C", rule COLLATE "C" NULLS FIRST, attempted COLLATE "C" NULLS FIRST LIMIT $4::bigint`,
		plain(f.Service), plain(f.ExecutionType), nullTime(f.Since), int64(limit))
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
		ORDER BY created_at DESC, id DESC LIMIT $5::bigint`,
		plain(f.Service), plain(f.ExecutionType), nullTime(f.Since), f.Failed, int64(limit), int64(store.MaxErrorMessage))
}
