//go:build !linux

package postgres

import "syscall"

// boundSilence is Linux's alone: elsewhere the bound on every statement has to do.
func boundSilence(string, string, syscall.RawConn) error { return nil }
