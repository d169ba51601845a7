package shellrunner

import (
	"context"
	"slices"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

var _ runner.Checker = (*Runner)(nil)

// Check implements [runner.Checker]. The files of the command are looked at as they are now.
func (r *Runner) Check(ctx context.Context, job *runner.RecordedJob) (*runner.CheckResult, error) {
	a := &attempt{r: r, job: &job.Job}
	res := &runner.CheckResult{}
	_, err := a.prepare(ctx)
	if f, ok := fault.As(err); ok && f.Code != fault.PolicyViolation {
		res.Unknown = append(res.Unknown, "allowed_commands: the command cannot be looked up as it was then: "+f.Message)
		err = nil
	}
	if err == nil {
		err = a.recordedLimits(job, res)
	}
	if err == nil {
		res.Unknown = append(res.Unknown, a.unrecorded(job)...)
	}
	res.Err, res.Checks = err, a.checks.Context("").GetChecks()
	return res, nil
}

// recordedLimits compares the limits with what the job used.
func (a *attempt) recordedLimits(job *runner.RecordedJob, res *runner.CheckResult) error {
	own, ceiling := a.policy.Policy.ResourceLimits, Limits{}
	if a.r.ceiling != nil {
		ceiling = a.r.ceiling.ResourceLimits
	}
	for _, l := range []runner.RecordedLimit{
		{Key: "resource_limits.memory_mb", Unit: "MiB", Service: float64(own.MemoryMB), Ceiling: float64(ceiling.MemoryMB), Used: job.Usage.PeakMemoryMb},
		{Key: "resource_limits.cpu_seconds", Unit: "s", Service: own.CPUSeconds, Ceiling: ceiling.CPUSeconds, Used: job.Usage.CpuSeconds},
		{Key: "resource_limits.disk_mb", Unit: "MiB", Service: float64(own.DiskMB), Ceiling: float64(ceiling.DiskMB)},
		{Key: "resource_limits.processes", Unit: "processes", Service: float64(own.Processes), Ceiling: float64(ceiling.Processes)},
	} {
		err, unknown := l.Check(&a.checks, job)
		if unknown != "" {
			res.Unknown = append(res.Unknown, unknown)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// unrecorded is what a command did that nobody noted, where the policy takes away what it had.
func (a *attempt) unrecorded(job *runner.RecordedJob) []string {
	unknown := []string{"allowed_commands: what the command itself executed is not recorded"}
	for _, of := range []struct {
		rule, now, what string
		order           []string
	}{
		{"network_access", a.policy.Network, "whether the command used the network", []string{networkNone, networkLocalhost, networkAll}},
		{"file_access", a.policy.Files, "which files the command read or wrote", []string{fileNone, fileRead, fileReadWrite}},
	} {
		for _, then := range job.Subjects(of.rule) {
			if slices.Index(of.order, of.now) < slices.Index(of.order, then) {
				unknown = append(unknown, of.rule+": "+of.what+" is not recorded")
			}
		}
	}
	return unknown
}
