//go:build !linux

package cgroup

import (
	"os"
	"os/exec"
)

// Start fails: control groups are Linux's.
func (g *Group) Start(*exec.Cmd) error { return ErrUnavailable }

// Joins fails: control groups are Linux's.
func (g *Group) Joins() ([]*os.File, error) { return nil, ErrUnavailable }
