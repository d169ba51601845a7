//go:build !linux

package shellrunner

import (
	"errors"
	"os"

	"github.com/specql/mesh/pkg/runner/cgroup"
)

// errPlatform says that commands cannot be held here. Nothing runs unheld.
var errPlatform = errors.New("shell jobs run on Linux alone; use the docker execution type on this machine")

type launch struct {
	command               *command
	env                   []string
	dir                   string
	stdin, stdout, stderr *os.File
	limits                Limits
	group                 *cgroup.Group
	network               network
}

type process struct {
	pid    int
	exited chan struct{}
}

func (*launch) start() (*process, error) { return nil, errPlatform }

func (*process) wait() *os.ProcessState { return nil }

func (*attempt) kill() error { return errPlatform }

func (*Runner) reapOrphans() ([]int, int) { return nil, 0 }

func processStart(int) uint64 { return 0 }

func networkNamespaces() (alone, loopback error) { return errPlatform, errPlatform }

func hideMemory() error { return nil }

func adoptOrphans() error { return nil }

func keepDescriptors() error { return nil }
