package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// system are the machine's directories and files that a job sees, read-only. Where one is a
// symbolic link, the link is made.
var system = []string{"/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store"}

// settings are what programs need of /etc, and no more: nothing of it is a secret on any system.
var settings = []string{
	"alternatives", "bash.bashrc", "ca-certificates", "crypto-policies", "default/locale", "fonts", "gai.conf", "groff", "gss", "host.conf", "hosts", "ImageMagick-6",
	"ImageMagick-7", "inputrc", "java-11-openjdk", "java-17-openjdk", "java-21-openjdk", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "libreoffice", "locale.alias",
	"locale.conf", "localtime", "magic", "magic.mime", "mime.types", "networks", "nsswitch.conf", "os-release", "perl", "pki", "profile", "protocols", "python3",
	"python3.11", "python3.12", "python3.13", "resolv.conf", "rpc", "services", "ssl/certs", "ssl/openssl.cnf", "terminfo", "timezone", "xdg", "xml",
}

// libraries are the directories that may be read. Programs lie in others, and can be read, by
// which the dynamic loader could be made to run them, only if they are allowed.
var libraries = []string{
	"/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32", "/usr/libexec", "/usr/share", "/usr/include", "/usr/local/lib", "/usr/local/lib64", "/usr/local/share",
	"/usr/local/include", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/proc",
}

var devices = []string{"null", "zero", "full", "random", "urandom"}

const (
	// newRoot is where the job's tree is put together. It is a directory that is always there and
	// that nothing in the tree comes from.
	newRoot  = "/proc"
	oldRoot  = "/.old"
	rootSize = "size=2m,nr_inodes=4096,mode=0755"
)

// prepare makes all of a job's surroundings that do not depend on the job.
func (l *launcher) prepare(abi int) error {
	if err := unix.Sethostname([]byte("sandbox")); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("take the mounts apart from the machine's: %w", err)
	}
	if err := unix.Mount("tmpfs", newRoot, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, rootSize); err != nil {
		return fmt.Errorf("make the root: %w", err)
	}
	for _, dir := range []string{"proc", "dev", "etc", "tmp", strings.TrimPrefix(oldRoot, "/")} {
		if err := os.Mkdir(filepath.Join(newRoot, dir), 0o755); err != nil { //nolint:gosec // of the job
			return err
		}
	}
	if err := unix.Mount("proc", newRoot+"/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	for _, path := range system {
		if err := show(path, newRoot+path); err != nil {
			return err
		}
	}
	for _, name := range settings {
		if err := show("/etc/"+name, newRoot+"/etc/"+name); err != nil {
			return err
		}
	}
	for _, name := range devices {
		if err := bind("/dev/"+name, newRoot+"/dev/"+name, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC); err != nil {
			return err
		}
	}
	for _, l := range []link{{"/dev/fd", "/proc/self/fd"}, {"/dev/stdin", "/proc/self/fd/0"}, {"/dev/stdout", "/proc/self/fd/1"}, {"/dev/stderr", "/proc/self/fd/2"}} {
		if err := os.Symlink(l.Target, newRoot+l.At); err != nil {
			return err
		}
	}
	if err := os.Mkdir(newRoot+"/dev/shm", 0o755); err != nil { //nolint:gosec // of the job
		return err
	}
	if err := accounts(newRoot + "/etc"); err != nil {
		return err
	}
	if err := os.Chdir(newRoot); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."+oldRoot); err != nil {
		return fmt.Errorf("change the root: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	if err := setMount("/proc", unix.MOUNT_ATTR_RDONLY, 0); err != nil {
		return err
	}
	if l.descriptors {
		if err := leaveOldRoot(); err != nil {
			return err
		}
	}
	if err := l.tempAhead(); err != nil {
		return err
	}
	if abi == 0 {
		return nil
	}
	var err error
	if l.rules, err = newRuleset(abi); err != nil {
		return err
	}
	// There is nothing here whose name is a secret.
	if err := l.rules.allow("/", unix.LANDLOCK_ACCESS_FS_READ_DIR); err != nil {
		return err
	}
	return l.rules.allowSystem()
}

func (r *ruleset) allowSystem() error {
	for _, path := range libraries {
		if err := r.allow(path, readFiles); err != nil {
			return err
		}
	}
	for _, name := range append(settings, "passwd", "group") {
		if err := r.allow("/etc/"+name, readFiles); err != nil {
			return err
		}
	}
	for _, name := range devices {
		if err := r.allow("/dev/"+name, device); err != nil {
			return err
		}
	}
	return nil
}

// accounts writes a user list with the job's own user in it.
func accounts(dir string) error {
	uid, gid := strconv.Itoa(os.Getuid()), strconv.Itoa(os.Getgid())
	for name, text := range map[string]string{
		"passwd": "job:x:" + uid + ":" + gid + ":job:/tmp:/bin/sh\nroot:x:0:0:root:/:/bin/false\nnobody:x:65534:65534:nobody:/:/bin/false\n",
		"group":  "job:x:" + gid + ":\nroot:x:0:\nnogroup:x:65534:\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil { //nolint:gosec // programs read it
			return err
		}
	}
	return nil
}

// show binds a path of the machine read-only, or makes the link that it is. What is not there,
// or not to be seen by this user, is left out.
func show(path, target string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return nil
	}
	if info.Mode()&fs.ModeSymlink != 0 && !strings.HasPrefix(path, "/etc/") {
		to, err := os.Readlink(path)
		if err != nil {
			return err
		}
		return os.Symlink(to, target)
	}
	err = bind(path, target, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EACCES) { // a link to nowhere, a directory of root's
		return nil
	}
	return err
}

// bind shows a file or directory, with what is mounted below it, at a target that is made.
func bind(source, target string, attributes uint64) error {
	fd, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return fmt.Errorf("show %s: %w", source, err)
	}
	defer func() { _ = unix.Close(fd) }()
	return attach(fd, target, attributes)
}

// cloneTree gives a detached copy of a resolved path and of what is mounted below it. A path that
// has become a link since is refused.
func cloneTree(path string) (int, error) {
	at, err := unix.Openat2(unix.AT_FDCWD, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS})
	if err != nil {
		return -1, err
	}
	defer func() { _ = unix.Close(at) }()
	return unix.OpenTree(at, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE|unix.AT_EMPTY_PATH)
}

// attach mounts a detached tree at a target that is made.
func attach(fd int, target string, attributes uint64) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("show %s: %w", target, err)
	}
	if attributes != 0 {
		if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: attributes, Propagation: unix.MS_PRIVATE}); err != nil {
			return fmt.Errorf("show %s: %w", target, err)
		}
	}
	if err := makeTarget(target, st.Mode&unix.S_IFMT == unix.S_IFDIR); err != nil {
		return err
	}
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("show %s: %w", target, err)
	}
	return nil
}

func makeTarget(target string, dir bool) error {
	if _, err := os.Lstat(target); err == nil {
		return nil
	}
	if dir {
		return os.MkdirAll(target, 0o755) //nolint:gosec // of the job
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil { //nolint:gosec // of the job
		return err
	}
	f, err := os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644) //nolint:gosec // covered by the mount
	if err != nil {
		return err
	}
	return f.Close()
}

func setMount(path string, set, clr uint64) error {
	if err := unix.MountSetattr(unix.AT_FDCWD, path, 0, &unix.MountAttr{Attr_set: set, Attr_clr: clr}); err != nil {
		return fmt.Errorf("change the mount %s: %w", path, err)
	}
	return nil
}

// leaveOldRoot takes the machine's tree away.
func leaveOldRoot() error {
	if err := unix.Unmount(oldRoot, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the machine's root: %w", err)
	}
	return os.Remove(oldRoot)
}

// fit completes the tree for a job and seals it.
func (l *launcher) fit(j *job) error {
	fds := j.mounts
	take := func(source string) (int, error) {
		if source != "" {
			return cloneTree(oldRoot + source)
		}
		if len(fds) == 0 {
			return -1, errors.New("too few descriptors came")
		}
		fd := fds[0]
		fds = fds[1:]
		return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	}
	const write = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	var home int
	if t := j.spec.Temp; t != nil {
		var err error
		if home, err = l.mountTemp(t, take); err != nil {
			return err
		}
	}
	for _, m := range j.spec.Mounts {
		if m.Empty {
			if err := makeTarget(m.Target, true); err != nil {
				return err
			}
			if err := unix.Mount("tmpfs", m.Target, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "size=1m,mode=0755"); err != nil {
				return fmt.Errorf("cover %s: %w", m.Target, err)
			}
			continue
		}
		fd, err := take(m.Source)
		if err != nil {
			return fmt.Errorf("show %s: %w", m.Target, err)
		}
		attributes := uint64(unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV)
		if m.ReadOnly {
			attributes |= unix.MOUNT_ATTR_RDONLY
		}
		if m.NoExec {
			attributes |= unix.MOUNT_ATTR_NOEXEC
		}
		err = attach(fd, m.Target, attributes)
		_ = unix.Close(fd)
		if err != nil {
			return err
		}
	}
	if t := j.spec.Temp; t != nil {
		err := attach(home, t.Home, write)
		_ = unix.Close(home)
		if err != nil {
			return err
		}
		l.temp = t.Home
		if t.Bytes == 0 {
			l.temp = ""
		}
	}
	for _, s := range j.spec.Links {
		if _, err := os.Lstat(s.At); err == nil {
			continue
		}
		if err := os.MkdirAll(filepath.Dir(s.At), 0o755); err != nil { //nolint:gosec // of the job
			return err
		}
		if err := os.Symlink(s.Target, s.At); err != nil {
			return err
		}
	}
	for _, m := range j.spec.Mounts {
		if !m.Empty {
			continue
		}
		if err := setMount(m.Target, unix.MOUNT_ATTR_RDONLY, 0); err != nil {
			return err
		}
	}
	if !l.descriptors {
		if err := leaveOldRoot(); err != nil {
			return err
		}
	}
	return setMount("/", unix.MOUNT_ATTR_RDONLY, 0)
}

const (
	tempBase  = "/tmp"
	tempFlags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	// tempLocked are the same as attributes of a mount.
	tempLocked = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
)

// tempAhead mounts a place for temporary files in memory, which gets its size with the job.
func (l *launcher) tempAhead() error {
	if err := unix.Mount("tmpfs", tempBase, "tmpfs", tempFlags, "mode=0700,size=64k,nr_inodes=16"); err != nil {
		return fmt.Errorf("make the temporary directory: %w", err)
	}
	var err error
	l.home, err = divideTemp()
	return err
}

// mountTemp mounts /tmp and /dev/shm, and gives the private directory, which is to be mounted
// when all is there that it may lie in. One size bounds the three.
func (l *launcher) mountTemp(t *temp, take func(string) (int, error)) (home int, err error) {
	if t.Bytes > 0 {
		size := "size=" + strconv.FormatInt(t.Bytes, 10) + ",nr_inodes=" + strconv.FormatInt(min(1<<20, 1024+t.Bytes>>12), 10)
		if err := unix.Mount("", tempBase, "", unix.MS_REMOUNT|tempFlags, size); err != nil {
			return -1, fmt.Errorf("give the temporary directory its size: %w", err)
		}
		return l.home, nil
	}
	_ = unix.Close(l.home) // what is below is covered, and nobody gets there
	fd, err := take(t.Source)
	if err != nil {
		return -1, fmt.Errorf("show the temporary directory: %w", err)
	}
	err = attach(fd, tempBase, tempLocked)
	_ = unix.Close(fd)
	if err != nil {
		return -1, err
	}
	return divideTemp()
}

// divideTemp makes /tmp and /dev/shm of parts of the place for temporary files, and gives the third.
func divideTemp() (home int, err error) {
	part := func(name string) (int, error) {
		if err := os.Mkdir(tempBase+"/"+name, 0o700); err != nil {
			return -1, err
		}
		return unix.OpenTree(unix.AT_FDCWD, tempBase+"/"+name, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	}
	if home, err = part("home"); err != nil {
		return -1, fmt.Errorf("make the temporary directory: %w", err)
	}
	for _, p := range []struct{ name, target string }{{"shm", "/dev/shm"}, {"tmp", tempBase}} {
		fd, err := part(p.name)
		if err != nil {
			return -1, fmt.Errorf("make the temporary directory: %w", err)
		}
		err = attach(fd, p.target, tempLocked)
		_ = unix.Close(fd)
		if err != nil {
			return -1, err
		}
	}
	return home, nil
}

// tempUsed is how much of the place for temporary files is taken, in bytes.
func (l *launcher) tempUsed() int64 {
	var st unix.Statfs_t
	if l.temp == "" || unix.Statfs(l.temp, &st) != nil {
		return 0
	}
	return int64(st.Blocks-st.Bfree) * st.Bsize //nolint:gosec // of a file system with a size
}
