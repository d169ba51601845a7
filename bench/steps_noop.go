package main

import (
	"context"
	"errors"

	"google.golang.org/grpc/health/grpc_health_v1"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
)

// noopSteps measures a step of a runner that does nothing beside a bare gRPC call of the same process.
func noopSteps(ctx context.Context, s *steps) (err error) {
	r, err := s.startRunner(ctx, "noop-runner", "--max-concurrency", "64")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	health := grpc_health_v1.NewHealthClient(r.conn)
	for _, n := range []int{1, 8, 64} {
		step, end, err := r.caller(ctx, n, &runnerv1.Service{Name: "nothing", ExecutionType: "noop"}, &runnerv1.Operation{Name: "noop"})
		if err != nil {
			return err
		}
		err = s.windows(ctx, n, max(1, s.each/20), []*program{r.program}, contestant{"gRPC call of the runner", func(ctx context.Context) error {
			_, err := health.Check(ctx, &grpc_health_v1.HealthCheckRequest{})
			return err
		}}, contestant{"step of the runner", step})
		end()
		if err != nil {
			return err
		}
	}
	return nil
}
