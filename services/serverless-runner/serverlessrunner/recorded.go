package serverlessrunner

import (
	"context"
	"fmt"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

var _ runner.Checker = (*Runner)(nil)

// Check implements [runner.Checker]. No provider is asked: what the function was is what was checked then.
func (r *Runner) Check(_ context.Context, job *runner.RecordedJob) (*runner.CheckResult, error) {
	c := &call{job: &job.Job, checks: &runner.Checks{}, usage: &runnerv1.ResourceUsage{}}
	res := &runner.CheckResult{}
	err := r.checkRecorded(c, job, res)
	if f, ok := fault.As(err); ok && f.Code != fault.PolicyViolation {
		res.Unknown = append(res.Unknown, "the call cannot be made as it was then: "+f.Message)
		err = nil
	} else if err != nil && !ok {
		res.Unknown = append(res.Unknown, "the call cannot be made as it was then: "+err.Error())
		err = nil
	}
	res.Err, res.Checks = err, c.checks.Context("").GetChecks()
	return res, nil
}

func (r *Runner) checkRecorded(c *call, job *runner.RecordedJob, res *runner.CheckResult) error {
	if err := r.prepare(c); err != nil {
		return err
	}
	to, err := c.config.target()
	if err != nil {
		return fault.Wrap(err, fault.Validation, "%v", err)
	}
	c.target = to
	if err := c.policy.authorize(c.config, c.target, c.checks); err != nil {
		return err
	}
	for _, k := range c.config.AuthConfig.envVars() {
		if err := c.policy.authorizeEnvVar(k.name, c.checks); err != nil {
			return err
		}
	}
	if err := c.policy.authorizeDeployed(deployedThen(job), c.checks); err != nil {
		return err
	}
	limits := c.policy.resourceLimits()
	if limits.TimeoutSeconds > 0 && len(job.Subjects("resource_limits.timeout_seconds")) == 0 {
		res.Unknown = append(res.Unknown, "resource_limits.timeout_seconds: the function's own timeout is not recorded")
	}
	if limits.MemoryMB > 0 && c.config.MemoryMB == 0 && len(job.Subjects("resource_limits.memory_mb")) == 0 {
		res.Unknown = append(res.Unknown, "resource_limits.memory_mb: the function's memory is not recorded")
	}
	if c.policy.capped() || c.policy.Service.CostLimits.MaxInvocationsPerHour > 0 || c.policy.Ceiling != nil && c.policy.Ceiling.CostLimits.MaxInvocationsPerHour > 0 {
		res.Unknown = append(res.Unknown, "cost_limits: jobs are looked at one by one, not at what an hour cost")
	}
	return nil
}

// deployedThen is what the checks of then tell of the function: the last memory that was compared.
func deployedThen(job *runner.RecordedJob) deployed {
	var d deployed
	for _, subject := range job.Subjects("resource_limits.memory_mb") {
		var mb int64
		if n, err := fmt.Sscanf(subject, "%d MB", &mb); err == nil && n == 1 {
			d.memoryMB = mb
		}
	}
	return d
}
