package shim

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Offsets in the kernel's description of a system call.
const (
	offsetCall = 0
	offsetArch = 4
	offsetArg0 = 16
)

// Verdicts of a filter.
const (
	verdictAllow   = 0x7fff0000
	verdictRefuse  = 0x00050000 // with the error's number
	verdictNoCall  = verdictRefuse | uint32(unix.ENOSYS)
	verdictNoPlace = verdictRefuse | uint32(unix.EACCES)
)

// refuseSockets has the kernel refuse every socket that is not one of the file system, to this
// process and to whatever comes of it: a pod has a network of its own whether it is to use it or
// not, and what a NetworkPolicy holds depends on the cluster.
func refuseSockets() error {
	if architecture == 0 {
		return errors.New("this processor's system calls are not known")
	}
	program := []bpf.Instruction{
		bpf.LoadAbsolute{Off: offsetArch, Size: 4},
		// The calls of another architecture have other numbers.
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: architecture, SkipTrue: 1},
		bpf.RetConstant{Val: verdictNoCall},
		bpf.LoadAbsolute{Off: offsetCall, Size: 4},
		// So have those of the x32 interface.
		bpf.JumpIf{Cond: bpf.JumpLessThan, Val: 0x40000000, SkipTrue: 1},
		bpf.RetConstant{Val: verdictNoCall},
		// It makes sockets, too.
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.SYS_IO_URING_SETUP, SkipTrue: 1},
		bpf.RetConstant{Val: verdictNoCall},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.SYS_SOCKET, SkipTrue: 1},
		bpf.RetConstant{Val: verdictAllow},
		bpf.LoadAbsolute{Off: offsetArg0, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.AF_UNIX, SkipTrue: 1},
		bpf.RetConstant{Val: verdictNoPlace},
		bpf.RetConstant{Val: verdictAllow},
	}
	raw, err := bpf.Assemble(program)
	if err != nil {
		return fmt.Errorf("assemble filter: %w", err)
	}
	filter := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		filter[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}                                                                                         //nolint:gosec // a few
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog))); errno != 0 { //nolint:gosec // the call takes a pointer
		return fmt.Errorf("seccomp: %w", errno)
	}
	return nil
}
