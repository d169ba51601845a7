package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"sync/atomic"

	"github.com/specql/mesh/pkg/client"
)

// orchestrators measures one, two and four of them against one database, each with its share of the clients.
func (b *bench) orchestrators(ctx context.Context, m *meter, s *system) (err error) {
	clients := []*client.Client{s.client}
	var started []*program
	defer func() {
		for _, c := range clients[1:] {
			err = errors.Join(err, c.Close())
		}
		for _, p := range started {
			p.end()
		}
	}()
	for _, n := range []int{1, 2, 4} {
		for len(clients) < n {
			name := "orchestrator-" + strconv.Itoa(len(clients)+1)
			p, c, err := s.another(ctx, b.bin, b.dir, name)
			if err != nil {
				return err
			}
			started, clients = append(started, p), append(clients, c)
			m.parts[name] = p.cmd.Process.Pid
		}
		for _, sh := range []shape{shapes()[0], shapes()[2]} {
			for _, c := range clients {
				if err := execute(ctx, c, sh); err != nil {
					return err
				}
			}
			for _, concurrency := range []int{32, 64} {
				var next atomic.Int64
				err := b.measureAs(ctx, m, fmt.Sprintf("%d orchestrators", n), sh, concurrency, func(ctx context.Context) error {
					return execute(ctx, clients[int(next.Add(1))%len(clients)], sh)
				})
				if err != nil {
					return fmt.Errorf("%d orchestrators: %s: %w", n, sh.name, err)
				}
			}
		}
	}
	return nil
}

// another starts one more orchestrator on the same database, with the same runner.
func (s *system) another(ctx context.Context, bin, dir, name string) (*program, *client.Client, error) {
	p, api, err := start(ctx, dir, name, filepath.Join(bin, "orchestrator"), s.orchestratorFlags()...)
	if err != nil {
		return nil, nil, err
	}
	c, err := s.dial(dir, api)
	if err != nil {
		p.end()
		return nil, nil, err
	}
	return p, c, nil
}
