package shellrunner

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// attackArgument makes the test program an attacker: the one program that its job may execute.
const attackArgument = "specql-attack"

// victimArgument makes it a job that is attacked.
const victimArgument = "specql-victim"

// target is what an attacker is told of the machine, as one who has been there before would know.
type target struct {
	Secret   string `json:"secret"`   // a file that all users may read, outside the job
	Socket   string `json:"socket"`   // a socket's path, outside the job
	Abstract string `json:"abstract"` // an abstract socket of another process
	Port     int    `json:"port"`     // a service on the machine's loopback
	Runner   int    `json:"runner"`   // the runner's process
	Temp     string `json:"temp"`     // the runner's directory of jobs
	Victim   string `json:"victim"`   // another job's private directory
	Key      int    `json:"key"`      // System V shared memory of another process
}

// attacks are what the attacker can try. Each tells what came of every try: the name of the
// error, or what it got.
var attacks = map[string]func(t *target, tell func(try string, err error)){
	// Files.
	"password files": func(_ *target, tell func(string, error)) {
		for _, f := range []string{"/etc/shadow", "/etc/gshadow", "/etc/shadow-", "/etc/sudoers", "/etc/ssh/sshd_config", "/root/.ssh/id_rsa"} {
			tell(f, read(f))
		}
	},
	"a file of the machine": func(t *target, tell func(string, error)) {
		tell("open", read(t.Secret))
		tell("list", read(filepath.Dir(t.Secret)))
		tell("up", read(strings.Repeat("../", 40)+t.Secret))
		tell("root of the process", read("/proc/self/root"+t.Secret))
		tell("beyond the root", read("/proc/self/root/../.."+t.Secret))
		tell("root of the first process", read("/proc/1/root"+t.Secret))
		tell("old root", read("/.old"+t.Secret))
	},
	"symbolic links": func(t *target, tell func(string, error)) {
		for i, to := range []string{t.Secret, "/etc/shadow", "/proc/1/root" + t.Secret, "/proc/1/environ"} {
			name := "link" + strconv.Itoa(i)
			if err := os.Symlink(to, name); err != nil {
				tell(to, err)
				continue
			}
			tell(to, read(name))
		}
	},
	"hard links": func(t *target, tell func(string, error)) {
		tell("program", os.Link("/usr/bin/env", "hard1"))
		tell("file", os.Link(t.Secret, "hard2"))
		tell("own program", os.Link("/proc/self/exe", "hard3"))
		tell("own program, followed", unix.Linkat(unix.AT_FDCWD, "/proc/self/exe", unix.AT_FDCWD, "hard4", unix.AT_SYMLINK_FOLLOW))
	},
	"other jobs": func(t *target, tell func(string, error)) {
		tell("private directory", read(t.Victim))
		tell("private file", read(filepath.Join(t.Victim, "mark")))
		entries, err := os.ReadDir(t.Temp)
		others := 0
		for _, e := range entries {
			if filepath.Join(t.Temp, e.Name()) != os.Getenv("TMPDIR") {
				others++
			}
		}
		if err == nil && others == 0 {
			err = unix.ENOENT
		}
		tell("directory of jobs", err)
	},
	"system files": func(_ *target, tell func(string, error)) {
		for _, dir := range []string{"/", "/usr", "/usr/bin", "/usr/lib", "/etc", "/bin", "/lib", "/dev", "/proc", "/var", "/home"} {
			tell("create in "+dir, os.WriteFile(filepath.Join(dir, "specql-attack"), nil, 0o600))
		}
		for _, f := range []string{"/etc/passwd", "/usr/bin/env", "/etc/ld.so.cache"} {
			tell("append to "+f, appendTo(f))
			tell("remove "+f, os.Remove(f))
			tell("rename "+f, os.Rename(f, f+"x"))
		}
	},
	"modes of system files": func(_ *target, tell func(string, error)) {
		for f, mode := range map[string]os.FileMode{"/etc/passwd": 0o644, "/usr/bin/env": 0o755, "/etc/ld.so.cache": 0o644, "/": 0o755, "/etc": 0o755, "/dev/null": 0o666} {
			tell("mode of "+f, os.Chmod(f, mode))
			tell("owner of "+f, os.Chown(f, os.Getuid(), -1))
			tell("time of "+f, os.Chtimes(f, time.Now(), time.Now()))
		}
	},
	"the allowed program": func(_ *target, tell func(string, error)) {
		self, err := os.Readlink("/proc/self/exe")
		tell("append", errors.Join(err, appendTo(self)))
		tell("remove", os.Remove(self))
		tell("replace", func() error {
			if err := os.WriteFile("other", []byte("#!/bin/sh\n"), 0o700); err != nil {
				return err
			}
			return os.Rename("other", self)
		}())
	},
	"devices": func(_ *target, tell func(string, error)) {
		tell("make a disk", unix.Mknod("disk", unix.S_IFBLK|0o600, int(unix.Mkdev(254, 0))))
		tell("make memory", unix.Mknod("mem", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 1))))
		for _, f := range []string{"mem", "kmsg", "port", "vda", "sda", "kvm", "fuse", "net/tun", "ptmx", "loop-control", "mapper/control", "vsock"} {
			tell(f, read("/dev/"+f))
		}
	},
	"files that run as their owner": func(_ *target, tell func(string, error)) {
		if err := os.WriteFile("mine", nil, 0o600); err != nil {
			tell("mine", fmt.Errorf("cannot begin: %w", err))
			return
		}
		f, err := os.OpenFile("mine", os.O_RDWR, 0)
		if err != nil {
			tell("mine", fmt.Errorf("cannot begin: %w", err))
			return
		}
		tell("chmod", unix.Chmod("mine", 0o4755))
		tell("group", unix.Chmod("mine", 0o2755))
		tell("fchmod", unix.Fchmod(int(f.Fd()), 0o4755))
		tell("fchmodat", unix.Fchmodat(unix.AT_FDCWD, "mine", 0o4755, 0))
		_, _, e := unix.Syscall6(unix.SYS_FCHMODAT2, atCWD, cstring("mine"), 0o4755, 0, 0, 0)
		tell("fchmodat2", fail(e))
		_, err = unix.Open("mine2", unix.O_CREAT|unix.O_WRONLY, 0o4755)
		tell("open", err)
		_, err = unix.Openat2(unix.AT_FDCWD, "mine3", &unix.OpenHow{Flags: unix.O_CREAT | unix.O_WRONLY, Mode: 0o4755})
		tell("openat2", err)
		tell("mknod", unix.Mknod("mine4", unix.S_IFREG|0o4755, 0))
		tell("owner", os.Chown("mine", 0, 0))
	},
	"file handles": func(_ *target, tell func(string, error)) {
		_, _, err := unix.NameToHandleAt(unix.AT_FDCWD, ".", 0)
		tell("name_to_handle_at", err)
		_, err = unix.OpenByHandleAt(unix.AT_FDCWD, unix.NewFileHandle(1, make([]byte, 8)), unix.O_RDONLY)
		tell("open_by_handle_at", err)
	},
	"mounts": func(_ *target, tell func(string, error)) {
		tell("tmpfs", unix.Mount("t", "/tmp", "tmpfs", 0, ""))
		tell("bind", unix.Mount("/usr", ".", "", unix.MS_BIND, ""))
		tell("writable", unix.Mount("", "/usr", "", unix.MS_REMOUNT|unix.MS_BIND, ""))
		tell("exec", unix.Mount("", ".", "", unix.MS_REMOUNT|unix.MS_BIND, ""))
		tell("take away /proc", unix.Unmount("/proc", unix.MNT_DETACH))
		tell("take away .", unix.Unmount(".", unix.MNT_DETACH))
		_, err := unix.Fsopen("proc", 0)
		tell("fsopen", err)
		_, err = unix.OpenTree(unix.AT_FDCWD, "/", unix.OPEN_TREE_CLONE)
		tell("open_tree", err)
		tell("move_mount", unix.MoveMount(unix.AT_FDCWD, "/usr", unix.AT_FDCWD, ".", 0))
		tell("mount_setattr", unix.MountSetattr(unix.AT_FDCWD, "/usr", 0, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}))
		tell("pivot_root", unix.PivotRoot(".", "."))
	},
	"chroot": func(_ *target, tell func(string, error)) { tell("chroot", unix.Chroot(".")) },
	"inherited descriptors": func(_ *target, tell func(string, error)) {
		for fd := 3; fd < 256; fd++ {
			var st unix.Stat_t
			// What the Go runtime opens for itself is none of these.
			if err := unix.Fstat(fd, &st); err == nil && slices.Contains([]uint32{unix.S_IFSOCK, unix.S_IFREG, unix.S_IFDIR, unix.S_IFIFO, unix.S_IFCHR}, st.Mode&unix.S_IFMT) {
				tell(strconv.Itoa(fd), nil)
			}
		}
		tell("none", unix.EBADF)
	},

	// Network.
	"the network": func(_ *target, tell func(string, error)) {
		for _, a := range []string{"192.0.2.1:80", "169.254.169.254:80", "10.0.0.1:22", "[2001:db8::1]:80"} {
			tell("tcp "+a, dial("tcp", a))
			tell("udp "+a, dial("udp", a))
		}
	},
	"names": func(_ *target, tell func(string, error)) {
		for _, a := range []string{"127.0.0.53:53", "127.0.0.1:53", "8.8.8.8:53"} {
			c, err := net.DialTimeout("udp", a, time.Second)
			if err == nil {
				_, err = c.Write([]byte("\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07example\x03com\x00\x00\x01\x00\x01"))
			}
			tell(a, err)
		}
	},
	"services of the machine": func(t *target, tell func(string, error)) {
		port := strconv.Itoa(t.Port)
		for _, a := range []string{"127.0.0.1:" + port, "[::1]:" + port, "127.9.9.9:" + port, "0.0.0.0:" + port} {
			tell(a, dial("tcp", a))
		}
	},
	"abstract sockets": func(t *target, tell func(string, error)) { tell("connect", dial("unix", "@"+t.Abstract)) },
	"sockets with paths": func(t *target, tell func(string, error)) {
		for _, path := range []string{t.Socket, "/var/run/docker.sock", "/run/docker.sock", "/run/dbus/system_bus_socket", "/run/systemd/private"} {
			tell(path, dial("unix", path))
		}
	},
	"raw sockets": func(_ *target, tell func(string, error)) {
		for name, s := range map[string][3]int{
			"icmp": {unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP}, "tcp": {unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_TCP},
			"icmp6": {unix.AF_INET6, unix.SOCK_RAW, unix.IPPROTO_ICMPV6}, "packet": {unix.AF_PACKET, unix.SOCK_RAW, 0}, "packet datagram": {unix.AF_PACKET, unix.SOCK_DGRAM, 0},
		} {
			_, err := unix.Socket(s[0], s[1], s[2])
			tell(name, err)
		}
	},
	"other families of sockets": func(_ *target, tell func(string, error)) {
		for name, family := range map[string]int{
			"vsock": unix.AF_VSOCK, "alg": unix.AF_ALG, "bluetooth": unix.AF_BLUETOOTH, "can": unix.AF_CAN, "tipc": unix.AF_TIPC, "key": unix.AF_KEY, "xdp": unix.AF_XDP,
			"rds": unix.AF_RDS, "kcm": unix.AF_KCM, "nfc": unix.AF_NFC, "smc": unix.AF_SMC, "qipcrtr": unix.AF_QIPCRTR,
		} {
			_, err := unix.Socket(family, unix.SOCK_STREAM, 0)
			tell(name, err)
			_, err = unix.Socket(family, unix.SOCK_DGRAM, 0)
			tell(name+" datagram", err)
		}
	},
	"the network's settings": func(_ *target, tell func(string, error)) {
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
		if err != nil {
			tell("socket", err)
			return
		}
		lo, _ := unix.NewIfreq("lo")
		lo.SetUint16(unix.IFF_UP)
		tell("raise the loopback", unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, lo))
		tell("forward", os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0))
		tell("low port", func() error {
			l, err := net.Listen("tcp4", "127.0.0.1:81")
			if err == nil {
				_ = l.Close()
			}
			return err
		}())
	},

	// Processes.
	"kill others": func(t *target, tell func(string, error)) {
		tell("first process", unix.Kill(1, unix.SIGKILL))
		tell("stop the first process", unix.Kill(1, unix.SIGSTOP))
		tell("runner", unix.Kill(t.Runner, unix.SIGKILL))
		tell("all", unix.Kill(-1, unix.SIGKILL))
		tell("group of the runner", unix.Kill(-t.Runner, unix.SIGKILL))
		fd, err := unix.PidfdOpen(1, 0)
		if err == nil {
			err = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		}
		tell("by descriptor", err)
	},
	"look into others": func(t *target, tell func(string, error)) {
		for _, pid := range []string{"1", strconv.Itoa(t.Runner)} {
			for _, f := range []string{"environ", "mem", "maps", "root/", "cwd/", "fd/0", "fd/3", "syscall", "stack", "task/1/mem", "pagemap"} {
				tell(pid+"/"+f, read("/proc/"+pid+"/"+f))
			}
		}
		tell("attach", unix.PtraceAttach(1))
		tell("seize", unix.PtraceSeize(1))
		_, _, e := unix.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_TRACEME, 0, 0, 0, 0, 0)
		tell("traceme", fail(e))
		for name, number := range map[string]uintptr{"read": unix.SYS_PROCESS_VM_READV, "write": unix.SYS_PROCESS_VM_WRITEV} {
			_, _, e := unix.Syscall6(number, 1, 0, 0, 0, 0, 0)
			tell(name, fail(e))
		}
		_, _, e = unix.Syscall6(unix.SYS_KCMP, 1, uintptr(os.Getpid()), 0, 0, 0, 0)
		tell("kcmp", fail(e))
		fd, err := unix.PidfdOpen(1, 0)
		if err == nil {
			_, err = unix.PidfdGetfd(fd, 3, 0)
		}
		tell("take a descriptor", err)
	},
	"see others": func(_ *target, tell func(string, error)) {
		entries, err := os.ReadDir("/proc")
		tell("list", func() error {
			for _, e := range entries {
				pid, notNumber := strconv.Atoi(e.Name())
				if notNumber == nil && pid != 1 && pid != os.Getpid() {
					return nil
				}
			}
			return errors.Join(err, unix.ESRCH)
		}())
	},
	"shared memory of others": func(t *target, tell func(string, error)) {
		_, err := unix.SysvShmGet(t.Key, 4096, 0o600)
		tell("shmget", err)
	},
	"leave daemons": func(_ *target, tell func(string, error)) {
		for range 3 {
			tell("daemon", daemon(2))
		}
	},
	"stop itself": func(*target, func(string, error)) {
		// To this very thread: where another one takes the signal, this one goes on for a moment, which may be its end.
		runtime.LockOSThread()
		_ = unix.Tgkill(os.Getpid(), unix.Gettid(), unix.SIGSTOP)
	},
	"never end":   func(*target, func(string, error)) { signal.Ignore(); spin() },
	"wait, deaf":  func(*target, func(string, error)) { signal.Ignore(); <-time.After(time.Hour) },
	"be a daemon": func(*target, func(string, error)) { _ = daemon(1) },
	"control group": func(_ *target, tell func(string, error)) {
		for _, f := range []string{"cgroup.procs", "tasks", "memory/tasks", "memory/cgroup.procs", "pids/tasks", "cpu/tasks", "unified/cgroup.procs"} {
			tell(f, os.WriteFile("/sys/fs/cgroup/"+f, []byte("0"), 0))
		}
	},
	"priority": func(_ *target, tell func(string, error)) {
		tell("nice", unix.Setpriority(unix.PRIO_PROCESS, 0, -10))
		_, _, e := unix.Syscall(unix.SYS_SCHED_SETSCHEDULER, 0, 1, uintptr(unsafe.Pointer(&[1]int32{50})))
		tell("real time", fail(e))
		tell("memory", os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0))
	},
	"fork bomb": func(_ *target, tell func(string, error)) {
		signal.Ignore()
		for range 5000 {
			if err := daemon(0); err != nil {
				tell("fork", err)
				fmt.Fprintln(os.Stderr, "no more processes")
				os.Exit(1)
			}
		}
		tell("fork", nil)
	},

	// Privileges.
	"become root": func(_ *target, tell func(string, error)) {
		for name, number := range map[string]uintptr{"setuid": unix.SYS_SETUID, "setgid": unix.SYS_SETGID, "setfsuid": unix.SYS_SETREUID} {
			_, _, e := unix.RawSyscall(number, 0, 0, 0)
			tell(name, fail(e))
		}
		_, _, e := unix.RawSyscall(unix.SYS_SETRESUID, 0, 0, 0)
		tell("setresuid", fail(e))
		_, _, e = unix.RawSyscall(unix.SYS_SETGROUPS, 1, uintptr(unsafe.Pointer(&[1]uint32{0})), 0)
		tell("setgroups", fail(e))
		for _, p := range []string{"/bin/su", "/usr/bin/sudo", "/bin/mount", "/usr/bin/passwd", "/usr/bin/newuidmap"} {
			tell(p, start(p))
		}
	},
	"name spaces": func(_ *target, tell func(string, error)) {
		for name, flag := range map[string]int{
			"user": unix.CLONE_NEWUSER, "mount": unix.CLONE_NEWNS, "network": unix.CLONE_NEWNET, "pid": unix.CLONE_NEWPID, "ipc": unix.CLONE_NEWIPC, "uts": unix.CLONE_NEWUTS,
			"cgroup": unix.CLONE_NEWCGROUP, "time": unix.CLONE_NEWTIME,
		} {
			_, _, e := unix.RawSyscall(unix.SYS_UNSHARE, uintptr(flag), 0, 0)
			tell("unshare "+name, fail(e))
			cmd := exec.Command("/proc/self/exe", attackArgument, "nothing")
			cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: uintptr(flag)}
			tell("clone "+name, cmd.Run())
		}
		args := [11]uint64{0: unix.CLONE_NEWUSER, 4: uint64(unix.SIGCHLD)}
		pid, _, e := unix.RawSyscall(unix.SYS_CLONE3, uintptr(unsafe.Pointer(&args)), unsafe.Sizeof(args), 0)
		if e == 0 && pid == 0 {
			unix.Exit(0)
		}
		tell("clone3", fail(e))
		for _, ns := range []string{"user", "mnt", "net", "pid"} {
			fd, err := unix.Open("/proc/1/ns/"+ns, unix.O_RDONLY, 0)
			if err != nil {
				fd, _ = unix.Open("/proc/self/ns/"+ns, unix.O_RDONLY, 0)
			}
			tell("setns "+ns, unix.Setns(fd, 0))
		}
		tell("uid_map", os.WriteFile("/proc/self/uid_map", []byte("0 0 1"), 0))
	},
	"capabilities": func(_ *target, tell func(string, error)) {
		all := [2]unix.CapUserData{{Effective: ^uint32(0), Permitted: ^uint32(0)}, {Effective: 0x1ff, Permitted: 0x1ff}}
		tell("capset", unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &all[0]))
		tell("ambient", unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, unix.CAP_SYS_ADMIN, 0, 0))
		tell("no_new_privs", unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0))
		tell("securebits", unix.Prctl(unix.PR_SET_SECUREBITS, 0, 0, 0, 0))
		tell("no filter", unix.Prctl(unix.PR_SET_SECCOMP, 0, 0, 0, 0))
		tell("memory map", unix.Prctl(unix.PR_SET_MM, unix.PR_SET_MM_EXE_FILE, 0, 0, 0))
	},

	// Execution of what is not allowed.
	"other programs": func(_ *target, tell func(string, error)) {
		for _, p := range []string{"/bin/sh", "/usr/bin/id", "/usr/bin/env", "/usr/bin/python3", "/usr/bin/perl", "/usr/bin/../bin/id", "/proc/self/root/bin/sh"} {
			tell(p, start(p))
		}
		tell("in a directory", func() error {
			if err := unix.Chdir("/usr/bin"); err != nil {
				return err
			}
			return start("./id")
		}())
	},
	"other programs by link": func(_ *target, tell func(string, error)) {
		for i, to := range []string{"/bin/sh", "/usr/bin/id", "/proc/1/exe"} {
			name := "./run" + strconv.Itoa(i)
			tell(to, errors.Join(os.Symlink(to, name), start(name)))
		}
	},
	"copies of programs": func(_ *target, tell func(string, error)) {
		for _, p := range []string{"/bin/sh", "/usr/bin/id"} {
			tell("read "+p, read(p))
		}
		self, err := os.ReadFile("/proc/self/exe")
		if err != nil {
			tell("own program", fmt.Errorf("cannot begin: %w", err))
			return
		}
		for _, dir := range []string{".", os.Getenv("TMPDIR"), "/tmp", "/dev/shm"} {
			name := filepath.Join(dir, "copy")
			if err := os.WriteFile(name, self, 0o700); err != nil {
				tell("own program in "+dir, fmt.Errorf("cannot begin: %w", err))
				continue
			}
			abs, _ := filepath.Abs(name)
			tell("own program in "+dir, start(abs, attackArgument, "nothing"))
			tell("loader on that", startOK(loaderPath, abs, attackArgument, "nothing"))
			_ = os.Remove(name)
		}
	},
	"scripts": func(_ *target, tell func(string, error)) {
		self, _ := os.Readlink("/proc/self/exe")
		for i, line := range []string{"#!" + self + " " + attackArgument, "#!/bin/sh", "#!/usr/bin/env sh"} {
			name := "./script" + strconv.Itoa(i)
			tell(line, errors.Join(os.WriteFile(name, []byte(line+"\n"), 0o700), start(name)))
		}
	},
	"the loader": func(_ *target, tell func(string, error)) {
		for _, p := range []string{"/bin/true", "/usr/bin/id", "/bin/sh"} {
			tell(p, startOK(loaderPath, p))
		}
	},
	"programs in memory": func(_ *target, tell func(string, error)) {
		fd, err := unix.MemfdCreate("x", 0)
		tell("memfd_create", err)
		if err == nil {
			self, _ := os.ReadFile("/proc/self/exe")
			_, _ = unix.Write(fd, self)
			tell("exec", start("/proc/self/fd/"+strconv.Itoa(fd), attackArgument, "nothing"))
		}
		self, err := unix.Open("/proc/self/exe", unix.O_PATH, 0)
		if err != nil {
			tell("own program", fmt.Errorf("cannot begin: %w", err))
			return
		}
		argv := [2]*byte{ptr("x"), nil}
		_, _, e := unix.RawSyscall6(unix.SYS_EXECVEAT, uintptr(self), cstring(""), uintptr(unsafe.Pointer(&argv)), 0, unix.AT_EMPTY_PATH, 0)
		tell("execveat without a name", fail(e))
		_, _, e = unix.Syscall(unix.SYS_MEMFD_SECRET, 0, 0, 0)
		tell("memfd_secret", fail(e))
		temp, err := unix.Open(".", unix.O_TMPFILE|unix.O_RDWR, 0o700)
		if err == nil {
			data, _ := os.ReadFile("/proc/self/exe")
			_, _ = unix.Write(temp, data)
			var ro int
			if ro, err = unix.Open("/proc/self/fd/"+strconv.Itoa(temp), unix.O_RDONLY, 0); err == nil {
				_ = unix.Close(temp)
				err = start("/proc/self/fd/"+strconv.Itoa(ro), attackArgument, "nothing")
			}
		}
		tell("a file without a name", err)
	},
	"code from written files": func(_ *target, tell func(string, error)) {
		for _, dir := range []string{".", os.Getenv("TMPDIR"), "/dev/shm"} {
			tell(dir, func() error {
				f, err := os.Create(filepath.Join(dir, "code"))
				if err != nil {
					return fmt.Errorf("cannot begin: %w", err)
				}
				defer f.Close()
				if err := f.Truncate(4096); err != nil {
					return fmt.Errorf("cannot begin: %w", err)
				}
				_, err = unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE)
				return err
			}())
		}
	},

	// Resources.
	"memory": func(*target, func(string, error)) {
		var all [][]byte
		for {
			b := make([]byte, 8<<20)
			for i := range b {
				b[i] = 1
			}
			all = append(all, b)
			_ = all
		}
	},
	"memory of many": func(*target, func(string, error)) {
		_ = start("/proc/self/exe", attackArgument, "memory")
		fmt.Println("{}")
	},
	"temporary directory": func(_ *target, tell func(string, error)) { tell("write", fillUp(os.Getenv("TMPDIR"), 4<<20)) },
	"/tmp":                func(_ *target, tell func(string, error)) { tell("write", fillUp("/tmp", 4<<20)) },
	"shared memory":       func(_ *target, tell func(string, error)) { tell("write", fillUp("/dev/shm", 4<<20)) },
	"one file":            func(_ *target, tell func(string, error)) { signal.Ignore(); tell("write", fillUp(".", 1<<30)) },
	"one file, signalled": func(_ *target, tell func(string, error)) { tell("write", fillUp(".", 1<<30)) },
	"many files": func(_ *target, tell func(string, error)) {
		for i := range 1 << 20 {
			f, err := os.Create(filepath.Join(os.Getenv("TMPDIR"), strconv.Itoa(i)))
			if err != nil {
				tell("create", err)
				return
			}
			_ = f.Close()
		}
		tell("create", nil)
	},
	"processor time":       func(*target, func(string, error)) { spin() },
	"processor time, deaf": func(*target, func(string, error)) { signal.Ignore(); spin() },
	"processor time of many": func(*target, func(string, error)) {
		for range 4 {
			_ = daemon(1)
		}
		<-time.After(time.Hour)
	},
	"descriptors": func(_ *target, tell func(string, error)) {
		tell("raise the limit", unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1 << 20, Max: 1 << 20}))
		for range 1 << 18 {
			if _, err := unix.Open("/dev/null", unix.O_RDONLY, 0); err != nil {
				tell("open", err)
				return
			}
		}
		tell("open", nil)
	},
	"limits": func(_ *target, tell func(string, error)) {
		for name, which := range map[string]int{"core": unix.RLIMIT_CORE, "file size": unix.RLIMIT_FSIZE, "processor": unix.RLIMIT_CPU} {
			tell(name, unix.Setrlimit(which, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}))
		}
		tell("of the first process", unix.Prlimit(1, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1, Max: 1}, nil))
	},
	"output": func(*target, func(string, error)) {
		line := []byte(strings.Repeat("x", 1000) + "\n")
		for {
			_, _ = os.Stdout.Write(line)
		}
	},
	"error output": func(*target, func(string, error)) {
		line := []byte(strings.Repeat("x", 1000) + "\n")
		for range 20000 {
			_, _ = os.Stderr.Write(line)
		}
		os.Exit(9)
	},

	// The kernel.
	"settings of the kernel": func(_ *target, tell func(string, error)) {
		for _, f := range []string{
			"sys/kernel/core_pattern", "sys/kernel/hostname", "sys/kernel/modprobe", "sys/kernel/randomize_va_space", "sys/vm/drop_caches", "sys/vm/overcommit_memory", "sysrq-trigger",
			"sys/fs/binfmt_misc/register", "sys/user/max_user_namespaces", "sys/net/core/somaxconn", "acpi/wakeup", "irq/0/smp_affinity",
		} {
			tell(f, os.WriteFile("/proc/"+f, []byte("1"), 0))
		}
	},
	"memory of the kernel": func(_ *target, tell func(string, error)) {
		for _, f := range []string{"/proc/kcore", "/proc/kmsg", "/proc/kpageflags", "/proc/vmallocinfo", "/proc/slabinfo", "/sys/kernel/debug", "/sys/kernel/security", "/sys/firmware", "/sys/class/net", "/boot"} {
			tell(f, read(f))
		}
	},
	"system calls": func(_ *target, tell func(string, error)) {
		for name, number := range map[string]uintptr{
			"bpf": unix.SYS_BPF, "perf_event_open": unix.SYS_PERF_EVENT_OPEN, "userfaultfd": unix.SYS_USERFAULTFD, "io_uring_setup": unix.SYS_IO_URING_SETUP,
			"io_uring_enter": unix.SYS_IO_URING_ENTER, "io_uring_register": unix.SYS_IO_URING_REGISTER, "keyctl": unix.SYS_KEYCTL, "add_key": unix.SYS_ADD_KEY,
			"request_key": unix.SYS_REQUEST_KEY, "kexec_load": unix.SYS_KEXEC_LOAD, "kexec_file_load": unix.SYS_KEXEC_FILE_LOAD, "init_module": unix.SYS_INIT_MODULE,
			"finit_module": unix.SYS_FINIT_MODULE, "delete_module": unix.SYS_DELETE_MODULE, "swapon": unix.SYS_SWAPON, "swapoff": unix.SYS_SWAPOFF, "reboot": unix.SYS_REBOOT,
			"acct": unix.SYS_ACCT, "quotactl": unix.SYS_QUOTACTL, "fanotify_init": unix.SYS_FANOTIFY_INIT, "syslog": unix.SYS_SYSLOG, "settimeofday": unix.SYS_SETTIMEOFDAY,
			"clock_settime": unix.SYS_CLOCK_SETTIME, "sethostname": unix.SYS_SETHOSTNAME, "setdomainname": unix.SYS_SETDOMAINNAME, "vhangup": unix.SYS_VHANGUP,
			"personality": unix.SYS_PERSONALITY, "move_pages": unix.SYS_MOVE_PAGES, "migrate_pages": unix.SYS_MIGRATE_PAGES, "process_madvise": unix.SYS_PROCESS_MADVISE,
		} {
			_, _, e := unix.Syscall6(number, 0, 0, 0, 0, 0, 0)
			tell(name, fail(e))
		}
	},
	"system calls by other numbers": func(_ *target, tell func(string, error)) {
		const x32 = 0x40000000
		for name, number := range map[string]uintptr{"getpid": x32 + unix.SYS_GETPID, "ptrace": x32 + 521, "mount": x32 + unix.SYS_MOUNT, "bpf": x32 + unix.SYS_BPF} {
			_, _, e := unix.Syscall6(number, 0, 0, 0, 0, 0, 0)
			tell(name, fail(e))
		}
	},
	"terminals": func(_ *target, tell func(string, error)) {
		b := byte('x')
		for name, request := range map[string]uintptr{"TIOCSTI": unix.TIOCSTI, "TIOCLINUX": unix.TIOCLINUX} {
			for fd := range uintptr(3) {
				_, _, e := unix.Syscall(unix.SYS_IOCTL, fd, request, uintptr(unsafe.Pointer(&b)))
				tell(name+" "+strconv.Itoa(int(fd)), fail(e))
			}
		}
	},
	"nothing": func(*target, func(string, error)) {},
}

const (
	loaderPath = "/lib64/ld-linux-x86-64.so.2"
	atCWD      = ^uintptr(99) // AT_FDCWD, -100
)

// attack is the attacker's main function.
func attack(args []string) {
	name := strings.Join(args, " ")
	if name == "sleep" {
		<-time.After(time.Hour)
	}
	if name == "spin" {
		spin()
	}
	var t target
	_ = json.Unmarshal([]byte(os.Getenv("SPECQL_INPUT")), &t) // empty for some
	got := map[string]string{}
	attacks[name](&t, func(try string, err error) {
		got[try] = "DONE"
		if e, ok := errors.AsType[syscall.Errno](err); ok {
			got[try] = unix.ErrnoName(e)
		} else if err != nil {
			got[try] = err.Error()
		}
	})
	_ = json.NewEncoder(os.Stdout).Encode(map[string]any{"got": got})
	os.Exit(0)
}

// victim is a job that others are to find nothing of.
func victim() {
	if err := os.WriteFile(filepath.Join(os.Getenv("TMPDIR"), "mark"), []byte("secret"), 0o666); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(os.Getenv("TMPDIR"))
	<-time.After(time.Hour)
}

func fail(e syscall.Errno) error {
	if e == 0 {
		return nil
	}
	return e
}

func ptr(s string) *byte { p, _ := unix.BytePtrFromString(s); return p }

func cstring(s string) uintptr { return uintptr(unsafe.Pointer(ptr(s))) }

// read opens a file or directory and takes something from it.
func read(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.IsDir() {
		_, err = f.Readdirnames(1)
		return err
	}
	_, err = f.Read(make([]byte, 1))
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func appendTo(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err == nil {
		_ = f.Close()
	}
	return err
}

func dial(network, address string) error {
	c, err := net.DialTimeout(network, address, 2*time.Second)
	if err == nil {
		_, err = c.Write([]byte("x"))
		_ = c.Close()
	}
	return err
}

// start executes a program; nil if the kernel did.
func start(path string, args ...string) error {
	cmd := exec.Command(path, args...)
	cmd.Path, cmd.Err = path, nil
	err := cmd.Run()
	if _, ran := errors.AsType[*exec.ExitError](err); ran {
		return nil
	}
	return err
}

// startOK executes a program through another; an error if that could not.
func startOK(path string, args ...string) error {
	err := exec.Command(path, args...).Run()
	if e, ran := errors.AsType[*exec.ExitError](err); ran && e.ExitCode() == 127 { // what the loader says
		return unix.EACCES
	}
	return err
}

// daemon leaves a process in a session of its own whose parent ends: one that sleeps, or spins.
func daemon(kind int) error {
	cmd := exec.Command("/proc/self/exe", attackArgument, map[int]string{0: "sleep", 1: "spin", 2: "sleep"}[kind])
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd.Start()
}

func spin() {
	for i := 0; ; i++ {
		_ = i
	}
}

// fill writes files of a size until it is told to stop.
func fillUp(dir string, size int) error {
	chunk := make([]byte, 1<<20)
	for i := range 64 {
		f, err := os.Create(filepath.Join(dir, "fill"+strconv.Itoa(i)))
		if err != nil {
			return err
		}
		for written := 0; written < size; written += len(chunk) {
			if _, err := f.Write(chunk); err != nil {
				return err
			}
		}
		_ = f.Close()
	}
	return nil
}
