// Command shell-runner serves the execution type shell over gRPC.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/services/shell-runner/shellrunner"
)

func main() {
	os.Exit(runner.Main("shell-runner", build))
}

func build(_ context.Context, env *runner.Env) (runner.JobRunner, error) {
	o := shellrunner.Options{Logger: env.Logger, ReapOrphans: os.Getpid() == 1}
	if len(env.PolicyJSON) > 0 {
		ceiling, err := runner.Decode[shellrunner.Policy](env.PolicyJSON)
		if err != nil {
			return nil, fmt.Errorf("--policy: %w", err)
		}
		o.Ceiling = &ceiling
	}
	return shellrunner.New(o)
}
