package api

import (
	"cmp"
	"context"
	"errors"
	"math"
	"slices"
	"strings"
	"time"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/auth"
	"github.com/specql/mesh/services/orchestrator/internal/intake"
	"github.com/specql/mesh/services/orchestrator/internal/registry"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// Bounds of reports.
const (
	// maxFigures is how many jobs a report looks at one by one.
	maxFigures        = 50_000
	maxPatterns       = 1000
	defaultViolations = 1000
	maxViolations     = 10_000
)

// Insight answers InsightService.
type Insight struct {
	specqlv1.UnimplementedInsightServiceServer
	Store store.Insight
	// Alerts is how the alerts of the Registry in force stand.
	Alerts   store.Alerts
	Registry *registry.Registry
	// Checkers decide what a policy would say of jobs of the past.
	Checkers Checkers
}

// Checkers are the runners, as ReplayPolicy asks them.
type Checkers interface {
	Validate(ctx context.Context, req *runnerv1.ValidateRequest) ([]*runnerv1.Problem, error)
	Check(ctx context.Context, req *runnerv1.CheckRequest) ([]*runnerv1.CheckedJob, error)
}

// jobFilter reads a filter.
func jobFilter(ctx context.Context, v *intake.Violations, f *specqlv1.JobFilter) store.JobFilter {
	name(v, "filter.service", f.GetService())
	name(v, "filter.execution_type", f.GetExecutionType())
	out := store.JobFilter{Tenants: auth.From(ctx).Tenants(), Service: f.GetService(), ExecutionType: f.GetExecutionType()}
	if since := f.GetSince(); since != nil {
		out.Since = since.AsTime()
		// The years that every database can compare with.
		if err := since.CheckValid(); err != nil || out.Since.Year() < 1 || out.Since.Year() > 9999 {
			v.Add("filter.since", "is no time of the years 1 to 9999")
		}
	}
	return out
}

// figures reads the newest jobs of a filter, and tells whether there are more.
func (i *Insight) figures(ctx context.Context, f store.JobFilter) (jobs []*store.JobFigures, more bool, err error) {
	jobs, err = i.Store.Figures(ctx, f, maxFigures+1)
	if err != nil {
		return nil, false, reportError(err)
	}
	if len(jobs) > maxFigures {
		return jobs[:maxFigures], true, nil
	}
	return jobs, false, nil
}

// reportError says what a store's error about a report means to the caller.
func reportError(err error) error {
	switch {
	case errors.Is(err, store.ErrClosed):
		return fault.New(fault.Unavailable, "the orchestrator is shutting down")
	case errors.Is(err, store.ErrUnavailable):
		return fault.Wrap(err, fault.Unavailable, "the database did not answer in time; ask for less with filter.since")
	}
	return err
}

// operationKey is what figures of single jobs are summed up by.
type operationKey struct{ executionType, service, operation string }

func (k operationKey) compare(o operationKey) int {
	return cmp.Or(strings.Compare(k.executionType, o.executionType), strings.Compare(k.service, o.service), strings.Compare(k.operation, o.operation))
}

// byOperation groups jobs, in the order of their operations.
func byOperation(jobs []*store.JobFigures) (keys []operationKey, groups map[operationKey][]*store.JobFigures) {
	groups = map[operationKey][]*store.JobFigures{}
	for _, j := range jobs {
		k := operationKey{j.ExecutionType, j.Service, j.Operation}
		if groups[k] == nil {
			keys = append(keys, k)
		}
		groups[k] = append(groups[k], j)
	}
	slices.SortFunc(keys, operationKey.compare)
	return keys, groups
}

// distribution of figures; nil where there are none. It sorts them.
func distribution(values []float64) *specqlv1.Distribution {
	values = slices.DeleteFunc(values, func(v float64) bool { return math.IsNaN(v) || math.IsInf(v, 0) })
	if len(values) == 0 {
		return nil
	}
	slices.Sort(values)
	total := 0.0
	for _, v := range values {
		total += v
	}
	rank := func(p float64) *float64 { return new(values[max(int(math.Ceil(p*float64(len(values)))), 1)-1]) }
	return &specqlv1.Distribution{
		Samples: int64(len(values)), Total: &total, Average: new(total / float64(len(values))),
		P50: rank(0.50), P90: rank(0.90), P95: rank(0.95), P99: rank(0.99), Max: rank(1),
	}
}

// ratio is a over b; nil where b is 0.
func ratio(a, b int64) *float64 {
	if b == 0 {
		return nil
	}
	return new(float64(a) / float64(b))
}

func newest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
