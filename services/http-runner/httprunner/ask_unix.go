//go:build unix

package httprunner

import (
	"errors"
	"io"
	"os"
	"syscall"
)

// asking is what [directConn.ask] works with.
type asking struct {
	step func(fd uintptr) bool // made once
	into []byte
	n    int
	err  error
}

// errNotQuiet says that a connection that was idle is closed, or has something to say that nobody asked for.
var errNotQuiet = errors.New("the connection is used up")

// ask sends the request on a connection that is open and has nothing to say, and reads the beginning of the answer. The
// connection is waited for once, and only after the request has left: Write and Read would look for the answer at once,
// which is never there yet. On a new connection it may be: a server that has no room says so before it is asked, and what
// was there before the wait began ends none. What the connection does not take at once is left.
func (c *directConn) ask(p []byte) (int, error) {
	a := &c.asking
	a.into, a.n, a.err = p, 0, nil
	err := c.raw.Read(a.step)
	a.into = nil
	if err == nil {
		err = a.err
	}
	return a.n, err
}

// step does what can be done without waiting. Not to be done yet is to wait until something can be read.
func (c *directConn) step(fd uintptr) (done bool) {
	a := &c.asking
	fresh := c.sent > 0 || !c.reused
	for len(c.unsent) > 0 {
		if !fresh {
			if _, err := again(syscall.Read, fd, a.into[:1]); !errors.Is(err, syscall.EAGAIN) {
				a.err = errNotQuiet
				return true
			}
			fresh = true
		}
		n, err := again(syscall.Write, fd, c.unsent)
		if err != nil {
			if !errors.Is(err, syscall.EAGAIN) {
				a.err = os.NewSyscallError("write", err)
			}
			return true
		}
		c.counted.counter().sent.Add(int64(n))
		c.wrote(n)
		if len(c.unsent) == 0 && c.reused {
			return false
		}
	}
	n, err := again(syscall.Read, fd, a.into)
	switch {
	case errors.Is(err, syscall.EAGAIN):
		return false
	case err != nil:
		a.err = os.NewSyscallError("read", err)
	case n == 0:
		a.err = io.EOF
	default:
		c.counted.counter().received.Add(int64(n))
		a.n = n
	}
	return true
}

// again makes a call until no signal interrupts it.
func again(call func(int, []byte) (int, error), fd uintptr, p []byte) (int, error) {
	for {
		n, err := call(int(fd), p) //nolint:gosec // a file descriptor
		if err == nil {
			return n, nil
		}
		if !errors.Is(err, syscall.EINTR) {
			return 0, err //nolint:wrapcheck // by the caller
		}
	}
}
