// Package postgres keeps runs in PostgreSQL, for any number of orchestrators at once.
//
// The tables, triggers and views are those of the module migrations. A record costs one round
// trip together with all others of its commit; what the database finds wrong with one of them is
// found out by doing them one by one. Nothing on that path takes a lock that another run's
// records wait for.
package postgres

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// Options says where the database is and how the store works with it. Zero fields take the
// defaults that are named.
type Options struct {
	// URL is the address, as libpq takes it: postgres://user@host/database?sslmode=verify-full,
	// or key=value pairs. What it leaves out comes from the PG… variables of the environment.
	URL string
	// MaxConnections bounds the connections, one for notices and three for commits and heartbeats not counted; 16.
	MaxConnections int
	// Timeout bounds every statement, so that a server that hangs does not hang the caller; 30 s.
	Timeout time.Duration
	// MaxLogLines is how many lines of one run are kept; 0 is [store.MaxLogLines].
	MaxLogLines int
	// Logger may be nil.
	Logger *slog.Logger
	// Now is the clock of times that the caller does not give; nil is [time.Now].
	Now func() time.Time
}

// Store is a [store.Store] in a PostgreSQL database.
type Store struct {
	logger      *slog.Logger
	now         func() time.Time
	timeout     time.Duration
	maxLogLines int64
	pool        *pgxpool.Pool
	// writers are the connections of commits and heartbeats, which no reader can take away.
	writers *pgxpool.Pool
	sql     *statements
	// sums says whether commits work out the sums of jobs; else the triggers do.
	sums   atomic.Bool
	closed chan struct{}
	close  sync.Once

	mu     sync.RWMutex
	tables map[string]*table // columns of entity tables, by quoted name
	// doubts are sessions of the server whose commit had no answer.
	doubts []session
}

var _ store.Store = (*Store)(nil)

// minVersion is the oldest server that the migrations run on.
const minVersion = 140000

// Open connects to a database whose schema is ready. It changes nothing: see [Migrate].
func Open(ctx context.Context, o Options) (_ *Store, err error) {
	config, err := poolConfig(o)
	if err != nil {
		return nil, err
	}
	s := &Store{
		logger: o.Logger, now: o.Now, timeout: o.Timeout, maxLogLines: int64(o.MaxLogLines),
		closed: make(chan struct{}), tables: map[string]*table{},
	}
	if s.logger == nil {
		s.logger = slog.New(slog.DiscardHandler)
	}
	if s.now == nil {
		s.now = time.Now
	}
	if s.timeout <= 0 {
		s.timeout = defaultTimeout
	}
	if s.maxLogLines <= 0 {
		s.maxLogLines = store.MaxLogLines
	}
	if s.pool, err = pgxpool.NewWithConfig(ctx, config); err != nil {
		return nil, fmt.Errorf("open the database: %w", err)
	}
	if s.writers, err = pgxpool.NewWithConfig(ctx, writerConfig(config)); err != nil {
		s.pool.Close()
		return nil, fmt.Errorf("open the database: %w", err)
	}
	defer func() {
		if err != nil {
			s.writers.Close()
			s.pool.Close()
			err = fmt.Errorf("open the database: %w", err)
		}
	}()
	types, sums, err := s.check(ctx)
	if err != nil {
		return nil, err
	}
	s.sql = newStatements(types, sums.columns)
	s.sums.Store(sums.same)
	return s, nil
}

const (
	defaultTimeout        = 30 * time.Second
	defaultMaxConnections = 16
	// writerConnections are one for the journal, one for the heartbeat, and one while another is made anew.
	writerConnections = 3
)

// settings of every connection. The store's statements go by an index, each of them; a planner
// whose statistics are of yesterday must not choose a scan of all runs in the middle of a commit.
// Their plans do not depend on their arguments. What is acknowledged is on the disk, and stays on more
// than one where the server is set up for that. What is written has been checked here ([checkBounds]). A client that is gone in the middle of a
// transaction holds its locks for a minute at most.
const settings = `SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off; SET jit = off;
	SET plan_cache_mode = force_generic_plan; SET timezone = 'UTC'; SET datestyle = 'ISO'; SET intervalstyle = 'postgres';
	SET extra_float_digits = 1; SET idle_in_transaction_session_timeout = '60s';
	SET default_transaction_isolation = 'read committed'; SET client_min_messages = warning; SET specql.checked = 'yes';
	SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'`

func poolConfig(o Options) (*pgxpool.Config, error) {
	if o.URL == "" {
		return nil, errors.New("open the database: the URL is empty")
	}
	config, err := pgxpool.ParseConfig(o.URL)
	if err != nil {
		// The error quotes the URL, which may hold a password.
		return nil, errors.New("open the database: the URL cannot be read; it looks like postgres://user@host:5432/database?sslmode=verify-full")
	}
	config.MaxConns = defaultMaxConnections
	if o.MaxConnections > 0 {
		config.MaxConns = int32(min(o.MaxConnections, 1000)) //nolint:gosec // bounded
	}
	config.HealthCheckPeriod = 15 * time.Second
	config.MaxConnIdleTime = 5 * time.Minute
	config.MaxConnLifetime = time.Hour
	config.MaxConnLifetimeJitter = 10 * time.Minute
	configure(config.ConnConfig)
	config.AfterConnect = func(ctx context.Context, c *pgx.Conn) error {
		if _, err := c.Exec(ctx, settings, pgx.QueryExecModeSimpleProtocol); err != nil {
			return err
		}
		return nameSession(ctx, c)
	}
	return config, nil
}

// writerConfig is the configuration of the connections of commits and heartbeats, made of the others'. A lock that another
// client holds must not stop the records of all runs.
func writerConfig(of *pgxpool.Config) *pgxpool.Config {
	config := of.Copy()
	config.MaxConns = writerConnections
	prepare := config.AfterConnect
	config.AfterConnect = func(ctx context.Context, c *pgx.Conn) error {
		if err := prepare(ctx, c); err != nil {
			return err
		}
		_, err := c.Exec(ctx, fmt.Sprintf("SET lock_timeout = %d; SET specql.checked = 'all'", batchLockTimeout.Milliseconds()), pgx.QueryExecModeSimpleProtocol)
		return err
	}
	return config
}

// configure sets what all connections share, the one for notices too.
func configure(c *pgx.ConnConfig) {
	c.DialFunc = dial
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = 10 * time.Second
	}
	if c.RuntimeParams["application_name"] == "" {
		c.RuntimeParams["application_name"] = "specql-orchestrator"
	}
}

// Close waits for what is in flight and closes the connections.
func (s *Store) Close() error {
	s.close.Do(func() {
		close(s.closed)
		s.pool.Close()
		s.writers.Close()
	})
	return nil
}

// with runs fn with a connection, within the bound of time. What comes back says whether the
// database is to blame, or the caller's context.
func (s *Store) with(ctx context.Context, fn func(ctx context.Context, c *pgx.Conn) error) error {
	return s.within(ctx, s.pool, fn)
}

// within is with, on a connection of the pool that is given.
func (s *Store) within(ctx context.Context, pool *pgxpool.Pool, fn func(ctx context.Context, c *pgx.Conn) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case <-s.closed:
		return store.ErrClosed
	default:
	}
	bounded, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	err := pool.AcquireFunc(bounded, func(c *pgxpool.Conn) error { return fn(bounded, c.Conn()) })
	return s.outcome(ctx, err)
}

// exec runs a statement and returns how many rows it changed or gave.
func (s *Store) exec(ctx context.Context, text string, args ...any) (n int64, err error) {
	err = s.with(ctx, func(ctx context.Context, c *pgx.Conn) error {
		tag, err := c.Exec(ctx, text, args...)
		n = tag.RowsAffected()
		return err
	})
	return n, err
}

// querier is a connection or a transaction.
type querier interface {
	Query(ctx context.Context, text string, args ...any) (pgx.Rows, error)
}

// query reads every row of a query.
func query[T any](ctx context.Context, q querier, scan func(pgx.CollectableRow) (T, error), text string, args ...any) ([]T, error) {
	rows, err := q.Query(ctx, text, args...)
	if err != nil {
		return nil, err
	}
	all, err := pgx.CollectRows(rows, scan)
	if len(all) == 0 {
		return nil, err
	}
	return all, err
}

// one reads the row of a query; ErrNotFound where there is none.
func one[T any](ctx context.Context, q querier, scan func(pgx.CollectableRow) (T, error), text string, args ...any) (T, error) {
	rows, err := q.Query(ctx, text, args...)
	if err != nil {
		var none T
		return none, err
	}
	v, err := pgx.CollectOneRow(rows, scan)
	if errors.Is(err, pgx.ErrNoRows) {
		err = store.ErrNotFound
	}
	return v, err
}

// all and first are query and one on a connection of their own.
func all[T any](ctx context.Context, s *Store, scan func(pgx.CollectableRow) (T, error), text string, args ...any) (out []T, err error) {
	err = s.with(ctx, func(ctx context.Context, c *pgx.Conn) error {
		out, err = query(ctx, c, scan, text, args...)
		return err
	})
	return out, err
}

func first[T any](ctx context.Context, s *Store, scan func(pgx.CollectableRow) (T, error), text string, args ...any) (out T, err error) {
	err = s.with(ctx, func(ctx context.Context, c *pgx.Conn) error {
		out, err = one(ctx, c, scan, text, args...)
		return err
	})
	return out, err
}
