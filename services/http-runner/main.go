// Command http-runner serves the execution type http.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/services/http-runner/httprunner"
)

func main() { os.Exit(runner.Main("http-runner", build)) }

func build(_ context.Context, env *runner.Env) (runner.JobRunner, error) {
	ceiling, err := httprunner.ReadPolicy(env.PolicyJSON)
	if err != nil {
		return nil, fmt.Errorf("--policy: %w", err)
	}
	return httprunner.New(httprunner.Options{Ceiling: ceiling, Logger: env.Logger})
}
