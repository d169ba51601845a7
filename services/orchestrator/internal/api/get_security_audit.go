package api

import (
	"context"
	"encoding/json"

	"google.golang.org/protobuf/encoding/protojson"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/services/orchestrator/internal/intake"
)

// GetSecurityAudit implements InsightService.
func (i *Insight) GetSecurityAudit(ctx context.Context, req *specqlv1.GetSecurityAuditRequest) (*specqlv1.GetSecurityAuditResponse, error) {
	var v intake.Violations
	f := jobFilter(ctx, &v, req.GetFilter())
	limit := int(req.GetLimit())
	switch {
	case limit < 0:
		v.Add("limit", "must not be negative")
	case limit == 0:
		limit = defaultViolations
	}
	limit = min(limit, maxViolations)
	if err := v.Err(); err != nil {
		return nil, err
	}
	rows, err := i.Store.Violations(ctx, f, limit+1)
	if err != nil {
		return nil, reportError(err)
	}
	resp := &specqlv1.GetSecurityAuditResponse{}
	if len(rows) > limit {
		rows, resp.Truncated = rows[:limit], true
	}
	for _, r := range rows {
		v := &specqlv1.SecurityViolation{
			JobId: r.JobID, RunId: r.RunID, StepPath: r.StepPath, Service: r.Service, Operation: r.Operation, ExecutionType: r.ExecutionType,
			Rule: r.Rule, Attempted: r.Attempted, Detail: r.Detail, PolicyDigest: r.PolicyDigest, Runner: r.Runner,
			Subject: r.Subject, TenantId: r.TenantID, OccurredAt: timeProto(r.OccurredAt), ErrorCode: r.ErrorCode, RuleSource: r.RuleSource,
			AllowedBy: changesOf(r.AllowedBy),
		}
		resp.Violations = append(resp.Violations, v)
	}
	return resp, nil
}

// changesOf reads stored changes of a policy; nil where there are none, or something else.
func changesOf(raw json.RawMessage) []*runnerv1.PolicyChange {
	if len(raw) == 0 {
		return nil
	}
	var check runnerv1.PolicyCheck
	whole := append(append([]byte(`{"allowed_by":`), raw...), '}')
	if (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(whole, &check) != nil {
		return nil
	}
	return check.GetAllowedBy()
}
