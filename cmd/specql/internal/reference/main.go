// Command reference writes the pages of docs/reference that are made from the program itself:
// commands.md of the commands, and api.md of the protos, whose descriptors buf writes.
package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/specql/mesh/cmd/specql/internal/command"
)

func main() {
	descriptors := flag.String("descriptors", "", "the FileDescriptorSet of the protos, with source info: buf build -o FILE")
	dir := flag.String("o", "docs/reference", "the folder to write to")
	flag.Parse()
	if err := write(*descriptors, *dir); err != nil {
		fmt.Fprintln(os.Stderr, "reference:", err)
		os.Exit(1)
	}
}

func write(descriptors, dir string) error {
	data, err := os.ReadFile(descriptors)
	if err != nil {
		return fmt.Errorf("read the descriptors: %w", err)
	}
	set := &descriptorpb.FileDescriptorSet{}
	if err := proto.Unmarshal(data, set); err != nil {
		return fmt.Errorf("%s is no FileDescriptorSet: %w", descriptors, err)
	}
	api, err := apiPage(set)
	if err != nil {
		return err
	}
	var commands bytes.Buffer
	if err := command.Reference(&commands); err != nil {
		return err
	}
	for name, page := range map[string][]byte{"api.md": api, "commands.md": commands.Bytes()} {
		if err := os.WriteFile(filepath.Join(dir, name), page, 0o644); err != nil { //nolint:gosec // a page of the documentation
			return err
		}
	}
	return nil
}
