package engine

import (
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// keepUsage and keepSecurity give a job what is stored of it, and what that was made of for whoever asks here. Fields that this version
// does not know are not stored, and nobody has bounded or masked them.
func keepUsage(job *store.Job, u *runnerv1.ResourceUsage) {
	u.ProtoReflect().SetUnknown(nil)
	if job.Usage, job.ResourceUsage = u, usageJSON(u); job.ResourceUsage == nil {
		job.Usage = nil
	}
}

func keepSecurity(job *store.Job, s *runnerv1.SecurityContext) {
	dropUnknown(s)
	if job.Security, job.SecurityContext = s, securityJSON(s); job.SecurityContext == nil {
		job.Security = nil
	}
}

// dropUnknown drops fields that this version does not know, in all that it holds.
func dropUnknown(s *runnerv1.SecurityContext) {
	s.ProtoReflect().SetUnknown(nil)
	for _, c := range s.GetChecks() {
		c.ProtoReflect().SetUnknown(nil)
		for _, change := range c.GetAllowedBy() {
			dropAllUnknown(change.ProtoReflect()) // rare, and it holds values of any kind
		}
	}
}

func dropAllUnknown(m protoreflect.Message) {
	m.SetUnknown(nil)
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case fd.Message() == nil:
		case fd.IsMap():
			if fd.MapValue().Message() != nil {
				v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool {
					dropAllUnknown(v.Message())
					return true
				})
			}
		case fd.IsList():
			for i := range v.List().Len() {
				dropAllUnknown(v.List().Get(i).Message())
			}
		default:
			dropAllUnknown(v.Message())
		}
		return true
	})
}

// mostUsed is more than an attempt uses of anything, in any unit.
const mostUsed = 1e12

// dropAbsurd clears figures of a runner that nothing can be counted with: sums of them would be no numbers, and reports, alerts
// and budgets of everybody with them.
func dropAbsurd(u *runnerv1.ResourceUsage) {
	if u == nil {
		return
	}
	for _, f := range [...]**float64{
		&u.DurationSeconds, &u.CpuSeconds, &u.CpuUsagePercent, &u.MemoryMb, &u.PeakMemoryMb, &u.DiskReadMb, &u.DiskWriteMb,
		&u.NetworkRxMb, &u.NetworkTxMb, &u.RequestBytes, &u.ResponseBytes, &u.BilledDurationMs, &u.CostUsd,
	} {
		if *f != nil && !(**f >= 0 && **f <= mostUsed) { // NaN is neither
			*f = nil
		}
	}
}

// restoreUsage reads what earlier attempts used.
func restoreUsage(job *store.Job) *runnerv1.ResourceUsage {
	if len(job.ResourceUsage) == 0 {
		return nil
	}
	u := &runnerv1.ResourceUsage{}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(job.ResourceUsage, u); err != nil {
		return nil
	}
	return u
}

// addUsage adds an attempt to what the attempts before it used: times and amounts add up,
// peaks are the highest, the rest is the last attempt's.
func addUsage(sum, u *runnerv1.ResourceUsage, wall time.Duration, attempts int) *runnerv1.ResourceUsage {
	if u == nil {
		u = &runnerv1.ResourceUsage{}
	}
	if u.DurationSeconds == nil {
		d := wall.Seconds()
		u.DurationSeconds = &d
	}
	n := int32(attempts) //nolint:gosec // attempts are bounded
	if sum == nil {
		u.Attempts = &n
		return u
	}
	add := func(a, b *float64) *float64 {
		switch {
		case a == nil:
			return b
		case b == nil:
			return a
		}
		s := *a + *b
		return &s
	}
	u.DurationSeconds = add(sum.DurationSeconds, u.DurationSeconds)
	u.CpuSeconds = add(sum.CpuSeconds, u.CpuSeconds)
	u.DiskReadMb = add(sum.DiskReadMb, u.DiskReadMb)
	u.DiskWriteMb = add(sum.DiskWriteMb, u.DiskWriteMb)
	u.NetworkRxMb = add(sum.NetworkRxMb, u.NetworkRxMb)
	u.NetworkTxMb = add(sum.NetworkTxMb, u.NetworkTxMb)
	u.BilledDurationMs = add(sum.BilledDurationMs, u.BilledDurationMs)
	u.CostUsd = add(sum.CostUsd, u.CostUsd)
	if sum.PeakMemoryMb != nil && (u.PeakMemoryMb == nil || *sum.PeakMemoryMb > *u.PeakMemoryMb) {
		u.PeakMemoryMb = sum.PeakMemoryMb
	}
	if u.CpuSeconds != nil && u.GetDurationSeconds() > 0 && u.CpuUsagePercent != nil {
		p := u.GetCpuSeconds() / u.GetDurationSeconds() * 100
		u.CpuUsagePercent = &p
	}
	if sum.GetOomKilled() {
		u.OomKilled = sum.OomKilled
	}
	if u.Source == "" {
		u.Source = sum.Source
	}
	u.Attempts = &n
	return u
}
