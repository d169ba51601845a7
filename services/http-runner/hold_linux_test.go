package main

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/specql/mesh/pkg/runner"
)

// heldIn names the folder in which the process, once it is held, tries what it must not.
const heldIn = "HTTP_RUNNER_HELD_IN"

func TestMain(m *testing.M) {
	if dir := os.Getenv(heldIn); dir != "" {
		os.Exit(tryHeld(dir)) //nolint:forbidigo // a process of its own
	}
	os.Exit(m.Run()) //nolint:forbidigo // as the testing package asks
}

// tryHeld gives the number of what went wrong, 0 for nothing.
func tryHeld(dir string) int {
	for _, f := range hold() {
		if !f.Available {
			_, _ = fmt.Fprintln(os.Stderr, f.Name, f.Detail)
			return 2
		}
	}
	done := make(chan int)
	go func() { // on another thread than the one that was held first
		status := 0
		if _, err := os.ReadFile(filepath.Join(dir, "there")); err != nil {
			status |= 4
		}
		if os.WriteFile(filepath.Join(dir, "new"), nil, 0o600) == nil || os.Remove(filepath.Join(dir, "there")) == nil {
			status |= 8
		}
		if exec.Command("/bin/true").Run() == nil { //nolint:noctx // it must not start
			status |= 16
		}
		if dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0); err != nil || dumpable != 0 {
			status |= 32
		}
		done <- status
	}()
	return <-done
}

func TestHeld(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "there"), []byte("x"), 0o600))
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.CommandContext(t.Context(), self)
	cmd.Env = append(os.Environ(), heldIn+"="+dir)
	out, err := cmd.CombinedOutput()
	require.NotEqual(t, 2, cmd.ProcessState.ExitCode(), "this kernel has no Landlock, which the test needs: %s", out)
	require.NoError(t, err, "%s: 4 cannot read, 8 writes, 16 executes, 32 can be dumped", out)
	require.NoFileExists(t, filepath.Join(dir, "new"))
	require.FileExists(t, filepath.Join(dir, "there"))
}

func TestRequireIsolation(t *testing.T) {
	t.Parallel()
	lacks := runner.Feature{Name: "read_only_files", Detail: "the kernel has no Landlock"}
	for flag, says := range map[string]string{"address_check": "", "all": "lacks read_only_files (the kernel has no Landlock)", "read_only_files": "lacks", "x": "is not known"} {
		fs := pflag.NewFlagSet("", pflag.ContinueOnError)
		flags(fs)
		require.NoError(t, fs.Parse([]string{"--require-isolation", flag}))
		_, err := build(t.Context(), &runner.Env{Logger: slog.New(slog.DiscardHandler), Flags: fs}, lacks)
		if says == "" {
			require.NoError(t, err)
			continue
		}
		require.ErrorContains(t, err, says)
	}
}
