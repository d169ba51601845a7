package main

import (
	"bytes"
	"io"
	"os"
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
	master, slave := openTerminal(t)
	cmd := program(t.Context(), t.TempDir(), args...)
	cmd.Env = append(append(cmd.Env, "TERM=xterm"), env...)
	cmd.Stdout, cmd.Stderr = slave, slave
	require.NoError(t, cmd.Start())
	require.NoError(t, slave.Close())
	var out bytes.Buffer
	_, _ = io.Copy(&out, master) // ends with EIO once nobody has the terminal open
	_ = cmd.Wait()
	return out.String(), cmd.ProcessState.ExitCode()
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
