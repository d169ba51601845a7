package httprunner

import (
	"context"
	"crypto/x509"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/runnertest"
)

// onWire is an attempt as the orchestrator sends it.
func (a attempt) onWire(t testing.TB) *runnerv1.Job {
	t.Helper()
	j := a.job(t)
	return &runnerv1.Job{
		Id: j.ID, RunId: j.RunID, Attempt: 1, IdempotencyKey: j.IdempotencyKey,
		Service:   &runnerv1.Service{Name: j.Service.Name, ExecutionType: ExecutionType, RunnerConfig: j.Service.Config, SecurityPolicy: j.Service.Policy},
		Operation: &runnerv1.Operation{Name: j.Operation.Name, Config: j.Operation.Config},
		Input:     j.Input,
	}
}

func TestConformance(t *testing.T) {
	stop := make(chan struct{})
	rec := record(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/slow":
			select {
			case <-r.Context().Done():
			case <-stop:
			}
		case "/big":
			w.Header().Set("Content-Type", "application/json")
			_, _ = io.WriteString(w, `"`+strings.Repeat("x", runner.MaxOutputBytes+1)+`"`)
		default:
			w.Header().Set("Content-Type", "application/json")
			_, _ = io.WriteString(w, `{"id":"ch_1","amount":12345678901234567890}`)
		}
	})
	defer close(stop)
	r := newRunner(t, Options{})
	config := object{"base_url": rec.URL}
	runnertest.Conformance(t, r, runnertest.Cases{
		Good: attempt{config: config, input: `{"amount":1}`}.onWire(t),
		Check: func(t *testing.T, o *runnertest.Outcome) {
			t.Helper()
			require.JSONEq(t, `{"id":"ch_1","amount":12345678901234567890}`, string(o.Finished.GetOutput()))
			require.Equal(t, int32(200), o.Finished.GetUsage().GetStatusCode())
			require.Len(t, o.Lines("runner"), 1)
		},
		Slow: attempt{config: config, op: object{"path": "/slow"}}.onWire(t),
		Big:  attempt{config: config, op: object{"path": "/big"}, policy: open(object{"max_response_size": 16 << 20})}.onWire(t),
	})
}

func TestSecretsAreMaskedOnTheWire(t *testing.T) {
	t.Setenv("T_TOKEN", "sk_live_0123456789")
	rec := record(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusForbidden)
		_, _ = io.WriteString(w, "no access for "+r.Header.Get("Authorization"))
	})
	client := runnertest.Start(t, newRunner(t, Options{}))
	o := runnertest.Execute(t, client, attempt{config: object{"base_url": rec.URL, "auth_type": "bearer", "auth_config": object{"token_env_var": "T_TOKEN"}}}.onWire(t))
	require.Equal(t, "REMOTE_ERROR", o.Code())
	require.Contains(t, o.Finished.GetError().GetMessage(), "no access for Bearer ***")
	require.NotContains(t, o.Finished.String(), "sk_live")
	require.Equal(t, "Bearer sk_live_0123456789", rec.last(t).Header.Get("Authorization"))
}

// tracedClient sends a trace context with each job, as gRPC metadata.
type tracedClient struct {
	runnerv1.RunnerServiceClient
	traceparent string
}

func (c tracedClient) Execute(ctx context.Context, o ...grpc.CallOption) (grpc.BidiStreamingClient[runnerv1.ExecuteRequest, runnerv1.ExecuteResponse], error) {
	return c.RunnerServiceClient.Execute(metadata.AppendToOutgoingContext(ctx, "traceparent", c.traceparent, "tracestate", "vendor=1"), o...)
}

func TestTraceContextOfTheCallReachesTheTarget(t *testing.T) {
	t.Parallel()
	rec := record(t, nil)
	client := tracedClient{runnertest.Start(t, newRunner(t, Options{})), "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
	o := runnertest.Execute(t, client, attempt{config: object{"base_url": rec.URL}}.onWire(t))
	require.Empty(t, o.Code(), o.Finished.GetError().GetMessage())
	got := rec.last(t).Header
	require.Regexp(t, "^00-0af7651916cd43dd8448eb211c80319c-[0-9a-f]{16}-01$", got.Get("Traceparent"))
	require.Equal(t, "vendor=1", got.Get("Tracestate"))
}

func TestHTTP2(t *testing.T) {
	t.Parallel()
	rec := &recorder{}
	rec.Server = httptest.NewUnstartedServer(rec.handler(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, `{"protocol":"`+r.Proto+`"}`)
	}))
	rec.EnableHTTP2 = true
	rec.StartTLS()
	t.Cleanup(rec.Close)
	roots := x509.NewCertPool()
	roots.AddCert(rec.Certificate())
	r := newRunner(t, Options{RootCAs: roots})
	for range 2 {
		result := attempt{config: object{"base_url": rec.URL}, input: `{"a":1}`}.run(t.Context(), t, r)
		require.NoError(t, result.Err)
		require.JSONEq(t, `{"protocol":"HTTP/2.0"}`, string(result.Output))
		// The connection may carry other calls at the same time: its bytes are not this call's.
		require.Nil(t, result.Usage.NetworkRxMb)
		require.NotNil(t, result.Usage.ResponseBytes)
		require.Equal(t, "key-1", rec.last(t).Header.Get("Idempotency-Key"))
	}
}

// BenchmarkNoop is a call that does nothing, to a server on this machine.
func BenchmarkNoop(b *testing.B) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, `{}`)
	}))
	b.Cleanup(server.Close)
	r := newRunner(b, Options{})
	job := attempt{config: object{"base_url": server.URL}, input: `{"amount":1}`}.job(b)
	b.Run("one", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if result, err := r.Execute(b.Context(), job, &sink{}); err != nil || result.Err != nil {
				b.Fatal(err, result.Err)
			}
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.SetParallelism(32)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if result, err := r.Execute(b.Context(), job, &sink{}); err != nil || result.Err != nil {
					b.Error(err, result.Err)
				}
			}
		})
	})
}
