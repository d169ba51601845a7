//go:build linux

package sandbox

import "os"

// launcherName is what a launcher is called in place of this program's name.
const launcherName = "specql-sandbox"

// The launchers' second argument.
const (
	// modeSpaces is the first process of a job's name spaces.
	modeSpaces = "spaces"
	// modeBare becomes the job.
	modeBare = "bare"
	// modeHold only keeps its user name space until it is opened.
	modeHold = "hold"
)

// launcherSocket is the launcher's descriptor of the socket to its runner.
const launcherSocket = 3

func init() {
	if len(os.Args) == 3 && os.Args[0] == launcherName {
		os.Exit(launcherMain(os.Args[1], os.Args[2] == "root"))
	}
}
