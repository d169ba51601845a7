//go:build !linux

package main

import "github.com/specql/mesh/pkg/runner"

// hold narrows what this process may do, where the system can.
func hold() []runner.Feature {
	return []runner.Feature{runner.HideProcess(), {Name: "read_only_files", Detail: "this system is not Linux"}}
}
