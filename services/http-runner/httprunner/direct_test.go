package httprunner

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// spoken is a server that reads each request and says what it is told to, in the bytes given.
type spoken struct {
	address string
	conns   atomic.Int64
	// requests are the methods and bodies that came; closed gets a token for each connection that was closed.
	requests chan string
	closed   chan struct{}
}

// speak starts a server. Where serve says false, the connection is closed.
func speak(t *testing.T, serve func(n int64, c net.Conn, req *http.Request) bool) *spoken {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.Close() })
	s := &spoken{address: l.Addr().String(), requests: make(chan string, 100), closed: make(chan struct{}, 100)}
	var n atomic.Int64
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.conns.Add(1)
			go func() {
				defer func() { s.closed <- struct{}{} }()
				defer func() { _ = c.Close() }()
				b := bufio.NewReader(c)
				for {
					req, err := http.ReadRequest(b)
					if err != nil {
						return
					}
					body, _ := io.ReadAll(req.Body)
					s.requests <- req.Method + " " + string(body)
					if !serve(n.Add(1), c, req) {
						return
					}
				}
			}()
		}
	}()
	return s
}

func (s *spoken) request(t *testing.T, ctx context.Context, method, body string) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, method, "http://"+s.address+"/", strings.NewReader(body))
	require.NoError(t, err)
	if body == "" {
		req.Body, req.GetBody = nil, nil
	}
	return req
}

// way is how a request is sent.
type way func(ctx context.Context, req *http.Request) (*http.Response, error)

func ways(t *testing.T) (p *connections, directly, byTransport way) {
	t.Helper()
	p = newConnections(true, nil, &Options{})
	t.Cleanup(p.closeIdle)
	return p, func(ctx context.Context, req *http.Request) (*http.Response, error) {
			return p.direct.roundTrip(ctx, req, &meter{})
		},
		func(_ context.Context, req *http.Request) (*http.Response, error) { return p.RoundTrip(req) }
}

// seenAnswer is what a caller can tell of an answer.
type seenAnswer struct {
	status       int
	header       http.Header
	body         string
	length       int64
	uncompressed bool
	failed, cut  bool
	conns        int64
	trailer      http.Header
	closes       bool
}

func ask(t *testing.T, s *spoken, send way, method string) seenAnswer {
	t.Helper()
	res, err := send(t.Context(), s.request(t, t.Context(), method, ""))
	if err != nil {
		return seenAnswer{failed: true}
	}
	a := seenAnswer{status: res.StatusCode, header: res.Header, length: res.ContentLength, uncompressed: res.Uncompressed, closes: res.Close}
	if res.StatusCode == http.StatusSwitchingProtocols {
		_ = res.Body.Close()
		return a
	}
	body, err := io.ReadAll(res.Body)
	a.body, a.cut, a.trailer = string(body), err != nil, res.Trailer
	require.NoError(t, res.Body.Close())
	return a
}

// What the Transport of net/http makes of an answer is made of it, and connections are used again where it uses them again.
func TestAnswersAreThoseOfTheTransport(t *testing.T) {
	t.Parallel()
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	_, err := z.Write([]byte(`{"zipped":true}`))
	require.NoError(t, err)
	require.NoError(t, z.Close())
	for name, c := range map[string]struct {
		says   string
		close  bool
		method string
		// more than the answer comes with it. The Transport may take that for the next answer, if that one's request is quick.
		more bool
	}{
		"length":                {says: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"},
		"no body":               {says: "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX-A: 1\r\nX-A: 2\r\n\r\n"},
		"to the end":            {says: "HTTP/1.1 200 OK\r\n\r\nhi", close: true},
		"chunks":                {says: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-T\r\n\r\n2\r\nhi\r\n0\r\nX-T: 1\r\n\r\n"},
		"bad chunks":            {says: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhi\r\n0\r\n\r\n"},
		"cut chunks":            {says: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhi", close: true},
		"chunks and length":     {says: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 9\r\n\r\n2\r\nhi\r\n0\r\n\r\n"},
		"unknown encoding":      {says: "HTTP/1.1 200 OK\r\nTransfer-Encoding: odd\r\n\r\nhi", close: true},
		"204":                   {says: "HTTP/1.1 204 No Content\r\n\r\n"},
		"204 with a body":       {says: "HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nhi", more: true},
		"304":                   {says: "HTTP/1.1 304 Not Modified\r\n\r\n"},
		"HTTP/1.0":              {says: "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi"},
		"HTTP/1.0 keep-alive":   {says: "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nhi"},
		"connection: close":     {says: "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi"},
		"100":                   {says: "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"},
		"103":                   {says: "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"},
		"099":                   {says: "HTTP/1.1 099 Odd\r\nContent-Length: 40\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", more: true},
		"101":                   {says: "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n"},
		"cut body":              {says: "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi", close: true},
		"cut head":              {says: "HTTP/1.1 200 OK\r\nContent-", close: true},
		"nothing":               {close: true},
		"garbage":               {says: "SSH-2.0-OpenSSH\r\n\r\n"},
		"two lengths":           {says: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nhi!"},
		"bad length":            {says: "HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nhi"},
		"bad header":            {says: "HTTP/1.1 200 OK\r\nX Y: 1\r\nContent-Length: 2\r\n\r\nhi"},
		"folded header":         {says: "HTTP/1.1 200 OK\r\nX-A: 1\r\n 2\r\nContent-Length: 2\r\n\r\nhi"},
		"huge head":             {says: "HTTP/1.1 200 OK\r\nX-A: " + strings.Repeat("x", maxHeaderBytes) + "\r\nContent-Length: 2\r\n\r\nhi"},
		"large head":            {says: "HTTP/1.1 200 OK\r\nX-A: " + strings.Repeat("x", maxHeaderBytes-1000) + "\r\nContent-Length: 2\r\n\r\nhi"},
		"more than was asked":   {says: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhiHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", more: true},
		"gzip":                  {says: "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(zipped.String())},
		"gzip that is damaged":  {says: "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\nhi"},
		"gzip of nothing":       {says: "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 0\r\n\r\n"},
		"another encoding":      {says: "HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 2\r\n\r\nhi"},
		"HEAD":                  {says: "HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n", method: http.MethodHead},
		"HEAD with gzip":        {says: "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 20\r\n\r\n", method: http.MethodHead},
		"HEAD that has a body":  {says: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", method: http.MethodHead, more: true},
		"no reason":             {says: "HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nhi"},
		"a status of its own":   {says: "HTTP/1.1 799 Odd\r\nContent-Length: 2\r\n\r\nhi"},
		"a status of four":      {says: "HTTP/1.1 2000 Odd\r\nContent-Length: 2\r\n\r\nhi"},
		"a length without end":  {says: "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\nhi", close: true},
		"HTTP/2 in plain words": {says: "HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nhi"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			method := c.method
			if method == "" {
				method = http.MethodGet
			}
			_, directly, byTransport := ways(t)
			var seen [2][2]seenAnswer
			for i, send := range []way{directly, byTransport} {
				s := speak(t, func(_ int64, conn net.Conn, _ *http.Request) bool {
					_, _ = io.WriteString(conn, c.says)
					return !c.close
				})
				for n := range 2 {
					if n > 0 && c.close { // until then a connection may look as if it could be used again
						<-s.closed
					}
					seen[i][n] = ask(t, s, send, method)
					seen[i][n].conns = s.conns.Load()
				}
			}
			require.Equal(t, seen[1][0], seen[0][0])
			if c.more {
				seen[1][1] = seen[1][0]
				seen[1][1].conns = 2
			}
			require.Equal(t, seen[1][1], seen[0][1])
		})
	}
}

func chunked(s string) string { return fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(s), s) }

const hi = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"

// A connection that its target closed while it was idle is not used; one that it closes as a request comes fails the
// request, which is sent again where its method does nothing, and only then.
func TestRequestsOnConnectionsThatWereClosed(t *testing.T) {
	t.Parallel()
	post := func(t *testing.T, s *spoken, send way, method string) error {
		t.Helper()
		res, err := send(t.Context(), s.request(t, t.Context(), method, "body"))
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, res.Body)
		require.NoError(t, err)
		return res.Body.Close()
	}
	t.Run("while it was idle", func(t *testing.T) {
		t.Parallel()
		_, directly, _ := ways(t)
		s := speak(t, func(_ int64, c net.Conn, _ *http.Request) bool {
			_, _ = io.WriteString(c, hi)
			return false
		})
		for range 3 {
			require.NoError(t, post(t, s, directly, http.MethodPost))
			<-s.closed
		}
		require.Len(t, s.requests, 3)
	})
	for method, want := range map[string]int{http.MethodPost: 2, http.MethodPut: 2, http.MethodDelete: 2, http.MethodGet: 3, http.MethodOptions: 3} {
		t.Run("as "+method+" comes", func(t *testing.T) {
			t.Parallel()
			_, directly, _ := ways(t)
			s := speak(t, func(n int64, c net.Conn, _ *http.Request) bool {
				if n == 2 {
					return false
				}
				_, _ = io.WriteString(c, hi)
				return true
			})
			require.NoError(t, post(t, s, directly, method))
			if err := post(t, s, directly, method); want == 2 {
				require.ErrorIs(t, err, io.EOF)
			} else {
				require.NoError(t, err)
			}
			require.Len(t, s.requests, want)
			for range want {
				require.Equal(t, method+" body", <-s.requests)
			}
		})
	}
	t.Run("after a part of the answer", func(t *testing.T) {
		t.Parallel()
		_, directly, _ := ways(t)
		s := speak(t, func(n int64, c net.Conn, _ *http.Request) bool {
			if n == 2 {
				_, _ = io.WriteString(c, "HTTP/1.1 2")
				return false
			}
			_, _ = io.WriteString(c, hi)
			return true
		})
		require.NoError(t, post(t, s, directly, http.MethodGet))
		require.Error(t, post(t, s, directly, http.MethodGet))
		require.Len(t, s.requests, 2)
	})
}

// The end of a call ends the exchange, wherever it is, and its connection.
func TestACallThatEndsClosesItsConnection(t *testing.T) {
	t.Parallel()
	for name, says := range map[string]string{"before the head": "", "in the head": "HTTP/1.1 200", "in the body": "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, directly, _ := ways(t)
			s := speak(t, func(_ int64, c net.Conn, _ *http.Request) bool {
				_, _ = io.WriteString(c, says)
				return true
			})
			ctx, cancel := context.WithCancel(t.Context())
			go func() {
				<-s.requests
				cancel()
			}()
			if res, err := directly(ctx, s.request(t, ctx, http.MethodGet, "")); err == nil {
				_, err = io.Copy(io.Discard, res.Body)
				require.Error(t, err)
				require.NoError(t, res.Body.Close())
			}
			require.Error(t, ctx.Err())
			<-s.closed
		})
	}
}

// An answer that is not read to its end leaves no connection behind, since the rest of it would be taken for the next answer.
func TestAnAnswerThatIsLeftClosesItsConnection(t *testing.T) {
	t.Parallel()
	p, directly, _ := ways(t)
	s := speak(t, func(_ int64, c net.Conn, _ *http.Request) bool {
		_, _ = io.WriteString(c, hi)
		return true
	})
	res, err := directly(t.Context(), s.request(t, t.Context(), http.MethodGet, ""))
	require.NoError(t, err)
	require.NoError(t, res.Body.Close())
	<-s.closed
	require.Zero(t, p.direct.count)
	require.Equal(t, "hi", ask(t, s, directly, http.MethodGet).body)
	require.Equal(t, 1, p.direct.count)
}

// Idle connections are bounded, by target and in all, and are closed after a time.
func TestIdleConnectionsAreBounded(t *testing.T) {
	t.Parallel()
	p, _, _ := ways(t)
	d := &p.direct
	idle := func(address string) net.Conn {
		near, far := net.Pipe()
		t.Cleanup(func() { _ = far.Close() })
		d.put(&directConn{Conn: near, address: address})
		return near
	}
	isClosed := func(c net.Conn) bool { return c.SetDeadline(time.Time{}) != nil }
	for range maxIdlePerHost {
		require.False(t, isClosed(idle("a")))
	}
	require.True(t, isClosed(idle("a")))
	for i := range maxIdleConns {
		idle(string(rune('b' + i/100)))
		require.LessOrEqual(t, d.count, maxIdleConns)
	}
	require.Equal(t, maxIdleConns, d.count)
	// Also where connections were taken and not given back.
	for address := range maps.Clone(d.idle) {
		for d.take(address) != nil {
		}
	}
	require.Zero(t, d.count)
	for i := range 2 * maxIdleConns {
		idle(string(rune('A' + i/100)))
		require.LessOrEqual(t, d.count, maxIdleConns)
	}
	require.Equal(t, maxIdleConns, d.count)
	d.mu.Lock()
	old := 0
	for _, list := range d.idle {
		list[0].since = time.Now().Add(-idleTimeout)
		old++
	}
	d.mu.Unlock()
	d.expire()
	require.Equal(t, maxIdleConns-old, d.count)
	d.closeIdle()
	require.Zero(t, d.count)
	require.Empty(t, d.idle)
	require.Nil(t, d.sweep)
}

// What needs the Transport gets it.
func TestWhatIsNotSentDirectly(t *testing.T) {
	t.Parallel()
	p, _, _ := ways(t)
	request := func(url, header string, length int64) *http.Request {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, http.NoBody)
		require.NoError(t, err)
		if header != "" {
			req.Header.Set(header, "x")
		}
		req.ContentLength = length
		return req
	}
	require.True(t, p.direct.suits(request("http://a", "", maxDirectBody)))
	require.False(t, p.direct.suits(request("http://a", "", maxDirectBody+1)))
	require.False(t, p.direct.suits(request("https://a", "", 0)))
	for _, header := range []string{"Connection", "expect", "TE", "Trailer", "Transfer-Encoding", "Upgrade"} {
		require.False(t, p.direct.suits(request("http://a", header, 0)), header)
	}
	large := request("http://a", "", 0)
	large.Header.Set("X-Large", strings.Repeat("x", maxDirectBody))
	require.False(t, p.direct.suits(large))
}

// heldConn says when the rest of a request is written that the connection did not take at once.
type heldConn struct {
	*net.TCPConn

	rest chan struct{}
}

func (c heldConn) Write(p []byte) (int, error) {
	c.rest <- struct{}{}
	return c.TCPConn.Write(p)
}

// A request that the connection does not take at once arrives as a whole.
func TestARequestIsSentInPieces(t *testing.T) {
	t.Parallel()
	p, directly, _ := ways(t)
	dial, rest := p.direct.dial, make(chan struct{}, 1)
	p.direct.dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := dial(ctx, network, address)
		if err == nil {
			counted := c.(*countedConn)
			counted.Conn = heldConn{counted.Conn.(*net.TCPConn), rest}
		}
		return c, err
	}
	s := speak(t, func(n int64, c net.Conn, _ *http.Request) bool {
		_, _ = io.WriteString(c, hi)
		if n == 1 {
			<-rest // of the next request
		}
		return true
	})
	require.Equal(t, "hi", ask(t, s, directly, http.MethodGet).body)
	<-s.requests
	body := strings.Repeat("x", 16<<20) // more than any buffer holds
	var m meter
	res, err := p.direct.roundTrip(t.Context(), s.request(t, t.Context(), http.MethodPost, body), &m)
	require.NoError(t, err)
	_, err = io.Copy(io.Discard, res.Body)
	require.NoError(t, err)
	require.Len(t, <-s.requests, len("POST ")+len(body))
	require.Greater(t, m.wire.sent.Load(), int64(len(body)))
	measured, wrote := m.snapshot()
	require.True(t, measured && wrote)
	require.Equal(t, int64(1), s.conns.Load())
	kept := p.direct.take(s.address)
	require.LessOrEqual(t, kept.buffer.Cap(), mostBuffered)
	p.direct.put(kept)
}
