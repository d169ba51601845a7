// Command postgres measures the PostgreSQL store, on a throwaway cluster made from the machine's own programs:
//
//	legacy  an old table is upgraded while another connection inserts: how long, and the inserter's longest stall
//	large   what a new run costs with no jobs and with a million, and how long the views take then
//	steps   transactions for each step, by how many runs there are at once
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/specql/mesh/services/orchestrator/internal/store"
	"github.com/specql/mesh/services/orchestrator/internal/store/postgres"
	"github.com/specql/mesh/test/pgtest"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Stdout, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "postgres:", err)
		os.Exit(1)
	}
}

// bench is what the parts share.
type bench struct {
	out     io.Writer
	cluster *pgtest.Cluster
	rows    int
	jobs    int
}

func run(ctx context.Context, out io.Writer, args []string) error {
	b := &bench{out: out}
	fs := flag.NewFlagSet("postgres", flag.ContinueOnError)
	fs.IntVar(&b.rows, "rows", 200_000, "rows of the old table")
	fs.IntVar(&b.jobs, "jobs", 1_000_000, "jobs of the large table")
	parts := fs.String("part", "legacy,large,steps", "what to measure")
	if err := fs.Parse(args); err != nil {
		return err
	}
	known := map[string]func(context.Context, string) error{"legacy": b.legacy, "large": b.large, "steps": b.steps}
	var err error
	if b.cluster, err = pgtest.New(""); err != nil {
		return err
	}
	defer func() { _ = b.cluster.Close() }()
	for part := range strings.SplitSeq(*parts, ",") {
		measure, ok := known[part]
		if !ok {
			return fmt.Errorf("-part %s: want legacy, large or steps", part)
		}
		url, err := b.cluster.CreateDatabase()
		if err != nil {
			return err
		}
		if err := measure(ctx, url); err != nil {
			return fmt.Errorf("%s: %w", part, err)
		}
	}
	return nil
}

func (b *bench) printf(format string, args ...any) { _, _ = fmt.Fprintf(b.out, format+"\n", args...) }

const legacyTable = `CREATE SCHEMA jobs;
	CREATE TABLE jobs.tb_job_run (
		id uuid PRIMARY KEY, identifier text NOT NULL UNIQUE, idempotency_key text UNIQUE,
		service_name text NOT NULL, operation text NOT NULL, input_data jsonb, output_data jsonb, error_message text,
		status text NOT NULL CHECK (status IN ('pending', 'running', 'completed', 'failed')),
		attempts integer NOT NULL DEFAULT 0, max_attempts integer NOT NULL DEFAULT 3, timeout_seconds integer,
		tenant_id uuid, triggered_by uuid, correlation_id text, entity_type text, entity_pk text,
		created_at timestamptz NOT NULL DEFAULT now(), started_at timestamptz, completed_at timestamptz, updated_at timestamptz NOT NULL DEFAULT now());
	INSERT INTO jobs.tb_job_run (id, identifier, idempotency_key, service_name, operation, input_data, output_data, error_message, status,
		attempts, tenant_id, created_at, started_at, completed_at)
	SELECT gen_random_uuid(), 'job-' || n, 'key-' || n, 'service_' || n %% 20, 'operation_' || n %% 5, '{"amount": 12}', '{"id": "ch_123"}',
		CASE WHEN n %% 20 = 1 THEN 'refused' END, CASE n %% 20 WHEN 0 THEN 'pending' WHEN 1 THEN 'failed' ELSE 'completed' END, 1,
		'6a8f9d0e-0000-4000-8000-000000000001', now() - n * interval '1 second', now() - n * interval '1 second', now() - n * interval '1 second' + interval '250 ms'
	FROM generate_series(1, %d) AS n`

// legacy upgrades an old table while somebody inserts.
func (b *bench) legacy(ctx context.Context, url string) error {
	c, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close(ctx) }()
	if _, err := c.Exec(ctx, fmt.Sprintf(legacyTable, b.rows), pgx.QueryExecModeSimpleProtocol); err != nil {
		return err
	}
	type outcome struct {
		took time.Duration
		err  error
	}
	done := make(chan outcome, 1)
	go func() {
		began := time.Now()
		_, err := postgres.Migrate(ctx, postgres.Options{URL: url})
		done <- outcome{time.Since(began), err}
	}()
	var stall time.Duration
	for n := 0; ; n++ {
		select {
		case o := <-done:
			if o.err != nil {
				return o.err
			}
			var rows, counted int64
			if err := c.QueryRow(ctx, "SELECT (SELECT count(*) FROM jobs.tb_job_run), (SELECT sum(total_jobs) FROM jobs.v_execution_performance_by_type)::bigint").
				Scan(&rows, &counted); err != nil {
				return err
			}
			b.printf("legacy: %d rows upgraded in %.2f s; meanwhile another connection inserted %d rows, its longest stall %d ms; %d rows there, %d counted",
				b.rows, o.took.Seconds(), n, stall.Milliseconds(), rows, counted)
			return nil
		default:
		}
		began := time.Now()
		if _, err := c.Exec(ctx, `INSERT INTO jobs.tb_job_run (id, identifier, service_name, operation, status) VALUES (gen_random_uuid(), $1, 's', 'o', 'pending')`,
			fmt.Sprintf("meanwhile-%d", n)); err != nil {
			return err
		}
		stall = max(stall, time.Since(began))
	}
}

func open(ctx context.Context, url string) (*postgres.Store, error) {
	if _, err := postgres.Migrate(ctx, postgres.Options{URL: url}); err != nil {
		return nil, err
	}
	return postgres.Open(ctx, postgres.Options{URL: url})
}

// process is a run as the engine writes it.
type process struct {
	id       string
	sequence int64
	last     *store.Job
	// limit is what each step takes a slot of; nil for none.
	limit *store.Limit
	slot  *store.Take
}

func newProcess() *process { return &process{id: uuid.Must(uuid.NewV7()).String()} }

func (p *process) create() *store.Record {
	now := time.Now()
	p.sequence++
	r := &store.Record{RunID: p.id, Epoch: 1, Sequence: p.sequence, Create: &store.Run{
		ID: p.id, Entity: "payment", Action: "process", Status: store.Running, Owner: "a", Epoch: 1, CreatedAt: now, StartedAt: now,
		Input: []byte(`{"amount": 12, "card_token": "tok_visa"}`), Snapshot: "abc",
	}}
	return r
}

// step ends the last job and begins the next one: what a step of a workflow costs. The last step ends the run.
func (p *process) step(last bool) *store.Record {
	p.sequence++
	now := time.Now()
	r := &store.Record{RunID: p.id, Epoch: 1, Sequence: p.sequence}
	if p.last != nil {
		done := *p.last
		done.Status, done.CompletedAt, done.Sequence = store.Completed, now, p.sequence
		done.Output = []byte(`{"id": "ch_123", "status": "succeeded"}`)
		done.ResourceUsage = []byte(`{"duration_seconds": 0.01, "attempts": 1, "source": "http", "status_code": 200}`)
		done.SecurityContext = []byte(`{"runner": "http-runner@a", "policy_digest": "d", "checks": [{"rule": "allowed_domains", "subject": "api.stripe.com", "allowed": true}]}`)
		r.ChangedJobs = []*store.Job{&done}
		if p.slot != nil {
			r.Ends = []store.SlotEnd{{ID: p.slot.ID, JobID: p.slot.JobID}}
		}
	}
	if last {
		r.Run = &store.RunChange{Status: store.Completed, CompletedAt: now, Output: []byte(`{"charge_id": "ch_123"}`)}
		return r
	}
	p.last = &store.Job{
		ID: uuid.Must(uuid.NewV7()).String(), RunID: p.id, StepPath: fmt.Sprintf("steps[%d]", p.sequence), Service: "api", Operation: "call", ExecutionType: "http",
		Status: store.Running, Attempts: 1, MaxAttempts: 4, CreatedAt: now, StartedAt: now, Sequence: p.sequence,
		RunnerConfig: []byte(`{"base_url": "https://api.stripe.com", "auth_type": "bearer"}`), Input: []byte(`{"amount": 12}`),
	}
	r.NewJobs = []*store.Job{p.last}
	if p.limit != nil {
		p.slot = &store.Take{ID: uuid.Must(uuid.NewV7()).String(), JobID: p.last.ID, Limits: []store.Limit{*p.limit}}
		r.Takes = []*store.Take{p.slot}
	}
	return r
}

func commit(ctx context.Context, st *postgres.Store, r *store.Record) error {
	results, err := st.Commit(ctx, []*store.Record{r})
	return errors.Join(append(results, err)...)
}

const largeTable = `INSERT INTO jobs.tb_workflow_run (id, status, owner, epoch, created_at, completed_at)
	SELECT md5('run' || n)::uuid, 'completed', 'a', 1, now() - n * interval '10 seconds', now() - n * interval '10 seconds' FROM generate_series(1, %[1]d / 5) AS n;
	INSERT INTO jobs.tb_job_run (identifier, run_id, step_path, service_name, operation, execution_type, status, by_sql, created_at, started_at, completed_at,
		attempts, duration_seconds, error_code, error_message, input_data, runner_config, output_data, resource_usage, security_context)
	SELECT 'job-' || n, md5('run' || 1 + n %% (%[1]d / 5))::uuid, 'steps[' || n %% 5 || ']', 'service_' || n %% 20, 'operation_' || n %% 3,
		(array['http', 'shell', 'docker', 'serverless'])[1 + n %% 4], CASE WHEN n %% 20 = 0 THEN 'failed' ELSE 'completed' END, false,
		now() - (n %% (%[1]d / 5)) * interval '10 seconds', now() - (n %% (%[1]d / 5)) * interval '10 seconds', now() - (n %% (%[1]d / 5)) * interval '10 seconds' + interval '1 second',
		1, exp(random() * 8 - 6), CASE WHEN n %% 1000 = 0 THEN 'POLICY_VIOLATION' WHEN n %% 20 = 0 THEN 'TIMEOUT' END, CASE WHEN n %% 20 = 0 THEN 'failure ' || n END,
		'{"amount": 12}', '{"base_url": "https://api.stripe.com", "auth_type": "bearer"}', '{"id": "ch_123", "status": "succeeded"}',
		'{"duration_seconds": 0.01, "cpu_seconds": 0.5, "peak_memory_mb": 12.5, "attempts": 1, "source": "http", "status_code": 200, "cost_usd": 0.001}',
		'{"policy_digest": "d", "runner": "http-runner@a", "checks": [{"rule": "allowed_domains", "subject": "api.stripe.com", "allowed": false}]}'
	FROM generate_series(1, %[1]d) AS n`

var views = []string{
	"v_execution_performance_by_type", "v_resource_usage_by_runner", "v_runner_failure_patterns",
	"v_job_queue_health", "v_cost_by_service", "v_security_violations",
}

// costs is how long a run's two records take: it begins with its first call, and ends.
func costs(ctx context.Context, st *postgres.Store, runs int) ([]time.Duration, error) {
	all := make([]time.Duration, 0, runs)
	for range runs {
		p := newProcess()
		begin := p.create()
		begin.NewJobs = p.step(false).NewJobs
		began := time.Now()
		if err := commit(ctx, st, begin); err != nil {
			return nil, err
		}
		if err := commit(ctx, st, p.step(true)); err != nil {
			return nil, err
		}
		all = append(all, time.Since(began))
	}
	return all, nil
}

// large measures a database with a million jobs, beside one without.
func (b *bench) large(ctx context.Context, url string) error {
	st, err := open(ctx, url)
	if err != nil {
		return err
	}
	defer func() { _ = st.Close() }()
	emptyURL, err := b.cluster.CreateDatabase()
	if err != nil {
		return err
	}
	empty, err := open(ctx, emptyURL)
	if err != nil {
		return err
	}
	defer func() { _ = empty.Close() }()
	c, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close(ctx) }()
	began := time.Now()
	if _, err := c.Exec(ctx, fmt.Sprintf(largeTable, b.jobs), pgx.QueryExecModeSimpleProtocol); err != nil {
		return err
	}
	loaded := time.Since(began)
	// The views first, right after the load: nothing has been analyzed or put together.
	for _, when := range []string{"right after the load", "after ANALYZE and maintenance"} {
		for _, name := range views {
			began := time.Now()
			rows, err := c.Query(ctx, "SELECT * FROM jobs."+name)
			if err != nil {
				return err
			}
			n := 0
			for rows.Next() {
				n++
			}
			if err := rows.Err(); err != nil {
				return err
			}
			b.printf("large: %s: %d rows in %d ms, %s", name, n, time.Since(began).Milliseconds(), when)
		}
		if _, err := c.Exec(ctx, "ANALYZE"); err != nil {
			return err
		}
		if err := st.Maintain(ctx, 0); err != nil {
			return err
		}
	}
	// The load's own pages are on their way to the disk: that is no cost of a run.
	if _, err := c.Exec(ctx, "CHECKPOINT"); err != nil {
		return err
	}
	// By turns, and the median, for the machine is not ours alone.
	var without, with []time.Duration
	for turn := range 60 {
		for _, side := range []struct {
			st  *postgres.Store
			all *[]time.Duration
		}{{empty, &without}, {st, &with}} {
			some, err := costs(ctx, side.st, 50)
			if err != nil {
				return err
			}
			if turn >= 10 { // warm by now
				*side.all = append(*side.all, some...)
			}
		}
	}
	slices.Sort(without)
	slices.Sort(with)
	before, after := without[len(without)/2], with[len(with)/2]
	b.printf("large: a new run's two records take %d µs with no jobs, %d µs with %d (loaded in %.0f s): ratio %.2f",
		before.Microseconds(), after.Microseconds(), b.jobs, loaded.Seconds(), before.Seconds()/after.Seconds())
	return nil
}

// steps counts transactions, of steps without limits and of such that all take slots of one.
func (b *bench) steps(ctx context.Context, url string) error {
	for _, limit := range []*store.Limit{nil, {Key: "bench", Window: time.Minute, MaxAttempts: 1 << 40}} {
		if err := b.stepsOf(ctx, url, limit); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) stepsOf(ctx context.Context, url string, limit *store.Limit) error {
	what := ""
	if limit != nil {
		what = ", all at one limit"
	}
	st, err := open(ctx, url)
	if err != nil {
		return err
	}
	defer func() { _ = st.Close() }()
	for _, concurrency := range []int{1, 8, 64, 256} {
		var transactions, records atomic.Int64
		j := store.NewJournal(st, store.JournalOptions{OnCommit: func(n int, _ time.Duration, _ error) {
			transactions.Add(1)
			records.Add(int64(n))
		}})
		end := time.Now().Add(5 * time.Second)
		began := time.Now()
		errs := make([]error, concurrency)
		var wg sync.WaitGroup
		for i := range concurrency {
			wg.Go(func() {
				for errs[i] == nil && time.Now().Before(end) {
					p := newProcess()
					p.limit = limit
					r, first := p.create(), p.step(false)
					r.NewJobs, r.Takes = first.NewJobs, first.Takes
					for n := 1; n <= 6 && errs[i] == nil; n++ {
						errs[i] = j.Append(ctx, r)
						r = p.step(n == 5)
					}
				}
			})
		}
		wg.Wait()
		took := time.Since(began)
		if err := errors.Join(append(errs, j.Close())...); err != nil {
			return err
		}
		b.printf("steps: %d at once%s: %.2f transactions a step, %.0f steps/s, %.0f transactions/s", concurrency, what,
			float64(transactions.Load())/float64(records.Load()), float64(records.Load())/took.Seconds(), float64(transactions.Load())/took.Seconds())
	}
	return nil
}
