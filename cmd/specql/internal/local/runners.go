package local

import (
	"errors"
	"fmt"
	"log/slog"

	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/services/docker-runner/dockerrunner"
	"github.com/specql/mesh/services/http-runner/httprunner"
	"github.com/specql/mesh/services/serverless-runner/serverlessrunner"
	"github.com/specql/mesh/services/shell-runner/shellrunner"
)

// Runner is a runner of this process.
type Runner struct {
	// Type is the execution type, Role the name in the certificate.
	Type, Role string
	runner.JobRunner
	close func()
}

// Close frees what the runner holds.
func (r Runner) Close() { r.close() }

// builtIn makes the four runners. No container gets to see the denied paths.
func builtIn(logger *slog.Logger, denied ...string) (all []Runner, err error) {
	defer func() {
		if err != nil {
			closeAll(all)
		}
	}()
	add := func(kind string, jr runner.JobRunner, err error) error {
		if err != nil {
			return fmt.Errorf("%s runner: %w", kind, err)
		}
		end := func() {}
		switch c := jr.(type) {
		case interface{ Close() error }:
			end = func() { _ = c.Close() }
		case interface{ Close() }:
			end = c.Close
		}
		all = append(all, Runner{Type: kind, Role: kind + "-runner", JobRunner: jr, close: end})
		return nil
	}
	http, httpErr := httprunner.New(httprunner.Options{Logger: logger})
	shell, shellErr := shellrunner.New(shellrunner.Options{Logger: logger})
	docker, dockerErr := dockerrunner.New(dockerrunner.Options{Logger: logger, DeniedPaths: denied})
	serverless, serverlessErr := serverlessrunner.New(serverlessrunner.Options{Logger: logger})
	return all, errors.Join(
		add("http", http, httpErr), add("shell", shell, shellErr),
		add("docker", docker, dockerErr), add("serverless", serverless, serverlessErr),
	)
}

func closeAll(all []Runner) {
	for _, r := range all {
		r.Close()
	}
}

// BuiltIn makes the four runners for checking registries. The function frees them.
func BuiltIn(logger *slog.Logger) ([]runner.JobRunner, func(), error) {
	all, err := builtIn(logger)
	if err != nil {
		return nil, nil, err
	}
	out := make([]runner.JobRunner, 0, len(all))
	for _, r := range all {
		out = append(out, r.JobRunner)
	}
	return out, func() { closeAll(all) }, nil
}
