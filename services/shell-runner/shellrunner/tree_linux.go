package shellrunner

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/specql/mesh/pkg/runner/cgroup"
)

// killTimeout is how long killed processes may take to be gone.
const killTimeout = 10 * time.Second

// maxUnsureScans is how often to look again for a process that is between two programs.
const maxUnsureScans = 5

// kill ends everything that the job started and returns when it is gone.
func (a *attempt) kill() error {
	if a.process.contained {
		return a.killContained()
	}
	if a.group == nil {
		if err := a.killMembers(); err != nil {
			return err
		}
	} else if err := a.group.Kill(); err != nil {
		return err
	}
	// The command itself may have left its group. Its number is taken until wait.
	_ = syscall.Kill(a.process.pid, syscall.SIGKILL)
	select {
	case <-a.process.exited:
	case <-time.After(killTimeout):
		return fmt.Errorf("process %d outlives SIGKILL by %s", a.process.pid, killTimeout)
	}
	return a.killOrphans()
}

// killContained ends a job that is over only when no process of its name space is left but its
// launcher.
func (a *attempt) killContained() error {
	a.process.Kill()
	select {
	case <-a.process.exited:
	case <-time.After(killTimeout):
		return fmt.Errorf("launcher %d outlives SIGKILL by %s", a.process.pid, killTimeout)
	}
	return nil
}

// killOrphans ends what left the job by all means that there are: its control group, its
// session and its environment. With its parents killed, it is a child of this process.
func (a *attempt) killOrphans() error {
	deadline := time.Now().Add(killTimeout)
	ended := map[int]bool{}
	for pause := 100 * time.Microsecond; ; pause = min(2*pause, 20*time.Millisecond) {
		var left []int
		alive, reaped := a.r.reapOrphans()
		for _, pid := range alive {
			member, escaped := a.left(pid)
			if !member {
				continue
			}
			left = append(left, pid)
			ended[pid] = ended[pid] || escaped
			_ = syscall.Kill(pid, syscall.SIGKILL) // gone already is as good
		}
		if len(left) == 0 && reaped == 0 { // the children of those reaped are orphans only now
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v outlive SIGKILL by %s", left, killTimeout)
		}
		<-time.After(pause)
	}
	maps.DeleteFunc(ended, func(_ int, escaped bool) bool { return !escaped })
	if len(ended) > 0 {
		a.sink.Log("runner", fmt.Sprintf("%d of the job's processes had left its control group and were ended; what they used is not measured", len(ended)))
		a.r.log.Warn("a job's processes left its control group", "job", a.job.ID, "processes", len(ended))
	}
	return nil
}

// left tells whether an orphan is what is left of this job, and whether it had escaped from its
// control group.
func (a *attempt) left(pid int) (left, escaped bool) {
	if a.group != nil {
		groups, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cgroup"))
		if err != nil {
			return false, false // gone
		}
		own := "/" + groupParent + "-" + cgroup.Instance() + "/"
		if bytes.Contains(groups, []byte(own+a.room.name)) {
			return true, false // killed, and about to end
		}
		escaped := !bytes.Contains(groups, []byte(own)) // else it is another job's
		return escaped, escaped
	}
	if a.job.ID != "" {
		if mine, _ := carries(pid, []byte("SPECQL_JOB_ID="+a.job.ID)); mine {
			return true, false
		}
	}
	// It has cleared its environment. Of the jobs that it can be of, the last to end takes it.
	p, err := readProcess(pid)
	return err == nil && !a.r.othersBefore(a, p.start), false
}

// othersBefore tells whether another job was running at a time.
func (r *Runner) othersBefore(a *attempt, start uint64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for other := range r.live {
		if other != a && other.processStart <= start {
			return true
		}
	}
	return false
}

// reapOrphans takes the status of ended processes that were handed to this process, and gives
// those of jobs that are alive.
func (r *Runner) reapOrphans() (alive []int, reaped int) {
	r.reaping.Lock() // so that no number is another process's by the time it is used
	defer r.reaping.Unlock()
	session, err := unix.Getsid(0)
	if err != nil {
		return nil, 0
	}
	for _, pid := range r.adopted() {
		ofJob := ofJob(pid, session)
		if !ofJob && !r.reap {
			continue // the program's own, and its status is awaited elsewhere
		}
		switch got, err := syscall.Wait4(pid, nil, syscall.WNOHANG, nil); {
		case err != nil: // another runner of this program took it
		case got == pid:
			reaped++
		case ofJob:
			alive = append(alive, pid)
		}
	}
	return alive, reaped
}

// adopted are the children of this process that no job's thread started. Orphans are handed to
// the first thread, and a command is started on a thread of its own.
func (r *Runner) adopted() []int {
	self := strconv.Itoa(os.Getpid())
	data, err := os.ReadFile(filepath.Join("/proc/self/task", self, "children"))
	var pids []int
	if err == nil {
		for f := range strings.FieldsSeq(string(data)) {
			if pid, err := strconv.Atoi(f); err == nil && !r.own(pid) {
				pids = append(pids, pid)
			}
		}
		return pids
	}
	for pid, p := range processes() { // a kernel without that file
		if p.parent == os.Getpid() && !r.own(pid) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// ofJob tells a job's process by what it cannot get rid of: no_new_privs, and that it is not in
// this process's session.
func ofJob(pid, session int) bool {
	if sid, err := unix.Getsid(pid); err != nil || sid == session {
		return false
	}
	status, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	return err == nil && bytes.Contains(status, []byte("\nNoNewPrivs:\t1\n"))
}

// killMembers ends the processes of a job without a control group.
func (a *attempt) killMembers() error {
	deadline := time.Now().Add(killTimeout)
	unsureScans := 0
	for pause := time.Millisecond; ; pause = min(2*pause, 20*time.Millisecond) {
		members, unsure := a.members()
		if len(members) == 0 {
			if unsureScans++; !unsure || unsureScans > maxUnsureScans {
				return nil
			}
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v outlive SIGKILL by %s", members, killTimeout)
		}
		for _, pid := range members {
			_ = syscall.Kill(pid, syscall.SIGKILL) // gone already is as good
		}
		<-time.After(pause)
	}
}

// members are the living processes of a job without a control group: those of its session, the
// children of any member, and those that carry the job's id in their environment, which finds a
// daemon that left the session and whose parents are gone. One that has also cleared its
// environment is left to killOrphans. unsure tells of a process
// without an environment, which may be a member that executes another program just now.
func (a *attempt) members() (living []int, unsure bool) {
	all := processes()
	marker := []byte("SPECQL_JOB_ID=" + a.job.ID)
	in := map[int]bool{a.process.pid: true}
	for grown := true; grown; {
		grown = false
		for pid, p := range all {
			if in[pid] || pid == os.Getpid() {
				continue
			}
			member := p.session == a.process.pid || in[p.parent]
			if !member && a.job.ID != "" && p.state != 'Z' && p.start >= all[a.process.pid].start {
				var empty bool
				member, empty = carries(pid, marker)
				unsure = unsure || empty
			}
			if member {
				in[pid], grown = true, true
			}
		}
	}
	for pid := range in {
		if p, ok := all[pid]; ok && p.state != 'Z' && p.state != 'X' {
			living = append(living, pid)
		}
	}
	return living, unsure
}

func carries(pid int, marker []byte) (carries, empty bool) {
	environ, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "environ"))
	if err != nil {
		return false, false // gone, or another user's
	}
	for v := range bytes.SplitSeq(environ, []byte{0}) {
		if bytes.Equal(v, marker) {
			return true, false
		}
	}
	return false, len(environ) == 0
}

type processInfo struct {
	state           byte
	parent, session int
	start           uint64 // in the kernel's ticks
}

func processes() map[int]processInfo {
	names, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	all := make(map[int]processInfo, len(names))
	for _, n := range names {
		pid, err := strconv.Atoi(n.Name())
		if err != nil {
			continue
		}
		if p, err := readProcess(pid); err == nil { // else it has just ended
			all[pid] = p
		}
	}
	return all
}

func readProcess(pid int) (processInfo, error) {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return processInfo{}, err
	}
	p, ok := parseProcess(data)
	if !ok {
		return processInfo{}, fmt.Errorf("/proc/%d/stat has an unknown form", pid)
	}
	return p, nil
}

// parseProcess reads pid (name) state ppid pgrp session …; the name may hold anything.
func parseProcess(data []byte) (processInfo, bool) {
	f := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(f) < 20 || len(f[0]) != 1 || f[0][0] < 'A' || f[0][0] > 'z' {
		return processInfo{}, false
	}
	p := processInfo{state: f[0][0]}
	var errs [3]error
	p.parent, errs[0] = strconv.Atoi(f[1])
	p.session, errs[1] = strconv.Atoi(f[3])
	p.start, errs[2] = strconv.ParseUint(f[19], 10, 64)
	return p, errors.Join(errs[:]...) == nil
}

// ownThreads counts the threads of this user, which a limit on processes by user includes.
func ownThreads() int {
	total := 0
	for pid := range processes() {
		dir := filepath.Join("/proc", strconv.Itoa(pid))
		info, err := os.Stat(dir)
		if err != nil {
			continue
		}
		if st, ok := info.Sys().(*syscall.Stat_t); !ok || int(st.Uid) != os.Getuid() {
			continue
		}
		if tasks, err := os.ReadDir(filepath.Join(dir, "task")); err == nil {
			total += len(tasks)
		}
	}
	return total
}
