package main

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/specql/mesh/pkg/runner"
)

// hold leaves no core dump, in which the runner's secrets would be, before the first call. What
// the system refuses is said.
func hold() []runner.Feature {
	core := runner.Feature{Name: "no_core_dump", Available: true}
	if err := noCoreDump(); err != nil {
		core.Available, core.Detail = false, err.Error()
	}
	return []runner.Feature{core}
}

func noCoreDump() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("RLIMIT_CORE: %w", err)
	}
	// Other processes of its user do not get to see its memory and its environment either.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("PR_SET_DUMPABLE: %w", err)
	}
	return nil
}
