// Package api answers the gRPC services of the orchestrator: one file an RPC, protos on one
// side and the engine, the store and the registry on the other. No SQL and no runner stubs.
package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/internal/auth"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/intake"
	"github.com/specql/mesh/services/orchestrator/internal/registry"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// Bounds of requests.
const (
	maxName     = 255
	maxWorkflow = 1 << 20
	maxWait     = time.Hour
	maxDocument = spec.MaxFileBytes
	maxEntities = 1000
	// maxAnswer is how many bytes the jobs of one run's answer have before something is left out of them; its own input and output come on
	// top. Jobs that have fewer than unmeasured bytes in the store, all together, are below it: a message is at most six times as long.
	maxAnswer  = 12 << 20
	unmeasured = 1 << 20
	// leastStored is what a job has besides what it says, and leastMessage what is left of its error's message in an answer that is full.
	leastStored  = 512
	leastMessage = 100
)

// Store is what the API reads.
type Store interface {
	Run(ctx context.Context, id string) (*store.Run, error)
	RunByKey(ctx context.Context, tenantID, key string) (*store.Run, error)
	Jobs(ctx context.Context, runID string, after int64) ([]*store.Job, error)
	Runs(ctx context.Context, f store.RunFilter) ([]*store.Run, error)
}

// Runners are asked by ListRunners.
type Runners interface {
	ExecutionTypes() []string
	Address(executionType string) string
	Describe(ctx context.Context, executionType string) (*runnerv1.DescribeResponse, error)
}

// Orchestrator answers OrchestratorService.
type Orchestrator struct {
	specqlv1.UnimplementedOrchestratorServiceServer
	Engine   *engine.Engine
	Store    Store
	Registry *registry.Registry
	Intake   *intake.Intake
	Logger   *slog.Logger

	keys recentKeys
}

// Registry answers RegistryService.
type Registry struct {
	specqlv1.UnimplementedRegistryServiceServer
	Registry *registry.Registry
	Runners  Runners
	Types    ExecutionTypes
	// Refresh brings into force what was set.
	Refresh func(ctx context.Context) error
	Logger  *slog.Logger
}

// ExecutionTypes are those that were disabled or enabled.
type ExecutionTypes interface {
	SetExecutionTypes(ctx context.Context, disable, enable []string) error
	ExecutionTypes(ctx context.Context) (map[string]store.ExecutionType, error)
}

func name(v *intake.Violations, field, value string) {
	if len(value) > maxName {
		v.Add(field, "has %d bytes; at most %d are taken", len(value), maxName)
	}
	v.Text(field, value)
}

func notFound(kind, name, mend string) error {
	msg := fmt.Sprintf("there is no %s %q", kind, name)
	if mend != "" {
		msg += "; " + mend
	}
	st, err := status.New(codes.NotFound, msg).WithDetails(&errdetails.ResourceInfo{ResourceType: kind, ResourceName: name})
	if err != nil {
		return status.Error(codes.NotFound, msg)
	}
	return st.Err()
}

// runError says what a store's error about a run means to the caller.
func runError(err error, id, state string) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, store.ErrNotFound):
		return notFound("run", id, "`specql runs list` shows those there are")
	case errors.Is(err, store.ErrState):
		return status.Error(codes.FailedPrecondition, state)
	case errors.Is(err, store.ErrFull):
		return status.Error(codes.ResourceExhausted, "as many signals wait for the run as are kept: "+strconv.Itoa(store.MaxSignals)+", or 8 MiB of them; none is taken until a step has taken some")
	case errors.Is(err, store.ErrClosed):
		return fault.New(fault.Unavailable, "the orchestrator is shutting down")
	}
	return err
}

// run reads a run that the caller sees. One of another tenant is not there.
func (o *Orchestrator) run(ctx context.Context, id string) (*store.Run, error) {
	run, err := o.Store.Run(ctx, id)
	if err == nil && !auth.From(ctx).Sees(run.TenantID) {
		err = store.ErrNotFound
	}
	return run, runError(err, id, "")
}

// visible fails where the caller does not see a run. It costs nothing for who sees all.
func (o *Orchestrator) visible(ctx context.Context, id string) error {
	if auth.From(ctx).Tenants() == nil {
		return nil
	}
	_, err := o.run(ctx, id)
	return err
}

// get reads a run with its jobs.
func (o *Orchestrator) get(ctx context.Context, id string) (*specqlv1.Run, error) {
	run, err := o.run(ctx, id)
	if err != nil {
		return nil, err
	}
	jobs, err := o.Store.Jobs(ctx, id, 0)
	if err != nil {
		return nil, fmt.Errorf("read the jobs of run %s: %w", id, err)
	}
	out := fullProto(run, jobs)
	waiting, err := o.Engine.Waiting(ctx, run)
	if err != nil {
		return nil, fmt.Errorf("read the steps of run %s: %w", id, err)
	}
	for _, s := range waiting {
		out.Waiting = append(out.Waiting, stepProto(s))
	}
	return out, nil
}

// clip is the beginning of a message.
func clip(message string) string {
	if len(message) <= leastMessage {
		return message
	}
	return strings.ToValidUTF8(message[:leastMessage], "") + "…"
}

// fullProto is a run with its jobs.
func fullProto(run *store.Run, jobs []*store.Job) *specqlv1.Run {
	out := runProto(run)
	stored, budget := 0, maxAnswer
	for _, j := range jobs {
		stored += leastStored + len(j.Input) + len(j.Output) + len(j.ResourceUsage) + len(j.SecurityContext)
		if j.Err != nil {
			stored += len(j.Err.Message)
		}
	}
	for _, j := range jobs {
		p := jobProto(j)
		if stored > unmeasured {
			size := proto.Size(p)
			if size > budget {
				// Watchers get each by itself.
				p.Input, p.Output, p.PayloadsOmitted = nil, nil, true
				size = proto.Size(p)
			}
			if size > budget {
				p.ResourceUsage, p.SecurityContext, p.IdempotencyKey = nil, nil, ""
				if p.GetError() != nil {
					p.Error.Message = clip(p.GetError().GetMessage())
				}
				size = proto.Size(p)
			}
			budget = max(0, budget-size)
		}
		out.Jobs = append(out.Jobs, p)
	}
	return out
}
