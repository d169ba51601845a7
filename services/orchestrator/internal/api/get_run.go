package api

import (
	"context"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/services/orchestrator/internal/intake"
)

// GetRun implements OrchestratorService.
func (o *Orchestrator) GetRun(ctx context.Context, req *specqlv1.GetRunRequest) (*specqlv1.GetRunResponse, error) {
	if err := checkID(req.GetId()); err != nil {
		return nil, err
	}
	run, err := o.get(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	return &specqlv1.GetRunResponse{Run: run}, nil
}

func checkID(id string) error {
	var v intake.Violations
	if id == "" {
		v.Add("id", "is missing")
	}
	name(&v, "id", id)
	return v.Err()
}
