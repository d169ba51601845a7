// Package pgtest starts throwaway PostgreSQL clusters from the programs of the machine, for tests
// and for programs that measure. The servers write as production does: fsync, synchronous commits
// and full pages are on. A cluster ends with the process that started it, however that ends.
package pgtest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// User is the superuser of every cluster. It needs no password.
const User = "specql"

// startLimit is how long a server may take to be ready or to be gone, recovery after a crash included.
const startLimit = 2 * time.Minute

// Mode says how a server ends.
type Mode int

// The modes.
const (
	// Fast rolls back what is under way, writes a checkpoint and closes every connection.
	Fast Mode = iota
	// Immediate ends at once, as after a crash: the next start recovers from the log.
	Immediate
)

// Cluster is one server with its folder. Its methods are safe for concurrent use, but for Stop,
// Start and Close among themselves.
type Cluster struct {
	tools    *tools
	dir      string
	own      bool // the folder is ours to remove
	port     int
	settings []string
	next     atomic.Int64

	mu      sync.Mutex
	server  *exec.Cmd
	exited  chan struct{} // closed when the server is gone
	warden  *exec.Cmd
	release io.Closer
}

// Start starts a cluster that ends with the test. Without PostgreSQL on the machine the test fails.
// Settings are name=value, as in postgresql.conf.
func Start(tb testing.TB, settings ...string) *Cluster {
	tb.Helper()
	c, err := New("", settings...)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := c.Close(); err != nil {
			tb.Error(err)
		}
	})
	return c
}

// New makes a cluster in a folder and starts it. A folder that holds one already keeps its data; an
// empty name stands for a folder of its own, which Close removes. Keep the name short: the server's
// socket lies there too. Settings are name=value, as in postgresql.conf.
func New(dir string, settings ...string) (*Cluster, error) {
	t, err := findTools()
	if err != nil {
		return nil, err
	}
	c := &Cluster{tools: t, dir: dir, settings: settings}
	if dir == "" {
		if c.dir, err = os.MkdirTemp("", "specql-pg-"); err != nil {
			return nil, err
		}
		c.own = true
	} else if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := c.init(); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

func (c *Cluster) init() error {
	if c.tools.credential != nil {
		if err := os.Chown(c.dir, int(c.tools.credential.Uid), int(c.tools.credential.Gid)); err != nil {
			return err
		}
	}
	if _, err := os.Stat(filepath.Join(c.dir, "data", "PG_VERSION")); err != nil {
		cmd := c.command("initdb", "--no-sync", "--auth=trust", "--username="+User, "--encoding=UTF8", "--no-locale", "--pgdata="+filepath.Join(c.dir, "data"))
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("initdb: %w\n%s", err, out)
		}
	}
	// Between the choice of a port and its use somebody else may take it: then another one.
	var err error
	for range 5 {
		if c.port, err = freePort(); err != nil {
			return err
		}
		if err = c.Start(); err == nil {
			return nil
		}
	}
	return err
}

// Start starts the server again after Stop, on the same port and data, and returns when it answers.
func (c *Cluster) Start() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.server != nil {
		return errors.New("the server runs already")
	}
	log, err := os.OpenFile(filepath.Join(c.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }() // the server has its own handle
	args := []string{"-D", filepath.Join(c.dir, "data"), "-h", "127.0.0.1", "-p", strconv.Itoa(c.port), "-k", c.dir}
	for _, s := range append([]string{
		"fsync=on", "synchronous_commit=on", "full_page_writes=on", "max_connections=200",
		"logging_collector=off", "log_destination=stderr",
	}, c.settings...) {
		args = append(args, "-c", s)
	}
	server := c.command("postgres", args...)
	server.Stdout, server.Stderr = log, log
	if err := server.Start(); err != nil {
		return fmt.Errorf("postgres: %w", err)
	}
	exited := make(chan struct{})
	go func() {
		_ = server.Wait() // how it ended is in its log
		close(exited)
	}()
	c.server, c.exited = server, exited
	if err := c.watch(); err != nil {
		return errors.Join(err, c.stop(Immediate))
	}
	if err := c.ready(); err != nil {
		return errors.Join(err, c.stop(Immediate))
	}
	return nil
}

// watch starts the warden: a shell that waits for the end of this process, seen as the end of its
// input, then ends the server and removes the folder.
func (c *Cluster) watch() error {
	remove := ""
	if c.own {
		remove = c.dir
	}
	const script = `cat >/dev/null; kill -QUIT "$1" 2>/dev/null; while kill -0 "$1" 2>/dev/null; do sleep 0.05; done; [ -z "$2" ] || rm -rf "$2"`
	warden := c.command("/bin/sh", "-c", script, "warden", strconv.Itoa(c.server.Process.Pid), remove)
	release, err := warden.StdinPipe()
	if err != nil {
		return err
	}
	if err := warden.Start(); err != nil {
		return err
	}
	c.warden, c.release = warden, release
	return nil
}

// ready waits until the server takes connections, which it writes into its pid file.
func (c *Cluster) ready() error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	limit := time.NewTimer(startLimit)
	defer limit.Stop()
	pid := strconv.Itoa(c.server.Process.Pid)
	for {
		select {
		case <-c.exited:
			return fmt.Errorf("postgres ended at its start:\n%s", c.logTail())
		case <-limit.C:
			return fmt.Errorf("postgres was not ready within %s:\n%s", startLimit, c.logTail())
		case <-tick.C:
		}
		text, err := os.ReadFile(filepath.Join(c.dir, "data", "postmaster.pid"))
		if err != nil {
			continue // not yet written
		}
		lines := strings.Split(string(text), "\n")
		if len(lines) >= 8 && lines[0] == pid && strings.TrimSpace(lines[7]) == "ready" {
			return nil
		}
	}
}

// Stop ends the server and returns when it is gone. Data and port stay for Start.
func (c *Cluster) Stop(mode Mode) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stop(mode)
}

func (c *Cluster) stop(mode Mode) error {
	if c.server == nil {
		return nil
	}
	sig := syscall.SIGINT
	if mode == Immediate {
		sig = syscall.SIGQUIT
	}
	_ = c.server.Process.Signal(sig) // it may be gone already
	limit := time.NewTimer(startLimit)
	defer limit.Stop()
	var err error
	select {
	case <-c.exited:
	case <-limit.C:
		err = fmt.Errorf("postgres did not end within %s:\n%s", startLimit, c.logTail())
		_ = c.server.Process.Kill()
		<-c.exited
	}
	c.server = nil
	if c.warden != nil {
		_ = c.warden.Process.Kill() // before its input ends, so that it removes nothing
		_ = c.release.Close()
		_ = c.warden.Wait()
		c.warden, c.release = nil, nil
	}
	return err
}

// Close ends the server and removes its folder where New made it.
func (c *Cluster) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	err := c.stop(Immediate)
	if c.own {
		err = errors.Join(err, os.RemoveAll(c.dir))
	}
	return err
}

// Bin is the folder of the installation's programs.
func (c *Cluster) Bin() string { return c.tools.bin }

// PID is the process id of the server; 0 while it is stopped.
func (c *Cluster) PID() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.server == nil {
		return 0
	}
	return c.server.Process.Pid
}

// Address is the host and port of the server.
func (c *Cluster) Address() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(c.port)) }

// URL is the address of a database for a client.
func (c *Cluster) URL(database string) string {
	return fmt.Sprintf("postgres://%s@%s/%s?sslmode=disable", User, c.Address(), database)
}

// NewDatabase makes an empty database and returns its URL.
func (c *Cluster) NewDatabase(tb testing.TB) string {
	tb.Helper()
	url, err := c.CreateDatabase()
	if err != nil {
		tb.Fatal(err)
	}
	return url
}

// CreateDatabase makes an empty database and returns its URL.
func (c *Cluster) CreateDatabase() (string, error) {
	name := fmt.Sprintf("db_%d_%d", os.Getpid(), c.next.Add(1))
	if _, err := c.Run(c.URL("postgres"), "CREATE DATABASE "+name); err != nil {
		return "", err
	}
	return c.URL(name), nil
}

// Psql runs statements with psql, each in a transaction of its own, and returns what they print: a row a
// line, columns apart by |. A statement that fails fails the test.
func (c *Cluster) Psql(tb testing.TB, url, sql string) string {
	tb.Helper()
	out, err := c.Run(url, sql)
	if err != nil {
		tb.Fatal(err)
	}
	return out
}

// Run is Psql outside tests: the error holds what psql said.
func (c *Cluster) Run(url, sql string) (string, error) {
	cmd := exec.Command(c.tools.path("psql"), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", url, "-f", "-") //nolint:gosec // a program of the installation
	cmd.Env = environment()
	cmd.Stdin = strings.NewReader(sql)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("psql: %w: %s", err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimRight(stdout.String(), "\n"), nil
}

// logTail is the end of the server's log.
func (c *Cluster) logTail() string {
	text, err := os.ReadFile(filepath.Join(c.dir, "log"))
	if err != nil {
		return err.Error()
	}
	const most = 4 << 10
	if len(text) > most {
		text = text[len(text)-most:]
	}
	return string(text)
}

// command is a program of the installation, run as the user who may run it, in a process group of its
// own, so that an interrupt at a terminal does not reach it.
func (c *Cluster) command(program string, args ...string) *exec.Cmd {
	if !filepath.IsAbs(program) {
		program = c.tools.path(program)
	}
	cmd := exec.Command(program, args...) //nolint:gosec // a program of the installation
	cmd.Dir = c.dir
	cmd.Env = environment()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: c.tools.credential}
	return cmd
}

// environment is the process's own without what steers PostgreSQL's programs and the language of their messages.
func environment() []string {
	var out []string
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "PG") && !strings.HasPrefix(v, "LC_") && !strings.HasPrefix(v, "LANG") {
			out = append(out, v)
		}
	}
	return append(out, "LC_ALL=C")
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer func() { _ = l.Close() }()
	return l.Addr().(*net.TCPAddr).Port, nil
}
