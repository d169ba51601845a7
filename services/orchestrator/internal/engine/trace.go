package engine

import (
	"context"
	"log/slog"

	"github.com/google/uuid"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/telemetry"
	"github.com/specql/mesh/services/orchestrator/internal/plan"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// The spans of runs and jobs have ids that follow from those of the run and the job, and begin
// when those did. Whichever orchestrator writes the end of one exports its span, once: so a run
// that changes hands is one span, and what the walks before it exported lies below it.

// startTrace begins the run's span, below the span that its creation belongs to. asked is the
// context of whoever asked for the run or its retry. Without a provider that records, calls
// carry the run's trace all the same: the trace of its creation, or one whose id is the run's.
func (r *run) startTrace(asked context.Context) {
	r.ctx = telemetry.With(r.ctx, slog.String("run_id", r.id))
	if r.state.TenantID != "" {
		r.ctx = telemetry.With(r.ctx, slog.String("tenant_id", r.state.TenantID))
	}
	id, err := uuid.Parse(r.id)
	if err != nil {
		return
	}
	self := telemetry.IDs(id, r.state.Retries)
	ctx, parent := r.ctx, telemetry.ParseTraceparent(r.state.Traceparent)
	if parent.IsValid() {
		ctx = trace.ContextWithRemoteSpanContext(ctx, parent)
	}
	if r.e.TracerProvider == nil {
		if !parent.IsValid() {
			ctx = trace.ContextWithSpanContext(ctx, self)
		}
		r.ctx = ctx
		return
	}
	began := r.state.CreatedAt
	options := []trace.SpanStartOption{trace.WithAttributes(
		telemetry.RunID.String(r.id), telemetry.TenantID.String(r.state.TenantID),
		telemetry.Entity.String(clip(r.state.Entity, maxAttribute)), telemetry.Action.String(clip(r.state.Action, maxAttribute)),
		attribute.Int64("specql.run.epoch", r.state.Epoch),
	)}
	if r.state.Retries > 0 {
		// The first try and the one who asked for another are over, or lie in other traces.
		began = r.e.Clock.Now()
		before := telemetry.IDs(id, r.state.Retries-1)
		if parent.IsValid() {
			before = before.WithTraceID(parent.TraceID())
		}
		options = append(options, trace.WithLinks(trace.LinkFromContext(asked), trace.Link{SpanContext: before}))
	}
	ctx, r.span = telemetry.StartAs(ctx, r.e.TracerProvider, self, "run", append(options, trace.WithTimestamp(began))...)
	r.ctx = ctx
	if r.state.Retries == 0 && r.state.StartedAt.After(r.state.CreatedAt) {
		_, queue := telemetry.Start(ctx, "queue", trace.WithTimestamp(r.state.CreatedAt))
		queue.End(trace.WithTimestamp(r.state.StartedAt))
	}
}

// endTrace ends the run's span once its end is durable.
func (r *run) endTrace(end *store.RunChange) {
	if !r.span.IsRecording() {
		return
	}
	if end.Err != nil {
		telemetry.Fail(r.span, end.Err.Code)
	}
	r.span.SetAttributes(attribute.String("specql.status", string(end.Status)))
	r.span.End(trace.WithTimestamp(end.CompletedAt))
}

// startCall begins the span of a job.
func (r *run) startCall(ctx context.Context, job *store.Job) (context.Context, trace.Span) {
	if !trace.SpanFromContext(ctx).IsRecording() {
		return ctx, trace.SpanFromContext(context.Background())
	}
	id, err := uuid.Parse(job.ID)
	if err != nil {
		return ctx, trace.SpanFromContext(context.Background())
	}
	return telemetry.StartAs(ctx, r.e.TracerProvider, telemetry.IDs(id, 0), "call", trace.WithTimestamp(job.CreatedAt), trace.WithAttributes(
		telemetry.RunID.String(r.id), telemetry.JobID.String(job.ID), telemetry.TenantID.String(job.TenantID),
		telemetry.StepPath.String(clip(job.StepPath, maxAttribute)), telemetry.Service.String(job.Service),
		telemetry.Operation.String(job.Operation), telemetry.ExecutionType.String(job.ExecutionType),
	))
}

// endCall ends the span of a job that has ended.
func endCall(span trace.Span, job *store.Job) {
	if !span.IsRecording() {
		return
	}
	if job.Err != nil {
		telemetry.Fail(span, job.Err.Code)
	}
	span.SetAttributes(attribute.String("specql.status", string(job.Status)))
	span.End(trace.WithTimestamp(job.CompletedAt))
}

// dispatch carries out one attempt, in a span of its own.
func (r *run) dispatch(ctx context.Context, n *plan.Call, job *store.Job, reserved *float64) *Outcome {
	ctx, span := telemetry.Start(ctx, "attempt")
	defer span.End()
	if span.IsRecording() {
		span.SetAttributes(telemetry.RunID.String(r.id), telemetry.JobID.String(job.ID), telemetry.TenantID.String(job.TenantID), telemetry.Attempt.Int(job.Attempts))
	}
	r.e.Observer.AttemptBegan(job.ExecutionType)
	began := r.e.Clock.Now()
	out := r.e.Dispatcher.Execute(ctx, &Call{Job: job, Node: n, Epoch: r.epoch(), Subject: job.TriggeredBy, Reserved: reserved, Disabled: r.e.whenDisabled(job.ExecutionType)}, r.sink(job))
	out.took = r.e.Clock.Now().Sub(began)
	r.e.Observer.AttemptEnded(ctx, job.ExecutionType, out.Queued, out.took)
	if out.Err == nil {
		telemetry.Enter(ctx, "output_check")
		_, check := telemetry.Start(ctx, "output check")
		out.value, out.Err = checkOutput(n, out.Output)
		check.End()
	}
	telemetry.Enter(ctx, "orchestrator")
	if out.Err != nil {
		telemetry.Fail(span, out.Err.Code)
	}
	return out
}

// endStep exports the span of a step that waited, once that is over.
func (r *run) endStep(ctx context.Context, s *store.Step) {
	_, span := telemetry.Start(ctx, "step", trace.WithTimestamp(s.StartedAt), trace.WithAttributes(
		telemetry.RunID.String(r.id), telemetry.StepPath.String(clip(s.StepPath, maxAttribute)), telemetry.StepKind.String(s.Kind),
	))
	if !span.IsRecording() {
		return
	}
	if s.Status != store.Completed {
		code := fault.Cancelled
		if s.Err != nil {
			code = s.Err.Code
		}
		span.SetStatus(codes.Error, string(code))
	}
	span.End(trace.WithTimestamp(s.CompletedAt))
}

// maxAttribute bounds an attribute that clients can make long, in bytes.
const maxAttribute = 250
