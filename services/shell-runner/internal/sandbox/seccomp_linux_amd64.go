package sandbox

import (
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

const (
	auditArch = unix.AUDIT_ARCH_X86_64
	// x32 numbers have this bit, and reach the same calls by other numbers.
	x32Bit = 0x40000000
)

// otherABI refuses the second set of numbers that this architecture has.
func (f *filter) otherABI() {
	f.add(bpf.JumpIf{Cond: bpf.JumpLessThan, Val: x32Bit, SkipTrue: 1}, bpf.RetConstant{Val: retENOSYS})
}

var refusedHere = []uint32{unix.SYS_IOPL, unix.SYS_IOPERM, unix.SYS_MODIFY_LDT, unix.SYS_USELIB, unix.SYS_USTAT, unix.SYS_SYSFS, unix.SYS__SYSCTL, unix.SYS_CREATE_MODULE}

var setIDModesHere = map[uint32]uint32{unix.SYS_CHMOD: 1, unix.SYS_CREAT: 1, unix.SYS_MKDIR: 1, unix.SYS_MKNOD: 1}

// opensHere have the flags in the argument that is named, and the mode in the next.
var opensHere = map[uint32]uint32{unix.SYS_OPEN: 1}
