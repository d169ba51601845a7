package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/jackc/pgx/v5/pgxpool"
)

// past inserts jobs %[1]d to %[2]d of %[3]d, four to a run, as orchestrators leave them: the oldest first, with ids that grow with time.
// The triggers, which would count them, are off.
const past = `WITH runs AS (
	SELECT n, at, (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7' || substr(md5(n::text), 1, 3) || '8' || substr(md5(n::text), 4, 15))::uuid AS id
		FROM (SELECT n, now() - (%[3]d / 4 - n) * interval '1 second' AS at FROM generate_series(%[1]d / 4, %[2]d / 4 - 1) AS n) AS t),
	stored AS (INSERT INTO jobs.tb_workflow_run (id, status, owner, epoch, created_at, started_at, completed_at, input_data, output_data)
		SELECT id, 'completed', 'a', 1, at, at, at + interval '1 second', '{}', '{}' FROM runs)
	INSERT INTO jobs.tb_job_run (id, identifier, run_id, step_path, service_name, operation, execution_type, status, by_sql, created_at, started_at, completed_at,
		attempts, max_attempts, timeout_seconds, duration_seconds, error_code, error_message, input_data, runner_config, output_data, resource_usage, security_context)
	SELECT (left(id::text, 34) || lpad(to_hex(k), 2, '0'))::uuid, id || '/steps[' || k || ']#0', id, 'steps[' || k || ']', 'service_' || n %% 20, 'operation_' || n %% 3,
		(array['http', 'shell', 'docker', 'serverless'])[1 + k], CASE WHEN n %% 20 = 0 THEN 'failed' ELSE 'completed' END, false,
		at, at, at + interval '200 ms', 1, 1, 30, 0.2, CASE WHEN n %% 20 = 0 THEN 'TIMEOUT' END, CASE WHEN n %% 20 = 0 THEN 'failure ' || n END,
		'{"amount": 12}', '{}', '{"id": "ch_123", "status": "succeeded"}', '{"duration_seconds": 0.2, "cpu_seconds": 0.05, "peak_memory_mb": 12.5, "attempts": 1}',
		'{"policy_digest": "d", "runner": "http-runner@a"}'
	FROM runs, generate_series(0, 3) AS k`

// atOnce is how many are inserted by one statement.
const atOnce = 200_000

// stored measures what jobs that have ended long ago cost a new run: in turn on a database without and one with them, in one cluster.
func (b *bench) stored(ctx context.Context, few *meter, s *system, jobs, rounds int) (err error) {
	database, err := b.cluster.CreateDatabase()
	if err != nil {
		return err
	}
	dir := filepath.Join(b.dir, "stored")
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return err
	}
	full, err := startSystem(ctx, b.ca, b.bin, dir, database)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, full.end()) }()
	db, err := pgxpool.New(ctx, database)
	if err != nil {
		return err
	}
	defer db.Close()
	if err := b.fill(ctx, db, jobs); err != nil {
		return err
	}
	many := &meter{db: db, parts: map[string]int{"postgresql": few.parts["postgresql"], "orchestrator": full.orchestrator.cmd.Process.Pid, "runner": full.runner.cmd.Process.Pid}}
	one := shapes()[0]
	sides := []struct {
		meter  *meter
		system *system
	}{{few, s}, {many, full}}
	for _, side := range sides {
		if err := b.warmUp(ctx, side.system.client); err != nil {
			return err
		}
	}
	pairs := map[int][][2]*result{}
	for round := range rounds {
		for _, concurrency := range []int{1, 32} {
			var pair [2]*result
			for i := range sides {
				i = (i + round) % len(sides) // neither is always the second
				if err := b.measure(ctx, sides[i].meter, sides[i].system.client, one, concurrency); err != nil {
					return err
				}
				pair[i] = b.results[len(b.results)-1]
			}
			pairs[concurrency] = append(pairs[concurrency], pair)
		}
	}
	for _, concurrency := range []int{1, 32} {
		for _, figure := range []struct {
			name string
			get  func(*result) float64
		}{
			{"p50, ms", func(r *result) float64 { return r.P50Ms }},
			{"workflows a second", func(r *result) float64 { return r.PerSecond }},
			{"CPU-ms", func(r *result) float64 { return r.CPUMs }},
			{"of them PostgreSQL", func(r *result) float64 { return r.CPU["postgresql"] }},
			{"write transactions", writes},
		} {
			of := func(side int) spread {
				return spreadOf(pairs[concurrency], func(p [2]*result) float64 { return figure.get(p[side]) })
			}
			ratio := spreadOf(pairs[concurrency], func(p [2]*result) float64 { return figure.get(p[1]) / figure.get(p[0]) })
			b.sayf("1 step x %d: %s: %s without, %s with: with over without, round by round, %s", concurrency, figure.name, of(0).text(3), of(1).text(3), ratio.text(2))
		}
	}
	return nil
}

// fill inserts jobs that have ended, and sees to what autovacuum would see to in time.
func (b *bench) fill(ctx context.Context, db *pgxpool.Pool, jobs int) error {
	run := func(statements ...string) error {
		for _, statement := range statements {
			if _, err := db.Exec(ctx, statement); err != nil {
				return fmt.Errorf("%s: %w", statement, err)
			}
		}
		return nil
	}
	if err := run("ALTER TABLE jobs.tb_workflow_run DISABLE TRIGGER USER", "ALTER TABLE jobs.tb_job_run DISABLE TRIGGER USER"); err != nil {
		return err
	}
	for from := 0; from < jobs; from += atOnce {
		if _, err := db.Exec(ctx, fmt.Sprintf(past, from, min(from+atOnce, jobs), jobs)); err != nil {
			return fmt.Errorf("insert jobs: %w", err)
		}
		if done := from + atOnce; done%1_000_000 == 0 {
			b.sayf("%d jobs are stored", done)
		}
	}
	if err := run("ALTER TABLE jobs.tb_workflow_run ENABLE TRIGGER USER", "ALTER TABLE jobs.tb_job_run ENABLE TRIGGER USER", "SELECT jobs.fn_stat_recount()",
		"VACUUM (ANALYZE) jobs.tb_workflow_run", "VACUUM (ANALYZE) jobs.tb_job_run", "CHECKPOINT"); err != nil {
		return err
	}
	var size string
	if err := db.QueryRow(ctx, "SELECT pg_size_pretty(pg_database_size(current_database()))").Scan(&size); err != nil {
		return err
	}
	b.sayf("%d jobs are stored, counted and vacuumed; the database has %s", jobs, size)
	return nil
}
