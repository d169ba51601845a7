package mesh

import (
	"fmt"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/resolver"
	_ "google.golang.org/grpc/resolver/dns" // registers dns
)

// resolveEvery is how often the addresses behind a name are looked up. gRPC by itself looks only when a
// connection broke, so that replicas which join stay idle until then.
const resolveEvery = 10 * time.Second

// polledDNS is gRPC's own DNS resolver, asked again and again.
type polledDNS struct {
	resolver.Builder
	every time.Duration
}

func newPolledDNS(every time.Duration) polledDNS { return polledDNS{resolver.Get("dns"), every} }

// Build implements [resolver.Builder].
func (b polledDNS) Build(target resolver.Target, cc resolver.ClientConn, o resolver.BuildOptions) (resolver.Resolver, error) {
	now, err := b.Builder.Build(target, cc, o)
	if err != nil {
		return nil, fmt.Errorf("resolve: %w", err)
	}
	host, _, err := net.SplitHostPort(target.Endpoint())
	if err != nil {
		host = target.Endpoint()
	}
	if host == "localhost" || net.ParseIP(host) != nil {
		return now, nil
	}
	p := &poll{now: now, end: make(chan struct{})}
	p.done.Go(func() {
		tick := time.NewTicker(b.every)
		defer tick.Stop()
		for {
			select {
			case <-p.end:
				return
			case <-tick.C:
			}
			// A resolver looks at once when it is made, and else no more often than every 30 s.
			if next, err := b.Builder.Build(target, cc, o); err == nil {
				p.put(next)
			}
		}
	})
	return p, nil
}

// poll is a resolver that is replaced by a fresh one from time to time.
type poll struct {
	end  chan struct{}
	done sync.WaitGroup

	mu  sync.Mutex
	now resolver.Resolver
}

func (p *poll) put(next resolver.Resolver) {
	p.mu.Lock()
	old := p.now
	p.now = next
	p.mu.Unlock()
	old.Close()
}

// ResolveNow implements [resolver.Resolver].
func (p *poll) ResolveNow(o resolver.ResolveNowOptions) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.now.ResolveNow(o)
}

// Close implements [resolver.Resolver].
func (p *poll) Close() {
	close(p.end)
	p.done.Wait()
	p.now.Close()
}
