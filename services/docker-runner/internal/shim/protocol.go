// Package shim is the entry point of a Job's container on Kubernetes, and what the runner and it
// say to each other. It starts the program that the service names, holds it to limits that a pod
// cannot have, measures it by the container's own control group, and tells all of that on stdout
// in frames that the program cannot forge.
package shim

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync"
)

// Places in the container.
const (
	// Place is the folder that the shim itself is put into, and Program its path there.
	Place   = "/.specql/shim"
	Program = Place + "/shim"
	// JobPlace is the folder with the job's file and the parts of its input.
	JobPlace = "/.specql/job"
	// JobFile is the name of the job's file, a [Spec], and InputPart the beginning of the names of
	// the parts of its input, which a number follows.
	JobFile   = "job.json"
	InputPart = "input."
	// OutputPlace is where the program may leave its output, as OutputFile.
	OutputPlace = "/specql"
	OutputFile  = "output.json"
	// TerminationLog is where Kubernetes reads the last words of a container.
	TerminationLog = "/dev/termination-log"
	// KeyVariable holds the key that the shim's last words have, and that the program does not get.
	KeyVariable = "SPECQL_SHIM_KEY"
)

// Commands of the shim.
const (
	// CommandInstall copies the shim to the path that follows.
	CommandInstall = "install"
	// CommandRun carries out the job in the folder that follows.
	CommandRun = "run"
	// commandStart becomes the program; it is the shim's own.
	commandStart = "start"
)

// Spec is what a container is to do.
type Spec struct {
	// Program is what runs: a name that is looked for in PATH, or a path; then its arguments.
	Program []string `json:"program"`
	// Environment is added to that of the image, as NAME=VALUE.
	Environment []string `json:"environment"`
	// Parts is how many parts the input has.
	Parts int `json:"parts"`
	// Processes bounds the processes and threads of the container's user, which is nobody else's
	// then; 0 for no bound.
	Processes int64 `json:"processes,omitempty"`
	// FileBytes bounds a file that the program writes; 0 for no bound.
	FileBytes int64 `json:"file_bytes,omitempty"`
	// NoNetwork has the kernel refuse every socket but those of the file system.
	NoNetwork bool `json:"no_network,omitempty"`
	// MaxOutput bounds stdout and the output's file, in bytes; beyond it the program is ended.
	MaxOutput int64 `json:"max_output"`
}

// Usage is what the container used; a figure that was not measured is absent.
type Usage struct {
	CPUSeconds   *float64 `json:"cpu,omitempty"`
	MemoryMB     *float64 `json:"mem,omitempty"`
	PeakMemoryMB *float64 `json:"peak,omitempty"`
	DiskReadMB   *float64 `json:"dr,omitempty"`
	DiskWriteMB  *float64 `json:"dw,omitempty"`
	NetworkRxMB  *float64 `json:"rx,omitempty"`
	NetworkTxMB  *float64 `json:"tx,omitempty"`
	// Seconds is how long the program has run.
	Seconds float64 `json:"s"`
}

// Report is the end of a job, as the shim saw it.
type Report struct {
	ExitCode int `json:"exit"`
	// OOM says that the kernel ended a process of the container for its memory.
	OOM bool `json:"oom,omitempty"`
	// Start says why the program could not be started; empty where it was.
	Start string `json:"start,omitempty"`
	// Full says that stdout or the output's file became larger than an output may be.
	Full bool `json:"full,omitempty"`
	// Irregular says that the output's file is no regular file.
	Irregular bool `json:"irregular,omitempty"`
	// Ended says that the container was told to end before the program had.
	Ended bool   `json:"ended,omitempty"`
	Usage *Usage `json:"usage,omitempty"`
}

// Kinds of frames.
const (
	// KindStdout is a line with its end.
	KindStdout = 'O'
	// KindStdoutPart is a piece of a line, without its end.
	KindStdoutPart = 'o'
	// KindStderr is a line with its end.
	KindStderr = 'E'
	// KindStderrPart is a piece of a line, without its end.
	KindStderrPart = 'e'
	// KindFile is a line of the output's file with its end.
	KindFile = 'F'
	// KindFilePart is a piece of one, without its end.
	KindFilePart = 'f'
	// KindUsage is a [Usage] while the program runs.
	KindUsage = 'U'
	// KindReport is the [Report], the last frame.
	KindReport = 'R'
)

// maxFrame is the longest text of a frame in bytes: kubelets and engines cut longer lines apart.
const maxFrame = 8 << 10

// Frame is one line of the shim's stdout.
type Frame struct {
	// Number counts from 0 without a gap.
	Number uint64
	Kind   byte
	Text   []byte
}

// Frames writes frames, from several goroutines.
type Frames struct {
	mu   sync.Mutex
	w    io.Writer
	next uint64
}

// NewFrames begins at number 0.
func NewFrames(w io.Writer) *Frames { return &Frames{w: w} }

// Write writes one frame. The text has no line feed.
func (f *Frames) Write(kind byte, text []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	line := make([]byte, 0, len(text)+24)
	line = strconv.AppendUint(line, f.next, 10)
	line = append(line, kind)
	line = append(line, text...)
	line = append(line, '\n')
	f.next++
	if _, err := f.w.Write(line); err != nil {
		return fmt.Errorf("write frame: %w", err)
	}
	return nil
}

// Value writes a frame of JSON.
func (f *Frames) Value(kind byte, value any) error {
	text, err := json.Marshal(value)
	if err != nil {
		return fmt.Errorf("pack frame: %w", err)
	}
	return f.Write(kind, text)
}

// Lines writes data as frames: whole for a line with its end, part for a piece of one.
func (f *Frames) Lines(whole, part byte, data []byte) error {
	for len(data) > 0 {
		n := bytes.IndexByte(data[:min(len(data), maxFrame+1)], '\n')
		if n >= 0 {
			if err := f.Write(whole, data[:n]); err != nil {
				return err
			}
			data = data[n+1:]
			continue
		}
		n = min(len(data), maxFrame)
		if err := f.Write(part, data[:n]); err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}

// ErrFrame is in the chain of errors of lines that are no frames.
var ErrFrame = errors.New("not a frame of the shim")

// FrameReader reads frames.
type FrameReader struct{ s *bufio.Scanner }

// NewFrameReader reads frames from r.
func NewFrameReader(r io.Reader) *FrameReader {
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 0, 16<<10), 64<<10)
	return &FrameReader{s: s}
}

// Next gives the next frame; its text is good until the next call. At the end it gives [io.EOF].
func (r *FrameReader) Next() (Frame, error) {
	if !r.s.Scan() {
		if err := r.s.Err(); err != nil {
			return Frame{}, fmt.Errorf("read frame: %w", err)
		}
		return Frame{}, io.EOF
	}
	return ParseFrame(r.s.Bytes())
}

// numberEnd is where the number that a line begins with ends.
func numberEnd(line []byte) int {
	for i, b := range line {
		if b < '0' || b > '9' {
			return i
		}
	}
	return len(line)
}

// ParseFrame reads one line without its end.
func ParseFrame(line []byte) (Frame, error) {
	end := numberEnd(line)
	if end == 0 || end == len(line) {
		return Frame{}, fmt.Errorf("%w: %.40q", ErrFrame, line)
	}
	n, err := strconv.ParseUint(string(line[:end]), 10, 64)
	if err != nil {
		return Frame{}, fmt.Errorf("%w: %.40q", ErrFrame, line)
	}
	switch kind := line[end]; kind {
	case KindStdout, KindStdoutPart, KindStderr, KindStderrPart, KindFile, KindFilePart, KindUsage, KindReport:
		return Frame{Number: n, Kind: kind, Text: line[end+1:]}, nil
	default:
		return Frame{}, fmt.Errorf("%w: %.40q", ErrFrame, line)
	}
}

// words are the last ones: the report, with the key that tells it from what the program wrote there
// before it found a way to end the shim.
type words struct {
	Report
	Key string `json:"key,omitempty"`
}

// ParseWords reads a termination message, and refuses one that does not have the Job's key.
func ParseWords(text []byte, key string) (*Report, error) {
	var w words
	if err := json.Unmarshal(text, &w); err != nil {
		return nil, fmt.Errorf("read the shim's last words: %w", err)
	}
	if key == "" || w.Key != key {
		return nil, errors.New("the last words are not the shim's")
	}
	return &w.Report, nil
}

// ParseReport reads the text of a report, as it is in a frame.
func ParseReport(text []byte) (*Report, error) {
	var r Report
	if err := json.Unmarshal(text, &r); err != nil {
		return nil, fmt.Errorf("read the shim's report: %w", err)
	}
	return &r, nil
}
