package wire

import (
	"math"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
)

// decoder reads a message. Whatever is not expected makes it odd: then protobuf is to read the message, which knows what to do
// with it.
type decoder struct {
	s string // what is left of the message that is read
	// shared: texts are parts of the message, and keep it as a whole.
	shared bool
	odd    bool
}

// The types of fields, as on the wire: a tag is a number, shifted, and a type.
const (
	varint  = 0
	fixed64 = 1
	bytes   = 2
)

// next gives the tag of the next field, 0 at the end.
func (d *decoder) next() uint64 {
	if d.odd || d.s == "" {
		return 0
	}
	tag := d.varint()
	d.odd = d.odd || tag == 0 // no field has that one
	return tag
}

// enter reads the message in a field; leave goes on behind it.
func (d *decoder) enter() (outer string) {
	inner := d.part()
	outer, d.s = d.s, inner
	return outer
}

func (d *decoder) leave(outer string) {
	d.odd = d.odd || d.s != ""
	d.s = outer
}

// once makes a message odd that has a field twice whose values would have to be merged.
func once[T any](d *decoder, have *T) {
	d.odd = d.odd || have != nil
}

func (d *decoder) varint() (n uint64) {
	if d.s != "" && d.s[0] < 0x80 { // most are
		n, d.s = uint64(d.s[0]), d.s[1:]
		return n
	}
	for i := 0; i < len(d.s) && i < 10; i++ {
		c := d.s[i]
		n |= uint64(c&0x7f) << (7 * i)
		if c < 0x80 {
			d.odd = d.odd || i == 9 && c > 1 // more than there is room for
			d.s = d.s[i+1:]
			return n
		}
	}
	d.odd = true
	return 0
}

func (d *decoder) part() string {
	n := d.varint()
	if n > uint64(len(d.s)) {
		d.odd = true
	}
	if d.odd {
		return ""
	}
	p := d.s[:n]
	d.s = d.s[n:]
	return p
}

func (d *decoder) text() string {
	p := d.part()
	d.odd = d.odd || !utf8.ValidString(p)
	if d.shared {
		return p
	}
	return strings.Clone(p)
}

func (d *decoder) bytes() []byte { return []byte(d.part()) }

func (d *decoder) bool() bool { return d.varint() != 0 }

func (d *decoder) int32() int32 { return int32(d.varint()) } //nolint:gosec // as protobuf has it

func (d *decoder) float() float64 {
	if len(d.s) < 8 {
		d.odd = true
		return 0
	}
	var n uint64
	for i := range 8 {
		n |= uint64(d.s[i]) << (8 * i)
	}
	d.s = d.s[8:]
	return math.Float64frombits(n)
}

func (d *decoder) time(t *timestamppb.Timestamp) { d.seconds(&t.Seconds, &t.Nanos) }

func (d *decoder) duration(t *durationpb.Duration) { d.seconds(&t.Seconds, &t.Nanos) }

// seconds reads what a time and a duration have alike.
func (d *decoder) seconds(seconds *int64, nanos *int32) {
	outer := d.enter()
	for tag := d.next(); tag != 0; tag = d.next() {
		switch tag {
		case 1<<3 | varint:
			*seconds = int64(d.varint()) //nolint:gosec // as protobuf has it
		case 2<<3 | varint:
			*nanos = d.int32()
		default:
			d.odd = true
		}
	}
	d.leave(outer)
}

// decodeRequest reads a start. It says whether it did. A runner remembers ids and names for long, so that each is a text of
// its own.
func decodeRequest(s string, m *runnerv1.ExecuteRequest) bool {
	d := decoder{s: s}
	if d.next() != 1<<3|bytes {
		return false
	}
	all := &struct { // in one piece
		start          runnerv1.ExecuteRequest_Start
		job            runnerv1.Job
		service        runnerv1.Service
		operation      runnerv1.Operation
		timeout, lease durationpb.Duration
	}{}
	j := &all.job
	outer := d.enter()
	for tag := d.next(); tag != 0; tag = d.next() {
		switch tag {
		case 1<<3 | bytes:
			j.Id = d.text()
		case 2<<3 | bytes:
			j.RunId = d.text()
		case 3<<3 | bytes:
			j.StepPath = d.text()
		case 4<<3 | varint:
			j.Attempt = d.int32()
		case 5<<3 | bytes:
			j.IdempotencyKey = d.text()
		case 6<<3 | varint:
			j.Epoch = int64(d.varint()) //nolint:gosec // as protobuf has it
		case 7<<3 | bytes:
			once(&d, j.GetService())
			j.Service = &all.service
			d.service(j.GetService())
		case 8<<3 | bytes:
			once(&d, j.GetOperation())
			j.Operation = &all.operation
			d.operation(j.GetOperation())
		case 9<<3 | bytes:
			j.Input = d.bytes()
		case 10<<3 | bytes:
			once(&d, j.GetTimeout())
			j.Timeout = &all.timeout
			d.duration(j.GetTimeout())
		case 11<<3 | bytes:
			once(&d, j.GetLease())
			j.Lease = &all.lease
			d.duration(j.GetLease())
		case 12<<3 | bytes:
			j.Subject = d.text()
		case 13<<3 | bytes:
			j.TenantId = d.text()
		case 14<<3 | bytes:
			j.CorrelationId = d.text()
		case 15<<3 | varint:
			j.AttachOnly = d.bool()
		case 16<<3 | fixed64:
			j.ReservedCostUsd = new(d.float())
		case 17<<3 | bytes:
			d.entry(j)
		case 18<<3 | varint:
			j.More = d.bool()
		case 19<<3 | varint:
			j.Profile = d.bool()
		case 20<<3 | varint:
			j.Batch = d.bool()
		default:
			d.odd = true
		}
	}
	d.leave(outer)
	if d.odd || d.s != "" {
		return false
	}
	all.start.Start = j
	m.Reset()
	m.Command = &all.start
	return true
}

func (d *decoder) service(s *runnerv1.Service) {
	outer := d.enter()
	for tag := d.next(); tag != 0; tag = d.next() {
		switch tag {
		case 1<<3 | bytes:
			s.Name = d.text()
		case 2<<3 | bytes:
			s.ExecutionType = d.text()
		case 3<<3 | bytes:
			s.RunnerConfig = d.bytes()
		case 4<<3 | bytes:
			s.SecurityPolicy = d.bytes()
		default:
			d.odd = true
		}
	}
	d.leave(outer)
}

func (d *decoder) operation(o *runnerv1.Operation) {
	outer := d.enter()
	for tag := d.next(); tag != 0; tag = d.next() {
		switch tag {
		case 1<<3 | bytes:
			o.Name = d.text()
		case 2<<3 | bytes:
			o.Config = d.bytes()
		default:
			d.odd = true
		}
	}
	d.leave(outer)
}

// entry is one of the trace context.
func (d *decoder) entry(j *runnerv1.Job) {
	var key, value string
	outer := d.enter()
	for tag := d.next(); tag != 0; tag = d.next() {
		switch tag {
		case 1<<3 | bytes:
			key = d.text()
		case 2<<3 | bytes:
			value = d.text()
		default:
			d.odd = true
		}
	}
	d.leave(outer)
	if j.GetTraceContext() == nil {
		j.TraceContext = map[string]string{}
	}
	j.GetTraceContext()[key] = value
}

// place has room for one message; those beyond it get rooms of their own.
type place[T any] struct {
	first T
	taken bool
}

func (p *place[T]) take() *T {
	if p.taken {
		return new(T)
	}
	p.taken = true
	return &p.first
}

// told is room, in one piece, for what a quick job says.
type told struct {
	batch  runnerv1.ExecuteResponse_Batch
	events runnerv1.Batch
	list   [4]*runnerv1.ExecuteResponse
	each   [3]runnerv1.ExecuteResponse

	started place[struct {
		event   runnerv1.ExecuteResponse_Started
		started runnerv1.Started
		time    timestamppb.Timestamp
		held    durationpb.Duration
	}]
	log place[struct {
		event runnerv1.ExecuteResponse_Log
		log   runnerv1.Log
		time  timestamppb.Timestamp
	}]
	finished place[struct {
		event    runnerv1.ExecuteResponse_Finished
		finished runnerv1.Finished
		usage    runnerv1.ResourceUsage
		security runnerv1.SecurityContext
	}]
	figures   [6]float64
	nfigures  int
	status    place[int32]
	checks    [4]runnerv1.PolicyCheck
	checkList [4]*runnerv1.PolicyCheck
	isolation [6]string
}

// decodeResponse reads a batch, which is what a quick job says. It says whether it did.
func decodeResponse(s string, m *runnerv1.ExecuteResponse) bool {
	d := decoder{s: s, shared: true}
	if d.next() != 6<<3|bytes {
		return false
	}
	t := &told{}
	t.events.Events = t.list[:0]
	outer := d.enter()
	for tag := d.next(); tag != 0; tag = d.next() {
		if tag != 1<<3|bytes {
			return false
		}
		d.event(t)
	}
	d.leave(outer)
	if d.odd || d.s != "" {
		return false
	}
	t.batch.Batch = &t.events
	m.Reset()
	m.Event = &t.batch
	return true
}

func (d *decoder) event(t *told) {
	var m *runnerv1.ExecuteResponse
	if n := len(t.events.GetEvents()); n < len(t.each) {
		m = &t.each[n]
	} else {
		m = &runnerv1.ExecuteResponse{}
	}
	t.events.Events = append(t.events.Events, m)
	outer := d.enter()
	switch d.next() {
	case 1<<3 | bytes:
		p := t.started.take()
		m.Event = &p.event
		s := &p.started
		p.event.Started = s
		outer := d.enter()
		for tag := d.next(); tag != 0; tag = d.next() {
			switch tag {
			case 1<<3 | bytes:
				once(d, s.GetTime())
				s.Time = &p.time
				d.time(s.GetTime())
			case 2<<3 | varint:
				s.Attached = d.bool()
			case 3<<3 | varint:
				s.More = d.bool()
			case 4<<3 | bytes:
				once(d, s.GetHeld())
				s.Held = &p.held
				d.duration(s.GetHeld())
			default:
				d.odd = true
			}
		}
		d.leave(outer)
	case 2<<3 | bytes:
		p := t.log.take()
		m.Event = &p.event
		l := &p.log
		p.event.Log = l
		outer := d.enter()
		for tag := d.next(); tag != 0; tag = d.next() {
			switch tag {
			case 1<<3 | varint:
				l.Line = int64(d.varint()) //nolint:gosec // as protobuf has it
			case 2<<3 | bytes:
				l.Stream = d.text()
			case 3<<3 | bytes:
				l.Text = d.text()
			case 4<<3 | bytes:
				once(d, l.GetTime())
				l.Time = &p.time
				d.time(l.GetTime())
			default:
				d.odd = true
			}
		}
		d.leave(outer)
	case 4<<3 | bytes:
		d.odd = d.odd || t.finished.taken // the room for checks is that of one end
		p := t.finished.take()
		m.Event = &p.event
		f := &p.finished
		p.event.Finished = f
		outer := d.enter()
		for tag := d.next(); tag != 0; tag = d.next() {
			switch tag {
			case 1<<3 | bytes:
				f.Output = d.bytes()
			case 4<<3 | bytes:
				once(d, f.GetUsage())
				f.Usage = &p.usage
				d.usage(t, f.GetUsage())
			case 5<<3 | bytes:
				once(d, f.GetSecurity())
				f.Security = &p.security
				d.security(t, f.GetSecurity())
			case 6<<3 | varint:
				f.HandedBack = d.bool()
			case 7<<3 | varint:
				f.Unused = d.bool()
			case 8<<3 | varint:
				f.Closes = d.bool()
			case 9<<3 | varint:
				f.LimitsChanged = d.bool()
			default: // those of jobs that failed, or whose caller asked for phases
				d.odd = true
			}
		}
		d.leave(outer)
	default:
		d.odd = true
	}
	d.leave(outer)
}

func (d *decoder) figure(t *told) *float64 {
	if t.nfigures == len(t.figures) {
		return new(d.float())
	}
	p := &t.figures[t.nfigures]
	t.nfigures++
	*p = d.float()
	return p
}

func (d *decoder) usage(t *told, u *runnerv1.ResourceUsage) {
	outer := d.enter()
	for tag := d.next(); tag != 0; tag = d.next() {
		switch tag {
		case 1<<3 | fixed64:
			u.DurationSeconds = d.figure(t)
		case 2<<3 | fixed64:
			u.CpuSeconds = d.figure(t)
		case 3<<3 | fixed64:
			u.CpuUsagePercent = d.figure(t)
		case 4<<3 | fixed64:
			u.MemoryMb = d.figure(t)
		case 5<<3 | fixed64:
			u.PeakMemoryMb = d.figure(t)
		case 6<<3 | fixed64:
			u.DiskReadMb = d.figure(t)
		case 7<<3 | fixed64:
			u.DiskWriteMb = d.figure(t)
		case 8<<3 | fixed64:
			u.NetworkRxMb = d.figure(t)
		case 9<<3 | fixed64:
			u.NetworkTxMb = d.figure(t)
		case 10<<3 | varint:
			u.Attempts = new(d.int32())
		case 11<<3 | bytes:
			u.Source = d.text()
		case 12<<3 | varint:
			u.StatusCode = t.status.take()
			*u.StatusCode = d.int32()
		case 13<<3 | fixed64:
			u.RequestBytes = d.figure(t)
		case 14<<3 | fixed64:
			u.ResponseBytes = d.figure(t)
		case 15<<3 | varint:
			u.ExitCode = new(d.int32())
		case 16<<3 | varint:
			u.OomKilled = new(d.bool())
		case 17<<3 | fixed64:
			u.BilledDurationMs = d.figure(t)
		case 18<<3 | fixed64:
			u.CostUsd = d.figure(t)
		case 19<<3 | bytes:
			u.ExecutedVersion = new(d.text())
		default:
			d.odd = true
		}
	}
	d.leave(outer)
}

func (d *decoder) security(t *told, s *runnerv1.SecurityContext) {
	outer := d.enter()
	for tag := d.next(); tag != 0; tag = d.next() {
		switch tag {
		case 1<<3 | bytes:
			s.PolicyDigest = d.text()
		case 2<<3 | bytes:
			n := len(s.GetChecks())
			if n == 0 {
				s.Checks = t.checkList[:0]
			}
			c := &runnerv1.PolicyCheck{}
			if n < len(t.checks) {
				c = &t.checks[n]
			}
			s.Checks = append(s.Checks, c)
			d.check(c)
		case 3<<3 | bytes:
			s.Subject = d.text()
		case 4<<3 | bytes:
			s.TenantId = d.text()
		case 5<<3 | bytes:
			s.Runner = d.text()
		case 6<<3 | bytes:
			if len(s.GetIsolation()) == 0 {
				s.Isolation = t.isolation[:0]
			}
			s.Isolation = append(s.Isolation, d.text())
		default:
			d.odd = true
		}
	}
	d.leave(outer)
}

func (d *decoder) check(c *runnerv1.PolicyCheck) {
	outer := d.enter()
	for tag := d.next(); tag != 0; tag = d.next() {
		switch tag {
		case 1<<3 | bytes:
			c.Rule = d.text()
		case 2<<3 | bytes:
			c.Subject = d.text()
		case 3<<3 | varint:
			c.Allowed = d.bool()
		case 4<<3 | bytes:
			c.Detail = d.text()
		case 6<<3 | bytes:
			c.RuleSource = d.text()
		default: // the changes that would allow it
			d.odd = true
		}
	}
	d.leave(outer)
}
