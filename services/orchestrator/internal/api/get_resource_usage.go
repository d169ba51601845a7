package api

import (
	"context"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/services/orchestrator/internal/intake"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// GetResourceUsage implements InsightService.
func (i *Insight) GetResourceUsage(ctx context.Context, req *specqlv1.GetResourceUsageRequest) (*specqlv1.GetResourceUsageResponse, error) {
	var v intake.Violations
	f := jobFilter(ctx, &v, req.GetFilter())
	if err := v.Err(); err != nil {
		return nil, err
	}
	resp := &specqlv1.GetResourceUsageResponse{}
	if f.Service == "" && f.Since.IsZero() {
		rows, err := i.Store.RunnerUsage(ctx, f)
		if err != nil {
			return nil, reportError(err)
		}
		for _, r := range rows {
			resp.Usage = append(resp.Usage, runnerUsage(r))
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
		if u := operationUsage(k, groups[k]); u.GetMeasuredJobs() > 0 {
			resp.Usage = append(resp.Usage, u)
		}
	}
	return resp, nil
}

// summed is what a view tells of a figure; nil where nobody measured it.
func summed(total, average, most *float64) *specqlv1.Distribution {
	if total == nil && average == nil && most == nil {
		return nil
	}
	return &specqlv1.Distribution{Total: total, Average: average, Max: most}
}

func runnerUsage(r *store.RunnerUsage) *specqlv1.UsageSummary {
	return &specqlv1.UsageSummary{
		ExecutionType: r.ExecutionType, Runner: r.Runner, MeasuredJobs: r.MeasuredJobs, OomKilledJobs: r.OOMKilledJobs, LastJobAt: timeProto(r.LastJobAt),
		DurationSeconds: summed(nil, r.AverageDurationSeconds, nil),
		CpuSeconds:      summed(r.TotalCPUSeconds, r.AverageCPUSeconds, nil), CpuUsagePercent: summed(nil, r.AverageCPUPercent, nil),
		MemoryMb: summed(nil, r.AverageMemoryMB, nil), PeakMemoryMb: summed(nil, r.AveragePeakMemoryMB, r.MaxPeakMemoryMB),
		DiskReadMb: summed(r.TotalDiskReadMB, nil, nil), DiskWriteMb: summed(r.TotalDiskWriteMB, nil, nil),
		NetworkRxMb: summed(r.TotalNetworkRxMB, nil, nil), NetworkTxMb: summed(r.TotalNetworkTxMB, nil, nil),
	}
}

// usageFigures are the figures of a job and where a summary keeps each.
var usageFigures = []struct {
	of   func(*runnerv1.ResourceUsage) *float64
	into func(*specqlv1.UsageSummary) **specqlv1.Distribution
}{
	{func(u *runnerv1.ResourceUsage) *float64 { return u.DurationSeconds }, func(s *specqlv1.UsageSummary) **specqlv1.Distribution { return &s.DurationSeconds }},
	{func(u *runnerv1.ResourceUsage) *float64 { return u.CpuSeconds }, func(s *specqlv1.UsageSummary) **specqlv1.Distribution { return &s.CpuSeconds }},
	{func(u *runnerv1.ResourceUsage) *float64 { return u.CpuUsagePercent }, func(s *specqlv1.UsageSummary) **specqlv1.Distribution { return &s.CpuUsagePercent }},
	{func(u *runnerv1.ResourceUsage) *float64 { return u.MemoryMb }, func(s *specqlv1.UsageSummary) **specqlv1.Distribution { return &s.MemoryMb }},
	{func(u *runnerv1.ResourceUsage) *float64 { return u.PeakMemoryMb }, func(s *specqlv1.UsageSummary) **specqlv1.Distribution { return &s.PeakMemoryMb }},
	{func(u *runnerv1.ResourceUsage) *float64 { return u.DiskReadMb }, func(s *specqlv1.UsageSummary) **specqlv1.Distribution { return &s.DiskReadMb }},
	{func(u *runnerv1.ResourceUsage) *float64 { return u.DiskWriteMb }, func(s *specqlv1.UsageSummary) **specqlv1.Distribution { return &s.DiskWriteMb }},
	{func(u *runnerv1.ResourceUsage) *float64 { return u.NetworkRxMb }, func(s *specqlv1.UsageSummary) **specqlv1.Distribution { return &s.NetworkRxMb }},
	{func(u *runnerv1.ResourceUsage) *float64 { return u.NetworkTxMb }, func(s *specqlv1.UsageSummary) **specqlv1.Distribution { return &s.NetworkTxMb }},
	{func(u *runnerv1.ResourceUsage) *float64 { return u.RequestBytes }, func(s *specqlv1.UsageSummary) **specqlv1.Distribution { return &s.RequestBytes }},
	{func(u *runnerv1.ResourceUsage) *float64 { return u.ResponseBytes }, func(s *specqlv1.UsageSummary) **specqlv1.Distribution { return &s.ResponseBytes }},
	{func(u *runnerv1.ResourceUsage) *float64 { return u.BilledDurationMs }, func(s *specqlv1.UsageSummary) **specqlv1.Distribution { return &s.BilledDurationMs }},
	{func(u *runnerv1.ResourceUsage) *float64 { return u.CostUsd }, func(s *specqlv1.UsageSummary) **specqlv1.Distribution { return &s.CostUsd }},
}

// operationUsage sums up what the jobs of an operation used. Usage that cannot be read counts as
// not measured: any SQL client may have written it.
func operationUsage(k operationKey, jobs []*store.JobFigures) *specqlv1.UsageSummary {
	s := &specqlv1.UsageSummary{ExecutionType: k.executionType, Service: k.service, Operation: k.operation}
	values := make([][]float64, len(usageFigures))
	lenient := protojson.UnmarshalOptions{DiscardUnknown: true}
	var last time.Time
	for _, j := range jobs {
		u := &runnerv1.ResourceUsage{}
		if len(j.ResourceUsage) == 0 || lenient.Unmarshal(j.ResourceUsage, u) != nil {
			continue
		}
		s.MeasuredJobs++
		if u.GetOomKilled() {
			s.OomKilledJobs++
		}
		last = newest(last, j.EndedAt)
		for n, f := range usageFigures {
			if v := f.of(u); v != nil {
				values[n] = append(values[n], *v)
			}
		}
	}
	for n, f := range usageFigures {
		*f.into(s) = distribution(values[n])
	}
	s.LastJobAt = timeProto(last)
	return s
}
