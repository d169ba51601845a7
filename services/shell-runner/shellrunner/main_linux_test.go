package shellrunner

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"github.com/specql/mesh/pkg/runner"
)

// crashVariable makes the test program a runner that is to be killed in the middle of a job.
const crashVariable = "SHELLRUNNER_TEST_CRASH_DIR"

// snoopVariable makes the test program a runner whose job looks for its secrets.
const snoopVariable = "SHELLRUNNER_TEST_SNOOP_DIR"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == attackArgument {
		attack(os.Args[2:])
	}
	if len(os.Args) > 1 && os.Args[1] == victimArgument {
		victim()
	}
	if dir := os.Getenv(crashVariable); dir != "" {
		crashingRunner(dir)
	}
	if dir := os.Getenv(snoopVariable); dir != "" {
		snoopingRunner(dir)
	}
	goleak.VerifyTestMain(m)
}

// crashingRunner runs a job that writes the number of a daemon into the directory's fifo.
func crashingRunner(dir string) {
	r, err := New(Options{TempDir: dir, Logger: slog.New(slog.NewTextHandler(os.Stderr, nil))})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	policy, err := json.Marshal(Policy{AllowedCommands: tools})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	_, err = r.Execute(context.Background(), &runner.Job{
		ID:        "crash",
		Service:   runner.Service{Config: fmt.Appendf(nil, `{"working_directory":%q}`, dir), Policy: policy},
		Operation: runner.Operation{Config: fmt.Appendf(nil, `{"command":["/bin/sh","-c",%q]}`, daemonize(filepath.Join(dir, "fifo"))+"; exec sleep 1000")},
	}, discard{})
	fmt.Fprintln(os.Stderr, "the job ended", err)
	os.Exit(1)
}

// daemonize is a shell line that leaves a process in a session of its own, with no parent left,
// and tells its number through a fifo.
func daemonize(fifo string) string {
	return `setsid sh -c 'setsid sh -c "echo \$\$ >` + fifo + `; exec sleep 1000" & exit 0'`
}
