package httprunner

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/specql/mesh/pkg/fault"
)

// nameServer is a DNS server that answers with what answers gives for a name; n counts the
// questions for an IPv4 address, from 0.
func nameServer(t *testing.T, answers func(name string, n int) netip.Addr) *net.Resolver {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	done := make(chan struct{})
	t.Cleanup(func() { _ = conn.Close(); <-done })
	go func() {
		defer close(done)
		buf, n := make([]byte, 1500), 0
		for {
			size, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(buf[:size]) != nil || len(m.Questions) == 0 {
				continue
			}
			q := m.Questions[0]
			reply := dnsmessage.Message{Header: dnsmessage.Header{ID: m.ID, Response: true, Authoritative: true}, Questions: m.Questions[:1]}
			addr := answers(q.Name.String(), n)
			header := dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, Type: q.Type}
			switch {
			case q.Type == dnsmessage.TypeA:
				n++
				if addr.Is4() {
					reply.Answers = []dnsmessage.Resource{{Header: header, Body: &dnsmessage.AResource{A: addr.As4()}}}
				}
			case q.Type == dnsmessage.TypeAAAA && addr.Is6():
				reply.Answers = []dnsmessage.Resource{{Header: header, Body: &dnsmessage.AAAAResource{AAAA: addr.As16()}}}
			}
			if out, err := reply.Pack(); err == nil {
				_, _ = conn.WriteTo(out, from)
			}
		}
	}()
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "udp", conn.LocalAddr().String())
	}}
}

func TestPrivateAddresses(t *testing.T) {
	t.Parallel()
	for _, a := range []string{
		"127.0.0.1", "127.8.9.1", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254", "169.254.170.2",
		"100.64.0.1", "100.100.100.200", "100.127.255.255", "168.63.129.16", "192.0.0.192", "198.18.0.1", "224.0.0.1", "239.255.255.250", "240.0.0.1",
		"255.255.255.255", "192.0.2.1", "198.51.100.1", "203.0.113.1", "192.88.99.1",
		"::", "::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "::10.0.0.1", "64:ff9b::127.0.0.1", "64:ff9b::a00:1",
		"64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2002:a00:1::1", "2001::1", "2001:db8::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0",
		"fec0::1", "ff02::1", "100::1", "5f00::1", "3fff::1", "::ffff:0:127.0.0.1",
	} {
		require.NotEmpty(t, privateAddress(netip.MustParseAddr(a)), a)
		require.Error(t, checkAddress(netip.AddrPortFrom(netip.MustParseAddr(a), 80).String(), false, true), a)
	}
	for _, a := range []string{"8.8.8.8", "1.1.1.1", "172.15.0.1", "172.32.0.1", "100.63.255.255", "100.128.0.1", "2606:4700::1111", "2a00:1450::1", "64:ff9b::808:808", "::ffff:8.8.8.8"} {
		require.Empty(t, privateAddress(netip.MustParseAddr(a)), a)
		require.NoError(t, checkAddress(netip.AddrPortFrom(netip.MustParseAddr(a), 80).String(), false, false), a)
	}
	require.NotEmpty(t, privateAddress(netip.Addr{}))
	require.Error(t, checkAddress("not an address", true, true))
	require.Error(t, checkAddress("239.1.1.1:80", true, true))
	require.NoError(t, checkAddress("127.0.0.1:80", true, false))
}

// TestPrivateTargets calls the same server under every spelling of its address.
func TestPrivateTargets(t *testing.T) {
	t.Parallel()
	rec := record(t, nil)
	_, port := rec.hostPort(t)
	resolver := nameServer(t, func(string, int) netip.Addr { return netip.MustParseAddr("127.0.0.1") })
	r := newRunner(t, Options{Resolver: resolver})
	for _, host := range []string{
		"127.0.0.1", "127.1.2.3", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "0.0.0.0", "[::]", "localhost", "LOCALHOST.", "innocent.example",
		"[64:ff9b::7f00:1]", "[2002:7f00:1::]", "169.254.169.254", "[fd00:ec2::254]", "１２７.0.0.1", "127。0。0。1", "127.0.0.1.",
	} {
		t.Run(host, func(t *testing.T) {
			a := attempt{config: object{"base_url": "http://" + host + ":" + port}, policy: object{}}
			err := a.fails(t, r, fault.PolicyViolation)
			require.Contains(t, err.Message, "allow_private_networks")
			require.False(t, err.Retryable)
		})
	}
	for _, host := range []string{"2130706433", "0x7f.1", "0177.0.0.1", "127.1"} {
		t.Run(host, func(t *testing.T) {
			result := attempt{config: object{"base_url": "http://" + host + ":" + port}, policy: object{}}.run(t.Context(), t, r)
			require.Error(t, result.Err)
		})
	}
	require.Empty(t, rec.all())
}

func TestDNSRebinding(t *testing.T) {
	t.Parallel()
	rec := record(t, nil)
	_, port := rec.hostPort(t)
	// The first answer, of a check before the call, would be public; the next leads inside.
	var asked atomic.Int64
	resolver := nameServer(t, func(_ string, n int) netip.Addr {
		asked.Add(1)
		if n == 0 {
			return netip.MustParseAddr("192.0.2.1")
		}
		return netip.MustParseAddr("127.0.0.1")
	})
	_, err := resolver.LookupHost(t.Context(), "rebind.example.")
	require.NoError(t, err)
	r := newRunner(t, Options{Resolver: resolver})
	a := attempt{config: object{"base_url": "http://rebind.example.:" + port}, policy: object{"allowed_domains": []string{"rebind.example"}}}
	ferr := a.fails(t, r, fault.PolicyViolation)
	require.Contains(t, ferr.Message, "127.0.0.1:"+port+" is a loopback address")
	require.GreaterOrEqual(t, asked.Load(), int64(2))
	require.Empty(t, rec.all())
	// A connection that a service with private networks keeps open is not lent to one without.
	a.policy["allow_private_networks"] = true
	a.ok(t, r)
	a.policy["allow_private_networks"] = false
	a.fails(t, r, fault.PolicyViolation)
	require.Len(t, rec.all(), 1)
}

func TestDomainsAndPorts(t *testing.T) {
	t.Parallel()
	rec := record(t, nil)
	_, port := rec.hostPort(t)
	number, err := strconv.Atoi(port)
	require.NoError(t, err)
	r := newRunner(t, Options{Resolver: nameServer(t, func(string, int) netip.Addr { return netip.MustParseAddr("127.0.0.1") })})
	tests := []struct {
		name, host string
		policy     object
		rule       string // "" passes
	}{
		{"own host", "api.example.com", object{}, ""},
		{"exact", "api.example.com", object{"allowed_domains": []string{"API.Example.com."}}, ""},
		{"case and final dot", "API.EXAMPLE.COM.", object{"allowed_domains": []string{"api.example.com"}}, ""},
		{"wildcard", "a.b.example.com", object{"allowed_domains": []string{"*.example.com"}}, ""},
		{"international", "bücher.example", object{"allowed_domains": []string{"xn--bcher-kva.example"}}, ""},
		{"wildcard is not the apex", "example.com", object{"allowed_domains": []string{"*.example.com"}}, "allowed_domains"},
		{"suffix is not a subdomain", "evilexample.com", object{"allowed_domains": []string{"*.example.com", "example.com"}}, "allowed_domains"},
		{"prefix is not the domain", "api.example.com.evil.test", object{"allowed_domains": []string{"api.example.com"}}, "allowed_domains"},
		{"another host", "evil.test", object{"allowed_domains": []string{"api.example.com"}}, "allowed_domains"},
		{"subdomain of an exact one", "a.api.example.com", object{"allowed_domains": []string{"api.example.com"}}, "allowed_domains"},
		{"nothing allowed", "api.example.com", object{"allowed_domains": []string{}}, "allowed_domains"},
		{"port", "api.example.com", object{"allowed_ports": []int{443, number}}, ""},
		{"other port", "api.example.com", object{"allowed_ports": []int{443}}, "allowed_ports"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before := len(rec.all())
			a := attempt{config: object{"base_url": "http://" + tt.host + ":" + port}, policy: open(tt.policy)}
			if tt.rule == "" {
				a.ok(t, r)
				return
			}
			err := a.fails(t, r, fault.PolicyViolation)
			require.Contains(t, err.Message, tt.rule+" forbids")
			require.Len(t, rec.all(), before)
		})
	}
}

func TestCeilingOnlyNarrows(t *testing.T) {
	t.Parallel()
	rec := record(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, strings.Repeat("x", 100)) })
	host, port := rec.hostPort(t)
	number, err := strconv.Atoi(port)
	require.NoError(t, err)
	wide := object{"allowed_domains": []string{host, "evil.test"}, "allowed_ports": []int{number}, "max_response_size": 1 << 20, "max_request_size": 1 << 20, "rate_limit_per_minute": 1000}
	tests := []struct {
		name    string
		ceiling Policy
		code    fault.Code
		says    string
	}{
		{"allowed", Policy{AllowPrivateNetworks: true, AllowedDomains: []string{host}}, "", ""},
		{"private networks", Policy{}, fault.PolicyViolation, "--policy"},
		{"domains", Policy{AllowPrivateNetworks: true, AllowedDomains: []string{"*.example.com"}}, fault.PolicyViolation, "--policy"},
		{"ports", Policy{AllowPrivateNetworks: true, AllowedPorts: []int{443}}, fault.PolicyViolation, "--policy"},
		{"request size", Policy{AllowPrivateNetworks: true, MaxRequestSize: 10}, fault.PolicyViolation, "max_request_size"},
		{"response size", Policy{AllowPrivateNetworks: true, MaxResponseSize: 99}, fault.ResourceExceeded, "max_response_size is 99"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := newRunner(t, Options{Ceiling: &tt.ceiling})
			a := attempt{config: object{"base_url": rec.URL}, policy: open(wide), input: `{"some":"input"}`}
			if tt.code == "" {
				a.ok(t, r)
				return
			}
			require.Contains(t, a.fails(t, r, tt.code).Message, tt.says)
		})
	}
	_, err = New(Options{Ceiling: &Policy{AllowedDomains: []string{"https://x/"}}})
	require.ErrorContains(t, err, "allowed_domains[0]")
}

func TestHostileInput(t *testing.T) {
	t.Parallel()
	rec := record(t, nil)
	r := newRunner(t, Options{})
	deep := strings.Repeat(`{"a":`, 100) + "1" + strings.Repeat("}", 100)
	tests := []struct {
		name  string
		op    object
		input string
		code  fault.Code
	}{
		{"up", object{"path": "/u/{id}"}, `{"id":".."}`, fault.Validation},
		{"up and on", object{"path": "/u/{id}"}, `{"id":"../../admin"}`, fault.Validation},
		{"up with backslashes", object{"path": "/u/{id}"}, `{"id":"..\\..\\admin"}`, fault.Validation},
		{"up in the middle", object{"path": "/u/{+id}"}, `{"id":"a/../../b"}`, fault.Validation},
		{"here", object{"path": "/u/{id}/x"}, `{"id":"."}`, fault.Validation},
		{"up in two halves", object{"path": "/u/{a}{b}/x"}, `{"a":".","b":"."}`, fault.Validation},
		{"up with a literal dot", object{"path": "/u/.{a}/x"}, `{"a":"."}`, fault.Validation},
		{"up with an escaped literal dot", object{"path": "/u/%2e{a}/x"}, `{"a":"."}`, fault.Validation},
		{"empty", object{"path": "/u/{id}"}, `{"id":""}`, fault.Validation},
		{"absent", object{"path": "/u/{id}"}, `{}`, fault.Validation},
		{"null", object{"path": "/u/{id}"}, `{"id":null}`, fault.Validation},
		{"object", object{"path": "/u/{id}"}, `{"id":{"a":1}}`, fault.Validation},
		{"line break in path", object{"path": "/u/{id}"}, `{"id":"a\r\nX-Evil: 1"}`, fault.Validation},
		{"nul in path", object{"path": "/u/{id}"}, `{"id":"a\u0000"}`, fault.Validation},
		{"line break in header", object{"headers": object{"X-A": "{v}"}}, `{"v":"a\r\nX-Evil: 1"}`, fault.Validation},
		{"line feed in header", object{"headers": object{"X-A": "pre {v}"}}, `{"v":"a\nb"}`, fault.Validation},
		{"nul in header", object{"headers": object{"X-A": "{v}"}}, `{"v":"a\u0000"}`, fault.Validation},
		{"list in header", object{"headers": object{"X-A": "{v}"}}, `{"v":["a","b\r\nX: 1"]}`, fault.Validation},
		{"huge header", object{"headers": object{"X-A": "{v}"}}, `{"v":"` + strings.Repeat("a", 70_000) + `"}`, fault.Validation},
		{"huge url", object{"method": "GET"}, `{"v":"` + strings.Repeat("a", 70_000) + `"}`, fault.Validation},
		{"template that explodes", object{"query": object{"q": strings.Repeat("{v}", 1000)}}, `{"v":"` + strings.Repeat("a", 1_000_000) + `"}`, fault.Validation},
		{"list that explodes", object{"query": object{"a": "{v}", "b": "{v}"}}, `{"v":[` + strings.Repeat(`"`+strings.Repeat("a", 60_000)+`",`, 18) + `"a"]}`, fault.Validation},
		{"deep form", object{"body": "form"}, deep, fault.Validation},
		{"form that explodes", object{"body": "form"}, `{"` + strings.Repeat("k", 9000) + `":[` + strings.Repeat("1,", 50_000) + `1]}`, fault.PolicyViolation},
		{"raw with two fields", object{"body": "raw"}, `{"a":1,"b":2}`, fault.Validation},
		{"raw without base64", object{"body": "raw"}, `{"body_base64":"%%"}`, fault.Validation},
		{"raw base64 number", object{"body": "raw"}, `{"body_base64":1}`, fault.Validation},
		{"input is a list", nil, `[1]`, fault.Validation},
		{"input is not JSON", nil, `{"a"`, fault.Validation},
		{"input is null", nil, `null`, fault.Validation},
		{"too large", nil, `{"a":"` + strings.Repeat("a", 5<<20) + `"}`, fault.PolicyViolation},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a := attempt{config: object{"base_url": rec.URL}, op: tt.op, input: tt.input}
			err := a.fails(t, r, tt.code)
			require.False(t, err.Retryable)
			require.Less(t, len(err.Message), 1000)
		})
	}
	require.Empty(t, rec.all())
	t.Run("escapes stay escapes", func(t *testing.T) {
		for value, uri := range map[string]string{
			"%2e%2e":          "/u/%252e%252e",
			"a?b=c#d":         "/u/a%3Fb=c%23d",
			"//evil.test/":    "/u/%2F%2Fevil.test%2F",
			"@evil.test":      "/u/@evil.test",
			"a\u2028\u202e..": "/u/a%E2%80%A8%E2%80%AE..",
			"{x}":             "/u/%7Bx%7D",
		} {
			attempt{config: object{"base_url": rec.URL}, op: object{"path": "/u/{id}"}, input: object{"id": value}}.ok(t, r)
			require.Equal(t, uri, rec.last(t).URI)
		}
	})
}

func TestHostileConfig(t *testing.T) {
	t.Parallel()
	r := newRunner(t, Options{})
	for _, tt := range []struct {
		name       string
		config, op object
	}{
		{"user and password", object{"base_url": "http://api.example.com@evil.test/"}, nil},
		{"password", object{"base_url": "https://user:secret@api.example.com/"}, nil},
		{"backslash", object{"base_url": `http://evil.test\@api.example.com/`}, nil},
		{"file", object{"base_url": "file:///etc/passwd"}, nil},
		{"gopher", object{"base_url": "gopher://127.0.0.1:6379/_x"}, nil},
		{"opaque", object{"base_url": "http:127.0.0.1/"}, nil},
		{"no scheme", object{"base_url": "//evil.test/"}, nil},
		{"port", object{"base_url": "http://a.test:99999/"}, nil},
		{"port zero", object{"base_url": "http://a.test:0/"}, nil},
		{"zone", object{"base_url": "http://[fe80::1%25eth0]/"}, nil},
		{"host from the input", object{"base_url": "http://{host}/"}, nil},
		{"host header", object{"base_url": "http://a.test", "headers": object{"Host": "b.test"}}, nil},
		{"content length", object{"base_url": "http://a.test"}, object{"headers": object{"content-length": "0"}}},
		{"transfer encoding", object{"base_url": "http://a.test"}, object{"headers": object{"Transfer-Encoding": "chunked"}}},
		{"connection", object{"base_url": "http://a.test"}, object{"headers": object{"Connection": "X-Api-Key"}}},
		{"header name", object{"base_url": "http://a.test", "headers": object{"X A": "1"}}, nil},
		{"header name with a line break", object{"base_url": "http://a.test", "headers": object{"X\r\nY": "1"}}, nil},
		{"header value", object{"base_url": "http://a.test", "headers": object{"X-A": "1\r\nX-B: 2"}}, nil},
		{"whole url as path", object{"base_url": "http://a.test"}, object{"path": "http://evil.test/"}},
		{"path up", object{"base_url": "http://a.test"}, object{"path": "/a/../b"}},
		{"path up, escaped", object{"base_url": "http://a.test"}, object{"path": "/a/%2e%2E/b"}},
		{"path with a line break", object{"base_url": "http://a.test"}, object{"path": "/a\r\nX: 1"}},
		{"method", object{"base_url": "http://a.test"}, object{"method": "CONNECT"}},
		{"method with a line break", object{"base_url": "http://a.test"}, object{"method": "GET / HTTP/1.1\r\nX: "}},
		{"auth header", object{"base_url": "http://a.test", "auth_type": "api_key", "auth_config": object{"api_key_env_var": "K", "header_name": "Host"}}, nil},
		{"unknown key", object{"base_url": "http://a.test", "proxy": "http://evil.test"}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			err := attempt{config: tt.config, op: tt.op}.fails(t, r, fault.Validation)
			require.NotContains(t, err.Message, "secret@")
		})
	}
}

// to redirects every path below /to/STATUS to the rest of the path's query.
func to(location func(*http.Request) string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if status, err := strconv.Atoi(strings.TrimPrefix(r.URL.Path, "/to/")); err == nil {
			w.Header().Set("Location", location(r))
			w.WriteHeader(status)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, `{"arrived":true}`)
	}
}

func TestRedirects(t *testing.T) {
	t.Setenv("REDIRECT_TOKEN", "redirect-token")
	other := record(t, nil)
	location := ""
	rec := record(t, to(func(*http.Request) string { return location }))
	host, _ := rec.hostPort(t)
	r := newRunner(t, Options{})
	call := func(status int, method, where string, policy object) (attempt, *recorder) {
		location = where
		return attempt{
			config: object{"base_url": rec.URL, "auth_type": "bearer", "auth_config": object{"token_env_var": "REDIRECT_TOKEN"}, "headers": object{"X-Api-Key": "configured"}},
			op:     object{"method": method, "path": "/to/" + strconv.Itoa(status), "body": "json"}, input: `{"a":1}`, policy: open(policy),
		}, other
	}

	t.Run("methods and bodies", func(t *testing.T) {
		for _, tt := range []struct {
			status           int
			method, then     string
			body, contentTyp string
		}{
			{301, "POST", "GET", "", ""},
			{302, "POST", "GET", "", ""},
			{303, "POST", "GET", "", ""},
			{303, "PUT", "GET", "", ""},
			{307, "POST", "POST", `{"a":1}`, "application/json"},
			{308, "PUT", "PUT", `{"a":1}`, "application/json"},
			{302, "GET", "GET", `{"a":1}`, "application/json"},
		} {
			a, _ := call(tt.status, tt.method, "/there?x=1", nil)
			a.ok(t, r)
			got := rec.last(t)
			require.Equal(t, "/there?x=1", got.URI)
			require.Equal(t, tt.then, got.Method, tt.status)
			require.Equal(t, tt.body, got.Body)
			require.Equal(t, tt.contentTyp, got.Header.Get("Content-Type"))
			require.Equal(t, "Bearer redirect-token", got.Header.Get("Authorization"))
			require.Equal(t, "configured", got.Header.Get("X-Api-Key"))
		}
	})
	t.Run("credentials stay at their origin", func(t *testing.T) {
		a, other := call(307, "POST", other.URL+"/x", nil)
		a.ok(t, r)
		got := other.last(t)
		require.Equal(t, `{"a":1}`, got.Body)
		require.NotContains(t, fmt.Sprint(got.Header), "redirect-token")
		require.NotContains(t, fmt.Sprint(got.Header), "configured")
	})
	t.Run("and do not come back", func(t *testing.T) {
		back := record(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", rec.URL+"/home")
			w.WriteHeader(http.StatusTemporaryRedirect)
		})
		a, _ := call(307, "POST", back.URL, nil)
		a.ok(t, r)
		require.Equal(t, "/home", rec.last(t).URI)
		require.Empty(t, rec.last(t).Header.Get("Authorization"))
	})
	before := len(other.all())
	for _, tt := range []struct {
		name, location string
		policy         object
		code           fault.Code
	}{
		{"another host", "http://localhost:1/", object{}, fault.PolicyViolation},
		{"host outside the list", "http://evil.test/", object{"allowed_domains": []string{host}}, fault.PolicyViolation},
		{"scheme-relative", "//evil.test/", object{"allowed_domains": []string{host}}, fault.PolicyViolation},
		{"metadata", "http://169.254.169.254/latest/meta-data/", object{"allowed_domains": []string{host}}, fault.PolicyViolation},
		{"file", "file:///etc/passwd", object{}, fault.PolicyViolation},
		{"javascript", "javascript:alert(1)", object{}, fault.PolicyViolation},
		{"user name", strings.Replace(other.URL, "http://", "http://user@", 1), object{}, fault.RemoteError},
		{"not a url", "http://[::1", object{}, fault.RemoteError},
		{"bad port", "http://" + host + ":99999/", object{}, fault.RemoteError},
		{"to itself", "/to/302", object{}, fault.RemoteError},
		{"port", other.URL, object{"allowed_ports": []int{portOf(t, rec)}}, fault.PolicyViolation},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, _ := call(302, "POST", tt.location, tt.policy)
			err := a.fails(t, r, tt.code)
			require.False(t, err.Retryable)
		})
	}
	require.Len(t, other.all(), before)
	t.Run("to a private address", func(t *testing.T) {
		// The first hop is "public" for the test: its transport lets every address pass.
		r := newRunner(t, Options{})
		r.public.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
			if err := checkAddress(address, strings.HasSuffix(address, ":"+strconv.Itoa(portOf(t, rec))), true); err != nil {
				return nil, err
			}
			return (&net.Dialer{}).DialContext(ctx, network, address)
		}
		a, other := call(302, "GET", other.URL, object{"allow_private_networks": false})
		err := a.fails(t, r, fault.PolicyViolation)
		require.Contains(t, err.Message, "allow_private_networks")
		require.Len(t, other.all(), before)
	})
	t.Run("a redirect that is wanted", func(t *testing.T) {
		a, _ := call(302, "GET", other.URL, nil)
		a.op["success_codes"] = []int{302}
		require.Contains(t, a.ok(t, r), `"status_code":302`)
	})
	t.Run("without a location", func(t *testing.T) {
		a, _ := call(302, "GET", "", nil)
		require.Contains(t, a.fails(t, r, fault.RemoteError).Message, "answered 302")
	})
}

func portOf(t *testing.T, rec *recorder) int {
	t.Helper()
	_, port := rec.hostPort(t)
	n, err := strconv.Atoi(port)
	require.NoError(t, err)
	return n
}

func TestNoDowngrade(t *testing.T) {
	t.Parallel()
	plain := record(t, nil)
	secure := httptest.NewTLSServer(http.RedirectHandler(plain.URL, http.StatusFound))
	t.Cleanup(secure.Close)
	roots := x509.NewCertPool()
	roots.AddCert(secure.Certificate())
	err := attempt{config: object{"base_url": secure.URL}}.fails(t, newRunner(t, Options{RootCAs: roots}), fault.RemoteError)
	require.Contains(t, err.Message, "from https to http")
	require.Empty(t, plain.all())
}

func TestHostileAnswers(t *testing.T) {
	t.Parallel()
	bomb := func() []byte {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		zeros := make([]byte, 1<<20)
		for range 8 {
			_, _ = z.Write(zeros)
		}
		_ = z.Close()
		return b.Bytes()
	}()
	endless := func(w http.ResponseWriter, r *http.Request) {
		chunk := bytes.Repeat([]byte("x"), 64<<10)
		for r.Context().Err() == nil {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	}
	tests := []struct {
		name    string
		handler http.HandlerFunc
		code    fault.Code
		says    string
	}{
		{"bomb", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			_, _ = w.Write(bomb)
		}, fault.ResourceExceeded, "max_response_size"},
		{"endless", endless, fault.ResourceExceeded, "max_response_size"},
		{"long by its own word", func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Content-Length", "99999999999") }, fault.ResourceExceeded, "99999999999 bytes"},
		{"not gzip", answer(200, "text/plain", "hello, this is no gzip", "Content-Encoding", "gzip"), fault.RemoteError, "damaged"},
		{"endless error", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(500); endless(w, r) }, fault.RemoteError, "answered 500"},
		{"long error", answer(400, "text/plain", strings.Repeat("é", 5000)), fault.RemoteError, "…"},
		{"control characters", answer(400, "text/plain", "a\x1b[31mred\x00\r\nb\xff"), fault.RemoteError, "a[31mred  b"},
		{"huge header", func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X-Big", strings.Repeat("x", 1<<20)) }, fault.RemoteError, "not valid HTTP"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			rec := record(t, tt.handler)
			err := attempt{config: object{"base_url": rec.URL}, policy: open(object{"max_response_size": 1 << 20})}.fails(t, newRunner(t, Options{}), tt.code)
			require.Contains(t, err.Message, tt.says)
			require.LessOrEqual(t, len(err.Message), maxExcerpt+200)
		})
	}
}

// rawServer answers every connection with the same bytes and closes it.
func rawServer(t *testing.T, reply string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	done := make(chan struct{})
	t.Cleanup(func() { _ = l.Close(); <-done })
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Read(make([]byte, 4096))
			_, _ = io.WriteString(c, reply)
			_ = c.Close()
		}
	}()
	return "http://" + l.Addr().String()
}

func TestBrokenConnections(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, reply string
		code        fault.Code
		retryable   bool
	}{
		{"closed at once", "", fault.Unavailable, true},
		{"not HTTP", "SSH-2.0-OpenSSH_9.2\r\n\r\n", fault.RemoteError, false},
		{"cut body", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort", fault.Unavailable, true},
		{"bad length", "HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", fault.RemoteError, false},
		{"two lengths", "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", fault.RemoteError, false},
		{"bad chunk", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", fault.RemoteError, false},
		{"bad status", "HTTP/1.1 999999 X\r\n\r\n", fault.RemoteError, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			err := attempt{config: object{"base_url": rawServer(t, tt.reply)}}.fails(t, newRunner(t, Options{}), tt.code)
			require.Equal(t, tt.retryable, err.Retryable, err.Message)
		})
	}
	t.Run("refused", func(t *testing.T) {
		t.Parallel()
		l, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		require.NoError(t, l.Close())
		ferr := attempt{config: object{"base_url": "http://" + l.Addr().String()}}.fails(t, newRunner(t, Options{}), fault.Unavailable)
		require.Contains(t, ferr.Message, "refused")
	})
	t.Run("unknown name", func(t *testing.T) {
		t.Parallel()
		ferr := attempt{config: object{"base_url": "http://no-such-host.invalid"}}.fails(t, newRunner(t, Options{
			Resolver: &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) { return nil, io.ErrClosedPipe }},
		}), fault.Unavailable)
		require.True(t, ferr.Retryable)
		require.Contains(t, ferr.Message, "no-such-host.invalid")
	})
	t.Run("untrusted certificate", func(t *testing.T) {
		t.Parallel()
		secure := httptest.NewUnstartedServer(nil)
		secure.Config.ErrorLog = nil
		secure.StartTLS()
		t.Cleanup(secure.Close)
		ferr := attempt{config: object{"base_url": secure.URL}}.fails(t, newRunner(t, Options{}), fault.RemoteError)
		require.False(t, ferr.Retryable)
		require.Contains(t, ferr.Message, "certificate is not trusted")
	})
	t.Run("plain text on a TLS port", func(t *testing.T) {
		t.Parallel()
		rec := record(t, nil)
		ferr := attempt{config: object{"base_url": strings.Replace(rec.URL, "http:", "https:", 1)}}.fails(t, newRunner(t, Options{}), fault.RemoteError)
		require.False(t, ferr.Retryable)
		require.Contains(t, ferr.Message, "TLS")
	})
}

func TestEndOfTheContext(t *testing.T) {
	t.Parallel()
	for _, slow := range []struct {
		name    string
		handler func(w http.ResponseWriter, here chan<- struct{}, until <-chan struct{})
	}{
		{"no answer", func(_ http.ResponseWriter, here chan<- struct{}, until <-chan struct{}) {
			here <- struct{}{}
			<-until
		}},
		{"slow body", func(w http.ResponseWriter, here chan<- struct{}, until <-chan struct{}) {
			_, _ = io.WriteString(w, "{")
			_ = http.NewResponseController(w).Flush()
			here <- struct{}{}
			<-until
		}},
	} {
		t.Run(slow.name, func(t *testing.T) {
			t.Parallel()
			here, gone := make(chan struct{}, 1), make(chan struct{})
			rec := record(t, func(w http.ResponseWriter, r *http.Request) {
				defer close(gone)
				slow.handler(w, here, r.Context().Done())
			})
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			go func() {
				<-here
				cancel(fault.New(fault.Cancelled, "enough"))
			}()
			result := attempt{config: object{"base_url": rec.URL}}.run(ctx, t, newRunner(t, Options{}))
			require.EqualError(t, result.Err, "CANCELLED: enough")
			<-gone // the target sees the end, too
		})
	}
	t.Run("timeout", func(t *testing.T) {
		t.Parallel()
		rec := record(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
		ctx, cancel := context.WithTimeoutCause(t.Context(), 30*time.Millisecond, fault.New(fault.Timeout, "30 ms are over"))
		defer cancel()
		result := attempt{config: object{"base_url": rec.URL}}.run(ctx, t, newRunner(t, Options{}))
		require.EqualError(t, result.Err, "TIMEOUT: 30 ms are over")
	})
	t.Run("timeout that a dial sees before its timer fires", func(t *testing.T) {
		t.Parallel()
		rec := record(t, nil)
		ctx, cancel := context.WithTimeoutCause(t.Context(), 100*time.Millisecond, fault.New(fault.Timeout, "it is over"))
		defer cancel()
		result := attempt{config: object{"base_url": rec.URL}}.run(overdue{ctx, time.Now()}, t, newRunner(t, Options{}))
		require.EqualError(t, result.Err, "TIMEOUT: it is over")
		require.Empty(t, rec.all())
	})
}

// overdue is a context whose timer is late.
type overdue struct {
	context.Context

	deadline time.Time
}

func (o overdue) Deadline() (time.Time, bool) { return o.deadline, true }

func TestNoProxyOfTheEnvironment(t *testing.T) {
	proxy := record(t, nil)
	rec := record(t, nil)
	_, port := rec.hostPort(t)
	t.Setenv("HTTP_PROXY", proxy.URL)
	t.Setenv("http_proxy", proxy.URL)
	r := newRunner(t, Options{Resolver: nameServer(t, func(string, int) netip.Addr { return netip.MustParseAddr("127.0.0.1") })})
	attempt{config: object{"base_url": "http://api.example.com:" + port}}.ok(t, r)
	require.Empty(t, proxy.all())
	require.Len(t, rec.all(), 1)
}

// TestNoHiddenRepeat: net/http must not send a call a second time by itself.
func TestNoHiddenRepeat(t *testing.T) {
	t.Parallel()
	var calls atomic.Int64
	rec := record(t, func(w http.ResponseWriter, _ *http.Request) {
		if calls.Add(1) > 1 { // on a connection that was kept: close it without an answer
			c, _, err := http.NewResponseController(w).Hijack()
			if err == nil {
				_ = c.Close()
			}
		}
	})
	r := newRunner(t, Options{})
	for _, body := range []string{"json", "none"} {
		calls.Store(0)
		a := attempt{config: object{"base_url": rec.URL}, op: object{"body": body}}
		a.ok(t, r)
		err := a.fails(t, r, fault.Unavailable)
		require.True(t, err.Retryable)
		require.Equal(t, int64(2), calls.Load(), body)
	}
}
