//go:build linux

package sandbox

import "os"

// launcherName is what a launcher is called in place of this program's name.
const launcherName = "specql-sandbox"

// The launchers' second argument.
const (
	// modeSpaces is the first process of a job's name spaces.
	modeSpaces = "spaces"
	// modeStage starts a launcher with name spaces and stays until it has ended.
	modeStage = "stage"
	// modeBare becomes the job.
	modeBare = "bare"
	// modeHold only keeps its user name space until it is opened.
	modeHold = "hold"
)

// The launchers' third argument.
const (
	// kindDescriptors gets what is to be mounted as descriptors, kindPaths as paths of the machine.
	kindDescriptors = "descriptors"
	kindPaths       = "paths"
	// kindNetwork and kindHost are of a stage: whether the launcher has a network of its own.
	kindNetwork = "network"
	kindHost    = "host"
	// filteredSuffix is behind a kind where system calls are to be filtered.
	filteredSuffix = "-filtered"
)

// launcherSocket is the launcher's descriptor of the socket to its runner.
const launcherSocket = 3

func init() {
	if len(os.Args) == 3 && os.Args[0] == launcherName {
		os.Exit(launcherMain(os.Args[1], os.Args[2]))
	}
}
