package api

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/google/uuid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/internal/intake"
	"github.com/specql/mesh/services/orchestrator/internal/registry"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// Bounds of one page.
const (
	defaultReplayed = 500
	maxReplayed     = 1000
	// checkBytes is about how many bytes of jobs a runner is asked about at once.
	checkBytes = 1 << 20
)

// ReplayPolicy implements InsightService.
func (i *Insight) ReplayPolicy(ctx context.Context, req *specqlv1.ReplayPolicyRequest) (*specqlv1.ReplayPolicyResponse, error) {
	var v intake.Violations
	f := jobFilter(ctx, &v, req.GetFilter())
	name(&v, "page_token", req.GetPageToken())
	if token := req.GetPageToken(); token != "" && uuid.Validate(token) != nil {
		v.Add("page_token", "is no next_page_token of an earlier answer")
	}
	limit := int(req.GetPageSize())
	switch {
	case limit < 0 || limit > maxReplayed:
		v.Add("page_size", "has to be between 0 and %d", maxReplayed)
	case limit == 0:
		limit = defaultReplayed
	}
	if f.Service == "" {
		v.Add("filter.service", "is missing")
	}
	if err := v.Err(); err != nil {
		return nil, err
	}
	svc := i.Registry.Current().Registry.Service(f.Service)
	if svc == nil {
		return nil, notFound("service", f.Service, "`specql runners` and the registry show those there are")
	}
	f.Service = svc.Name
	whole, err := i.underPolicy(ctx, svc, req)
	if err != nil {
		return nil, err
	}
	jobs, err := i.Store.Recorded(ctx, f, req.GetPageToken(), limit)
	if err != nil {
		return nil, reportError(err)
	}
	resp := &specqlv1.ReplayPolicyResponse{}
	if len(jobs) == limit {
		resp.NextPageToken = jobs[limit-1].ID
	}
	resp.Jobs, err = i.replay(ctx, svc, whole, jobs)
	return resp, err
}

// underPolicy is the service with the policy in question, once its runner has found nothing wrong with it.
func (i *Insight) underPolicy(ctx context.Context, svc *spec.Service, req *specqlv1.ReplayPolicyRequest) (*runnerv1.ValidateRequest, error) {
	whole, err := registry.Service(svc)
	if err != nil {
		return nil, err
	}
	if whole.Service.SecurityPolicy, err = json.Marshal(req.GetSecurityPolicy().AsMap()); err != nil {
		return nil, fault.Wrap(err, fault.Validation, "security_policy cannot be said in JSON")
	}
	if req.GetPageToken() != "" {
		return whole, nil // the first page has found it right
	}
	problems, err := i.Checkers.Validate(ctx, whole)
	if err != nil {
		return nil, fault.FromError(err)
	}
	var v intake.Violations
	for _, p := range problems {
		if path := p.GetPath(); !p.GetWarning() && len(v) < intake.MaxViolations && len(path) >= len("security_policy") && path[:len("security_policy")] == "security_policy" {
			text := p.GetMessage()
			if p.GetMend() != "" {
				text += "; " + p.GetMend()
			}
			v.Add(path, "%s", text)
		}
	}
	return whole, v.Err()
}

// replay asks the runner, a part of the jobs at a time.
func (i *Insight) replay(ctx context.Context, svc *spec.Service, whole *runnerv1.ValidateRequest, jobs []*store.RecordedJob) ([]*specqlv1.ReplayedJob, error) {
	var out []*specqlv1.ReplayedJob
	ask := &runnerv1.CheckRequest{Service: whole.GetService()}
	size := 0
	flush := func() error {
		if len(ask.GetJobs()) == 0 {
			return nil
		}
		checked, err := i.Checkers.Check(ctx, ask)
		if status.Code(err) == codes.Unimplemented {
			return status.Errorf(codes.FailedPrecondition, "the %s runner cannot tell what a policy would say of jobs of the past", svc.ExecutionType)
		}
		if err != nil {
			return fault.FromError(err)
		}
		for n, c := range checked {
			verdict(out[len(out)-len(checked)+n], c)
		}
		ask.Jobs, size = nil, 0
		return nil
	}
	for _, j := range jobs {
		p, unknown := i.recorded(ctx, svc, whole, j)
		r := &specqlv1.ReplayedJob{
			JobId: j.ID, RunId: j.RunID, Operation: j.Operation, Status: string(j.Status), ErrorCode: j.ErrorCode, Unknown: unknown,
			CreatedAt: timeProto(j.CreatedAt), Subject: j.Subject, WasDenied: wasDenied(j.ErrorCode, p.GetChecks()),
		}
		out = append(out, r)
		ask.Jobs = append(ask.Jobs, p)
		if size += len(j.Input) + len(j.SecurityContext) + len(j.RunnerConfig); size >= checkBytes {
			if err := flush(); err != nil {
				return nil, err
			}
		}
	}
	return out, flush()
}

// recorded is a job as the runner is asked about it: with the configuration that it ran with.
func (i *Insight) recorded(ctx context.Context, svc *spec.Service, whole *runnerv1.ValidateRequest, j *store.RecordedJob) (*runnerv1.RecordedJob, []string) {
	var unknown []string
	p := &runnerv1.RecordedJob{Id: j.ID, Input: j.Input, RunnerConfig: j.RunnerConfig, ErrorCode: j.ErrorCode, Operation: &runnerv1.Operation{Name: j.Operation}}
	if j.Input == nil {
		unknown = append(unknown, "the input is not recorded, or is larger than what is looked at")
	}
	found := false
	if j.Snapshot != "" {
		if plan, err := i.Registry.Plan(ctx, &store.Run{Entity: j.Entity, Action: j.Action, Snapshot: j.Snapshot}); err == nil {
			for _, c := range plan.Calls() {
				if c.Service.Name == svc.Name && c.Operation.Name == j.Operation {
					if config, err := json.Marshal(c.Operation.Config); err == nil {
						p.Operation.Config, found = config, true
					}
					break
				}
			}
		}
	}
	if !found {
		for _, op := range whole.GetOperations() {
			if op.GetName() == j.Operation {
				p.Operation.Config, found = op.GetConfig(), true
			}
		}
		text := "the operation as it was is not recorded: that of the registry in force is looked at"
		if !found {
			text = fmt.Sprintf("the operation %s is not in the registry any more", j.Operation)
		}
		unknown = append(unknown, text)
	}
	var security runnerv1.SecurityContext
	var usage runnerv1.ResourceUsage
	read := protojson.UnmarshalOptions{DiscardUnknown: true}
	if len(j.SecurityContext) > 0 && read.Unmarshal(j.SecurityContext, &security) == nil {
		p.Checks = security.GetChecks()
	}
	if len(j.ResourceUsage) > 0 && read.Unmarshal(j.ResourceUsage, &usage) == nil {
		p.Usage = &usage
	}
	return p, unknown
}

// wasDenied says whether a policy or a limit of one ended a job.
func wasDenied(code string, checks []*runnerv1.PolicyCheck) bool {
	switch fault.Code(code) {
	case fault.PolicyViolation, fault.BudgetExceeded:
		return true
	case fault.RateLimited, fault.ResourceExceeded:
		for _, c := range checks {
			if !c.GetAllowed() {
				return true
			}
		}
	default:
	}
	return false
}

// verdict writes what the runner says into a job.
func verdict(r *specqlv1.ReplayedJob, c *runnerv1.CheckedJob) {
	r.Unknown = append(r.Unknown, c.GetUnknown()...)
	if c.GetError() == nil {
		return
	}
	r.WouldBeDenied, r.WouldBeErrorCode = true, c.GetError().GetCode()
	for _, check := range c.GetChecks() {
		if !check.GetAllowed() {
			r.Denied = append(r.Denied, check)
		}
	}
	if len(r.GetDenied()) == 0 {
		r.Denied = append(r.Denied, &runnerv1.PolicyCheck{Detail: c.GetError().GetMessage()})
	}
}
