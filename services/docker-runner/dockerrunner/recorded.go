package dockerrunner

import (
	"context"
	"slices"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

var _ runner.Checker = (*Runner)(nil)

// Check implements [runner.Checker]. It needs no engine: paths are compared as they are written, and an
// image is what the job's record says it was.
func (r *Runner) Check(_ context.Context, job *runner.RecordedJob) (*runner.CheckResult, error) {
	a := &attempt{r: r, job: &job.Job, checks: &runner.Checks{}}
	res := &runner.CheckResult{}
	err := a.checkRecorded(job, res)
	if f, ok := fault.As(err); ok && f.Code == fault.Validation {
		res.Unknown = append(res.Unknown, "the container cannot be made as it was then: "+f.Message)
		err = nil
	}
	res.Err, res.Checks = err, a.checks.Context("").GetChecks()
	return res, nil
}

func (a *attempt) checkRecorded(job *runner.RecordedJob, res *runner.CheckResult) error {
	if err := a.configure(); err != nil {
		return err
	}
	if err := a.recordedImage(job, res); err != nil {
		return err
	}
	if len(a.cfg.Volumes) > 0 {
		res.Unknown = append(res.Unknown, "volume_restrictions: what links in the paths led to is not recorded")
	}
	if _, err := a.policies.volumes(a.cfg.Volumes, byName); err != nil {
		return err
	}
	var own, ceiling ResourceLimits
	for i, s := range a.policies.sources {
		if l := s.policy.ResourceLimits; l != nil && i == 0 {
			own = *l
		} else if l != nil {
			ceiling = *l
		}
	}
	for _, l := range []runner.RecordedLimit{
		{Key: "resource_limits.memory_mb", Unit: "MiB", Service: own.MemoryMB, Ceiling: ceiling.MemoryMB, Used: job.Usage.PeakMemoryMb},
		{Key: "resource_limits.disk_mb", Unit: "MiB", Service: own.DiskMB, Ceiling: ceiling.DiskMB},
		{Key: "resource_limits.processes", Unit: "processes", Service: float64(own.Processes), Ceiling: float64(ceiling.Processes)},
	} {
		err, unknown := l.Check(a.checks, job)
		if unknown != "" {
			res.Unknown = append(res.Unknown, unknown)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// recordedImage checks the image that ran. Of its digests the record holds that of its contents
// alone, which is not the one that a registry knows it by.
func (a *attempt) recordedImage(job *runner.RecordedJob, res *runner.CheckResult) error {
	pinned := slices.ContainsFunc(a.policies.sources, func(s source) bool {
		return slices.ContainsFunc(s.policy.AllowedImages, func(text string) bool {
			pattern, err := parsePattern(text)
			return err == nil && pattern.pinned() && pattern.mayMatch(a.name)
		})
	})
	if pinned {
		unpinned := true
		for _, s := range a.policies.sources {
			unpinned = unpinned && slices.ContainsFunc(s.policy.AllowedImages, func(text string) bool {
				pattern, err := parsePattern(text)
				return err == nil && pattern.matches(a.name, job.Usage.GetExecutedVersion(), nil)
			})
		}
		if !unpinned {
			res.Unknown = append(res.Unknown, "allowed_images: the digest that a registry knows the image by is not recorded")
			return nil
		}
	}
	return a.policies.imageContent(a.name, job.Usage.GetExecutedVersion(), nil)
}
