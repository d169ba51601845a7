package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/mesh"
	"github.com/specql/mesh/pkg/telemetry"
)

const (
	defaultPatience = 30 * time.Second
	startRetries    = 3
	// MaxMessageBytes is how long a message is that a client takes: a run with its jobs is one. Clients in other languages
	// take 4 MiB unless they are told otherwise.
	MaxMessageBytes = 64 << 20
	// TenantHeader is the metadata key that carries the tenant of a call.
	TenantHeader = "specql-tenant"
)

var errEOF = io.EOF

// Option changes how a client connects.
type Option func(*options)

type options struct {
	caFile            string
	certFile, keyFile string
	token             string
	tenant            string
	tls               *tls.Config
	patience          time.Duration
	tracer            trace.TracerProvider
	dial              []grpc.DialOption
}

// WithCA speaks TLS and trusts the certificates of this PEM file alone.
func WithCA(file string) Option { return func(o *options) { o.caFile = file } }

// WithCertificate shows the server a certificate, as the services of a mesh ask for. Both are
// PEM files; [WithCA] is needed next to it. The files are read for each connection, so that
// one made later shows a certificate that was renewed.
func WithCertificate(certFile, keyFile string) Option {
	return func(o *options) { o.certFile, o.keyFile = certFile, keyFile }
}

// WithTLS speaks TLS as told, where [WithCA] and [WithCertificate] do not say enough.
func WithTLS(c *tls.Config) Option { return func(o *options) { o.tls = c } }

// WithToken sends a bearer token with every call. It is never sent in plaintext over a network.
func WithToken(token string) Option { return func(o *options) { o.token = token } }

// WithTenant says which tenant the calls are for, where the token allows more than one.
func WithTenant(tenant string) Option { return func(o *options) { o.tenant = tenant } }

// WithPatience is how long a watch goes on trying to reach the server again.
func WithPatience(d time.Duration) Option { return func(o *options) { o.patience = d } }

// WithTracerProvider records each call as a span of this provider; without it, of the global one
// of OpenTelemetry, which records nothing unless the application sets it. The trace of a start's
// context goes on through the orchestrator and the runners to whatever they call.
func WithTracerProvider(p trace.TracerProvider) Option { return func(o *options) { o.tracer = p } }

// WithDialOptions adds options of the connection.
func WithDialOptions(d ...grpc.DialOption) Option {
	return func(o *options) { o.dial = append(o.dial, d...) }
}

// WatchOption changes what a watch shows.
type WatchOption func(*specqlv1.WatchRunRequest)

// WithLogs shows the lines that the jobs write, too.
func WithLogs() WatchOption { return func(r *specqlv1.WatchRunRequest) { r.Logs = true } }

// AfterSequence shows only what happened after the change with this sequence.
func AfterSequence(n int64) WatchOption {
	return func(r *specqlv1.WatchRunRequest) { r.AfterSequence = n }
}

func (o *options) dialOptions(address string) ([]grpc.DialOption, error) {
	host, err := hostOf(address)
	if err != nil {
		return nil, err
	}
	if err := o.checkFiles(); err != nil {
		return nil, err
	}
	transport := insecure.NewCredentials()
	if o.tls != nil || o.caFile != "" || !isLoopback(host) {
		conf := &tls.Config{MinVersion: tls.VersionTLS12}
		if o.tls != nil {
			conf = o.tls.Clone()
		}
		if o.caFile != "" {
			if conf.RootCAs, err = loadCA(o.caFile); err != nil {
				return nil, err
			}
		}
		if o.certFile != "" {
			if _, err := loadCertificate(o.certFile, o.keyFile); err != nil {
				return nil, err
			}
			certFile, keyFile := o.certFile, o.keyFile
			conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				return loadCertificate(certFile, keyFile)
			}
		}
		conf.VerifyConnection = onlyOrchestrator(conf.VerifyConnection)
		transport = credentials.NewTLS(conf)
	}
	dial := []grpc.DialOption{
		grpc.WithTransportCredentials(transport),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"round_robin":{}}]}`),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessageBytes), grpc.MaxCallSendMsgSize(MaxMessageBytes)),
		grpc.WithUserAgent("specql-go"),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: time.Minute, Timeout: 20 * time.Second}),
	}
	tracing := []otelgrpc.Option{otelgrpc.WithPropagators(telemetry.Propagator())}
	if o.tracer != nil {
		tracing = append(tracing, otelgrpc.WithTracerProvider(o.tracer))
	}
	dial = append(dial, grpc.WithStatsHandler(otelgrpc.NewClientHandler(tracing...)))
	if o.token != "" || o.tenant != "" {
		dial = append(dial, grpc.WithPerRPCCredentials(caller{token: o.token, tenant: o.tenant, plaintext: transport.Info().SecurityProtocol == "insecure"}))
	}
	return append(dial, o.dial...), nil
}

// onlyOrchestrator refuses a neighbour of the orchestrator's that has taken its place, besides what is checked already:
// it would get the token.
func onlyOrchestrator(also func(tls.ConnectionState) error) func(tls.ConnectionState) error {
	verify := mesh.VerifyRole(mesh.RoleOrchestrator)
	return func(state tls.ConnectionState) error {
		if err := verify(state); err != nil || also == nil {
			return err
		}
		return also(state)
	}
}

// checkFiles refuses a certificate without its key, and one that no CA goes with.
func (o *options) checkFiles() error {
	switch {
	case (o.certFile == "") != (o.keyFile == ""):
		return fault.New(fault.Validation, "a certificate needs its key and a key its certificate: give both files")
	case o.certFile != "" && o.caFile == "" && o.tls == nil:
		return fault.New(fault.Validation, "a certificate needs the file of the CA next to it, that the server's certificate is checked against")
	}
	return nil
}

func loadCertificate(certFile, keyFile string) (*tls.Certificate, error) {
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, fault.Wrap(err, fault.Validation, "the certificate %s with the key %s cannot be used: %v", certFile, keyFile, err)
	}
	return &pair, nil
}

func loadCA(file string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, fault.Wrap(err, fault.Validation, "the CA file cannot be read: %v", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fault.New(fault.Validation, "the CA file %s holds no certificate in PEM form", file)
	}
	return pool, nil
}

// caller says who calls, in every call's metadata.
type caller struct {
	token, tenant string
	plaintext     bool
}

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (c caller) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	md := map[string]string{}
	if c.token != "" {
		md["authorization"] = "Bearer " + c.token
	}
	if c.tenant != "" {
		md[TenantHeader] = c.tenant
	}
	return md, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials. Plaintext is only ever
// spoken on loopback.
func (c caller) RequireTransportSecurity() bool { return !c.plaintext }

// hostOf is the host of a gRPC target.
func hostOf(address string) (string, error) {
	target := address
	if scheme, rest, ok := strings.Cut(address, "://"); ok {
		if scheme == "http" || scheme == "https" {
			return "", fault.New(fault.Validation, "the address %q is a URL; write host:port, such as 127.0.0.1:7350", address)
		}
		if scheme == "unix" {
			return "localhost", nil
		}
		// dns://authority/host:port
		target = rest[strings.LastIndex(rest, "/")+1:]
	} else if strings.HasPrefix(address, "unix:") || strings.HasPrefix(address, "unix-abstract:") {
		return "localhost", nil
	}
	host, _, err := net.SplitHostPort(target)
	if err != nil || target == "" {
		return "", fault.New(fault.Validation, "the address %q is not host:port, such as 127.0.0.1:7350", address)
	}
	return host, nil
}

func isLoopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

// backoff waits longer each time, with full jitter.
type backoff struct{ tries int }

func (b *backoff) wait(ctx context.Context) error {
	longest := min(100*time.Millisecond<<min(b.tries, 5), 2*time.Second)
	b.tries++
	timer := time.NewTimer(longest/2 + rand.N(longest/2)) //nolint:gosec // jitter
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
