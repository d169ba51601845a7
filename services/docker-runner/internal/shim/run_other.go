//go:build !linux

package shim

import (
	"fmt"
	"io"
)

// Main says that containers of Kubernetes are Linux's.
func Main(_ []string, _, stderr io.Writer) int {
	_, _ = fmt.Fprintln(stderr, "shim: it runs in containers of Linux alone")
	return 2
}
