package serverlessrunner

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

// reach is which addresses may be connected to.
type reach int

const (
	// reachPublic: the provider's own name, or an endpoint where a ceiling lists none. Nothing that is not a public address.
	reachPublic reach = iota
	// reachEndpoint: an endpoint was configured. Private networks as well, but no loopback, link-local or metadata address.
	reachEndpoint
	// reachLoopback: the endpoint is a loopback address. Nothing else, since it may be plain http.
	reachLoopback
)

// addressError says that an address may not be connected to.
type addressError struct {
	addr netip.Addr
	why  string
	// private: a reach further than this one may connect to it.
	private bool
}

func (e *addressError) Error() string { return fmt.Sprintf("%s is %s", e.addr, e.why) }

// Addresses of metadata services that no other rule covers.
var metadataAddrs = map[netip.Addr]bool{
	netip.MustParseAddr("168.63.129.16"):   true, // Azure's host
	netip.MustParseAddr("100.100.100.200"): true, // Alibaba
	netip.MustParseAddr("fd20:ce::254"):    true, // Google over IPv6
}

var (
	privateNets = []netip.Prefix{
		netip.MustParsePrefix("100.64.0.0/10"), // carrier-grade NAT
		netip.MustParsePrefix("198.18.0.0/15"), // benchmarks
	}
	unusableNets = []netip.Prefix{
		netip.MustParsePrefix("0.0.0.0/8"),
		netip.MustParsePrefix("192.0.0.0/24"),
		netip.MustParsePrefix("240.0.0.0/4"),
		netip.MustParsePrefix("192.0.2.0/24"),
		netip.MustParsePrefix("192.88.99.0/24"),
		netip.MustParsePrefix("198.51.100.0/24"),
		netip.MustParsePrefix("203.0.113.0/24"),
		netip.MustParsePrefix("2001::/23"), // Teredo and others
		netip.MustParsePrefix("2001:db8::/32"),
		netip.MustParsePrefix("3fff::/20"),
		netip.MustParsePrefix("fd00:ec2::/32"), // AWS's metadata over IPv6
	}
	globalUnicast6 = netip.MustParsePrefix("2000::/3")
	nat64          = netip.MustParsePrefix("64:ff9b::/96")
	sixToFor       = netip.MustParsePrefix("2002::/16")
)

// checkAddr says why an address may not be connected to, or nil.
func (r reach) checkAddr(addr netip.Addr) error {
	addr = addr.Unmap().WithZone("")
	no := func(why string) error { return &addressError{addr: addr, why: why} }
	if addr.IsLoopback() {
		if r == reachLoopback {
			return nil
		}
		return no("a loopback address")
	}
	if r == reachLoopback {
		return no("no loopback address, which the endpoint's host must be")
	}
	switch {
	case metadataAddrs[addr]:
		return no("the address of a metadata service")
	case addr.IsLinkLocalUnicast():
		return no("a link-local address, where metadata services are")
	case addr.IsMulticast(), addr.IsUnspecified(), within(unusableNets, addr):
		return no("an address that no function has")
	}
	// An IPv4 address inside of an IPv6 address is where the packets go.
	if inner, ok := embedded(addr); ok {
		return r.checkAddr(inner)
	}
	// What is left of IPv6 hides IPv4 addresses in ways that are not looked into (64:ff9b:1::/48, ::ffff:0:0:0/96), or leads nowhere.
	if addr.Is6() && !addr.IsPrivate() && !globalUnicast6.Contains(addr) {
		return no("an address that no function has")
	}
	if r == reachPublic && (addr.IsPrivate() || within(privateNets, addr)) {
		return &addressError{addr: addr, why: "an address of a private network", private: true}
	}
	return nil
}

func within(nets []netip.Prefix, addr netip.Addr) bool {
	for _, n := range nets {
		if n.Contains(addr) {
			return true
		}
	}
	return false
}

func embedded(addr netip.Addr) (netip.Addr, bool) {
	b := addr.As16()
	switch {
	case nat64.Contains(addr):
		return netip.AddrFrom4([4]byte(b[12:16])), true
	case sixToFor.Contains(addr):
		return netip.AddrFrom4([4]byte(b[2:6])), true
	}
	return netip.Addr{}, false
}

// maxAnswer bounds the answer of a function, in bytes: as much as an output may have, and
// the log tail's header counts apart.
const maxAnswer = runner.MaxOutputBytes

// newClient makes the HTTP client of a reach. It follows no redirect, since a function does
// not move, and takes no proxy from the environment, which would decide the address for us.
func newClient(r reach, roots *x509.CertPool, resolver *net.Resolver) *http.Client {
	dialer := &net.Dialer{
		Timeout:   10 * time.Second,
		KeepAlive: 30 * time.Second,
		Resolver:  resolver,
		ControlContext: func(_ context.Context, _, address string, _ syscall.RawConn) error {
			ap, err := netip.ParseAddrPort(address)
			if err != nil {
				return fmt.Errorf("address %q: %w", address, err)
			}
			return r.checkAddr(ap.Addr())
		},
	}
	return &http.Client{
		Transport: &boundedTransport{next: &http.Transport{
			DialContext:            dialer.DialContext,
			TLSClientConfig:        &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
			ForceAttemptHTTP2:      true,
			MaxIdleConns:           200,
			MaxIdleConnsPerHost:    64,
			IdleConnTimeout:        90 * time.Second,
			TLSHandshakeTimeout:    10 * time.Second,
			MaxResponseHeaderBytes: 64 << 10,
		}},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// boundedTransport ends answers that are larger than maxAnswer.
type boundedTransport struct{ next *http.Transport }

// RoundTrip implements http.RoundTripper.
func (t *boundedTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	req, err := detached(req)
	if err != nil {
		return nil, err
	}
	resp, err := t.next.RoundTrip(req)
	if err != nil {
		return nil, err // a RoundTripper hands the error on as it is
	}
	if resp.ContentLength > maxAnswer {
		_ = resp.Body.Close()
		return nil, errAnswerTooLarge(resp.ContentLength)
	}
	resp.Body = &boundedBody{ReadCloser: resp.Body, left: maxAnswer}
	return resp, nil
}

// detached is the request with its body in memory. The AWS SDK closes a request's body as
// soon as the answer begins; where the transport has not yet seen the body's end it takes that for
// a broken request and closes the connection, with the rest of the answer still on it.
func detached(req *http.Request) (*http.Request, error) {
	if req.Body == nil || req.Body == http.NoBody {
		return req, nil
	}
	body, err := io.ReadAll(req.Body)
	if err = errors.Join(err, req.Body.Close()); err != nil {
		return nil, fmt.Errorf("request body: %w", err)
	}
	clone := req.WithContext(req.Context())
	clone.ContentLength = int64(len(body))
	clone.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil }
	clone.Body = io.NopCloser(bytes.NewReader(body))
	return clone, nil
}

// CloseIdleConnections closes the connections that are kept open.
func (t *boundedTransport) CloseIdleConnections() { t.next.CloseIdleConnections() }

func errAnswerTooLarge(size int64) error {
	return fault.New(fault.ResourceExceeded, "the function's answer is %d bytes or more and the bound is %d; let the function store large results and answer with their place", size, maxAnswer)
}

type boundedBody struct {
	io.ReadCloser
	left int64
}

// Read implements io.Reader.
func (b *boundedBody) Read(p []byte) (int, error) {
	if b.left < 0 {
		return 0, errAnswerTooLarge(maxAnswer + 1)
	}
	// One byte past the bound tells a full answer from one that is too large.
	if int64(len(p)) > b.left+1 {
		p = p[:b.left+1]
	}
	n, err := b.ReadCloser.Read(p)
	b.left -= int64(n)
	if b.left < 0 {
		return 0, errAnswerTooLarge(maxAnswer + 1)
	}
	return n, err // io.EOF must stay as it is
}

// innermost is the text of the error at the bottom of a chain.
func innermost(err error) string {
	for next := errors.Unwrap(err); next != nil; next = errors.Unwrap(err) {
		err = next
	}
	return err.Error()
}

// malformed recognises the errors of net/http for answers that break the protocol; they have no types.
func malformed(text string) bool {
	return slices.ContainsFunc([]string{
		"malformed HTTP", "malformed MIME", "malformed chunked", "multiple Content-Length", "bad Content-Length", "server response headers exceeded", "header line too long",
		"too many 1xx", "suspiciously long trailer", "chunked encoding", "invalid byte in chunk length", "unsupported transfer encoding", "invalid header",
	}, func(s string) bool { return strings.Contains(text, s) })
}

// neverSent says whether an error came before a request could reach the function.
func neverSent(err error) bool {
	var (
		certificate *tls.CertificateVerificationError
		record      tls.RecordHeaderError
		dns         *net.DNSError
		op          *net.OpError
	)
	return isRefused(err) || errors.As(err, &certificate) || errors.As(err, &record) || errors.As(err, &dns) || errors.As(err, &op) && op.Op == "dial"
}

// isRefused says whether an address was refused.
func isRefused(err error) bool {
	var refused *addressError
	return errors.As(err, &refused)
}

// connectionFault turns a failure to reach a function into a fault.
func connectionFault(err error, host string) *fault.Error {
	if f, ok := fault.As(err); ok {
		return f
	}
	var (
		certificate *tls.CertificateVerificationError
		record      tls.RecordHeaderError
		dns         *net.DNSError
	)
	switch {
	case errors.As(err, &certificate):
		return fault.Wrap(err, fault.RemoteError, "the certificate of %s is not trusted: %v", host, certificate.Err)
	case errors.As(err, &record):
		return fault.Wrap(err, fault.RemoteError, "%s does not speak TLS: %v", host, record.Msg)
	case strings.Contains(err.Error(), "tls: "): // versions and alerts of the handshake; they have no types
		return fault.Wrap(err, fault.RemoteError, "the TLS handshake with %s failed: %s", host, clip(innermost(err), 300))
	case malformed(innermost(err)):
		return fault.Wrap(err, fault.RemoteError, "%s answers with something that is not valid HTTP: %s", host, clip(innermost(err), 300))
	case errors.As(err, &dns) && dns.IsNotFound:
		return fault.Wrap(err, fault.Unavailable, "there is no host %s; check region, project, app_name or endpoint", host)
	}
	if op, ok := errors.AsType[*net.OpError](err); ok {
		return fault.Wrap(err, fault.Unavailable, "%s cannot be reached: %v", host, op)
	}
	return fault.Wrap(err, fault.Unavailable, "the connection to %s failed: %v", host, clip(err.Error(), 300))
}
