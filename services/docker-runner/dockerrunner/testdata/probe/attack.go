//nolint:gosec,forbidigo // it does what it is told, in a container
package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// attacks try what a container is not to get. Each tells how every try ended: the name of the
// error, or DONE.
var attacks = map[string]func(got answers, args []string) error{
	"mounts": func(got answers, _ []string) error {
		got.add("tmpfs", unix.Mount("x", "/tmp", "tmpfs", 0, ""))
		got.add("proc", unix.Mount("proc", "/tmp", "proc", 0, ""))
		got.add("cgroup", unix.Mount("cgroup", "/tmp", "cgroup", 0, "memory"))
		got.add("overlay", unix.Mount("x", "/tmp", "overlay", 0, "lowerdir=/,upperdir=/tmp,workdir=/tmp"))
		got.add("bind", unix.Mount("/", "/tmp", "", unix.MS_BIND, ""))
		got.add("writable root", unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND, ""))
		got.add("writable /proc/sys", unix.Mount("", "/proc/sys", "", unix.MS_REMOUNT|unix.MS_BIND, ""))
		got.add("take a mask off", unix.Unmount("/proc/kcore", unix.MNT_DETACH))
		got.add("pivot_root", unix.PivotRoot("/tmp", "/tmp"))
		got.add("chroot", unix.Chroot("/tmp"))
		_, _, e := unix.Syscall(unix.SYS_FSOPEN, name("proc"), 0, 0)
		got.add("fsopen", e)
		_, _, e = unix.Syscall(unix.SYS_OPEN_TREE, 0, name("/"), unix.OPEN_TREE_CLONE)
		got.add("open_tree", e)
		got.add("mount_setattr", unix.MountSetattr(unix.AT_FDCWD, "/", 0, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}))
		return nil
	},
	"name spaces": func(got answers, _ []string) error {
		for name, flag := range map[string]int{"user": unix.CLONE_NEWUSER, "mount": unix.CLONE_NEWNS, "net": unix.CLONE_NEWNET, "pid": unix.CLONE_NEWPID, "ipc": unix.CLONE_NEWIPC, "uts": unix.CLONE_NEWUTS, "cgroup": unix.CLONE_NEWCGROUP, "time": unix.CLONE_NEWTIME} {
			got.add("unshare "+name, unix.Unshare(flag))
		}
		c := exec.Command("/probe")
		c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS}
		got.add("clone", c.Run())
		_, _, e := unix.Syscall(unix.SYS_CLONE3, 0, 0, 0)
		got.add("clone3", e)
		for _, ns := range []string{"mnt", "net", "pid", "user"} {
			fd, err := unix.Open("/proc/1/ns/"+ns, unix.O_RDONLY, 0)
			if err == nil {
				err = unix.Setns(fd, 0)
			}
			got.add("setns "+ns, err)
		}
		return nil
	},
	"capabilities": func(got answers, _ []string) error {
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		data := [2]unix.CapUserData{{Effective: ^uint32(0), Permitted: ^uint32(0), Inheritable: ^uint32(0)}}
		got.add("capset", unix.Capset(&header, &data[0]))
		got.add("ambient", unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, unix.CAP_SYS_ADMIN, 0, 0))
		got.add("setuid", rawID(unix.SYS_SETUID, 4242))
		got.add("setgid", rawID(unix.SYS_SETGID, 4242))
		_, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0)
		got.add("setgroups", e)
		got.add("securebits", unix.Prctl(unix.PR_SET_SECUREBITS, 1, 0, 0, 0))
		got.add("new privileges again", unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0))
		got.add("hostname", unix.Sethostname([]byte("x")))
		got.add("clock", unix.ClockSettime(unix.CLOCK_REALTIME, &unix.Timespec{Sec: 1}))
		got.add("chown", os.Chown("/tmp", 4242, 4242))
		got.add("nice", unix.Setpriority(unix.PRIO_PROCESS, 0, -20))
		_, _, e = unix.Syscall(unix.SYS_SCHED_SETSCHEDULER, 0, 1, ptr(&[1]int32{50}))
		got.add("real time", e)
		return nil
	},
	"devices": func(got answers, _ []string) error {
		for name, number := range map[string][2]uint32{"mem": {1, 1}, "kmsg": {1, 11}, "sda": {8, 0}, "vda": {254, 0}, "loop": {7, 0}, "fuse": {10, 229}, "kvm": {10, 232}, "null": {1, 3}} {
			for _, dir := range []string{"/tmp/", "/specql/", "/dev/"} {
				err := unix.Mknod(dir+name+".x", unix.S_IFBLK|0o600, int(unix.Mkdev(number[0], number[1])))
				if err == nil {
					_, err = os.ReadFile(dir + name + ".x")
				}
				got.add("make "+dir+name, err)
			}
		}
		for _, name := range []string{"/dev/mem", "/dev/kmem", "/dev/kmsg", "/dev/port", "/dev/sda", "/dev/vda", "/dev/fuse", "/dev/kvm", "/dev/net/tun", "/dev/vsock", "/dev/loop-control"} {
			got.add(name, read(name))
		}
		return nil
	},
	"settings of the kernel": func(got answers, _ []string) error {
		for _, name := range []string{
			"/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sys/vm/overcommit_memory", "/proc/sys/kernel/hostname", "/proc/sys/net/ipv4/ip_forward",
			"/proc/sys/fs/binfmt_misc/register", "/proc/sysrq-trigger", "/proc/irq/default_smp_affinity", "/sys/kernel/uevent_helper", "/sys/fs/cgroup/memory/memory.limit_in_bytes",
			"/sys/fs/cgroup/pids/pids.max", "/sys/fs/cgroup/cgroup.procs", "/sys/fs/cgroup/memory/release_agent", "/sys/kernel/mm/ksm/run", "/sys/power/state", "/sys/module/kernel/parameters/panic",
		} {
			f, err := os.OpenFile(name, os.O_WRONLY, 0)
			if err == nil {
				_, err = f.WriteString("1")
			}
			got.add(name, err)
		}
		return nil
	},
	"memory of the kernel": func(got answers, _ []string) error {
		for _, name := range []string{"/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/proc/interrupts", "/sys/firmware/acpi/tables/DSDT", "/sys/kernel/debug/x", "/sys/kernel/tracing/trace"} {
			got.add(name, read(name))
		}
		return nil
	},
	"system calls": func(got answers, _ []string) error {
		calls := map[string][4]uintptr{
			"bpf":               {unix.SYS_BPF, 0, 0, 0},
			"perf_event_open":   {unix.SYS_PERF_EVENT_OPEN, 0, 0, 0},
			"add_key":           {unix.SYS_ADD_KEY, name("user"), name("x"), 0},
			"keyctl":            {unix.SYS_KEYCTL, 0, ^uintptr(2), 0},
			"request_key":       {unix.SYS_REQUEST_KEY, name("user"), name("x"), 0},
			"init_module":       {unix.SYS_INIT_MODULE, 0, 0, 0},
			"finit_module":      {unix.SYS_FINIT_MODULE, 0, name(""), 0},
			"delete_module":     {unix.SYS_DELETE_MODULE, name("x"), 0, 0},
			"kexec_load":        {unix.SYS_KEXEC_LOAD, 0, 0, 0},
			"open_by_handle_at": {unix.SYS_OPEN_BY_HANDLE_AT, 0, name("xxxxxxxxxxxx"), 0},
			"reboot":            {unix.SYS_REBOOT, 0xfee1dead, 672274793, 0x1234567},
			"swapon":            {unix.SYS_SWAPON, name("/tmp/x"), 0, 0},
			"acct":              {unix.SYS_ACCT, name("/tmp/x"), 0, 0},
			"quotactl":          {unix.SYS_QUOTACTL, 0, 0, 0},
			"userfaultfd":       {unix.SYS_USERFAULTFD, 0, 0, 0},
			"syslog":            {unix.SYS_SYSLOG, 3, 0, 0},
			"iopl":              {unix.SYS_IOPL, 3, 0, 0},
			"vhangup":           {unix.SYS_VHANGUP, 0, 0, 0},
			"settimeofday":      {unix.SYS_SETTIMEOFDAY, ptr(&[2]int64{1, 1}), 0, 0},
			"move_pages":        {unix.SYS_MOVE_PAGES, 1, 0, 0},
			"setdomainname":     {unix.SYS_SETDOMAINNAME, name("x"), 1, 0},
		}
		for name, c := range calls {
			_, _, e := unix.Syscall6(c[0], c[1], c[2], c[3], 0, 0, 0)
			got.add(name, e)
		}
		return nil
	},
	"io_uring": func(got answers, _ []string) error {
		_, _, e := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, ptr(&[30]uint32{}), 0)
		got.add("io_uring_setup", e)
		return nil
	},
	"processes of the host": func(got answers, args []string) error {
		pid, _ := strconv.Atoi(args[0])
		got.add("kill", unix.Kill(pid, 0))
		got.add("trace", unix.PtraceAttach(pid))
		got.add("see", read("/proc/"+args[0]+"/cmdline"))
		all, err := filepath.Glob("/proc/[0-9]*")
		if err != nil {
			return err
		}
		if len(all) > 2 { // the init process and this one
			got["count"] = strconv.Itoa(len(all))
		}
		got.add("its root", read("/proc/1/root/"+args[1]))
		got.add("its directory", read("/proc/1/cwd/../../../.."+args[1]))
		got.add("its environment", absent("/proc/1/environ", args[2]))
		return nil
	},
	"files of the host": func(got answers, args []string) error {
		for _, name := range args {
			got.add(name, read(name))
		}
		for _, p := range []string{"/proc/self/root/../../..", "/proc/self/cwd/../../..", "/proc/self/fd/../../../.."} {
			got.add(p, read(p+args[0]))
		}
		for fd := 3; fd < 64; fd++ { // what the runtime did not close
			if link, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd)); err == nil && !strings.HasPrefix(link, "anon_inode:") && !strings.HasPrefix(link, "/sys/fs/cgroup/") { // the last is of the Go runtime
				got["descriptor "+strconv.Itoa(fd)] = link
			}
		}
		return nil
	},
	"write the root": func(got answers, _ []string) error {
		for _, dir := range []string{"/", "/etc", "/proc", "/proc/sys", "/sys", "/sys/fs/cgroup"} {
			got.add(dir, os.WriteFile(filepath.Join(dir, "x"), nil, 0o600))
		}
		for _, file := range []string{"/probe", "/etc/hosts", "/etc/resolv.conf", "/etc/hostname"} {
			f, err := os.OpenFile(file, os.O_WRONLY, 0)
			if err == nil {
				_, err = f.WriteString("x")
			}
			got.add(file, err)
		}
		got.add("mode", os.Chmod("/probe", 0o6755))
		got.add("remove", os.Remove("/probe"))
		return nil
	},
	"the network": func(got answers, args []string) error {
		for _, to := range append([]string{"192.0.2.1:80", "172.17.0.1:22", "[2001:db8::1]:80", "127.0.0.1:22"}, args...) {
			_, err := net.DialTimeout("tcp", to, 2*time.Second)
			got.add(to, err)
		}
		_, err := net.LookupHost("example.com")
		if err == nil {
			got["names"] = "DONE"
		}
		return nil
	},
	"raw sockets": func(got answers, _ []string) error {
		for name, s := range map[string][3]int{"raw": {unix.AF_INET, unix.SOCK_RAW, 1}, "packet": {unix.AF_PACKET, unix.SOCK_RAW, 0x300}, "bluetooth": {31, unix.SOCK_RAW, 1}, "alg": {unix.AF_ALG, unix.SOCK_SEQPACKET, 0}} {
			fd, err := unix.Socket(s[0], s[1], s[2])
			if err == nil && name == "alg" { // only what is in the kernel's own interest: no harm by itself
				err = unix.EPERM
				_ = unix.Close(fd)
			}
			got.add(name, err)
		}
		return nil
	},
	"sockets of the host": func(got answers, args []string) error {
		for _, name := range args {
			_, err := net.DialTimeout("unix", name, 2*time.Second)
			got.add(name, err)
		}
		return nil
	},
	"shared memory of the host": func(got answers, args []string) error {
		key, _ := strconv.Atoi(args[0])
		_, err := unix.SysvShmGet(key, 0, 0)
		got.add("shmget", err)
		got.add("/dev/shm", read("/dev/shm/"+args[1]))
		return nil
	},
	"programs in memory": func(got answers, _ []string) error {
		self, err := os.ReadFile("/proc/self/exe")
		if err != nil {
			return err
		}
		for _, dir := range []string{"/tmp", "/specql", "/dev/shm"} {
			name := filepath.Join(dir, "copy")
			if err := os.WriteFile(name, self, 0o755); err != nil {
				got.add(dir, err)
				continue
			}
			got.add(dir, exec.Command(name).Run())
		}
		return nil
	},
	"limits": func(got answers, _ []string) error {
		got.add("core", unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: 1 << 30, Max: 1 << 30}))
		got.add("nofile", unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1 << 20, Max: 1 << 20}))
		got.add("fsize", unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 1 << 40, Max: 1 << 40}))
		got.add("oom", os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0))
		return nil
	},
	"many files": func(got answers, args []string) error {
		for _, dir := range args {
			var err error
			for i := 0; i < 1<<17 && err == nil; i++ {
				err = os.WriteFile(filepath.Join(dir, strconv.Itoa(i)), nil, 0o600)
			}
			got.add(dir, err)
		}
		return nil
	},
	"one file": func(got answers, args []string) error {
		signal.Ignore(unix.SIGXFSZ)
		f, err := os.Create(args[0])
		if err != nil {
			return err
		}
		got.add("write", write(f, 256))
		got.add("grow", f.Truncate(1<<40))
		return nil
	},
	"set-ID": func(got answers, args []string) error {
		got.add("chmod", os.Chmod(args[0], 0o4755))
		return nil
	},
	"fill": func(got answers, args []string) error {
		for _, dir := range args {
			f, err := os.Create(filepath.Join(dir, "fill"))
			if err != nil {
				got.add(dir, err)
				continue
			}
			got.add(dir, write(f, 1024))
			_ = f.Close()
			_ = os.Remove(f.Name())
		}
		return nil
	},
}

// write writes so many MiB.
func write(f *os.File, mb int) error {
	chunk := make([]byte, 1<<20)
	for range mb {
		if _, err := f.Write(chunk); err != nil {
			return err
		}
	}
	return nil
}

// answers are how tries ended.
type answers map[string]string

func (a answers) add(try string, err error) {
	var e syscall.Errno
	switch {
	case errors.As(err, &e) && e == 0, err == nil:
		a[try] = "DONE"
	case errors.As(err, &e):
		if a[try] = unix.ErrnoName(e); a[try] == "" {
			a[try] = e.Error()
		}
	case errors.Is(err, fs.ErrNotExist):
		a[try] = "ENOENT"
	case errors.Is(err, os.ErrDeadlineExceeded):
		a[try] = "TIMEOUT"
	case errors.Is(err, io.EOF):
		a[try] = "EMPTY"
	default:
		a[try] = fmt.Sprint(err)
	}
}

// read reads a byte of a file: EOF for an empty one.
func read(name string) error {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	_, err = f.Read(make([]byte, 1))
	return err
}

// absent is an error where a file does not hold a text, or cannot be read.
func absent(name, text string) error {
	data, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	if strings.Contains(string(data), text) {
		return nil
	}
	return fs.ErrNotExist
}

func rawID(call uintptr, id int) error {
	_, _, e := unix.RawSyscall(call, uintptr(id), 0, 0)
	return e
}

var kept []any // what the kernel is given must stay where it is

func name(s string) uintptr {
	b := append([]byte(s), 0)
	kept = append(kept, b)
	return uintptr(unsafe.Pointer(&b[0]))
}

func ptr[T any](v *T) uintptr {
	kept = append(kept, v)
	return uintptr(unsafe.Pointer(v))
}

// attack makes an attack and shows how it ended.
func attack(args []string) error {
	f := attacks[args[0]]
	if f == nil {
		return fmt.Errorf("no such attack: %s", args[0])
	}
	got := answers{}
	if err := f(got, args[1:]); err != nil {
		return err
	}
	return show(map[string]any{"got": got})
}

// endless are attacks that do not end by themselves, or end the program.
func endless(args []string) error {
	switch args[0] {
	case "fork bomb":
		for {
			_ = exec.Command("/proc/self/exe", "endless", "fork bomb").Start()
		}
	case "fork bomb that ends":
		end := time.Now().Add(2 * time.Second)
		for time.Now().Before(end) {
			if exec.Command("/proc/self/exe", "sleep", "1h").Start() != nil {
				time.Sleep(10 * time.Millisecond)
			}
		}
		return errors.New("no more processes")
	case "memory of many":
		for range 8 {
			if err := exec.Command("/proc/self/exe", "hog", "64").Start(); err != nil {
				return err
			}
		}
		time.Sleep(time.Hour)
	case "memory as files":
		f, err := os.Create(filepath.Join(args[1], "fill"))
		if err != nil {
			return err
		}
		return write(f, 1024)
	case "deaf":
		signal.Ignore()
		fmt.Println("sleeping")
		for {
			time.Sleep(time.Hour)
		}
	case "stop":
		fmt.Println("sleeping")
		_ = unix.Kill(os.Getpid(), unix.SIGSTOP)
		_ = unix.Kill(-1, unix.SIGSTOP)
		for {
			time.Sleep(time.Hour)
		}
	case "kill itself":
		return unix.Kill(os.Getpid(), unix.SIGKILL)
	case "stderr":
		line := []byte(strings.Repeat("e", 1000) + "\n")
		for range 50_000 {
			if _, err := os.Stderr.Write(line); err != nil {
				return err
			}
		}
		os.Exit(9)
	case "a line without end":
		chunk := []byte(strings.Repeat("x", 1<<16))
		for {
			if _, err := os.Stdout.Write(chunk); err != nil {
				return err
			}
		}
	case "deep":
		_, err := os.Stdout.WriteString(`{"a":` + strings.Repeat("[", 1_000_000) + strings.Repeat("]", 1_000_000) + "}\n")
		return err
	case "control characters":
		fmt.Print("\x1b[2J\x1b]0;owned\x07\r\x00\u202e" + "::set-output name=x::y\n")
		return nil
	case "socket":
		l, err := net.Listen("unix", args[1])
		if err != nil {
			return err
		}
		l.(*net.UnixListener).SetUnlinkOnClose(false)
		return l.Close()
	case "hard link":
		return os.Link("/proc/self/exe", args[1])
	}
	return fmt.Errorf("no such attack: %s", args[0])
}
