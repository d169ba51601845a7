package memory

import (
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"testing"

	"github.com/stretchr/testify/require"
)

func goal(t *testing.T) uint64 {
	t.Helper()
	runtime.GC()
	s := []metrics.Sample{{Name: "/gc/heap/goal:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

// The collector waits for that much garbage, and a limit that the operator set is left alone.
func TestAllowGarbage(t *testing.T) {
	t.Cleanup(func() { ballast = nil })
	require.NoError(t, os.Unsetenv("GOGC"))
	before := goal(t)
	const n = 256 << 20
	debug.SetMemoryLimit(1 << 30)
	AllowGarbage(n)
	require.Less(t, goal(t), before+n/2, "GOMEMLIMIT says how to collect")
	debug.SetMemoryLimit(math.MaxInt64)
	t.Setenv("GOGC", "100")
	AllowGarbage(n)
	require.Less(t, goal(t), before+n/2, "GOGC says how to collect")
	require.NoError(t, os.Unsetenv("GOGC"))
	AllowGarbage(n)
	require.Greater(t, goal(t), before+n)
	require.Len(t, ballast, n)
}
