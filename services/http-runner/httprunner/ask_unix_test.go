//go:build unix

package httprunner

import (
	"context"
	"io"
	"net"
	"net/http"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestAnswerBeforeTheRequest: what a server says as soon as it is connected to, such as one that has no room, is the answer.
func TestAnswerBeforeTheRequest(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.Close() })
	said := make(chan net.Conn, 1)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
			said <- c // and it stays open
		}
	}()
	p, directly, _ := ways(t)
	dial := p.direct.dial
	p.direct.dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := dial(ctx, network, address)
		if err == nil {
			there := <-said
			t.Cleanup(func() { _ = there.Close() })
			arrived(t, c)
		}
		return c, err
	}
	s := &spoken{address: l.Addr().String()}
	for range 20 {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		res, err := directly(ctx, s.request(t, ctx, http.MethodPost, "{}"))
		cancel()
		require.NoError(t, err)
		require.Equal(t, http.StatusServiceUnavailable, res.StatusCode)
	}
}

// arrived waits until a connection has something to be read, and leaves it there.
func arrived(t *testing.T, c net.Conn) {
	t.Helper()
	raw, err := c.(*countedConn).Conn.(syscall.Conn).SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Read(func(fd uintptr) bool {
		n, _, err := syscall.Recvfrom(int(fd), make([]byte, 1), syscall.MSG_PEEK) //nolint:gosec // a file descriptor
		return err == nil && n > 0
	}))
}
