// Package memory sets how the collector of a service works.
package memory

import (
	"math"
	"os"
	"runtime/debug"
)

// ballast is never touched, so that it takes no memory of the machine.
var ballast []byte

// AllowGarbage lets about n bytes of garbage gather before the collector begins, beside what it would let gather
// anyway: as much as is in use. A service that holds little and allocates much would else collect hundreds of
// times a second. The resident memory grows by n at most. Where GOGC or GOMEMLIMIT say how to
// collect, nothing is done. Call it once, from main.
func AllowGarbage(n int) {
	if os.Getenv("GOGC") != "" || debug.SetMemoryLimit(-1) != math.MaxInt64 {
		return
	}
	ballast = make([]byte, n)
}
