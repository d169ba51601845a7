package api

import (
	"context"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/services/orchestrator/internal/auth"
	"github.com/specql/mesh/services/orchestrator/internal/intake"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// GetQueueHealth implements InsightService.
func (i *Insight) GetQueueHealth(ctx context.Context, req *specqlv1.GetQueueHealthRequest) (*specqlv1.GetQueueHealthResponse, error) {
	var v intake.Violations
	name(&v, "execution_type", req.GetExecutionType())
	if err := v.Err(); err != nil {
		return nil, err
	}
	rows, err := i.Store.QueueHealth(ctx, store.JobFilter{Tenants: auth.From(ctx).Tenants(), ExecutionType: req.GetExecutionType()})
	if err != nil {
		return nil, reportError(err)
	}
	resp := &specqlv1.GetQueueHealthResponse{}
	for _, r := range rows {
		resp.Queues = append(resp.Queues, &specqlv1.QueueHealth{
			ExecutionType: r.ExecutionType, Pending: r.Pending, Running: r.Running, WaitingForRetry: r.WaitingForRetry, Overdue: r.Overdue,
			OldestPendingSeconds: r.OldestPendingSeconds, LongestRunningSeconds: r.LongestRunningSeconds,
			CompletedLastHour: r.CompletedLastHour, FailedLastHour: r.FailedLastHour, AverageWaitSecondsLastHour: r.AverageWaitSeconds,
		})
	}
	return resp, nil
}
