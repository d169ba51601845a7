//go:build !linux

package main

import "github.com/specql/mesh/pkg/runner"

// hold leaves no core dump, where the system can.
func hold() []runner.Feature {
	return []runner.Feature{{Name: "no_core_dump", Detail: "this system is not Linux"}}
}
