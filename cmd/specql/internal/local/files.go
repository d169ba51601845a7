// Package local runs the whole mesh in this process: the orchestrator and every runner, each
// behind its own listener, with mutual TLS between them. dev and demo are made of it.
package local

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/specql/mesh/pkg/spec"
)

// maxFile is the bound of a document.
const maxFile = 4 << 20

// ReadFile reads a document, named as it was asked for.
func ReadFile(name string) (spec.File, error) {
	info, err := os.Stat(name)
	if err != nil {
		return spec.File{}, err
	}
	if !info.Mode().IsRegular() {
		return spec.File{}, fmt.Errorf("%s is not a file", name)
	}
	if info.Size() > maxFile {
		return spec.File{}, fmt.Errorf("%s is larger than %d MiB", name, maxFile>>20)
	}
	raw, err := os.ReadFile(name)
	if err != nil {
		return spec.File{}, err
	}
	return spec.File{Name: name, Content: raw}, nil
}

// ReadEntities reads every .yaml and .yml file of a folder and the folders in it, sorted by name.
func ReadEntities(dir string) ([]spec.File, error) {
	var names []string
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && name != dir && strings.HasPrefix(d.Name(), ".") {
			return filepath.SkipDir
		}
		if ext := filepath.Ext(name); !d.IsDir() && (ext == ".yaml" || ext == ".yml") {
			names = append(names, name)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	files := make([]spec.File, 0, len(names))
	for _, name := range names {
		f, err := ReadFile(name)
		if err != nil {
			return nil, err
		}
		files = append(files, f)
	}
	return files, nil
}

// Exists says whether there is something of this name.
func Exists(name string) bool {
	_, err := os.Stat(name)
	return err == nil || !errors.Is(err, fs.ErrNotExist)
}

// unpack writes the files of an embedded file system to a folder. What is there already is
// replaced, so that an old copy never lives on.
func unpack(from fs.FS, dir string) error {
	return fs.WalkDir(from, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		target := filepath.Join(dir, filepath.FromSlash(name))
		if d.IsDir() {
			return os.MkdirAll(target, 0o755) //nolint:gosec // read by jobs that run as another user
		}
		raw, err := fs.ReadFile(from, name)
		if err != nil {
			return err
		}
		mode := fs.FileMode(0o644)
		if strings.HasPrefix(string(raw[:min(2, len(raw))]), "#!") {
			mode = 0o755
		}
		if err := os.WriteFile(target, raw, mode); err != nil {
			return err
		}
		return os.Chmod(target, mode)
	})
}
