package sandbox

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Where the kernel's struct seccomp_data has its parts.
const (
	offsetNumber = 0
	offsetArch   = 4
	offsetArgs   = 16
)

const (
	retAllow = uint32(unix.SECCOMP_RET_ALLOW)
	retKill  = uint32(unix.SECCOMP_RET_KILL_PROCESS)
	retEPERM = uint32(unix.SECCOMP_RET_ERRNO) | uint32(unix.EPERM)
	// retENOSYS has programs use the older call, whose arguments a filter can see.
	retENOSYS = uint32(unix.SECCOMP_RET_ERRNO) | uint32(unix.ENOSYS)
)

const (
	namespaceFlags = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER | unix.CLONE_NEWPID |
		unix.CLONE_NEWNET | unix.CLONE_NEWTIME
	setIDBits = unix.S_ISUID | unix.S_ISGID
	// sysOpenTreeAttr is newer than the library.
	sysOpenTreeAttr = 467
)

// refused are the system calls that answer EPERM whatever their arguments are.
var refused = []uint32{
	// The file tree.
	unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT, unix.SYS_OPEN_TREE, unix.SYS_MOVE_MOUNT, unix.SYS_FSOPEN, unix.SYS_FSCONFIG,
	unix.SYS_FSMOUNT, unix.SYS_FSPICK, unix.SYS_MOUNT_SETATTR, sysOpenTreeAttr, unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_NAME_TO_HANDLE_AT,
	unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_QUOTACTL, unix.SYS_QUOTACTL_FD, unix.SYS_ACCT, unix.SYS_FANOTIFY_INIT,
	// Other processes and name spaces.
	unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_PROCESS_MADVISE, unix.SYS_KCMP, unix.SYS_PIDFD_GETFD, unix.SYS_SETNS,
	unix.SYS_MIGRATE_PAGES, unix.SYS_MOVE_PAGES,
	// The kernel.
	unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD, unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER,
	unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY, unix.SYS_KEYCTL, unix.SYS_KEXEC_LOAD, unix.SYS_KEXEC_FILE_LOAD, unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE,
	unix.SYS_DELETE_MODULE, unix.SYS_REBOOT, unix.SYS_SYSLOG, unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_ADJTIMEX, unix.SYS_CLOCK_ADJTIME,
	unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME, unix.SYS_VHANGUP, unix.SYS_LOOKUP_DCOOKIE, unix.SYS_NFSSERVCTL, unix.SYS_MEMFD_SECRET,
	unix.SYS_PERSONALITY,
	// A file in memory has no path that Landlock could hold, and can be executed by its descriptor.
	unix.SYS_MEMFD_CREATE,
}

// setIDModes are the system calls that give a file its mode, with the argument that holds it.
// What a job makes belongs to the owner of the working directory: a program that runs as its
// owner would carry the job's code out of the sandbox.
var setIDModes = map[uint32]uint32{
	unix.SYS_FCHMOD: 1, unix.SYS_FCHMODAT: 2, unix.SYS_FCHMODAT2: 2, unix.SYS_MKDIRAT: 2, unix.SYS_MKNODAT: 2,
}

// families are the kinds of sockets that there are. Others are not held by a name space for the
// network (AF_VSOCK leads to the host of a virtual machine), or seldom used and often broken.
var families = []uint32{unix.AF_UNIX, unix.AF_INET, unix.AF_INET6, unix.AF_NETLINK}

// filter collects the program of a filter.
type filter struct{ program []bpf.Instruction }

func (f *filter) add(i ...bpf.Instruction) { f.program = append(f.program, i...) }

// on runs a block for a system call; the block must end in a return.
func (f *filter) on(number uint32, block ...bpf.Instruction) {
	f.add(bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: number, SkipTrue: uint8(len(block))}) //nolint:gosec // blocks are short
	f.add(block...)
}

func argument(n uint32) bpf.Instruction { return bpf.LoadAbsolute{Off: offsetArgs + 8*n, Size: 4} }

// refuseBits refuses a system call with any of the bits in an argument, and allows it else.
func refuseBits(arg, bits uint32) []bpf.Instruction {
	return []bpf.Instruction{
		argument(arg),
		bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: bits, SkipFalse: 1},
		bpf.RetConstant{Val: retEPERM},
		bpf.RetConstant{Val: retAllow},
	}
}

// refuseValues refuses a system call with any of the values in an argument, and allows it else.
func refuseValues(arg uint32, values ...uint32) []bpf.Instruction {
	block := []bpf.Instruction{argument(arg)}
	for _, v := range values {
		block = append(block, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: v, SkipTrue: 1}, bpf.RetConstant{Val: retEPERM})
	}
	return append(block, bpf.RetConstant{Val: retAllow})
}

func allowValues(arg uint32, values ...uint32) []bpf.Instruction {
	block := []bpf.Instruction{argument(arg)}
	for _, v := range values {
		block = append(block, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: v, SkipTrue: 1}, bpf.RetConstant{Val: retAllow})
	}
	return append(block, bpf.RetConstant{Val: retEPERM})
}

// systemCalls is the filter of a job. With localOnly, it may make local sockets alone.
func systemCalls(localOnly bool) ([]unix.SockFilter, error) {
	f := &filter{}
	f.add(
		bpf.LoadAbsolute{Off: offsetArch, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: auditArch, SkipTrue: 1},
		bpf.RetConstant{Val: retKill},
		bpf.LoadAbsolute{Off: offsetNumber, Size: 4},
	)
	f.otherABI()
	for _, number := range append(refused, refusedHere...) {
		f.on(number, bpf.RetConstant{Val: retEPERM})
	}
	// What is behind the pointer of these cannot be seen.
	f.on(unix.SYS_CLONE3, bpf.RetConstant{Val: retENOSYS})
	f.on(unix.SYS_OPENAT2, bpf.RetConstant{Val: retENOSYS})

	f.on(unix.SYS_CLONE, refuseBits(0, namespaceFlags)...)
	f.on(unix.SYS_UNSHARE, refuseBits(0, namespaceFlags)...)
	// A file without a name is executed by its descriptor.
	f.on(unix.SYS_EXECVEAT, refuseBits(4, unix.AT_EMPTY_PATH)...)
	// The limits of others: the launcher has the job's user.
	f.on(unix.SYS_PRLIMIT64, allowValues(0, 0)...)
	f.on(unix.SYS_IOCTL, refuseValues(1, unix.TIOCSTI, unix.TIOCLINUX)...)
	for number, arg := range setIDModes {
		f.on(number, refuseBits(arg, setIDBits)...)
	}
	for number, arg := range setIDModesHere {
		f.on(number, refuseBits(arg, setIDBits)...)
	}
	for number, arg := range opensHere {
		f.on(number, createMode(arg)...)
	}
	f.on(unix.SYS_OPENAT, createMode(2)...)
	allowed := families
	if localOnly {
		allowed = []uint32{unix.AF_UNIX}
	}
	f.on(unix.SYS_SOCKET, allowValues(0, allowed...)...)
	f.on(unix.SYS_SOCKETPAIR, allowValues(0, unix.AF_UNIX)...)
	f.add(bpf.RetConstant{Val: retAllow})

	raw, err := bpf.Assemble(f.program)
	if err != nil {
		return nil, fmt.Errorf("assemble the filter of system calls: %w", err)
	}
	out := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		out[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	return out, nil
}

// createMode refuses an open that creates a file with the bits; arg has the flags, the next one
// the mode, which means nothing where no file is created.
func createMode(arg uint32) []bpf.Instruction {
	return append([]bpf.Instruction{
		argument(arg), bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: unix.O_CREAT, SkipTrue: 1}, bpf.RetConstant{Val: retAllow},
	}, refuseBits(arg+1, setIDBits)...)
}

// applyFilter holds this thread, and what it starts, to a filter. It needs no_new_privs.
func applyFilter(program []unix.SockFilter) error {
	prog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}                                            //nolint:gosec // some hundred instructions
	_, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&prog))) //nolint:gosec // the kernel reads a struct
	runtime.KeepAlive(program)
	if errno != 0 {
		return fmt.Errorf("filter system calls: %w", errno)
	}
	return nil
}

// haveSeccomp tells whether this kernel filters system calls as the filter wants it.
func haveSeccomp() error {
	action := retKill
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_GET_ACTION_AVAIL, 0, uintptr(unsafe.Pointer(&action))) //nolint:gosec // the kernel reads a struct
	if errno != 0 {
		return fmt.Errorf("the kernel does not filter system calls (%w); use one with CONFIG_SECCOMP_FILTER", errno)
	}
	return nil
}
