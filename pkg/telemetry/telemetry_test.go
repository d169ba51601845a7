package telemetry_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/goleak"

	"github.com/specql/mesh/pkg/telemetry"
	"github.com/specql/mesh/pkg/telemetry/scrape"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestLoggerAddsWhatTheContextHolds(t *testing.T) {
	t.Parallel()
	var b strings.Builder
	log := telemetry.NewLogger(&b, "info", "json").With("service", "x").WithGroup("g")
	ctx := telemetry.With(t.Context(), slog.String("run_id", "r1"))
	ctx = telemetry.With(ctx, slog.String("job_id", "j1"))
	ctx = trace.ContextWithSpanContext(ctx, trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}}))
	log.DebugContext(ctx, "not shown")
	log.InfoContext(ctx, "shown")
	var line map[string]any
	require.NoError(t, json.Unmarshal([]byte(b.String()), &line), "one line alone")
	group, ok := line["g"].(map[string]any)
	require.True(t, ok)
	require.Equal(t, "r1", group["run_id"])
	require.Equal(t, "j1", group["job_id"])
	require.Equal(t, "01000000000000000000000000000000", group["trace_id"])
	require.Equal(t, "x", line["service"])

	b.Reset()
	telemetry.NewLogger(&b, "nonsense", "text").Info("hello")
	require.Contains(t, b.String(), "msg=hello")
	telemetry.OrDiscard(nil).Error("nowhere")
}

func TestLevelsAndFormats(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]slog.Level{"debug": slog.LevelDebug, "": slog.LevelInfo, "INFO": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError} {
		got, err := telemetry.ParseLevel(name)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	_, err := telemetry.ParseLevel("loud")
	require.ErrorContains(t, err, `"loud" is not known: use debug, info, warn or error`)
	require.NoError(t, telemetry.CheckFormat("json"))
	require.Error(t, telemetry.CheckFormat("xml"))
}

func TestHTTP(t *testing.T) {
	t.Parallel()
	var config net.ListenConfig
	lis, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var ready atomic.Bool
	registry := scrape.NewRegistry()
	telemetry.Registered(registry, prometheus.NewCounter(prometheus.CounterOpts{Name: "x_total", Help: "x"})).Inc()
	again := telemetry.Registered(registry, prometheus.NewCounter(prometheus.CounterOpts{Name: "x_total", Help: "x"}))
	again.Inc() // the one that is registered already
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- telemetry.ServeHTTP(ctx, lis, telemetry.Handler(registry, func(context.Context) error {
			if ready.Load() {
				return nil
			}
			return errors.New("the store is not open")
		}))
	}()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(path string) (int, string) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+lis.Addr().String()+path, http.NoBody)
		require.NoError(t, err)
		resp, err := client.Do(req)
		require.NoError(t, err)
		defer func() { require.NoError(t, resp.Body.Close()) }()
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		return resp.StatusCode, string(body)
	}
	code, body := get("/metrics")
	require.Equal(t, http.StatusOK, code)
	require.Contains(t, body, "x_total 2")
	require.Contains(t, body, "go_goroutines")
	require.Contains(t, body, "process_resident_memory_bytes")
	code, _ = get("/healthz")
	require.Equal(t, http.StatusOK, code)
	code, body = get("/readyz")
	require.Equal(t, http.StatusServiceUnavailable, code)
	require.Equal(t, "the store is not open\n", body)
	ready.Store(true)
	code, _ = get("/readyz")
	require.Equal(t, http.StatusOK, code)
	cancel()
	require.NoError(t, <-ended)
}
