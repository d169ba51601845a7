package mesh_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/mesh"
	"github.com/specql/mesh/pkg/runner/runnertest"
	"github.com/specql/mesh/pkg/telemetry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// service answers Describe with what the test says, and Execute with a panic.
type service struct {
	runnerv1.UnimplementedRunnerServiceServer
	answer func(context.Context) (*runnerv1.DescribeResponse, error)
}

func (s *service) Describe(ctx context.Context, _ *runnerv1.DescribeRequest) (*runnerv1.DescribeResponse, error) {
	if s.answer == nil {
		return &runnerv1.DescribeResponse{Name: mesh.PeerRole(ctx)}, nil
	}
	return s.answer(ctx)
}

func (s *service) Execute(grpc.BidiStreamingServer[runnerv1.ExecuteRequest, runnerv1.ExecuteResponse]) error {
	panic("a defect in a stream")
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	var config net.ListenConfig
	lis, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	return lis
}

// serve starts a server that ends with the test.
func serve(t *testing.T, c *mesh.Credentials, o mesh.ServerOptions, impl runnerv1.RunnerServiceServer) string {
	t.Helper()
	lis := listen(t)
	s := mesh.NewServer(c, o)
	runnerv1.RegisterRunnerServiceServer(s, impl)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, lis) }()
	t.Cleanup(func() {
		cancel()
		require.NoError(t, <-ended)
	})
	return lis.Addr().String()
}

func dial(t *testing.T, address string, c *mesh.Credentials, o mesh.DialOptions) *grpc.ClientConn {
	t.Helper()
	conn, err := mesh.Dial(address, c, o)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, conn.Close()) })
	return conn
}

func authority(t *testing.T) *mesh.Authority {
	t.Helper()
	a, err := mesh.NewAuthority()
	require.NoError(t, err)
	return a
}

func issue(t *testing.T, a *mesh.Authority, role string) *mesh.Credentials {
	t.Helper()
	c, err := a.Issue(role)
	require.NoError(t, err)
	require.Equal(t, role, c.Name())
	return c
}

// caOnly are credentials without a certificate.
func caOnly(t *testing.T, a *mesh.Authority) *mesh.Credentials {
	t.Helper()
	cert, _ := a.PEM()
	file := filepath.Join(t.TempDir(), "ca.pem")
	require.NoError(t, os.WriteFile(file, cert, 0o600))
	c, err := mesh.LoadCredentials("", "", file)
	require.NoError(t, err)
	return c
}

func describe(t *testing.T, conn *grpc.ClientConn) (*runnerv1.DescribeResponse, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	return runnerv1.NewRunnerServiceClient(conn).Describe(ctx, &runnerv1.DescribeRequest{})
}

func TestWhoMayCall(t *testing.T) {
	t.Parallel()
	a := authority(t)
	address := serve(t, issue(t, a, "shell-runner"), mesh.ServerOptions{AllowedRoles: []string{mesh.RoleOrchestrator}}, &service{})
	toRunner := mesh.DialOptions{ServerRole: "shell-runner"}

	resp, err := describe(t, dial(t, address, issue(t, a, mesh.RoleOrchestrator), toRunner))
	require.NoError(t, err)
	require.Equal(t, mesh.RoleOrchestrator, resp.GetName())

	t.Run("another role", func(t *testing.T) {
		t.Parallel()
		conn := dial(t, address, issue(t, a, "http-runner"), toRunner)
		_, err := describe(t, conn)
		require.Equal(t, codes.PermissionDenied, status.Code(err))
		require.ErrorContains(t, err, "http-runner may not call this service, only orchestrator may")
		// Streams are guarded, too.
		stream, err := runnerv1.NewRunnerServiceClient(conn).Execute(t.Context())
		require.NoError(t, err)
		_, err = stream.Recv()
		require.Equal(t, codes.PermissionDenied, status.Code(err))
		// Health is open to every certificate of the CA.
		health, err := grpc_health_v1.NewHealthClient(conn).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{Service: "specql.runner.v1.RunnerService"})
		require.NoError(t, err)
		require.Equal(t, grpc_health_v1.HealthCheckResponse_SERVING, health.GetStatus())
	})
	for name, c := range map[string]*mesh.Credentials{
		"no certificate": caOnly(t, a),
		"another CA":     issue(t, authority(t), mesh.RoleOrchestrator),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn := dial(t, address, c, toRunner)
			_, err := describe(t, conn)
			require.Error(t, err)
			_, err = grpc_health_v1.NewHealthClient(conn).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{})
			require.Error(t, err, "not even health")
		})
	}
	t.Run("plaintext", func(t *testing.T) {
		t.Parallel()
		_, err := describe(t, dial(t, address, nil, mesh.DialOptions{}))
		require.Error(t, err)
	})
}

func TestRefusedCallersAreLogged(t *testing.T) {
	t.Parallel()
	a := authority(t)
	log := &lines{text: make(chan string, 100)}
	address := serve(t, issue(t, a, "shell-runner"), mesh.ServerOptions{Logger: telemetry.NewLogger(log, "info", "text")}, &service{})
	_, err := describe(t, dial(t, address, caOnly(t, a), mesh.DialOptions{ServerRole: "shell-runner"}))
	require.Error(t, err)
	select {
	case line := <-log.text:
		require.Contains(t, line, "a caller was refused")
		require.Contains(t, line, "client didn't provide a certificate")
	case <-time.After(10 * time.Second):
		require.Fail(t, "nothing was logged")
	}
}

// A flood of refused callers is counted, and written down in part; it hides no refusal by another rule.
func TestAFloodOfRefusalsIsCounted(t *testing.T) {
	t.Parallel()
	log, registry := &bytes.Buffer{}, prometheus.NewRegistry()
	d := mesh.NewDenials(telemetry.NewLogger(log, "info", "text"), registry)
	const flood = 1000
	for range flood {
		require.True(t, d.Tell(t.Context(), "m", "192.0.2.1:1", "", &mesh.Denial{Code: codes.Unauthenticated, Rule: mesh.RuleToken, Message: "no"}))
	}
	require.True(t, d.Tell(t.Context(), "m", "192.0.2.1:1", "client", fmt.Errorf("wrapped: %w", &mesh.Denial{Code: codes.PermissionDenied, Rule: mesh.RuleRole, Subject: "vic", Message: "no"})))
	require.True(t, d.Tell(t.Context(), "m", "", "", status.Error(codes.PermissionDenied, "no")))
	require.False(t, d.Tell(t.Context(), "m", "", "", status.Error(codes.NotFound, "no")))
	require.False(t, d.Tell(t.Context(), "m", "", "", nil))
	text := log.String()
	require.Less(t, strings.Count(text, "rule=token "), flood/2)
	require.Contains(t, text, "rule=role method=m remote=192.0.2.1:1 code=PermissionDenied subject=vic caller=client error=no")
	require.Contains(t, text, "rule=other")
	families, err := registry.Gather()
	require.NoError(t, err)
	counts := map[string]float64{}
	for _, m := range families[0].GetMetric() {
		for _, l := range m.GetLabel() {
			if l.GetName() == "rule" {
				counts[l.GetValue()] = m.GetCounter().GetValue()
			}
		}
	}
	require.Equal(t, map[string]float64{"token": flood, "role": 1, "other": 1}, counts)
}

// lines passes on what is written, and drops what nobody reads.
type lines struct{ text chan string }

func (l *lines) Write(p []byte) (int, error) {
	select {
	case l.text <- string(p):
	default:
	}
	return len(p), nil
}

func TestTheClientChecksTheServer(t *testing.T) {
	t.Parallel()
	a := authority(t)
	address := serve(t, issue(t, a, "shell-runner"), mesh.ServerOptions{}, &service{})
	me := issue(t, a, mesh.RoleOrchestrator)

	_, err := describe(t, dial(t, address, me, mesh.DialOptions{ServerRole: "http-runner"}))
	require.ErrorContains(t, err, `says \"shell-runner\", not \"http-runner\"`)
	require.Equal(t, codes.Unavailable, status.Code(err))

	_, err = describe(t, dial(t, address, me, mesh.DialOptions{}))
	require.NoError(t, err, "without a role the host's name counts, and loopback is in it")

	impostor := serve(t, issue(t, authority(t), "shell-runner"), mesh.ServerOptions{OptionalClientCert: true}, &service{})
	_, err = describe(t, dial(t, impostor, me, mesh.DialOptions{ServerRole: "shell-runner"}))
	require.ErrorContains(t, err, "unknown authority")
}

func TestOptionalClientCertificate(t *testing.T) {
	t.Parallel()
	a := authority(t)
	address := serve(t, issue(t, a, mesh.RoleOrchestrator), mesh.ServerOptions{OptionalClientCert: true}, &service{})
	resp, err := describe(t, dial(t, address, caOnly(t, a), mesh.DialOptions{}))
	require.NoError(t, err)
	require.Empty(t, resp.GetName(), "a caller without a certificate has no role")

	address = serve(t, issue(t, a, mesh.RoleOrchestrator), mesh.ServerOptions{OptionalClientCert: true, AllowedRoles: []string{"admin"}}, &service{})
	_, err = describe(t, dial(t, address, caOnly(t, a), mesh.DialOptions{}))
	require.Equal(t, codes.Unauthenticated, status.Code(err))
}

func TestErrorsCrossTheWire(t *testing.T) {
	t.Parallel()
	sent := &fault.Error{
		Code: fault.RemoteError, Message: "the target said no", Retryable: true, RetryAfter: 3 * time.Second,
		Violations: []fault.Violation{{Field: "input.amount", Description: "must be positive"}},
		Cause:      errors.New("a detail that stays here"),
	}
	var log strings.Builder
	s := &service{answer: func(context.Context) (*runnerv1.DescribeResponse, error) { return nil, sent }}
	address := serve(t, nil, mesh.ServerOptions{Logger: telemetry.NewLogger(&log, "info", "text")}, s)
	_, err := describe(t, dial(t, address, nil, mesh.DialOptions{}))
	got, ok := fault.As(err)
	require.True(t, ok)
	require.Equal(t, sent.Code, got.Code)
	require.Equal(t, sent.Message, got.Message)
	require.True(t, got.Retryable)
	require.Equal(t, sent.RetryAfter, got.RetryAfter)
	require.Equal(t, sent.Violations, got.Violations)
	require.NotContains(t, err.Error()+got.Cause.Error(), "stays here")
	require.Contains(t, log.String(), "stays here", "the log has the cause")
}

func TestPanicsStayInsideTheCall(t *testing.T) {
	t.Parallel()
	var panics atomic.Bool
	panics.Store(true)
	registry := prometheus.NewRegistry()
	address := serve(t, nil, mesh.ServerOptions{Registerer: registry}, &service{answer: func(context.Context) (*runnerv1.DescribeResponse, error) {
		if panics.Load() {
			panic("a defect")
		}
		return &runnerv1.DescribeResponse{}, nil
	}})
	conn := dial(t, address, nil, mesh.DialOptions{})
	_, err := describe(t, conn)
	require.Equal(t, codes.Internal, status.Code(err))
	require.NotContains(t, err.Error(), "a defect")
	stream, err := runnerv1.NewRunnerServiceClient(conn).Execute(t.Context())
	require.NoError(t, err)
	_, err = stream.Recv()
	got, ok := fault.As(err)
	require.True(t, ok, "stream errors are faults, too")
	require.Equal(t, fault.Internal, got.Code)

	panics.Store(false)
	_, err = describe(t, conn)
	require.NoError(t, err, "the server lives on")

	require.NoError(t, testutil.GatherAndCompare(registry, strings.NewReader(`
# HELP specql_grpc_calls_total gRPC calls answered, by method and status code.
# TYPE specql_grpc_calls_total counter
specql_grpc_calls_total{code="Internal",method="/specql.runner.v1.RunnerService/Describe"} 1
specql_grpc_calls_total{code="Internal",method="/specql.runner.v1.RunnerService/Execute"} 1
specql_grpc_calls_total{code="OK",method="/specql.runner.v1.RunnerService/Describe"} 1
`), "specql_grpc_calls_total"))
}

func TestReflectionLists(t *testing.T) {
	t.Parallel()
	conn := dial(t, serve(t, nil, mesh.ServerOptions{}, &service{}), nil, mesh.DialOptions{})
	stream, err := grpc_reflection_v1.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context())
	require.NoError(t, err)
	require.NoError(t, stream.Send(&grpc_reflection_v1.ServerReflectionRequest{
		MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_ListServices{},
	}))
	resp, err := stream.Recv()
	require.NoError(t, err)
	require.NoError(t, stream.CloseSend())
	var names []string
	for _, s := range resp.GetListServicesResponse().GetService() {
		names = append(names, s.GetName())
	}
	require.Contains(t, names, "specql.runner.v1.RunnerService")
	require.Contains(t, names, "grpc.health.v1.Health")
}

func TestDrainWaitsForCalls(t *testing.T) {
	t.Parallel()
	entered, release := make(chan struct{}), make(chan struct{})
	s := mesh.NewServer(nil, mesh.ServerOptions{})
	runnerv1.RegisterRunnerServiceServer(s, &service{answer: func(context.Context) (*runnerv1.DescribeResponse, error) {
		close(entered)
		<-release
		return &runnerv1.DescribeResponse{Name: "late"}, nil
	}})
	lis := listen(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, lis) }()
	conn := dial(t, lis.Addr().String(), nil, mesh.DialOptions{})
	watch, err := grpc_health_v1.NewHealthClient(conn).Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	require.NoError(t, err)
	first, err := watch.Recv()
	require.NoError(t, err)
	require.Equal(t, grpc_health_v1.HealthCheckResponse_SERVING, first.GetStatus())

	answer := make(chan string, 1)
	go func() {
		resp, _ := runnerv1.NewRunnerServiceClient(conn).Describe(context.WithoutCancel(t.Context()), &runnerv1.DescribeRequest{})
		answer <- resp.GetName()
	}()
	<-entered
	cancel()
	// The watcher is told, or sent away: it does not keep the drain waiting.
	for err == nil {
		var next *grpc_health_v1.HealthCheckResponse
		if next, err = watch.Recv(); err == nil {
			require.Equal(t, grpc_health_v1.HealthCheckResponse_NOT_SERVING, next.GetStatus())
		}
	}
	close(release)
	require.Equal(t, "late", <-answer)
	require.NoError(t, <-ended)
}

func TestPlaintextIsForLoopbackAlone(t *testing.T) {
	t.Parallel()
	for address, ok := range map[string]bool{
		"127.0.0.1:7350": true, "localhost:1": true, "[::1]:5": true, "dns:///localhost:9090": true, "unix:///run/x": true,
		"127.8.8.8:1": true, "dns:///127.0.0.1:1": true,
		":7350": false, "0.0.0.0:1": false, "[::]:1": false, "10.0.0.1:1": false, "example.com:1": false,
		"dns:///http-runner:9090": false, "localhost.example.com:1": false, "dns://8.8.8.8/example.com:1": false, "": false,
	} {
		require.Equal(t, ok, mesh.CheckInsecure(address) == nil, address)
	}
	_, err := mesh.Dial("dns:///http-runner:9090", nil, mesh.DialOptions{})
	require.ErrorContains(t, err, "not a loopback address")

	var config net.ListenConfig
	lis, err := config.Listen(t.Context(), "tcp", "0.0.0.0:0")
	require.NoError(t, err)
	require.ErrorContains(t, mesh.NewServer(nil, mesh.ServerOptions{}).Serve(t.Context(), lis), "plaintext is for loopback alone")
}

func TestTraceContextCrosses(t *testing.T) {
	t.Parallel()
	got := make(chan trace.SpanContext, 1)
	address := serve(t, nil, mesh.ServerOptions{}, &service{answer: func(ctx context.Context) (*runnerv1.DescribeResponse, error) {
		got <- trace.SpanContextFromContext(ctx)
		return &runnerv1.DescribeResponse{}, nil
	}})
	sent := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}, TraceFlags: trace.FlagsSampled})
	ctx := trace.ContextWithSpanContext(t.Context(), sent)
	conn := dial(t, address, nil, mesh.DialOptions{})
	_, err := runnerv1.NewRunnerServiceClient(conn).Describe(ctx, &runnerv1.DescribeRequest{})
	require.NoError(t, err)
	require.Equal(t, sent.TraceID(), (<-got).TraceID())
}

func TestCredentialsFromFiles(t *testing.T) {
	t.Parallel()
	a := authority(t)
	dir := t.TempDir()
	write := func(name string, text []byte) string {
		file := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(file, text, 0o600))
		return file
	}
	cert, key, ca := issue(t, a, "docker-runner").PEM()
	certFile, keyFile, caFile := write("cert.pem", cert), write("key.pem", key), write("ca.pem", ca)
	c, err := mesh.LoadCredentials(certFile, keyFile, caFile)
	require.NoError(t, err)
	require.Equal(t, "docker-runner", c.Name())
	require.Empty(t, (*mesh.Credentials)(nil).Name())

	_, otherKey, _ := issue(t, a, "docker-runner").PEM()
	for name, files := range map[string][3]string{
		"no CA":               {certFile, keyFile, ""},
		"no key":              {certFile, "", caFile},
		"no certificate":      {"", keyFile, caFile},
		"missing file":        {certFile, keyFile, filepath.Join(dir, "none")},
		"another one's key":   {certFile, write("other.pem", otherKey), caFile},
		"CA is not PEM":       {certFile, keyFile, write("text", []byte("hello"))},
		"certificate is junk": {write("junk", []byte("junk")), keyFile, caFile},
	} {
		_, err := mesh.LoadCredentials(files[0], files[1], files[2])
		require.Error(t, err, name)
		require.NotContains(t, err.Error(), "BEGIN", name)
	}
}

func TestAuthority(t *testing.T) {
	t.Parallel()
	a := authority(t)
	again, err := mesh.LoadAuthority(a.PEM())
	require.NoError(t, err)
	// Certificates of the CA that was written and read again are taken.
	address := serve(t, issue(t, a, "http-runner"), mesh.ServerOptions{}, &service{})
	_, err = describe(t, dial(t, address, issue(t, again, mesh.RoleOrchestrator), mesh.DialOptions{ServerRole: "http-runner"}))
	require.NoError(t, err)

	for _, role := range []string{"", "Has Space", "a/b", "ünlaut", strings.Repeat("a", 64)} {
		_, err := a.Issue(role)
		require.Error(t, err, role)
	}
	cert, _, _ := issue(t, a, "x").PEM()
	_, key := a.PEM()
	_, err = mesh.LoadAuthority(cert, key)
	require.ErrorContains(t, err, "not a CA's")
	_, err = mesh.LoadAuthority(nil, nil)
	require.Error(t, err)
	caCert, _ := a.PEM()
	_, otherKey := authority(t).PEM()
	_, err = mesh.LoadAuthority(caCert, otherKey)
	require.ErrorContains(t, err, "does not belong")
	require.False(t, slices.Equal(caCert, cert))
}

// TestAHalfOpenConnectionIsNoticed on both of its ends, though the stream has nothing to say.
func TestAHalfOpenConnectionIsNoticed(t *testing.T) {
	t.Parallel()
	began, ended := make(chan struct{}), make(chan struct{})
	address := serve(t, nil, mesh.ServerOptions{}, &streaming{execute: func(ctx context.Context) {
		close(began)
		<-ctx.Done()
		close(ended)
	}})
	link := runnertest.NewLink(t, address)
	conn := dial(t, link.Address, nil, mesh.DialOptions{})
	stream, err := runnerv1.NewRunnerServiceClient(conn).Execute(t.Context())
	require.NoError(t, err)
	<-began
	link.Freeze()
	failed := make(chan error, 1)
	go func() {
		_, err := stream.Recv()
		failed <- err
	}()
	// Without pings both would wait for ever.
	for range 2 {
		select {
		case err := <-failed:
			require.Equal(t, codes.Unavailable, status.Code(err))
		case <-ended:
			ended = nil
		case <-time.After(time.Minute):
			require.FailNow(t, "one end did not notice", "the server noticed: %t", ended == nil)
		}
	}
}

// streaming is a service whose streams are a function of the test.
type streaming struct {
	runnerv1.UnimplementedRunnerServiceServer
	execute func(context.Context)
}

func (s *streaming) Execute(stream grpc.BidiStreamingServer[runnerv1.ExecuteRequest, runnerv1.ExecuteResponse]) error {
	s.execute(stream.Context())
	return nil
}

func BenchmarkUnary(b *testing.B) {
	a, err := mesh.NewAuthority()
	require.NoError(b, err)
	server, err := a.Issue("http-runner")
	require.NoError(b, err)
	client, err := a.Issue(mesh.RoleOrchestrator)
	require.NoError(b, err)
	var config net.ListenConfig
	lis, err := config.Listen(b.Context(), "tcp", "127.0.0.1:0")
	require.NoError(b, err)
	s := mesh.NewServer(server, mesh.ServerOptions{AllowedRoles: []string{mesh.RoleOrchestrator}, Registerer: prometheus.NewRegistry()})
	runnerv1.RegisterRunnerServiceServer(s, &service{})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, lis) }()
	conn, err := mesh.Dial(lis.Addr().String(), client, mesh.DialOptions{ServerRole: "http-runner"})
	require.NoError(b, err)
	stub := runnerv1.NewRunnerServiceClient(conn)
	for b.Loop() {
		if _, err := stub.Describe(ctx, &runnerv1.DescribeRequest{}); err != nil {
			b.Fatal(err)
		}
	}
	require.NoError(b, conn.Close())
	cancel()
	require.NoError(b, <-ended)
}

func TestServeThatIsToldToEndAtOnce(t *testing.T) {
	t.Parallel()
	for range 20 {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		lis := listen(t)
		require.NoError(t, mesh.NewServer(nil, mesh.ServerOptions{}).Serve(ctx, lis))
		require.ErrorIs(t, lis.Close(), net.ErrClosed, "the listener is closed")
	}
}
