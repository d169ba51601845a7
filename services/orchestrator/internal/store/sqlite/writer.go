package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

const (
	syncFull   = "PRAGMA jobs.synchronous = FULL"
	syncNormal = "PRAGMA jobs.synchronous = NORMAL"
)

// maxStatements bounds the prepared statements; only updates of entity rows, whose columns
// vary, come anywhere near it.
const maxStatements = 500

// writer is the one connection that writes, with its prepared statements. Its methods take
// no context: a transaction is short and always runs to its end, so that its outcome is known.
type writer struct {
	conn       *sql.Conn
	statements map[string]*sql.Stmt
	// commits counts the transactions since the size of the write-ahead log was looked at.
	commits int
}

func (w *writer) close() error {
	var errs []error
	for _, st := range w.statements {
		errs = append(errs, st.Close())
	}
	w.statements = nil
	return errors.Join(append(errs, w.conn.Close())...)
}

func (w *writer) prepare(query string) (*sql.Stmt, error) {
	if st, ok := w.statements[query]; ok {
		return st, nil
	}
	if len(w.statements) >= maxStatements {
		for q, st := range w.statements {
			delete(w.statements, q)
			if err := st.Close(); err != nil {
				return nil, err
			}
		}
	}
	st, err := w.conn.PrepareContext(context.Background(), query)
	if err != nil {
		return nil, err
	}
	w.statements[query] = st
	return st, nil
}

// exec runs a statement and returns how many rows it changed.
func (w *writer) exec(query string, args ...any) (int64, error) {
	st, err := w.prepare(query) //nolint:sqlclosecheck // the writer closes its statements
	if err != nil {
		return 0, err
	}
	res, err := st.ExecContext(context.Background(), args...)
	if err != nil {
		return 0, err
	}
	return res.RowsAffected()
}

// row reads one row; sql.ErrNoRows where there is none.
func (w *writer) row(query string, args []any, dest ...any) error {
	st, err := w.prepare(query) //nolint:sqlclosecheck // the writer closes its statements
	if err != nil {
		return err
	}
	return st.QueryRowContext(context.Background(), args...).Scan(dest...)
}

// rows reads every row with scan.
func (w *writer) rows(query string, args []any, scan func(*sql.Rows) error) (err error) {
	st, err := w.prepare(query) //nolint:sqlclosecheck // the writer closes its statements
	if err != nil {
		return err
	}
	rows, err := st.QueryContext(context.Background(), args...)
	if err != nil {
		return err
	}
	return eachRow(rows, scan)
}

func eachRow(rows *sql.Rows, scan func(*sql.Rows) error) (err error) {
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		if err := scan(rows); err != nil {
			return err
		}
	}
	return rows.Err()
}

// acquire waits for the turn to write.
func (s *Store) acquire(ctx context.Context) (*writer, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	select {
	case <-s.closed:
		return nil, store.ErrClosed
	default:
	}
	select {
	case w := <-s.turn:
		return w, nil
	case <-s.closed:
		return nil, store.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// write runs fn in a transaction. The context counts until the transaction begins.
func (s *Store) write(ctx context.Context, fn func(*writer) error) error {
	w, err := s.acquire(ctx)
	if err != nil {
		return err
	}
	defer func() { s.turn <- w }()
	if err := w.transact(fn); err != nil {
		return err
	}
	s.boundLog(ctx, w)
	return nil
}

// commitsPerLook is how many transactions go by before the write-ahead log is looked at.
const commitsPerLook = 32

// boundLog starts the write-ahead log anew where it has become large. SQLite does this by
// itself in a moment without readers; under steady reading there is no such moment.
func (s *Store) boundLog(ctx context.Context, w *writer) {
	if w.commits++; w.commits < commitsPerLook {
		return
	}
	w.commits = 0
	info, err := os.Stat(s.path + "-wal")
	if err != nil || info.Size() <= s.maxLogBytes {
		return
	}
	s.reads.Lock()
	defer s.reads.Unlock()
	var busy, pages, moved int
	err = w.row("PRAGMA jobs.wal_checkpoint(TRUNCATE)", nil, &busy, &pages, &moved)
	if err != nil || busy != 0 {
		s.logger.WarnContext(ctx, "the write-ahead log could not be started anew", slog.Int64("bytes", info.Size()), slog.Any("error", err))
	}
}

func (w *writer) transact(fn func(*writer) error) (err error) {
	if _, err := w.exec("BEGIN IMMEDIATE"); err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	committed := false
	defer func() {
		if committed {
			return
		}
		// SQLite has rolled back by itself after some errors: then there is nothing to roll back.
		if _, rollback := w.exec("ROLLBACK"); rollback != nil && err == nil {
			err = fmt.Errorf("roll back: %w", rollback)
		}
	}()
	if err := fn(w); err != nil {
		return err
	}
	if _, err := w.exec("COMMIT"); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	committed = true
	return nil
}

// savepoint runs fn so that all of it is undone where it fails.
func (w *writer) savepoint(fn func() error) error {
	if _, err := w.exec("SAVEPOINT record"); err != nil {
		return err
	}
	err := fn()
	if err != nil {
		if _, undo := w.exec("ROLLBACK TO record"); undo != nil {
			return fmt.Errorf("undo a record: %w", errors.Join(undo, err))
		}
	}
	if _, release := w.exec("RELEASE record"); release != nil {
		return fmt.Errorf("release a record: %w", errors.Join(release, err))
	}
	return err
}
