package dockerrunner

import (
	"bytes"
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
)

// mounted is a mount of this host: what lies at root in the file system dev is seen at place.
type mounted struct{ dev, root, place, kind string }

// kernelFiles are the file systems by which the kernel is looked into and changed, wherever
// they are mounted.
var kernelFiles = []string{
	"proc", "sysfs", "devtmpfs", "devpts", "cgroup", "cgroup2", "securityfs", "debugfs", "tracefs", "configfs", "bpf",
	"efivarfs", "pstore", "fusectl", "binfmt_misc", "mqueue", "selinuxfs", "smackfs", "rpc_pipefs", "nfsd", "nsfs", "resctrl",
}

// mountsOfHost lists the mounts that this process sees, in the order in which they were made.
func mountsOfHost() ([]mounted, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	return parseMounts(text), nil
}

// parseMounts reads the kernel's list of mounts.
func parseMounts(text []byte) []mounted {
	var all []mounted
	for line := range bytes.Lines(text) {
		before, after, _ := strings.Cut(string(line), " - ")
		fields, kind := strings.Fields(before), strings.Fields(after)
		if len(fields) < 5 || len(kind) < 1 {
			continue
		}
		all = append(all, mounted{dev: fields[2], root: unescape(fields[3]), place: unescape(fields[4]), kind: kind[0]})
	}
	return all
}

// unescape reads the octal escapes of a path in the kernel's list of mounts.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// find gives the place of a path in its file system, whatever it is mounted by.
func find(all []mounted, p string) mounted {
	var best mounted
	for _, m := range all {
		if within(p, m.place) && len(m.place) >= len(best.place) {
			best = m
		}
	}
	best.root = path.Join(best.root, strings.TrimPrefix(p, best.place))
	return best
}

// whyMounted says why what is mounted at a path, or below it, must not be given to a container:
// another mount of what is denied passes by the names of paths. Empty where it may be.
func (d deniedPaths) whyMounted(p string) (string, error) {
	all, err := mountsOfHost()
	if err != nil {
		return "", err
	}
	seen := []mounted{find(all, p)}
	for _, m := range all {
		if m.place != p && within(m.place, p) {
			seen = append(seen, m)
		}
	}
	type place struct {
		mounted
		why string
	}
	var never []place
	for _, list := range []deniedPaths{neverMounted, d} {
		for _, n := range list {
			never = append(never, place{find(all, n.path), n.why})
		}
	}
	for _, m := range seen {
		if slices.Contains(kernelFiles, m.kind) {
			return fmt.Sprintf("%s (%s) is mounted in it, and belongs to the kernel", clip(m.place), m.kind), nil
		}
		for _, n := range never {
			if m.dev == n.dev && (within(m.root, n.root) || within(n.root, m.root)) {
				return fmt.Sprintf("%s leads to %s: %s", clip(m.place), clip(n.root), n.why), nil
			}
		}
	}
	return "", nil
}
