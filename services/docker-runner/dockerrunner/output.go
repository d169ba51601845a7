package dockerrunner

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"unicode/utf8"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

const (
	// maxOutput bounds stdout and output.json, in bytes.
	maxOutput = 4 << 20
	// maxErrorTail is how much of the end of stderr is kept, in bytes.
	maxErrorTail = 64 << 10
	// errorTail is how much of it an error's message shows, in bytes.
	errorTail = 2 << 10
	// maxLine bounds what is kept of a line of a log, in bytes. It is more than the kit shows
	// of one, so that a secret at the end of what is shown is whole here, and masked.
	maxLine = 2 * runner.MaxLogLine
	// maxDepth bounds the nesting of an output.
	maxDepth = 128
)

// stream passes what a container writes on as log lines. Of a line that is too long the
// beginning is passed on: a piece from its middle could hold half a secret, which nobody
// could tell any more.
type stream struct {
	name string
	sink runner.Sink
	line []byte
	// keep takes every byte as well.
	keep func([]byte)
}

// Write implements [io.Writer]; it never fails.
func (s *stream) Write(p []byte) (int, error) {
	s.keep(p)
	for rest := p; len(rest) > 0; {
		end := bytes.IndexByte(rest, '\n')
		part := rest
		if end >= 0 {
			part, rest = rest[:end], rest[end+1:]
		} else {
			rest = nil
		}
		s.line = append(s.line, part[:min(len(part), maxLine-len(s.line))]...)
		if end >= 0 {
			s.sink.Log(s.name, strings.TrimSuffix(string(s.line), "\r"))
			s.line = s.line[:0]
		}
	}
	return len(p), nil
}

// flush passes on a line without an end.
func (s *stream) flush() {
	if len(s.line) > 0 {
		s.sink.Log(s.name, string(s.line))
		s.line = s.line[:0]
	}
}

// head keeps the first bytes and says when there are too many.
type head struct {
	mu   sync.Mutex
	data []byte
	full chan struct{}
	once sync.Once
}

func newHead() *head { return &head{full: make(chan struct{})} }

func (h *head) add(p []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.data)+len(p) > maxOutput {
		h.once.Do(func() { close(h.full) })
		p = p[:maxOutput-len(h.data)]
	}
	h.data = append(h.data, p...)
}

func (h *head) bytes() []byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.data
}

// tail keeps the last bytes.
type tail struct {
	mu   sync.Mutex
	data []byte
}

func (t *tail) add(p []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.data = append(t.data, p...)
	if len(t.data) > 2*maxErrorTail {
		t.data = append(t.data[:0], t.data[len(t.data)-maxErrorTail:]...)
	}
}

func (t *tail) last(n int) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.ToValidUTF8(string(t.data[max(0, len(t.data)-n):]), "�")
}

// outputPlace is where a container writes its output.json. The runner mounts a bounded
// in-memory directory where the engine sees it. Elsewhere, with an engine on another host or
// a runner that may not mount, it is an anonymous volume that the engine is asked for: a
// tmpfs of the container's own would be gone when the container has ended.
type outputPlace struct {
	dir jobDir
	// volume: /specql is an anonymous volume.
	volume bool
}

// prime writes what describes the job, where that is given, and makes the output file in a volume, whose root
// belongs to root: so any user may write it. Nothing runs in the container yet.
func (o outputPlace) prime(ctx context.Context, c *client.Client, id string, job []byte) error {
	if !o.volume {
		if job == nil {
			return nil
		}
		name := filepath.Join(o.dir.path, jobFile)
		err := os.WriteFile(name, job, 0o400)
		if err == nil {
			err = os.Chmod(name, 0o444) //nolint:gosec // any user of the container may read it, whatever the runner's mask is
		}
		if err != nil {
			return fault.Wrap(err, fault.Unavailable, "write %s/%s: %v", outputMount, jobFile, err)
		}
		return nil
	}
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	if err := w.WriteHeader(&tar.Header{Name: outputFile, Typeflag: tar.TypeReg, Mode: 0o666}); err != nil {
		return fmt.Errorf("pack output file: %w", err)
	}
	if job != nil {
		if err := w.WriteHeader(&tar.Header{Name: jobFile, Typeflag: tar.TypeReg, Mode: 0o444, Size: int64(len(job))}); err != nil {
			return fmt.Errorf("pack %s: %w", jobFile, err)
		}
		if _, err := w.Write(job); err != nil {
			return fmt.Errorf("pack %s: %w", jobFile, err)
		}
	}
	if err := w.Close(); err != nil {
		return fmt.Errorf("pack output file: %w", err)
	}
	if _, err := c.CopyToContainer(ctx, id, client.CopyToContainerOptions{DestinationPath: outputMount, Content: &archive}); err != nil {
		return engineFault(err, "prepare "+outputMount)
	}
	return nil
}

// fromVolume reads output.json of a container that has ended; nil for none.
func (o outputPlace) fromVolume(ctx context.Context, c *client.Client, id string) ([]byte, error) {
	copied, err := c.CopyFromContainer(ctx, id, client.CopyFromContainerOptions{SourcePath: outputMount + "/" + outputFile})
	if cerrdefs.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, engineFault(err, "read "+outputMount+"/"+outputFile)
	}
	defer func() { _ = copied.Content.Close() }()
	archive := tar.NewReader(copied.Content)
	header, err := archive.Next()
	if err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, "read %s/%s: the engine's answer broke off", outputMount, outputFile)
	}
	if header.Typeflag != tar.TypeReg {
		return nil, notRegular()
	}
	return readBounded(archive)
}

// fromDir reads output.json of a container that is gone; nil for none. Whatever the container
// made of it, a link is not followed and a pipe does not block.
func (o outputPlace) fromDir() ([]byte, error) {
	fd, err := openNoFollow(filepath.Join(o.dir.path, outputFile))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENXIO):
		return nil, notRegular()
	case err != nil:
		return nil, fault.Wrap(err, fault.Internal, "read %s/%s: %v", outputMount, outputFile, err)
	}
	defer func() { _ = fd.Close() }()
	info, err := fd.Stat()
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, "read %s/%s: %v", outputMount, outputFile, err)
	}
	if !info.Mode().IsRegular() {
		return nil, notRegular()
	}
	return readBounded(fd)
}

func openNoFollow(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0) //nolint:gosec // the runner's own directory
}

func notRegular() error {
	return fault.New(fault.Validation, "%s/%s is not a regular file; write it as one", outputMount, outputFile)
}

func readBounded(r io.Reader) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxOutput+1))
	if err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, "read %s/%s: %s", outputMount, outputFile, clip(err.Error()))
	}
	if len(data) > maxOutput {
		return nil, tooLarge()
	}
	return data, nil
}

func tooLarge() error {
	return fault.New(fault.ResourceExceeded, "%s/%s is larger than the %d MiB that an output may have; write large results to a volume and give their place", outputMount, outputFile, maxOutput>>20)
}

// fileOutput makes the output of output.json.
func fileOutput(data []byte) (json.RawMessage, error) {
	if !utf8.Valid(data) {
		return nil, fault.New(fault.Validation, "%s/%s is not UTF-8", outputMount, outputFile)
	}
	if err := depth(data); err != nil {
		return nil, err
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, data); err != nil {
		return nil, fault.Wrap(err, fault.Validation, "%s/%s is not valid JSON: %v", outputMount, outputFile, err)
	}
	return compact.Bytes(), nil
}

// streamOutput makes the output of what the container wrote: stdout's JSON object, or its
// last line if that is one, else both streams as text.
func streamOutput(stdout []byte, stderr string, exitCode int) (json.RawMessage, error) {
	whole := bytes.TrimSpace(stdout)
	last := whole[bytes.LastIndexByte(whole, '\n')+1:]
	for _, candidate := range [][]byte{whole, bytes.TrimSpace(last)} {
		if len(candidate) == 0 || candidate[0] != '{' || !utf8.Valid(candidate) || !json.Valid(candidate) {
			continue
		}
		if err := depth(candidate); err != nil {
			return nil, err
		}
		var compact bytes.Buffer
		if err := json.Compact(&compact, candidate); err == nil {
			return compact.Bytes(), nil
		}
	}
	raw, err := json.Marshal(map[string]any{"stdout": strings.ToValidUTF8(string(stdout), "�"), "stderr": stderr, "exit_code": exitCode})
	if err != nil {
		return nil, fault.Wrap(err, fault.Internal, "the output cannot be packed")
	}
	if len(raw) > maxOutput {
		return nil, fault.New(fault.ResourceExceeded, "the output takes %d bytes as JSON, more than the %d MiB that an output may have", len(raw), maxOutput>>20)
	}
	return raw, nil
}

// depth bounds the nesting of JSON without decoding it.
func depth(data []byte) error {
	level, inString, escaped := 0, false, false
	for _, b := range data {
		switch {
		case escaped:
			escaped = false
		case inString:
			escaped, inString = b == '\\', b != '"'
		case b == '"':
			inString = true
		case b == '{' || b == '[':
			if level++; level > maxDepth {
				return fault.New(fault.Validation, "the output is nested deeper than %d levels", maxDepth)
			}
		case b == '}' || b == ']':
			level--
		}
	}
	return nil
}
