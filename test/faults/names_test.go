package faults

import (
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/dns/dnsmessage"
)

// names is a name server for the replicas of the runners, as a headless service of a cluster has: each orchestrator knows them by a
// name of its own, behind which are the links from it to each of them.
type names struct {
	conn net.PacketConn
	done chan struct{}

	mu    sync.Mutex
	hosts map[string][]netip.Addr
}

func newNames(t testing.TB) *names {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	n := &names{conn: conn, done: make(chan struct{}), hosts: map[string][]netip.Addr{}}
	go n.serve()
	t.Cleanup(func() {
		_ = conn.Close()
		<-n.done
	})
	return n
}

// target is what an orchestrator is told: a gRPC name that this server resolves.
func (n *names) target(host, port string) string {
	return "dns://" + n.conn.LocalAddr().String() + "/" + net.JoinHostPort(host, port)
}

func (n *names) set(host string, addresses ...netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hosts[host] = addresses
}

func (n *names) serve() {
	defer close(n.done)
	packet := make([]byte, 1500)
	for {
		size, from, err := n.conn.ReadFrom(packet)
		if err != nil {
			return
		}
		if answer, err := n.answer(packet[:size]); err == nil {
			_, _ = n.conn.WriteTo(answer, from)
		}
	}
}

func (n *names) answer(packet []byte) ([]byte, error) {
	var p dnsmessage.Parser
	header, err := p.Start(packet)
	if err != nil {
		return nil, err
	}
	q, err := p.Question()
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	addresses, known := n.hosts[strings.TrimSuffix(q.Name.String(), ".")]
	n.mu.Unlock()
	reply := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: header.ID, Response: true, Authoritative: true, RecursionDesired: header.RecursionDesired, RecursionAvailable: true},
		Questions: []dnsmessage.Question{q},
	}
	if !known {
		reply.RCode = dnsmessage.RCodeNameError
	}
	if q.Type == dnsmessage.TypeA {
		for _, a := range addresses {
			reply.Answers = append(reply.Answers, dnsmessage.Resource{
				Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 1},
				Body:   &dnsmessage.AResource{A: a.As4()},
			})
		}
	}
	return reply.Pack()
}
