// Command balance measures how gRPC's ways of balancing spread jobs over runner replicas that are not alike: round_robin, and
// weighted_round_robin by ORCA load reports, with those that come at a call's end and with those that come on a stream of their own.
//
// The dispatcher, the runner kit and the connections are the real ones; a job waits for as long as its replica is slow. The ways take
// turns, so that what else the machine does meets all of them, and the median of the rounds is printed.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	orcadata "github.com/cncf/xds/go/xds/data/orca/v3"
	orcaservice "github.com/cncf/xds/go/xds/service/orca/v3"
	"google.golang.org/grpc"
	_ "google.golang.org/grpc/balancer/weightedroundrobin" // is measured
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/orca"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"

	"github.com/specql/mesh/pkg/mesh"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/services/orchestrator/internal/dispatch"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/plan"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Stdout, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "balance:", err)
		os.Exit(1)
	}
}

// policies are the ways of balancing, as service configurations. The reports are as frequent and taken up as soon as
// the balancer can, which is what favours it most.
var policies = []struct{ name, config string }{
	{"round_robin", `{"loadBalancingConfig":[{"round_robin":{}}]}`},
	{"weighted, per call", `{"loadBalancingConfig":[{"weighted_round_robin":{"blackoutPeriod":"1s","weightUpdatePeriod":"0.5s"}}]}`},
	{"weighted, out of band", `{"loadBalancingConfig":[{"weighted_round_robin":{"enableOobLoadReport":true,"oobReportingPeriod":"0.5s","blackoutPeriod":"1s","weightUpdatePeriod":"0.5s"}}]}`},
}

// replica is how one is made.
type replica struct {
	slots int
	takes time.Duration // a job
}

const (
	executionType = "http"
	role          = "http-runner"

	slots = 16
	takes = 200 * time.Millisecond
)

// fleets are what the replicas of a runner may be like.
var fleets = []struct {
	name     string
	replicas []replica
}{
	{"three alike", []replica{{slots, takes}, {slots, takes}, {slots, takes}}},
	{"one has a quarter of the places", []replica{{slots, takes}, {slots, takes}, {slots / 4, takes}}},
	{"one takes four times as long", []replica{{slots, takes}, {slots, takes}, {slots, 4 * takes}}},
}

// loads are calls a second as a part of what the replicas can do together.
var loads = []float64{0.5, 0.8}

func run(ctx context.Context, out io.Writer, args []string) error {
	fs := flag.NewFlagSet("balance", flag.ContinueOnError)
	measured := fs.Duration("duration", 5*time.Second, "how long each is measured, after a warm-up in which weights come and streams are replaced")
	warm := fs.Duration("warm-up", 7*time.Second, "how long that takes")
	rounds := fs.Int("rounds", 5, "how often")
	only := fs.String("fleets", "", "regular expression of the fleets that are measured; all if empty")
	if err := fs.Parse(args); err != nil {
		return err
	}
	chosen, err := regexp.Compile(*only)
	if err != nil {
		return fmt.Errorf("-fleets: %w", err)
	}
	p := func(format string, args ...any) { _, _ = fmt.Fprintf(out, format+"\n", args...) }
	ca, err := mesh.NewAuthority()
	if err != nil {
		return err
	}
	p("%d replicas, jobs of %s, %d places each where nothing else is said; calls at random times; medians of %d rounds of %s", len(fleets[0].replicas), takes, slots, *rounds, *measured)
	for _, fleet := range fleets {
		if !chosen.MatchString(fleet.name) {
			continue
		}
		capacity := 0.0
		for _, r := range fleet.replicas {
			capacity += float64(r.slots) / r.takes.Seconds()
		}
		for _, load := range loads {
			p("\n%s: %.0f calls a second, %.0f %% of what they can do", fleet.name, capacity*load, load*100)
			p("  %-24s %22s %9s %9s %9s %14s  %s", "", "mean ms (least-most)", "p50 ms", "p90 ms", "p99 ms", "refused/call", "shares of the replicas")
			results := make([][]result, len(policies))
			for round := range *rounds {
				for i := range policies {
					i = (i + round) % len(policies) // nobody is always the first
					policy := policies[i]
					r, err := measure(ctx, ca, policy.config, fleet.replicas, capacity*load, *warm, *measured)
					if err != nil {
						return fmt.Errorf("%s, %s: %w", fleet.name, policy.name, err)
					}
					results[i] = append(results[i], r)
				}
			}
			for i, policy := range policies {
				rs := results[i]
				at := func(q float64) float64 { return median(rs, func(r result) float64 { return r.percentile(q) }) }
				var shares []string
				for n := range fleet.replicas {
					shares = append(shares, fmt.Sprintf("%.0f %%", 100*median(rs, func(r result) float64 { return r.shares[n] })))
				}
				means := fmt.Sprintf("%.1f (%.1f-%.1f)", median(rs, result.mean), slices.Min(each(rs, result.mean)), slices.Max(each(rs, result.mean)))
				p("  %-24s %22s %9.1f %9.1f %9.1f %14.3f  %s", policy.name, means, at(0.5), at(0.9), at(0.99),
					median(rs, func(r result) float64 { return r.refused }), strings.Join(shares, ", "))
			}
		}
	}
	return nil
}

func each(rs []result, of func(result) float64) []float64 {
	v := make([]float64, 0, len(rs))
	for _, r := range rs {
		v = append(v, of(r))
	}
	return v
}

func median(rs []result, of func(result) float64) float64 {
	v := each(rs, of)
	slices.Sort(v)
	return v[len(v)/2]
}

// result of one measurement.
type result struct {
	latencies []time.Duration // sorted
	shares    []float64
	refused   float64 // starts that a full replica refused, for each call
}

func (r result) percentile(q float64) float64 {
	return ms(r.latencies[min(int(q*float64(len(r.latencies))), len(r.latencies)-1)])
}

func (r result) mean() float64 {
	var sum time.Duration
	for _, l := range r.latencies {
		sum += l
	}
	return ms(sum) / float64(len(r.latencies))
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// waiting is a runner whose jobs wait.
type waiting struct {
	takes    time.Duration
	slots    int
	jobs     atomic.Int64
	inFlight atomic.Int64
}

// Describe implements runner.JobRunner.
func (*waiting) Describe(context.Context) (*runner.Description, error) {
	return &runner.Description{Name: "waiting-runner", Types: []runner.Type{{Name: executionType}}}, nil
}

// Validate implements runner.JobRunner.
func (*waiting) Validate(context.Context, *runner.Service) ([]runner.Problem, error) { return nil, nil }

// Execute implements runner.JobRunner.
func (w *waiting) Execute(ctx context.Context, j *runner.Job, _ runner.Sink) (*runner.Result, error) {
	w.inFlight.Add(1)
	defer w.inFlight.Add(-1)
	select {
	case <-time.After(w.takes):
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	w.jobs.Add(1)
	return &runner.Result{Output: j.Input}, nil
}

// reports are a replica's load reports: which part of its places is taken, and jobs a second.
type reports struct {
	orcaservice.UnimplementedOpenRcaServiceServer
	recorder orca.ServerMetricsRecorder
}

// StreamCoreMetrics sends reports as often as they are asked for; the one of the orca package does so every 30 s at most.
func (r *reports) StreamCoreMetrics(req *orcaservice.OrcaLoadReportRequest, stream grpc.ServerStreamingServer[orcadata.OrcaLoadReport]) error {
	tick := time.NewTicker(max(req.GetReportInterval().AsDuration(), 100*time.Millisecond))
	defer tick.Stop()
	for {
		m := r.recorder.ServerMetrics()
		if err := stream.Send(&orcadata.OrcaLoadReport{ApplicationUtilization: m.AppUtilization, RpsFractional: m.QPS}); err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-stream.Context().Done():
			return nil
		}
	}
}

// record keeps the figures of the last half second, as smooth as a runner could have them.
func (r *reports) record(ctx context.Context, w *waiting) {
	const every, samples = 20 * time.Millisecond, 25
	tick := time.NewTicker(every)
	defer tick.Stop()
	var used, done [samples]float64
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		jobs := float64(w.jobs.Load())
		before := done[n%samples]
		used[n%samples], done[n%samples] = float64(w.inFlight.Load())/float64(w.slots), jobs
		sum := 0.0
		for _, u := range used {
			sum += u
		}
		r.recorder.SetApplicationUtilization(sum / samples)
		r.recorder.SetQPS((jobs - before) / (samples * every.Seconds()))
	}
}

// serve starts a replica.
func serve(ctx context.Context, ca *mesh.Authority, w *waiting, refused *atomic.Int64) (address string, stop func(), err error) {
	credentials, err := ca.Issue(role)
	if err != nil {
		return "", nil, err
	}
	lis, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, fmt.Errorf("listen: %w", err)
	}
	r := &reports{recorder: orca.NewServerMetricsRecorder()}
	count := func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		err := handler(srv, ss)
		if status.Code(err) == codes.ResourceExhausted {
			refused.Add(1)
		}
		return err
	}
	s := mesh.NewServer(credentials, mesh.ServerOptions{
		AllowedRoles: []string{mesh.RoleOrchestrator}, DrainTimeout: 100 * time.Millisecond,
		ServerOptions: []grpc.ServerOption{orca.CallMetricsServerOption(r.recorder), grpc.ChainStreamInterceptor(count)},
	})
	h := runner.Register(s, w, runner.Options{MaxConcurrency: w.slots})
	orcaservice.RegisterOpenRcaServiceServer(s, r)
	serving, end := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { r.record(serving, w) })
	wg.Go(func() { _ = s.Serve(serving, lis) })
	return lis.Addr().String(), func() {
		h.Close()
		end()
		wg.Wait()
	}, nil
}

// named makes resolvers whose service configuration goes over the one of the connection.
var named atomic.Int64

func measure(ctx context.Context, ca *mesh.Authority, config string, replicas []replica, rate float64, warm, measured time.Duration) (result, error) {
	var (
		runners   []*waiting
		addresses []resolver.Address
		refused   atomic.Int64
	)
	for _, r := range replicas {
		w := &waiting{takes: r.takes, slots: r.slots}
		address, stop, err := serve(ctx, ca, w, &refused)
		if err != nil {
			return result{}, err
		}
		defer stop()
		runners = append(runners, w)
		addresses = append(addresses, resolver.Address{Addr: address})
	}
	names := &configured{Resolver: manual.NewBuilderWithScheme(fmt.Sprintf("balance%d", named.Add(1))), config: config, addresses: addresses}
	resolver.Register(names)
	credentials, err := ca.Issue(mesh.RoleOrchestrator)
	if err != nil {
		return result{}, err
	}
	d, err := dispatch.New(dispatch.Options{
		Runners: map[string]string{executionType: names.Scheme() + ":///replicas"}, Credentials: credentials, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return result{}, err
	}
	defer d.Close()

	var (
		wg     sync.WaitGroup
		mu     sync.Mutex
		out    result
		failed error
		jobs   = make([]int64, len(runners))
		begun  int64
	)
	call := func(n int, due time.Time, counts bool) {
		o := d.Execute(ctx, &engine.Call{Epoch: 1, Node: &plan.Call{}, Job: &store.Job{
			ID: fmt.Sprintf("%s-%d", names.Scheme(), n), Service: "s", Operation: "wait", ExecutionType: executionType, Attempts: 1, Timeout: time.Minute, Input: []byte(`{}`),
		}}, func(int64, string, string, time.Time) {})
		mu.Lock()
		defer mu.Unlock()
		if o.Err != nil {
			failed = cmp.Or(failed, error(o.Err))
		} else if counts {
			out.latencies = append(out.latencies, time.Since(due))
		}
	}
	count := func() {
		for i, w := range runners {
			jobs[i] = w.jobs.Load() - jobs[i]
		}
		begun = refused.Load() - begun
	}
	start, counting := time.Now(), false
	for n, due := 0, start; due.Before(start.Add(warm + measured)); n++ {
		if !counting && due.After(start.Add(warm)) {
			counting = true
			count()
		}
		select {
		case <-ctx.Done():
			wg.Wait()
			return result{}, errors.New("interrupted")
		case <-time.After(time.Until(due)):
		}
		at := due
		wg.Go(func() { call(n, at, counting) })
		due = due.Add(time.Duration(rand.ExpFloat64() / rate * float64(time.Second))) //nolint:gosec // times of calls
	}
	count()
	wg.Wait()
	if failed != nil {
		return result{}, failed
	}
	var sum int64
	for _, n := range jobs {
		sum += n
	}
	for _, n := range jobs {
		out.shares = append(out.shares, float64(n)/float64(sum))
	}
	out.refused = float64(begun) / float64(len(out.latencies))
	slices.Sort(out.latencies)
	return out, nil
}

// configured resolves to fixed addresses with a service configuration.
type configured struct {
	*manual.Resolver
	config    string
	addresses []resolver.Address
}

// Build implements resolver.Builder.
func (c *configured) Build(target resolver.Target, cc resolver.ClientConn, o resolver.BuildOptions) (resolver.Resolver, error) {
	parsed := cc.ParseServiceConfig(c.config)
	if parsed.Err != nil {
		return nil, fmt.Errorf("the way of balancing: %w", parsed.Err)
	}
	c.Resolver.InitialState(resolver.State{Addresses: c.addresses, ServiceConfig: parsed})
	return c.Resolver.Build(target, cc, o)
}
