package mesh

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/stats"
)

// DefaultMaxMessageBytes bounds a message in both directions where nothing else is said.
const DefaultMaxMessageBytes = 16 << 20

// defaultDrainTimeout is how long [Server.Serve] waits for calls after its context ended.
const defaultDrainTimeout = 10 * time.Second

// ServerOptions say how a server behaves. The zero value works.
type ServerOptions struct {
	Logger *slog.Logger
	// AllowedRoles are the roles that may call, reflection too; nil allows any certificate of
	// the CA. Health is open to any certificate of the CA. Without TLS there are no roles.
	AllowedRoles []string
	// MayCall decides in place of AllowedRoles where methods differ: method is such as
	// /specql.v1.OrchestratorService/GetRun, role is that of the certificate, or "".
	MayCall func(method, role string) bool
	// OptionalClientCert also lets in clients without a certificate, for an API that knows
	// its callers by other means. A certificate that is shown must come from the CA.
	OptionalClientCert bool
	// MaxMessageBytes bounds a message; DefaultMaxMessageBytes if zero.
	MaxMessageBytes int
	// DrainTimeout bounds the wait for running calls at the end of Serve; 10 s if zero.
	DrainTimeout time.Duration
	// Registerer takes the metrics; none if nil.
	Registerer prometheus.Registerer
	// TracerProvider records the calls; none if nil. Trace context is taken over in any case.
	TracerProvider trace.TracerProvider
	// ServerOptions are added at the end; interceptors among them run inside those of the server.
	ServerOptions []grpc.ServerOption
}

// Server is a gRPC server with health and reflection. Register services on it before Serve.
type Server struct {
	grpc     *grpc.Server
	health   *health.Server
	insecure bool
	drain    time.Duration
	closing  context.CancelFunc // ends the streams that would last for ever
}

// answerLimit bounds what a server sends: JSON that it took may be six times as long in an answer, as a list of small numbers is.
func answerLimit(limit int) int { return 4 * limit }

// NewServer makes a server. Without credentials it speaks plaintext and listens on loopback alone.
func NewServer(c *Credentials, o ServerOptions) *Server {
	closing, closeStreams := context.WithCancel(context.Background())
	g := newGuard(closing, c != nil, o)
	limit := cmp.Or(o.MaxMessageBytes, DefaultMaxMessageBytes)
	s := &Server{
		health: health.NewServer(), insecure: c == nil, drain: cmp.Or(o.DrainTimeout, defaultDrainTimeout), closing: closeStreams,
	}
	// Spans are begun before anybody knows who calls. Names of methods that are not there would be the caller's to make up.
	methods := sync.OnceValue(s.methods)
	options := []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(g.unary),
		grpc.ChainStreamInterceptor(g.stream),
		grpc.StatsHandler(otelgrpc.NewServerHandler(traced(o.TracerProvider,
			otelgrpc.WithFilter(func(i *stats.RPCTagInfo) bool { return !aside(i.FullMethodName) && methods()[i.FullMethodName] }),
		)...)),
		grpc.MaxRecvMsgSize(limit),
		grpc.MaxSendMsgSize(answerLimit(limit)),
		grpc.MaxConcurrentStreams(10_000),
		grpc.StaticStreamWindowSize(streamWindow),
		grpc.StaticConnWindowSize(connWindow),
		grpc.ConnectionTimeout(10 * time.Second),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minClientPing, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time: serverPing, Timeout: serverPingWait,
			// Clients come back and find replicas that joined since; running calls go on.
			MaxConnectionAge: 5 * time.Minute,
		}),
	}
	if c != nil {
		c.logTo(g.log)
		options = append(options, grpc.Creds(handshakes{credentials.NewTLS(c.serverTLS(o.OptionalClientCert)), g.denials}))
	}
	s.grpc = grpc.NewServer(append(options, o.ServerOptions...)...)
	s.health.SetServingStatus("", grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	grpc_health_v1.RegisterHealthServer(s.grpc, s.health)
	reflection.Register(s.grpc)
	return s
}

// methods are the full names of all methods; none is added once it serves.
func (s *Server) methods() map[string]bool {
	all := map[string]bool{}
	for service, info := range s.grpc.GetServiceInfo() {
		for _, m := range info.Methods {
			all["/"+service+"/"+m.Name] = true
		}
	}
	return all
}

// RegisterService implements [grpc.ServiceRegistrar].
func (s *Server) RegisterService(desc *grpc.ServiceDesc, impl any) {
	s.grpc.RegisterService(desc, impl)
}

// SetServing says in the health service whether new calls are welcome.
func (s *Server) SetServing(serving bool) {
	status := grpc_health_v1.HealthCheckResponse_NOT_SERVING
	if serving {
		status = grpc_health_v1.HealthCheckResponse_SERVING
	}
	s.health.SetServingStatus("", status)
	for name := range s.grpc.GetServiceInfo() {
		if !aside("/" + name + "/") {
			s.health.SetServingStatus(name, status)
		}
	}
}

// Serve answers calls on the listener until ctx ends, then drains, and returns nil. It
// closes the listener. A plaintext server refuses any address but loopback.
func (s *Server) Serve(ctx context.Context, lis net.Listener) error {
	if tcp, ok := lis.Addr().(*net.TCPAddr); s.insecure && ok && !tcp.IP.IsLoopback() {
		return errors.Join(CheckInsecure(tcp.String()), lis.Close())
	}
	s.SetServing(true)
	failed := make(chan error, 1)
	go func() { failed <- s.grpc.Serve(lis) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve %s: %w", lis.Addr(), err)
	case <-ctx.Done():
	}
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.drain)
	defer cancel()
	s.Drain(drain)
	// Stopped before it began is stopped as well.
	if err := <-failed; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("serve %s: %w", lis.Addr(), err)
	}
	return nil
}

// Drain takes no new calls, waits for the running ones and closes every connection; when
// ctx ends first, the calls are cut off.
func (s *Server) Drain(ctx context.Context) {
	s.health.Shutdown()
	s.closing()
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.grpc.GracefulStop()
	}()
	select {
	case <-done:
	case <-ctx.Done():
		s.grpc.Stop()
		<-done
	}
}

// CheckInsecure refuses an address that is reached from other machines, for servers and
// clients without TLS.
func CheckInsecure(addr string) error {
	host := addr
	if scheme, rest, ok := strings.Cut(addr, ":"); ok && (scheme == "unix" || scheme == "unix-abstract") {
		return nil
	} else if ok && (scheme == "dns" || scheme == "passthrough") {
		host = rest[strings.LastIndexByte(rest, '/')+1:]
	}
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.Trim(host, "[]")
	if ip := net.ParseIP(host); host == "localhost" || ip != nil && ip.IsLoopback() {
		return nil
	}
	return fmt.Errorf("%s is not a loopback address: plaintext is for loopback alone; use --tls-cert, --tls-key and --tls-ca", addr)
}
