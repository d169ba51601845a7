package api

import (
	"context"
	"errors"
	"sync"
	"time"

	"go.opentelemetry.io/otel/trace"
	"google.golang.org/protobuf/types/known/durationpb"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/telemetry"
	"github.com/specql/mesh/services/orchestrator/internal/auth"
	"github.com/specql/mesh/services/orchestrator/internal/intake"
	"github.com/specql/mesh/services/orchestrator/internal/plan"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// ExecuteAction implements OrchestratorService.
func (o *Orchestrator) ExecuteAction(ctx context.Context, req *specqlv1.ExecuteActionRequest) (*specqlv1.ExecuteActionResponse, error) {
	var phases *telemetry.Phases
	if req.GetProfile() {
		phases = telemetry.NewPhases(phaseOrchestrator)
	}
	if err := checkExecuteAction(req); err != nil {
		return nil, err
	}
	caller := auth.From(ctx)
	tenant, err := caller.Tenant()
	if err != nil {
		return nil, err
	}
	if run, err := o.known(ctx, tenant, req.GetIdempotencyKey()); err != nil || run != nil {
		if err != nil {
			return nil, err
		}
		return o.answer(ctx, req, run)
	}
	start, err := o.Intake.Prepare(ctx, &intake.Request{
		Workflow: req.GetWorkflow(), Entity: req.GetEntity(), Action: req.GetAction(), EntityID: req.GetEntityId(), Input: req.GetInput().AsMap(),
		IdempotencyKey: req.GetIdempotencyKey(), CorrelationID: req.GetCorrelationId(), TenantID: tenant, Subject: caller.Subject,
		Traceparent: telemetry.Traceparent(trace.SpanContextFromContext(ctx)), Phases: phases,
	})
	if err != nil {
		// What the first request with the key asked for may not be valid any more; its run is there.
		if run, failed := o.first(ctx, tenant, req.GetIdempotencyKey()); failed != nil || run != nil {
			if failed != nil {
				return nil, failed
			}
			return o.answer(ctx, req, run)
		}
		if missing, ok := errors.AsType[*intake.NotFoundError](err); ok {
			return nil, notFound(missing.Kind, missing.Name, missing.Mend)
		}
		return nil, err
	}
	if phases != nil && !oneCall(start.Plan) {
		var v intake.Violations
		v.Add("profile", "is for a workflow of one call, such as specql profile makes")
		return nil, v.Err()
	}
	run, err := o.Engine.Start(ctx, start)
	if dup, ok := errors.AsType[*store.DuplicateError](err); ok {
		if run, err = o.Store.Run(ctx, dup.RunID); err != nil {
			return nil, runError(err, dup.RunID, "")
		}
		phases = nil // they are not that run's
	}
	if err != nil {
		if _, known := fault.As(err); known || ctx.Err() != nil {
			return nil, err
		}
		return nil, fault.Wrap(err, fault.Unavailable, "the run could not be made durable; ask again with the same idempotency key")
	}
	o.keys.add(tenant, req.GetIdempotencyKey(), run.ID)
	if phases == nil {
		return o.answer(ctx, req, run)
	}
	waited := run.Status == store.Pending // for a place: its walk knows nothing of the phases
	resp, err := o.answer(telemetry.WithPhases(ctx, phases), req, run)
	if err == nil && !waited && resp.GetRun().GetCompletedAt() != nil {
		resp.Profile = profile(phases)
	}
	return resp, err
}

// phaseOrchestrator is the time of the orchestrator that no other phase has.
const phaseOrchestrator = "orchestrator"

// oneCall says whether a plan is a single call.
func oneCall(p *plan.Plan) bool {
	if len(p.Nodes) != 1 {
		return false
	}
	c, ok := p.Nodes[0].(*plan.Call)
	return ok && len(c.OnSuccess)+len(c.OnFailure) == 0
}

func profile(p *telemetry.Phases) *specqlv1.Profile {
	out := &specqlv1.Profile{}
	var total time.Duration
	for _, phase := range p.End() {
		total += phase.Took
		out.Phases = append(out.Phases, &specqlv1.ProfilePhase{Name: phase.Name, Duration: durationpb.New(phase.Took)})
	}
	out.Total = durationpb.New(total)
	return out
}

// known finds a run that was started with a key a short time ago; nil where it is not known here. The database
// knows every key, and refuses the second run: that spares a question before each start. But a record that it refuses costs those
// that are written with it time, so that who repeats a start often is answered from memory.
func (o *Orchestrator) known(ctx context.Context, tenant, key string) (*store.Run, error) {
	id := o.keys.get(tenant, key)
	if id == "" {
		return nil, nil
	}
	run, err := o.Store.Run(ctx, id)
	if errors.Is(err, store.ErrNotFound) { // it was deleted since
		return nil, nil
	}
	return run, err
}

// first finds the run that was started with a key; nil for none.
func (o *Orchestrator) first(ctx context.Context, tenant, key string) (*store.Run, error) {
	if key == "" {
		return nil, nil
	}
	run, err := o.Store.RunByKey(ctx, tenant, key)
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil
	}
	return run, err
}

// mostKeys is how many keys one generation of [recentKeys] holds: a few megabytes.
const mostKeys = 10_000

// tenantKey is an idempotency key: each tenant has its own.
type tenantKey struct{ tenant, key string }

// recentKeys remembers the runs of the idempotency keys that were used last. The zero value is empty.
type recentKeys struct {
	mu sync.Mutex
	// young is filled until it takes the place of old.
	young, old map[tenantKey]string
}

func (k *recentKeys) get(tenant, key string) (runID string) {
	if key == "" {
		return ""
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if id, ok := k.young[tenantKey{tenant, key}]; ok {
		return id
	}
	return k.old[tenantKey{tenant, key}]
}

func (k *recentKeys) add(tenant, key, runID string) {
	if key == "" {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.young) >= mostKeys {
		k.young, k.old = nil, k.young
	}
	if k.young == nil {
		k.young = map[tenantKey]string{}
	}
	k.young[tenantKey{tenant, key}] = runID
}

// answer gives the run as it is, or once it has ended.
func (o *Orchestrator) answer(ctx context.Context, req *specqlv1.ExecuteActionRequest, run *store.Run) (*specqlv1.ExecuteActionResponse, error) {
	if req.GetWait() == nil {
		return &specqlv1.ExecuteActionResponse{Run: runProto(run)}, nil
	}
	wctx, cancel := context.WithTimeout(ctx, req.GetWait().AsDuration())
	defer cancel()
	// A run that ends here is known without asking the database.
	if ended, jobs := o.Engine.Await(wctx, run.ID); ended != nil {
		telemetry.PhasesOf(ctx).EnterLast("answer")
		return &specqlv1.ExecuteActionResponse{Run: fullProto(ended, jobs)}, nil
	}
	if err := o.Engine.Wait(wctx, run.ID); err != nil && wctx.Err() == nil {
		return nil, runError(err, run.ID, "")
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	telemetry.PhasesOf(ctx).EnterLast("answer")
	out, err := o.get(ctx, run.ID)
	if err != nil {
		return nil, err
	}
	return &specqlv1.ExecuteActionResponse{Run: out}, nil
}

func checkExecuteAction(req *specqlv1.ExecuteActionRequest) error {
	var v intake.Violations
	name(&v, "entity", req.GetEntity())
	name(&v, "action", req.GetAction())
	name(&v, "entity_id", req.GetEntityId())
	name(&v, "idempotency_key", req.GetIdempotencyKey())
	name(&v, "correlation_id", req.GetCorrelationId())
	switch {
	case req.GetWorkflow() != "" && (req.GetEntity() != "" || req.GetAction() != "" || req.GetEntityId() != ""):
		v.Add("workflow", "cannot be given together with entity, action or entity_id")
	case len(req.GetWorkflow()) > maxWorkflow:
		v.Add("workflow", "has %d bytes; at most %d are taken", len(req.GetWorkflow()), maxWorkflow)
	case req.GetWorkflow() == "" && req.GetEntity() == "" && req.GetAction() == "":
		v.Add("entity", "is missing: give entity and action, or workflow")
	case req.GetWorkflow() == "" && req.GetEntity() == "":
		v.Add("entity", "is missing")
	case req.GetWorkflow() == "" && req.GetAction() == "":
		v.Add("action", "is missing")
	}
	if req.GetProfile() && req.GetWait() == nil {
		v.Add("profile", "needs wait: it is part of the answer once the run has ended")
	}
	if w := req.GetWait(); w != nil {
		if err := w.CheckValid(); err != nil || w.AsDuration() < 0 || w.AsDuration() > maxWait {
			v.Add("wait", "has to be between 0 and %s", maxWait)
		}
	}
	return v.Err()
}
