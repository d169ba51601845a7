package main

import (
	"fmt"

	"github.com/landlock-lsm/go-landlock/landlock"
	llsys "github.com/landlock-lsm/go-landlock/landlock/syscall"

	"github.com/specql/mesh/pkg/runner"
)

// hold narrows what this process may do, before the first call: it writes no file, executes
// nothing, and leaves no core dump, in which its secrets would be. What the kernel lacks is said.
func hold() []runner.Feature {
	files := runner.Feature{Name: "read_only_files", Available: true}
	if err := readOnlyFiles(); err != nil {
		files.Available, files.Detail = false, err.Error()
	}
	return []runner.Feature{runner.HideProcess(), files}
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
