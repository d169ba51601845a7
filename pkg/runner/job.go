package runner

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel/trace"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/telemetry"
)

// longestTimeout is the timeout of a job that names none; time is bounded always.
const longestTimeout = 24 * time.Hour

// job is one attempt that runs here, or that ended a short time ago.
type job struct {
	job    *Job
	feed   *feed
	sink   *sink
	cancel context.CancelCauseFunc
	span   trace.SpanContext
	phases *telemetry.Phases // nil where the caller does not ask

	// The rest is guarded by Handler.mu.
	epoch int64
	lease time.Duration // 0 for a job that lives as long as a stream follows it
	until time.Time     // end of the lease
	lapse *time.Timer   // ends the job then; nil until it is released
	limit *time.Timer   // ends it at its deadline; nil as well
	// deadline is the end of its timeout.
	deadline time.Time
	running  bool
	// abandoned: nobody wants it any more, it is being ended.
	abandoned bool
	// over is closed at the job's end; nil where nobody waits for it.
	over     chan struct{}
	ok       bool // ended without an error
	endedAt  time.Time
	keptSize int
}

// same tells whether the other is the same call: what an attached stream expects.
func (j *job) same(other *Job) bool {
	a, b := j.job, other
	return a.Service.Name == b.Service.Name && a.Operation.Name == b.Operation.Name && a.IdempotencyKey == b.IdempotencyKey &&
		(bytes.Equal(a.Input, b.Input) || Digest(a.Input) == Digest(b.Input))
}

// newJob reads a job from the wire.
func (h *Handler) newJob(p *runnerv1.Job) (*Job, error) {
	bad := func(field, format string, args ...any) error {
		err := fault.New(fault.Validation, "%s: %s", field, fmt.Sprintf(format, args...))
		err.Violations = []fault.Violation{{Field: field, Description: fmt.Sprintf(format, args...)}}
		return err
	}
	input, err := object(p.GetInput())
	if err != nil {
		return nil, bad("start.input", "%v", err)
	}
	if len(input) > MaxInputBytes {
		return nil, bad("start.input", "%d bytes are more than the %d allowed; pass a reference to large data instead", len(input), MaxInputBytes)
	}
	if p.GetService().GetExecutionType() == "" {
		return nil, bad("start.service.execution_type", "is missing")
	}
	for _, d := range [...]struct {
		field string
		value *durationpb.Duration
	}{{"start.timeout", p.GetTimeout()}, {"start.lease", p.GetLease()}} {
		if d.value != nil && (d.value.CheckValid() != nil || d.value.AsDuration() < 0) {
			return nil, bad(d.field, "is not a duration")
		}
	}
	service, err := h.newService(p.GetService())
	if err != nil {
		return nil, bad("start.service", "%v", err)
	}
	config, err := h.objects.configured(p.GetOperation().GetConfig())
	if err != nil {
		return nil, bad("start.operation.config", "%v", err)
	}
	return &Job{
		ID: p.GetId(), RunID: p.GetRunId(), StepPath: p.GetStepPath(), Attempt: int(p.GetAttempt()),
		IdempotencyKey: p.GetIdempotencyKey(), Epoch: p.GetEpoch(), Service: *service,
		Operation:    Operation{Name: p.GetOperation().GetName(), Config: config},
		Input:        input,
		Timeout:      min(cmp.Or(p.GetTimeout().AsDuration(), longestTimeout), longestTimeout),
		ReservedCost: p.ReservedCostUsd, //nolint:protogetter // absent is not zero
		Subject:      p.GetSubject(), TenantID: p.GetTenantId(), CorrelationID: p.GetCorrelationId(),
	}, nil
}

func (h *Handler) newService(p *runnerv1.Service) (*Service, error) {
	config, err := h.objects.configured(p.GetRunnerConfig())
	if err != nil {
		return nil, fmt.Errorf("runner_config: %w", err)
	}
	policy, err := h.objects.configured(p.GetSecurityPolicy())
	if err != nil {
		return nil, fmt.Errorf("security_policy: %w", err)
	}
	return &Service{Name: p.GetName(), ExecutionType: p.GetExecutionType(), Config: config, Policy: policy}, nil
}

// configured is [object] of a configuration, which comes with each call of a service.
func (o *objects) configured(raw []byte) (json.RawMessage, error) {
	o.mu.RLock()
	_, known := o.seen[string(raw)]
	o.mu.RUnlock()
	if known {
		return raw, nil
	}
	checked, err := object(raw)
	if err == nil && len(checked) == len(raw) && len(raw) <= mostRemembered {
		o.mu.Lock()
		defer o.mu.Unlock()
		if o.seen == nil || len(o.seen) >= objectsRemembered {
			o.seen = map[string]struct{}{} // those that are in use come again
		}
		o.seen[string(raw)] = struct{}{}
	}
	return checked, err
}

// objects are configurations that were found to be objects.
type objects struct {
	mu   sync.RWMutex
	seen map[string]struct{}
}

const (
	objectsRemembered = 1000
	// mostRemembered is the longest that is kept, in bytes.
	mostRemembered = 4 << 10
)

// object checks that raw is a JSON object; empty and null count as {}.
func object(raw []byte) (json.RawMessage, error) {
	raw = bytes.TrimSpace(raw)
	if len(raw) == 0 || string(raw) == "null" {
		return json.RawMessage(`{}`), nil
	}
	if !json.Valid(raw) {
		return nil, fmt.Errorf("not valid JSON")
	}
	if raw[0] != '{' {
		return nil, fmt.Errorf("must be a JSON object")
	}
	return raw, nil
}

// finished makes the answer of an attempt, bounded and masked. cause is why the context
// ended, nil if it did not: it goes over what the runner says, which saw only the effect.
func (j *job) finished(res *Result, err, cause error, took time.Duration, identity string) (*runnerv1.ExecuteResponse, *fault.Error) {
	if res == nil {
		if err == nil {
			err = fault.New(fault.Internal, "the runner gave no result")
		}
		res = &Result{}
	}
	failure := fault.From(cmp.Or(cause, err, res.Err))
	final, fin := finishedEvent()
	fin.Unused, fin.LimitsChanged, fin.Closes = res.Unused || res.LimitsChanged, res.LimitsChanged, res.Closes && failure != nil && failure.RetryAfter > 0
	fin.Usage, fin.Security = &runnerv1.ResourceUsage{}, &runnerv1.SecurityContext{}
	if res.Usage != nil {
		fin.Usage = copyUsage(res.Usage)
	}
	if fin.GetUsage().DurationSeconds == nil {
		fin.Usage.DurationSeconds = new(took.Seconds())
	}
	if res.Security != nil {
		fin.Security = copySecurity(res.Security)
	}
	for _, check := range fin.GetSecurity().GetChecks() {
		check.Rule = j.sink.clean(check.GetRule(), maxDetailText)
		check.Subject = j.sink.clean(check.GetSubject(), maxDetailText)
		check.Detail = j.sink.clean(check.GetDetail(), maxDetailText)
		for _, change := range check.GetAllowedBy() {
			j.cleanChange(change)
		}
	}
	fin.Security.Subject, fin.Security.TenantId, fin.Security.Runner = j.job.Subject, j.job.TenantID, identity
	if failure == nil {
		fin.Output, failure = j.output(res.Output)
	}
	if failure != nil {
		fin.Error = failure.ToProto()
		fin.Error.Message = j.sink.clean(failure.Message, maxErrorText)
		if failure.RetryAfter > 0 {
			fin.RetryAfter = durationpb.New(failure.RetryAfter)
		}
	}
	return final, failure
}

// cleanChange masks the texts of a change, as those of the check that it belongs to.
func (j *job) cleanChange(change *runnerv1.PolicyChange) {
	change.Key = j.sink.clean(change.GetKey(), maxDetailText)
	for _, v := range append([]*structpb.Value{change.GetSet()}, change.GetAdd()...) {
		if text, ok := v.GetKind().(*structpb.Value_StringValue); ok {
			text.StringValue = j.sink.clean(text.StringValue, maxDetailText)
		}
	}
}

func (j *job) output(raw json.RawMessage) ([]byte, *fault.Error) {
	if len(bytes.TrimSpace(raw)) == 0 {
		return []byte("null"), nil
	}
	if len(raw) > MaxOutputBytes {
		return nil, fault.New(fault.ResourceExceeded,
			"the output has %d bytes, more than the %d allowed; write large data to a store and return a reference to it", len(raw), MaxOutputBytes)
	}
	if !json.Valid(raw) {
		return nil, fault.New(fault.Internal, "the runner gave an output that is not JSON")
	}
	out, err := j.sink.mask.value(raw)
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, "the output could not be searched for secrets")
	}
	if len(out) > MaxOutputBytes { // it was written anew, and some letters take more room then
		return nil, fault.New(fault.ResourceExceeded,
			"the output has %d bytes once secrets are masked, more than the %d allowed; write large data to a store and return a reference to it", len(out), MaxOutputBytes)
	}
	return out, nil
}

func droppedText(n int64) string {
	return fmt.Sprintf("%d log lines were dropped: the log of an attempt is bounded to %d lines and %d MiB", n, MaxLogLines, MaxLogBytes>>20)
}

func timeoutText(d time.Duration) string {
	text := d.String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return "the attempt took longer than its timeout of " + text
}

// timedOut is why an attempt ends that took longer than its timeout. Its error is made where it is needed: of few attempts.
type timedOut time.Duration

func (t timedOut) fault() *fault.Error {
	return fault.New(fault.Timeout, "%s", timeoutText(time.Duration(t)))
}

func (t timedOut) Error() string { return t.fault().Error() }

// As lets it be taken for the error that it stands for.
func (t timedOut) As(target any) bool {
	f, ok := target.(**fault.Error)
	if ok {
		*f = t.fault()
	}
	return ok
}

// limited is the context of an attempt that has a deadline, whose timer is not begun with it. As it is the job's own context
// that ends, what is derived from this one says Canceled where this one says DeadlineExceeded; the cause is the same.
type limited struct {
	context.Context

	deadline time.Time
}

func (l *limited) Deadline() (time.Time, bool) { return l.deadline, true }

func (l *limited) Err() error {
	err := l.Context.Err()
	if err != nil && errors.As(context.Cause(l.Context), new(timedOut)) {
		return context.DeadlineExceeded
	}
	return err
}
