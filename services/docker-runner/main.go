// Command docker-runner carries out calls in containers of a Docker engine.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/pflag"

	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/services/docker-runner/dockerrunner"
)

func main() {
	os.Exit(runner.Main("docker-runner", build, runner.Flags(flags)))
}

func flags(fs *pflag.FlagSet) {
	fs.String("docker-host", "", "address of the Docker engine, such as unix:///var/run/docker.sock; empty: DOCKER_HOST, else the default socket")
	fs.String("state-dir", "", "directory for the output of running jobs; empty: /run/specql-docker, or one of the user's own")
}

func build(_ context.Context, env *runner.Env) (runner.JobRunner, error) {
	host, err := env.Flags.GetString("docker-host")
	if err != nil {
		return nil, fmt.Errorf("flag: %w", err)
	}
	state, err := env.Flags.GetString("state-dir")
	if err != nil {
		return nil, fmt.Errorf("flag: %w", err)
	}
	o := dockerrunner.Options{Host: host, StateDir: state, Logger: env.Logger}
	if env.PolicyJSON != nil {
		ceiling, err := runner.Decode[dockerrunner.Policy](env.PolicyJSON)
		if err != nil {
			return nil, fmt.Errorf("--policy: %w", err)
		}
		o.Ceiling = &ceiling
	}
	return dockerrunner.New(o)
}
