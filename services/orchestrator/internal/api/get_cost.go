package api

import (
	"context"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/services/orchestrator/internal/auth"
	"github.com/specql/mesh/services/orchestrator/internal/intake"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// GetCost implements InsightService.
func (i *Insight) GetCost(ctx context.Context, req *specqlv1.GetCostRequest) (*specqlv1.GetCostResponse, error) {
	var v intake.Violations
	name(&v, "service", req.GetService())
	name(&v, "execution_type", req.GetExecutionType())
	if err := v.Err(); err != nil {
		return nil, err
	}
	rows, err := i.Store.Costs(ctx, store.JobFilter{Tenants: auth.From(ctx).Tenants(), Service: req.GetService(), ExecutionType: req.GetExecutionType()})
	if err != nil {
		return nil, reportError(err)
	}
	resp := &specqlv1.GetCostResponse{}
	for _, r := range rows {
		resp.Costs = append(resp.Costs, &specqlv1.ServiceCost{
			Service: r.Service, ExecutionType: r.ExecutionType, PricedJobs: r.PricedJobs, TotalUsd: r.Total, AverageUsd: r.Average, MaxUsd: r.Max,
			BilledDurationMs: r.BilledDurationMS, LastHourUsd: r.LastHour, LastDayUsd: r.LastDay,
			FirstJobAt: timeProto(r.FirstJobAt), LastJobAt: timeProto(r.LastJobAt),
		})
	}
	return resp, nil
}
