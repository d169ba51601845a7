package telemetry

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
)

// scope is the instrumentation scope of all spans that are made here.
const scope = "github.com/specql/mesh"

// flushWait is how long the last spans may take to be exported.
const flushWait = 5 * time.Second

// The attributes that spans and log lines have in common. Inputs, outputs, errors of targets
// and secrets are in no attribute.
const (
	RunID         = attribute.Key("specql.run.id")
	JobID         = attribute.Key("specql.job.id")
	TenantID      = attribute.Key("specql.tenant.id")
	Attempt       = attribute.Key("specql.attempt")
	StepPath      = attribute.Key("specql.step.path")
	StepKind      = attribute.Key("specql.step.kind")
	Service       = attribute.Key("specql.service")
	Operation     = attribute.Key("specql.operation")
	ExecutionType = attribute.Key("specql.execution_type")
	Entity        = attribute.Key("specql.entity")
	Action        = attribute.Key("specql.action")
	ErrorType     = attribute.Key("error.type")
)

// Tracing exports the spans of one service. Nil records nothing.
type Tracing struct{ provider *sdktrace.TracerProvider }

// NewTracing makes what the standard variables of OpenTelemetry ask for; nil where they ask for
// nothing. OTEL_EXPORTER_OTLP_ENDPOINT (or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, or
// OTEL_TRACES_EXPORTER=otlp) switches it on, OTEL_SDK_DISABLED=true or OTEL_TRACES_EXPORTER=none
// off. The error names the variable that is wrong. Failing exports are logged, at most once a minute.
func NewTracing(ctx context.Context, service, version string, log *slog.Logger) (*Tracing, error) {
	on, err := exported()
	if err != nil || !on {
		return nil, err
	}
	sampler, err := sampler(os.Getenv("OTEL_TRACES_SAMPLER"), os.Getenv("OTEL_TRACES_SAMPLER_ARG"))
	if err != nil {
		return nil, err
	}
	exporter, err := newExporter(ctx)
	if err != nil {
		return nil, err
	}
	about, err := resource.New(ctx,
		resource.WithAttributes(attribute.String("service.name", service), attribute.String("service.namespace", "specql"), attribute.String("service.version", version)),
		resource.WithHost(), resource.WithTelemetrySDK(), resource.WithFromEnv())
	if err != nil && !errors.Is(err, resource.ErrPartialResource) {
		return nil, fmt.Errorf("OTEL_RESOURCE_ATTRIBUTES: %w", errors.Join(err, exporter.Shutdown(ctx)))
	}
	otel.SetErrorHandler(&exportErrors{log: OrDiscard(log)})
	return &Tracing{sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter), sdktrace.WithResource(about), sdktrace.WithSampler(sampler), sdktrace.WithIDGenerator(ids{}),
	)}, nil
}

// exported says whether the environment asks for spans to be exported.
func exported() (bool, error) {
	if strings.EqualFold(os.Getenv("OTEL_SDK_DISABLED"), "true") {
		return false, nil
	}
	switch exporter := os.Getenv("OTEL_TRACES_EXPORTER"); exporter {
	case "none":
		return false, nil
	case "otlp":
		return true, nil
	case "":
		return os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT") != "" || os.Getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") != "", nil
	default:
		return false, fmt.Errorf("OTEL_TRACES_EXPORTER: %.100q is not known here: use otlp or none", exporter)
	}
}

// newExporter speaks the protocol that the variables name. The exporters read the other
// OTEL_EXPORTER_OTLP variables themselves.
func newExporter(ctx context.Context) (*otlptrace.Exporter, error) {
	name := "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
	protocol := os.Getenv(name)
	if protocol == "" {
		name = "OTEL_EXPORTER_OTLP_PROTOCOL"
		protocol = os.Getenv(name)
	}
	switch protocol {
	case "grpc":
		return otlptracegrpc.New(ctx)
	case "http/protobuf", "": // the default of the specification
		return otlptracehttp.New(ctx)
	}
	return nil, fmt.Errorf("%s: %.100q is not known here: use grpc or http/protobuf", name, protocol)
}

// exportErrors logs what OpenTelemetry cannot do, but not all of it.
type exportErrors struct {
	log  *slog.Logger
	mu   sync.Mutex
	last time.Time
}

// Handle implements otel.ErrorHandler.
func (e *exportErrors) Handle(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.last.IsZero() && time.Since(e.last) < time.Minute {
		return
	}
	e.last = time.Now()
	e.log.Warn("spans were not exported", "error", err)
}

// Provider gives tracers, that of a nil Tracing ones that record nothing.
func (t *Tracing) Provider() trace.TracerProvider {
	if t == nil {
		return noop.NewTracerProvider()
	}
	return t.provider
}

// Close exports what is left, for some seconds at most.
func (t *Tracing) Close() error {
	if t == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), flushWait)
	defer cancel()
	if err := t.provider.Shutdown(ctx); err != nil {
		return fmt.Errorf("the last spans were not exported: %w", err)
	}
	return nil
}

// sampler reads OTEL_TRACES_SAMPLER. The SDK's own reading would do but for its ratio, which
// takes its chance from bits that are not random in the id of a run.
func sampler(name, arg string) (sdktrace.Sampler, error) {
	ratio := 1.0
	if strings.HasSuffix(name, "traceidratio") && arg != "" {
		var err error
		if ratio, err = strconv.ParseFloat(arg, 64); err != nil || !(ratio >= 0 && ratio <= 1) {
			return nil, fmt.Errorf("OTEL_TRACES_SAMPLER_ARG: %.100q is no number from 0 to 1", arg)
		}
	}
	switch name {
	case "", "parentbased_always_on":
		return sdktrace.ParentBased(sdktrace.AlwaysSample()), nil
	case "always_on":
		return sdktrace.AlwaysSample(), nil
	case "always_off":
		return sdktrace.NeverSample(), nil
	case "parentbased_always_off":
		return sdktrace.ParentBased(sdktrace.NeverSample()), nil
	case "traceidratio":
		return ratioSampler(ratio), nil
	case "parentbased_traceidratio":
		return sdktrace.ParentBased(ratioSampler(ratio)), nil
	}
	return nil, fmt.Errorf("OTEL_TRACES_SAMPLER: %.100q is not known here: use always_on, always_off, traceidratio, parentbased_always_on, parentbased_always_off or parentbased_traceidratio", name)
}

// ratioSampler samples a share of the traces by the last 56 bits of their ids, which are random
// in every id by W3C Trace Context, level 2.
type ratioSampler float64

// ShouldSample implements sdktrace.Sampler.
func (r ratioSampler) ShouldSample(p sdktrace.SamplingParameters) sdktrace.SamplingResult {
	result := sdktrace.SamplingResult{Decision: sdktrace.Drop, Tracestate: trace.SpanContextFromContext(p.ParentContext).TraceState()}
	random := binary.BigEndian.Uint64(p.TraceID[8:]) & (1<<56 - 1)
	if float64(random) < math.Ldexp(float64(r), 56) {
		result.Decision = sdktrace.RecordAndSample
	}
	return result
}

// Description implements sdktrace.Sampler.
func (r ratioSampler) Description() string { return fmt.Sprintf("TraceIDRatio{%g}", float64(r)) }

// ids makes ids, those that [StartAs] asks for among them.
type ids struct{}

type idsKey struct{}

// NewIDs implements sdktrace.IDGenerator.
func (ids) NewIDs(ctx context.Context) (trace.TraceID, trace.SpanID) {
	var id trace.TraceID
	if want, ok := ctx.Value(idsKey{}).(trace.SpanContext); ok {
		id = want.TraceID()
	}
	for !id.IsValid() {
		binary.BigEndian.PutUint64(id[:8], rand.Uint64()) //nolint:gosec // ids need no secrecy
		binary.BigEndian.PutUint64(id[8:], rand.Uint64()) //nolint:gosec // as above
	}
	return id, ids{}.NewSpanID(ctx, id)
}

// NewSpanID implements sdktrace.IDGenerator.
func (ids) NewSpanID(ctx context.Context, _ trace.TraceID) trace.SpanID {
	var id trace.SpanID
	if want, ok := ctx.Value(idsKey{}).(trace.SpanContext); ok {
		id = want.SpanID()
	}
	for !id.IsValid() {
		binary.BigEndian.PutUint64(id[:], rand.Uint64()) //nolint:gosec // ids need no secrecy
	}
	return id
}

// StartAs begins a span with the ids of want: what is begun by one process and ended by another
// is one span that way, which whoever ends it exports. The trace's id counts where ctx has no
// span. Without a provider that records, ctx carries the ids all the same.
func StartAs(ctx context.Context, p trace.TracerProvider, want trace.SpanContext, name string, o ...trace.SpanStartOption) (context.Context, trace.Span) {
	_, span := p.Tracer(scope).Start(context.WithValue(ctx, idsKey{}, want), name, o...) //nolint:spancheck // the caller ends it
	return trace.ContextWithSpan(ctx, span), span                                        //nolint:spancheck // as above
}

// Start begins a span below that of ctx, and nothing where that one is not recorded.
func Start(ctx context.Context, name string, o ...trace.SpanStartOption) (context.Context, trace.Span) {
	parent := trace.SpanFromContext(ctx)
	if !parent.IsRecording() {
		return ctx, unrecorded
	}
	return parent.TracerProvider().Tracer(scope).Start(ctx, name, o...) //nolint:spancheck // the caller ends it
}

// unrecorded is the span that nobody records.
var unrecorded trace.Span = noop.Span{}

// Fail gives a span the code of what failed; empty is no failure. Messages stay out of spans:
// they may hold what a target or an author wrote.
func Fail[Code ~string](span trace.Span, code Code) {
	if code != "" && span.IsRecording() {
		span.SetAttributes(ErrorType.String(string(code)))
		span.SetStatus(codes.Error, string(code))
	}
}

// Traceparent is a span's context in the form of W3C Trace Context; empty where it is not valid.
func Traceparent(sc trace.SpanContext) string {
	if !sc.IsValid() {
		return ""
	}
	carrier := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(trace.ContextWithSpanContext(context.Background(), sc), carrier)
	return carrier["traceparent"]
}

// ParseTraceparent reads what [Traceparent] wrote. Anything else gives a context that is not valid.
func ParseTraceparent(text string) trace.SpanContext {
	if text == "" {
		return trace.SpanContext{}
	}
	return trace.SpanContextFromContext(propagation.TraceContext{}.Extract(context.Background(), propagation.MapCarrier{"traceparent": text}))
}

// IDs are a span's context made of an id of 16 bytes, such as that of a run: the trace's id is
// the id, and the span's its last 8 bytes. variant tells spans of one id apart.
func IDs(id [16]byte, variant int) trace.SpanContext {
	var span trace.SpanID
	// Odd, so that different variants give different ids.
	binary.BigEndian.PutUint64(span[:], binary.BigEndian.Uint64(id[8:])^uint64(variant)*0x9e3779b97f4a7c15) //nolint:gosec // bits
	return trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID(id), SpanID: span, TraceFlags: trace.FlagsSampled})
}

// TraceID is the id of the trace of ctx in hexadecimal; empty without one.
func TraceID(ctx context.Context) string {
	sc := trace.SpanContextFromContext(ctx)
	if !sc.HasTraceID() {
		return ""
	}
	id := sc.TraceID()
	return hex.EncodeToString(id[:])
}
