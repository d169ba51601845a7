// Package sqlite keeps runs in one SQLite file: the embedded store.
//
// The file is attached as jobs, so that the names of tables and views are those of every
// other database. One connection writes, a few read. Every commit is synced to the disk
// before it is acknowledged. A lock on the folder keeps a second process out.
package sqlite

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"modernc.org/sqlite"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// Options says where the store is and what it works with.
type Options struct {
	// Path is the database file. Its folder is created, and locked while the store is open.
	Path string
	// MaxLogLines is how many lines of one run are kept; 0 is [store.MaxLogLines].
	MaxLogLines int
	// Logger may be nil.
	Logger *slog.Logger
	// Now is the clock of times that the caller does not give; nil is [time.Now].
	Now func() time.Time
}

// Store is a [store.Store] in a SQLite file.
type Store struct {
	logger *slog.Logger
	now    func() time.Time
	path   string
	// reads is held shared by each read, and alone to start the write-ahead log anew.
	reads sync.RWMutex
	// maxLogBytes is how large the write-ahead log may grow while reads overlap.
	maxLogBytes int64
	// maxLogLines bounds the lines of one run.
	maxLogLines int64
	lock        *folderLock
	writeDB     *sql.DB
	readDB      *sql.DB
	// turn holds the one write connection while nobody writes. A closed store leaves it empty.
	turn   chan *writer
	closed chan struct{}
	close  sync.Once

	mu     sync.RWMutex
	tables map[string]table // columns of entity tables, by table name
	owner  string           // registered; empty for none
	beat   int64
}

var _ store.Store = (*Store)(nil)

// Open opens the database at a path, or creates it, and brings its tables up to date. It
// fails at once where another process has the folder open, naming that process.
func Open(ctx context.Context, o Options) (_ *Store, err error) {
	if o.Path == "" {
		return nil, errors.New("open the database: the path is empty")
	}
	path, err := filepath.Abs(o.Path)
	if err != nil {
		return nil, fmt.Errorf("open the database: %w", err)
	}
	s := &Store{
		logger: o.Logger,
		now:    o.Now,
		turn:   make(chan *writer, 1),
		closed: make(chan struct{}),
		tables: map[string]table{},

		path:        path,
		maxLogBytes: 64 << 20,
		maxLogLines: int64(o.MaxLogLines),
	}
	if s.maxLogLines <= 0 {
		s.maxLogLines = store.MaxLogLines
	}
	if s.logger == nil {
		s.logger = slog.New(slog.DiscardHandler)
	}
	if s.now == nil {
		s.now = time.Now
	}
	folder := filepath.Dir(path)
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return nil, fmt.Errorf("open the database: %w", err)
	}
	if s.lock, err = lockFolder(folder); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.release())
		}
	}()
	// The inputs of runs are nobody else's business: SQLite gives its other files the same mode.
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the database: %w", err)
	}
	if err := f.Close(); err != nil {
		return nil, fmt.Errorf("open the database: %w", err)
	}

	s.writeDB = openPool(path, writerPragmas, 1)
	conn, err := s.writeDB.Conn(ctx)
	if err != nil {
		return nil, fmt.Errorf("open the database %s: %w", path, err)
	}
	w := &writer{conn: conn, statements: map[string]*sql.Stmt{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	if err := checkFile(ctx, conn); err != nil {
		return nil, fmt.Errorf("open the database %s: %w", path, err)
	}
	if err := migrate(ctx, conn, s.logger); err != nil {
		return nil, fmt.Errorf("open the database %s: %w", path, err)
	}
	s.readDB = openPool(path, readerPragmas, min(max(runtime.GOMAXPROCS(0), 2), 8))
	s.turn <- w
	return s, nil
}

// Close waits for the write and the reads in flight, then closes the database and gives the folder up.
func (s *Store) Close() error {
	var err error
	s.close.Do(func() {
		close(s.closed)
		w := <-s.turn
		s.reads.Lock() // the reads in flight end first
		defer s.reads.Unlock()
		err = errors.Join(w.close(), s.release())
	})
	return err
}

// release closes what is open, the lock last.
func (s *Store) release() error {
	var errs []error
	if s.readDB != nil {
		errs = append(errs, s.readDB.Close())
	}
	if s.writeDB != nil {
		errs = append(errs, s.writeDB.Close())
	}
	if s.lock != nil {
		errs = append(errs, s.lock.release())
	}
	return errors.Join(errs...)
}

var (
	// FULL syncs the write-ahead log at every commit: what is acknowledged survives a power cut.
	writerPragmas = []string{
		"PRAGMA jobs.journal_mode = WAL",
		syncFull,
		"PRAGMA jobs.journal_size_limit = 67108864",
		"PRAGMA jobs.cache_size = -16000",
		"PRAGMA foreign_keys = ON",
		"PRAGMA busy_timeout = 5000",
		"PRAGMA temp_store = MEMORY",
		"PRAGMA trusted_schema = OFF",
	}
	readerPragmas = []string{
		"PRAGMA jobs.cache_size = -4000",
		"PRAGMA busy_timeout = 5000",
		"PRAGMA temp_store = MEMORY",
		"PRAGMA trusted_schema = OFF",
		"PRAGMA query_only = ON",
	}
)

// openPool makes a pool whose connections have the file attached as jobs.
func openPool(path string, pragmas []string, size int) *sql.DB {
	db := sql.OpenDB(&connector{path: path, pragmas: pragmas, driver: &sqlite.Driver{}})
	db.SetMaxOpenConns(size)
	db.SetMaxIdleConns(size)
	return db
}

// connector opens connections to an empty database in memory, with the file attached.
type connector struct {
	path    string
	pragmas []string
	driver  *sqlite.Driver
}

// Connect implements driver.Connector.
func (c *connector) Connect(ctx context.Context) (driver.Conn, error) {
	conn, err := c.driver.Open(":memory:")
	if err != nil {
		return nil, err
	}
	if err := c.attach(ctx, conn); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

func (c *connector) attach(ctx context.Context, conn driver.Conn) error {
	ex, ok := conn.(driver.ExecerContext)
	if !ok {
		return fmt.Errorf("%T cannot run statements", conn)
	}
	path := []driver.NamedValue{{Ordinal: 1, Value: c.path}}
	if _, err := ex.ExecContext(ctx, "ATTACH DATABASE ? AS jobs", path); err != nil {
		return err
	}
	for _, p := range c.pragmas {
		if _, err := ex.ExecContext(ctx, p, nil); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
	}
	return nil
}

// Driver implements driver.Connector.
func (c *connector) Driver() driver.Driver { return c.driver }

// checkFile makes sure of the durability that commits promise: a file system without shared
// memory maps, for one, silently refuses the write-ahead log.
func checkFile(ctx context.Context, conn *sql.Conn) error {
	var mode string
	if err := conn.QueryRowContext(ctx, "PRAGMA jobs.journal_mode").Scan(&mode); err != nil {
		return err
	}
	if mode != "wal" {
		return fmt.Errorf("the file system does not bear a write-ahead log (journal mode is %s); put the data on a local disk", mode)
	}
	return nil
}

func (s *Store) timeNow() time.Time { return s.now().UTC() }
