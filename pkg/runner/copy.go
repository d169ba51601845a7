package runner

import (
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
)

// The messages that each job has are made in one piece, and copied by hand: proto.Clone and a piece for each part cost a quick
// job a noticeable part of its time. A test holds the copies against the messages' fields.

// usageCopy is a copy of a measurement with room for its figures.
type usageCopy struct {
	usage  runnerv1.ResourceUsage
	floats [13]float64
	ints   [3]int32
	nf, ni int
}

func (c *usageCopy) float(p *float64) *float64 {
	if p == nil {
		return nil
	}
	c.floats[c.nf] = *p
	c.nf++
	return &c.floats[c.nf-1]
}

func (c *usageCopy) int(p *int32) *int32 {
	if p == nil {
		return nil
	}
	c.ints[c.ni] = *p
	c.ni++
	return &c.ints[c.ni-1]
}

func copyUsage(u *runnerv1.ResourceUsage) *runnerv1.ResourceUsage {
	c := &usageCopy{}
	to := &c.usage
	to.DurationSeconds, to.CpuSeconds, to.CpuUsagePercent = c.float(u.DurationSeconds), c.float(u.CpuSeconds), c.float(u.CpuUsagePercent) //nolint:protogetter // absent is not zero
	to.MemoryMb, to.PeakMemoryMb = c.float(u.MemoryMb), c.float(u.PeakMemoryMb)                                                           //nolint:protogetter // as above
	to.DiskReadMb, to.DiskWriteMb = c.float(u.DiskReadMb), c.float(u.DiskWriteMb)                                                         //nolint:protogetter // as above
	to.NetworkRxMb, to.NetworkTxMb = c.float(u.NetworkRxMb), c.float(u.NetworkTxMb)                                                       //nolint:protogetter // as above
	to.RequestBytes, to.ResponseBytes = c.float(u.RequestBytes), c.float(u.ResponseBytes)                                                 //nolint:protogetter // as above
	to.BilledDurationMs, to.CostUsd = c.float(u.BilledDurationMs), c.float(u.CostUsd)                                                     //nolint:protogetter // as above
	to.Attempts, to.StatusCode, to.ExitCode = c.int(u.Attempts), c.int(u.StatusCode), c.int(u.ExitCode)                                   //nolint:protogetter // as above
	to.Source = u.GetSource()
	if u.OomKilled != nil {
		to.OomKilled = new(u.GetOomKilled())
	}
	if u.ExecutedVersion != nil {
		to.ExecutedVersion = new(u.GetExecutedVersion())
	}
	return to
}

func copySecurity(s *runnerv1.SecurityContext) *runnerv1.SecurityContext {
	to := &runnerv1.SecurityContext{
		PolicyDigest: s.GetPolicyDigest(), Subject: s.GetSubject(), TenantId: s.GetTenantId(), Runner: s.GetRunner(),
		Isolation: append([]string(nil), s.GetIsolation()...),
	}
	checks := make([]runnerv1.PolicyCheck, len(s.GetChecks()))
	to.Checks = make([]*runnerv1.PolicyCheck, len(checks))
	for i, check := range s.GetChecks() {
		c := &checks[i]
		c.Rule, c.Subject, c.Allowed, c.Detail, c.RuleSource = check.GetRule(), check.GetSubject(), check.GetAllowed(), check.GetDetail(), check.GetRuleSource()
		for _, change := range check.GetAllowedBy() {
			c.AllowedBy = append(c.AllowedBy, proto.CloneOf(change))
		}
		to.Checks[i] = c
	}
	return to
}

// startedEvent is a job's first event.
func startedEvent(attached, more bool) *runnerv1.ExecuteResponse {
	e := &struct {
		m  runnerv1.ExecuteResponse
		e  runnerv1.ExecuteResponse_Started
		s  runnerv1.Started
		at timestamppb.Timestamp
	}{}
	setNow(&e.at)
	e.s.Time, e.s.Attached, e.s.More = &e.at, attached, more
	e.e.Started, e.m.Event = &e.s, &e.e
	return &e.m
}

// logEvent is a line of a job.
func logEvent(line int64, stream, text string) *runnerv1.ExecuteResponse {
	e := &struct {
		m  runnerv1.ExecuteResponse
		e  runnerv1.ExecuteResponse_Log
		l  runnerv1.Log
		at timestamppb.Timestamp
	}{}
	setNow(&e.at)
	e.l.Line, e.l.Stream, e.l.Text, e.l.Time = line, stream, text, &e.at
	e.e.Log, e.m.Event = &e.l, &e.e
	return &e.m
}

// finishedEvent is a job's last event; its message is still to be filled.
func finishedEvent() (*runnerv1.ExecuteResponse, *runnerv1.Finished) {
	e := &struct {
		m runnerv1.ExecuteResponse
		e runnerv1.ExecuteResponse_Finished
		f runnerv1.Finished
	}{}
	e.e.Finished, e.m.Event = &e.f, &e.e
	return &e.m, &e.f
}

func setNow(t *timestamppb.Timestamp) {
	now := time.Now()
	t.Seconds, t.Nanos = now.Unix(), int32(now.Nanosecond()) //nolint:gosec // below a thousand million
}

// batchOf is one message of several.
func batchOf(events []*runnerv1.ExecuteResponse) *runnerv1.ExecuteResponse {
	e := &struct {
		m runnerv1.ExecuteResponse
		e runnerv1.ExecuteResponse_Batch
		b runnerv1.Batch
	}{}
	e.b.Events = events
	e.e.Batch, e.m.Event = &e.b, &e.e
	return &e.m
}
