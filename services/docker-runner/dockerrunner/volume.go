package dockerrunner

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

// deniedPath is a path of a host that no container gets, and why.
type deniedPath struct{ path, why string }

// neverMounted are the parts of a host that give a container power over it, with why.
// What lies above one of them is refused as well, since it holds it.
var neverMounted = func() deniedPaths {
	var d deniedPaths
	for why, names := range map[string][]string{
		"it belongs to the kernel":                       {"/proc", "/sys"},
		"it holds the host's devices":                    {"/dev"},
		"it holds the host's accounts and configuration": {"/etc", "/usr/etc", "/usr/local/etc"},
		"it holds the host's kernel":                     {"/boot", "/efi"},
		"it holds the sockets of the host's services":    {"/run", "/var/run"},
		"it belongs to the engine": {
			"/var/lib/docker", "/var/lib/containerd", "/var/lib/containers", "/var/lib/buildkit", "/var/lib/cni", "/opt/cni", "/opt/containerd",
		},
		"it belongs to Kubernetes":                  {"/var/lib/kubelet", "/var/lib/rancher", "/var/lib/etcd"},
		"it holds the host's timed jobs":            {"/var/spool/cron", "/var/spool/anacron", "/var/spool/at"},
		"it holds the state of the host's services": {"/var/lib/systemd", "/var/lib/cloud", "/var/lib/dpkg", "/var/lib/rpm", "/var/lib/apt", "/var/lib/polkit-1", "/var/lib/sudo", "/var/lib/private", "/var/lib/libvirt", "/var/lib/lxc", "/var/lib/lxd", "/var/lib/sss"},
		"it holds keys":                             {"/root/.ssh"},
		"it holds the engine's credentials":         {"/root/.docker"},
		"it holds the host's programs": {
			"/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32", "/usr/libexec", "/usr/local/bin", "/usr/local/sbin", "/usr/local/lib",
			"/usr/local/libexec", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/snap", "/var/lib/snapd",
		},
	} {
		for _, name := range names {
			d = append(d, deniedPath{path: name, why: why})
		}
	}
	slices.SortFunc(d, func(a, b deniedPath) int { return strings.Compare(a.path, b.path) })
	return d
}()

// keyDirs are the names of directories with keys, wherever they lie.
var keyDirs = []string{".ssh", ".gnupg", ".aws", ".azure", ".kube", ".docker"}

// deniedPaths are denied besides [neverMounted]: the runner's own, the engine's, and what the
// operator names.
type deniedPaths []deniedPath

// newDeniedPaths denies these paths, and what they lead to if they are links.
func newDeniedPaths(why string, names ...string) (deniedPaths, error) {
	var d deniedPaths
	for _, name := range names {
		if name == "" {
			continue
		}
		full, err := filepath.Abs(name)
		if err != nil {
			return nil, fmt.Errorf("denied path %s: %w", name, err)
		}
		d = append(d, deniedPath{path: full, why: why})
		// What is not there yet may have a link above it.
		for dir, rest := full, ""; ; dir, rest = filepath.Dir(dir), filepath.Join(filepath.Base(dir), rest) {
			target, err := filepath.EvalSymlinks(dir)
			if err == nil {
				if target = filepath.Join(target, rest); target != full {
					d = append(d, deniedPath{path: target, why: why})
				}
				break
			}
			if dir == "/" || !errors.Is(err, fs.ErrNotExist) {
				break
			}
		}
	}
	return d, nil
}

// why says why a clean host path must never be mounted; empty where it may be.
func (d deniedPaths) why(p string) string {
	if p == "/" {
		return "it is the whole host"
	}
	for _, list := range []deniedPaths{neverMounted, d} {
		for _, never := range list {
			if within(p, never.path) {
				return never.why
			}
			if within(never.path, p) {
				return "it holds " + never.path
			}
		}
	}
	if base := path.Base(p); base == "docker.sock" || base == "containerd.sock" || base == "podman.sock" {
		return "it gives the container power over the engine"
	}
	if p == "/home" || path.Dir(p) == "/home" {
		return "it holds all that its user has, keys among it"
	}
	if slices.ContainsFunc(strings.Split(p, "/"), func(name string) bool { return slices.Contains(keyDirs, name) }) {
		return "it holds keys"
	}
	return ""
}

// inHome says whether a path lies in a user's home directory.
func inHome(p string) bool { return within(p, "/home") || within(p, "/root") }

// reach is how far a runner can look at the paths of volumes.
type reach int

const (
	// byName: paths are compared as they are written, to tell in advance.
	byName reach = iota
	// distant: the engine is on another host, whose links nobody here can see.
	distant
	// local: the engine's files are the runner's own, so links can be resolved.
	local
	// held: the runner can also hand the engine the very thing that it looked at.
	held
)

// hostMount is a volume that was checked: source is what its links lead to.
type hostMount struct {
	source, target string
	readOnly       bool
	// file is what was checked; nil where the runner cannot hold it.
	file *os.File
}

func closeMounts(mounts []hostMount) {
	for _, m := range mounts {
		if m.file != nil {
			_ = m.file.Close()
		}
	}
}

// volumes checks the mounts. Close what it returns.
func (p *policies) volumes(volumes []Volume, r reach) ([]hostMount, error) {
	if err := p.volumeCount(len(volumes)); err != nil {
		return nil, err
	}
	mounts := make([]hostMount, 0, len(volumes))
	for _, v := range volumes {
		m, err := p.volume(v, r)
		if err != nil {
			closeMounts(mounts)
			return nil, err
		}
		mounts = append(mounts, m)
	}
	return mounts, nil
}

func (p *policies) volumeCount(n int) error {
	for _, s := range p.sources {
		if r := s.policy.VolumeRestrictions; r != nil && r.MaxVolumes != nil && n > *r.MaxVolumes {
			return p.checks.Deny(s.prefix+"volume_restrictions.max_volumes", strconv.Itoa(n)+" volumes",
				fmt.Sprintf("%s allows %d; raise max_volumes", s.where, *r.MaxVolumes), p.changing(func(policy *Policy, ceiling bool) *runnerv1.PolicyChange {
					if r := policy.VolumeRestrictions; r == nil || r.MaxVolumes == nil || *r.MaxVolumes >= n {
						return nil
					}
					return runner.SetTo(ceiling, "volume_restrictions.max_volumes", n)
				})...)
		}
	}
	return nil
}

func (p *policies) volume(v Volume, r reach) (_ hostMount, err error) {
	resolved, err := resolveHostPath(v.HostPath, r)
	if err != nil {
		return hostMount{}, err
	}
	subject := v.HostPath
	if resolved != path.Clean(v.HostPath) {
		subject = v.HostPath + " -> " + resolved
	}
	if why := p.denied.why(resolved); why != "" {
		return hostMount{}, p.checks.Deny("volumes", subject, "it must never be mounted: "+why)
	}
	m := hostMount{source: resolved, target: path.Clean(v.ContainerPath), readOnly: v.Mode != "rw"}
	defer func() {
		if err != nil {
			closeMounts([]hostMount{m})
		}
	}()
	if r >= local {
		if err := p.mountable(&m, subject, r); err != nil {
			return hostMount{}, err
		}
	}
	if inHome(resolved) && !slices.ContainsFunc(p.sources, func(s source) bool { return s.policy.VolumeRestrictions != nil }) {
		return hostMount{}, p.checks.Deny("volumes", subject, fmt.Sprintf("it lies in a home directory, which must be listed; add volume_restrictions with allowed_host_paths: [%q] to %s", resolved, p.sources[0].where),
			runner.AddTo(false, allowedHostPaths, resolved))
	}
	if r == distant || r == local {
		if err := p.swappable(resolved, subject); err != nil {
			return hostMount{}, err
		}
	}
	for _, s := range p.sources {
		if err := p.hostPath(s, &m, subject, r); err != nil {
			return hostMount{}, err
		}
	}
	return m, nil
}

func resolveHostPath(p string, r reach) (string, error) {
	if r < local {
		return path.Clean(p), nil
	}
	resolved, err := filepath.EvalSymlinks(p)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", fault.Wrap(err, fault.Validation, "the host path %s does not exist; make it, or correct runner_config.volumes", clip(p))
	case err != nil:
		return "", fault.Wrap(err, fault.Validation, "the host path %s cannot be resolved: %v", clip(p), err)
	}
	return resolved, nil
}

// mountable refuses sockets, pipes and devices. Where the runner can hold the path, it opens
// it: what is checked from then on is what the container gets.
func (p *policies) mountable(m *hostMount, subject string, r reach) error {
	info, err := os.Lstat(m.source)
	if err == nil && r == held {
		if m.file, err = openHostPath(m.source); err == nil {
			info, err = m.file.Stat()
		}
	}
	if err != nil {
		return fault.Wrap(err, fault.Validation, "the host path %s cannot be read, or changes: %v", clip(subject), err)
	}
	if !info.IsDir() && !info.Mode().IsRegular() {
		return p.checks.Deny("volumes", subject, "only directories and regular files may be mounted")
	}
	return p.mountsIn(m.source, subject)
}

// mountsIn refuses what has a part of the host in it by another mount.
func (p *policies) mountsIn(place, subject string) error {
	why, err := p.denied.whyMounted(place)
	switch {
	case err != nil:
		return fault.Wrap(err, fault.Unavailable, "the mounts in %s cannot be looked at: %v", clip(subject), err)
	case why != "":
		return p.checks.Deny("volumes", subject, "it must never be mounted: "+why)
	}
	return nil
}

// swappable refuses a path strictly below one that may be mounted writable, where the runner
// cannot hold what it checked: a container could put a link in its place before the engine
// resolves the path once more.
func (p *policies) swappable(resolved, subject string) error {
	dir := p.above(resolved)
	if dir == "" {
		return nil
	}
	return p.checks.Deny("volumes", subject, fmt.Sprintf("it lies in %s, which containers may write, and could be another thing when the engine mounts it; mount %s itself, or run the runner as root on the engine's host", dir, dir))
}

// above is an entry of allowed_host_paths that a path lies strictly below; empty for none.
func (p *policies) above(name string) string {
	for _, s := range p.sources {
		if s.policy.VolumeRestrictions == nil {
			continue
		}
		for _, allowed := range s.policy.VolumeRestrictions.AllowedHostPaths {
			if dir := path.Clean(allowed); dir != name && within(name, dir) {
				return dir
			}
		}
	}
	return ""
}

const allowedHostPaths = "volume_restrictions.allowed_host_paths"

// addingPath are the changes of both policies that allow a mount.
func (p *policies) addingPath(m *hostMount, r reach) []*runnerv1.PolicyChange {
	return p.changing(func(policy *Policy, ceiling bool) *runnerv1.PolicyChange {
		if policy.VolumeRestrictions == nil && m.readOnly {
			return nil
		}
		if policy.VolumeRestrictions != nil && slices.ContainsFunc(policy.VolumeRestrictions.AllowedHostPaths, func(allowed string) bool {
			return within(m.source, p.allowedDir(allowed, r))
		}) {
			return nil
		}
		return runner.AddTo(ceiling, allowedHostPaths, m.source)
	})
}

// allowedDir is what an entry of allowed_host_paths leads to. It may be a link of the operator's, but
// not one that a container has put into a directory that it may write.
func (p *policies) allowedDir(allowed string, r reach) string {
	dir := path.Clean(allowed)
	if r >= local && p.above(dir) == "" {
		if target, err := filepath.EvalSymlinks(dir); err == nil {
			dir = target
		}
	}
	return dir
}

func (p *policies) hostPath(s source, m *hostMount, subject string, r reach) error {
	rule := s.prefix + "volume_restrictions.allowed_host_paths"
	if s.policy.VolumeRestrictions == nil {
		if !m.readOnly {
			return p.checks.Deny(rule, subject, fmt.Sprintf("a writable mount must be listed; add volume_restrictions with allowed_host_paths: [%q] to %s, or mount it ro", m.source, s.where), p.addingPath(m, r)...)
		}
		p.checks.Allow(rule, subject)
		return nil
	}
	for _, allowed := range s.policy.VolumeRestrictions.AllowedHostPaths {
		if !path.IsAbs(allowed) {
			return fault.New(fault.Validation, "%s of %s: %q is not an absolute path", rule, s.where, clip(allowed))
		}
		if within(m.source, p.allowedDir(allowed, r)) {
			p.checks.Allow(rule, subject)
			return nil
		}
	}
	return p.checks.Deny(rule, subject, fmt.Sprintf("the path is not listed; add %q to allowed_host_paths of %s", m.source, s.where), p.addingPath(m, r)...)
}
