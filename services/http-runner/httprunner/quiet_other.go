//go:build !unix

package httprunner

import "syscall"

// quiet cannot tell here, so that no connection is used twice.
func quiet(syscall.RawConn) bool { return false }
