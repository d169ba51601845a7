//go:build unix

package mesh

import (
	"context"
	"net"
	"testing"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/telemetry"
)

type describing struct {
	runnerv1.UnimplementedRunnerServiceServer
}

// Describe makes spans as many as a job has of its own, as the services do.
func (describing) Describe(ctx context.Context, _ *runnerv1.DescribeRequest) (*runnerv1.DescribeResponse, error) {
	for range 5 {
		_, span := telemetry.Start(ctx, "part")
		span.End()
	}
	return &runnerv1.DescribeResponse{}, nil
}

// BenchmarkTracing is a call with five spans in it: without any handler of traces, with those that are always there while
// nothing is recorded, and with every span recorded and thrown away. cpu-ns/op is what the process used, client and server
// together, which other load on the machine changes less than the time.
func BenchmarkTracing(b *testing.B) {
	off := traced(nil)
	recorded := sdktrace.NewTracerProvider()
	on := traced(recorded)
	b.Cleanup(func() { require.NoError(b, recorded.Shutdown(context.Background())) })
	for _, how := range []struct {
		name    string
		options []otelgrpc.Option
	}{{"none", nil}, {"off", off}, {"recorded", on}} {
		b.Run(how.name, func(b *testing.B) {
			var server []grpc.ServerOption
			client := []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}
			if how.options != nil {
				server = append(server, grpc.StatsHandler(otelgrpc.NewServerHandler(how.options...)))
				client = append(client, grpc.WithStatsHandler(otelgrpc.NewClientHandler(how.options...)))
			}
			lis, err := (&net.ListenConfig{}).Listen(b.Context(), "tcp", "127.0.0.1:0")
			require.NoError(b, err)
			s := grpc.NewServer(server...)
			runnerv1.RegisterRunnerServiceServer(s, describing{})
			ended := make(chan error, 1)
			go func() { ended <- s.Serve(lis) }()
			conn, err := grpc.NewClient(lis.Addr().String(), client...)
			require.NoError(b, err)
			stub := runnerv1.NewRunnerServiceClient(conn)
			_, err = stub.Describe(b.Context(), &runnerv1.DescribeRequest{})
			require.NoError(b, err)
			b.ReportAllocs()
			before := used(b)
			for b.Loop() {
				if _, err := stub.Describe(b.Context(), &runnerv1.DescribeRequest{}); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(used(b)-before)/float64(b.N), "cpu-ns/op")
			require.NoError(b, conn.Close())
			s.Stop()
			require.NoError(b, <-ended)
		})
	}
}

// used is the processor time of this process so far, in nanoseconds.
func used(b *testing.B) int64 {
	b.Helper()
	var u unix.Rusage
	require.NoError(b, unix.Getrusage(unix.RUSAGE_SELF, &u))
	return unix.TimevalToNsec(u.Utime) + unix.TimevalToNsec(u.Stime)
}
