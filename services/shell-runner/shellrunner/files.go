package shellrunner

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
)

// atOnce is how much a pipe takes before anybody reads, whatever its user has open besides.
const atOnce = 4 << 10

// pipes are the three of a command, both ends.
type pipes struct {
	// stdinW is nil where the whole input is in the pipe already.
	stdinR, stdinW, stdoutR, stdoutW, stderrR, stderrW *os.File
}

// openPipes makes them, with the input in the first where it is small.
func openPipes(input []byte) (*pipes, error) {
	p := &pipes{}
	small := len(input) <= atOnce
	for _, ends := range []struct {
		r, w         **os.File
		pollR, pollW bool
	}{{&p.stdinR, &p.stdinW, false, !small}, {&p.stdoutR, &p.stdoutW, true, false}, {&p.stderrR, &p.stderrW, true, false}} {
		r, w, err := pipe(ends.pollR, ends.pollW)
		if err != nil {
			p.closeChild()
			p.closeOwn()
			return nil, err
		}
		*ends.r, *ends.w = r, w
	}
	if small {
		_, err := p.stdinW.Write(input)
		if err = errors.Join(err, p.stdinW.Close()); err != nil {
			p.closeChild()
			p.closeOwn()
			return nil, err
		}
		p.stdinW = nil
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
