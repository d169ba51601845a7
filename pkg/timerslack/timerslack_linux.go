package timerslack

import (
	"os"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func allow(d time.Duration) {
	if _, set := os.LookupEnv(Variable); set {
		return
	}
	runtime.LockOSThread() // the slack is a thread's
	defer runtime.UnlockOSThread()
	before, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
	if err != nil || before >= int(d) {
		return
	}
	program, err := os.Executable()
	if err != nil || !set(int(d)) {
		return
	}
	_ = syscall.Exec(program, os.Args, append(os.Environ(), Variable+"="+d.String())) //nolint:gosec // this very program
	set(before)
}

// set sets the slack of this thread; false where there is none, as for one with a real-time policy.
func set(ns int) bool {
	if _, err := unix.PrctlRetInt(unix.PR_SET_TIMERSLACK, uintptr(ns), 0, 0, 0); err != nil {
		return false
	}
	now, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
	return err == nil && now == ns
}
