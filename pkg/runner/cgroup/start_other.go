//go:build !linux

package cgroup

import "os/exec"

// Start fails: control groups are Linux's.
func (g *Group) Start(*exec.Cmd) error { return ErrUnavailable }
