package httprunner

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/specql/mesh/pkg/linger"
	"github.com/specql/mesh/pkg/telemetry"
)

const (
	dialTimeout     = 10 * time.Second
	idleTimeout     = 30 * time.Second
	maxHeaderBytes  = 256 << 10
	maxIdlePerHost  = 128
	maxIdleConns    = 512
	keepAlivePeriod = 15 * time.Second
)

// addressError says that the address of a connection is one that the policy forbids.
type addressError struct {
	address string
	what    string
	never   bool // no policy allows it
	byName  bool // allowed only where the URL names the address itself
}

func (e *addressError) Error() string { return fmt.Sprintf("%s is a %s address", e.address, e.what) }

// literal is the key of a context in which an address is dialled that the URL itself names.
type literal struct{}

// newConnections makes a connection pool. All that is checked when connecting depends on
// allowPrivate and roots alone, so that the connections of a pool may be shared by all services
// whose policies agree on them.
func newConnections(allowPrivate bool, roots *x509.CertPool, o *Options) *connections {
	dialer := &net.Dialer{
		Timeout:   dialTimeout,
		KeepAlive: keepAlivePeriod,
		Resolver:  o.Resolver,
		// The address is checked here, after the name was resolved and on what is connected to:
		// a name that resolves to another address the next time does not pass.
		ControlContext: func(ctx context.Context, _, address string, _ syscall.RawConn) error {
			return checkAddress(address, allowPrivate, ctx.Value(literal{}) != nil)
		},
	}
	t := &http.Transport{
		Proxy: nil, // a proxy of the environment would connect in our place, unchecked
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			if _, err := netip.ParseAddrPort(address); err == nil {
				ctx = context.WithValue(ctx, literal{}, true)
			}
			c, err := dialer.DialContext(ctx, network, address)
			if err != nil {
				return nil, err // classified by the caller
			}
			counted := &countedConn{Conn: c}
			if a := c.RemoteAddr(); a != nil {
				counted.remote = a.String()
			}
			return counted, nil
		},
		TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots},
		TLSHandshakeTimeout:    dialTimeout,
		ForceAttemptHTTP2:      true,
		MaxIdleConns:           maxIdleConns,
		MaxIdleConnsPerHost:    maxIdlePerHost,
		IdleConnTimeout:        idleTimeout,
		MaxResponseHeaderBytes: maxHeaderBytes,
	}
	return &connections{t, direct{
		dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			return t.DialContext(ctx, network, address)
		},
		slow: linger.New(unwatched, (*directBody).watch),
	}}
}

// connections are a pool: those of the transport, and those that need none.
type connections struct {
	*http.Transport

	direct direct
}

// send makes one exchange.
func (p *connections) send(ctx context.Context, req *http.Request, m *meter) (*http.Response, error) {
	if p.direct.suits(req) {
		return p.direct.roundTrip(ctx, req, m)
	}
	return p.RoundTrip(req.WithContext(m.trace(ctx)))
}

func (p *connections) closeIdle() {
	p.CloseIdleConnections()
	p.direct.closeIdle()
}

// checkAddress says whether an address may be connected to. named says that the URL names the
// address itself, which [effective.check] has looked at.
func checkAddress(address string, allowPrivate, named bool) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return &addressError{address: address, what: "malformed", never: true}
	}
	if what := neverAddress(ap.Addr()); what != "" {
		return &addressError{address: address, what: what, never: true}
	}
	if allowPrivate {
		if !named && metadataAddress(ap.Addr()) {
			return &addressError{address: address, what: "link-local or metadata", byName: true}
		}
		return nil
	}
	if what := privateAddress(ap.Addr()); what != "" {
		return &addressError{address: address, what: what}
	}
	return nil
}

// maxPools bounds the pools of services with CAs of their own.
const maxPools = 64

// pools are the connection pools of services that name the CAs that they trust.
type pools struct {
	mu      sync.Mutex
	entries map[poolKey]*connections
}

type poolKey struct {
	allowPrivate bool
	roots        [sha256.Size]byte
}

// of gives the pool of the CAs in a PEM text, nil where the text holds no certificate.
func (p *pools) of(allowPrivate bool, pem string, o *Options) *connections {
	key := poolKey{allowPrivate, sha256.Sum256([]byte(pem))}
	p.mu.Lock()
	defer p.mu.Unlock()
	if t, ok := p.entries[key]; ok {
		return t
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(pem)) {
		return nil
	}
	if p.entries == nil {
		p.entries = map[poolKey]*connections{}
	}
	if len(p.entries) >= maxPools {
		for other, t := range p.entries {
			t.closeIdle()
			delete(p.entries, other)
			break
		}
	}
	t := newConnections(allowPrivate, roots, o)
	p.entries[key] = t
	return t
}

func (p *pools) closeIdle() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, t := range p.entries {
		t.closeIdle()
	}
}

// traffic counts the bytes of one attempt on the wire, TLS and headers included.
type traffic struct {
	received, sent atomic.Int64
}

// countedConn counts its bytes for whoever uses it now. HTTP/1 gives a connection to one
// request at a time.
type countedConn struct {
	net.Conn

	remote string // its address
	mu     sync.Mutex
	owner  *traffic
	before traffic // bytes before the first owner: the TLS handshake
}

// own makes t the owner; it takes over what was counted before there was one.
func (c *countedConn) own(t *traffic) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.owner == nil {
		t.received.Add(c.before.received.Swap(0))
		t.sent.Add(c.before.sent.Swap(0))
	}
	c.owner = t
}

func (c *countedConn) counter() *traffic {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.owner == nil {
		return &c.before
	}
	return c.owner
}

func (c *countedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 {
		c.counter().received.Add(int64(n))
	}
	return n, err // net/http compares these
}

func (c *countedConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if n > 0 {
		c.counter().sent.Add(int64(n))
	}
	return n, err // net/http compares these
}

// meter watches the requests of one attempt.
type meter struct {
	wire traffic
	mu   sync.Mutex
	// addresses connected to, in order.
	addresses []string
	connected bool
	// shared says that a connection carried other requests at the same time (HTTP/2), so that
	// its bytes are nobody's.
	shared bool
	wrote  bool
}

func (m *meter) trace(ctx context.Context) context.Context {
	stages := stagesOf(ctx)
	t := &httptrace.ClientTrace{
		GotConn: func(info httptrace.GotConnInfo) {
			stages.got()
			m.connectedBy(info.Conn)
		},
		WroteRequest: func(info httptrace.WroteRequestInfo) {
			stages.enter(phaseFirstByte)
			if info.Err == nil {
				m.wroteRequest()
			}
		},
	}
	if stages != nil {
		t.GetConn = func(string) { stages.connecting(phaseConnect) }
		t.DNSStart = func(httptrace.DNSStartInfo) { stages.connecting(phaseDNS) }
		t.DNSDone = func(httptrace.DNSDoneInfo) { stages.connecting(phaseConnect) }
		t.ConnectStart = func(string, string) { stages.connecting(phaseConnect) }
		t.TLSHandshakeStart = func() { stages.connecting(phaseTLS) }
		t.TLSHandshakeDone = func(tls.ConnectionState, error) { stages.connecting(phaseConnect) }
		t.GotFirstResponseByte = func() { stages.enter(phaseRunner) }
	}
	return httptrace.WithClientTrace(ctx, t)
}

// wroteRequest notes that a request was written.
func (m *meter) wroteRequest() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.wrote = true
}

func (m *meter) connectedBy(conn net.Conn) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.connected = true
	if counted, ok := conn.(*countedConn); ok {
		m.addresses = append(m.addresses, counted.remote)
		counted.own(&m.wire)
		return
	}
	if a := conn.RemoteAddr(); a != nil {
		m.addresses = append(m.addresses, a.String())
	}
	if t, ok := conn.(*tls.Conn); ok {
		if t.ConnectionState().NegotiatedProtocol == "h2" {
			m.shared = true
			return
		}
		conn = t.NetConn()
	}
	counted, ok := conn.(*countedConn)
	if !ok {
		m.shared = true
		return
	}
	counted.own(&m.wire)
}

// stages tell the phases and the span of one request what happens to it. A nil one tells nobody.
type stages struct {
	mu     sync.Mutex
	phases *telemetry.Phases
	span   trace.Span
	// has says that there is a connection: what still happens to another one that was dialled is of no
	// concern. A request that was answered before it was written is past its stages.
	has, over bool
}

func stagesOf(ctx context.Context) *stages {
	phases, span := telemetry.PhasesOf(ctx), trace.SpanFromContext(ctx)
	if phases == nil && !span.IsRecording() {
		return nil
	}
	return &stages{phases: phases, span: span}
}

// connecting is a stage before there is a connection.
func (s *stages) connecting(stage string) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.has {
		s.tell(stage)
	}
}

func (s *stages) got() {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.has = true
	s.tell(phaseSend)
}

func (s *stages) enter(stage string) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over {
		return
	}
	s.over = stage == phaseRunner
	s.tell(stage)
}

func (s *stages) tell(stage string) {
	s.phases.Enter(stage)
	if stage == phaseRunner {
		stage = "first response byte"
	}
	s.span.AddEvent(stage)
}

// connections gives the addresses connected to since the last call.
func (m *meter) connections() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	a := m.addresses
	m.addresses = nil
	return a
}

// begin forgets whether a request was written.
func (m *meter) begin() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.wrote = false
}

// snapshot says what was seen: whether the bytes of wire are this attempt's alone, and whether
// a request was written.
func (m *meter) snapshot() (measured, wrote bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.connected && !m.shared, m.wrote
}
