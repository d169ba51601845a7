// Command serverless-runner is the runner service for functions of cloud providers.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/pflag"

	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/timerslack"
	"github.com/specql/mesh/services/serverless-runner/serverlessrunner"
)

func main() {
	timerslack.Allow(timerslack.Services)
	os.Exit(runner.Main("serverless-runner", build, runner.Flags(func(fs *pflag.FlagSet) {
		fs.StringSlice("require-isolation", nil, "ways of holding a job without which the runner does not start, as 'specql runners' names them; all for every one")
		fs.String("price-table", "", "file of prices by provider and region, YAML or JSON, in place of the one built in")
	})))
}

func build(_ context.Context, env *runner.Env) (runner.JobRunner, error) {
	ceiling, err := serverlessrunner.ParseCeiling(env.PolicyJSON)
	if err != nil {
		return nil, fmt.Errorf("--policy: %w", err)
	}
	table, err := env.Flags.GetString("price-table")
	if err != nil {
		return nil, fmt.Errorf("--price-table: %w", err)
	}
	required, err := env.Flags.GetStringSlice("require-isolation")
	if err != nil {
		return nil, fmt.Errorf("--require-isolation: %w", err)
	}
	var prices *serverlessrunner.PriceTable
	if table != "" {
		if prices, err = serverlessrunner.LoadPrices(table); err != nil {
			return nil, fmt.Errorf("--price-table: %w", err)
		}
	}
	return serverlessrunner.New(serverlessrunner.Options{Ceiling: ceiling, Prices: prices, Logger: env.Logger, Isolation: []runner.Feature{runner.HideProcess()}, RequireIsolation: required})
}
