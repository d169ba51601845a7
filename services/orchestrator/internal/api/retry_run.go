package api

import (
	"context"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
)

// RetryRun implements OrchestratorService.
func (o *Orchestrator) RetryRun(ctx context.Context, req *specqlv1.RetryRunRequest) (*specqlv1.RetryRunResponse, error) {
	if err := checkID(req.GetId()); err != nil {
		return nil, err
	}
	if err := o.visible(ctx, req.GetId()); err != nil {
		return nil, err
	}
	if err := o.Engine.Retry(ctx, req.GetId()); err != nil {
		return nil, runError(err, req.GetId(), "only a failed or cancelled run can be retried")
	}
	run, err := o.get(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	return &specqlv1.RetryRunResponse{Run: run}, nil
}
