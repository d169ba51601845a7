package mesh

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/telemetry"
)

// healthCall tells the methods that every valid certificate may call.
func healthCall(method string) bool { return strings.HasPrefix(method, "/grpc.health.v1.Health/") }

// aside tells the methods that every server has besides what it is for.
func aside(method string) bool {
	return healthCall(method) || strings.HasPrefix(method, "/grpc.reflection.")
}

// guard stands around every call: who calls, panics, errors, log and metrics, in one
// interceptor because it is on the hot path.
type guard struct {
	closing  context.Context // ends when the server drains
	log      *slog.Logger
	roles    []string // nil: any
	mayCall  func(method, role string) bool
	denials  *Denials
	calls    *prometheus.CounterVec
	duration *prometheus.HistogramVec
}

func newGuard(closing context.Context, tls bool, o ServerOptions) *guard {
	g := &guard{
		closing: closing,
		log:     telemetry.OrDiscard(o.Logger),
		denials: NewDenials(o.Logger, o.Registerer),
		calls: telemetry.Registered(o.Registerer, prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "specql_grpc_calls_total", Help: "gRPC calls answered, by method and status code.",
		}, []string{"method", "code"})),
		duration: telemetry.Registered(o.Registerer, prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "specql_grpc_call_duration_seconds", Help: "How long gRPC calls took, streams to their end.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 4, 10),
		}, []string{"method"})),
	}
	if tls {
		g.roles, g.mayCall = o.AllowedRoles, o.MayCall
	}
	return g
}

func (g *guard) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	start := time.Now()
	err = g.admit(ctx, info.FullMethod)
	if err == nil {
		err = g.protect(ctx, info.FullMethod, func() (err error) {
			resp, err = handler(ctx, req)
			return err
		})
	}
	return resp, g.end(ctx, info.FullMethod, start, err)
}

func (g *guard) stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	start := time.Now()
	ctx := stream.Context()
	err := g.admit(ctx, info.FullMethod)
	if err == nil {
		if aside(info.FullMethod) {
			// Whoever watches the health does so for ever; a drain must not wait for that.
			ending, cancel := context.WithCancel(ctx)
			defer cancel()
			defer context.AfterFunc(g.closing, cancel)()
			stream = endingStream{stream, ending}
		}
		err = g.protect(ctx, info.FullMethod, func() error { return handler(srv, stream) })
	}
	return g.end(ctx, info.FullMethod, start, err)
}

// endingStream is a stream with a context of its own.
type endingStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s endingStream) Context() context.Context { return s.ctx }

func (g *guard) admit(ctx context.Context, method string) error {
	if g.roles == nil && g.mayCall == nil || healthCall(method) {
		return nil
	}
	role := PeerRole(ctx)
	if g.mayCall != nil {
		if g.mayCall(method, role) {
			return nil
		}
		return &Denial{Code: codes.PermissionDenied, Rule: RuleCertificate, Message: fmt.Sprintf("a certificate of the role %q may not call this method", role)}
	}
	if slices.Contains(g.roles, role) {
		return nil
	}
	if role == "" {
		return &Denial{Code: codes.Unauthenticated, Rule: RuleCertificate, Message: "the caller's certificate says no role; a role is a URI such as " + rolePrefix + g.roles[0]}
	}
	return &Denial{Code: codes.PermissionDenied, Rule: RuleCertificate, Message: fmt.Sprintf("%s may not call this service, only %s may", role, strings.Join(g.roles, ", "))}
}

// protect keeps a panic inside the call.
func (g *guard) protect(ctx context.Context, method string, call func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			g.log.LogAttrs(ctx, slog.LevelError, "a call panicked", slog.String("method", method),
				slog.String("panic", fmt.Sprint(p)), slog.String("stack", string(debug.Stack())))
			err = fault.New(fault.Internal, "internal error; the service's log has the cause")
		}
	}()
	return call()
}

// end gives the error its form on the wire, logs what failed and counts.
func (g *guard) end(ctx context.Context, method string, start time.Time, err error) error {
	took := time.Since(start)
	st := fault.ToStatus(err)
	g.calls.WithLabelValues(method, st.Code().String()).Inc()
	g.duration.WithLabelValues(method).Observe(took.Seconds())
	level := slog.LevelDebug
	switch st.Code() { //nolint:exhaustive // the rest is the callers' business
	case codes.Internal, codes.Unknown, codes.DataLoss:
		level = slog.LevelError
	case codes.PermissionDenied, codes.Unauthenticated:
		remote := ""
		if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
			remote = p.Addr.String()
		}
		g.denials.Tell(ctx, method, remote, PeerRole(ctx), err)
	}
	if g.log.Enabled(ctx, level) {
		attrs := []slog.Attr{
			slog.String("method", method), slog.String("code", st.Code().String()),
			slog.Duration("took", took), slog.String("caller", PeerRole(ctx)),
		}
		if p, ok := peer.FromContext(ctx); ok && p.Addr != nil && level >= slog.LevelWarn {
			attrs = append(attrs, slog.String("remote", p.Addr.String()))
		}
		if err != nil {
			attrs = append(attrs, slog.String("error", cause(err)))
		}
		g.log.LogAttrs(ctx, level, "call", attrs...)
	}
	return st.Err()
}

// cause is the text of an error with the cause that is kept from the wire.
func cause(err error) string {
	if f, ok := fault.As(err); ok && f.Cause != nil {
		return err.Error() + ": " + f.Cause.Error()
	}
	return err.Error()
}
