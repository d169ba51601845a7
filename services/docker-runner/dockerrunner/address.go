package dockerrunner

import (
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"
)

// route is how the engine is reached. Who else reaches it has its host.
type route struct {
	// socket is the path of a local socket; empty for others.
	socket string
	// refused says why the engine must not be used; empty where it may be.
	refused string
	// exposed says who else reaches an engine that has no socket; empty for nobody.
	exposed string
}

// routeTo looks at the address of an engine, and at the variables that the client takes its
// TLS from.
func routeTo(host string) route {
	scheme, address, _ := strings.Cut(host, "://")
	if scheme == "unix" {
		return route{socket: address}
	}
	if scheme == "npipe" {
		return route{}
	}
	secure := os.Getenv(client.EnvOverrideCertPath) != ""
	verified := os.Getenv(client.EnvTLSVerify) != ""
	switch {
	case secure && verified:
		return route{}
	case onLoopback(host):
		return route{exposed: fmt.Sprintf("every user of this host reaches the engine at %s; give it a socket that only this user has, or TLS with clients' certificates", clip(host))}
	case secure:
		return route{refused: fmt.Sprintf("the engine at %s is not used, since nobody looks at its certificate: set %s=1", clip(host), client.EnvTLSVerify)}
	}
	return route{refused: fmt.Sprintf("the engine at %s is not used without TLS, since whoever is on the way has it, and its host: set %s and %s=1, or name a socket of this host", clip(host), client.EnvOverrideCertPath, client.EnvTLSVerify)}
}

// onLoopback says whether an engine's address is one of this host alone.
func onLoopback(host string) bool {
	u, err := url.Parse(host)
	if err != nil {
		return false
	}
	ip := net.ParseIP(u.Hostname())
	return ip != nil && ip.IsLoopback() || strings.EqualFold(u.Hostname(), "localhost")
}

// who says who else than this user and root reaches the engine; empty for nobody.
func (r route) who() string {
	if r.socket == "" {
		return r.exposed
	}
	name, err := filepath.EvalSymlinks(r.socket)
	if err != nil {
		return fmt.Sprintf("the socket %s cannot be looked at: %v", r.socket, err)
	}
	info, err := os.Stat(name)
	if err != nil {
		return fmt.Sprintf("the socket %s cannot be looked at: %v", name, err)
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return "this system does not tell whose the socket is"
	}
	mode := info.Mode().Perm()
	switch {
	case info.Mode().Type() != os.ModeSocket:
		return name + " is no socket"
	case !trusted(stat.Uid):
		return fmt.Sprintf("%s belongs to user %d", name, stat.Uid)
	case mode&0o002 != 0:
		return fmt.Sprintf("every user of this host may use %s (mode %04o); take that away: chmod o-rwx %s", name, mode, name)
	}
	if n, err := unix.Lgetxattr(name, "system.posix_acl_access", nil); err == nil && n > 0 {
		return fmt.Sprintf("%s has an access list of its own; take it away: setfacl -b %s", name, name)
	}
	if mode&0o020 != 0 {
		if others := membersOf(stat.Gid); len(others) > 0 {
			return fmt.Sprintf("%s may be used by %s; each of them has this host by it: take them out of its group, or give this runner an engine of its own", name, clip(strings.Join(others, ", ")))
		}
	}
	for dir := filepath.Dir(name); ; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err != nil {
			return fmt.Sprintf("%s cannot be looked at: %v", dir, err)
		}
		stat, ok := info.Sys().(*syscall.Stat_t)
		if ok && !trusted(stat.Uid) || info.Mode().Perm()&0o022 != 0 && info.Mode()&os.ModeSticky == 0 {
			return fmt.Sprintf("others may write %s, and put another socket there", dir)
		}
		if dir == "/" {
			return ""
		}
	}
}

func trusted(uid uint32) bool { return uid == 0 || int64(uid) == int64(os.Geteuid()) }

// membersOf names those, besides root and this user, who are in a group by the files of this host.
func membersOf(gid uint32) []string {
	id := strconv.FormatUint(uint64(gid), 10)
	self := strconv.Itoa(os.Geteuid())
	uids, others := map[string]string{}, []string{}
	add := func(name string) {
		if uid := uids[name]; name != "" && uid != "0" && uid != self && !slices.Contains(others, name) {
			others = append(others, name)
		}
	}
	accounts, err := os.ReadFile("/etc/passwd")
	if err != nil {
		return []string{"group " + id + ", whose members are not known"}
	}
	var primary []string
	for line := range strings.Lines(string(accounts)) {
		if f := strings.Split(strings.TrimSpace(line), ":"); len(f) > 3 {
			uids[f[0]] = f[2]
			if f[3] == id {
				primary = append(primary, f[0])
			}
		}
	}
	groups, err := os.ReadFile("/etc/group")
	if err != nil {
		return []string{"group " + id + ", whose members are not known"}
	}
	known := false
	for line := range strings.Lines(string(groups)) {
		if f := strings.Split(strings.TrimSpace(line), ":"); len(f) > 3 && f[2] == id {
			known = true
			for member := range strings.SplitSeq(f[3], ",") {
				add(member)
			}
		}
	}
	for _, name := range primary {
		add(name)
	}
	if !known && len(others) == 0 && id != "0" {
		return []string{"group " + id + ", whose members are not known"}
	}
	return others
}
