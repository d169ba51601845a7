package runner

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/linger"
	"github.com/specql/mesh/pkg/telemetry"
)

const (
	defaultMaxConcurrency = 64
	defaultDrainTimeout   = 30 * time.Second
	// What ended is kept for a job that is sent again because its answer got lost.
	keptFor   = 30 * time.Second
	keptCount = 1000
	keptBytes = 64 << 20
	// The epoch of what is kept no longer is remembered for a caller that lost the job and
	// does not know it yet.
	epochFor   = 10 * time.Minute
	epochCount = 10_000
	// maxRuleLabels is how many rules of policies have series of their own.
	maxRuleLabels = 100
)

// Options say how a runner is served. The zero value works.
type Options struct {
	// MaxConcurrency is how many jobs may run at once; 64 if zero. More are refused.
	MaxConcurrency int
	Logger         *slog.Logger
	// Version of the program, for Describe.
	Version string
	// Registerer takes the metrics; none if nil.
	Registerer prometheus.Registerer
	// TracerProvider records what the runner does; nil records nothing.
	TracerProvider trace.TracerProvider
	// DrainTimeout is how long running jobs may go on after the end was asked for, before
	// they are handed back; 30 s if zero.
	DrainTimeout time.Duration
	// Identity names this runner in security contexts; the certificate's role or the
	// description's name, and the host, if empty.
	Identity string
}

// Handler is the gRPC service in front of a [JobRunner]. See runner.proto for what it does.
type Handler struct {
	runnerv1.UnimplementedRunnerServiceServer

	runner   JobRunner
	o        Options
	log      *slog.Logger
	types    []string // served; empty if the runner could not tell
	jobsDone *prometheus.CounterVec
	duration *prometheus.HistogramVec
	gauge    prometheus.Gauge
	refused  *prometheus.CounterVec
	denials  *prometheus.CounterVec
	rules    *telemetry.Label

	work sync.WaitGroup
	mu   sync.Mutex
	// jobs run or ended a short time ago, by id.
	jobs map[string]*job
	// kept are the ended ones among them, oldest first.
	kept      []*job
	keptBytes int
	// epochs of jobs that are kept no longer, by id; epochOrder has the oldest first.
	epochs     map[string]pastEpoch
	epochOrder []pastEpoch
	inFlight   int
	draining   bool
	// closing is closed when draining begins.
	closing chan struct{}
	holds   *linger.Queue[hold]
	objects objects
}

// pastEpoch is the epoch that a job had last.
type pastEpoch struct {
	id    string
	epoch int64
	at    time.Time
}

// Register puts a runner behind the RunnerService of a gRPC server. End the handler with
// Drain or Close.
func Register(s grpc.ServiceRegistrar, jr JobRunner, o Options) *Handler {
	if o.MaxConcurrency <= 0 {
		o.MaxConcurrency = defaultMaxConcurrency
	}
	h := &Handler{
		runner: jr, o: o, log: telemetry.OrDiscard(o.Logger), jobs: map[string]*job{}, epochs: map[string]pastEpoch{}, closing: make(chan struct{}),
		jobsDone: telemetry.Registered(o.Registerer, prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "specql_runner_jobs_total", Help: "Attempts that ended, by execution type and outcome: completed or the error's code.",
		}, []string{"execution_type", "outcome"})),
		duration: telemetry.Registered(o.Registerer, prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "specql_runner_job_duration_seconds", Help: "How long attempts took.",
			Buckets: prometheus.ExponentialBuckets(0.001, 4, 11),
		}, []string{"execution_type"})),
		gauge: telemetry.Registered[prometheus.Gauge](o.Registerer, prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "specql_runner_jobs_in_flight", Help: "Attempts that run now.",
		})),
		refused: telemetry.Registered(o.Registerer, prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "specql_runner_jobs_refused_total", Help: "Attempts that were not begun, by reason: full or draining.",
		}, []string{"reason"})),
		denials: telemetry.Registered(o.Registerer, prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "specql_runner_policy_denials_total", Help: "What policies forbade, by execution type and rule.",
		}, []string{"execution_type", "rule"})),
		rules: telemetry.NewLabel(maxRuleLabels),
	}
	h.holds = linger.New(quietFor, func(d hold) {
		if d.t.release(d.j) {
			h.release(d.j)
		}
	})
	for _, reason := range []string{"full", "draining"} {
		h.refused.WithLabelValues(reason) // there from the start, at 0
	}
	telemetry.Registered(o.Registerer, prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "specql_runner_capacity", Help: "How many attempts may run at once.",
	})).Set(float64(o.MaxConcurrency))
	name := "runner"
	if d, err := h.describe(context.Background()); err == nil {
		name = cmp.Or(d.Name, name)
		for _, t := range d.Types {
			h.types = append(h.types, t.Name)
		}
		slices.Sort(h.types)
	}
	if h.o.Identity == "" {
		h.o.Identity = identity(name)
	}
	runnerv1.RegisterRunnerServiceServer(s, h)
	return h
}

// identity is a name and the host.
func identity(name string) string {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	return name + "@" + host
}

// closes tells whether draining has begun.
func (h *Handler) closes() bool {
	select {
	case <-h.closing:
		return true
	default:
		return false
	}
}

// InFlight is how many jobs run now.
func (h *Handler) InFlight() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.inFlight
}

// Describe implements RunnerService.
func (h *Handler) Describe(ctx context.Context, _ *runnerv1.DescribeRequest) (*runnerv1.DescribeResponse, error) {
	d, err := h.describe(ctx)
	if err != nil {
		return nil, fault.ToStatus(err).Err()
	}
	resp := &runnerv1.DescribeResponse{
		Name: d.Name, Version: h.o.Version, Now: timestamppb.Now(),
		Capacity: int32(h.o.MaxConcurrency), InFlight: int32(h.InFlight()), //nolint:gosec // small
	}
	types := slices.Clone(d.Types)
	slices.SortFunc(types, func(a, b Type) int { return strings.Compare(a.Name, b.Name) })
	for _, t := range types {
		resp.Types = append(resp.Types, &runnerv1.ExecutionType{
			Name: t.Name, ConfigSchema: t.ConfigSchema, PolicySchema: t.PolicySchema, OperationSchema: t.OperationSchema,
			DefaultMaxRetries: int32(t.DefaultMaxRetries), //nolint:gosec // small
		})
	}
	for _, f := range d.Isolation {
		resp.Isolation = append(resp.Isolation, &runnerv1.IsolationFeature{Name: f.Name, Available: f.Available, Detail: f.Detail})
	}
	return resp, nil
}

func (h *Handler) describe(ctx context.Context) (d *Description, err error) {
	defer h.recovered(ctx, "Describe", &err)
	d, err = h.runner.Describe(ctx)
	if err == nil && d == nil {
		err = fault.New(fault.Internal, "the runner describes nothing")
	}
	return d, err
}

// Validate implements RunnerService.
func (h *Handler) Validate(ctx context.Context, req *runnerv1.ValidateRequest) (*runnerv1.ValidateResponse, error) {
	problems, err := h.validate(ctx, req)
	if err != nil {
		return nil, fault.ToStatus(err).Err()
	}
	resp := &runnerv1.ValidateResponse{}
	for _, p := range problems {
		resp.Problems = append(resp.Problems, &runnerv1.Problem{Path: p.Path, Message: p.Message, Mend: p.Mend, Warning: p.Warning})
	}
	return resp, nil
}

func (h *Handler) validate(ctx context.Context, req *runnerv1.ValidateRequest) (problems []Problem, err error) {
	defer h.recovered(ctx, "Validate", &err)
	s, err := h.newService(req.GetService())
	if err != nil {
		return nil, fault.New(fault.Validation, "service.%v", err)
	}
	if err := h.serves(s.ExecutionType); err != nil {
		return nil, err
	}
	for _, o := range req.GetOperations() {
		config, err := object(o.GetConfig())
		if err != nil {
			return nil, fault.New(fault.Validation, "operations.%s: %v", clip(o.GetName()), err)
		}
		s.Operations = append(s.Operations, Operation{Name: o.GetName(), Config: config})
	}
	if problems, err = h.runner.Validate(ctx, s); err != nil {
		return nil, err
	}
	return append(problems, unset(s.Config, problems)...), nil
}

// Limits implements RunnerService.
func (h *Handler) Limits(ctx context.Context, req *runnerv1.LimitsRequest) (*runnerv1.LimitsResponse, error) {
	limiter, ok := h.runner.(Limiter)
	if !ok {
		return nil, status.Error(codes.Unimplemented, "this runner has no limits that span replicas")
	}
	limits, err := h.limits(ctx, limiter, req)
	if err != nil {
		return nil, fault.ToStatus(err).Err()
	}
	resp := &runnerv1.LimitsResponse{}
	for _, l := range limits {
		resp.Limits = append(resp.Limits, &runnerv1.Limit{
			Key: l.Key, Window: durationpb.New(l.Window), MaxAttempts: l.MaxAttempts, MaxCostUsd: l.MaxCost, CostUsd: l.Cost, Budget: l.Budget, Rule: l.Rule,
			AttemptsPolicyKey: l.AttemptsKey, CostPolicyKey: l.CostKey, Ceiling: l.Ceiling,
		})
	}
	return resp, nil
}

func (h *Handler) limits(ctx context.Context, limiter Limiter, req *runnerv1.LimitsRequest) (limits []Limit, err error) {
	defer h.recovered(ctx, "Limits", &err)
	s, err := h.newService(req.GetService())
	if err != nil {
		return nil, fault.New(fault.Validation, "service.%v", err)
	}
	if err := h.serves(s.ExecutionType); err != nil {
		return nil, err
	}
	config, err := object(req.GetOperation().GetConfig())
	if err != nil {
		return nil, fault.New(fault.Validation, "operation: %v", err)
	}
	s.Operations = []Operation{{Name: req.GetOperation().GetName(), Config: config}}
	return limiter.Limits(ctx, s)
}

func (h *Handler) serves(executionType string) error {
	if len(h.types) == 0 || slices.Contains(h.types, executionType) {
		return nil
	}
	return fault.New(fault.Validation, "execution type %q is not served here, only %s", clip(executionType), strings.Join(h.types, ", "))
}

// recovered turns a panic of the runner into an error.
func (h *Handler) recovered(ctx context.Context, what string, err *error) {
	if p := recover(); p != nil {
		h.log.LogAttrs(ctx, slog.LevelError, "the runner panicked", slog.String("in", what),
			slog.String("panic", fmt.Sprint(p)), slog.String("stack", string(debug.Stack())))
		*err = fault.New(fault.Internal, "the runner panicked in %s; its log has the stack", what)
	}
}

// admission is a start, besides its job.
type admission struct {
	lease      time.Duration
	attachOnly bool
	// wake gets a token when there is something to say of the job.
	wake chan struct{}
	// quiet: events wait, and so does the lease's timer, until the job is released.
	quiet bool
}

// admit finds the job to attach to, or gives what runs it to its end, unless it is only to be attached to.
func (h *Handler) admit(ctx context.Context, asked *Job, a admission) (_ *job, _ *subscriber, run func(), _ error) {
	if err := h.serves(asked.Service.ExecutionType); err != nil {
		return nil, nil, nil, err
	}
	if asked.ID == "" {
		asked.ID = uuid.NewString()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.prune()
	if j, ok := h.jobs[asked.ID]; ok {
		trace.SpanFromContext(ctx).AddLink(trace.Link{SpanContext: j.span})
		sub, err := h.attach(j, asked, a)
		if sub != nil || err != nil {
			return j, sub, nil, err
		}
	}
	if past, ok := h.epochs[asked.ID]; ok && asked.Epoch < past.epoch {
		return nil, nil, nil, staleEpoch(asked, past.epoch)
	}
	switch {
	case a.attachOnly:
		return nil, nil, nil, status.Errorf(codes.NotFound, "job %s neither runs here nor ended here a short time ago", clip(asked.ID))
	case h.draining:
		h.refused.WithLabelValues("draining").Inc()
		return nil, nil, nil, fault.New(fault.Unavailable, "the runner is shutting down and takes no new jobs")
	case h.inFlight >= h.o.MaxConcurrency:
		h.refused.WithLabelValues("full").Inc()
		return nil, nil, nil, status.Errorf(codes.ResourceExhausted, "the runner is full: all %d places are taken", h.o.MaxConcurrency)
	}
	if j, ok := h.jobs[asked.ID]; ok {
		h.forget(j)
	}
	j := &job{job: asked, feed: &feed{}, epoch: asked.Epoch, running: true}
	j.sink = &sink{feed: j.feed, mask: &masker{}}
	// The job outlives the stream if it has a lease; it keeps the stream's trace.
	attrs := []slog.Attr{slog.String("run_id", asked.RunID), slog.String("job_id", asked.ID)}
	if asked.TenantID != "" {
		attrs = append(attrs, slog.String("tenant_id", asked.TenantID))
	}
	ctx, j.cancel = context.WithCancelCause(telemetry.With(context.WithoutCancel(ctx), attrs...))
	ctx, span := telemetry.Start(ctx, "job")
	if span.IsRecording() {
		span.SetAttributes(
			telemetry.RunID.String(asked.RunID), telemetry.JobID.String(asked.ID), telemetry.TenantID.String(asked.TenantID), telemetry.Attempt.Int(asked.Attempt),
			telemetry.Service.String(asked.Service.Name), telemetry.Operation.String(asked.Operation.Name), telemetry.ExecutionType.String(asked.Service.ExecutionType),
		)
	}
	j.span, j.phases = trace.SpanContextFromContext(ctx), telemetry.PhasesOf(ctx)
	h.jobs[asked.ID] = j
	h.inFlight++
	h.gauge.Inc()
	h.work.Add(1)
	now := time.Now()
	limited := &limited{ctx, now.Add(asked.Timeout)}
	j.lease, j.until, j.deadline = a.lease, now.Add(a.lease), limited.deadline
	if quiet := a.quiet && asked.Timeout > quietFor; !quiet {
		h.watch(j)
	}
	return j, j.feed.subscribe(a.wake, a.quiet, now), func() {
		defer span.End()
		h.run(limited, j, now)
	}, nil
}

// attach joins a stream to a job of the same id. Neither a subscriber nor an error means
// that the job is to run again.
func (h *Handler) attach(j *job, asked *Job, a admission) (*subscriber, error) {
	if asked.Epoch < j.epoch {
		return nil, staleEpoch(asked, j.epoch)
	}
	if !j.running {
		// A success is the job's result for good. A failure is the answer to its own
		// attempt alone: another attempt wants the work done again.
		if j.same(asked) && (j.ok || asked.Attempt == j.job.Attempt && asked.Epoch == j.epoch) {
			return j.feed.subscribe(a.wake, false, time.Time{}), nil
		}
		return nil, nil
	}
	if h.lapsed(j) {
		return nil, fault.New(fault.Unavailable, "job %s was given up and is being ended here; try again in a moment", clip(asked.ID))
	}
	if !j.same(asked) {
		return nil, status.Errorf(codes.FailedPrecondition, "job %s runs already, with another service, operation or input", clip(asked.ID))
	}
	if asked.Epoch > j.epoch {
		j.feed.refuse(status.Errorf(codes.Aborted, "epoch %d took the job over", asked.Epoch))
		j.epoch = asked.Epoch
	}
	h.hold(j, a.lease)
	return j.feed.subscribe(a.wake, false, time.Time{}), nil
}

// hold begins a job's lease. Without one the job lives as long as a stream follows it.
func (h *Handler) hold(j *job, lease time.Duration) {
	j.lease, j.until = lease, time.Now().Add(lease)
	switch {
	case lease <= 0:
		if j.lapse != nil {
			j.lapse.Stop()
		}
	case j.lapse != nil:
		j.lapse.Reset(lease)
	default:
		j.lapse = time.AfterFunc(lease, func() { h.lapse(j) })
	}
}

// release watches a job that has lasted for a while.
func (h *Handler) release(j *job) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if j.running {
		h.watch(j)
	}
}

// watch sets the timers of a job's lease and timeout, those that it has not.
func (h *Handler) watch(j *job) {
	if j.limit == nil {
		j.limit = time.AfterFunc(time.Until(j.deadline), func() { j.cancel(timedOut(j.job.Timeout)) })
	}
	if j.lapse == nil && j.lease > 0 {
		j.lapse = time.AfterFunc(time.Until(j.until), func() { h.lapse(j) })
	}
}

func (h *Handler) lapse(j *job) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lapsed(j)
}

// over is closed when the job has ended.
func (h *Handler) over(j *job) <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	if j.over == nil {
		j.over = make(chan struct{})
		if !j.running {
			close(j.over)
		}
	}
	return j.over
}

// renew begins the lease anew, and answers, if the stream may still speak for the job.
func (h *Handler) renew(j *job, sub *subscriber) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !j.running || !j.feed.follows(sub) || h.lapsed(j) {
		return
	}
	if j.lease > 0 {
		h.hold(j, j.lease)
	}
	j.feed.renewed(sub)
}

// lapsed tells whether nobody wants the job any more, and ends it if it has just come to
// that. The clock decides and not the timer alone: a process that was stopped may read a
// renewal before its timer fires, and that one may be as old as the stop was long.
func (h *Handler) lapsed(j *job) bool {
	if j.running && !j.abandoned && j.lease > 0 && !time.Now().Before(j.until) {
		j.abandoned = true
		j.cancel(fault.Wrap(errLapsed, fault.Unavailable,
			"the lease of %s lapsed: the orchestrator did not renew it in time, and the job was ended", j.lease))
	}
	return j.abandoned
}

func staleEpoch(asked *Job, owner int64) error {
	return status.Errorf(codes.FailedPrecondition, "epoch %d of job %s is over: epoch %d owns it", asked.Epoch, clip(asked.ID), owner)
}

// leave takes a stream off a job. A job with a lease runs on; any other ends with its last stream.
func (h *Handler) leave(j *job, sub *subscriber) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if last := j.feed.unsubscribe(sub); last && j.running && j.lease <= 0 && !j.abandoned {
		j.abandoned = true
		j.cancel(fault.New(fault.Cancelled, "the caller went away"))
	}
}

// run carries an attempt out.
func (h *Handler) run(ctx context.Context, j *job, start time.Time) {
	defer h.work.Done()
	defer j.cancel(nil)
	// What the runner does not divide itself is the work.
	telemetry.Enter(ctx, "remote")
	res, err := h.call(ctx, j)
	telemetry.Enter(ctx, "runner")
	cause := context.Cause(ctx)
	took := time.Since(start)
	j.sink.close()
	final, failure := j.finished(res, err, cause, took, h.o.Identity)
	fin := final.GetFinished()
	fin.HandedBack = errors.Is(cause, errHandedBack) || errors.Is(cause, errLapsed)

	outcome := "completed"
	if failure != nil {
		outcome = string(failure.Code)
		telemetry.Fail(trace.SpanFromContext(ctx), failure.Code)
		if failure.Code == fault.Internal {
			h.log.LogAttrs(ctx, slog.LevelError, "job failed", slog.String("service", j.job.Service.Name),
				slog.String("error", fin.GetError().GetMessage()), slog.String("cause", j.sink.clean(causeText(failure), maxErrorText)))
		}
	}
	if h.log.Enabled(ctx, slog.LevelDebug) {
		h.log.LogAttrs(ctx, slog.LevelDebug, "job ended", slog.String("service", j.job.Service.Name),
			slog.String("operation", j.job.Operation.Name), slog.String("outcome", outcome), slog.Duration("took", took))
	}
	telemetry.Count(ctx, h.jobsDone.WithLabelValues(h.typeLabel(j), outcome), 1)
	telemetry.Observe(ctx, h.duration.WithLabelValues(h.typeLabel(j)), took)
	for _, check := range fin.GetSecurity().GetChecks() {
		if !check.GetAllowed() {
			h.denials.WithLabelValues(h.typeLabel(j), h.rules.Value(check.GetRule())).Inc()
		}
	}

	// The place is free before the caller knows, who may use it at once.
	h.mu.Lock()
	h.inFlight--
	h.gauge.Dec()
	j.running, j.ok, j.endedAt = false, failure == nil, time.Now()
	for _, timer := range []*time.Timer{j.lapse, j.limit} {
		if timer != nil {
			timer.Stop()
		}
	}
	for _, phase := range j.phases.End() {
		fin.Phases = append(fin.Phases, &runnerv1.Phase{Name: phase.Name, Duration: durationpb.New(phase.Took)})
	}
	j.feed.finish(final)
	if j.over != nil {
		close(j.over)
	}
	j.keptSize = j.feed.size() + len(j.job.Input)
	h.kept, h.keptBytes = append(h.kept, j), h.keptBytes+j.keptSize
	if failure != nil && cause != nil && failure.Code != fault.Timeout {
		h.forget(j) // it was not the job that failed: sent again, it is to run
	}
	h.prune()
	h.mu.Unlock()
}

func (h *Handler) call(ctx context.Context, j *job) (res *Result, err error) {
	defer h.recovered(ctx, "Execute", &err)
	return h.runner.Execute(ctx, j.job, j.sink)
}

// typeLabel is the execution type, which [Handler.serves] made one of a few.
func (h *Handler) typeLabel(j *job) string {
	if len(h.types) == 0 {
		return "unknown"
	}
	return j.job.Service.ExecutionType
}

func causeText(f *fault.Error) string {
	if f.Cause == nil {
		return ""
	}
	return f.Cause.Error()
}

// prune drops what was kept long enough or is too much.
func (h *Handler) prune() {
	for len(h.kept) > 0 {
		oldest := h.kept[0]
		if len(h.kept) <= keptCount && h.keptBytes <= keptBytes && time.Since(oldest.endedAt) < keptFor {
			return
		}
		h.forget(oldest)
	}
}

// rememberEpoch keeps the epoch of a job that is kept no longer, and drops the oldest ones.
func (h *Handler) rememberEpoch(j *job) {
	now := time.Now()
	past := pastEpoch{id: j.job.ID, epoch: j.epoch, at: now}
	if old, ok := h.epochs[past.id]; ok {
		past.epoch = max(past.epoch, old.epoch)
	}
	if past.epoch > 0 { // the first has none before it
		h.epochs[past.id] = past
		h.epochOrder = append(h.epochOrder, past)
	}
	for len(h.epochOrder) > 0 {
		oldest := h.epochOrder[0]
		if len(h.epochOrder) <= epochCount && now.Sub(oldest.at) < epochFor {
			return
		}
		h.epochOrder = h.epochOrder[1:]
		if h.epochs[oldest.id] == oldest {
			delete(h.epochs, oldest.id)
		}
	}
}

func (h *Handler) forget(j *job) {
	switch i := slices.Index(h.kept, j); {
	case i == 0: // the usual one; the others need not be moved
		h.kept[0], h.kept = nil, h.kept[1:]
		h.keptBytes -= j.keptSize
	case i > 0:
		h.kept = slices.Delete(h.kept, i, i+1)
		h.keptBytes -= j.keptSize
	}
	if h.jobs[j.job.ID] == j {
		delete(h.jobs, j.job.ID)
		h.rememberEpoch(j)
	}
}

// What a job ends with that is to be run again and counts as no attempt.
var (
	// errHandedBack is why the jobs end that outlast a drain.
	errHandedBack = errors.New("handed back")
	// errLapsed is why the jobs end whose lease was not renewed. It was the orchestrator that
	// failed them, or what lies between, so that it costs them no attempt.
	errLapsed = errors.New("the lease lapsed")
)

// HandedBack tells whether a job was ended to be begun again elsewhere, by a runner that shuts down. What the
// work left outside of the process may go on then, for the runner that begins it again to go on with.
func HandedBack(ctx context.Context) bool { return errors.Is(context.Cause(ctx), errHandedBack) }

// Drain takes no new jobs and waits for the running ones. When ctx ends first they are
// cancelled as UNAVAILABLE, so that they are tried elsewhere, and Drain waits for their end.
func (h *Handler) Drain(ctx context.Context) {
	h.mu.Lock()
	first := !h.draining
	if first {
		h.draining = true
		close(h.closing)
	}
	h.mu.Unlock()
	if d, ok := h.runner.(Drainer); ok && first {
		d.Draining()
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.work.Wait()
	}()
	select {
	case <-done:
		return
	case <-ctx.Done():
	}
	h.mu.Lock()
	for _, j := range h.jobs {
		if j.running {
			j.cancel(fault.Wrap(errHandedBack, fault.Unavailable, "the runner is shutting down; the job is handed back"))
		}
	}
	h.mu.Unlock()
	<-done
}

// Close cancels all running jobs and waits for their end.
func (h *Handler) Close() {
	ended, cancel := context.WithCancelCause(context.Background())
	cancel(errors.New("closed"))
	h.Drain(ended)
}
