package mesh_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/mesh"
)

// deaf reads nothing of a stream. It answers Describe with a name of some size.
type deaf struct {
	runnerv1.UnimplementedRunnerServiceServer

	name []byte
}

func (deaf) Execute(s grpc.BidiStreamingServer[runnerv1.ExecuteRequest, runnerv1.ExecuteResponse]) error {
	<-s.Context().Done()
	return nil
}

func (d deaf) Describe(context.Context, *runnerv1.DescribeRequest) (*runnerv1.DescribeResponse, error) {
	return &runnerv1.DescribeResponse{Name: string(d.name)}, nil
}

// Streams that nobody reads do not keep others on the connection, and messages larger than any window pass.
func TestStreamsThatNobodyReadsHoldUpNoOther(t *testing.T) {
	t.Parallel()
	large := make([]byte, 12<<20)
	for i := range large {
		large[i] = 'x'
	}
	address := serve(t, nil, mesh.ServerOptions{}, deaf{name: large})
	client := runnerv1.NewRunnerServiceClient(dial(t, address, nil, mesh.DialOptions{}))
	ctx, cancel := context.WithCancel(t.Context())
	var sending sync.WaitGroup
	defer sending.Wait()
	defer cancel()
	const streams, piece, enough = 40, 16 << 10, 12 // 40 times 192 KiB are more than a connection's window
	begun := make(chan struct{}, streams)
	for range streams {
		s, err := client.Execute(ctx)
		require.NoError(t, err)
		sending.Go(func() {
			m := &runnerv1.ExecuteRequest{Command: &runnerv1.ExecuteRequest_Start{Start: &runnerv1.Job{Input: large[:piece]}}}
			for n := 0; s.Send(m) == nil; n++ { // until the stream is full, and the test over
				if n == enough {
					begun <- struct{}{}
				}
			}
		})
	}
	for range streams {
		<-begun
	}
	call, done := context.WithTimeout(ctx, time.Minute)
	defer done()
	resp, err := client.Describe(call, &runnerv1.DescribeRequest{})
	require.NoError(t, err)
	require.Len(t, resp.GetName(), len(large))
}
