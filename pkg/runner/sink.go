package runner

import (
	"strings"
	"sync"
	"unicode/utf8"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
)

// Bounds of what a job may say. What is more is dropped or refused, and that is said.
const (
	// MaxLogLine is the longest line in bytes; longer ones are cut.
	MaxLogLine = 16 << 10
	// MaxLogLines is how many lines of an attempt are passed on.
	MaxLogLines = 10_000
	// MaxLogBytes is how many bytes of lines of an attempt are passed on.
	MaxLogBytes = 4 << 20
	// MaxOutputBytes is the largest output.
	MaxOutputBytes = 4 << 20
	// MaxInputBytes is the largest input.
	MaxInputBytes = 4 << 20
	// maxRawLine bounds the work of masking a line before it is cut.
	maxRawLine = 1 << 20
	// maxErrorText bounds the message of a job's error.
	maxErrorText = 16 << 10
	// maxDetailText bounds the texts of a policy check.
	maxDetailText = 2 << 10
)

// sink is the [Sink] of one attempt.
type sink struct {
	feed *feed
	mask *masker

	mu      sync.Mutex
	closed  bool
	line    int64
	lines   int
	bytes   int
	dropped int64
}

func (s *sink) Log(stream, line string) {
	if stream != "stdout" && stream != "stderr" {
		stream = "runner"
	}
	for part := range strings.SplitSeq(strings.TrimRight(line, "\r\n"), "\n") {
		s.one(stream, part)
	}
}

func (s *sink) one(stream, line string) {
	s.mu.Lock()
	full := s.closed || s.lines >= MaxLogLines || s.bytes >= MaxLogBytes
	if full {
		if !s.closed {
			s.line++
			s.dropped++
		}
		s.mu.Unlock()
		return
	}
	s.mu.Unlock()

	text := s.clean(strings.TrimSuffix(line, "\r"), MaxLogLine) // the costly part, outside the lock

	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.line++
	if s.lines >= MaxLogLines || s.bytes+len(text) > MaxLogBytes {
		s.dropped++
		return
	}
	s.push(stream, text)
}

func (s *sink) push(stream, text string) {
	s.lines++
	s.bytes += len(text)
	s.feed.log(logEvent(s.line, stream, text))
}

// clean masks, makes valid UTF-8 without NUL, which databases refuse, and cuts.
func (s *sink) clean(text string, most int) string {
	if len(text) > maxRawLine {
		text = text[:maxRawLine]
	}
	text = s.mask.text(text)
	text = strings.ReplaceAll(strings.ToValidUTF8(text, "\uFFFD"), "\x00", "\uFFFD")
	return cut(text, most)
}

// cut shortens text to most bytes, between two characters.
func cut(text string, most int) string {
	if len(text) <= most {
		return text
	}
	for most > 0 && !utf8.RuneStart(text[most]) {
		most--
	}
	return text[:most]
}

func (s *sink) Usage(u *runnerv1.ResourceUsage) {
	if u == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.feed.measured(copyUsage(u))
	}
}

func (s *sink) Secret(value string) { s.mask.add(value) }

// close ends the log, and says what is missing from it.
func (s *sink) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.closed = true
	if s.dropped > 0 {
		s.line++
		s.push("runner", droppedText(s.dropped))
	}
}
