package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// replicasName is what the orchestrator calls the replicas of the runner by.
const replicasName = "noop-runner.bench"

// runners measures one, two and four replicas of the runner behind one name, as a service of Kubernetes without an address of its own is one.
// The replicas listen on one port of 127.0.0.1, 127.0.0.2 and so on.
func (b *bench) runners(ctx context.Context, m *meter, s *system) (err error) {
	dir := filepath.Join(b.dir, "replicas")
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return err
	}
	tls, err := certificates(b.ca, dir, "noop-runner", replicasName)
	if err != nil {
		return err
	}
	first, err := freeAddress(ctx)
	if err != nil {
		return err
	}
	_, port, err := net.SplitHostPort(first)
	if err != nil {
		return err
	}
	names, err := newNames(ctx)
	if err != nil {
		return err
	}
	var replicas []*program
	defer func() {
		err = errors.Join(err, names.end())
		for _, p := range replicas {
			p.end()
		}
	}()
	delete(m.parts, "runner") // it has nothing to do
	for _, n := range []int{1, 2, 4} {
		for len(replicas) < n {
			name := "replica-" + strconv.Itoa(len(replicas)+1)
			address := net.IPv4(127, 0, 0, byte(1+len(replicas))) //nolint:gosec // few
			p, _, err := start(ctx, dir, name, filepath.Join(b.bin, "noop-runner"),
				append(tls, "--listen", net.JoinHostPort(address.String(), port), "--max-concurrency", "100000")...)
			if err != nil {
				return err
			}
			replicas = append(replicas, p)
			m.parts[name] = p.cmd.Process.Pid
			names.add(address)
		}
		if err := b.replicas(ctx, m, s, "dns://"+names.address()+"/"+net.JoinHostPort(replicasName, port), n); err != nil {
			return fmt.Errorf("%d replicas: %w", n, err)
		}
	}
	return nil
}

// replicas measures an orchestrator of its own, whose runner is at a target.
func (b *bench) replicas(ctx context.Context, m *meter, s *system, target string, n int) (err error) {
	own := &system{flags: s.flags, address: target}
	p, c, err := own.another(ctx, b.bin, b.dir, "orchestrator-of-replicas-"+strconv.Itoa(n))
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, c.Close())
		p.end()
	}()
	m.parts["orchestrator"] = p.cmd.Process.Pid
	if err := b.warmUp(ctx, c); err != nil {
		return err
	}
	for _, sh := range []shape{shapes()[0], shapes()[2], shapes()[3]} {
		for _, concurrency := range []int{1, 32} {
			err := b.measureAs(ctx, m, "replicas: "+strconv.Itoa(n), sh, concurrency, func(ctx context.Context) error { return execute(ctx, c, sh) })
			if err != nil {
				return fmt.Errorf("%s: %w", sh.name, err)
			}
		}
	}
	return nil
}

// names is a name server that knows one name, of IPv4 (RFC 1035).
type names struct {
	conn net.PacketConn
	done chan struct{}

	mu        sync.Mutex
	addresses [][4]byte
}

func newNames(ctx context.Context) (*names, error) {
	var lc net.ListenConfig
	conn, err := lc.ListenPacket(ctx, "udp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	n := &names{conn: conn, done: make(chan struct{})}
	go n.serve()
	return n, nil
}

func (n *names) address() string { return n.conn.LocalAddr().String() }

func (n *names) add(ip net.IP) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.addresses = append(n.addresses, [4]byte(ip.To4()))
}

func (n *names) serve() {
	defer close(n.done)
	packet := make([]byte, 1<<12)
	for {
		size, from, err := n.conn.ReadFrom(packet)
		if err != nil {
			return
		}
		if answer, err := n.answer(packet[:size]); err == nil {
			_, _ = n.conn.WriteTo(answer, from) // who asked asks again
		}
	}
}

var errNoQuestion = errors.New("not a question")

func (n *names) answer(query []byte) ([]byte, error) {
	var m dnsmessage.Message
	if err := m.Unpack(query); err != nil || m.Response || len(m.Questions) != 1 {
		return nil, errors.Join(errNoQuestion, err)
	}
	q := m.Questions[0]
	m = dnsmessage.Message{
		Header:    dnsmessage.Header{ID: m.ID, Response: true, Authoritative: true, RecursionDesired: m.RecursionDesired},
		Questions: m.Questions,
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case q.Name.String() != replicasName+".":
		m.RCode = dnsmessage.RCodeNameError
	case q.Type == dnsmessage.TypeA:
		for _, a := range n.addresses {
			m.Answers = append(m.Answers, dnsmessage.Resource{
				Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: uint32(time.Second.Seconds())},
				Body:   &dnsmessage.AResource{A: a},
			})
		}
	}
	return m.Pack()
}

func (n *names) end() error {
	err := n.conn.Close()
	<-n.done
	return err
}
