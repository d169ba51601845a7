package api

import (
	"context"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/services/orchestrator/internal/intake"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// GetPerformance implements InsightService.
func (i *Insight) GetPerformance(ctx context.Context, req *specqlv1.GetPerformanceRequest) (*specqlv1.GetPerformanceResponse, error) {
	var v intake.Violations
	f := jobFilter(ctx, &v, req.GetFilter())
	if err := v.Err(); err != nil {
		return nil, err
	}
	resp := &specqlv1.GetPerformanceResponse{}
	if f.Service == "" && f.Since.IsZero() {
		rows, err := i.Store.Performance(ctx, f)
		if err != nil {
			return nil, reportError(err)
		}
		for _, r := range rows {
			p := &specqlv1.Performance{
				ExecutionType: r.ExecutionType, Jobs: r.Jobs, Completed: r.Completed, Failed: r.Failed, Cancelled: r.Cancelled, Active: r.Active,
				SuccessRate: r.SuccessRate, AverageAttempts: r.AverageAttempts, LastJobAt: timeProto(r.LastJobAt),
			}
			if r.Average != nil {
				p.DurationSeconds = &specqlv1.Distribution{Samples: r.Completed + r.Failed + r.Cancelled, Average: r.Average, P50: r.P50, P95: r.P95, P99: r.P99, Max: r.Max}
			}
			resp.Performance = append(resp.Performance, p)
		}
		return resp, nil
	}
	jobs, more, err := i.figures(ctx, f)
	if err != nil {
		return nil, err
	}
	resp.Truncated = more
	keys, groups := byOperation(jobs)
	for _, k := range keys {
		resp.Performance = append(resp.Performance, performance(k, groups[k]))
	}
	return resp, nil
}

// performance sums up the jobs of an operation.
func performance(k operationKey, jobs []*store.JobFigures) *specqlv1.Performance {
	p := &specqlv1.Performance{ExecutionType: k.executionType, Service: k.service, Operation: k.operation, Jobs: int64(len(jobs))}
	var durations []float64
	var attempts, begun int64
	last := jobs[0].CreatedAt
	for _, j := range jobs {
		switch j.Status {
		case store.Completed:
			p.Completed++
		case store.Failed:
			p.Failed++
		case store.Cancelled:
			p.Cancelled++
		default:
			p.Active++
		}
		if j.Status.Final() && j.DurationSeconds != nil {
			durations = append(durations, *j.DurationSeconds)
		}
		if j.Attempts > 0 {
			attempts, begun = attempts+int64(j.Attempts), begun+1
		}
		last = newest(last, j.CreatedAt)
	}
	p.SuccessRate = ratio(p.GetCompleted(), p.GetCompleted()+p.GetFailed()+p.GetCancelled())
	p.DurationSeconds = distribution(durations)
	p.AverageAttempts = ratio(attempts, begun)
	p.LastJobAt = timeProto(last)
	return p
}
