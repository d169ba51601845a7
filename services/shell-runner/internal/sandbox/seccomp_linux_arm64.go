package sandbox

import "golang.org/x/sys/unix"

const auditArch = unix.AUDIT_ARCH_AARCH64

// otherABI: this architecture has one set of numbers; that of 32 bits has another name.
func (*filter) otherABI() {}

var (
	refusedHere    []uint32
	setIDModesHere map[uint32]uint32
	opensHere      map[uint32]uint32
)
