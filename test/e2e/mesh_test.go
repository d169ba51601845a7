package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/client"
)

// root is the top of the repository, seen from the folder that go test runs in.
const root = "../.."

// program builds specql once for all tests and gives its path.
var program = sync.OnceValues(func() (string, error) {
	binary, err := filepath.Abs(filepath.Join(root, ".cache", "bin", "specql"))
	if err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-o", binary, "./cmd/specql")
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build specql: %w\n%s", err, out)
	}
	return binary, nil
})

func specql(t *testing.T) string {
	t.Helper()
	binary, err := program()
	require.NoError(t, err)
	return binary
}

// mesh says how `specql dev` is started.
type mesh struct {
	// dir is the working folder; a temporary one by default.
	dir string
	// data is the folder of the database; a temporary one by default.
	data string
	// args are added to the command line.
	args []string
	// env is added to the environment.
	env []string
	// scripts is the working directory of the test registry's shell services.
	scripts string
}

// dev is a running `specql dev`.
type dev struct {
	*client.Client
	api, console string
	cmd          *exec.Cmd
	log          *lockedBuffer
	ended        chan struct{}
}

// start runs `specql dev` until the end of the test and waits until it is ready.
func start(t *testing.T, m mesh) *dev {
	t.Helper()
	if m.dir == "" {
		m.dir = t.TempDir()
	}
	if m.data == "" {
		m.data = filepath.Join(t.TempDir(), "data")
	}
	args := append([]string{"dev", "--listen", "127.0.0.1:0", "--console", "127.0.0.1:0", "--data", m.data}, m.args...)
	d := &dev{cmd: exec.Command(specql(t), args...), log: &lockedBuffer{}, ended: make(chan struct{})}
	d.cmd.Dir = m.dir
	d.cmd.Env = environment(m.env...)
	d.cmd.Stderr = d.log
	stdout, err := d.cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, d.cmd.Start())
	lines := make(chan string, 16)
	go func() {
		defer close(d.ended)
		s := bufio.NewScanner(stdout)
		for s.Scan() {
			select {
			case lines <- s.Text():
			default:
			}
		}
		_ = d.cmd.Wait() // how it ended is in cmd.ProcessState
	}()
	t.Cleanup(func() {
		d.stop()
		if t.Failed() {
			t.Logf("specql dev:\n%s", d.log)
		}
	})
	select {
	case line := <-lines:
		_, err := fmt.Sscanf(line, "ready api=%s console=%s", &d.api, &d.console)
		require.NoError(t, err, "the line is %q", line)
	case <-d.ended:
		require.Fail(t, "specql dev ended", "%s\n%s", d.cmd.ProcessState, d.log)
	case <-time.After(time.Minute):
		require.Fail(t, "specql dev is not ready after a minute")
	}
	d.Client, err = client.New(d.api)
	require.NoError(t, err)
	t.Cleanup(func() { _ = d.Close() })
	return d
}

// stop ends the process as Ctrl-C does, or hard where that takes too long.
func (d *dev) stop() {
	_ = d.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-d.ended:
	case <-time.After(30 * time.Second):
		d.kill()
	}
}

// kill ends the process at once, as a crash does, and waits until it is gone.
func (d *dev) kill() {
	_ = d.cmd.Process.Kill()
	<-d.ended
}

// environment is a small one, so that nothing of the machine's changes an outcome.
func environment(more ...string) []string {
	env := []string{"LANG=C.UTF-8"}
	for _, name := range []string{"PATH", "HOME", "TMPDIR", "DOCKER_HOST", "GOPATH", "GOCACHE", "GOMODCACHE", "GOPROXY", "GOFLAGS"} {
		if value, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+value)
		}
	}
	return append(env, more...)
}

// run runs specql to its end and gives its exit status and what it wrote.
func run(t *testing.T, dir string, env []string, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, specql(t), args...)
	cmd.Dir, cmd.Env = dir, environment(env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if _, ok := errors.AsType[*exec.ExitError](err); !ok {
		require.NoError(t, err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// lockedBuffer takes what a process writes while a test reads it.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write implements io.Writer.
func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

// String gives what was written so far.
func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// lines are the lines of a text.
func lines(text string) func(func(string) bool) { return strings.SplitSeq(text, "\n") }

func absolute(t *testing.T, path ...string) string {
	t.Helper()
	abs, err := filepath.Abs(filepath.Join(path...))
	require.NoError(t, err)
	return abs
}

func read(t *testing.T, path ...string) string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(path...))
	require.NoError(t, err)
	return string(raw)
}

// listening runs a program that prints `listening URL` once it does, until the end of the test.
func listening(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	log := &lockedBuffer{}
	cmd.Stderr = log
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	url := make(chan string, 1)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		r := bufio.NewReader(stdout)
		line, _ := r.ReadString('\n')
		url <- strings.TrimPrefix(strings.TrimSpace(line), "listening ")
		_, _ = io.Copy(io.Discard, r)
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			_ = cmd.Process.Kill()
			<-ended
		}
	})
	u := <-url
	require.True(t, strings.HasPrefix(u, "http://"), "%s: %q\n%s", name, u, log)
	return u
}
