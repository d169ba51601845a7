package httprunner

import (
	"bufio"
	"bytes"
	"compress/flate"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner/runnertest"
)

// secret is the credential of the services in the hostile suite. It has what each encoding changes.
const secret = "sk/live+0123456789=abc&def"

// hostile is one thing that somebody tries who writes the workflow, its input, the registry, or
// the remote service; it runs over gRPC as the orchestrator's calls do.
type hostile struct {
	tries string
	call  func(t *testing.T, w *world) attempt
	// timeout of the attempt; none if 0.
	timeout time.Duration
	// code of the error; "" where the call itself may succeed, and see says what is held.
	code fault.Code
	// rule is that of the check that refuses, "" where none does.
	rule string
	says string
	// retried: the error is worth another attempt.
	retried bool
	see     func(t *testing.T, w *world, o *runnertest.Outcome)
}

// world is what a hostile call finds.
type world struct {
	runner *Runner
	// inside is a service on loopback that the calls are not meant for.
	inside *recorder
	// open counts the connections to remote that are open.
	open atomic.Int64
}

// hostileRunner is a runner for which the addresses of trusted are public ones; all others go
// through the checks.
func hostileRunner(t *testing.T, o Options, trusted ...string) *Runner {
	t.Helper()
	r := newRunner(t, o)
	checked := r.public.DialContext
	r.public.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		if slices.Contains(trusted, address) {
			return (&net.Dialer{}).DialContext(ctx, network, address)
		}
		return checked(ctx, network, address)
	}
	return r
}

// remote serves each connection with a function that gets the connection after the head and the
// body of each request were read.
func (w *world) remote(t *testing.T, serve func(c net.Conn, req *http.Request)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	w.serve(t, l, serve)
	return l.Addr().String()
}

func (w *world) serve(t *testing.T, l net.Listener, serve func(c net.Conn, req *http.Request)) {
	t.Helper()
	done := make(chan struct{})
	t.Cleanup(func() { _ = l.Close(); <-done })
	one := func(c net.Conn) {
		defer w.open.Add(-1)
		defer func() { _ = c.Close() }()
		b := bufio.NewReader(c)
		for {
			req, err := http.ReadRequest(b)
			if err != nil {
				return
			}
			_, _ = io.Copy(io.Discard, req.Body)
			serve(c, req)
		}
	}
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			w.open.Add(1)
			go one(c)
		}
	}()
}

// says is a remote that answers everything with the same bytes.
func (w *world) says(t *testing.T, reply string) string {
	t.Helper()
	return "http://" + w.remote(t, func(c net.Conn, _ *http.Request) { _, _ = io.WriteString(c, reply) })
}

// run carries a hostile call out and checks what holds for each of them.
func (h hostile) run(t *testing.T) {
	t.Helper()
	w := &world{inside: record(t, nil)}
	a := h.call(t, w)
	if w.runner == nil {
		w.runner = newRunner(t, Options{})
	}
	client, stop := runnertest.Serve(t, w.runner)
	defer stop()
	job := a.onWire(t)
	if h.timeout > 0 {
		job.Timeout = durationpb.New(h.timeout)
	}
	o := runnertest.Execute(t, client, job)
	require.NotNil(t, o.Finished, "%v", o.Err)
	fin := o.Finished
	require.Equal(t, string(h.code), o.Code(), fin.GetError().GetMessage())
	require.Contains(t, fin.GetError().GetMessage(), h.says)
	require.Equal(t, h.retried, fin.GetError().GetRetryable())

	denied := ""
	for _, c := range fin.GetSecurity().GetChecks() {
		if !c.GetAllowed() {
			denied = c.GetRule()
			require.NotEmpty(t, c.GetSubject())
			require.NotEmpty(t, c.GetDetail())
		}
	}
	require.Equal(t, h.rule, denied, fin.GetSecurity())
	require.Len(t, fin.GetSecurity().GetPolicyDigest(), 64)
	require.Contains(t, fin.GetSecurity().GetIsolation(), "address_check")
	require.NotNil(t, fin.GetUsage().DurationSeconds, "usage is measured")
	require.Equal(t, "http", fin.GetUsage().GetSource())
	noSecret(t, fmt.Sprint(fin, o.Logs, o.Usages, string(fin.GetOutput())))
	require.LessOrEqual(t, len(fin.GetError().GetMessage()), 16<<10)
	if h.see != nil {
		h.see(t, w, o)
	} else {
		require.Empty(t, w.inside.all(), "nothing reaches the inside")
	}
	// Nothing is left behind: the runner's end closes what it kept.
	require.NoError(t, w.runner.Close())
	require.Eventually(t, func() bool { return w.open.Load() == 0 }, time.Minute, time.Millisecond, "connections are closed")
}

// noSecret looks for the secret in all its likely forms.
func noSecret(t *testing.T, text string) {
	t.Helper()
	for _, form := range []string{
		secret, url.QueryEscape(secret), url.PathEscape(secret), strings.ToLower(url.QueryEscape(secret)), hex.EncodeToString([]byte(secret)),
		strings.ToUpper(hex.EncodeToString([]byte(secret))), base64.StdEncoding.EncodeToString([]byte(secret)), base64.RawURLEncoding.EncodeToString([]byte(secret)),
		base64.StdEncoding.EncodeToString([]byte("user:" + secret))[8:30], base64.StdEncoding.EncodeToString([]byte("u:" + secret))[8:30], secret[:20],
	} {
		require.NotContains(t, text, form)
	}
}

// withSecret gives a call the credential.
func withSecret(t *testing.T, a attempt) attempt {
	t.Helper()
	t.Setenv("HOSTILE_TOKEN", secret)
	a.config["auth_type"], a.config["auth_config"] = "bearer", object{"token_env_var": "HOSTILE_TOKEN"}
	return a
}

// insideAddresses are addresses that no policy without private networks may reach, whoever leads there.
var insideAddresses = []string{
	"127.0.0.1", "127.255.255.254", "0.0.0.0", "0.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.0.1", "100.64.0.1", "169.254.169.254", "169.254.170.2",
	"168.63.129.16", "100.100.100.200", "192.0.0.192", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
	"::", "::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "::ffff:0:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a9fe:a9fe",
	"64:ff9b:1:7f00:0:100::", "2002:7f00:1::1", "2002:a9fe:a9fe::1", "2001:0:53aa:64c::80ff:fffe", "fd00:ec2::254", "fd00::1", "fe80::1", "fec0::1", "ff02::1", "100::1", "2001:db8::1",
}

func hostOf(address string) string {
	if strings.Contains(address, ":") {
		return "[" + address + "]"
	}
	return address
}

// TestHostileAddresses leads the runner to each address inside, in the URL, by a redirect, by a
// name, by a redirect to a name, and by a name that was public when it was asked for before.
func TestHostileAddresses(t *testing.T) {
	t.Parallel()
	for _, address := range insideAddresses {
		t.Run(address, func(t *testing.T) {
			t.Parallel()
			host, ip := hostOf(address), netip.MustParseAddr(address)
			redirects := func(t *testing.T, w *world, to string) attempt {
				front := w.remote(t, func(c net.Conn, _ *http.Request) {
					_, _ = fmt.Fprintf(c, "HTTP/1.1 302 Found\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n", to)
				})
				resolver := nameServer(t, func(string, int) netip.Addr { return ip })
				w.runner = hostileRunner(t, Options{Resolver: resolver}, front)
				return attempt{config: object{"base_url": "http://" + front}, policy: object{"allowed_domains": []string{"127.0.0.1", address, "name.example"}}}
			}
			for _, h := range []hostile{
				{tries: "in the URL", call: func(_ *testing.T, w *world) attempt {
					_, port := w.inside.hostPort(t)
					return attempt{config: object{"base_url": "http://" + host + ":" + port}, policy: object{}}
				}},
				{tries: "by a redirect", call: func(t *testing.T, w *world) attempt {
					_, port := w.inside.hostPort(t)
					return redirects(t, w, "http://"+host+":"+port+"/latest/meta-data/")
				}},
				{tries: "by a redirect to a name", call: func(t *testing.T, w *world) attempt {
					_, port := w.inside.hostPort(t)
					return redirects(t, w, "http://name.example:"+port+"/")
				}},
				{tries: "by a name that was public before", call: func(t *testing.T, w *world) attempt {
					var public atomic.Bool
					public.Store(true)
					resolver := nameServer(t, func(string, int) netip.Addr {
						if public.Load() {
							return netip.MustParseAddr("93.184.216.34")
						}
						return ip
					})
					before, err := resolver.LookupNetIP(t.Context(), "ip", "rebind.example.")
					require.NoError(t, err)
					require.Equal(t, "93.184.216.34", before[0].Unmap().String())
					public.Store(false)
					w.runner = newRunner(t, Options{Resolver: resolver})
					_, port := w.inside.hostPort(t)
					return attempt{config: object{"base_url": "http://rebind.example.:" + port}, policy: object{"allowed_domains": []string{"rebind.example"}}}
				}},
			} {
				h.code, h.rule, h.says = fault.PolicyViolation, "allow_private_networks", "address"
				t.Run(h.tries, h.run)
			}
		})
	}
}

// TestHostileMetadata: private networks are allowed here; that is no leave to ask a machine for
// its credentials.
func TestHostileMetadata(t *testing.T) {
	t.Parallel()
	for _, address := range []string{"169.254.169.254", "169.254.170.2", "168.63.129.16", "100.100.100.200", "fd00:ec2::254", "fe80::1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a9fe:a9fe", "2002:a9fe:a9fe::1"} {
		ip := netip.MustParseAddr(address)
		require.True(t, metadataAddress(ip), address)
		named := func(t *testing.T, w *world) {
			w.runner = newRunner(t, Options{Resolver: nameServer(t, func(string, int) netip.Addr { return ip })})
		}
		for _, h := range []hostile{
			{tries: "the base URL's own host", rule: "allowed_domains", call: func(*testing.T, *world) attempt {
				return attempt{config: object{"base_url": "http://" + hostOf(address)}, policy: open()}
			}},
			{tries: "a name", rule: "allow_private_networks", call: func(t *testing.T, w *world) attempt {
				named(t, w)
				return attempt{config: object{"base_url": "http://name.example"}, policy: open()}
			}},
			{tries: "a name, with the address allowed", rule: "allow_private_networks", call: func(t *testing.T, w *world) attempt {
				named(t, w)
				return attempt{config: object{"base_url": "http://name.example"}, policy: open(object{"allowed_domains": []string{"name.example", address}})}
			}},
			{tries: "a redirect", rule: "allowed_domains", call: func(t *testing.T, w *world) attempt {
				return attempt{config: object{"base_url": w.says(t, "HTTP/1.1 302 Found\r\nLocation: http://"+hostOf(address)+"/\r\nContent-Length: 0\r\n\r\n")}, policy: open()}
			}},
			{tries: "the registry allows it, the ceiling says no domains", rule: "allowed_domains", call: func(t *testing.T, w *world) attempt {
				w.runner = newRunner(t, Options{Ceiling: &Policy{AllowPrivateNetworks: true}})
				return attempt{config: object{"base_url": "http://" + hostOf(address)}, policy: open(object{"allowed_domains": []string{address}})}
			}},
		} {
			h.code = fault.PolicyViolation
			t.Run(address+" "+h.tries, h.run)
		}
	}
	for _, a := range []string{"10.0.0.1", "127.0.0.1", "8.8.8.8", "fd00::1", "2606:4700::1111", "64:ff9b::a00:1"} {
		require.False(t, metadataAddress(netip.MustParseAddr(a)), a)
	}
	require.NoError(t, checkAddress("169.254.169.254:80", true, true), "named in the URL and in allowed_domains")
}

// TestHostileHosts writes hosts so that two readers see two different ones.
func TestHostileHosts(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		tries, host      string
		code, redirected fault.Code
		rule             string
	}{
		{"decimal", "2130706433", fault.Validation, fault.RemoteError, ""},
		{"hexadecimal", "0x7f000001", fault.Validation, fault.RemoteError, ""},
		{"octal", "017700000001", fault.Validation, fault.RemoteError, ""},
		{"octal parts", "0177.0.0.1", fault.Validation, fault.RemoteError, ""},
		{"hexadecimal parts", "0x7f.0x0.0x0.0x1", fault.Validation, fault.RemoteError, ""},
		{"two parts", "127.1", fault.Validation, fault.RemoteError, ""},
		{"leading zeros", "127.000.000.001", fault.Validation, fault.RemoteError, ""},
		{"too many parts", "127.0.0.1.1", fault.Validation, fault.RemoteError, ""},
		{"a final dot", "127.0.0.1.", fault.PolicyViolation, fault.PolicyViolation, "allow_private_networks"},
		{"full-width digits", "１２７.0.0.1", fault.PolicyViolation, fault.PolicyViolation, "allow_private_networks"},
		{"ideographic dots", "127。0。0。1", fault.PolicyViolation, fault.PolicyViolation, "allow_private_networks"},
		{"circled digits", "①②⑦.0.0.①", fault.PolicyViolation, fault.PolicyViolation, "allow_private_networks"},
		{"mapped, in brackets", "[::ffff:7f00:1]", fault.PolicyViolation, fault.PolicyViolation, "allow_private_networks"},
		{"a zone", "[fe80::1%25lo]", fault.Validation, fault.RemoteError, ""},
		{"a mapped zone", "[::ffff:127.0.0.1%25lo]", fault.Validation, fault.RemoteError, ""},
		{"a user name", "93.184.216.34@127.0.0.1", fault.Validation, fault.RemoteError, ""},
		{"a password", "a:b@127.0.0.1", fault.Validation, fault.RemoteError, ""},
		{"a backslash", `127.0.0.1\@93.184.216.34`, fault.Validation, fault.RemoteError, ""},
		{"an escaped slash", "127.0.0.1%2f.example.com", fault.Validation, fault.RemoteError, ""},
		{"an escaped dot", "127%2e0.0.1", fault.Validation, fault.RemoteError, ""},
		{"a NUL", "127.0.0.1%00.example.com", fault.Validation, fault.RemoteError, ""},
		{"a line break", "127.0.0.1%0d%0a.example.com", fault.Validation, fault.RemoteError, ""},
		{"two ports", "127.0.0.1:80", fault.Validation, fault.RemoteError, ""},
		{"localhost", "localhost", fault.PolicyViolation, fault.PolicyViolation, "allow_private_networks"},
		{"localhost in capitals, with a dot", "LOCALHOST.", fault.PolicyViolation, fault.PolicyViolation, "allow_private_networks"},
		{"a letter that looks like another", "api.exаmple.com", fault.PolicyViolation, fault.PolicyViolation, "allowed_domains"},
		{"a name that ends like an allowed one", "evilexample.com", fault.PolicyViolation, fault.PolicyViolation, "allowed_domains"},
		{"a name that begins like an allowed one", "api.example.com.evil.test", fault.PolicyViolation, fault.PolicyViolation, "allowed_domains"},
	} {
		policy := object{"allowed_domains": []string{"api.example.com", "*.example.com", "127.0.0.1", "::1", "localhost", "::ffff:127.0.0.1"}}
		hostile{tries: tt.tries, code: tt.code, rule: tt.rule, call: func(t *testing.T, w *world) attempt {
			_, port := w.inside.hostPort(t)
			w.runner = newRunner(t, Options{Resolver: nameServer(t, func(string, int) netip.Addr { return netip.MustParseAddr("127.0.0.1") })})
			return attempt{config: object{"base_url": "http://" + tt.host + ":" + port}, policy: policy}
		}}.named(t, tt.tries+" in the URL")
		hostile{tries: tt.tries, code: tt.redirected, rule: tt.rule, call: func(t *testing.T, w *world) attempt {
			_, port := w.inside.hostPort(t)
			front := w.remote(t, func(c net.Conn, _ *http.Request) {
				_, _ = fmt.Fprintf(c, "HTTP/1.1 302 Found\r\nLocation: http://%s:%s/\r\nContent-Length: 0\r\n\r\n", tt.host, port)
			})
			w.runner = hostileRunner(t, Options{Resolver: nameServer(t, func(string, int) netip.Addr { return netip.MustParseAddr("127.0.0.1") })}, front)
			return attempt{config: object{"base_url": "http://" + front}, policy: policy}
		}}.named(t, tt.tries+" in a redirect")
	}
}

func (h hostile) named(t *testing.T, name string) {
	t.Helper()
	t.Run(name, h.run)
}

// TestHostileRequests: the input and the registry write what the protocol writes.
func TestHostileRequests(t *testing.T) {
	for _, tt := range []struct {
		tries string
		op    object
		input string
	}{
		{"a second header by a line break in a value", object{"headers": object{"X-A": "{v}"}}, `{"v":"a\r\nX-Evil: 1"}`},
		{"a second request by a line break in a value", object{"headers": object{"X-A": "{v}"}}, `{"v":"a\n\nGET /admin HTTP/1.1\r\nHost: x\r\n\r\n"}`},
		{"NUL in a header", object{"headers": object{"X-A": "{v}"}}, `{"v":"a\u0000b"}`},
		{"a length of its own", object{"headers": object{"Content-Length": "{v}"}}, `{"v":"0"}`},
		{"a length of its own, with an underscore", object{"headers": object{"content_length": "5"}}, `{}`},
		{"chunks of its own", object{"headers": object{"Transfer-Encoding": "chunked"}}, `{}`},
		{"chunks of its own, with an underscore", object{"headers": object{"Transfer_Encoding": "chunked"}}, `{}`},
		{"another host", object{"headers": object{"HOST": "admin.internal"}}, `{}`},
		{"hop-by-hop removal of a header", object{"headers": object{"Connection": "close, X-Api-Key"}}, `{}`},
		{"another protocol", object{"headers": object{"Upgrade": "h2c"}}, `{}`},
		{"settings of HTTP/2", object{"headers": object{"HTTP2-Settings": "AAMAAABkAARAAAAAAAIAAAAA"}}, `{}`},
		{"an expectation", object{"headers": object{"Expect": "100-continue"}}, `{}`},
		{"trailers", object{"headers": object{"Trailer": "X-A"}}, `{}`},
		{"a proxy's credentials", object{"headers": object{"Proxy-Authorization": "Basic x"}}, `{}`},
		{"a header's name with a colon", object{"headers": object{"X-A: 1\r\nX-B": "1"}}, `{}`},
		{"a pseudo header", object{"headers": object{":authority": "admin.internal"}}, `{}`},
		{"a header's name with a space before the colon", object{"headers": object{"Transfer-Encoding ": "chunked"}}, `{}`},
		{"a step up", object{"path": "/u/{id}"}, `{"id":"../admin"}`},
		{"a step up, with a path parameter", object{"path": "/u/{+id}/x"}, `{"id":"a/..;x=1/admin"}`},
		{"a step up, made by a literal and a value", object{"path": "/u/..{id}"}, `{"id":";a"}`},
		{"a step up, made with a backslash", object{"path": "/u/..{id}"}, `{"id":"\\admin"}`},
		{"a step up, escaped in the registry", object{"path": "/u/%2e%2e%5cadmin"}, `{}`},
		{"another host by two slashes", object{"path": "/{+id}"}, `{"id":"/evil.test/x"}`},
		{"another host by two slashes, in the registry", object{"path": "//evil.test/x"}, `{}`},
		{"another host by a whole URL", object{"path": "http://evil.test/"}, `{}`},
		{"NUL in the path", object{"path": "/u/{id}"}, `{"id":"a\u0000.json"}`},
		{"a line break in the path", object{"path": "/u/{id}"}, `{"id":"a HTTP/1.1\r\nX: 1"}`},
		{"a line break in the method", object{"method": "GET / HTTP/1.1\r\nX: 1\r\n"}, `{}`},
		{"a tunnel", object{"method": "CONNECT"}, `{}`},
		{"a trace, which echoes credentials", object{"method": "TRACE"}, `{}`},
	} {
		hostile{tries: tt.tries, code: fault.Validation, call: func(t *testing.T, w *world) attempt {
			return withSecret(t, attempt{config: object{"base_url": w.inside.URL}, op: tt.op, input: tt.input})
		}}.named(t, tt.tries)
	}
	for _, tt := range []struct {
		tries string
		op    object
		input string
		uri   string
	}{
		{"a slash in a field", object{"path": "/u/{id}/x"}, `{"id":"a/b"}`, "/u/a%2Fb/x"},
		{"an escaped slash in a field", object{"path": "/u/{id}/x"}, `{"id":"a%2fb"}`, "/u/a%252fb/x"},
		{"a step up, escaped twice", object{"path": "/u/{id}/x"}, `{"id":"%252e%252e%252fadmin"}`, "/u/%25252e%25252e%25252fadmin/x"},
		{"a query in a field of the path", object{"path": "/u/{id}"}, `{"id":"1?admin=true#x"}`, "/u/1%3Fadmin=true%23x"},
		{"a path parameter in a field", object{"path": "/u/{id}"}, `{"id":"1;role=admin"}`, "/u/1%3Brole=admin"},
		{"a second parameter in a field of the query", object{"path": "/u", "query": object{"q": "{q}"}}, `{"q":"1&admin=true"}`, "/u?q=1%26admin%3Dtrue"},
		{"a line break in a field of the query", object{"path": "/u", "query": object{"q": "{q}"}}, `{"q":"1 HTTP/1.1\r\nX-Evil: 1"}`, "/u?q=1+HTTP%2F1.1%0D%0AX-Evil%3A+1"},
		{"a template in a value", object{"path": "/u/{a}/{b}"}, `{"a":"{b}","b":"x"}`, "/u/%7Bb%7D/x"},
		{"a parameter's name with a separator", object{"method": "GET", "path": "/u"}, `{"a&admin=true":"1"}`, "/u?a%26admin%3Dtrue=1"},
	} {
		hostile{tries: tt.tries, call: func(_ *testing.T, w *world) attempt {
			op := tt.op
			if op["method"] == nil {
				op["body"] = "none"
			}
			return attempt{config: object{"base_url": w.inside.URL}, op: op, input: tt.input}
		}, see: func(t *testing.T, w *world, _ *runnertest.Outcome) {
			require.Len(t, w.inside.all(), 1)
			require.Equal(t, tt.uri, w.inside.last(t).URI)
			require.Empty(t, w.inside.last(t).Header.Get("X-Evil"))
		}}.named(t, tt.tries)
	}
}

func compressed(t *testing.T, kind string, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	var z io.WriteCloser = gzip.NewWriter(&b)
	if kind == "deflate" {
		var err error
		z, err = flate.NewWriter(&b, flate.BestCompression)
		require.NoError(t, err)
	}
	_, err := z.Write(data)
	require.NoError(t, err)
	require.NoError(t, z.Close())
	return b.Bytes()
}

func packed(encoding string, body []byte) string {
	return fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: %s\r\nContent-Length: %d\r\n\r\n%s", encoding, len(body), body)
}

// TestHostileServices: the remote service is the attacker.
func TestHostileServices(t *testing.T) {
	zeros := make([]byte, 16<<20)
	bomb := compressed(t, "gzip", zeros)
	trickle := func(head, drop string) func(t *testing.T, w *world) attempt {
		return func(t *testing.T, w *world) attempt {
			front := w.remote(t, func(c net.Conn, _ *http.Request) {
				_, err := io.WriteString(c, head)
				for range 100 { // the reader's end, or its patience, ends it
					if err != nil {
						return
					}
					_, err = io.WriteString(c, drop)
				}
				_, _ = c.Read(make([]byte, 1)) // until the runner hangs up
				_ = c.Close()
			})
			return attempt{config: object{"base_url": "http://" + front}, policy: open(object{"max_response_size": 1 << 20})}
		}
	}
	flood := func(head, chunk string) func(t *testing.T, w *world) attempt {
		return func(t *testing.T, w *world) attempt {
			front := w.remote(t, func(c net.Conn, _ *http.Request) {
				_, err := io.WriteString(c, head)
				for err == nil {
					_, err = io.WriteString(c, chunk)
				}
			})
			return attempt{config: object{"base_url": "http://" + front}, policy: open(object{"max_response_size": 1 << 20})}
		}
	}
	says := func(reply string) func(t *testing.T, w *world) attempt {
		return func(t *testing.T, w *world) attempt {
			return attempt{config: object{"base_url": w.says(t, reply)}, policy: open(object{"max_response_size": 1 << 20})}
		}
	}
	small := func(t *testing.T, _ *world, o *runnertest.Outcome) {
		t.Helper()
		require.Less(t, len(o.Finished.GetOutput()), 1<<20)
		require.Less(t, o.Finished.GetUsage().GetNetworkRxMb(), 1.0)
		require.Positive(t, o.Finished.GetUsage().GetNetworkRxMb())
	}
	const controls = "\x1b]0;owned\x07\x1b[2J\u202egnp.exe\x00"
	const ok, chunked = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
	for _, h := range []hostile{
		{tries: "16 MiB in a gzip of 16 KiB", call: says(packed("gzip", bomb)), code: fault.ResourceExceeded, rule: "max_response_size", says: "max_response_size"},
		{tries: "a gzip in a gzip", call: says(packed("gzip", compressed(t, "gzip", bomb))), see: small},
		{tries: "gzip, twice in one header", call: says(packed("gzip, gzip", compressed(t, "gzip", bomb))), see: small},
		{tries: "deflate, which was not asked for", call: says(packed("deflate", compressed(t, "deflate", zeros))), see: small},
		{tries: "a bomb in an error", call: says(strings.Replace(packed("gzip", bomb), "200 OK", "500 No", 1)), code: fault.RemoteError, retried: true, says: "answered 500"},
		{tries: "a bomb in a redirect", call: func(t *testing.T, w *world) attempt {
			a := says(strings.Replace(packed("gzip", bomb), "200 OK", "302 Found\r\nLocation: /again", 1))(t, w)
			return a
		}, code: fault.RemoteError, says: "redirects"},
		{tries: "a body without an end", call: flood("HTTP/1.1 200 OK\r\n\r\n", strings.Repeat("x", 64<<10)), code: fault.ResourceExceeded, rule: "max_response_size"},
		{tries: "chunks without an end", call: flood(chunked, "10000\r\n"+strings.Repeat("x", 64<<10)+"\r\n"), code: fault.ResourceExceeded, rule: "max_response_size"},
		{tries: "an error without an end", call: flood("HTTP/1.1 503 No\r\n\r\n", strings.Repeat("x", 64<<10)), code: fault.RemoteError, retried: true},
		{tries: "a length beyond all bounds", call: says("HTTP/1.1 200 OK\r\nContent-Length: 9223372036854775807\r\n\r\n"), code: fault.ResourceExceeded, rule: "max_response_size"},
		{tries: "a head without an end", call: flood("HTTP/1.1 200 OK\r\n", "X-A: "+strings.Repeat("x", 1000)+"\r\n"), code: fault.RemoteError, says: "not valid HTTP"},
		{tries: "a header line without an end", call: flood("HTTP/1.1 200 OK\r\nX-A: ", strings.Repeat("x", 64<<10)), code: fault.RemoteError, says: "not valid HTTP"},
		{tries: "a status line without an end", call: flood("HTTP/1.1 200 ", strings.Repeat("x", 64<<10)), code: fault.RemoteError, says: "not valid HTTP"},
		{tries: "interim answers without an end", call: flood("", "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"), code: fault.RemoteError, says: "not valid HTTP"},
		{tries: "trailers without an end", call: flood(chunked+"0\r\n", "X-A: "+strings.Repeat("x", 1000)+"\r\n"), code: fault.RemoteError, says: "not valid HTTP"},
		{tries: "chunks that are all extension", call: flood(chunked, "1;"+strings.Repeat("x", 2000)+"\r\nx\r\n"), code: fault.RemoteError, says: "not valid HTTP"},
		{tries: "a chunk's size without an end", call: flood(chunked, strings.Repeat("0", 64<<10)), code: fault.RemoteError, says: "not valid HTTP"},
		{tries: "no answer", call: trickle("", ""), timeout: 200 * time.Millisecond, code: fault.Timeout, retried: true},
		{tries: "a head that does not end", call: trickle("HTTP/1.1 200 OK\r\n", "X-A: x\r\n"), timeout: 200 * time.Millisecond, code: fault.Timeout, retried: true},
		{tries: "a body that does not end", call: trickle("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", "x"), timeout: 200 * time.Millisecond, code: fault.Timeout, retried: true},
		{tries: "a gzip that does not end", call: trickle(packed("gzip", bomb)[:200], ""), timeout: 200 * time.Millisecond, code: fault.Timeout, retried: true},
		{tries: "an error that does not end", call: trickle("HTTP/1.1 400 No\r\nContent-Length: 1000\r\n\r\n", "x"), timeout: 200 * time.Millisecond, code: fault.Timeout, retried: true},
		{tries: "a redirect that does not end", call: trickle("HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 1000\r\n\r\n", "x"), timeout: 200 * time.Millisecond, code: fault.Timeout, retried: true},
		{tries: "two lengths", call: says("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 40\r\n\r\n{}"), code: fault.RemoteError},
		{tries: "another protocol", call: says("220 mail.example ESMTP\r\n"), code: fault.RemoteError},
		{tries: "an answer to a question that comes next", call: says(ok + "HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{\"forged\":true}"), see: func(t *testing.T, w *world, o *runnertest.Outcome) {
			require.JSONEq(t, `{}`, string(o.Finished.GetOutput()))
		}},
		{tries: "an upgrade that was not asked for", call: says("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"), code: fault.RemoteError, says: "answered 101"},
		{tries: "control characters for the console", call: says("HTTP/1.1 400 No\r\nConnection: close\r\nContent-Length: " + strconv.Itoa(len(controls)) + "\r\n\r\n" + controls), code: fault.RemoteError, see: func(t *testing.T, _ *world, o *runnertest.Outcome) {
			require.NotContains(t, o.Finished.GetError().GetMessage(), "\x1b")
			require.NotContains(t, o.Finished.GetError().GetMessage(), "\u202e")
		}},
		{tries: "a redirect to a file", call: says("HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n"), code: fault.PolicyViolation, rule: "allowed_domains"},
		{tries: "a redirect to another protocol", call: says("HTTP/1.1 302 Found\r\nLocation: gopher://127.0.0.1:6379/_FLUSHALL\r\nContent-Length: 0\r\n\r\n"), code: fault.PolicyViolation, rule: "allowed_domains"},
		{tries: "a redirect with a line break", call: says("HTTP/1.1 302 Found\r\nLocation: /x%0d%0aX-Evil: 1\tHTTP/1.1\r\nContent-Length: 0\r\n\r\n"), code: fault.RemoteError},
		{tries: "redirects without an end", call: says("HTTP/1.1 307 Again\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n"), code: fault.RemoteError, says: "more than 10 redirects"},
		{tries: "a redirect that takes the credentials along", call: func(t *testing.T, w *world) attempt {
			a := withSecret(t, attempt{config: object{"base_url": w.says(t, "HTTP/1.1 307 Go\r\nLocation: "+w.inside.URL+"/take?x=1\r\nContent-Length: 0\r\n\r\n")}, policy: open(object{"allowed_domains": []string{"127.0.0.1"}})})
			a.config["headers"] = object{"X-Own-Key": secret, "Cookie": "session=" + secret}
			return a
		}, see: func(t *testing.T, w *world, _ *runnertest.Outcome) {
			require.Len(t, w.inside.all(), 1)
			noSecret(t, fmt.Sprint(w.inside.last(t)))
		}},
		{tries: "a redirect from https to http", call: func(t *testing.T, w *world) attempt {
			s := httptest.NewTLSServer(http.RedirectHandler(w.inside.URL, http.StatusTemporaryRedirect))
			t.Cleanup(s.Close)
			roots := x509.NewCertPool()
			roots.AddCert(s.Certificate())
			w.runner = newRunner(t, Options{RootCAs: roots})
			return withSecret(t, attempt{config: object{"base_url": s.URL}})
		}, code: fault.RemoteError, rule: "tls", says: "from https to http"},
	} {
		t.Run(h.tries, h.run)
	}
}

// TestNoAnswerIsTakenForAnother: what a service sends beyond its answer is not read as the next one.
func TestNoAnswerIsTakenForAnother(t *testing.T) {
	t.Parallel()
	w := &world{}
	var n atomic.Int64
	front := w.remote(t, func(c net.Conn, _ *http.Request) {
		_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n{\"n\":%d}HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{\"forged\":true}", n.Add(1))
	})
	r := newRunner(t, Options{})
	for i := range 5 {
		require.JSONEq(t, fmt.Sprintf(`{"n":%d}`, i+1), attempt{config: object{"base_url": "http://" + front}}.ok(t, r))
	}
}

// authority is a CA of a test.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "a CA"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	require.NoError(t, err)
	c, err = x509.ParseCertificate(der)
	require.NoError(t, err)
	return &authority{c, key}
}

func (a *authority) pem() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}))
}

// issue makes a server's certificate, changed by change.
func (a *authority) issue(t *testing.T, change func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if change != nil {
		change(c)
	}
	der, err := x509.CreateCertificate(rand.Reader, c, a.cert, key.Public(), a.key)
	require.NoError(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// TestHostileTLS: somebody sits between the runner and the service.
func TestHostileTLS(t *testing.T) {
	trusted, other := newAuthority(t), newAuthority(t)
	serve := func(t *testing.T, w *world, config *tls.Config) string {
		t.Helper()
		l, err := tls.Listen("tcp", "127.0.0.1:0", config)
		require.NoError(t, err)
		w.serve(t, l, func(c net.Conn, _ *http.Request) {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
		})
		return "https://" + l.Addr().String()
	}
	presents := func(cert func(t *testing.T) tls.Certificate, most uint16) func(t *testing.T, w *world) attempt {
		return func(t *testing.T, w *world) attempt {
			t.Setenv("TRUSTED_CA", trusted.pem())
			a := withSecret(t, attempt{config: object{"base_url": serve(t, w, &tls.Config{Certificates: []tls.Certificate{cert(t)}, MaxVersion: most, MinVersion: tls.VersionTLS10})}}) //nolint:gosec // what the attacker offers
			a.config["ca_env_var"] = "TRUSTED_CA"
			return a
		}
	}
	certificate := func(by *authority, change func(*x509.Certificate)) func(t *testing.T) tls.Certificate {
		return func(t *testing.T) tls.Certificate { return by.issue(t, change) }
	}
	good := certificate(trusted, nil)
	untrusted := func(tries string, call func(t *testing.T, w *world) attempt) hostile {
		return hostile{tries: tries, call: call, code: fault.RemoteError, rule: "tls", says: "certificate is not trusted"}
	}
	for _, h := range []hostile{
		untrusted("a certificate of another CA", presents(certificate(other, nil), 0)),
		untrusted("a certificate for another name", presents(certificate(trusted, func(c *x509.Certificate) { c.IPAddresses, c.DNSNames = nil, []string{"api.example.com"} }), 0)),
		untrusted("a certificate for another address", presents(certificate(trusted, func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 2)} }), 0)),
		untrusted("a name in the subject alone", presents(certificate(trusted, func(c *x509.Certificate) { c.IPAddresses, c.Subject.CommonName = nil, "127.0.0.1" }), 0)),
		untrusted("a certificate that has ended", presents(certificate(trusted, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), 0)),
		untrusted("a certificate of tomorrow", presents(certificate(trusted, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }), 0)),
		untrusted("a client's certificate", presents(certificate(trusted, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }), 0)),
		untrusted("a self-signed certificate", func(t *testing.T, w *world) attempt {
			self := newAuthority(t)
			self.cert.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
			return presents(certificate(self, nil), 0)(t, w)
		}),
		untrusted("the CA of one service for another", func(t *testing.T, w *world) attempt {
			a := presents(good, 0)(t, w)
			delete(a.config, "ca_env_var")
			return a
		}),
		{tries: "an old TLS", call: presents(good, tls.VersionTLS11), code: fault.RemoteError, says: "TLS"},
		{tries: "plain text", call: func(t *testing.T, w *world) attempt {
			return withSecret(t, attempt{config: object{"base_url": strings.Replace(w.inside.URL, "http:", "https:", 1)}})
		}, code: fault.RemoteError, says: "TLS"},
		{tries: "a CA that the registry names and the ceiling does not allow", call: func(t *testing.T, w *world) attempt {
			a := presents(good, 0)(t, w)
			w.runner = newRunner(t, Options{Ceiling: &Policy{AllowPrivateNetworks: true, AllowedEnvVars: []string{"HOSTILE_TOKEN"}}})
			return a
		}, code: fault.PolicyViolation, rule: "allowed_env_vars", says: "TRUSTED_CA"},
		{tries: "a secret as a CA, to see it in the error", call: func(t *testing.T, w *world) attempt {
			a := presents(good, 0)(t, w)
			a.config["ca_env_var"] = "HOSTILE_TOKEN"
			return a
		}, code: fault.Validation, says: "HOSTILE_TOKEN"},
		{tries: "nothing: the service itself", call: presents(good, 0), see: func(t *testing.T, _ *world, o *runnertest.Outcome) {
			require.JSONEq(t, `{}`, string(o.Finished.GetOutput()))
			require.Contains(t, fmt.Sprint(o.Finished.GetSecurity().GetChecks()), "TLS 1.3")
		}},
	} {
		t.Run(h.tries, h.run)
	}
}

// TestHostileSecrets: the service gives back what it was given, in every form, for all to read.
func TestHostileSecrets(t *testing.T) {
	forms := func(s string) string {
		return strings.Join([]string{
			s, url.QueryEscape(s), url.PathEscape(s), strings.ToLower(url.QueryEscape(s)), hex.EncodeToString([]byte(s)), strings.ToUpper(hex.EncodeToString([]byte(s))),
			base64.StdEncoding.EncodeToString([]byte(s)), base64.RawURLEncoding.EncodeToString([]byte(s)), base64.StdEncoding.EncodeToString([]byte("user:" + s + "!")),
			base64.StdEncoding.EncodeToString([]byte("u:" + s + "!")), base64.URLEncoding.EncodeToString([]byte("us:" + s + "!")),
		}, " ")
	}
	echo := func(status int, contentType string, shape func(all string) string) func(t *testing.T, w *world) attempt {
		return func(t *testing.T, w *world) attempt {
			front := w.remote(t, func(c net.Conn, req *http.Request) {
				body := shape(forms(strings.TrimPrefix(req.Header.Get("Authorization"), "Bearer ")))
				_, _ = fmt.Fprintf(c, "HTTP/1.1 %d X\r\nContent-Type: %s\r\nX-Echo: %s\r\nContent-Length: %d\r\n\r\n%s", status, contentType, forms(secret), len(body), body)
			})
			return withSecret(t, attempt{config: object{"base_url": "http://" + front}})
		}
	}
	same := func(s string) string { return s }
	masked := func(t *testing.T, _ *world, o *runnertest.Outcome) {
		require.Contains(t, string(o.Finished.GetOutput())+o.Finished.GetError().GetMessage(), "***", "it was there")
	}
	for _, h := range []hostile{
		{tries: "in text", call: echo(200, "text/plain", same), see: masked},
		{tries: "in JSON", call: echo(200, "application/json", func(s string) string { return `{"a":["` + s + `"],"` + s + `":1}` }), see: masked},
		{tries: "in JSON, by its escapes", call: echo(200, "application/json", func(string) string {
			var b strings.Builder
			for _, c := range secret {
				fmt.Fprintf(&b, `\u%04x`, c)
			}
			return `{"a":"` + b.String() + `"}`
		}), see: masked},
		{tries: "in an error", call: echo(500, "text/plain", same), code: fault.RemoteError, retried: true, see: masked},
		{tries: "in an error, where it is cut", call: echo(400, "text/plain", func(s string) string { return strings.Repeat("x", maxExcerpt-3*len(secret)) + s }), code: fault.RemoteError, see: masked},
		{tries: "in a redirect", call: func(t *testing.T, w *world) attempt {
			return withSecret(t, attempt{config: object{"base_url": w.says(t, "HTTP/1.1 302 X\r\nLocation: /"+url.PathEscape(secret)+"/"+base64.RawURLEncoding.EncodeToString([]byte(secret))+"\r\nContent-Length: 0\r\n\r\n")}})
		}, code: fault.RemoteError},
		{tries: "in a redirect to a host", call: func(t *testing.T, w *world) attempt {
			return withSecret(t, attempt{config: object{"base_url": w.says(t, "HTTP/1.1 302 X\r\nLocation: http://"+hex.EncodeToString([]byte(secret))+".evil.test/\r\nContent-Length: 0\r\n\r\n")}})
		}, code: fault.PolicyViolation, rule: "allowed_domains"},
		{tries: "the mesh's own token, by its name", call: func(t *testing.T, w *world) attempt {
			t.Setenv("SPECQL_TOKEN", secret)
			return attempt{config: object{"base_url": w.inside.URL, "auth_type": "bearer", "auth_config": object{"token_env_var": "SPECQL_TOKEN"}}}
		}, code: fault.PolicyViolation, says: "belongs to the mesh"},
		{tries: "the mesh's own database, as a CA", call: func(t *testing.T, w *world) attempt {
			t.Setenv("DATABASE_URL", secret)
			return attempt{config: object{"base_url": w.inside.URL, "ca_env_var": "DATABASE_URL"}}
		}, code: fault.PolicyViolation, says: "belongs to the mesh"},
		{tries: "another service's key", call: func(t *testing.T, w *world) attempt {
			t.Setenv("OTHER_KEY", secret)
			w.runner = newRunner(t, Options{Ceiling: &Policy{AllowPrivateNetworks: true, AllowedEnvVars: []string{"OWN_*"}}})
			return attempt{config: object{"base_url": w.inside.URL, "auth_type": "bearer", "auth_config": object{"token_env_var": "OTHER_KEY"}}}
		}, code: fault.PolicyViolation, rule: "allowed_env_vars"},
		{tries: "a secret that makes a second header", call: func(t *testing.T, w *world) attempt {
			t.Setenv("SPLIT_KEY", secret+"\r\nX-Evil: 1")
			return attempt{config: object{"base_url": w.inside.URL, "auth_type": "bearer", "auth_config": object{"token_env_var": "SPLIT_KEY"}}}
		}, code: fault.Validation, says: "SPLIT_KEY"},
	} {
		t.Run(h.tries, h.run)
	}
}

// TestCAsOfAService: each service trusts its own CA and no other one's, and their connections are
// not shared.
func TestCAsOfAService(t *testing.T) {
	one, two := newAuthority(t), newAuthority(t)
	t.Setenv("CA_ONE", one.pem())
	t.Setenv("CA_TWO", two.pem())
	t.Setenv("CA_BOTH", one.pem()+two.pem())
	w := &world{}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{one.issue(t, nil)}, MinVersion: tls.VersionTLS12})
	require.NoError(t, err)
	w.serve(t, l, func(c net.Conn, _ *http.Request) {
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
	})
	r := newRunner(t, Options{})
	with := func(ca string) attempt {
		return attempt{config: object{"base_url": "https://" + l.Addr().String(), "ca_env_var": ca}}
	}
	with("CA_ONE").ok(t, r)
	with("CA_BOTH").ok(t, r)
	require.Contains(t, with("CA_TWO").fails(t, r, fault.RemoteError).Message, "not trusted", "a connection that another service keeps is not lent")
	require.Contains(t, with("NO_SUCH_CA").fails(t, r, fault.Validation).Message, "NO_SUCH_CA is not set")
	require.Contains(t, with("not a name").fails(t, r, fault.Validation).Message, "ca_env_var")
	for i := range maxPools + 5 {
		require.NotNil(t, r.own.of(true, one.pem()+strings.Repeat("\n", i), &r.options))
	}
	require.LessOrEqual(t, len(r.own.entries), maxPools)
	with("CA_ONE").ok(t, r)
}
