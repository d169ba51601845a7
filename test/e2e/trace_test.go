package e2e

import (
	"context"
	"encoding/hex"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	collectorv1 "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracev1 "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/specql/mesh/pkg/telemetry"
)

// collector takes spans over OTLP.
type collector struct {
	collectorv1.UnimplementedTraceServiceServer

	address string
	mu      sync.Mutex
	spans   []*span
}

// span is one that was exported, with the service that did.
type span struct {
	*tracev1.Span

	service string
}

func (s *span) id() string     { return hex.EncodeToString(s.GetSpanId()) }
func (s *span) parent() string { return hex.EncodeToString(s.GetParentSpanId()) }
func (s *span) trace() string  { return hex.EncodeToString(s.GetTraceId()) }
func (s *span) title() string  { return s.service + ": " + s.GetName() }

func (s *span) attribute(name string) string {
	for _, a := range s.GetAttributes() {
		if a.GetKey() == name {
			return a.GetValue().GetStringValue()
		}
	}
	return ""
}

// Export implements TraceService.
func (c *collector) Export(_ context.Context, req *collectorv1.ExportTraceServiceRequest) (*collectorv1.ExportTraceServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, rs := range req.GetResourceSpans() {
		service := ""
		for _, a := range rs.GetResource().GetAttributes() {
			if a.GetKey() == "service.name" {
				service = a.GetValue().GetStringValue()
			}
		}
		for _, ss := range rs.GetScopeSpans() {
			for _, s := range ss.GetSpans() {
				c.spans = append(c.spans, &span{s, service})
			}
		}
	}
	return &collectorv1.ExportTraceServiceResponse{}, nil
}

func newCollector(t *testing.T) *collector {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	c := &collector{address: lis.Addr().String()}
	s := grpc.NewServer()
	collectorv1.RegisterTraceServiceServer(s, c)
	go func() { _ = s.Serve(lis) }()
	t.Cleanup(s.Stop)
	return c
}

// env makes a process export to the collector.
func (c *collector) env() []string {
	return []string{"OTEL_EXPORTER_OTLP_ENDPOINT=http://" + c.address, "OTEL_EXPORTER_OTLP_PROTOCOL=grpc", "OTEL_BSP_SCHEDULE_DELAY=50"}
}

// all gives the spans so far.
func (c *collector) all() []*span {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.spans)
}

// await waits for a span.
func (c *collector) await(t *testing.T, what string, is func(*span) bool) *span {
	t.Helper()
	var found *span
	require.Eventually(t, func() bool {
		i := slices.IndexFunc(c.all(), is)
		if i >= 0 {
			found = c.all()[i]
		}
		return i >= 0
	}, time.Minute, 20*time.Millisecond, "%s\n%s", what, c)
	return found
}

// String lists the spans, for failures.
func (c *collector) String() string {
	var b strings.Builder
	for _, s := range c.all() {
		_, _ = fmt.Fprintf(&b, "%s %s < %s %s\n", s.trace(), s.id(), s.parent(), s.title())
	}
	return b.String()
}

// ancestors are the titles of a span and of those above it.
func (c *collector) ancestors(s *span) []string {
	var out []string
	for s != nil {
		out = append(out, s.title())
		above := s.parent()
		i := slices.IndexFunc(c.all(), func(o *span) bool { return o.id() == above && o.trace() == s.trace() })
		if s = nil; i >= 0 {
			s = c.all()[i]
		}
	}
	return out
}

// remote makes the recorder's service a traced one, as a service of somebody else's would be.
func (c *collector) remote(t *testing.T, r *recorder, call string, then func(http.ResponseWriter, *http.Request, request)) {
	t.Helper()
	for _, v := range c.env() {
		name, value, _ := strings.Cut(v, "=")
		t.Setenv(name, value)
	}
	tracing, err := telemetry.NewTracing(t.Context(), "remote", "1", nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, tracing.Close()) })
	r.on(call, func(w http.ResponseWriter, req *http.Request, got request) {
		ctx := propagation.TraceContext{}.Extract(req.Context(), propagation.HeaderCarrier(req.Header))
		_, s := tracing.Provider().Tracer("remote").Start(ctx, "work", trace.WithSpanKind(trace.SpanKindServer))
		defer s.End()
		then(w, req, got)
	})
}

func TestOneTraceHoldsClientOrchestratorRunnerAndRemote(t *testing.T) {
	c, r := newCollector(t), newRecorder(t)
	c.remote(t, r, "worker.work", func(w http.ResponseWriter, _ *http.Request, _ request) {
		respond(w, http.StatusOK, map[string]any{"answer": "output-must-not-be-seen"})
	})
	d := start(t, mesh{args: []string{"--registry", absolute(t, "testdata", "registry.yaml")}, env: append(c.env(), "SPECQL_TEST_URL="+r.URL, "SPECQL_TEST_SCRIPTS="+t.TempDir(), "SPECQL_TOKEN=secret-must-not-be-seen")})
	dir := t.TempDir()
	file := dir + "/workflow.yaml"
	require.NoError(t, os.WriteFile(file, []byte("actions:\n  - call_service: {service: worker, operation: work, input: {n: 1, text: input-must-not-be-seen}}\n"), 0o600))
	status, stdout, stderr := run(t, dir, append(c.env(), "SPECQL_ADDRESS="+d.api), "execute-job", "--file", file, "--output", "json")
	require.Zero(t, status, stderr)
	require.Contains(t, stdout, "output-must-not-be-seen")

	work := c.await(t, "the remote span", func(s *span) bool { return s.title() == "remote: work" })
	c.await(t, "the run's span", func(s *span) bool { return s.title() == "orchestrator: run" })
	c.await(t, "the client's span", func(s *span) bool { return s.title() == "specql: specql execute-job" })
	want := []string{
		"remote: work", "http-runner: remote", "http-runner: job", "http-runner: specql.runner.v1.RunnerService/Execute",
		"orchestrator: specql.runner.v1.RunnerService/Execute", "orchestrator: attempt", "orchestrator: call", "orchestrator: run",
		"orchestrator: specql.v1.OrchestratorService/ExecuteAction", "specql: specql.v1.OrchestratorService/ExecuteAction", "specql: specql execute-job",
	}
	require.Eventually(t, func() bool { return slices.Equal(want, c.ancestors(work)) }, time.Minute, 20*time.Millisecond, "%s\n%s", c.ancestors(work), c)

	for _, part := range []string{"orchestrator: queue", "orchestrator: journal", "orchestrator: output check", "http-runner: policy check"} {
		s := c.await(t, part, func(s *span) bool { return s.title() == part })
		require.Equal(t, work.trace(), s.trace(), part)
		require.Contains(t, c.ancestors(s), "orchestrator: run", part)
	}
	runID := c.await(t, "the run", func(s *span) bool { return s.title() == "orchestrator: run" }).attribute("specql.run.id")
	require.Contains(t, stdout, runID)
	job := c.await(t, "the job", func(s *span) bool { return s.title() == "http-runner: job" })
	require.Equal(t, runID, job.attribute("specql.run.id"))
	require.NotEmpty(t, job.attribute("specql.job.id"))
	for _, s := range c.all() {
		text, err := protojson.Marshal(s.Span)
		require.NoError(t, err)
		require.NotContains(t, string(text), "must-not-be-seen", s.title())
	}
}

// A retry is a span of its own below the same call, and what a crash cut off keeps its trace.
func TestATraceOutlivesItsOrchestrator(t *testing.T) {
	c, r := newCollector(t), newRecorder(t)
	arrived, release := make(chan struct{}, 8), make(chan struct{})
	c.remote(t, r, "worker.work", func(w http.ResponseWriter, req *http.Request, _ request) {
		arrived <- struct{}{}
		select {
		case <-release:
		case <-req.Context().Done():
			return
		}
		respond(w, http.StatusOK, map[string]any{})
	})
	m := mesh{data: t.TempDir(), args: []string{"--registry", absolute(t, "testdata", "registry.yaml")}, env: append(c.env(), "SPECQL_TEST_URL="+r.URL, "SPECQL_TEST_SCRIPTS="+t.TempDir())}
	d := start(t, m)
	dir := t.TempDir()
	file := dir + "/workflow.yaml"
	require.NoError(t, os.WriteFile(file, []byte("actions:\n  - call_service: {service: worker, operation: work, input: {n: 1}}\n"), 0o600))
	status, _, stderr := run(t, dir, append(c.env(), "SPECQL_ADDRESS="+d.api), "execute-job", "--file", file, "--detach")
	require.Zero(t, status, stderr)
	<-arrived
	c.await(t, "the start's span", func(s *span) bool {
		return s.title() == "orchestrator: specql.v1.OrchestratorService/ExecuteAction"
	})
	d.kill()
	close(release)
	start(t, m)

	whole := c.await(t, "the run's span", func(s *span) bool { return s.title() == "orchestrator: run" })
	require.Eventually(t, func() bool {
		return slices.Contains(c.ancestors(whole), "specql: specql execute-job")
	}, time.Minute, 20*time.Millisecond, "%s", c)
	again := c.await(t, "the second call of the remote", func(s *span) bool {
		return s.title() == "remote: work" && slices.Contains(c.ancestors(s), "orchestrator: run")
	})
	require.Equal(t, whole.trace(), again.trace())
	remotes := 0
	for _, s := range c.all() {
		if s.title() == "orchestrator: run" {
			require.Equal(t, whole.id(), s.id(), "a run is one span")
		}
		if s.title() == "remote: work" {
			require.Equal(t, whole.trace(), s.trace(), "the call that was cut off is of the same trace")
			remotes++
		}
	}
	require.Equal(t, 2, remotes)
}
