package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// function is a deployed function. slots holds its execution environments that are idle.
type function struct {
	options functionOptions
	slots   chan *environment
	region  string
}

func (f *function) close() {
	for {
		select {
		case e := <-f.slots:
			e.stop()
		default:
			return
		}
	}
}

func (f *function) arn() string {
	return "arn:aws:lambda:" + f.region + ":000000000000:function:" + f.options.name
}

type invocation struct {
	id, clientContext, trace string
	payload                  []byte
	deadline                 time.Time
}

type outcome struct {
	payload       []byte
	functionError string
	log           []byte
}

// environment is one execution environment: a process and the Runtime API that it talks to.
// It carries out one invocation at a time.
type environment struct {
	function *function

	process *exec.Cmd
	exited  chan struct{}
	output  *os.File // stdout and stderr: a file, so that all is there when the answer is
	server  *http.Server

	mu       sync.Mutex
	started  time.Time
	initTime time.Duration
	idle     chan struct{} // signalled when the process asks for the next invocation
	next     chan invocation
	answers  chan outcome
	current  string
}

// run carries out one invocation and reports it as Lambda does.
func (e *environment) run(ctx context.Context, in invocation) outcome {
	var log strings.Builder
	cold := e.process == nil
	if cold {
		if err := e.start(); err != nil {
			e.stop()
			return unhandled("Runtime.InvalidEntrypoint", fmt.Sprintf("RequestId: %s Error: %v", in.id, err))
		}
		fmt.Fprintf(&log, "INIT_START Runtime Version: provided:al2023.stand-in\n")
	}
	timeout := time.NewTimer(e.function.options.timeout)
	defer timeout.Stop()
	out, dead := e.ready(ctx, in)
	offset := e.offset()
	if cold {
		offset = 0
	}
	fmt.Fprintf(&log, "START RequestId: %s Version: %s\n", in.id, e.function.options.version)
	begin := time.Now()
	if !dead {
		in.deadline = begin.Add(e.function.options.timeout)
		out, dead = e.invoke(in, timeout.C)
	}
	duration := time.Since(begin)
	peak := e.peakMB()
	log.Write(e.readFrom(offset))
	if dead {
		e.stop()
	}
	fmt.Fprintf(&log, "END RequestId: %s\n", in.id)
	ms := float64(duration.Microseconds()) / 1000
	billed := ms
	initField := ""
	if cold && e.initTime > 0 {
		i := float64(e.initTime.Microseconds()) / 1000
		billed += i
		initField = fmt.Sprintf("Init Duration: %.2f ms\t", i)
	}
	fmt.Fprintf(&log, "REPORT RequestId: %s\tDuration: %.2f ms\tBilled Duration: %.0f ms\tMemory Size: %d MB\tMax Memory Used: %d MB\t%s\n",
		in.id, ms, math.Ceil(billed), e.function.options.memoryMB, peak, initField)
	out.log = []byte(log.String())
	return out
}

// ready waits until the process asks for an invocation.
func (e *environment) ready(_ context.Context, in invocation) (outcome, bool) {
	select {
	case <-e.idle:
		return outcome{}, false
	case <-e.exited:
		return exitOutcome(in, e.process), true
	case <-time.After(10 * time.Second):
		return unhandled("Sandbox.Timedout", fmt.Sprintf("RequestId: %s Error: Task timed out after 10.00 seconds in init", in.id)), true
	}
}

// invoke hands the invocation over; it is complete when the process asks for the next one.
func (e *environment) invoke(in invocation, timeout <-chan time.Time) (outcome, bool) {
	e.mu.Lock()
	e.current = in.id
	e.mu.Unlock()
	select { // what an earlier invocation left
	case <-e.answers:
	default:
	}
	select {
	case e.next <- in:
	case <-e.exited:
		return exitOutcome(in, e.process), true
	}
	var out *outcome
	for {
		select {
		case o := <-e.answers:
			out = &o
		case <-e.idle:
			// The answer came before: the process asks one thing at a time.
			out = e.answered(out, unhandled("Runtime.NoResponse", "RequestId: "+in.id+" Error: no response"))
			e.idle <- struct{}{} // it stays idle
			return *out, false
		case <-e.exited:
			out = e.answered(out, exitOutcome(in, e.process))
			return *out, true
		case <-timeout:
			s := e.function.options.timeout.Seconds()
			o := unhandled("Sandbox.Timedout", fmt.Sprintf("RequestId: %s Error: Task timed out after %.2f seconds", in.id, s))
			return o, true
		}
	}
}

// answered is the answer that is there, else what stands for none.
func (e *environment) answered(out *outcome, none outcome) *outcome {
	if out != nil {
		return out
	}
	select {
	case o := <-e.answers:
		return &o
	default:
		return &none
	}
}

func unhandled(kind, message string) outcome {
	raw, _ := json.Marshal(map[string]string{"errorType": kind, "errorMessage": message})
	return outcome{payload: raw, functionError: "Unhandled"}
}

func exitOutcome(in invocation, process *exec.Cmd) outcome {
	return unhandled("Runtime.ExitError", fmt.Sprintf("RequestId: %s Error: Runtime exited with error: %v", in.id, process.ProcessState))
}

// start starts the process and its Runtime API.
func (e *environment) start() error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("runtime api: %w", err)
	}
	e.idle, e.next, e.answers = make(chan struct{}, 1), make(chan invocation), make(chan outcome, 1)
	e.server = &http.Server{Handler: e.runtimeAPI(), ReadHeaderTimeout: 5 * time.Second}
	go func() { _ = e.server.Serve(l) }()
	if e.output, err = os.CreateTemp("", "lambda-log-"); err != nil {
		return fmt.Errorf("log file: %w", err)
	}
	_ = os.Remove(e.output.Name()) // the descriptor is enough
	o := e.function.options
	cmd := exec.Command(o.program)
	cmd.Dir = os.TempDir()
	cmd.Stdout, cmd.Stderr = e.output, e.output
	cmd.Env = []string{
		"AWS_LAMBDA_RUNTIME_API=" + l.Addr().String(),
		"AWS_LAMBDA_FUNCTION_NAME=" + o.name,
		"AWS_LAMBDA_FUNCTION_VERSION=" + o.version,
		"AWS_LAMBDA_FUNCTION_MEMORY_SIZE=" + strconv.Itoa(o.memoryMB),
		"AWS_LAMBDA_INITIALIZATION_TYPE=on-demand",
		"AWS_LAMBDA_LOG_GROUP_NAME=/aws/lambda/" + o.name,
		"AWS_REGION=" + e.function.region, "AWS_DEFAULT_REGION=" + e.function.region,
		"AWS_EXECUTION_ENV=AWS_Lambda_provided.al2023", "_HANDLER=bootstrap", "LAMBDA_TASK_ROOT=/var/task",
		"LAMBDA_RUNTIME_DIR=/var/runtime", "TZ=:UTC", "LANG=en_US.UTF-8", "PATH=/usr/local/bin:/usr/bin:/bin",
	}
	e.started, e.initTime = time.Now(), 0
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", o.program, err)
	}
	exited := make(chan struct{})
	e.process, e.exited = cmd, exited
	go func() {
		_ = cmd.Wait()
		close(exited)
	}()
	return nil
}

// stop ends the process; the next invocation starts another.
func (e *environment) stop() {
	if e.process != nil {
		_ = e.process.Process.Kill()
		<-e.exited
	}
	if e.server != nil {
		_ = e.server.Close()
	}
	if e.output != nil {
		_ = e.output.Close()
	}
	e.process, e.server, e.output = nil, nil, nil
}

func (e *environment) offset() int64 {
	info, err := e.output.Stat()
	if err != nil {
		return 0
	}
	return info.Size()
}

func (e *environment) readFrom(offset int64) []byte {
	raw, err := io.ReadAll(io.NewSectionReader(e.output, offset, 1<<20))
	if err != nil {
		return nil
	}
	if n := len(raw); n > 0 && raw[n-1] != '\n' {
		raw = append(raw, '\n')
	}
	return raw
}

// peakMB is the most memory that the process had, in MB rounded up.
func (e *environment) peakMB() int {
	select {
	case <-e.exited:
		if u, ok := e.process.ProcessState.SysUsage().(*syscall.Rusage); ok {
			return int(u.Maxrss+1023) / 1024
		}
		return 0
	default:
	}
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", e.process.Process.Pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(raw)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kb, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")))
			if err == nil {
				return (kb + 1023) / 1024
			}
		}
	}
	return 0
}

// runtimeAPI is the documented Runtime API, version 2018-06-01.
func (e *environment) runtimeAPI() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /2018-06-01/runtime/invocation/next", e.handleNext)
	mux.HandleFunc("POST /2018-06-01/runtime/invocation/{id}/response", func(w http.ResponseWriter, r *http.Request) { e.handleAnswer(w, r, "") })
	mux.HandleFunc("POST /2018-06-01/runtime/invocation/{id}/error", func(w http.ResponseWriter, r *http.Request) {
		// The documented value of the header is Unhandled for what the runtime reports.
		e.handleAnswer(w, r, "Unhandled")
	})
	mux.HandleFunc("POST /2018-06-01/runtime/init/error", func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, io.LimitReader(r.Body, maxSync))
		w.WriteHeader(http.StatusAccepted)
	})
	return mux
}

func (e *environment) handleNext(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	if e.initTime == 0 {
		e.initTime = time.Since(e.started)
	}
	e.mu.Unlock()
	e.idle <- struct{}{}
	select {
	case in := <-e.next:
		h := w.Header()
		h.Set("Lambda-Runtime-Aws-Request-Id", in.id)
		h.Set("Lambda-Runtime-Deadline-Ms", strconv.FormatInt(in.deadline.UnixMilli(), 10))
		h.Set("Lambda-Runtime-Invoked-Function-Arn", e.function.arn())
		if in.clientContext != "" {
			h.Set("Lambda-Runtime-Client-Context", in.clientContext)
		}
		if in.trace != "" {
			h.Set("Lambda-Runtime-Trace-Id", in.trace)
		}
		h.Set("Content-Type", "application/json")
		_, _ = w.Write(in.payload)
	case <-r.Context().Done():
	}
}

func (e *environment) handleAnswer(w http.ResponseWriter, r *http.Request, functionError string) {
	e.mu.Lock()
	current := e.current
	e.mu.Unlock()
	if r.PathValue("id") != current {
		answer(w, http.StatusBadRequest, map[string]string{"errorType": "InvalidRequestID", "errorMessage": "not the invocation in progress"})
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxSync))
	if err != nil {
		var tooLarge *http.MaxBytesError
		if errors.As(err, &tooLarge) {
			e.deliver(unhandled("Function.ResponseSizeTooLarge", fmt.Sprintf("Response payload size exceeded maximum allowed payload size (%d bytes).", maxSync)))
		}
		w.WriteHeader(http.StatusRequestEntityTooLarge)
		return
	}
	e.deliver(outcome{payload: body, functionError: functionError})
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusAccepted)
	_, _ = io.WriteString(w, `{"status":"OK"}`)
}

// deliver keeps the first answer of an invocation.
func (e *environment) deliver(o outcome) {
	select {
	case e.answers <- o:
	default:
	}
}

// newID is a UUID.
func newID() string {
	var b [16]byte
	_, _ = rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
