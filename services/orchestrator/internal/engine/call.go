package engine

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"time"

	"github.com/google/uuid"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/plan"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// Outcome is how an attempt ended.
type Outcome struct {
	// Output is a JSON value where Err is nil.
	Output   json.RawMessage
	Err      *fault.Error
	Usage    *runnerv1.ResourceUsage
	Security *runnerv1.SecurityContext
	// Unknown says that nobody can tell whether the call took effect.
	Unknown bool
	// Unused says that nothing was called, so that slots of limits are given back.
	Unused bool
	// Closes says that nobody is to call the service before RetryAfter of Err has passed.
	Closes bool
	// Again says that this counts as no attempt, and that the call is to be made once more with slots of its own;
	// LimitsChanged that the runner has to be asked for its limits before.
	Again, LimitsChanged bool
	// Queued is how long it was until a runner began the attempt; 0 where none did.
	Queued time.Duration
	// value is what Output was read as when it was checked.
	value any
	// took is how long it was in all; the engine measures it.
	took time.Duration
}

// call carries out a call, or takes its recorded result, and then what follows it.
func (r *run) call(ctx context.Context, n *plan.Call, f *frame) error {
	key := f.of(n)
	job, err := r.job(ctx, n, f, key)
	if err != nil {
		return err
	}
	res := &result{err: job.Err}
	switch {
	case job.Status == store.Completed && job.OutputValue != nil:
		res.output = job.OutputValue
	case job.Status == store.Completed:
		if res.output, err = decode(job.Output); err != nil {
			return fault.Wrap(err, fault.Internal, "%s: the recorded output is damaged", key)
		}
	case res.err == nil:
		res.err = fault.New(fault.Internal, "the job ended as %s without an error", job.Status)
	}
	r.mu.Lock()
	r.results[key] = res
	r.mu.Unlock()
	if job.Status == store.Cancelled {
		// Nobody handles a cancelled call: the run was cancelled, or another branch failed and,
		// where this is a replay, fails again.
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		return &siblingError{}
	}
	if res.err == nil {
		return r.sequence(ctx, n.OnSuccess, f)
	}
	if n.Handled {
		return r.sequence(ctx, n.OnFailure, f)
	}
	failed := *res.err
	failed.Message = fmt.Sprintf("%s (%s.%s): %s", key, n.Service.Name, n.Operation.Name, res.err.Message)
	return &failed
}

// job returns the job of a call once it has ended.
func (r *run) job(ctx context.Context, n *plan.Call, f *frame, key string) (*store.Job, error) {
	r.mu.Lock()
	old := r.jobs[key]
	retries := r.state.Retries
	r.mu.Unlock()
	if old != nil && old.Adopted && old.Status == store.Pending {
		return r.adopt(ctx, n, f, key, old)
	}
	if old != nil {
		again := old.Generation < retries && (old.Status == store.Cancelled || (old.Status == store.Failed && !n.Handled))
		if old.Status.Final() && !again {
			return old, nil
		}
		if !old.Status.Final() {
			job := *old
			if len(job.Input) == 0 {
				job.Input = json.RawMessage("{}")
			}
			return r.resumeJob(ctx, n, &job)
		}
	}
	job, err := r.newJob(n, f, key, old)
	if err != nil {
		return nil, err
	}
	if job.Status.Final() {
		r.noteJob(job, true)
		r.refusedJob(ctx, job)
		return job, r.flush(ctx)
	}
	r.noteJob(job, true)
	return r.attempts(ctx, n, job)
}

// refusedJob tells of a job that ended without an attempt.
func (r *run) refusedJob(ctx context.Context, job *store.Job) {
	_, span := r.startCall(ctx, job)
	endCall(span, job)
	r.e.jobEnded(ctx, job, 0)
}

// maxAttempts bounds what a client may write into a row.
const maxAttempts = 1_000_000

// adopt makes a job that a client inserted by SQL the job of a call.
func (r *run) adopt(ctx context.Context, n *plan.Call, f *frame, key string, row *store.Job) (*store.Job, error) {
	job, err := r.newJob(n, f, key, nil)
	if err != nil {
		return nil, err
	}
	job.ID, job.CreatedAt, job.Adopted = row.ID, row.CreatedAt, true
	job.IdempotencyKey = cmp.Or(row.IdempotencyKey, row.ID)
	job.EntityType, job.EntityPK = row.EntityType, row.EntityPK
	if row.Timeout > 0 {
		job.Timeout = row.Timeout
	}
	if row.MaxAttempts > 0 {
		job.MaxAttempts = min(row.MaxAttempts, maxAttempts)
	}
	r.noteJob(job, true)
	if job.Status.Final() {
		r.refusedJob(ctx, job)
		return job, r.flush(ctx)
	}
	job.Attempts += min(max(row.Attempts, 0), maxAttempts)
	return r.attempts(ctx, n, job)
}

// newJob makes the job of a call. One whose input is wrong has failed already.
func (r *run) newJob(n *plan.Call, f *frame, key string, old *store.Job) (*store.Job, error) {
	id, err := uuid.NewV7()
	if err != nil {
		return nil, fmt.Errorf("make a job id: %w", err)
	}
	now := r.e.Clock.Now()
	retries := 0
	if n.MaxRetries != nil {
		retries = *n.MaxRetries
	} else {
		retries = r.e.Dispatcher.DefaultMaxRetries(n.Service.ExecutionType)
	}
	timeout := n.Timeout
	if timeout <= 0 {
		timeout = DefaultTimeout
	}
	r.mu.Lock()
	state := r.state
	many := len(r.jobs) >= MaxJobs
	r.mu.Unlock()
	if many {
		return nil, fault.New(fault.Validation, "%s: a run makes at most %d calls", key, MaxJobs)
	}
	job := &store.Job{
		ID: id.String(), RunID: r.id, StepPath: key, Generation: state.Retries, IdempotencyKey: id.String(),
		Service: n.Service.Name, Operation: n.Operation.Name, ExecutionType: n.Service.ExecutionType,
		RunnerConfig: n.RunnerConfig, Status: store.Running, Attempts: 1, MaxAttempts: 1 + max(0, retries), Timeout: timeout,
		TenantID: state.TenantID, TriggeredBy: state.Subject, CorrelationID: state.CorrelationID,
		EntityType: state.Entity, EntityPK: state.EntityID, CreatedAt: now, StartedAt: now,
	}
	// A call of which nobody knows whether it took effect keeps its key, so that the target can tell.
	if old != nil && unknown(old.Err) {
		job.IdempotencyKey = old.IdempotencyKey
	}
	refuse := func(err *fault.Error) (*store.Job, error) {
		job.Status, job.Err, job.Attempts, job.CompletedAt = store.Failed, err, 0, now
		job.StartedAt = time.Time{}
		return job, nil
	}
	var input any = map[string]any{}
	if n.Input != nil {
		if input, err = r.eval(n.Input, f); err != nil {
			return refuse(fault.Wrap(err, fault.Validation, "input: %v", err))
		}
	}
	if input == nil {
		input = map[string]any{}
	}
	object, ok := input.(map[string]any)
	if !ok {
		return refuse(fault.New(fault.Validation, "input has to be an object and is %s", kind(input)))
	}
	if n.Operation.Input != nil {
		object = n.Operation.Input.ApplyDefaults(object)
	}
	if job.Input, err = json.Marshal(object); err != nil {
		return refuse(fault.Wrap(err, fault.Validation, "the input is not JSON: %v", err))
	}
	if len(job.Input) > MaxPayload {
		size := len(job.Input)
		job.Input = nil
		return refuse(fault.New(fault.Validation, "the input has %d bytes; at most %d are sent", size, MaxPayload))
	}
	if depth(job.Input) > MaxNesting {
		job.Input = nil
		return refuse(fault.New(fault.Validation, "the input is nested deeper than %d", MaxNesting))
	}
	if holdsNUL(job.Input) {
		job.Input = nil
		return refuse(fault.New(fault.Validation, "the input holds the character U+0000, which is not kept"))
	}
	if n.Operation.Input != nil {
		if vs := n.Operation.Input.Validate(object); len(vs) > 0 {
			e := fault.New(fault.Validation, "input: %s", vs[0].String())
			for _, v := range vs {
				e.Violations = append(e.Violations, fault.Violation{Field: "input." + v.Path, Description: v.Message})
			}
			if len(vs) > 1 {
				e.Message += fmt.Sprintf(" (and %d more)", len(vs)-1)
			}
			return refuse(e)
		}
	}
	return job, nil
}

// holdsNUL says whether a text in JSON has a character that PostgreSQL does not hold.
func holdsNUL(raw json.RawMessage) bool {
	nul := []byte(`\u0000`)
	return bytes.Contains(raw, nul) && bytes.Contains(bytes.ReplaceAll(raw, []byte(`\\`), nil), nul)
}

// beyondFloat finds a number that no double holds, and where it is: the API has no other numbers.
func beyondFloat(value any) (at string, number json.Number) {
	switch value := value.(type) {
	case json.Number:
		if _, err := value.Float64(); err != nil {
			return "", value
		}
	case []any:
		for i, e := range value {
			if at, number := beyondFloat(e); number != "" {
				return fmt.Sprintf("[%d]%s", i, at), number
			}
		}
	case map[string]any:
		for name, e := range value {
			if at, number := beyondFloat(e); number != "" {
				return "." + name + at, number
			}
		}
	}
	return "", ""
}

// unknown says whether an error leaves open if the call took effect.
func unknown(e *fault.Error) bool {
	if e == nil {
		return false
	}
	switch e.Code {
	case fault.Timeout, fault.Unavailable, fault.Cancelled, fault.Internal:
		return true
	case fault.Validation, fault.PolicyViolation, fault.RateLimited, fault.BudgetExceeded,
		fault.ResourceExceeded, fault.RemoteError, fault.Disabled:
	}
	return false
}

// resumeJob goes on with a job that had begun before this walk. The attempt that was in
// flight may have taken effect; it is repeated with the same key.
func (r *run) resumeJob(ctx context.Context, n *plan.Call, job *store.Job) (*store.Job, error) {
	now := r.e.Clock.Now()
	if job.NextAttemptAt.After(now) {
		if err := r.doze(ctx, job.NextAttemptAt.Sub(now), job); err != nil {
			return r.ended(ctx, job, err, nil)
		}
	} else if job.NextAttemptAt.IsZero() || !r.limited(ctx, n) {
		job.Attempts++
	}
	job.NextAttemptAt, job.Err = time.Time{}, nil
	// What this job was at before may go on for a moment yet, without this orchestrator.
	r.note(func(rec *store.Record) {
		rec.Ends = append(rec.Ends, orphaned(job))
	})
	r.noteJob(job, false)
	return r.attempts(ctx, n, job)
}

// attempts makes the job's attempts until one ends it. What was noted before the first is
// durable before it begins.
func (r *run) attempts(ctx context.Context, n *plan.Call, job *store.Job) (*store.Job, error) {
	ctx, span := r.startCall(ctx, job)
	usage := restoreUsage(job)
	defer func() {
		if job.Status.Final() {
			endCall(span, job)
			r.e.jobEnded(ctx, job, usage.GetCostUsd())
		}
	}()
	changed, firstAgain := false, time.Time{}
	for again := 0; ; {
		slot, refused, err := r.admission(ctx, n, job, changed)
		if err != nil {
			return r.ended(ctx, job, err, nil)
		}
		if refused != nil && !refused.Retryable {
			job.Status, job.Err, job.CompletedAt, job.NextAttemptAt = store.Failed, refused, r.e.Clock.Now(), time.Time{}
			job.Attempts--
			refused.Attempts = job.Attempts
			r.noteJob(job, false)
			return job, nil
		}
		if r.e.drain.Err() != nil {
			r.giveBack(ctx, job, slot)
			return nil, ErrHandBack
		}
		if r.e.disabled(job.ExecutionType) {
			slot.end(r, &Outcome{Unused: true})
			return r.ended(ctx, job, errDisabled, nil)
		}
		snapshot := *job
		out := &Outcome{Err: refused, Unused: true}
		if refused == nil {
			out = r.dispatch(ctx, n, &snapshot, slot.reserved())
			dropAbsurd(out.Usage)
		}
		slot.end(r, out)
		if out.Unused && out.Err != nil && out.Err.Code == fault.Disabled {
			return r.ended(ctx, job, errDisabled, nil)
		}
		if changed = out.LimitsChanged; out.Again && context.Cause(ctx) == nil {
			if again == 0 {
				firstAgain = r.e.Clock.Now().Add(-out.took)
			}
			if again++; again < mostAgain || out.Unused && !changed && r.e.Clock.Now().Sub(firstAgain) < longestAgain {
				continue
			}
		}
		again = 0
		usage = addUsage(usage, out.Usage, out.took, job.Attempts)
		keepUsage(job, usage)
		r.denied(ctx, n, job, out)
		if out.Security != nil {
			keepSecurity(job, out.Security)
		}
		if out.Err == nil {
			job.Status, job.Err, job.CompletedAt = store.Completed, nil, r.e.Clock.Now()
			job.Output, job.OutputValue = out.Output, out.value
			r.noteJob(job, false)
			return job, nil
		}
		out.Err.Attempts = job.Attempts
		out.Err.Message = clip(out.Err.Message, maxMessage)
		if cause := context.Cause(ctx); cause != nil {
			return r.ended(ctx, job, cause, out.Err)
		}
		if !out.Err.Retryable || job.Attempts >= job.MaxAttempts {
			job.Status, job.Err, job.CompletedAt = store.Failed, out.Err, r.e.Clock.Now()
			r.noteJob(job, false)
			return job, nil
		}
		r.e.Observer.Retried(job.ExecutionType, out.Err.Code)
		pause := backoff(n.Retry.BackoffFactor, job.Attempts, out.Err.RetryAfter)
		r.log(&snapshot, 0, "runner", fmt.Sprintf("attempt %d failed: %s; the next one begins in %s", job.Attempts, out.Err, pause.Round(time.Millisecond)), r.e.Clock.Now())
		job.Attempts++
		job.Err, job.NextAttemptAt = out.Err, r.e.Clock.Now().Add(pause)
		r.noteJob(job, false)
		if err := r.flush(ctx); err != nil {
			return r.ended(ctx, job, err, out.Err)
		}
		if err := r.doze(ctx, pause, job); err != nil {
			return r.ended(ctx, job, err, out.Err)
		}
		job.NextAttemptAt, job.Err = time.Time{}, nil
		if slot != nil {
			r.noteJob(job, false) // the record that takes the slot says that the attempt begins
		}
	}
}

// sink takes the lines of an attempt.
func (r *run) sink(job *store.Job) LogSink {
	return func(line int64, stream, text string, at time.Time) { r.log(job, line, stream, text, at) }
}

func (r *run) epoch() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.state.Epoch
}

// ended is the end of a job before its next attempt: cancelled because its walk ends, unless the run is handed back, or failed
// because there may be none.
func (r *run) ended(ctx context.Context, job *store.Job, cause error, err *fault.Error) (*store.Job, error) {
	if asked := context.Cause(ctx); asked != nil {
		cause = asked
	}
	r.mu.Lock()
	lost := r.lost
	r.mu.Unlock()
	if lost != nil || errors.Is(cause, ErrHandBack) {
		return nil, ErrHandBack
	}
	if errors.Is(cause, errDisabled) {
		job.Attempts-- // this one is not made
		job.Status, job.CompletedAt, job.NextAttemptAt, job.Err = store.Failed, r.e.Clock.Now(), time.Time{}, DisabledError(job.ExecutionType)
		job.Err.Attempts = job.Attempts
		r.noteJob(job, false)
		return job, nil
	}
	job.Status, job.CompletedAt = store.Cancelled, r.e.Clock.Now()
	job.Err = fault.New(fault.Cancelled, "%s", cause.Error())
	if err != nil {
		job.Err.Attempts = err.Attempts
	}
	r.noteJob(job, false)
	return job, nil
}

// checkOutput reads what a call gave.
func checkOutput(n *plan.Call, output json.RawMessage) (value any, bad *fault.Error) {
	if len(output) > MaxPayload {
		return nil, fault.New(fault.Validation, "the output has %d bytes; at most %d are kept", len(output), MaxPayload)
	}
	if depth(output) > MaxNesting {
		return nil, fault.New(fault.Validation, "the output is nested deeper than %d", MaxNesting)
	}
	value, err := decode(output)
	if err != nil {
		return nil, fault.Wrap(err, fault.Validation, "output: %v", err)
	}
	if at, number := beyondFloat(value); number != "" {
		return nil, fault.New(fault.Validation, "output%s: %s is beyond the numbers that can be told from infinity; send it as a string", at, clip(string(number), 40))
	}
	if n.Operation.Output == nil {
		return value, nil
	}
	vs := n.Operation.Output.Validate(value)
	if len(vs) == 0 {
		return value, nil
	}
	e := fault.New(fault.Validation, "output: %s", vs[0].String())
	if len(vs) > 1 {
		e.Message += fmt.Sprintf(" (and %d more)", len(vs)-1)
	}
	return nil, e
}

// backoff is the pause before the attempt after n: exponential with full jitter, and never
// shorter than the target asked for.
// https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
func backoff(factor float64, n int, retryAfter time.Duration) time.Duration {
	if factor < 1 {
		factor = 2
	}
	ceiling := float64(time.Second) * math.Pow(factor, float64(n-1))
	if ceiling > float64(MaxBackoff) || math.IsNaN(ceiling) {
		ceiling = float64(MaxBackoff)
	}
	d := time.Duration(rand.Float64() * ceiling) //nolint:gosec // jitter needs no secrecy
	return max(d, min(retryAfter, MaxRetryAfter))
}
