// Command http-runner serves the execution type http.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/pflag"

	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/timerslack"
	"github.com/specql/mesh/services/http-runner/httprunner"
)

func main() {
	timerslack.Allow(timerslack.Services)
	os.Exit(runner.Main("http-runner", func(ctx context.Context, env *runner.Env) (runner.JobRunner, error) {
		return build(ctx, env, hold()...)
	}, runner.Flags(flags)))
}

func flags(fs *pflag.FlagSet) {
	fs.StringSlice("require-isolation", nil, "ways of holding a job without which the runner does not start, as 'specql runners' names them; all for every one")
}

func build(_ context.Context, env *runner.Env, held ...runner.Feature) (runner.JobRunner, error) {
	required, err := env.Flags.GetStringSlice("require-isolation")
	if err != nil {
		return nil, fmt.Errorf("--require-isolation: %w", err)
	}
	ceiling, err := httprunner.ReadPolicy(env.PolicyJSON)
	if err != nil {
		return nil, fmt.Errorf("--policy: %w", err)
	}
	return httprunner.New(httprunner.Options{Ceiling: ceiling, Logger: env.Logger, Isolation: held, RequireIsolation: required})
}
