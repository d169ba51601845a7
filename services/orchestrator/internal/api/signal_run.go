package api

import (
	"context"

	"google.golang.org/protobuf/encoding/protojson"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/intake"
)

// SignalRun implements OrchestratorService.
func (o *Orchestrator) SignalRun(ctx context.Context, req *specqlv1.SignalRunRequest) (*specqlv1.SignalRunResponse, error) {
	if err := checkID(req.GetId()); err != nil {
		return nil, err
	}
	var v intake.Violations
	if req.GetName() == "" {
		v.Add("name", "is missing")
	}
	name(&v, "name", req.GetName())
	payload := []byte("null")
	if req.GetPayload() != nil {
		var err error
		if payload, err = protojson.Marshal(req.GetPayload()); err != nil {
			v.Add("payload", "is not JSON: %v", err)
		}
	}
	v.Value("payload", req.GetPayload().AsInterface())
	if len(payload) > engine.MaxPayload {
		v.Add("payload", "has %d bytes; at most %d are taken", len(payload), engine.MaxPayload)
	}
	if err := v.Err(); err != nil {
		return nil, err
	}
	if err := o.visible(ctx, req.GetId()); err != nil {
		return nil, err
	}
	if err := o.Engine.Signal(ctx, req.GetId(), req.GetName(), payload); err != nil {
		return nil, runError(err, req.GetId(), "the run has ended already")
	}
	run, err := o.get(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	return &specqlv1.SignalRunResponse{Run: run}, nil
}
