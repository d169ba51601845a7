package postgres

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/services/orchestrator/internal/store/storetest"
	"github.com/specql/mesh/test/pgtest"
)

// Both also say what the database's processes took of the processor, which other load on the machine hardly changes.
func BenchmarkTakes(b *testing.B) { storetest.BenchmarkTakes(b, openTest(b), databaseCPU(b)) }
func BenchmarkSteps(b *testing.B) { storetest.BenchmarkSteps(b, openTest(b), databaseCPU(b)) }

func databaseCPU(b *testing.B) func() (seconds float64) {
	b.Helper()
	server := strconv.Itoa(pgtest.Shared(b).PID())
	return func() (seconds float64) {
		processes, err := filepath.Glob("/proc/[0-9]*/stat")
		require.NoError(b, err)
		for _, path := range processes {
			text, err := os.ReadFile(path) //nolint:gosec // of /proc
			if err != nil {
				continue // it has ended
			}
			fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
			if fields[1] != server {
				continue
			}
			for _, ticks := range fields[11:13] {
				n, err := strconv.ParseFloat(ticks, 64)
				require.NoError(b, err)
				seconds += n / 100
			}
		}
		return seconds
	}
}
