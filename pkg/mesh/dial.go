package mesh

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	noopmetric "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/trace"
	nooptrace "go.opentelemetry.io/otel/trace/noop"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/telemetry"
)

// DialOptions say how a client behaves. The zero value works.
type DialOptions struct {
	// ServerRole is the role that the server's certificate must say, in place of the host's
	// name. Empty: the certificate must have the name dialled.
	ServerRole string
	// MaxMessageBytes bounds a message; DefaultMaxMessageBytes if zero.
	MaxMessageBytes int
	// TracerProvider records the calls; none if nil. Trace context is sent in any case.
	TracerProvider trace.TracerProvider
	// DialOptions are added at the end.
	DialOptions []grpc.DialOption
}

// A peer that is gone without a word, or that was stopped, is noticed by pings that it does
// not answer, on idle connections too: by a client within 13 s, by a server within 10 s. gRPC
// lets a client ping no more often than every 10 s. A connection that breaks for nothing is
// made again at once, so that little speaks for more patience.
const (
	clientPing     = 10 * time.Second
	clientPingWait = 3 * time.Second
	serverPing     = 5 * time.Second
	serverPingWait = 5 * time.Second
	// minClientPing is what a server tolerates: less than clientPing, since clocks differ.
	minClientPing = clientPing / 2
)

// How much of a stream may be on its way unread, and how much of a connection may be on the wire. A message that is larger opens
// its stream for as much. gRPC would measure what a connection takes, up to 16 MiB a stream, by a ping with nearly each message
// where there are few: more wake-ups of both ends for each.
const (
	streamWindow = 256 << 10
	connWindow   = 4 << 20
)

// roundRobin spreads calls over all addresses of a name.
const roundRobin = `{"loadBalancingConfig":[{"round_robin":{}}]}`

// Dial makes a client of a target such as dns:///http-runner:9090 or 127.0.0.1:7350. It
// connects when it is first used, spreads calls over all addresses, repeats nothing by
// itself, and gives errors as *[fault.Error]. Without credentials it speaks plaintext to
// loopback alone.
func Dial(target string, c *Credentials, o DialOptions) (*grpc.ClientConn, error) {
	transport := insecure.NewCredentials()
	if c != nil {
		transport = newClientCredentials(c, o.ServerRole)
	} else if err := CheckInsecure(target); err != nil {
		return nil, err
	}
	limit := cmp.Or(o.MaxMessageBytes, DefaultMaxMessageBytes)
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(transport),
		grpc.WithDefaultServiceConfig(roundRobin),
		grpc.WithResolvers(newPolledDNS(resolveEvery)),
		grpc.WithDisableRetry(),
		grpc.WithStaticStreamWindowSize(streamWindow),
		grpc.WithStaticConnWindowSize(connWindow),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(limit), grpc.MaxCallSendMsgSize(limit)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: clientPing, Timeout: clientPingWait, PermitWithoutStream: true}),
		// A replica that comes back is found in seconds.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 3 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithStatsHandler(otelgrpc.NewClientHandler(traced(o.TracerProvider)...)),
		grpc.WithChainUnaryInterceptor(unaryFault),
		grpc.WithChainStreamInterceptor(streamFault),
	}
	conn, err := grpc.NewClient(target, append(options, o.DialOptions...)...)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", target, err)
	}
	return conn, nil
}

// traced are the options of a stats handler.
func traced(p trace.TracerProvider, more ...otelgrpc.Option) []otelgrpc.Option {
	if p == nil {
		p = nooptrace.NewTracerProvider()
	}
	return append(more, otelgrpc.WithTracerProvider(p), otelgrpc.WithMeterProvider(noopmetric.NewMeterProvider()), otelgrpc.WithPropagators(telemetry.Propagator()))
}

func unaryFault(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	return toFault(invoke(ctx, method, req, reply, cc, opts...))
}

func streamFault(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	stream, err := streamer(ctx, desc, cc, method, opts...)
	if err != nil {
		return nil, toFault(err)
	}
	return faultStream{stream}, nil
}

type faultStream struct{ grpc.ClientStream }

func (s faultStream) RecvMsg(m any) error { return toFault(s.ClientStream.RecvMsg(m)) }
func (s faultStream) SendMsg(m any) error { return toFault(s.ClientStream.SendMsg(m)) }

func toFault(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	return fault.FromError(err)
}
