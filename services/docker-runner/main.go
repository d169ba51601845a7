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
	fs.StringSlice("require-isolation", nil, "ways of holding a job without which the runner does not start, as 'specql runners' names them; all for every one")
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
	required, err := env.Flags.GetStringSlice("require-isolation")
	if err != nil {
		return nil, fmt.Errorf("--require-isolation: %w", err)
	}
	o := dockerrunner.Options{
		Host: host, StateDir: state, Logger: env.Logger, DeniedPaths: own(env.Flags),
		Isolation: []runner.Feature{runner.HideProcess()}, RequireIsolation: required,
	}
	if env.PolicyJSON != nil {
		ceiling, err := runner.Decode[dockerrunner.Policy](env.PolicyJSON)
		if err != nil {
			return nil, fmt.Errorf("--policy: %w", err)
		}
		o.Ceiling = &ceiling
	}
	return dockerrunner.New(o)
}

// own are the files of this program: its keys, its policy and itself. No container gets them.
func own(fs *pflag.FlagSet) []string {
	var files []string
	for _, flag := range []string{"tls-cert", "tls-key", "tls-ca", "policy"} {
		if f := fs.Lookup(flag); f != nil {
			files = append(files, f.Value.String())
		}
	}
	if self, err := os.Executable(); err == nil {
		files = append(files, self)
	}
	return files
}
