package faults

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// link is a TCP proxy between two parts of the mesh that a test can cut, stall and slow down. What is stalled is kept and
// delivered in order once the link is healed, as a network does.
type link struct {
	lis net.Listener

	mu sync.Mutex
	// target is where new connections go; empty refuses them.
	target string
	// cut refuses new connections. Those that there were have been reset.
	cut     bool
	delay   time.Duration
	flowing chan struct{} // closed while bytes flow
	conns   map[*net.TCPConn]struct{}
	closed  bool
	wg      sync.WaitGroup
}

// listenLink makes a link that listens at an address; port 0 takes a free one.
func listenLink(address string) (*link, error) {
	lis, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	l := &link{lis: lis, flowing: make(chan struct{}), conns: map[*net.TCPConn]struct{}{}}
	close(l.flowing)
	l.wg.Add(1)
	go l.accept()
	return l, nil
}

func newLink(t testing.TB, target string) *link {
	t.Helper()
	l, err := listenLink("127.0.0.1:0")
	require.NoError(t, err)
	l.connect(target)
	t.Cleanup(l.close)
	return l
}

func (l *link) address() string { return l.lis.Addr().String() }

// connect sets where new connections go.
func (l *link) connect(target string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.target = target
}

// sever resets every connection and refuses new ones until heal.
func (l *link) sever() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut = true
	l.resetAll()
}

// reset resets every connection; new ones are taken.
func (l *link) reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.resetAll()
}

func (l *link) resetAll() {
	for c := range l.conns {
		_ = c.SetLinger(0)
		_ = c.Close()
	}
}

// stall delivers nothing any more in either direction until heal: nobody is told.
func (l *link) stall() {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.flowing:
		l.flowing = make(chan struct{})
	default:
	}
}

// slow delays what is sent in either direction.
func (l *link) slow(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.delay = d
}

// heal undoes sever, stall and slow.
func (l *link) heal() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut, l.delay = false, 0
	select {
	case <-l.flowing:
	default:
		close(l.flowing)
	}
}

func (l *link) close() {
	_ = l.lis.Close()
	l.heal()
	l.mu.Lock()
	l.closed = true
	l.resetAll()
	l.mu.Unlock()
	l.wg.Wait()
}

func (l *link) accept() {
	defer l.wg.Done()
	for {
		c, err := l.lis.Accept()
		if err != nil {
			return
		}
		l.wg.Go(func() { l.serve(c.(*net.TCPConn)) })
	}
}

// keep notes a connection so that it can be reset; false closes it at once.
func (l *link) keep(c *net.TCPConn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cut || l.closed {
		_ = c.SetLinger(0)
		_ = c.Close()
		return false
	}
	l.conns[c] = struct{}{}
	return true
}

func (l *link) serve(near *net.TCPConn) {
	if !l.keep(near) {
		return
	}
	defer l.drop(near)
	l.pass(0)
	l.mu.Lock()
	target := l.target
	l.mu.Unlock()
	conn, err := net.DialTimeout("tcp", target, 5*time.Second)
	if err != nil {
		_ = near.SetLinger(0)
		return
	}
	far := conn.(*net.TCPConn)
	if !l.keep(far) {
		return
	}
	defer l.drop(far)
	var both sync.WaitGroup
	both.Go(func() { l.copy(near, far) })
	both.Go(func() { l.copy(far, near) })
	both.Wait()
}

func (l *link) drop(c *net.TCPConn) {
	l.mu.Lock()
	delete(l.conns, c)
	l.mu.Unlock()
	_ = c.Close()
}

// pass waits until bytes flow, and for the delay of the link less what has passed already.
func (l *link) pass(passed time.Duration) {
	for {
		l.mu.Lock()
		flowing, delay := l.flowing, l.delay
		l.mu.Unlock()
		select {
		case <-flowing:
		default:
			<-flowing
			continue
		}
		if delay <= passed {
			return
		}
		timer := time.NewTimer(delay - passed)
		<-timer.C
		passed = delay
	}
}

// copy carries one direction. A direction that ends well ends in the other process as well; one that breaks breaks both.
func (l *link) copy(from, to *net.TCPConn) {
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		l.pass(0)
		if n > 0 {
			if _, err := to.Write(buffer[:n]); err != nil {
				_ = from.SetLinger(0)
				_ = from.Close()
				return
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			_ = to.CloseWrite()
			return
		case err != nil:
			_ = to.SetLinger(0)
			_ = to.Close()
			return
		}
	}
}

// echo is a server that sends back what it gets.
func echo(t *testing.T) string {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := lis.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				_, _ = io.Copy(c, c)
				_ = c.Close()
			})
		}
	})
	t.Cleanup(func() {
		_ = lis.Close()
		wg.Wait()
	})
	return lis.Addr().String()
}

func TestLink(t *testing.T) {
	l := newLink(t, echo(t))
	dial := func() net.Conn {
		var d net.Dialer
		c, err := d.DialContext(t.Context(), "tcp", l.address())
		require.NoError(t, err)
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	say := func(c net.Conn, text string) {
		_, err := c.Write([]byte(text))
		require.NoError(t, err)
	}
	hear := func(c net.Conn, text string) {
		require.NoError(t, c.SetReadDeadline(time.Now().Add(patience)))
		got := make([]byte, len(text))
		_, err := io.ReadFull(c, got)
		require.NoError(t, err)
		require.Equal(t, text, string(got))
	}
	a := dial()
	say(a, "one")
	hear(a, "one")

	l.stall()
	say(a, "two")
	require.NoError(t, a.SetReadDeadline(time.Now().Add(100*time.Millisecond)))
	_, err := a.Read(make([]byte, 1))
	var timeout net.Error
	require.ErrorAs(t, err, &timeout, "nothing comes through, and nobody is told")
	require.True(t, timeout.Timeout())
	l.heal()
	hear(a, "two")

	l.slow(50 * time.Millisecond)
	begin := time.Now()
	say(a, "three")
	hear(a, "three")
	require.GreaterOrEqual(t, time.Since(begin), 100*time.Millisecond, "there and back")

	l.sever()
	require.NoError(t, a.SetReadDeadline(time.Now().Add(patience)))
	_, err = a.Read(make([]byte, 1))
	require.Error(t, err)
	require.False(t, errors.As(err, &timeout) && timeout.Timeout(), "the connection is reset: %v", err)
	// The listener takes a new connection and resets it, which may be seen as early as by the dial.
	if b, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", l.address()); err == nil {
		require.NoError(t, b.SetReadDeadline(time.Now().Add(patience)))
		_, err = b.Read(make([]byte, 1))
		require.Error(t, err)
		require.NoError(t, b.Close())
	}

	l.heal()
	c := dial()
	say(c, "four")
	hear(c, "four")
}

func TestLinkClosesWhileStalled(t *testing.T) {
	l := newLink(t, echo(t))
	c, err := (&net.Dialer{}).DialContext(context.Background(), "tcp", l.address())
	require.NoError(t, err)
	l.stall()
	_, err = c.Write([]byte("held"))
	require.NoError(t, err)
	l.close()
	require.NoError(t, c.Close())
}
