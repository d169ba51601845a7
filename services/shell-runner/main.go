// Command shell-runner serves the execution type shell over gRPC.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/pflag"

	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/services/shell-runner/shellrunner"
)

func main() {
	os.Exit(runner.Main("shell-runner", build, runner.Flags(func(fs *pflag.FlagSet) {
		fs.Int("uid-base", 0, "first of the 65536 users that jobs become where the runner is root; 1879100000 if not given")
		fs.StringSlice("require-isolation", nil, "ways of holding a job without which the runner does not start, as 'specql runners' names them; all for every one")
	})))
}

func build(_ context.Context, env *runner.Env) (runner.JobRunner, error) {
	o := shellrunner.Options{Logger: env.Logger, ReapOrphans: os.Getpid() == 1}
	var err error
	if o.UIDBase, err = env.Flags.GetInt("uid-base"); err != nil {
		return nil, err
	}
	if o.RequireIsolation, err = env.Flags.GetStringSlice("require-isolation"); err != nil {
		return nil, err
	}
	if len(env.PolicyJSON) > 0 {
		ceiling, err := runner.Decode[shellrunner.Policy](env.PolicyJSON)
		if err != nil {
			return nil, fmt.Errorf("--policy: %w", err)
		}
		o.Ceiling = &ceiling
	}
	return shellrunner.New(o)
}
