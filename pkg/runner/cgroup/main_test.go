package cgroup

import (
	"os"
	"runtime"
	"testing"

	"go.uber.org/goleak"
)

// The first thread is kept for the main goroutine: Start must not be called on it.
func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		_ = Release("test")
		os.Exit(code)
	}))
}
