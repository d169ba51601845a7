package api

import (
	"context"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/services/orchestrator/internal/intake"
)

const maxReason = 4096

// CancelRun implements OrchestratorService.
func (o *Orchestrator) CancelRun(ctx context.Context, req *specqlv1.CancelRunRequest) (*specqlv1.CancelRunResponse, error) {
	if err := checkID(req.GetId()); err != nil {
		return nil, err
	}
	var v intake.Violations
	if len(req.GetReason()) > maxReason {
		v.Add("reason", "has %d bytes; at most %d are taken", len(req.GetReason()), maxReason)
	}
	v.Text("reason", req.GetReason())
	if err := v.Err(); err != nil {
		return nil, err
	}
	if err := o.visible(ctx, req.GetId()); err != nil {
		return nil, err
	}
	if err := o.Engine.Cancel(ctx, req.GetId(), req.GetReason()); err != nil {
		return nil, runError(err, req.GetId(), "the run has ended already")
	}
	run, err := o.get(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	return &specqlv1.CancelRunResponse{Run: run}, nil
}
