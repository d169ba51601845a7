package sandbox

import (
	"bytes"
	"debug/elf"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
)

const (
	// maxInterpreters is how deep the kernel follows #! lines.
	maxInterpreters = 4
	maxShebang      = 256
)

// needs are what a program needs besides itself to be executed: the files that the kernel
// executes on its behalf.
type needs struct {
	size, mtime int64
	inode       uint64
	executed    []string
}

// of tells whether a file is the one that was looked at.
func (n needs) of(info os.FileInfo) bool {
	return n.size == info.Size() && n.mtime == info.ModTime().UnixNano() && n.inode == inode(info)
}

func inode(info os.FileInfo) uint64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Ino
	}
	return 0
}

var known sync.Map // path -> needs

// interpreters gives the files that the kernel executes with a program: the interpreter of its #!
// line and, where that is env, the program that it names; and the dynamic loader.
func interpreters(path string, depth int) []string {
	if info, err := os.Stat(path); err != nil || !info.Mode().IsRegular() {
		return nil
	} else if k, ok := known.Load(path); ok && k.(needs).of(info) { //nolint:forcetypeassert // there are no others
		return k.(needs).executed //nolint:forcetypeassert // as above
	}
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return nil
	}
	key := needs{size: info.Size(), mtime: info.ModTime().UnixNano(), inode: inode(info)}
	head := make([]byte, maxShebang)
	n, _ := f.ReadAt(head, 0)
	head = head[:n]
	switch {
	case bytes.HasPrefix(head, []byte("#!")):
		key.executed = shebang(head, depth)
	case bytes.HasPrefix(head, []byte(elf.ELFMAG)):
		key.executed = loader(f)
	}
	if depth == 0 {
		known.Store(path, key)
	}
	return key.executed
}

func shebang(head []byte, depth int) []string {
	if depth == maxInterpreters {
		return nil
	}
	line, _, _ := bytes.Cut(head[2:], []byte("\n"))
	words := strings.Fields(string(line))
	if len(words) == 0 || !filepath.IsAbs(words[0]) {
		return nil
	}
	names := words[:1]
	if filepath.Base(words[0]) == "env" {
		for _, w := range words[1:] {
			if strings.HasPrefix(w, "-") || strings.Contains(w, "=") {
				continue
			}
			for _, dir := range []string{"/usr/local/bin", "/usr/bin", "/bin"} {
				if p := filepath.Join(dir, w); !strings.Contains(w, "/") && isFile(p) {
					names = append(names, p)
					break
				}
			}
			break
		}
	}
	var all []string
	for _, name := range names {
		real, err := filepath.EvalSymlinks(name)
		if err != nil {
			continue
		}
		all = append(append(all, real), interpreters(real, depth+1)...)
	}
	return all
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

func loader(f *os.File) []string {
	image, err := elf.NewFile(f)
	if err != nil {
		return nil
	}
	for _, p := range image.Progs {
		if p.Type != elf.PT_INTERP || p.Filesz > 4096 {
			continue
		}
		name, err := io.ReadAll(io.LimitReader(p.Open(), 4096))
		if err != nil {
			return nil
		}
		if real, err := filepath.EvalSymlinks(string(bytes.TrimRight(name, "\x00"))); err == nil {
			return []string{real}
		}
	}
	return nil
}

// inSystem tells whether a resolved path is seen by every job.
func inSystem(path string) bool {
	return slices.ContainsFunc(system, func(dir string) bool { return below(dir, path) })
}

func below(dir, path string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

// support gives the directories that come with a program of an installation of its own: those
// named lib and so on next to the bin that it lies in, and the mark of a Python environment.
func support(p Program) []string {
	var found []string
	for _, path := range []string{p.Path, p.Listed} {
		dir := filepath.Dir(path)
		if base := filepath.Base(dir); base != "bin" && base != "sbin" || inSystem(path) {
			continue
		}
		for _, name := range []string{"lib", "lib64", "libexec", "share", "pyvenv.cfg"} {
			real, err := filepath.EvalSymlinks(filepath.Join(filepath.Dir(dir), name))
			if err == nil && !inSystem(real) && !slices.Contains(found, real) {
				found = append(found, real)
			}
		}
	}
	return found
}
