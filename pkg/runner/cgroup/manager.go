package cgroup

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// manager knows the hierarchies of a machine and this process's place in them.
type manager struct {
	proc     string // the proc file system; another one in tests
	mode     Mode
	reason   string
	used     []hierarchy
	all      []hierarchy // used and those that an engine may make groups in
	instance string      // pid, its start time and its PID name space: names a process for ever

	mu        sync.Mutex
	delegated map[string]bool
	mkdir     func(path string) error // another one in tests, where no kernel fills a directory
	rmdir     func(path string) error
}

// hierarchy is one mounted tree of groups.
type hierarchy struct {
	mount       string
	root        string // the group that is mounted there
	own         string // this process's group, below mount
	base        string // where specql/ lies
	prefix      string // the base's path in the whole hierarchy
	controllers []string
	v2          bool
}

// wantedV1 are the controllers a group joins. The freezer is not needed: pids.max stops forks.
var wantedV1 = []string{"memory", "cpu", "cpuacct", "pids", "blkio"}

var wantedV2 = []string{"memory", "cpu", "pids", "io"}

func newManager(proc string) *manager {
	m := &manager{
		proc: proc, delegated: map[string]bool{},
		mkdir: func(path string) error { return os.Mkdir(path, 0o755) }, //nolint:gosec // others may read a group's figures
		rmdir: os.Remove,
	}
	if err := m.find(); err != nil {
		m.mode, m.reason = None, err.Error()
	}
	return m
}

func (m *manager) find() error {
	instance, err := m.ownInstance()
	if err != nil {
		return err
	}
	m.instance = instance
	mounts, err := m.mounts()
	if err != nil {
		return err
	}
	v1 := func(h hierarchy) bool {
		return !h.v2 && slices.ContainsFunc(h.controllers, func(c string) bool { return slices.Contains(wantedV1, c) })
	}
	m.all = mounts
	var has []string
	for _, h := range mounts {
		if v1(h) {
			m.used = append(m.used, h)
			has = append(has, h.controllers...)
		}
	}
	switch {
	case slices.Contains(has, "memory") && (slices.Contains(has, "cpuacct") || slices.Contains(has, "cpu")):
		m.mode = V1
	default:
		m.used = slices.DeleteFunc(slices.Clone(mounts), func(h hierarchy) bool { return !h.v2 })
		if len(m.used) == 0 {
			return errors.New("no control groups are mounted at /sys/fs/cgroup; mount cgroup2 there")
		}
		m.used = m.used[:1]
		m.mode = V2
	}
	for i := range m.used {
		if err := m.place(&m.used[i]); err != nil {
			return err
		}
	}
	for i, h := range m.all {
		m.all[i].base, m.all[i].prefix = h.mount, h.root
		for _, u := range m.used {
			if u.mount == h.mount {
				m.all[i] = u
			}
		}
	}
	return nil
}

// place chooses where in a hierarchy the groups lie, and proves that it is writable.
func (m *manager) place(h *hierarchy) error {
	var firstErr error
	for _, base := range []string{h.mount, h.own} {
		h.base = base
		below, err := filepath.Rel(h.mount, base)
		if err != nil {
			continue
		}
		h.prefix = filepath.Join(h.root, below)
		err = m.mkdir(filepath.Join(base, topName))
		if errors.Is(err, fs.ErrExist) {
			// access(2) tells of a read-only mount, too.
			err = syscall.Access(filepath.Join(base, topName), 2 /* W_OK */)
		}
		if err == nil && m.mode == V2 {
			if err = m.controllersV2(h); err == nil {
				err = m.delegate(*h, base)
			}
		}
		if err == nil {
			return nil
		}
		if firstErr == nil {
			firstErr = err
		}
	}
	return fmt.Errorf("no control group can be made (%w); run the runner as root, or delegate a group to it (systemd: Delegate=yes)", firstErr)
}

// controllersV2 reads which of the wanted controllers the base can hand down.
func (m *manager) controllersV2(h *hierarchy) error {
	data, err := os.ReadFile(filepath.Join(h.base, "cgroup.controllers"))
	if err != nil {
		return err
	}
	h.controllers = nil
	for c := range strings.FieldsSeq(string(data)) {
		if slices.Contains(wantedV2, c) {
			h.controllers = append(h.controllers, c)
		}
	}
	if !slices.Contains(h.controllers, "memory") {
		return fmt.Errorf("%s offers no memory controller (it has %q)", h.base, strings.TrimSpace(string(data)))
	}
	return nil
}

// delegate hands the controllers of a v2 group to the groups below it. A group may then hold
// no process of its own, so the runner moves itself out of the way where it is in it.
func (m *manager) delegate(h hierarchy, path string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.delegated[path] {
		if _, err := os.Lstat(path); err == nil {
			return nil
		}
	}
	control := filepath.Join(path, "cgroup.subtree_control")
	enabled, err := os.ReadFile(control)
	if err != nil {
		return err
	}
	for _, c := range h.controllers {
		if slices.Contains(strings.Fields(string(enabled)), c) {
			continue
		}
		err := write(control, "+"+c)
		if errors.Is(err, syscall.EBUSY) && path == h.own {
			if err = m.stepAside(path); err == nil {
				err = write(control, "+"+c)
			}
		}
		if err != nil {
			return fmt.Errorf("enable the %s controller: %w", c, err)
		}
	}
	m.delegated[path] = true
	return nil
}

// stepAside moves the processes of a group into a leaf below it.
func (m *manager) stepAside(path string) error {
	leaf := filepath.Join(path, topName+"-runner")
	if err := m.mkdir(leaf); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	pids, err := readPIDs(filepath.Join(path, "cgroup.procs"))
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if err := write(filepath.Join(leaf, "cgroup.procs"), strconv.Itoa(pid)); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("move process %d to %s: %w", pid, leaf, err)
		}
	}
	return nil
}

// mounts reads the mounted hierarchies and this process's group in each.
func (m *manager) mounts() ([]hierarchy, error) {
	data, err := os.ReadFile(filepath.Join(m.proc, "self/mountinfo"))
	if err != nil {
		return nil, err
	}
	own, err := m.ownGroups()
	if err != nil {
		return nil, err
	}
	var found []hierarchy
	for line := range bytes.Lines(data) {
		// 36 35 0:26 /root /mount options - cgroup source superoptions
		before, after, ok := strings.Cut(string(line), " - ")
		fields, super := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 5 || len(super) < 3 {
			continue
		}
		h := hierarchy{root: unescape(fields[3]), mount: unescape(fields[4])}
		if strings.Contains(h.root, "..") {
			h.root = "/" // seen from inside a cgroup name space
		}
		switch super[0] {
		case "cgroup2":
			h.v2 = true
			h.own = h.below(own[""])
		case "cgroup":
			for c := range strings.SplitSeq(super[2], ",") {
				if path, ok := own[c]; ok {
					h.controllers = append(h.controllers, c)
					h.own = h.below(path)
				}
			}
			if len(h.controllers) == 0 {
				continue
			}
		default:
			continue
		}
		// The same hierarchy can be mounted twice; the first is as good.
		if !slices.ContainsFunc(found, func(f hierarchy) bool { return f.v2 == h.v2 && slices.Equal(f.controllers, h.controllers) }) {
			found = append(found, h)
		}
	}
	return found, nil
}

// below gives where a group's path of /proc/self/cgroup is mounted.
func (h hierarchy) below(group string) string {
	if rest, ok := strings.CutPrefix(group, strings.TrimSuffix(h.root, "/")); ok {
		group = rest
	}
	// After stepping aside, the group is still the one that was given to the runner.
	return filepath.Join(h.mount, strings.TrimSuffix(filepath.Join("/", group), "/"+topName+"-runner"))
}

// ownGroups reads /proc/self/cgroup: controller, or "" for v2, to path.
func (m *manager) ownGroups() (map[string]string, error) {
	f, err := os.Open(filepath.Join(m.proc, "self/cgroup"))
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	own := map[string]string{}
	for s := bufio.NewScanner(f); s.Scan(); {
		parts := strings.SplitN(s.Text(), ":", 3)
		if len(parts) == 3 {
			for c := range strings.SplitSeq(parts[1], ",") {
				own[c] = parts[2]
			}
		}
	}
	return own, nil
}

func (m *manager) ownInstance() (string, error) {
	start, err := m.startTime("self")
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d-%s-%s", os.Getpid(), start, m.pidNamespace()), nil
}

func (m *manager) pidNamespace() string {
	link, err := os.Readlink(filepath.Join(m.proc, "self/ns/pid")) // pid:[4026531836]
	if err != nil {
		return "0"
	}
	return strings.Trim(strings.TrimPrefix(link, "pid:"), "[]")
}

// startTime is when a process began, in the kernel's ticks since boot.
func (m *manager) startTime(pid string) (string, error) {
	data, err := os.ReadFile(filepath.Join(m.proc, pid, "stat"))
	if err != nil {
		return "", err
	}
	// The name in parentheses may hold anything, so count from its end.
	_, rest, ok := strings.Cut(string(data[max(bytes.LastIndexByte(data, ')'), 0):]), " ")
	fields := strings.Fields(rest)
	if !ok || len(fields) < 20 {
		return "", fmt.Errorf("%s/%s/stat has an unknown form", m.proc, pid)
	}
	return fields[19], nil
}

func (m *manager) instanceName(parent string) string { return parent + "-" + m.instance }

// dead tells whether a directory below specql/ belongs to a process of this parent name that
// is gone. Another PID name space's processes cannot be judged from here.
func (m *manager) dead(name, parent string) bool {
	rest, ok := strings.CutPrefix(name, parent+"-")
	return ok && m.gone(rest)
}

func (m *manager) gone(instance string) bool {
	parts := strings.Split(instance, "-")
	if len(parts) != 3 || instance == m.instance || parts[2] != m.pidNamespace() {
		return false
	}
	if _, err := strconv.ParseUint(parts[0], 10, 31); err != nil {
		return false
	}
	start, err := m.startTime(parts[0])
	if err != nil {
		return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH)
	}
	return start != parts[1]
}

func (m *manager) removeLeftovers(parent string) (int, error) {
	if m.mode == None {
		return 0, nil
	}
	names := map[string]bool{}
	for _, h := range m.all {
		entries, err := os.ReadDir(filepath.Join(h.base, topName))
		if err != nil {
			continue // never made in this hierarchy
		}
		for _, e := range entries {
			if e.IsDir() && m.dead(e.Name(), parent) {
				names[e.Name()] = true
			}
		}
	}
	var errs []error
	groups := map[string]bool{}
	for name := range names {
		g := &Group{m: m, path: filepath.Join(topName, name)}
		for _, h := range m.used {
			path := filepath.Join(h.base, g.path)
			g.dirs = append(g.dirs, dir{path: path, controllers: h.controllers})
			entries, err := os.ReadDir(path)
			if ignoreMissing(err) != nil {
				errs = append(errs, err)
			}
			for _, e := range entries {
				if e.IsDir() {
					groups[filepath.Join(name, e.Name())] = true
				}
			}
		}
		errs = append(errs, g.Kill(), g.Remove())
	}
	return len(groups), errors.Join(errs...)
}

func (m *manager) release(parent string) error {
	var errs []error
	for _, h := range m.all {
		err := m.rmdir(filepath.Join(h.base, topName, m.instanceName(parent)))
		if errors.Is(err, syscall.EBUSY) || errors.Is(err, syscall.ENOTEMPTY) {
			continue // another user in this process still has groups
		}
		errs = append(errs, ignoreMissing(err))
		_ = m.rmdir(filepath.Join(h.base, topName)) // stays while another runner has groups there
	}
	return errors.Join(errs...)
}

func readPIDs(path string) ([]int, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, ignoreMissing(err)
	}
	var pids []int
	for f := range strings.FieldsSeq(string(data)) {
		// 0 is a process of another PID name space.
		if pid, err := strconv.Atoi(f); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}
