package server

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/mesh"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/internal/dispatch"
	"github.com/specql/mesh/services/orchestrator/internal/registry"
)

// ValidateInput is what ValidateFiles checks.
type ValidateInput struct {
	Registry  spec.File
	Entities  []spec.File
	Env       string
	Strict    bool
	LookupEnv func(string) (string, bool)
	// Runners check the services of their execution types.
	Runners []runner.JobRunner
	// RunnerAddresses are runner services, by execution type, that check theirs.
	RunnerAddresses   map[string]string
	RunnerCredentials *mesh.Credentials
}

// ValidateFiles checks a registry and entities as ApplyRegistry would, without a server.
// The problems are sorted by file, line and column. An error means that a runner could not
// be asked.
func ValidateFiles(ctx context.Context, in ValidateInput) (spec.Problems, error) {
	runners := &localRunners{byType: map[string]runner.JobRunner{}}
	for _, jr := range in.Runners {
		d, err := jr.Describe(ctx)
		if err != nil {
			return nil, fmt.Errorf("describe a runner: %w", err)
		}
		for _, t := range d.Types {
			runners.byType[t.Name] = jr
		}
	}
	if len(in.RunnerAddresses) > 0 {
		remote, err := dispatch.New(dispatch.Options{
			Runners: in.RunnerAddresses, Credentials: in.RunnerCredentials, Logger: slog.New(slog.DiscardHandler),
		})
		if err != nil {
			return nil, err
		}
		defer remote.Close()
		runners.remote = remote
	}
	_, problems, err := registry.Build(ctx, registry.FromFiles(in.Registry, in.Entities, in.Env), registry.BuildOptions{
		LookupEnv: in.LookupEnv, Strict: in.Strict, Runners: runners,
	})
	return problems, err
}

// localRunners asks runners in this process, and others at their addresses.
type localRunners struct {
	byType map[string]runner.JobRunner
	remote *dispatch.Dispatcher
}

// ExecutionTypes implements registry.Runners.
func (l *localRunners) ExecutionTypes() []string {
	var out []string
	for t := range l.byType {
		out = append(out, t)
	}
	if l.remote != nil {
		out = append(out, l.remote.ExecutionTypes()...)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// Validate implements registry.Runners. An address goes before a runner in this process.
func (l *localRunners) Validate(ctx context.Context, req *runnerv1.ValidateRequest) ([]*runnerv1.Problem, error) {
	t := req.GetService().GetExecutionType()
	if l.remote != nil && l.remote.Address(t) != "" {
		return l.remote.Validate(ctx, req)
	}
	svc := &runner.Service{
		Name: req.GetService().GetName(), ExecutionType: t,
		Config: json.RawMessage(req.GetService().GetRunnerConfig()), Policy: json.RawMessage(req.GetService().GetSecurityPolicy()),
	}
	for _, op := range req.GetOperations() {
		svc.Operations = append(svc.Operations, runner.Operation{Name: op.GetName(), Config: json.RawMessage(op.GetConfig())})
	}
	problems, err := l.byType[t].Validate(ctx, svc)
	if err != nil {
		return nil, err
	}
	out := make([]*runnerv1.Problem, 0, len(problems))
	for _, p := range problems {
		out = append(out, &runnerv1.Problem{Path: p.Path, Message: p.Message, Mend: p.Mend, Warning: p.Warning})
	}
	return out, nil
}
