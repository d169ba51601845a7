// Package telemetry holds the logs, metrics and traces that all services share.
package telemetry

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"

	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

// ParseLevel reads a log level: debug, info, warn or error.
func ParseLevel(level string) (slog.Level, error) {
	switch strings.ToLower(level) {
	case "debug":
		return slog.LevelDebug, nil
	case "info", "":
		return slog.LevelInfo, nil
	case "warn", "warning":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	}
	return slog.LevelInfo, fmt.Errorf("log level %q is not known: use debug, info, warn or error", level)
}

// CheckFormat refuses a log format other than text and json.
func CheckFormat(format string) error {
	switch format {
	case "text", "json", "":
		return nil
	}
	return fmt.Errorf("log format %q is not known: use text or json", format)
}

// NewLogger writes lines to w, as text or json. Attributes that [With] put into a context
// and the ids of its trace are added to each line logged with it. An unknown level counts as info, an
// unknown format as text; [ParseLevel] and [CheckFormat] find them.
func NewLogger(w io.Writer, level, format string) *slog.Logger {
	at, err := ParseLevel(level)
	if err != nil {
		at = slog.LevelInfo
	}
	options := &slog.HandlerOptions{Level: at}
	if format == "json" {
		return slog.New(&contextHandler{slog.NewJSONHandler(w, options)})
	}
	return slog.New(&contextHandler{slog.NewTextHandler(w, options)})
}

// OrDiscard is the logger, or one that drops everything where it is nil.
func OrDiscard(l *slog.Logger) *slog.Logger {
	if l == nil {
		return slog.New(slog.DiscardHandler)
	}
	return l
}

type attrsKey struct{}

// With gives a context whose log lines hold the attributes, such as run_id and job_id.
func With(ctx context.Context, attrs ...slog.Attr) context.Context {
	return context.WithValue(ctx, attrsKey{}, slices.Concat(attrsOf(ctx), attrs))
}

func attrsOf(ctx context.Context) []slog.Attr {
	attrs, _ := ctx.Value(attrsKey{}).([]slog.Attr)
	return attrs
}

type contextHandler struct{ slog.Handler }

func (h *contextHandler) Handle(ctx context.Context, r slog.Record) error {
	r.AddAttrs(attrsOf(ctx)...)
	if span := trace.SpanContextFromContext(ctx); span.IsValid() {
		r.AddAttrs(slog.String("trace_id", span.TraceID().String()), slog.String("span_id", span.SpanID().String()))
	}
	if err := h.Handler.Handle(ctx, r); err != nil {
		return fmt.Errorf("log: %w", err)
	}
	return nil
}

func (h *contextHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &contextHandler{h.Handler.WithAttrs(attrs)}
}

func (h *contextHandler) WithGroup(name string) slog.Handler {
	return &contextHandler{h.Handler.WithGroup(name)}
}

// Propagator carries trace context as W3C headers. It carries no baggage: nothing here reads what
// clients put there, and it would go on to whoever is called.
func Propagator() propagation.TextMapPropagator { return propagation.TraceContext{} }
