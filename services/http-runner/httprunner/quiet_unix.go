//go:build unix

package httprunner

import (
	"errors"
	"syscall"
)

// quiet says whether a connection that nobody reads is open and has nothing to say. It takes what it finds.
func quiet(raw syscall.RawConn) (is bool) {
	err := raw.Read(func(fd uintptr) bool {
		var one [1]byte
		_, err := syscall.Read(int(fd), one[:]) //nolint:gosec // a file descriptor
		is = errors.Is(err, syscall.EAGAIN)
		return true
	})
	return err == nil && is
}
