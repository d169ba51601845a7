package local

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	multiexecution "github.com/specql/mesh/examples/multi-execution"
	"github.com/specql/mesh/services/docker-runner/dockerrunner"
	"github.com/specql/mesh/services/docker-runner/dockerrunner/imagebuild"
)

// Image is the image of the examples' containers on a developer's machine. It is made here,
// from one program: no registry is needed.
const Image = "specql/demo:local"

const imageSource = "docker/demo-image"

// ErrNoEngine says that no Docker engine answers.
var ErrNoEngine = errors.New("no Docker engine answers")

// BuildImage makes the image. The error says why there is none: no engine answers
// ([ErrNoEngine]), or there is nothing to make it of.
func BuildImage(ctx context.Context) error {
	engine, err := dockerrunner.New(dockerrunner.Options{})
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNoEngine, err)
	}
	defer engine.Close()
	ping, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := engine.Ping(ping); err != nil {
		return fmt.Errorf("%w: %w", ErrNoEngine, err)
	}
	source, err := fs.Sub(multiexecution.FS, imageSource)
	if err != nil {
		return fmt.Errorf("the image's source: %w", err)
	}
	program, err := cached(source, func() ([]byte, error) { return compile(ctx, source) })
	if err != nil {
		return err
	}
	return imagebuild.FromBinary(ctx, "", Image, map[string][]byte{"/app": program}, []string{"/app"})
}

// cached keeps the program of this source in the user's cache folder: compiling takes longer
// than the rest of a start.
func cached(source fs.FS, compile func() ([]byte, error)) ([]byte, error) {
	digest := sha256.New()
	err := fs.WalkDir(source, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		raw, err := fs.ReadFile(source, name)
		_, _ = fmt.Fprintf(digest, "%s %d %s\n", name, len(raw), raw)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("the image's source: %w", err)
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return compile()
	}
	dir = filepath.Join(dir, "specql")
	file := filepath.Join(dir, fmt.Sprintf("demo-image-%s-%x", runtime.GOARCH, digest.Sum(nil)[:16]))
	if program, err := os.ReadFile(file); err == nil && static(program) {
		return program, nil
	}
	program, err := compile()
	if err != nil {
		return nil, err
	}
	// A cache that cannot be written costs time, nothing else.
	if os.MkdirAll(dir, 0o700) == nil && os.WriteFile(file+".new", program, 0o600) == nil {
		_ = os.Rename(file+".new", file)
	}
	return program, nil
}

// compile makes the image's program with the Go toolchain of the machine.
func compile(ctx context.Context, source fs.FS) ([]byte, error) {
	goTool, err := exec.LookPath("go")
	if err != nil {
		return nil, errors.New("the demo's image is compiled with Go, and there is no go command on the PATH")
	}
	dir, err := os.MkdirTemp("", "specql-image-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	if err := unpack(source, filepath.Join(dir, "src")); err != nil {
		return nil, err
	}
	// A module of its own, so that no workspace or proxy takes part.
	if err := os.WriteFile(filepath.Join(dir, "src", "go.mod"), []byte("module demo\n\ngo 1.24\n"), 0o600); err != nil {
		return nil, err
	}
	binary := filepath.Join(dir, "app")
	cmd := exec.CommandContext(ctx, goTool, "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", binary, ".") //nolint:gosec // the go command of the PATH
	cmd.Dir = filepath.Join(dir, "src")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=", "GOOS=linux", "GOTOOLCHAIN=local")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("compiling the demo's image: %w: %s", err, bytes.TrimSpace(out))
	}
	program, err := os.ReadFile(binary)
	if err != nil {
		return nil, err
	}
	if !static(program) {
		return nil, errors.New("the go command makes programs that need a C library, which the image has not")
	}
	return program, nil
}

// static says whether a program needs no loader.
func static(program []byte) bool {
	f, err := elf.NewFile(bytes.NewReader(program))
	if err != nil {
		return false
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return false
		}
	}
	return true
}
