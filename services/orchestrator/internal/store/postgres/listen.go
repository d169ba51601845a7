package postgres

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// channels are where notices come from.
var channels = map[string]store.Notice{
	"specql_work":     store.NoticeWork,
	"specql_request":  store.NoticeRequest,
	"specql_registry": store.NoticeRegistry,
}

const (
	// listenPing is how long a connection may be silent before it is asked whether it lives.
	listenPing = 10 * time.Second
	// listenBackoff is the longest wait between two tries to connect.
	listenBackoff = 2 * time.Second
)

// Listen implements [store.Store], on a connection of its own. Whoever connects anew may have missed anything, and
// is told so: every notice comes once.
func (s *Store) Listen(ctx context.Context, fn func(store.Notice)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-s.closed:
			cancel()
		case <-ctx.Done():
		}
	}()
	wait := 50 * time.Millisecond
	for {
		began := time.Now()
		err := s.listen(ctx, fn)
		select {
		case <-s.closed:
			return store.ErrClosed
		default:
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if time.Since(began) > listenBackoff {
			wait = 50 * time.Millisecond
		}
		s.logger.WarnContext(ctx, "the connection for notices broke; connecting again", slog.Any("error", err))
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
		wait = min(2*wait, listenBackoff)
	}
}

// listen is one connection's life.
func (s *Store) listen(ctx context.Context, fn func(store.Notice)) error {
	config := s.pool.Config().ConnConfig
	connecting, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	c, err := pgx.ConnectConfig(connecting, config)
	if err != nil {
		return err
	}
	defer func() {
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = c.Close(closing)
	}()
	for channel := range channels {
		if _, err := c.Exec(connecting, "LISTEN "+channel); err != nil {
			return err
		}
	}
	cancel()
	for n := store.NoticeWork; n <= store.NoticeRegistry; n++ {
		fn(n)
	}
	for {
		waiting, cancel := context.WithTimeout(ctx, listenPing)
		n, err := c.WaitForNotification(waiting)
		cancel()
		switch {
		case err == nil:
			if notice, ok := channels[n.Channel]; ok {
				fn(notice)
			}
		case ctx.Err() != nil:
			return ctx.Err()
		case pgconn.Timeout(err) && !c.IsClosed():
			pinging, cancel := context.WithTimeout(ctx, listenPing)
			err := c.Ping(pinging)
			cancel()
			if err != nil {
				return fmt.Errorf("the server does not answer: %w", err)
			}
		default:
			return err
		}
	}
}
