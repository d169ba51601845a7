package main

import (
	"bytes"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// openTerminal makes a terminal of 90 columns and 30 lines.
func openTerminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(t, err)
	t.Cleanup(func() { _ = master.Close() })
	fd := int(master.Fd())
	require.NoError(t, unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	require.NoError(t, err)
	require.NoError(t, unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Col: 90, Row: 30}))
	slave, err = os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(t, err)
	return master, slave
}

// onTerminal runs specql on a terminal and returns all that it wrote to it.
func onTerminal(t *testing.T, env []string, args ...string) (string, int) {
	t.Helper()
	return shownBy(t, nil, env, args...)
}

// shownBy runs specql with standard error on a terminal, and standard output too if no writer is given for it.
func shownBy(t *testing.T, stdout io.Writer, env []string, args ...string) (string, int) {
	t.Helper()
	master, slave := openTerminal(t)
	cmd := program(t.Context(), t.TempDir(), args...)
	cmd.Env = append(append(cmd.Env, "TERM=xterm"), env...)
	cmd.Stdout, cmd.Stderr = slave, slave
	if stdout != nil {
		cmd.Stdout = stdout
	}
	require.NoError(t, cmd.Start())
	require.NoError(t, slave.Close())
	var out bytes.Buffer
	_, _ = io.Copy(&out, master) // ends with EIO once nobody has the terminal open
	_ = cmd.Wait()
	return out.String(), cmd.ProcessState.ExitCode()
}

// TestProgressBars: what calls again and again shows a bar on a terminal, on standard error alone, and nothing of it in a pipe.
func TestProgressBars(t *testing.T) {
	t.Parallel()
	dir, _ := busyProject(t)
	address, _ := devIn(t, dir, "--data", filepath.Join(t.TempDir(), "data"))
	for name, args := range map[string][]string{
		"web.count":   {"load-test", "--service", "web", "--operation", "count", "--duration", "700ms", "--concurrency", "2"},
		"web.flaky":   {"benchmark", "--services", "web.count", "web.flaky", "--requests", "200", "--concurrency", "2"},
		"script.echo": {"profile", "--service", "script", "--requests", "60"},
	} {
		t.Run(args[0], func(t *testing.T) {
			args = append(args, "--address", address, "-o", "json")
			var stdout bytes.Buffer
			screen, status := shownBy(t, &stdout, nil, args...)
			require.Equal(t, 0, status, screen)
			require.Regexp(t, ` \d+% [█░]{24}  `+regexp.QuoteMeta(name)+`  \d+ ended  \d+\.\d/s`, screen)
			require.Regexp(t, ` [1-9]\d?% █`, screen, "it moves on")
			require.Regexp(t, `\x1b\[2K\r[^█░]*$`, screen, "and is gone at the end")
			decode[map[string]any](t, stdout.String())

			screen, status = shownBy(t, &stdout, []string{"LANG=C"}, args...)
			require.Equal(t, 0, status, screen)
			require.Regexp(t, ` \d+% [#.]{24}  `, screen)

			r := specql(t, dir, args...)
			require.Equal(t, 0, r.status, r.err)
			decode[map[string]any](t, r.out)
			require.NotRegexp(t, `[█░\r\x1b]`, r.out+r.err)
		})
	}
}

// TestASignOfLife: a command that waits says on a terminal what for, and takes it back.
func TestASignOfLife(t *testing.T) {
	t.Parallel()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = lis.Close() })
	conns := make(chan net.Conn, 8) // a database that does not answer
	go func() {
		defer close(conns)
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			conns <- conn
		}
	}()
	master, slave := openTerminal(t)
	cmd := program(t.Context(), t.TempDir(), "validate-schema", "--database", "postgres://nobody@"+lis.Addr().String()+"/none?sslmode=disable")
	cmd.Env = append(cmd.Env, "TERM=xterm")
	cmd.Stdout, cmd.Stderr = slave, slave
	require.NoError(t, cmd.Start())
	require.NoError(t, slave.Close())
	var shown strings.Builder
	for text := make([]byte, 1024); !strings.Contains(shown.String(), "looking at the schema"); {
		n, err := master.Read(text)
		require.NoError(t, err, shown.String())
		shown.Write(text[:n])
	}
	require.NoError(t, lis.Close())
	for conn := range conns {
		require.NoError(t, conn.Close())
	}
	_, _ = io.Copy(&shown, master)
	require.Error(t, cmd.Wait())
	require.Equal(t, 1, cmd.ProcessState.ExitCode())
	require.Regexp(t, `⠋ looking at the schema +\[[1-9]s\]`, shown.String())
	require.Regexp(t, `\x1b\[2K\rspecql: `, shown.String(), "the sign is gone when the error is said")
}

// ours are the sequences that specql itself writes.
var (
	moves  = regexp.MustCompile("\x1b\\[[0-9]+A|\x1b\\[J")
	styles = regexp.MustCompile("\x1b\\[(0|1|2|31|32|33|36)m")
)

func TestLiveTree(t *testing.T) {
	address, _ := dev(t)
	out, status := onTerminal(t, nil, "execute-job", "--entity", "note", "--action", "hostile", "--address", address)
	require.Equal(t, 0, status, out)
	require.Regexp(t, moves, out)
	require.Regexp(t, styles, out)
	frames := strings.Split(out, "\x1b[J")
	last := styles.ReplaceAllString(frames[len(frames)-1], "")
	require.Regexp(t, `(?s)note\.hostile  completed  .+└─ ✓ machine\.hostile +shell +.+run \S+ completed in `, last)
	rest := styles.ReplaceAllString(moves.ReplaceAllString(out, ""), "")
	require.NotContains(t, rest, "\x1b", "nothing of what the job wrote reaches the terminal as a sequence")
	require.NotContains(t, rest, "\a")
	require.NotContains(t, rest, "\u202e")
	require.Contains(t, rest, `\x1b]0;owned\x07title`)

	out, status = onTerminal(t, []string{"NO_COLOR=1"}, "execute-job", "--entity", "note", "--action", "fail", "--address", address)
	require.Equal(t, 1, status, out)
	require.NotRegexp(t, styles, out)
	require.Contains(t, out, "✗ machine.fail")
}
