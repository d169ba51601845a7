package httprunner

import (
	"encoding/json"
	"net/netip"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/http/httpguts"

	"github.com/specql/mesh/pkg/runner"
)

// FuzzCompose: whatever the input holds, the request goes to the service, below its base path, in
// one line, with headers that are headers.
func FuzzCompose(f *testing.F) {
	f.Add([]byte(`{"a":"x","b":"y/z","q":"1&2","h":"v"}`))
	f.Add([]byte(`{"a":"..;x","b":"/evil.test/..","q":["\r\n"],"h":"\u0000"}`))
	f.Add([]byte(`{"a":"%2e%2e","b":"..\\..","q":{"k":[null,1e9]},"h":1.50}`))
	f.Fuzz(func(t *testing.T, input []byte) {
		if !json.Valid(input) {
			return
		}
		r, err := New(Options{})
		require.NoError(t, err)
		p, ferr := r.planFor(
			&runner.Service{Name: "s", Config: json.RawMessage(`{"base_url":"https://api.example.com/base"}`), Policy: json.RawMessage(`{}`)},
			&runner.Operation{Name: "o", Config: json.RawMessage(`{"method":"GET","path":"/u/{a}/.{a}/{+b}","query":{"q":"{q}","p":"x{q}"},"headers":{"X-H":"{h}","X-P":"x{h}"}}`)},
		)
		require.Nil(t, ferr)
		in, ferr := readInput(input)
		if ferr != nil {
			return
		}
		c := &call{runner: r, plan: p, checks: &runner.Checks{}}
		m, ferr := c.compose(in)
		if ferr != nil {
			return
		}
		require.Equal(t, "api.example.com", m.url.Host)
		uri := m.url.RequestURI()
		require.True(t, strings.HasPrefix(uri, "/base/u/"), uri)
		require.NotContains(t, uri, "#")
		require.False(t, strings.ContainsFunc(uri, func(c rune) bool { return c <= ' ' || c >= 0x7f }), "%q", uri)
		path, _, _ := strings.Cut(uri, "?")
		require.False(t, dotSegments(path), uri)
		// A server that cleans the path stays below the base.
		plain, err := url.PathUnescape(path)
		require.NoError(t, err)
		for segment := range strings.SplitSeq(strings.ReplaceAll(plain, `\`, "/"), "/") {
			name, _, _ := strings.Cut(segment, ";")
			require.NotContains(t, []string{".", ".."}, name, uri)
		}
		for name, values := range m.header {
			require.True(t, httpguts.ValidHeaderFieldName(name))
			for _, v := range values {
				require.True(t, httpguts.ValidHeaderFieldValue(v))
			}
		}
	})
}

// FuzzTarget: what a URL is taken for is what it is taken for when it is read again, and no host is
// an address in disguise.
func FuzzTarget(f *testing.F) {
	for _, s := range []string{"http://a.example", "https://[::ffff:127.0.0.1]:8443/x", "http://１２７.0.0.1", "http://0x7f.1:80", "http://a@b\\c", "https://bücher.example.", "http://127%2e0.0.1", "http://0\ufffd"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		u, err := url.Parse(text)
		if err != nil {
			return
		}
		first, ferr := targetOf(u)
		if ferr != nil {
			return
		}
		again, err := url.Parse(u.String())
		require.NoError(t, err)
		second, ferr := targetOf(again)
		require.Nil(t, ferr)
		require.Equal(t, first, second)
		require.NotZero(t, first.port)
		if addr, err := netip.ParseAddr(first.host); err == nil {
			require.False(t, addr.Is4In6())
			require.Empty(t, addr.Zone())
			return
		}
		require.False(t, numeric(first.host[strings.LastIndexByte(first.host, '.')+1:]), first.host)
		require.Empty(t, strings.Trim(first.host, "abcdefghijklmnopqrstuvwxyz0123456789-._"))
	})
}
