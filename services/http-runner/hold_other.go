//go:build !linux

package main

import "github.com/specql/mesh/pkg/runner"

// hold narrows what this process may do, where the system can.
func hold() []runner.Feature {
	const detail = "this system is not Linux"
	return []runner.Feature{{Name: "no_core_dump", Detail: detail}, {Name: "read_only_files", Detail: detail}}
}
