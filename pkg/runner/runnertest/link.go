package runnertest

import (
	"io"
	"net"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// Link is a network between a client and a server that a test can disturb.
type Link struct {
	// Address is where the client finds the server.
	Address string

	mu      sync.Mutex
	target  string
	down    bool
	frozen  bool
	changed *sync.Cond // down changed
	conns   map[net.Conn]struct{}
	// answered are the servers whose bytes got through.
	answered map[string]bool
	work     sync.WaitGroup
}

// NewLink makes a link to an address on loopback. It ends with the test.
func NewLink(t testing.TB, target string) *Link {
	t.Helper()
	var config net.ListenConfig
	lis, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	l := &Link{Address: lis.Addr().String(), target: target, conns: map[net.Conn]struct{}{}, answered: map[string]bool{}}
	l.changed = sync.NewCond(&l.mu)
	l.work.Go(func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			l.work.Go(func() { l.carry(conn) })
		}
	})
	t.Cleanup(func() {
		_ = lis.Close() // what matters is that Accept ends
		l.Down()
		l.work.Wait()
	})
	return l
}

func (l *Link) carry(client net.Conn) {
	defer func() { _ = client.Close() }()
	if !l.add(client) {
		return
	}
	defer l.remove(client)
	l.mu.Lock()
	target := l.target
	l.mu.Unlock()
	server, err := net.Dial("tcp", target) //nolint:noctx // it is closed with the link
	if err != nil {
		return
	}
	defer func() { _ = server.Close() }()
	if !l.add(server) {
		return
	}
	defer l.remove(server)
	var both sync.WaitGroup
	both.Go(func() { l.copy(server, client, "") })
	both.Go(func() { l.copy(client, server, target) })
	both.Wait()
}

// copy passes bytes on. While the link is frozen neither they nor an end gets through.
func (l *Link) copy(to, from net.Conn, answers string) {
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		l.mu.Lock()
		for l.frozen && !l.down {
			l.changed.Wait()
		}
		l.mu.Unlock()
		if n > 0 {
			l.mu.Lock()
			l.answered[answers] = true
			l.mu.Unlock()
			if _, err := to.Write(buffer[:n]); err != nil {
				_ = from.Close()
				return
			}
		}
		if err != nil {
			if err != io.EOF { //nolint:errorlint // Read gives it as it is
				_ = from.Close()
			}
			_ = to.Close()
			return
		}
	}
}

func (l *Link) add(conn net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.down {
		l.conns[conn] = struct{}{}
	}
	return !l.down
}

func (l *Link) remove(conn net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.conns, conn)
}

// Switch has new connections made to another server, as when a name gets another address.
func (l *Link) Switch(target string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.target = target
}

// Reached tells whether a server has answered through the link.
func (l *Link) Reached(target string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.answered[target]
}

// Cut breaks every connection there is; new ones can be made.
func (l *Link) Cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for conn := range l.conns {
		_ = conn.Close()
	}
}

// Down breaks every connection and refuses new ones.
func (l *Link) Down() {
	l.mu.Lock()
	l.down = true
	l.changed.Broadcast()
	l.mu.Unlock()
	l.Cut()
}

// Freeze lets nothing through any more, in either direction, and closes nothing: a cable
// that was pulled, or a machine that was stopped.
func (l *Link) Freeze() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.frozen = true
}
