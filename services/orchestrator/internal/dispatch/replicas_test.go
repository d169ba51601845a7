package dispatch

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/test/bufconn"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
)

// answering ends each job as it begins.
type answering struct {
	runnerv1.UnimplementedRunnerServiceServer
	jobs atomic.Int64
}

func (a *answering) Execute(stream grpc.BidiStreamingServer[runnerv1.ExecuteRequest, runnerv1.ExecuteResponse]) error {
	for {
		if _, err := stream.Recv(); err != nil {
			return nil //nolint:nilerr // the caller has no more
		}
		a.jobs.Add(1)
		if err := stream.Send(&runnerv1.ExecuteResponse{}); err != nil {
			return err
		}
	}
}

// A replica that joins while streams are in use has its share of the jobs soon, though no caller ever pauses.
func TestANewReplicaHasItsShare(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		replicas, listeners := map[string]*answering{}, map[string]*bufconn.Listener{}
		for _, name := range []string{"old", "new"} {
			lis := bufconn.Listen(1 << 16)
			replicas[name], listeners[name] = &answering{}, lis
			s := grpc.NewServer()
			runnerv1.RegisterRunnerServiceServer(s, replicas[name])
			var served sync.WaitGroup
			served.Go(func() { _ = s.Serve(lis) })
			defer served.Wait()
			defer s.Stop()
		}
		names := manual.NewBuilderWithScheme("replicas")
		names.InitialState(resolver.State{Addresses: []resolver.Address{{Addr: "old"}}})
		conn, err := grpc.NewClient("replicas:///", grpc.WithResolvers(names), grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"round_robin":{}}]}`),
			grpc.WithContextDialer(func(ctx context.Context, name string) (net.Conn, error) { return listeners[name].DialContext(ctx) }))
		require.NoError(t, err)
		defer func() { require.NoError(t, conn.Close()) }()
		streams := &sessions{client: runnerv1.NewRunnerServiceClient(conn)}
		defer streams.close()

		ctx, stop := context.WithCancel(t.Context())
		var callers sync.WaitGroup
		defer callers.Wait()
		defer stop()
		for range 12 {
			callers.Go(func() {
				for ctx.Err() == nil {
					s, _ := streams.take(ctx, false)
					if err := s.open(); err != nil {
						t.Error(err)
						return
					}
					turn := s.begin()
					if err := turn.send(&runnerv1.ExecuteRequest{}); err != nil {
						t.Error(err)
						return
					}
					if _, err := s.stream.Recv(); err != nil {
						t.Error(err)
						return
					}
					time.Sleep(50 * time.Millisecond)
					turn.end(true)
				}
			})
		}
		time.Sleep(time.Minute)
		names.UpdateState(resolver.State{Addresses: []resolver.Address{{Addr: "old"}, {Addr: "new"}}})
		time.Sleep(10 * time.Second)
		older, newer := replicas["old"].jobs.Load(), replicas["new"].jobs.Load()
		time.Sleep(10 * time.Second)
		older, newer = replicas["old"].jobs.Load()-older, replicas["new"].jobs.Load()-newer
		require.Greater(t, newer, (older+newer)/4, "the new one got %d of %d jobs, 10 to 20 s after it joined", newer, older+newer)
	})
}
