package wire

import (
	"math"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
)

// encoder appends messages. A test holds it against all fields that there are.
type encoder struct {
	b []byte
	// odd: protobuf has to encode the message, or to say why it cannot.
	odd bool
}

func (e *encoder) tag(field protowire.Number, t protowire.Type) {
	e.varint(protowire.EncodeTag(field, t))
}

func (e *encoder) varint(n uint64) {
	if n < 1<<7 { // most are
		e.b = append(e.b, byte(n))
		return
	}
	e.b = protowire.AppendVarint(e.b, n)
}

// open begins a message in a field; shut ends it.
func (e *encoder) open(field protowire.Number) (at int) {
	e.tag(field, protowire.BytesType)
	e.b = append(e.b, 0) // its length, where it is a short one
	return len(e.b)
}

func (e *encoder) shut(at int) {
	n := len(e.b) - at
	if n < 1<<7 {
		e.b[at-1] = byte(n) //nolint:gosec // it is below 1<<7
		return
	}
	var length [10]byte
	l := protowire.AppendVarint(length[:0], uint64(n))
	e.b = append(e.b, l[1:]...)
	copy(e.b[at-1+len(l):], e.b[at:at+n])
	copy(e.b[at-1:], l)
}

// rest adds the fields that are not known to this program.
func (e *encoder) rest(m proto.Message) {
	if unknown := m.ProtoReflect().GetUnknown(); len(unknown) > 0 {
		e.b = append(e.b, unknown...)
	}
}

// other encodes a message that few jobs have.
func (e *encoder) other(field protowire.Number, m proto.Message) {
	at := e.open(field)
	var err error
	if e.b, err = (proto.MarshalOptions{}).MarshalAppend(e.b, m); err != nil {
		e.odd = true
		return
	}
	e.shut(at)
}

func (e *encoder) text(field protowire.Number, s string) {
	if s != "" {
		e.item(field, s)
	}
}

// item is a text of a list, or one whose absence is not the same as being empty.
func (e *encoder) item(field protowire.Number, s string) {
	e.odd = e.odd || !utf8.ValidString(s)
	e.tag(field, protowire.BytesType)
	e.varint(uint64(len(s)))
	e.b = append(e.b, s...)
}

func (e *encoder) bytes(field protowire.Number, p []byte) {
	if len(p) > 0 {
		e.tag(field, protowire.BytesType)
		e.varint(uint64(len(p)))
		e.b = append(e.b, p...)
	}
}

func (e *encoder) int(field protowire.Number, n int64) {
	if n != 0 {
		e.tag(field, protowire.VarintType)
		e.varint(uint64(n)) //nolint:gosec // as protobuf has it
	}
}

func (e *encoder) bool(field protowire.Number, is bool) {
	if is {
		e.int(field, 1)
	}
}

func (e *encoder) optionalFloat(field protowire.Number, p *float64) {
	if p != nil {
		e.tag(field, protowire.Fixed64Type)
		e.b = protowire.AppendFixed64(e.b, math.Float64bits(*p))
	}
}

func (e *encoder) optionalInt(field protowire.Number, p *int32) {
	if p != nil {
		e.tag(field, protowire.VarintType)
		e.varint(uint64(int64(*p))) //nolint:gosec // as protobuf has it
	}
}

func (e *encoder) time(field protowire.Number, t *timestamppb.Timestamp) {
	if t == nil {
		return
	}
	at := e.open(field)
	e.int(1, t.GetSeconds())
	e.int(2, int64(t.GetNanos()))
	e.rest(t)
	e.shut(at)
}

func (e *encoder) duration(field protowire.Number, d *durationpb.Duration) {
	if d == nil {
		return
	}
	at := e.open(field)
	e.int(1, d.GetSeconds())
	e.int(2, int64(d.GetNanos()))
	e.rest(d)
	e.shut(at)
}

func (e *encoder) request(m *runnerv1.ExecuteRequest) {
	switch c := m.GetCommand().(type) {
	case *runnerv1.ExecuteRequest_Start:
		at := e.open(1)
		e.job(c.Start)
		e.shut(at)
	case *runnerv1.ExecuteRequest_Cancel:
		e.other(2, c.Cancel)
	case *runnerv1.ExecuteRequest_Renew:
		e.other(3, c.Renew)
	default:
		e.odd = true
	}
	e.rest(m)
}

func (e *encoder) job(j *runnerv1.Job) {
	if j == nil {
		return
	}
	e.text(1, j.GetId())
	e.text(2, j.GetRunId())
	e.text(3, j.GetStepPath())
	e.int(4, int64(j.GetAttempt()))
	e.text(5, j.GetIdempotencyKey())
	e.int(6, j.GetEpoch())
	if s := j.GetService(); s != nil {
		at := e.open(7)
		e.text(1, s.GetName())
		e.text(2, s.GetExecutionType())
		e.bytes(3, s.GetRunnerConfig())
		e.bytes(4, s.GetSecurityPolicy())
		e.rest(s)
		e.shut(at)
	}
	if o := j.GetOperation(); o != nil {
		at := e.open(8)
		e.text(1, o.GetName())
		e.bytes(2, o.GetConfig())
		e.rest(o)
		e.shut(at)
	}
	e.bytes(9, j.GetInput())
	e.duration(10, j.GetTimeout())
	e.duration(11, j.GetLease())
	e.text(12, j.GetSubject())
	e.text(13, j.GetTenantId())
	e.text(14, j.GetCorrelationId())
	e.bool(15, j.GetAttachOnly())
	e.optionalFloat(16, j.ReservedCostUsd) //nolint:protogetter // absent is not zero
	for key, value := range j.GetTraceContext() {
		at := e.open(17)
		e.text(1, key)
		e.text(2, value)
		e.shut(at)
	}
	e.bool(18, j.GetMore())
	e.bool(19, j.GetProfile())
	e.bool(20, j.GetBatch())
	e.rest(j)
}

func (e *encoder) response(m *runnerv1.ExecuteResponse) {
	switch ev := m.GetEvent().(type) {
	case *runnerv1.ExecuteResponse_Started:
		at := e.open(1)
		e.started(ev.Started)
		e.shut(at)
	case *runnerv1.ExecuteResponse_Log:
		at := e.open(2)
		e.log(ev.Log)
		e.shut(at)
	case *runnerv1.ExecuteResponse_Usage:
		at := e.open(3)
		e.usage(ev.Usage)
		e.shut(at)
	case *runnerv1.ExecuteResponse_Finished:
		at := e.open(4)
		e.finished(ev.Finished)
		e.shut(at)
	case *runnerv1.ExecuteResponse_Renewed:
		e.other(5, ev.Renewed)
	case *runnerv1.ExecuteResponse_Batch:
		at := e.open(6)
		for _, one := range ev.Batch.GetEvents() {
			in := e.open(1)
			e.response(one)
			e.shut(in)
		}
		e.rest(ev.Batch)
		e.shut(at)
	default:
		e.odd = true
	}
	e.rest(m)
}

func (e *encoder) started(s *runnerv1.Started) {
	if s == nil {
		return
	}
	e.time(1, s.GetTime())
	e.bool(2, s.GetAttached())
	e.bool(3, s.GetMore())
	e.duration(4, s.GetHeld())
	e.rest(s)
}

func (e *encoder) log(l *runnerv1.Log) {
	if l == nil {
		return
	}
	e.int(1, l.GetLine())
	e.text(2, l.GetStream())
	e.text(3, l.GetText())
	e.time(4, l.GetTime())
	e.rest(l)
}

func (e *encoder) finished(f *runnerv1.Finished) {
	if f == nil {
		return
	}
	e.bytes(1, f.GetOutput())
	if f.GetError() != nil {
		e.other(2, f.GetError())
	}
	e.duration(3, f.GetRetryAfter())
	if f.GetUsage() != nil {
		at := e.open(4)
		e.usage(f.GetUsage())
		e.shut(at)
	}
	if f.GetSecurity() != nil {
		at := e.open(5)
		e.security(f.GetSecurity())
		e.shut(at)
	}
	e.bool(6, f.GetHandedBack())
	e.bool(7, f.GetUnused())
	e.bool(8, f.GetCloses())
	e.bool(9, f.GetLimitsChanged())
	for _, phase := range f.GetPhases() {
		e.other(10, phase)
	}
	e.rest(f)
}

func (e *encoder) usage(u *runnerv1.ResourceUsage) {
	if u == nil {
		return
	}
	//nolint:protogetter // what is absent is not zero
	{
		e.optionalFloat(1, u.DurationSeconds)
		e.optionalFloat(2, u.CpuSeconds)
		e.optionalFloat(3, u.CpuUsagePercent)
		e.optionalFloat(4, u.MemoryMb)
		e.optionalFloat(5, u.PeakMemoryMb)
		e.optionalFloat(6, u.DiskReadMb)
		e.optionalFloat(7, u.DiskWriteMb)
		e.optionalFloat(8, u.NetworkRxMb)
		e.optionalFloat(9, u.NetworkTxMb)
		e.optionalInt(10, u.Attempts)
		e.text(11, u.GetSource())
		e.optionalInt(12, u.StatusCode)
		e.optionalFloat(13, u.RequestBytes)
		e.optionalFloat(14, u.ResponseBytes)
		e.optionalInt(15, u.ExitCode)
		if u.OomKilled != nil {
			e.tag(16, protowire.VarintType)
			e.varint(protowire.EncodeBool(*u.OomKilled))
		}
		e.optionalFloat(17, u.BilledDurationMs)
		e.optionalFloat(18, u.CostUsd)
		if u.ExecutedVersion != nil {
			e.item(19, *u.ExecutedVersion)
		}
	}
	e.rest(u)
}

func (e *encoder) security(s *runnerv1.SecurityContext) {
	e.text(1, s.GetPolicyDigest())
	for _, c := range s.GetChecks() {
		at := e.open(2)
		e.check(c)
		e.shut(at)
	}
	e.text(3, s.GetSubject())
	e.text(4, s.GetTenantId())
	e.text(5, s.GetRunner())
	for _, feature := range s.GetIsolation() {
		e.item(6, feature)
	}
	e.rest(s)
}

func (e *encoder) check(c *runnerv1.PolicyCheck) {
	if c == nil {
		return
	}
	e.text(1, c.GetRule())
	e.text(2, c.GetSubject())
	e.bool(3, c.GetAllowed())
	e.text(4, c.GetDetail())
	for _, change := range c.GetAllowedBy() {
		e.other(5, change)
	}
	e.text(6, c.GetRuleSource())
	e.rest(c)
}
