package mesh

import (
	"context"
	"crypto/tls"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// pair is the folder of a service's certificate, key and CA.
type pair struct {
	dir     string
	c       *Credentials
	version int
}

// newPair makes the folder and what a service reads from it.
func newPair(t *testing.T, from *Authority, role string, trusted ...*Authority) *pair {
	t.Helper()
	p := &pair{dir: t.TempDir()}
	p.write(t, from, role, trusted...)
	var err error
	p.c, err = LoadCredentials(p.file("crt"), p.file("key"), p.file("ca"))
	require.NoError(t, err)
	return p
}

func (p *pair) file(name string) string { return filepath.Join(p.dir, name) }

// write puts a new version into the files, and has the service look at them with the next connection.
func (p *pair) write(t *testing.T, from *Authority, role string, trusted ...*Authority) {
	t.Helper()
	issued, err := from.Issue(role)
	require.NoError(t, err)
	cert, key, _ := issued.PEM()
	var bundle []byte
	for _, a := range trusted {
		ca, _ := a.PEM()
		bundle = append(bundle, ca...)
	}
	p.version++
	stamp := time.Now().Add(time.Duration(p.version-100) * time.Minute) // times of files are coarse
	for name, text := range map[string][]byte{"crt": cert, "key": key, "ca": bundle} {
		require.NoError(t, os.WriteFile(p.file(name), text, 0o600))
		require.NoError(t, os.Chtimes(p.file(name), stamp, stamp))
	}
	if p.c != nil {
		p.c.mu.Lock()
		p.c.checked = time.Time{}
		p.c.mu.Unlock()
	}
}

// cable makes connections that can be cut.
type cable struct {
	mu    sync.Mutex
	conns []net.Conn
}

func (c *cable) dial(ctx context.Context, address string) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", address)
	if err == nil {
		c.mu.Lock()
		c.conns = append(c.conns, conn)
		c.mu.Unlock()
	}
	return conn, err
}

func (c *cable) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.conns {
		_ = conn.Close()
	}
	c.conns = nil
}

// The CA is replaced under a client and a server that both go on: first both trust the old and the new one, then
// certificates come from the new one, then the old one is trusted no more.
func TestTheCAIsReplacedUnderLiveConnections(t *testing.T) {
	t.Parallel()
	for _, serverRole := range []string{"", "http-runner"} {
		t.Run("by the role "+serverRole, func(t *testing.T) {
			t.Parallel()
			before, err := NewAuthority()
			require.NoError(t, err)
			after, err := NewAuthority()
			require.NoError(t, err)
			server := newPair(t, before, "http-runner", before)
			client := newPair(t, before, RoleOrchestrator, before)
			left := newPair(t, before, RoleOrchestrator, before, after) // never gets a certificate of the new CA

			var config net.ListenConfig
			lis, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
			require.NoError(t, err)
			address := lis.Addr().String()
			ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
			ended := make(chan error, 1)
			go func() { ended <- NewServer(server.c, ServerOptions{}).Serve(ctx, lis) }()
			t.Cleanup(func() { cancel(); require.NoError(t, <-ended) })

			wire := &cable{}
			connect := func(p *pair, options ...grpc.DialOption) grpc_health_v1.HealthClient {
				conn, err := Dial(address, p.c, DialOptions{ServerRole: serverRole, DialOptions: options})
				require.NoError(t, err)
				t.Cleanup(func() { require.NoError(t, conn.Close()) })
				return grpc_health_v1.NewHealthClient(conn)
			}
			ask := func(c grpc_health_v1.HealthClient) error {
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
				defer cancel()
				_, err := c.Check(ctx, &grpc_health_v1.HealthCheckRequest{})
				return err
			}
			// again asks over a new connection. The call that finds the old one broken may fail; then it waits for the next.
			again := func(c grpc_health_v1.HealthClient) {
				wire.cut()
				require.Eventually(t, func() bool { return ask(c) == nil }, time.Minute, 10*time.Millisecond)
			}
			live := connect(client, grpc.WithContextDialer(wire.dial))
			require.NoError(t, ask(live))
			// A client of TLS that keeps its session, to come back without its certificate.
			sessions := &tls.Config{
				MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, NextProtos: []string{"h2"}, //nolint:gosec // the attacker's
				Certificates: []tls.Certificate{*left.c.current().certificate}, ClientSessionCache: tls.NewLRUClientSessionCache(1),
			}
			greet := func() error {
				d := tls.Dialer{Config: sessions}
				conn, err := d.DialContext(t.Context(), "tcp", address)
				if err != nil {
					return err
				}
				defer func() { _ = conn.Close() }()
				_, err = conn.Read(make([]byte, 1)) // the server's settings, and tickets before them
				return err
			}
			require.NoError(t, greet())

			server.write(t, before, "http-runner", before, after)
			client.write(t, before, RoleOrchestrator, before, after)
			watching, err := live.Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{})
			require.NoError(t, err)
			_, err = watching.Recv()
			require.NoError(t, err)
			require.NoError(t, ask(live), "the connection goes on")

			server.write(t, after, "http-runner", before, after)
			again(live) // a client made with the old CA takes the server's new certificate
			client.write(t, after, RoleOrchestrator, before, after)
			again(live)
			require.NoError(t, ask(connect(left)), "the old certificate holds until the old CA goes")

			server.write(t, after, "http-runner", after)
			client.write(t, after, RoleOrchestrator, after)
			again(live)
			require.Error(t, ask(connect(left)), "a certificate of the old CA")
			require.Error(t, greet(), "a session of a certificate of the old CA")

			server.write(t, before, "http-runner", after)
			wire.cut()
			require.Never(t, func() bool { return ask(live) == nil }, time.Second, 100*time.Millisecond, "a server of the old CA")
		})
	}
}
