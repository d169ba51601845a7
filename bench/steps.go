package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/mesh"
	"github.com/specql/mesh/pkg/runner/wire"
)

// stepKinds are what -steps measures, by execution type: what a runner adds to what it runs.
var stepKinds = map[string]func(context.Context, *steps) error{
	"docker": dockerSteps,
	"http":   httpSteps,
	"noop":   noopSteps,
	"shell":  shellSteps,
}

// steps measures single steps, without an orchestrator: the runner is a process of its own, called as an
// orchestrator calls it, over gRPC with mutual TLS.
type steps struct {
	*bench
	root string
	each int
}

func (b *bench) steps(ctx context.Context, root, kinds string, each int) (err error) {
	s := &steps{bench: b, root: root, each: each}
	if s.ca, err = mesh.NewAuthority(); err != nil {
		return err
	}
	for kind := range strings.SplitSeq(kinds, ",") {
		measure := stepKinds[kind]
		if measure == nil {
			return fmt.Errorf("-steps: %q is none of %s", kind, strings.Join(slices.Sorted(maps.Keys(stepKinds)), ", "))
		}
		if err := measure(ctx, s); err != nil {
			return fmt.Errorf("steps of %s: %w", kind, err)
		}
	}
	return nil
}

// rival is one of several ways to do the same.
type rival struct {
	name string
	// run is what is measured. settle comes before it and is not; nil for nothing.
	settle, run func(context.Context) error
}

// inTurn measures all rivals one by one, each once in a round, so that what else the machine does meets all of
// them. The first is what the others are compared with.
func (s *steps) inTurn(ctx context.Context, rivals ...rival) error {
	taken := make([]samples, len(rivals))
	const warmUp = 5
	for round := range warmUp + s.each {
		for i, r := range rivals {
			if r.settle != nil {
				if err := r.settle(ctx); err != nil {
					return fmt.Errorf("%s: %w", r.name, err)
				}
			}
			began := time.Now()
			if err := r.run(ctx); err != nil {
				return fmt.Errorf("%s: %w", r.name, err)
			}
			if took := time.Since(began); round >= warmUp {
				taken[i] = append(taken[i], took)
			}
		}
	}
	floor := ms(taken[0].quantile(0.5))
	for i, r := range rivals {
		p50 := ms(taken[i].quantile(0.5))
		s.sayf("%-55s p50 %9.3f ms  p10 %9.3f  p90 %9.3f  %6.3f of the floor, %+.3f ms", r.name, p50, ms(taken[i].quantile(0.1)), ms(taken[i].quantile(0.9)), p50/floor, p50-floor)
	}
	return nil
}

// stepRunner is a runner that is called directly.
type stepRunner struct {
	program *program
	conn    *grpc.ClientConn
	stream  runnerv1.RunnerService_ExecuteClient
	end     context.CancelFunc
	// name and count make the ids of jobs.
	name  string
	count int
}

// startRunner builds a runner, starts it and connects to it.
func (s *steps) startRunner(ctx context.Context, name string, args ...string) (_ *stepRunner, err error) {
	s.sayf("building %s", name)
	dir, workspace := filepath.Join(s.root, "services"), "GOWORK=" // this program is built without the workspace, and may be run so
	if name == "noop-runner" {
		dir, workspace = filepath.Join(s.root, "bench"), "GOWORK=off"
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", s.bin+string(filepath.Separator), "./"+name) //nolint:gosec // our own
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0", workspace)
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build %s: %w\n%s", name, err, out)
	}
	tls, err := certificates(s.ca, s.dir, name)
	if err != nil {
		return nil, err
	}
	r := &stepRunner{name: "step"}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	var address string
	if r.program, address, err = start(ctx, s.dir, name, filepath.Join(s.bin, name), slices.Concat(tls, []string{"--listen", "127.0.0.1:0"}, args)...); err != nil {
		return nil, err
	}
	own, err := s.ca.Issue(mesh.RoleOrchestrator)
	if err != nil {
		return nil, err
	}
	if r.conn, err = mesh.Dial(address, own, mesh.DialOptions{ServerRole: name}); err != nil {
		return nil, err
	}
	streaming, end := context.WithCancel(ctx)
	r.end = end
	r.stream, err = runnerv1.NewRunnerServiceClient(r.conn).Execute(streaming, grpc.ForceCodecV2(wire.Codec()))
	return r, err
}

// execute runs one job to its end: one after the other on one stream, as an orchestrator does it.
func (r *stepRunner) execute(job *runnerv1.Job) (*runnerv1.Finished, error) {
	r.count++
	job.Id, job.RunId, job.Attempt, job.More, job.Batch = fmt.Sprintf("%s-%d", r.name, r.count), "run", 1, true, true
	job.IdempotencyKey, job.Timeout, job.Lease = job.GetId(), durationpb.New(time.Minute), durationpb.New(30*time.Second)
	if err := r.stream.Send(&runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Start{Start: job}}); err != nil {
		return nil, err
	}
	for {
		event, err := r.stream.Recv()
		if err != nil {
			return nil, err
		}
		if events := event.GetBatch().GetEvents(); len(events) > 0 {
			event = events[len(events)-1]
		}
		if finished := event.GetFinished(); finished != nil {
			if e := finished.GetError(); e != nil {
				return finished, fmt.Errorf("%s: %s", e.GetCode(), e.GetMessage())
			}
			return finished, nil
		}
	}
}

// streams gives so many runners that are the same one, each with a stream of its own, and ends them.
func (r *stepRunner) streams(ctx context.Context, n int) (_ chan *stepRunner, end context.CancelFunc, err error) {
	streaming, end := context.WithCancel(ctx)
	all := make(chan *stepRunner, n)
	for i := range n {
		one := &stepRunner{name: fmt.Sprintf("%s-%d-%d", r.name, n, i)}
		if one.stream, err = runnerv1.NewRunnerServiceClient(r.conn).Execute(streaming, grpc.ForceCodecV2(wire.Codec())); err != nil {
			end()
			return nil, nil, err
		}
		all <- one
	}
	return all, end, nil
}

// caller gives a function that makes a call of an operation, so many at once, each on a stream of its own.
func (r *stepRunner) caller(ctx context.Context, n int, service *runnerv1.Service, operation *runnerv1.Operation) (call func(context.Context) error, end context.CancelFunc, err error) {
	streams, end, err := r.streams(ctx, n)
	if err != nil {
		return nil, nil, err
	}
	return func(context.Context) error {
		stream := <-streams
		defer func() { streams <- stream }()
		_, err := stream.execute(&runnerv1.Job{Service: service, Operation: operation})
		return err
	}, end, nil
}

func (r *stepRunner) close() error {
	if r.end != nil {
		r.end()
	}
	var err error
	if r.conn != nil {
		err = r.conn.Close()
	}
	if r.program != nil {
		r.program.end()
	}
	return err
}
