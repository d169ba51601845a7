package faults

import "syscall"

// dieWithParent has a process killed when the thread that started it is gone.
func dieWithParent() *syscall.SysProcAttr { return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} }
