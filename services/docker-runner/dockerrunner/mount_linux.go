package dockerrunner

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mountTmpfs mounts a bounded in-memory file system that every user of a container may write.
func mountTmpfs(dir string, bytes int64) error {
	options := fmt.Sprintf("size=%d,nr_inodes=1024,mode=1777", bytes)
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, options); err != nil {
		return fmt.Errorf("mount %s: %w", dir, err)
	}
	return nil
}

// unmount takes a mount away at once, also where something still uses it. No mount is no error.
func unmount(dir string) error {
	if err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return nil
}

// openHostPath opens a clean absolute path, to look at and to bind alone, and follows no link
// on the way: the error is [unix.ENOTDIR] or [unix.ELOOP] where one has come up.
func openHostPath(name string) (*os.File, error) {
	const flags = unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := unix.Open("/", flags|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("open /: %w", err)
	}
	steps := strings.FieldsFunc(name, func(r rune) bool { return r == '/' })
	for i, step := range steps {
		last := 0
		if i < len(steps)-1 {
			last = unix.O_DIRECTORY
		}
		next, err := unix.Openat(fd, step, flags|last, 0)
		_ = unix.Close(fd)
		if err != nil {
			return nil, fmt.Errorf("open %s: %w", name, err)
		}
		fd = next
	}
	return os.NewFile(uintptr(fd), name), nil //nolint:gosec // a descriptor is not negative
}

// bind mounts what a file is, wherever its path leads by now.
func bind(f *os.File, place string, readOnly bool) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("mount %s: %w", place, err)
	}
	var failed error
	if err := conn.Control(func(fd uintptr) {
		failed = unix.Mount("/proc/self/fd/"+strconv.FormatUint(uint64(fd), 10), place, "", unix.MS_BIND|unix.MS_REC, "")
	}); err != nil || failed != nil {
		return fmt.Errorf("mount %s: %w", place, errors.Join(err, failed))
	}
	if err := unix.Mount("", place, "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("mount %s: %w", place, err)
	}
	// No file of a volume makes a program its owner's, and no device works. The engine mounts a
	// read-only volume anew, many of them without what is mounted below it, and some cannot keep
	// more than that it is read-only.
	attributes := uint64(unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV)
	if readOnly {
		attributes = unix.MOUNT_ATTR_RDONLY
	}
	// Kernels before 5.12 cannot do this; there it is as the engine does it.
	if err := unix.MountSetattr(unix.AT_FDCWD, place, unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: attributes}); err != nil && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("restrict %s: %w", place, err)
	}
	return nil
}
