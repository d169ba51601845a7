// Specql runs workflows of HTTP, shell, Docker and serverless calls. See specql --help.
package main

import (
	"context"
	"os"
	"runtime/debug"

	"github.com/specql/mesh/cmd/specql/internal/command"
)

// version is set by the build: -ldflags "-X main.version=v2.0.0".
var version = ""

func main() {
	os.Exit(command.Execute(context.Background(), command.IO{
		In: os.Stdin, Out: os.Stdout, Err: os.Stderr, LookupEnv: os.LookupEnv, Version: programVersion(),
	}, os.Args[1:]))
}

func programVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return "development"
}
