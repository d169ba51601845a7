package api

import (
	"context"

	"github.com/google/uuid"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/services/orchestrator/internal/auth"
	"github.com/specql/mesh/services/orchestrator/internal/intake"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

const (
	defaultPage = 50
	maxPage     = 1000
	// maxStatuses is more than there are.
	maxStatuses = 16
)

// ListRuns implements OrchestratorService.
func (o *Orchestrator) ListRuns(ctx context.Context, req *specqlv1.ListRunsRequest) (*specqlv1.ListRunsResponse, error) {
	var v intake.Violations
	name(&v, "entity", req.GetEntity())
	name(&v, "action", req.GetAction())
	name(&v, "page_token", req.GetPageToken())
	if token := req.GetPageToken(); token != "" && uuid.Validate(token) != nil {
		v.Add("page_token", "is no next_page_token of an earlier answer")
	}
	size := int(req.GetPageSize())
	switch {
	case size < 0:
		v.Add("page_size", "must not be negative")
	case size == 0:
		size = defaultPage
	}
	filter := store.RunFilter{Tenants: auth.From(ctx).Tenants(), Entity: req.GetEntity(), Action: req.GetAction(), Before: req.GetPageToken(), Limit: min(size, maxPage)}
	if n := len(req.GetStatuses()); n > maxStatuses {
		v.Add("statuses", "are %d; at most %d are taken", n, maxStatuses)
		return nil, v.Err()
	}
	for _, s := range req.GetStatuses() {
		status, ok := statusOf(s)
		if !ok {
			v.Add("statuses", "%s is no status of a run", s)
			continue
		}
		filter.Statuses = append(filter.Statuses, status)
	}
	if err := v.Err(); err != nil {
		return nil, err
	}
	runs, err := o.Store.Runs(ctx, filter)
	if err != nil {
		return nil, err
	}
	resp := &specqlv1.ListRunsResponse{}
	for _, r := range runs {
		resp.Runs = append(resp.Runs, runProto(r))
	}
	if len(runs) == filter.Limit {
		resp.NextPageToken = runs[len(runs)-1].ID
	}
	return resp, nil
}
