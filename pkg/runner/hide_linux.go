package runner

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// HideProcess keeps what this process knows to itself: it leaves no core dump, in which its
// secrets would be, and other processes of its user do not get to see its memory and its
// environment. The feature, no_core_dump, says what the system refuses.
func HideProcess() Feature {
	f := Feature{Name: "no_core_dump", Available: true}
	if err := hideProcess(); err != nil {
		f.Available, f.Detail = false, err.Error()
	}
	return f
}

func hideProcess() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("RLIMIT_CORE: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("PR_SET_DUMPABLE: %w", err)
	}
	return nil
}
