// Command shim is the entry point of a docker step's container on Kubernetes; an init container
// puts it there.
package main

import (
	"os"

	"github.com/specql/mesh/services/docker-runner/internal/shim"
)

func main() { os.Exit(shim.Main(os.Args[1:], os.Stdout, os.Stderr)) }
