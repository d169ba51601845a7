// Package sandbox starts a program shut into name spaces, a file tree of its own, Landlock and a
// filter of system calls.
//
// A launcher does the work: this program's own binary, executed again, whose [init] function
// takes over before main. Launchers that make name spaces are started ahead of need, and each
// carries one job: it is the first process of the job's PID name space, so that with it all
// goes. Where name spaces cannot be had, a launcher sets up what is left and becomes the job.
package sandbox

import (
	"syscall"
	"time"
)

// The names of what holds a job.
const (
	UserNamespace    = "user_namespace"
	PIDNamespace     = "pid_namespace"
	MountNamespace   = "mount_namespace"
	IPCNamespace     = "ipc_namespace"
	UTSNamespace     = "uts_namespace"
	NetworkNamespace = "network_namespace"
	PrivateProc      = "private_proc"
	OwnUID           = "own_uid"
	Landlock         = "landlock"
	Seccomp          = "seccomp"
	NoNewPrivileges  = "no_new_privileges"
	NoCapabilities   = "capabilities_dropped"
)

// Feature is one way of holding a job.
type Feature struct {
	Name      string
	Available bool
	// Detail says why it is not available, and the mend.
	Detail string
}

// Network is what a job can reach.
type Network int

// The networks.
const (
	// HostNetwork is the network of the runner.
	HostNetwork Network = iota
	// NoNetwork has nothing in it.
	NoNetwork
	// OwnLoopback has a loopback of the job's own.
	OwnLoopback
)

// Access is what a job may do in its working directory.
type Access int

// The accesses.
const (
	// NoAccess hides all but the job's script.
	NoAccess Access = iota
	// ReadAccess mounts it read-only.
	ReadAccess
	// FullAccess lets the job write, and executes nothing that is in it but allowed programs.
	FullAccess
)

// State is how a job's program ended.
type State struct {
	Status       syscall.WaitStatus
	User, System time.Duration
	// PeakKB is the largest memory of any one process, in KiB; 0 where it was not above that of the
	// launcher, from which the kernel counts on.
	PeakKB int64
	// Inblock and Oublock count blocks of 512 bytes.
	Inblock, Oublock int64
	// TempUsed is what the place for temporary files holds at the end, in bytes; 0 where it has no size.
	TempUsed int64
}

// Program is an allowed program.
type Program struct {
	// Listed is the path by which the policy names it, Path the file that this leads to.
	Listed, Path string
}
