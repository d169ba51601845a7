package main

import (
	"fmt"

	"github.com/landlock-lsm/go-landlock/landlock"
	llsys "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"

	"github.com/specql/mesh/pkg/runner"
)

// hold narrows what this process may do, before the first call: it writes no file, executes
// nothing, and leaves no core dump, in which its secrets would be. What the kernel lacks is said.
func hold() []runner.Feature {
	core := runner.Feature{Name: "no_core_dump", Available: true}
	if err := noCoreDump(); err != nil {
		core.Available, core.Detail = false, err.Error()
	}
	files := runner.Feature{Name: "read_only_files", Available: true}
	if err := readOnlyFiles(); err != nil {
		files.Available, files.Detail = false, err.Error()
	}
	return []runner.Feature{core, files}
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

// readOnlyFiles lets the process, on all its threads, read files and folders and nothing else.
func readOnlyFiles() error {
	if _, err := llsys.LandlockGetABIVersion(); err != nil {
		return fmt.Errorf("the kernel has no Landlock: %w", err)
	}
	const read = landlock.AccessFSSet(llsys.AccessFSReadFile | llsys.AccessFSReadDir)
	if err := landlock.V5.BestEffort().RestrictPaths(landlock.PathAccess(read, "/")); err != nil {
		return fmt.Errorf("landlock: %w", err)
	}
	return nil
}
