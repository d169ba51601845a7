package storetest

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// crashVariable tells the test's own program that it is the one to be killed, and where the
// database is.
const crashVariable = "SPECQL_STORETEST_CRASH"

// Crashing reports whether this is the process that is to be killed: it has to make no database.
func Crashing() bool { return os.Getenv(crashVariable) != "" }

// RunCrash kills a process in the middle of commits, several times on one database, and sees
// that all that was acknowledged is there. The caller is a test that does nothing else: it
// runs again, alone, as the process that is killed. open opens the database at a place, which
// is the same in both processes.
func RunCrash(t *testing.T, place string, open func(t *testing.T, place string) store.Store) {
	if at := os.Getenv(crashVariable); at != "" {
		writeUntilKilled(t, open(t, at))
		return
	}
	acknowledged := map[string]int64{}
	for round := range 4 {
		for id, sequence := range killMidway(t, place, 200+100*round) {
			acknowledged[id] = max(acknowledged[id], sequence)
		}
		st := open(t, place)
		for id, sequence := range acknowledged {
			h, err := st.History(t.Context(), id)
			require.NoError(t, err, "an acknowledged run is lost")
			require.GreaterOrEqual(t, h.Run.Sequence, sequence, "an acknowledged record is lost")
			// Records hold one job each: all or nothing of each is there.
			require.Len(t, h.Jobs, int(h.Run.Sequence))
		}
		require.NoError(t, st.Close())
	}
	require.Greater(t, len(acknowledged), 4)
}

// killMidway starts the process, reads n acknowledgements, kills it, and returns the highest
// sequence acknowledged of each run.
func killMidway(t *testing.T, place string, n int) map[string]int64 {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.CommandContext(ctx, self, "-test.run=^"+t.Name()+"$", "-test.count=1") //nolint:gosec // the test's own program
	cmd.Env = append(os.Environ(), crashVariable+"="+place)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	acknowledged := map[string]int64{}
	lines := bufio.NewScanner(out)
	read := 0
	for lines.Scan() {
		if note(acknowledged, lines.Text()) {
			if read++; read == n {
				require.NoError(t, cmd.Process.Kill())
				break
			}
		}
	}
	// What it wrote before it died counts too.
	rest, err := io.ReadAll(out)
	require.NoError(t, err)
	for line := range strings.Lines(string(rest)) {
		if text, whole := strings.CutSuffix(line, "\n"); whole {
			note(acknowledged, text)
		}
	}
	require.Error(t, cmd.Wait(), "it was killed")
	require.GreaterOrEqual(t, read, n, "the process ended by itself")
	return acknowledged
}

// note reads an acknowledgement.
func note(acknowledged map[string]int64, line string) bool {
	var id string
	var sequence int64
	if n, err := fmt.Sscanf(line, "acknowledged %s %d", &id, &sequence); n != 2 || err != nil {
		return false
	}
	acknowledged[id] = max(acknowledged[id], sequence)
	return true
}

// writeUntilKilled appends records of several runs at once and says which are durable.
func writeUntilKilled(t *testing.T, st store.Store) {
	j := store.NewJournal(st, store.JournalOptions{})
	parallel(t.Context(), t, 8, func(ctx context.Context, _ int) error {
		for {
			run := newRun()
			r := create(run)
			r.NewJobs = []*store.Job{newJob(run)}
			for n := int64(1); n <= 20; n++ {
				if err := j.Append(ctx, r); err != nil {
					return err
				}
				if _, err := fmt.Fprintf(os.Stdout, "acknowledged %s %d\n", run.ID, n); err != nil {
					return err
				}
				r = &store.Record{RunID: run.ID, Epoch: 1, Sequence: n + 1, NewJobs: []*store.Job{newJob(run)}}
			}
		}
	})
}
