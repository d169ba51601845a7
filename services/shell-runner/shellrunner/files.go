package shellrunner

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
)

// pipes are the three of a command, both ends.
type pipes struct {
	stdinR, stdinW, stdoutR, stdoutW, stderrR, stderrW *os.File
}

func openPipes() (*pipes, error) {
	p := &pipes{}
	for _, ends := range [][2]**os.File{{&p.stdinR, &p.stdinW}, {&p.stdoutR, &p.stdoutW}, {&p.stderrR, &p.stderrW}} {
		r, w, err := os.Pipe()
		if err != nil {
			p.closeChild()
			p.closeOwn()
			return nil, err
		}
		*ends[0], *ends[1] = r, w
	}
	return p, nil
}

func (p *pipes) closeChild() { closeAll(p.stdinR, p.stdoutW, p.stderrW) }

func (p *pipes) closeOwn() { closeAll(p.stdinW, p.stdoutR, p.stderrR) }

func closeAll(files ...*os.File) {
	for _, f := range files {
		_ = f.Close() // nothing was written through it here; nil is only an error
	}
}

// removeAll removes a directory that a job may have made hard to remove.
func removeAll(path string) error {
	err := os.RemoveAll(path)
	if err == nil || !errors.Is(err, fs.ErrPermission) {
		return err
	}
	_ = filepath.WalkDir(path, func(name string, d fs.DirEntry, _ error) error {
		if d != nil && d.IsDir() {
			_ = os.Chmod(name, 0o700) //nolint:gosec // a directory needs x
		}
		return nil
	})
	return os.RemoveAll(path)
}

func cpus() int { return runtime.NumCPU() }
