package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/specql/mesh/pkg/mesh"
)

// floorScript is what a durable step costs at least, written as one would by hand: a row of 100 bytes inserted
// and updated in one transaction.
const floorScript = `BEGIN;
INSERT INTO bench_floor (payload) VALUES (repeat('x', 100)) RETURNING id \gset
UPDATE bench_floor SET payload = repeat('y', 100) WHERE id = :id;
COMMIT;
`

// pgbench measures the database's own rate of commits.
type pgbench struct {
	program, url, script string
	seconds              int
}

func newPgbench(dir, bin, url string, seconds int) (*pgbench, error) {
	p := &pgbench{program: filepath.Join(bin, "pgbench"), url: url, script: filepath.Join(dir, "floor.sql"), seconds: seconds}
	if err := os.WriteFile(p.script, []byte(floorScript), 0o600); err != nil {
		return nil, err
	}
	return p, nil
}

var tpsLine = regexp.MustCompile(`tps = ([0-9.]+) \(without initial`)

// rate is in transactions a second.
func (p *pgbench) rate(ctx context.Context, clients int) (float64, error) {
	out, err := exec.CommandContext(ctx, p.program, "-n", "-M", "prepared", "-c", strconv.Itoa(clients), "-j", strconv.Itoa(min(clients, 2)), //nolint:gosec // a program of the installation
		"-T", strconv.Itoa(p.seconds), "-f", p.script, p.url).CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("pgbench: %w\n%s", err, out)
	}
	m := tpsLine.FindSubmatch(out)
	if m == nil {
		return 0, fmt.Errorf("pgbench printed no rate:\n%s", out)
	}
	return strconv.ParseFloat(string(m[1]), 64)
}

// spin calls f from n goroutines until the time is over, and gives calls a second and the median of a call.
func spin(ctx context.Context, n int, d time.Duration, f func(ctx context.Context) error) (perSecond float64, p50 time.Duration, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	end := time.Now().Add(d)
	var count atomic.Int64
	all := make([]samples, n)
	var wg sync.WaitGroup
	began := time.Now()
	for i := range n {
		wg.Go(func() {
			for time.Now().Before(end) && ctx.Err() == nil {
				t := time.Now()
				if err := f(ctx); err != nil {
					cancel(err)
					return
				}
				all[i] = append(all[i], time.Since(t))
				count.Add(1)
			}
		})
	}
	wg.Wait()
	took := time.Since(began)
	if ctx.Err() != nil {
		return 0, 0, context.Cause(ctx)
	}
	var sum samples
	for _, s := range all {
		sum = append(sum, s...)
	}
	return float64(count.Load()) / took.Seconds(), sum.quantile(0.5), nil
}

// echo is a bare gRPC call with the project's own credentials and settings and nothing behind it.
type echo struct {
	stop   context.CancelFunc
	done   chan error
	client grpc_health_v1.HealthClient
	close  func() error
}

func newEcho(ctx context.Context, ca *mesh.Authority) (*echo, error) {
	server, err := ca.Issue("orchestrator")
	if err != nil {
		return nil, err
	}
	var lc net.ListenConfig
	lis, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	sctx, stop := context.WithCancel(ctx)
	e := &echo{stop: stop, done: make(chan error, 1)}
	srv := mesh.NewServer(server, mesh.ServerOptions{})
	go func() { e.done <- srv.Serve(sctx, lis) }()
	conn, err := mesh.Dial(lis.Addr().String(), server, mesh.DialOptions{ServerRole: "orchestrator"})
	if err != nil {
		stop()
		return nil, errors.Join(err, <-e.done)
	}
	e.client, e.close = grpc_health_v1.NewHealthClient(conn), conn.Close
	return e, nil
}

func (e *echo) call(ctx context.Context) error {
	_, err := e.client.Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	return err
}

func (e *echo) end() error {
	err := e.close()
	e.stop()
	return errors.Join(err, <-e.done)
}

// httpFloor is net/http's own rate for a GET of nothing.
func httpFloor(ctx context.Context, n int, d time.Duration) (float64, time.Duration, error) {
	var lc net.ListenConfig
	lis, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return 0, 0, err
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}), ReadHeaderTimeout: time.Second}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(lis) }()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: n}}
	rate, p50, err := spin(ctx, n, d, func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+lis.Addr().String()+"/", nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		return resp.Body.Close()
	})
	client.CloseIdleConnections()
	err = errors.Join(err, srv.Close())
	if ended := <-done; !errors.Is(ended, http.ErrServerClosed) {
		err = errors.Join(err, ended)
	}
	return rate, p50, err
}

// execFloor is how fast the machine starts programs that do nothing.
func execFloor(ctx context.Context, n int, d time.Duration) (float64, time.Duration, error) {
	return spin(ctx, n, d, func(ctx context.Context) error { return exec.CommandContext(ctx, "/bin/true").Run() })
}

// floor is what the machine itself is capable of, so many at once.
type floor struct {
	Name        string  `json:"name"`
	Concurrency int     `json:"concurrency"`
	PerSecond   float64 `json:"per_second"`
	P50Ms       float64 `json:"p50_ms"`
}

// measureFloors takes all floors once.
func (b *bench) measureFloors(ctx context.Context) error {
	const long = 500 * time.Millisecond
	for _, n := range []int{1, 8, 32} {
		rate, err := b.floor.rate(ctx, n)
		if err != nil {
			return err
		}
		b.floors = append(b.floors, floor{"PostgreSQL: insert and update of a row, one commit (pgbench)", n, rate, float64(n) / rate * 1000})
	}
	for _, f := range []struct {
		name string
		at   []int
		run  func(n int) (float64, time.Duration, error)
	}{
		{"gRPC unary call with mutual TLS, nothing behind it", []int{1, 8, 64}, func(n int) (float64, time.Duration, error) { return spin(ctx, n, long, b.echo.call) }},
		{"net/http GET, nothing behind it", []int{1, 8, 64}, func(n int) (float64, time.Duration, error) { return httpFloor(ctx, n, long) }},
		{"fork and exec of /bin/true", []int{1, 2, 8}, func(n int) (float64, time.Duration, error) { return execFloor(ctx, n, long) }},
	} {
		for _, n := range f.at {
			rate, p50, err := f.run(n)
			if err != nil {
				return fmt.Errorf("%s: %w", f.name, err)
			}
			b.floors = append(b.floors, floor{f.name, n, rate, ms(p50)})
		}
	}
	return nil
}
