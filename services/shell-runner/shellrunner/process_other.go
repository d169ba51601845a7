//go:build !linux

package shellrunner

import (
	"errors"
	"os"

	"github.com/specql/mesh/services/shell-runner/internal/sandbox"
)

// errPlatform says that commands cannot be held here. Nothing runs unheld.
var errPlatform = errors.New("shell jobs run on Linux alone; use the docker execution type on this machine")

type holder struct{}

func newHolder(*Runner, Options) (*holder, error) { return &holder{}, nil }

func (*holder) close() {}

func (*holder) features() []sandbox.Feature { return nil }

func (*holder) networkMissing() (alone, loopback error) { return errPlatform, errPlatform }

func (*holder) contained() bool { return false }

func (*holder) holdsFiles() bool { return false }

func (*holder) holdsSockets() bool { return false }

type process struct {
	pid       int
	contained bool
	exited    chan struct{}
	gone      chan struct{}
	notes     []string
}

func (*attempt) start(*launch) (*process, error) { return nil, errPlatform }

func (*process) wait() *sandbox.State { return nil }

func (*process) tempUsed() (int64, bool) { return 0, false }

func (*attempt) kill() error { return errPlatform }

func pipe(bool, bool) (r, w *os.File, err error) { return os.Pipe() }

type room struct{ name string }

func (*attempt) release() {}

func (*Runner) reapOrphans() ([]int, int) { return nil, 0 }

func ticks() uint64 { return 0 }

func hideMemory() error { return nil }

func adoptOrphans() error { return nil }
