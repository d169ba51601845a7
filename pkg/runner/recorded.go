package runner

import (
	"context"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
)

// Checker is a [JobRunner] that can tell what a policy would say of jobs of the past.
type Checker interface {
	// Check decides with the code that decides when a job runs, on what is recorded of one. It runs
	// nothing and calls nothing. What cannot be known from the record is said in the result; an
	// error means that the runner itself could not work.
	Check(ctx context.Context, job *RecordedJob) (*CheckResult, error)
}

// RecordedJob is a job of the past under a policy in question, which is that of its Service.
type RecordedJob struct {
	Job
	// Checks are those of then.
	Checks []*runnerv1.PolicyCheck
	// Usage is never nil.
	Usage *runnerv1.ResourceUsage
	// ErrorCode is empty where the job completed.
	ErrorCode fault.Code
}

// Subjects are those of the checks of a rule of then.
func (j *RecordedJob) Subjects(rule string) []string {
	var out []string
	for _, c := range j.Checks {
		if c.GetRule() == rule {
			out = append(out, c.GetSubject())
		}
	}
	return out
}

// DeniedBy says whether a rule ended the job then.
func (j *RecordedJob) DeniedBy(rule string) bool {
	for _, c := range j.Checks {
		if c.GetRule() == rule && !c.GetAllowed() {
			return true
		}
	}
	return false
}

// CheckResult is what a policy says of a job of the past.
type CheckResult struct {
	Checks []*runnerv1.PolicyCheck
	// Err is what the job would fail with; nil where nothing that is known forbids it.
	Err error
	// Unknown is what the record does not tell and the policy would have to know.
	Unknown []string
}

// RecordedLimit is a limit of a resource, and what a job of the past used of it.
type RecordedLimit struct {
	// Key such as resource_limits.memory_mb, and the unit for people.
	Key, Unit string
	// Service and Ceiling are the limits of the two policies; 0 is none.
	Service, Ceiling float64
	// Used is what was measured; nil where nobody did.
	Used *float64
}

// Check compares a limit with what was used, and notes the verdict. The error is RESOURCE_EXCEEDED.
// A job that the limit ended would have used more than was measured.
func (l RecordedLimit) Check(checks *Checks, job *RecordedJob) (err *fault.Error, unknown string) {
	limit := l.Service
	if limit == 0 || l.Ceiling > 0 && l.Ceiling < limit {
		limit = l.Ceiling
	}
	if limit == 0 {
		return nil, ""
	}
	if l.Used == nil {
		return nil, l.Key + ": what the job used of it is not recorded"
	}
	subject := fmt.Sprintf("%g %s", *l.Used, l.Unit)
	if *l.Used > limit {
		var changes []*runnerv1.PolicyChange
		for _, of := range []struct {
			limit   float64
			ceiling bool
		}{{l.Service, false}, {l.Ceiling, true}} {
			if of.limit > 0 && of.limit < *l.Used {
				changes = append(changes, SetTo(of.ceiling, l.Key, *l.Used))
			}
		}
		err = checks.Deny(l.Key, subject, fmt.Sprintf("the limit is %g %s", limit, l.Unit), changes...)
		err.Code = fault.ResourceExceeded
		return err, ""
	}
	if job.DeniedBy(l.Key) {
		return nil, l.Key + ": the limit of then ended the job, and how much it would have used is not recorded"
	}
	checks.Allow(l.Key, subject)
	return nil, ""
}

// maxRecorded bounds the jobs of one request.
const maxRecorded = 1000

// Check implements RunnerService.
func (h *Handler) Check(ctx context.Context, req *runnerv1.CheckRequest) (*runnerv1.CheckResponse, error) {
	checker, ok := h.runner.(Checker)
	if !ok {
		return nil, status.Error(codes.Unimplemented, "this runner cannot check jobs of the past")
	}
	service, err := h.newService(req.GetService())
	if err != nil {
		return nil, fault.ToStatus(fault.New(fault.Validation, "service.%v", err)).Err()
	}
	if err := h.serves(service.ExecutionType); err != nil {
		return nil, fault.ToStatus(err).Err()
	}
	if n := len(req.GetJobs()); n > maxRecorded {
		return nil, fault.ToStatus(fault.New(fault.Validation, "jobs: has %d jobs; at most %d are taken", n, maxRecorded)).Err()
	}
	resp := &runnerv1.CheckResponse{}
	for i, p := range req.GetJobs() {
		if ctx.Err() != nil {
			return nil, status.FromContextError(ctx.Err()).Err()
		}
		job, err := recorded(service, p)
		if err != nil {
			return nil, fault.ToStatus(fault.New(fault.Validation, "jobs[%d].%v", i, err)).Err()
		}
		res, err := h.check(ctx, checker, job)
		if err != nil {
			return nil, fault.ToStatus(err).Err()
		}
		out := &runnerv1.CheckedJob{Checks: res.Checks, Unknown: res.Unknown}
		if failure := fault.From(res.Err); failure != nil {
			out.Error = failure.ToProto()
		}
		resp.Jobs = append(resp.Jobs, out)
	}
	return resp, nil
}

func (h *Handler) check(ctx context.Context, c Checker, job *RecordedJob) (res *CheckResult, err error) {
	defer h.recovered(ctx, "Check", &err)
	if res, err = c.Check(ctx, job); err == nil && res == nil {
		err = fault.New(fault.Internal, "the runner gave no result")
	}
	return res, err
}

func recorded(service *Service, p *runnerv1.RecordedJob) (*RecordedJob, error) {
	s := *service
	if len(p.GetRunnerConfig()) > 0 {
		config, err := object(p.GetRunnerConfig())
		if err != nil {
			return nil, fmt.Errorf("runner_config: %w", err)
		}
		s.Config = config
	}
	config, err := object(p.GetOperation().GetConfig())
	if err != nil {
		return nil, fmt.Errorf("operation.config: %w", err)
	}
	input, err := object(p.GetInput())
	if err != nil {
		return nil, fmt.Errorf("input: %w", err)
	}
	usage := p.GetUsage()
	if usage == nil {
		usage = &runnerv1.ResourceUsage{}
	}
	return &RecordedJob{
		Job: Job{
			ID: p.GetId(), Attempt: 1, Service: s, Operation: Operation{Name: p.GetOperation().GetName(), Config: config}, Input: input, Timeout: longestTimeout,
		},
		Checks: p.GetChecks(), Usage: usage, ErrorCode: fault.Code(p.GetErrorCode()),
	}, nil
}
