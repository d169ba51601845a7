package postgres

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// session is a connection as the server knows it. Numbers of processes come again, with another start.
type session struct {
	pid   uint32
	start time.Time
}

// sessionKey is where a connection keeps its session.
const sessionKey = "session"

// nameSession notes what the server calls the connection.
func nameSession(ctx context.Context, c *pgx.Conn) error {
	id := session{pid: c.PgConn().PID()}
	err := c.QueryRow(ctx, "SELECT backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()", pgx.QueryExecModeSimpleProtocol).Scan(&id.start)
	if err != nil {
		return err
	}
	c.PgConn().CustomData()[sessionKey] = id
	return nil
}

// doubt notes that a commit on a connection had no answer: it may still take effect, for all that is known.
func (s *Store) doubt(c *pgx.Conn) {
	id, ok := c.PgConn().CustomData()[sessionKey].(session)
	if !ok {
		return
	}
	s.mu.Lock()
	s.doubts = append(s.doubts, id)
	s.mu.Unlock()
}

// settle makes sure that no commit is on its way of which nobody knows: what reached a server that hung is carried out
// when it goes on, and must not come after what has been written since. A session that cannot be ended yet
// leaves the database unavailable.
func (s *Store) settle(ctx context.Context, c *pgx.Conn) error {
	s.mu.RLock()
	doubts := s.doubts
	s.mu.RUnlock()
	for _, id := range doubts {
		var there, ended bool
		err := c.QueryRow(ctx, `SELECT count(*) > 0, coalesce(bool_and(pg_terminate_backend(pid, 2000)), true) FROM pg_stat_activity
			WHERE pid = $1 AND backend_start = $2`, int64(id.pid), id.start).Scan(&there, &ended)
		if err != nil {
			return err
		}
		if there && !ended {
			return fmt.Errorf("%w: the outcome of a commit is not known yet; session %d of the server does not end", store.ErrUnavailable, id.pid)
		}
		s.mu.Lock()
		for i, d := range s.doubts {
			if d == id {
				s.doubts = append(s.doubts[:i:i], s.doubts[i+1:]...)
				break
			}
		}
		s.mu.Unlock()
	}
	return nil
}
