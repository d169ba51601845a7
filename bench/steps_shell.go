package main

import (
	"context"
	"errors"
	"os/exec"
	"time"

	"google.golang.org/grpc/health/grpc_health_v1"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
)

// noopProgram does nothing.
const noopProgram = "/bin/true"

// shellStep runs it, held to every kind of limit.
func shellStep() *runnerv1.Job {
	return &runnerv1.Job{
		Service: &runnerv1.Service{
			Name: "nothing", ExecutionType: "shell",
			SecurityPolicy: []byte(`{"allowed_commands":["` + noopProgram + `"],"resource_limits":{"cpu_cores":1,"memory_mb":64,"processes":8,"disk_mb":16}}`),
		},
		Operation: &runnerv1.Operation{Name: "nothing", Config: []byte(`{"command":["` + noopProgram + `"]}`)},
	}
}

// pauseBetween is how long nothing is started in between, as between the jobs of a runner that
// is not at its limit: it makes ready for the next one.
const pauseBetween = 15 * time.Millisecond

// shellSteps measures a step of the shell runner beside the start of the program alone.
func shellSteps(ctx context.Context, s *steps) (err error) {
	r, err := s.startRunner(ctx, "shell-runner")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	health := grpc_health_v1.NewHealthClient(r.conn)
	pause := func(context.Context) error {
		<-time.After(pauseBetween)
		return nil
	}
	return s.inTurn(ctx,
		rival{name: "fork and exec of " + noopProgram, settle: pause, run: func(ctx context.Context) error { return exec.CommandContext(ctx, noopProgram).Run() }},
		rival{name: "gRPC call of the runner, nothing behind it", settle: pause, run: func(ctx context.Context) error {
			_, err := health.Check(ctx, &grpc_health_v1.HealthCheckRequest{})
			return err
		}},
		rival{name: "shell runner, its whole sandbox and every limit", settle: pause, run: func(context.Context) error {
			_, err := r.execute(shellStep())
			return err
		}},
	)
}
