package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"

	"github.com/google/uuid"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/mesh"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/registry"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// ExecuteAction implements OrchestratorService.
func (o *Orchestrator) ExecuteAction(ctx context.Context, req *specqlv1.ExecuteActionRequest) (*specqlv1.ExecuteActionResponse, error) {
	if err := checkExecuteAction(req); err != nil {
		return nil, err
	}
	if key := req.GetIdempotencyKey(); key != "" {
		// What the first request asked for may not be valid any more; its run is there.
		run, err := o.Store.RunByKey(ctx, "", key)
		if err == nil {
			return o.answer(ctx, req, run)
		}
		if !errors.Is(err, store.ErrNotFound) {
			return nil, err
		}
	}
	start := &engine.StartRequest{
		Action: req.GetAction(), EntityID: req.GetEntityId(), IdempotencyKey: req.GetIdempotencyKey(),
		CorrelationID: req.GetCorrelationId(), Subject: subject(ctx),
	}
	workflow, err := o.choose(req, start)
	if err != nil {
		return nil, err
	}
	if err := fillInput(req, start); err != nil {
		return nil, err
	}
	if err := o.entityRow(ctx, start); err != nil {
		return nil, err
	}
	if workflow != nil {
		if err := o.Registry.Keep(ctx, workflow); err != nil {
			return nil, err
		}
	}
	run, err := o.Engine.Start(ctx, start)
	if dup, ok := errors.AsType[*store.DuplicateError](err); ok {
		if run, err = o.Store.Run(ctx, dup.RunID); err != nil {
			return nil, runError(err, dup.RunID, "")
		}
	}
	if err != nil {
		if _, known := fault.As(err); known || ctx.Err() != nil {
			return nil, err
		}
		return nil, fault.Wrap(err, fault.Unavailable, "the run could not be made durable; ask again with the same idempotency key")
	}
	return o.answer(ctx, req, run)
}

// answer gives the run as it is, or once it has ended.
func (o *Orchestrator) answer(ctx context.Context, req *specqlv1.ExecuteActionRequest, run *store.Run) (*specqlv1.ExecuteActionResponse, error) {
	if req.GetWait() == nil {
		return &specqlv1.ExecuteActionResponse{Run: runProto(run)}, nil
	}
	wctx, cancel := context.WithTimeout(ctx, req.GetWait().AsDuration())
	defer cancel()
	if err := o.Engine.Wait(wctx, run.ID); err != nil && wctx.Err() == nil {
		return nil, runError(err, run.ID, "")
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	out, err := o.get(ctx, run.ID)
	if err != nil {
		return nil, err
	}
	return &specqlv1.ExecuteActionResponse{Run: out}, nil
}

func checkExecuteAction(req *specqlv1.ExecuteActionRequest) error {
	var v violations
	v.name("entity", req.GetEntity())
	v.name("action", req.GetAction())
	v.name("entity_id", req.GetEntityId())
	v.name("idempotency_key", req.GetIdempotencyKey())
	v.name("correlation_id", req.GetCorrelationId())
	switch {
	case req.GetWorkflow() != "" && (req.GetEntity() != "" || req.GetAction() != "" || req.GetEntityId() != ""):
		v.add("workflow", "cannot be given together with entity, action or entity_id")
	case len(req.GetWorkflow()) > maxWorkflow:
		v.add("workflow", "has %d bytes; at most %d are taken", len(req.GetWorkflow()), maxWorkflow)
	case req.GetWorkflow() == "" && req.GetEntity() == "" && req.GetAction() == "":
		v.add("entity", "is missing: give entity and action, or workflow")
	case req.GetWorkflow() == "" && req.GetEntity() == "":
		v.add("entity", "is missing")
	case req.GetWorkflow() == "" && req.GetAction() == "":
		v.add("action", "is missing")
	}
	if w := req.GetWait(); w != nil {
		if err := w.CheckValid(); err != nil || w.AsDuration() < 0 || w.AsDuration() > maxWait {
			v.add("wait", "has to be between 0 and %s", maxWait)
		}
	}
	return v.err()
}

// choose finds the plan.
func (o *Orchestrator) choose(req *specqlv1.ExecuteActionRequest, start *engine.StartRequest) (*registry.Workflow, error) {
	if req.GetWorkflow() != "" {
		w, problems, err := o.Registry.Workflow(req.GetWorkflow())
		if err != nil {
			return nil, err
		}
		if w == nil {
			return nil, problemError("workflow", problems)
		}
		start.Plan, start.Snapshot, start.Action = w.Plan, w.Digest, w.Plan.Action.Name
		return w, nil
	}
	s := o.Registry.Current()
	e := s.Entity(req.GetEntity())
	if e == nil {
		names := make([]string, 0, len(s.Entities))
		for _, e := range s.Entities {
			names = append(names, e.Name)
		}
		return nil, notFound("entity", req.GetEntity(), candidates(req.GetEntity(), "entities", names))
	}
	start.Plan, start.Snapshot = s.Plan(e.Name, req.GetAction()), s.Digest
	if start.Plan == nil {
		return nil, notFound("action", req.GetAction(), candidates(req.GetAction(), "actions of "+e.Name, e.ActionNames()))
	}
	return nil, nil
}

func candidates(name, what string, names []string) string {
	if len(names) == 0 {
		return "there are no " + what
	}
	all := what + " there are: " + strings.Join(names, ", ")
	if guess := spec.DidYouMean(name, names); guess != "" {
		return "did you mean " + guess + "? " + all
	}
	return all
}

func problemError(field string, problems spec.Problems) error {
	var v violations
	for _, p := range problems {
		if !p.Warning && len(v) < maxViolations {
			v.add(field, "%s", p.String())
		}
	}
	if len(v) == 0 {
		v.add(field, "is not valid")
	}
	return v.err()
}

// fillInput fills in the defaults and checks what is given.
func fillInput(req *specqlv1.ExecuteActionRequest, start *engine.StartRequest) error {
	input := req.GetInput().AsMap()
	if input == nil {
		input = map[string]any{}
	}
	schema := start.Plan.Action.Input
	var v violations
	if schema != nil {
		input = schema.ApplyDefaults(input)
		for _, bad := range schema.Validate(input) {
			field := "input"
			if bad.Path != "" {
				field += "." + bad.Path
			}
			v.add(field, "%s", bad.Message)
		}
	}
	if err := v.err(); err != nil {
		return err
	}
	for _, p := range start.Plan.CheckInput(input) {
		v.add("input", "%s", p.String())
	}
	start.Input = input
	return v.err()
}

// entityRow reads the entity's row, or makes a new one where the action uses its entity and
// none is named.
func (o *Orchestrator) entityRow(ctx context.Context, start *engine.StartRequest) error {
	e := start.Plan.Entity
	switch {
	case e == nil:
		return nil
	case start.EntityID != "":
		row, err := o.Store.EntityRow(ctx, e, start.EntityID)
		if errors.Is(err, store.ErrNotFound) {
			return notFound(e.Name, start.EntityID, "without an id a new one is made")
		}
		if err != nil {
			return fmt.Errorf("read %s %s: %w", e.Name, start.EntityID, err)
		}
		start.Row = row
		return nil
	case !start.Plan.UsesEntity:
		return nil
	}
	row, err := e.NewRow(start.Input, uuid.NewString)
	if err != nil {
		if bad, ok := errors.AsType[*spec.RowError](err); ok {
			var v violations
			for _, b := range bad.Violations {
				v.add("input."+b.Path, "%s; a new %s is made of the input, as no entity_id is given", b.Message, e.Name)
			}
			return v.err()
		}
		return err
	}
	if row[e.PrimaryKey().Name] == nil {
		row[e.PrimaryKey().Name] = rand.Int64N(1 << 53) //nolint:gosec // an id is no secret
	}
	start.Row, start.Insert, start.EntityID = row, true, key(row[e.PrimaryKey().Name])
	return nil
}

// key writes a primary key as text.
func key(v any) string {
	switch v := v.(type) {
	case string:
		return v
	case float64:
		return strconv.FormatFloat(v, 'f', -1, 64)
	}
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Sprint(v)
	}
	return string(b)
}

// subject is who asks: the role of the certificate, where there is one.
func subject(ctx context.Context) string {
	if role := mesh.PeerRole(ctx); role != "" {
		return role
	}
	return "anonymous"
}
