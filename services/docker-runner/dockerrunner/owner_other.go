//go:build !linux

package dockerrunner

import (
	"errors"
	"os"
	"strconv"
	"syscall"
)

// hostIdentity is the same for all processes that see each other's ids.
func hostIdentity() (string, error) { return os.Hostname() }

// processStart only tells whether a process is there: elsewhere than on Linux a process id
// that was used again keeps a leftover until its job's time is over.
func processStart(pid int) (string, error) {
	p, err := os.FindProcess(pid)
	if err != nil {
		return "", os.ErrNotExist
	}
	if err := p.Signal(syscall.Signal(0)); errors.Is(err, os.ErrProcessDone) {
		return "", os.ErrNotExist
	}
	return strconv.Itoa(pid), nil
}

func mountTmpfs(string, int64) error { return errors.New("only Linux mounts in-memory directories") }

func unmount(string) error { return nil }

func openHostPath(string) (*os.File, error) { return nil, errors.New("only Linux holds volumes") }

func bind(*os.File, string, bool) error { return errors.New("only Linux holds volumes") }

func (d deniedPaths) whyMounted(string) (string, error) { return "", nil }
