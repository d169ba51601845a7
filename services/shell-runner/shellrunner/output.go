package shellrunner

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/specql/mesh/pkg/runner"
)

const (
	maxStdout = 4 << 20
	// keptStderr is how much of the end of stderr is kept for the output and for errors.
	keptStderr = 64 << 10
	// errorTail is how much of the end of stderr an error shows.
	errorTail = 2 << 10
)

// stream reads what a command writes, line by line into the sink, and keeps a bounded part.
type stream struct {
	name string
	sink runner.Sink
	most int
	// tail keeps the end instead of the beginning.
	tail bool
	kept []byte
	// cut tells that more was written than was kept.
	cut  bool
	over chan struct{} // closed when cut becomes true
	line []byte
	skip bool // the rest of a line too long
}

func newStream(name string, sink runner.Sink, most int, tail bool) *stream {
	return &stream{name: name, sink: sink, most: most, tail: tail, over: make(chan struct{})}
}

// read takes everything until the end of the pipe, then closes it.
func (s *stream) read(r *os.File, done *sync.WaitGroup) {
	defer done.Done()
	defer func() { _ = r.Close() }()
	buf := make([]byte, 32<<10)
	for {
		n, err := r.Read(buf)
		s.keep(buf[:n])
		s.split(buf[:n])
		if err != nil { // the end, or the deadline for what holds the pipe beyond the job's end
			break
		}
	}
	if len(s.line) > 0 {
		s.flush()
	}
}

func (s *stream) keep(data []byte) {
	switch {
	case s.tail:
		s.kept = append(s.kept, data...)
		if len(s.kept) > 2*s.most {
			s.kept = append(s.kept[:0], s.kept[len(s.kept)-s.most:]...)
			s.cut = true
		}
	case len(s.kept)+len(data) > s.most:
		s.kept = append(s.kept, data[:s.most-len(s.kept)]...)
		if !s.cut {
			s.cut = true
			close(s.over)
		}
	default:
		s.kept = append(s.kept, data...)
	}
}

func (s *stream) split(data []byte) {
	for len(data) > 0 {
		part, rest, whole := bytes.Cut(data, []byte{'\n'})
		if !s.skip {
			room := runner.MaxLogLine - len(s.line)
			if len(part) > room {
				part, s.skip = part[:room], true
			}
			s.line = append(s.line, part...)
		}
		if whole {
			s.flush()
		}
		data = rest
	}
}

func (s *stream) flush() {
	s.sink.Log(s.name, text(bytes.TrimSuffix(s.line, []byte{'\r'})))
	s.line, s.skip = s.line[:0], false
}

// bytes gives what was kept, at most most bytes of it.
func (s *stream) bytes() []byte {
	if len(s.kept) > s.most {
		return s.kept[len(s.kept)-s.most:]
	}
	return s.kept
}

// text gives valid UTF-8 whatever the bytes are.
func text(b []byte) string {
	if utf8.Valid(b) {
		return string(b)
	}
	return strings.ToValidUTF8(string(b), "\uFFFD")
}

// end is the end of a text for an error, cut at a line where there is one.
func end(b []byte) string {
	b = bytes.TrimSpace(b)
	if len(b) <= errorTail {
		return text(b)
	}
	b = b[len(b)-errorTail:]
	if at := bytes.IndexByte(b, '\n'); at >= 0 && at < len(b)/2 {
		b = b[at+1:]
	}
	return "… " + strings.TrimLeft(text(b), "\uFFFD")
}

// result is stdout's JSON object, or its last line if that is one, else what the command wrote.
func result(stdout, stderr []byte, exitCode int) (json.RawMessage, error) {
	whole := bytes.TrimSpace(stdout)
	if object := object(whole); object != nil {
		return object, nil
	}
	if at := bytes.LastIndexByte(whole, '\n'); at >= 0 {
		if object := object(bytes.TrimSpace(whole[at+1:])); object != nil {
			return object, nil
		}
	}
	raw, err := marshal(struct {
		Stdout   string `json:"stdout"`
		Stderr   string `json:"stderr"`
		ExitCode int    `json:"exit_code"`
	}{text(stdout), text(stderr), exitCode})
	return raw, err
}

// object gives valid JSON text of an object, or nil.
func object(b []byte) json.RawMessage {
	if len(b) < 2 || b[0] != '{' || b[len(b)-1] != '}' || !json.Valid(b) {
		return nil
	}
	return json.RawMessage(text(b))
}

// feed writes the input to the command, which need not read it, and closes the pipe.
func feed(w *os.File, input []byte, done *sync.WaitGroup) {
	defer done.Done()
	_, _ = io.Copy(w, bytes.NewReader(input)) // a command that has read enough is no failure
	_ = w.Close()
}
