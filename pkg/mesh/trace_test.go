package mesh_test

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/mesh"
)

// Names of methods that are not there are the caller's to make up, whoever it is, and would be as many names of spans.
func TestSpansHaveNamesOfMethodsThatAreThere(t *testing.T) {
	t.Parallel()
	spans := tracetest.NewSpanRecorder()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans))
	a := authority(t)
	address := serve(t, issue(t, a, "http-runner"), mesh.ServerOptions{AllowedRoles: []string{mesh.RoleOrchestrator}, TracerProvider: provider}, &service{})
	stranger := dial(t, address, issue(t, a, "client"), mesh.DialOptions{ServerRole: "http-runner"})
	for _, method := range []string{"/specql.runner.v1.RunnerService/Nothing", "/nothing.Here/" + strings.Repeat("x", 4000), "/", "/a/b/c"} {
		err := stranger.Invoke(t.Context(), method, &emptypb.Empty{}, &emptypb.Empty{}, grpc.WaitForReady(true))
		require.Equal(t, codes.Unimplemented, status.Code(err), "%v", err)
	}
	_, err := describe(t, dial(t, address, issue(t, a, mesh.RoleOrchestrator), mesh.DialOptions{ServerRole: "http-runner"}))
	require.NoError(t, err)
	// A span ends after the answer is there.
	require.NoError(t, provider.ForceFlush(t.Context()))
	require.Eventually(t, func() bool { return len(spans.Ended()) > 0 }, 30*time.Second, time.Millisecond)
	for _, span := range spans.Started() {
		require.Equal(t, strings.TrimPrefix(runnerv1.RunnerService_Describe_FullMethodName, "/"), span.Name())
	}
}
