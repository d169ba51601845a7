// Command bench measures what a durable workflow costs, in floors of the machine that it runs on: how many
// transactions its PostgreSQL commits, how fast a bare gRPC call is. Everything is real: processes of
// their own, mutual TLS, fsync.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/specql/mesh/pkg/client"
	"github.com/specql/mesh/pkg/memory"
	"github.com/specql/mesh/pkg/mesh"
	"github.com/specql/mesh/test/pgtest"
)

func main() {
	memory.AllowGarbage(garbage)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:], os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// garbage is what an orchestrator lets gather, for which this process stands where it calls runners.
const garbage = 64 << 20

// ours is the name of the system that all this is about.
const ours = "SpecQL Mesh"

// settings are PostgreSQL's, beside fsync, synchronous_commit and full_page_writes, which are on. Connections are plenty: the pools of all that
// are measured are open while pgbench takes its 32.
var settings = []string{"shared_buffers=512MB", "max_wal_size=4GB", "max_connections=400"}

type bench struct {
	progress io.Writer
	dir, bin string
	ca       *mesh.Authority
	cluster  *pgtest.Cluster
	db       *pgxpool.Pool
	floor    *pgbench
	echo     *echo
	duration time.Duration
	results  []*result
	floors   []floor
}

func run(ctx context.Context, args []string, progress io.Writer) (err error) {
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	root := fs.String("root", ".", "top of the repository")
	out := fs.String("out", "", "folder of the report; .cache/bench of the repository if empty")
	repeat := fs.Int("repeat", 5, "how often everything is measured, in turn")
	duration := fs.Duration("duration", 3*time.Second, "how long one workload is driven")
	floorSeconds := fs.Int("floor-seconds", 1, "how long the database's own rate is measured before each workload")
	only := fs.String("shapes", ".", "regular expression: the workloads to measure, such as '1 step x 32'")
	serve := fs.Bool("serve", false, "start everything, print the addresses and wait, to look at it by other means")
	sleepers := fs.Int("sleepers", 0, "measure what so many sleeping runs cost, and nothing else")
	stored := fs.Int("stored", 0, "measure what so many jobs that have ended cost a new run, and nothing else")
	sizes := fs.Bool("payloads", false, "measure what the size of inputs and outputs costs, and nothing else")
	several := fs.Bool("orchestrators", false, "measure one, two and four orchestrators on one database, and nothing else")
	replicas := fs.Bool("runners", false, "measure one, two and four replicas of the runner, and nothing else")
	open := fs.Bool("ramps", false, "start 100, 500 and 2,000 workflows a second whether or not others have ended, and nothing else")
	withPeers := fs.Bool("peers", false, "measure DBOS Transact, River (one step alone) and Temporal in the same shapes, in turn")
	stepsOf := fs.String("steps", "", "measure what single steps of these execution types cost beside what they run, with commas between, and nothing else")
	each := fs.Int("each", 100, "how often -steps measures each")
	guard := fs.Bool("guard", false, "fail where a count or a ratio to a floor is beyond its bound, whose margin is wide")
	if err := fs.Parse(args); err != nil {
		return err
	}
	wanted, err := regexp.Compile(*only)
	if err != nil {
		return fmt.Errorf("-shapes: %w", err)
	}
	b := &bench{progress: progress, duration: *duration}
	if *out == "" {
		*out = filepath.Join(*root, ".cache", "bench")
	}
	for _, dir := range []*string{root, out} {
		if *dir, err = filepath.Abs(*dir); err != nil {
			return err
		}
	}
	b.dir, b.bin = filepath.Join(*out, "logs"), filepath.Join(*out, "bin")
	for _, dir := range []string{b.dir, b.bin} {
		if err := os.MkdirAll(dir, 0o750); err != nil {
			return err
		}
	}
	if *stepsOf != "" {
		return b.steps(ctx, *root, *stepsOf, *each)
	}
	b.sayf("building")
	if err := programs(ctx, *root, b.bin); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	database, err := b.startFloors(ctx, *floorSeconds)
	if err != nil {
		return err
	}
	s, err := startSystem(ctx, b.ca, b.bin, b.dir, database)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.end()) }()
	m := &meter{db: b.db, parts: map[string]int{"postgresql": b.cluster.PID(), "orchestrator": s.orchestrator.cmd.Process.Pid, "runner": s.runner.cmd.Process.Pid}}
	if *serve {
		b.sayf("orchestrator at %s, certificates in %s, database %s", s.client.Conn().Target(), b.dir, database)
		<-ctx.Done()
		return nil
	}
	if *sleepers > 0 {
		return b.scale(ctx, m, s, *sleepers, *repeat)
	}
	if *stored > 0 {
		return b.stored(ctx, m, s, *stored, *repeat)
	}
	if err := b.warmUp(ctx, s.client); err != nil {
		return err
	}
	switch {
	case *sizes:
		return b.payloads(ctx, m, s.client)
	case *several:
		return b.orchestrators(ctx, m, s)
	case *replicas:
		return b.runners(ctx, m, s)
	case *open:
		return b.ramps(ctx, m, s.client)
	}
	var peers []*peer
	if *withPeers {
		if err := buildPeers(ctx, *root, b.bin); err != nil {
			return err
		}
		if peers, err = b.startPeers(ctx); err != nil {
			return err
		}
		defer func() {
			for _, p := range peers {
				p.end()
			}
		}()
	}
	for n := range *repeat {
		if err := b.measureFloors(ctx); err != nil {
			return err
		}
		for _, sh := range shapes() {
			for _, concurrency := range []int{1, 32, 64} {
				if !wanted.MatchString(fmt.Sprintf("%s x %d", sh.name, concurrency)) {
					continue
				}
				if err := b.measure(ctx, m, s.client, sh, concurrency); err != nil {
					return fmt.Errorf("%s, %d at once: %w", sh.name, concurrency, err)
				}
				for _, p := range peers {
					if sh.peers && (p.only == "" || p.only == sh.name) {
						if err := b.measurePeer(ctx, p, sh, concurrency); err != nil {
							return fmt.Errorf("%s: %s, %d at once: %w", p.name, sh.name, concurrency, err)
						}
					}
				}
			}
		}
		b.sayf("%d of %d rounds done", n+1, *repeat)
	}
	if err := b.report(ctx, *out); err != nil || !*guard {
		return err
	}
	return b.check()
}

func (b *bench) sayf(format string, args ...any) {
	_, _ = fmt.Fprintf(b.progress, format+"\n", args...)
}

func (b *bench) startFloors(ctx context.Context, seconds int) (database string, err error) {
	if b.ca, err = mesh.NewAuthority(); err != nil {
		return "", err
	}
	if b.cluster, err = pgtest.New("", settings...); err != nil {
		return "", err
	}
	if database, err = b.cluster.CreateDatabase(); err != nil {
		return "", err
	}
	if b.db, err = pgxpool.New(ctx, database); err != nil {
		return "", err
	}
	if _, err := b.db.Exec(ctx, "CREATE TABLE bench_floor (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, payload text NOT NULL)"); err != nil {
		return "", err
	}
	if b.floor, err = newPgbench(b.dir, b.cluster.Bin(), database, seconds); err != nil {
		return "", err
	}
	b.echo, err = newEcho(ctx, b.ca)
	return database, err
}

func (b *bench) close() error {
	var errs []error
	if b.echo != nil {
		errs = append(errs, b.echo.end())
	}
	if b.db != nil {
		b.db.Close()
	}
	if b.cluster != nil {
		errs = append(errs, b.cluster.Close())
	}
	return errors.Join(errs...)
}

// warmUp has everything compiled, prepared and connected that is so once.
func (b *bench) warmUp(ctx context.Context, c *client.Client) error {
	for _, sh := range shapes() {
		for range 3 {
			if err := execute(ctx, c, sh); err != nil {
				return fmt.Errorf("%s: %w", sh.name, err)
			}
		}
	}
	return nil
}

func execute(ctx context.Context, c *client.Client, sh shape) error {
	_, err := c.ExecuteAndWait(ctx, client.Action{Workflow: sh.workflow})
	return err
}

// before is what the machine is capable of right before a workload.
type before struct{ f1, f32, echoMs float64 }

func (f before) put(r *result) { r.F1, r.F32, r.EchoMs = f.f1, f.f32, f.echoMs }

func (b *bench) before(ctx context.Context) (f before, err error) {
	if f.f1, err = b.floor.rate(ctx, 1); err != nil {
		return f, err
	}
	if f.f32, err = b.floor.rate(ctx, 32); err != nil {
		return f, err
	}
	_, echo, err := spin(ctx, 1, 200*time.Millisecond, b.echo.call)
	f.echoMs = ms(echo)
	return f, err
}

// measure takes the floors, then the workload.
func (b *bench) measure(ctx context.Context, m *meter, c *client.Client, sh shape, concurrency int) error {
	return b.measureAs(ctx, m, ours, sh, concurrency, func(ctx context.Context) error { return execute(ctx, c, sh) })
}

// measureAs is measure of a workflow that is started in a way of its own, under the name of what is measured.
func (b *bench) measureAs(ctx context.Context, m *meter, name string, sh shape, concurrency int, one func(context.Context) error) error {
	floors, err := b.before(ctx)
	if err != nil {
		return err
	}
	r, err := load{concurrency: concurrency, duration: b.duration}.measure(ctx, m, one)
	if err != nil {
		return err
	}
	r.System, r.Shape, r.Steps = name, sh.name, sh.steps
	floors.put(r)
	b.add(r)
	return nil
}

// add keeps what was measured, and says it.
func (b *bench) add(r *result) {
	b.results = append(b.results, r)
	b.sayf("%-13s %-16s x %-3d p50 %8.2f ms %8.1f/s  /F32 %.4f  writes %7.3f  CPU %8.3f ms (%.3f a step: %s)  F1 %.0f F32 %.0f echo %.3f ms",
		r.System, r.Shape, r.Concurrency, r.P50Ms, r.PerSecond, r.rate(), r.Writes, r.CPUMs, r.stepCPU(), parts(r), r.F1, r.F32, r.EchoMs)
}
