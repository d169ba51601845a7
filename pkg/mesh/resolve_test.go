package mesh

import (
	"context"
	"net"
	"net/url"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/resolver"
)

// names is a resolver whose answers a test sets, and which answers only when it is made, as that of DNS
// does within 30 s.
type names struct {
	addresses atomic.Pointer[[]string]
	open      atomic.Int32
}

func (*names) Scheme() string { return "dns" }

func (n *names) Build(_ resolver.Target, cc resolver.ClientConn, _ resolver.BuildOptions) (resolver.Resolver, error) {
	var state resolver.State
	for _, a := range *n.addresses.Load() {
		state.Addresses = append(state.Addresses, resolver.Address{Addr: a})
	}
	n.open.Add(1)
	return closing{n}, cc.UpdateState(state)
}

type closing struct{ n *names }

func (closing) ResolveNow(resolver.ResolveNowOptions) {}
func (c closing) Close()                              { c.n.open.Add(-1) }

func TestReplicasThatJoinGetCalls(t *testing.T) {
	serve := func() string {
		lis, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
		require.NoError(t, err)
		s := NewServer(nil, ServerOptions{})
		ctx, stop := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- s.Serve(ctx, lis) }()
		t.Cleanup(func() {
			stop()
			require.NoError(t, <-done)
		})
		return lis.Addr().String()
	}
	n := &names{}
	first := serve()
	n.addresses.Store(&[]string{first})
	conn, err := grpc.NewClient("dns:///replicas:9090", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultServiceConfig(roundRobin), grpc.WithResolvers(polledDNS{n, 20 * time.Millisecond}))
	require.NoError(t, err)
	client := grpc_health_v1.NewHealthClient(conn)
	ask := func() string {
		var from peer.Peer
		_, err := client.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{}, grpc.Peer(&from))
		require.NoError(t, err)
		return from.Addr.String()
	}
	require.Equal(t, first, ask())

	second := serve()
	n.addresses.Store(&[]string{first, second})
	require.Eventually(t, func() bool { return ask() == second }, 30*time.Second, time.Millisecond)
	require.NoError(t, conn.Close())
	require.Zero(t, n.open.Load(), "every resolver is closed")
}

func TestPolledDNSLooksUpNames(t *testing.T) {
	b := newPolledDNS(resolveEvery)
	require.Equal(t, "dns", b.Scheme())
	target := resolver.Target{URL: url.URL{Scheme: "dns", Path: "/127.0.0.1:1"}}
	conn := &states{}
	r, err := b.Build(target, conn, resolver.BuildOptions{})
	require.NoError(t, err)
	_, polled := r.(*poll)
	require.False(t, polled, "an address is looked up by nobody")
	r.Close()
	require.Equal(t, "127.0.0.1:1", conn.last.Addresses[0].Addr)
}

// states takes what a resolver finds.
type states struct {
	resolver.ClientConn
	last resolver.State
}

func (s *states) UpdateState(state resolver.State) error {
	s.last = state
	return nil
}
