// Package intake turns what somebody asks for into what the engine starts: it finds the plan,
// fills in defaults, checks the input and reads or makes the entity's row. Requests of the
// API and rows that a client inserted by SQL take this one way.
package intake

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/pkg/telemetry"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/registry"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// MaxViolations bounds how many problems one error lists.
const MaxViolations = 100

// Rows reads entities.
type Rows interface {
	EntityRow(ctx context.Context, e *spec.Entity, id string) (map[string]any, error)
}

// Intake prepares runs.
type Intake struct {
	Registry *registry.Registry
	Rows     Rows
}

// Request is what somebody asks for: a workflow, or an entity's action.
type Request struct {
	// Workflow is YAML; empty for an action.
	Workflow string
	Entity   string
	Action   string
	EntityID string
	Input    map[string]any

	IdempotencyKey string
	// Traceparent is the span that the run belongs to; empty for none.
	Traceparent string
	// Phases measure where the run's time goes; nil for none.
	Phases        *telemetry.Phases
	CorrelationID string
	TenantID      string
	Subject       string
}

// NotFoundError says that there is no such entity, action or row.
type NotFoundError struct {
	// Kind is what was looked for, such as entity or action.
	Kind string
	Name string
	Mend string
}

// Error implements error.
func (e *NotFoundError) Error() string {
	msg := fmt.Sprintf("there is no %s %.255q", e.Kind, e.Name)
	if e.Mend != "" {
		msg += "; " + e.Mend
	}
	return msg
}

// Prepare makes a start of a request. What is wrong with it is a *fault.Error with a violation
// for each mistake, or a *NotFoundError. The workflow of the request is kept, so that its
// runs survive this process.
func (in *Intake) Prepare(ctx context.Context, req *Request) (*engine.StartRequest, error) {
	start := &engine.StartRequest{
		Action: req.Action, EntityID: req.EntityID, IdempotencyKey: req.IdempotencyKey, Traceparent: req.Traceparent, Phases: req.Phases,
		CorrelationID: req.CorrelationID, TenantID: req.TenantID, Subject: req.Subject,
	}
	workflow, err := in.choose(req, start)
	if err != nil {
		return nil, err
	}
	if err := fillInput(req, start); err != nil {
		return nil, err
	}
	if err := in.entityRow(ctx, start); err != nil {
		return nil, err
	}
	if workflow != nil {
		if err := in.Registry.Keep(ctx, workflow); err != nil {
			return nil, err
		}
	}
	return start, nil
}

// choose finds the plan.
func (in *Intake) choose(req *Request, start *engine.StartRequest) (*registry.Workflow, error) {
	if req.Workflow != "" {
		w, problems, err := in.Registry.Workflow(req.Workflow)
		if err != nil {
			return nil, err
		}
		if w == nil {
			return nil, problemError("workflow", problems)
		}
		start.Plan, start.Snapshot, start.Action = w.Plan, w.Digest, w.Plan.Action.Name
		return w, nil
	}
	s := in.Registry.Current()
	e := s.Entity(req.Entity)
	if e == nil {
		names := make([]string, 0, len(s.Entities))
		for _, e := range s.Entities {
			names = append(names, e.Name)
		}
		return nil, &NotFoundError{Kind: "entity", Name: req.Entity, Mend: candidates(req.Entity, "entities", names)}
	}
	start.Plan, start.Snapshot = s.Plan(e.Name, req.Action), s.Digest
	if start.Plan == nil {
		return nil, &NotFoundError{Kind: "action", Name: req.Action, Mend: candidates(req.Action, "actions of "+e.Name, e.ActionNames())}
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
	var v Violations
	for _, p := range problems {
		if !p.Warning && len(v) < MaxViolations {
			v.Add(field, "%s", p.String())
		}
	}
	if len(v) == 0 {
		v.Add(field, "is not valid")
	}
	return v.Err()
}

// fillInput fills in the defaults and checks what is given.
func fillInput(req *Request, start *engine.StartRequest) error {
	input := req.Input
	if input == nil {
		input = map[string]any{}
	}
	schema := start.Plan.Action.Input
	var v Violations
	if schema != nil {
		input = schema.ApplyDefaults(input)
		for _, bad := range schema.Validate(input) {
			field := "input"
			if bad.Path != "" {
				field += "." + bad.Path
			}
			v.Add(field, "%s", bad.Message)
		}
	}
	if err := v.Err(); err != nil {
		return err
	}
	for _, p := range start.Plan.CheckInput(input) {
		v.Add("input", "%s", p.String())
	}
	v.Value("input", input)
	start.Input = input
	return v.Err()
}

// entityRow reads the entity's row, or makes a new one where the action uses its entity and
// none is named.
func (in *Intake) entityRow(ctx context.Context, start *engine.StartRequest) error {
	e := start.Plan.Entity
	switch {
	case e == nil:
		return nil
	case start.EntityID != "":
		row, err := in.Rows.EntityRow(ctx, e, start.EntityID)
		if errors.Is(err, store.ErrNotFound) {
			return &NotFoundError{Kind: e.Name, Name: start.EntityID, Mend: "without an id a new one is made"}
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
			var v Violations
			for _, b := range bad.Violations {
				v.Add("input."+b.Path, "%s; a new %s is made of the input, as no entity_id is given", b.Message, e.Name)
			}
			return v.Err()
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

// PrepareRun implements engine.Intake: a start of a run that a client inserted by SQL.
func (in *Intake) PrepareRun(ctx context.Context, r *store.Run) (*engine.StartRequest, error) {
	input, err := object(r.Input)
	if err != nil {
		return nil, fault.New(fault.Validation, "input_data %v", err)
	}
	return in.sql(in.Prepare(ctx, &Request{
		Entity: r.Entity, Action: r.Action, EntityID: r.EntityID, Input: input, IdempotencyKey: r.IdempotencyKey,
		CorrelationID: r.CorrelationID, TenantID: r.TenantID, Subject: r.Subject,
	}))
}

// PrepareJob implements engine.Intake: a start of a run of one call, for a job that a client
// inserted by SQL.
func (in *Intake) PrepareJob(ctx context.Context, j *store.Job) (*engine.StartRequest, error) {
	input, err := object(j.Input)
	if err != nil {
		return nil, fault.New(fault.Validation, "input_data %v", err)
	}
	reg := in.Registry.Current().Registry
	said := j.ExecutionType
	if s := reg.Service(j.Service); s != nil {
		j.ExecutionType = s.ExecutionType
	}
	if problem := find(reg, j.Service, j.Operation); problem != nil {
		return nil, problem
	}
	start, err := in.sql(in.Prepare(ctx, &Request{
		Workflow: singleCall(j.Service, j.Operation), Input: input,
		CorrelationID: j.CorrelationID, TenantID: j.TenantID, Subject: j.TriggeredBy,
	}))
	if err != nil {
		return nil, err
	}
	call := start.Plan.Calls()[0]
	// 'http' is what the column says where the client says nothing.
	if said != "" && said != "http" && said != call.Service.ExecutionType {
		return nil, fault.New(fault.Validation, "execution_type is %q, but service %s is of type %s; leave the column out", said, j.Service, call.Service.ExecutionType)
	}
	start.Action, start.Adopt = call.Service.Name+"."+call.Operation.Name, j
	return start, nil
}

// PrepareCall makes a start of a run of one call, that the mesh itself asks for.
func (in *Intake) PrepareCall(ctx context.Context, service, operation string, input map[string]any, key, subject string) (*engine.StartRequest, error) {
	if problem := find(in.Registry.Current().Registry, service, operation); problem != nil {
		return nil, problem
	}
	start, err := in.sql(in.Prepare(ctx, &Request{Workflow: singleCall(service, operation), Input: input, IdempotencyKey: key, Subject: subject}))
	if err != nil {
		return nil, err
	}
	call := start.Plan.Calls()[0]
	start.Action = call.Service.Name + "." + call.Operation.Name
	return start, nil
}

// find says what is wrong with the names of a service and its operation; nil for nothing.
func find(reg *spec.Registry, service, operation string) *fault.Error {
	s := reg.Service(service)
	if s == nil {
		return fault.New(fault.Validation, "there is no service %.255q; %s", service, candidates(service, "services", reg.ServiceNames()))
	}
	if s.Operation(operation) == nil {
		return fault.New(fault.Validation, "service %s has no operation %.255q; %s", s.Name, operation, candidates(operation, "operations", s.OperationNames()))
	}
	return nil
}

// singleCall is the workflow of one call. Names become JSON strings, which are YAML too.
func singleCall(service, operation string) string {
	return fmt.Sprintf("actions: [{call_service: {service: %s, operation: %s, input: \"$input\"}}]\n", quoted(service), quoted(operation))
}

func quoted(s string) string {
	b, err := json.Marshal(s)
	if err != nil {
		return `""`
	}
	return string(b)
}

// sql words the errors for somebody who reads them in a row: there is no status code there.
func (*Intake) sql(start *engine.StartRequest, err error) (*engine.StartRequest, error) {
	if missing, ok := errors.AsType[*NotFoundError](err); ok {
		return nil, fault.Wrap(err, fault.Validation, "%s", missing.Error())
	}
	return start, err
}

func object(raw json.RawMessage) (map[string]any, error) {
	if len(raw) == 0 || string(raw) == "null" {
		return map[string]any{}, nil
	}
	var v any
	if err := json.Unmarshal(raw, &v); err != nil {
		return nil, fmt.Errorf("is not JSON: %w", err)
	}
	o, ok := v.(map[string]any)
	if !ok {
		return nil, errors.New("has to be a JSON object")
	}
	return o, nil
}
