package sqlite

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// ofTenants is the condition that a row belongs to one of tenants, and the value of its parameter.
func ofTenants(parameter string, tenants []string) (condition string, value any) {
	list, err := json.Marshal(append([]string{}, tenants...))
	if err != nil {
		list = []byte("[]") // texts always are JSON
	}
	return "coalesce(tenant_id, '') IN (SELECT value FROM json_each(" + parameter + "))", string(list)
}

// report reads the rows of a report of a view, or of a table. Of some tenants alone, the view is
// made anew over their jobs: what it says of each job does not change.
func report[T any](ctx context.Context, s *Store, what, view string, f store.JobFilter, dest func(*T) []any, text string, args ...any) ([]*T, error) {
	end, err := s.read()
	if err != nil {
		return nil, err
	}
	defer end()
	if f.Tenants == nil {
		text = strings.Replace(text, "FROM v", "FROM jobs."+view, 1)
	} else {
		condition, value := ofTenants(fmt.Sprintf("?%d", len(args)+1), f.Tenants)
		rows := "SELECT * FROM mine"
		if view != "tb_job_run" {
			var definition string
			if err := s.readDB.QueryRowContext(ctx, "SELECT sql FROM jobs.sqlite_master WHERE type = 'view' AND name = ?", view).Scan(&definition); err != nil {
				return nil, fmt.Errorf("%s: %w", what, err)
			}
			_, rows, _ = strings.Cut(definition, " AS\n")
			rows = strings.ReplaceAll(rows, "FROM tb_job_run", "FROM mine")
			if strings.Contains(rows, "tb_job_run") || !strings.Contains(rows, "FROM mine") {
				return nil, fmt.Errorf("%s: the view %s cannot be made of the jobs of one tenant", what, view)
			}
		}
		text = "WITH mine AS (SELECT * FROM jobs.tb_job_run WHERE " + condition + "), v AS (" + rows + ") " + text
		args = append(args, value)
	}
	rows, err := query(ctx, s.readDB, func(row scanner) (*T, error) {
		v := new(T)
		return v, row.Scan(dest(v)...)
	}, text, args...)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return rows, nil
}

// Performance implements [store.Insight].
func (s *Store) Performance(ctx context.Context, f store.JobFilter) ([]*store.Performance, error) {
	return report(ctx, s, "performance", "v_execution_performance_by_type", f, func(p *store.Performance) []any {
		return []any{
			&p.ExecutionType, &p.Jobs, &p.Completed, &p.Failed, &p.Cancelled, &p.Active, &p.SuccessRate,
			&p.Average, &p.P50, &p.P95, &p.P99, &p.Max, &p.AverageAttempts,
			timeColumn{&p.LastJobAt},
		}
	}, `SELECT execution_type, total_jobs, completed, failed, cancelled, active, success_rate, avg_duration_seconds,
			p50_duration_seconds, p95_duration_seconds, p99_duration_seconds, max_duration_seconds, avg_attempts, last_job_at
		FROM v WHERE ?1 = '' OR execution_type = ?1 ORDER BY execution_type`, f.ExecutionType)
}

// RunnerUsage implements [store.Insight].
func (s *Store) RunnerUsage(ctx context.Context, f store.JobFilter) ([]*store.RunnerUsage, error) {
	return report(ctx, s, "usage by runner", "v_resource_usage_by_runner", f, func(u *store.RunnerUsage) []any {
		return []any{
			&u.ExecutionType,
			textColumn{&u.Runner},
			&u.MeasuredJobs, &u.AverageCPUSeconds, &u.TotalCPUSeconds, &u.AverageCPUPercent,
			&u.AverageMemoryMB, &u.AveragePeakMemoryMB, &u.MaxPeakMemoryMB, &u.TotalDiskReadMB, &u.TotalDiskWriteMB,
			&u.TotalNetworkRxMB, &u.TotalNetworkTxMB, &u.AverageDurationSeconds, &u.OOMKilledJobs,
			timeColumn{&u.LastJobAt},
		}
	}, `SELECT execution_type, runner, measured_jobs, avg_cpu_seconds, total_cpu_seconds, avg_cpu_usage_percent,
			avg_memory_mb, avg_peak_memory_mb, max_peak_memory_mb, total_disk_read_mb, total_disk_write_mb,
			total_network_rx_mb, total_network_tx_mb, avg_duration_seconds, oom_killed_jobs, last_job_at
		FROM v WHERE ?1 = '' OR execution_type = ?1 ORDER BY execution_type, runner`, f.ExecutionType)
}

// QueueHealth implements [store.Insight].
func (s *Store) QueueHealth(ctx context.Context, f store.JobFilter) ([]*store.QueueHealth, error) {
	return report(ctx, s, "queue health", "v_job_queue_health", f, func(h *store.QueueHealth) []any {
		return []any{
			&h.ExecutionType, &h.Pending, &h.Running, &h.WaitingForRetry, &h.Overdue, &h.OldestPendingSeconds, &h.LongestRunningSeconds,
			&h.CompletedLastHour, &h.FailedLastHour, &h.AverageWaitSeconds,
		}
	}, `SELECT execution_type, pending, running, waiting_for_retry, overdue, oldest_pending_seconds, longest_running_seconds,
			completed_last_hour, failed_last_hour, avg_wait_seconds_last_hour
		FROM v WHERE ?1 = '' OR execution_type = ?1 ORDER BY execution_type`, f.ExecutionType)
}

// Costs implements [store.Insight].
func (s *Store) Costs(ctx context.Context, f store.JobFilter) ([]*store.Cost, error) {
	return report(ctx, s, "costs", "v_cost_by_service", f, func(c *store.Cost) []any {
		return []any{
			&c.Service, &c.ExecutionType, &c.PricedJobs, &c.Total, &c.Average, &c.Max, &c.BilledDurationMS, &c.LastHour, &c.LastDay,
			timeColumn{&c.FirstJobAt},
			timeColumn{&c.LastJobAt},
		}
	}, `SELECT service_name, execution_type, priced_jobs, total_cost_usd, avg_cost_usd, max_cost_usd, billed_duration_ms,
			cost_usd_last_hour, cost_usd_last_day, first_job_at, last_job_at
		FROM v WHERE (?1 = '' OR service_name = ?1) AND (?2 = '' OR execution_type = ?2)
		ORDER BY total_cost_usd DESC, service_name`, f.Service, f.ExecutionType)
}

// Violations implements [store.Insight].
func (s *Store) Violations(ctx context.Context, f store.JobFilter, limit int) ([]*store.Violation, error) {
	return report(ctx, s, "security violations", "v_denials", f, func(v *store.Violation) []any {
		return []any{
			&v.JobID,
			textColumn{&v.RunID},
			textColumn{&v.StepPath},
			&v.Service, &v.Operation, &v.ExecutionType,
			textColumn{&v.Rule},
			textColumn{&v.Attempted},
			textColumn{&v.Detail},
			textColumn{&v.PolicyDigest},
			textColumn{&v.Runner},
			textColumn{&v.Subject},
			textColumn{&v.TenantID},
			timeColumn{&v.OccurredAt},
			&v.ErrorCode,
			textColumn{&v.RuleSource},
			jsonColumn{&v.AllowedBy},
		}
	}, `SELECT job_id, run_id, step_path, service_name, operation, execution_type, rule, attempted, detail, policy_digest, runner,
			subject, tenant_id, occurred_at, error_code, rule_source, allowed_by
		FROM v
		WHERE (?1 = '' OR service_name = ?1) AND (?2 = '' OR execution_type = ?2) AND (?3 IS NULL OR occurred_at >= ?3)
		ORDER BY occurred_at DESC, job_id, rule, attempted LIMIT ?4`, f.Service, f.ExecutionType, timeValue(f.Since), limit)
}

// Figures implements [store.Insight].
func (s *Store) Figures(ctx context.Context, f store.JobFilter, limit int) ([]*store.JobFigures, error) {
	return report(ctx, s, "figures of jobs", "tb_job_run", f, func(j *store.JobFigures) []any {
		return []any{
			textColumn{&j.RunID},
			&j.Service, &j.Operation, &j.ExecutionType, &j.Status, &j.Attempts, &j.DurationSeconds,
			jsonColumn{&j.ResourceUsage},
			textColumn{&j.ErrorCode},
			textColumn{&j.ErrorMessage},
			timeColumn{&j.CreatedAt},
			timeColumn{&j.EndedAt},
		}
	}, `SELECT run_id, service_name, operation, execution_type, status, attempts, duration_seconds, resource_usage,
			error_code, substr(error_message, 1, ?6), created_at,
			CASE WHEN status IN ('completed', 'failed', 'cancelled') THEN coalesce(completed_at, updated_at) END
		FROM v
		WHERE (?1 = '' OR service_name = ?1) AND (?2 = '' OR execution_type = ?2) AND (?3 IS NULL OR created_at >= ?3)
			AND (NOT ?4 OR status = 'failed')
		ORDER BY created_at DESC, id DESC LIMIT ?5`,
		f.Service, f.ExecutionType, timeValue(f.Since), boolValue(f.Failed), limit, store.MaxErrorMessage)
}

// Recorded implements [store.Insight].
func (s *Store) Recorded(ctx context.Context, f store.JobFilter, before string, limit int) ([]*store.RecordedJob, error) {
	mine, tenants := "?6 IS NULL", any(nil)
	if f.Tenants != nil {
		mine, tenants = ofTenants("?6", f.Tenants)
		mine = strings.Replace(mine, "tenant_id", "j.tenant_id", 1)
	}
	return rowsOf(ctx, s, "recorded jobs", func(j *store.RecordedJob) []any {
		return []any{
			&j.ID,
			textColumn{&j.RunID},
			&j.Operation, &j.Status,
			textColumn{&j.ErrorCode},
			jsonColumn{&j.Input},
			jsonColumn{&j.RunnerConfig},
			jsonColumn{&j.SecurityContext},
			jsonColumn{&j.ResourceUsage},
			textColumn{&j.Subject},
			timeColumn{&j.CreatedAt},
			textColumn{&j.Snapshot},
			textColumn{&j.Entity},
			textColumn{&j.Action},
		}
	}, `SELECT j.id, j.run_id, j.operation, j.status, j.error_code, CASE WHEN length(j.input_data) <= ?5 THEN j.input_data END,
			j.runner_config, j.security_context, j.resource_usage, coalesce(r.triggered_by, j.triggered_by), j.created_at, r.snapshot, r.entity, r.action
		FROM jobs.tb_job_run j LEFT JOIN jobs.tb_workflow_run r ON r.id = j.run_id
		WHERE (?1 = '' OR j.id < ?1) AND j.service_name = ?2 AND j.status IN ('completed', 'failed') AND (?3 IS NULL OR j.created_at >= ?3) AND `+mine+`
		ORDER BY j.id DESC LIMIT ?4`, before, f.Service, timeValue(f.Since), limit, store.MaxRecordedInput, tenants)
}
