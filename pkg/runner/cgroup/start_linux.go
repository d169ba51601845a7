package cgroup

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// Start starts a command inside the group, which holds it from its first instruction on.
//
// The caller's goroutine must be locked to its thread ([runtime.LockOSThread]), and that
// thread must not be the process's first. v1 has no way to make a process in another group,
// but a thread may join alone, and what it makes inherits its groups; so on v1 the thread
// joins, starts the command and leaves again. If leaving fails, the command is killed and the
// thread must not be unlocked.
func (g *Group) Start(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	if g.m.mode == V2 {
		f, err := os.Open(g.dirs[0].path)
		if err != nil {
			return fmt.Errorf("open control group: %w", err)
		}
		defer func() { _ = f.Close() }()
		cmd.SysProcAttr.UseCgroupFD = true
		cmd.SysProcAttr.CgroupFD = int(f.Fd())
		return cmd.Start()
	}
	tid := unix.Gettid()
	if tid == os.Getpid() {
		return errors.New("control group: Start must not be called on the process's first thread")
	}
	if g.lims.Processes > 0 {
		// The thread itself counts while it is in.
		if err := g.set("pids", "pids.max", strconv.FormatInt(g.lims.Processes+1, 10)); err != nil {
			return fmt.Errorf("limit processes: %w", err)
		}
	}
	home, err := g.homes()
	if err != nil {
		return err
	}
	here := make([]string, len(g.dirs))
	for i, d := range g.dirs {
		here[i] = d.path
	}
	if err := moveThread(tid, here); err != nil {
		return errors.Join(err, moveThread(tid, home))
	}
	startErr := cmd.Start()
	err = moveThread(tid, home)
	if g.lims.Processes > 0 {
		err = errors.Join(err, g.set("pids", "pids.max", strconv.FormatInt(g.lims.Processes, 10)))
	}
	if startErr != nil {
		return errors.Join(startErr, err)
	}
	if err != nil {
		return errors.Join(err, cmd.Process.Kill(), cmd.Wait())
	}
	return nil
}

// Joins opens the files through which a single thread joins the group by writing 0 to each. A
// thread of another user can do that, too, in whatever name spaces it is: the kernel asks who
// opened them. Close them. On v2, where no thread moves alone, there are none; use AddPID.
func (g *Group) Joins() ([]*os.File, error) {
	if g.m.mode == V2 {
		return nil, nil
	}
	files := make([]*os.File, 0, len(g.dirs))
	for _, d := range g.dirs {
		f, err := os.OpenFile(filepath.Join(d.path, "tasks"), os.O_WRONLY, 0)
		if err != nil {
			for _, f := range files {
				_ = f.Close() // nothing was written
			}
			return nil, fmt.Errorf("open control group: %w", err)
		}
		files = append(files, f)
	}
	return files, nil
}

// homes are the process's own groups now; a service manager may have moved it since it began.
func (g *Group) homes() ([]string, error) {
	own, err := g.m.ownGroups()
	if err != nil {
		return nil, fmt.Errorf("find the runner's own control group: %w", err)
	}
	home := make([]string, len(g.m.used))
	for i, h := range g.m.used {
		home[i] = h.below(own[h.controllers[0]])
	}
	return home, nil
}

func moveThread(tid int, groups []string) error {
	for _, path := range groups {
		if err := write(filepath.Join(path, "tasks"), strconv.Itoa(tid)); err != nil {
			return fmt.Errorf("move thread to control group: %w", err)
		}
	}
	return nil
}
