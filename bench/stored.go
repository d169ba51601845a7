package main

import (
	"context"
	"fmt"
)

// past inserts jobs that have ended, four to a run, as an orchestrator leaves them; the triggers, which would count them, are off.
const past = `INSERT INTO jobs.tb_workflow_run (id, status, owner, epoch, created_at, started_at, completed_at, input_data, output_data)
	SELECT md5('run' || n)::uuid, 'completed', 'a', 1, now() - n * interval '1 second', now() - n * interval '1 second', now() - n * interval '1 second', '{}', '{}'
		FROM generate_series(%[1]d / 4, %[2]d / 4 - 1) AS n;
	INSERT INTO jobs.tb_job_run (identifier, run_id, step_path, service_name, operation, execution_type, status, by_sql, created_at, started_at, completed_at,
		attempts, max_attempts, timeout_seconds, duration_seconds, error_code, error_message, input_data, runner_config, output_data, resource_usage, security_context)
	SELECT 'job-' || n, md5('run' || n / 4)::uuid, 'steps[' || n %% 4 || ']', 'service_' || n %% 20, 'operation_' || n %% 3,
		(array['http', 'shell', 'docker', 'serverless'])[1 + n %% 4], CASE WHEN n %% 20 = 0 THEN 'failed' ELSE 'completed' END, false,
		now() - n / 4 * interval '1 second', now() - n / 4 * interval '1 second', now() - n / 4 * interval '1 second' + interval '200 ms',
		1, 1, 30, 0.2, CASE WHEN n %% 20 = 0 THEN 'TIMEOUT' END, CASE WHEN n %% 20 = 0 THEN 'failure ' || n END,
		'{"amount": 12}', '{}', '{"id": "ch_123", "status": "succeeded"}', '{"duration_seconds": 0.2, "cpu_seconds": 0.05, "peak_memory_mb": 12.5, "attempts": 1}',
		'{"policy_digest": "d", "runner": "http-runner@a"}'
	FROM generate_series(%[1]d, %[2]d - 1) AS n`

// atOnce is how many are inserted by one statement.
const atOnce = 200_000

// stored measures what jobs that have ended long ago cost a new run: in turn before and after they are there.
func (b *bench) stored(ctx context.Context, m *meter, s *system, jobs, rounds int) error {
	if err := b.warmUp(ctx, s.client); err != nil {
		return err
	}
	one := shapes()[0]
	measure := func() error {
		for range rounds {
			for _, concurrency := range []int{1, 32} {
				if err := b.measure(ctx, m, s.client, one, concurrency); err != nil {
					return err
				}
			}
		}
		return nil
	}
	if err := measure(); err != nil {
		return err
	}
	few := len(b.results)
	for _, trigger := range []string{"DISABLE", "ENABLE"} {
		if trigger == "ENABLE" {
			for from := 0; from < jobs; from += atOnce {
				if _, err := b.db.Exec(ctx, fmt.Sprintf(past, from, min(from+atOnce, jobs))); err != nil {
					return fmt.Errorf("insert jobs: %w", err)
				}
				if done := from + atOnce; done%1_000_000 == 0 {
					b.sayf("%d jobs are stored", done)
				}
			}
		}
		for _, table := range []string{"tb_workflow_run", "tb_job_run"} {
			if _, err := b.db.Exec(ctx, "ALTER TABLE jobs."+table+" "+trigger+" TRIGGER USER"); err != nil {
				return err
			}
		}
	}
	for _, statement := range []string{"SELECT jobs.fn_stat_recount()", "VACUUM (ANALYZE) jobs.tb_workflow_run", "VACUUM (ANALYZE) jobs.tb_job_run", "CHECKPOINT"} {
		if _, err := b.db.Exec(ctx, statement); err != nil {
			return fmt.Errorf("%s: %w", statement, err)
		}
	}
	var size string
	if err := b.db.QueryRow(ctx, "SELECT pg_size_pretty(pg_database_size(current_database()))").Scan(&size); err != nil {
		return err
	}
	b.sayf("%d jobs are stored, counted and vacuumed; the database has %s", jobs, size)
	if err := measure(); err != nil {
		return err
	}
	for i, concurrency := range []int{1, 32} {
		var before, after []*result
		for n, r := range b.results {
			switch {
			case n%2 != i:
			case n < few:
				before = append(before, r)
			default:
				after = append(after, r)
			}
		}
		for _, figure := range []struct {
			name string
			get  func(*result) float64
		}{
			{"time of one, in F1 commits", func(r *result) float64 { return r.P50Ms * r.F1 / 1000 }},
			{"workflows a second / F32", (*result).rate},
			{"CPU-ms", func(r *result) float64 { return r.CPUMs }},
			{"of them PostgreSQL", func(r *result) float64 { return r.CPU["postgresql"] }},
		} {
			x, y := spreadOf(before, figure.get), spreadOf(after, figure.get)
			b.sayf("1 step x %d: %s: %s before, %s after: ratio %.2f", concurrency, figure.name, x.text(4), y.text(4), y.median/x.median)
		}
	}
	return nil
}
