package shellrunner

import (
	"os"
	"path/filepath"
	"strconv"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner/cgroup"
	"github.com/specql/mesh/services/shell-runner/internal/sandbox"
)

// room is the control group of one job. That of a contained job is made with its launcher, ahead
// of the job, and none is used twice.
type room struct {
	r     *Runner
	group *cgroup.Group
	name  string
	// joins are the files through which a thread joins, where there are any.
	joins []*os.File
}

// Joins implements [sandbox.Room].
func (g *room) Joins() []*os.File { return g.joins }

// Close implements [sandbox.Room].
func (g *room) Close() {
	closeAll(g.joins...)
	if err := g.group.Remove(); err != nil {
		g.r.log.Error("a job's control group remains", "error", err)
	}
}

// newRoom makes a control group that has the limits of the job before: they are likely to be those
// of the next.
func (r *Runner) newRoom() (*room, error) {
	var limits cgroup.Limits
	if last := r.lastLimits.Load(); last != nil {
		limits = *last
	}
	name := "job-" + strconv.FormatInt(r.groupsMade.Add(1), 10) + "-" + filepath.Base(r.temp)[len(tempPrefix):]
	group, err := cgroup.New(groupParent, name, limits)
	if err != nil {
		return nil, err
	}
	g := &room{r: r, group: group, name: name}
	if g.joins, err = group.Joins(); err != nil {
		g.Close()
		return nil, err
	}
	return g, nil
}

// roomAhead is newRoom for launchers.
func (r *Runner) roomAhead() (sandbox.Room, error) { return r.newRoom() }

// enter makes a room the job's.
func (a *attempt) enter(g *room) error {
	limits := a.policy.Limits
	wanted := cgroup.Limits{CPUCores: limits.CPUCores, MemoryMB: limits.MemoryMB, Processes: limits.Processes}
	if a.r.box.contained() && a.r.groups == cgroup.V1 {
		wanted.Processes++ // the thread of the launcher that starts the command
	}
	a.r.lastLimits.Store(&wanted)
	a.room, a.group, a.source = g, g.group, "cgroup"
	if err := g.group.SetLimits(wanted); err != nil {
		return fault.Wrap(err, fault.Internal, "the job's limits cannot be set: %v", err)
	}
	return nil
}

// release takes away what held the job, all of whose processes are gone. What the kernel needs
// some time for once they are is waited for behind the answer.
func (a *attempt) release() {
	r, room := a.r, a.room
	if a.process == nil || !a.process.contained {
		if room != nil {
			room.Close()
		}
		return
	}
	r.background(func() {
		<-a.process.gone
		if room == nil {
			return
		}
		if err := room.group.Kill(); err != nil { // there is nothing: the kernel has ended the name space
			r.log.Error("processes of a job remain", "error", err)
		}
		room.Close()
	})
}
