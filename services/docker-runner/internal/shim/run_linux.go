package shim

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/specql/mesh/pkg/runner/cgroup"
)

const (
	// lookInterval is how often the group is looked at while the program runs.
	lookInterval = 200 * time.Millisecond
	// tellEvery is after how many looks the figures are told.
	tellEvery = 5
	// maxErrors bounds what is told of stderr, in bytes.
	maxErrors = 8 << 20
	// drainTimeout bounds the wait for the last output of a program that has ended.
	drainTimeout = 5 * time.Second
	// failed is the exit status of a shim that cannot do its work.
	failed   = 125
	mebibyte = 1 << 20
)

// Main is the shim's program. It returns the exit status.
func Main(args []string, stdout, stderr io.Writer) int {
	runtime.GOMAXPROCS(1)
	debug.SetGCPercent(50)
	switch {
	case len(args) == 2 && args[0] == CommandInstall:
		if err := install(args[1]); err != nil {
			_, _ = fmt.Fprintln(stderr, "shim:", err)
			return failed
		}
		return 0
	case len(args) == 2 && args[0] == CommandRun:
		return Carrier{Job: args[1], Output: filepath.Join(OutputPlace, OutputFile), Groups: "/sys/fs/cgroup", LastWords: TerminationLog}.Run(stdout, stderr)
	case len(args) == 1 && args[0] == commandStart:
		start()
		return failed
	}
	_, _ = fmt.Fprintln(stderr, "shim: usage: shim install PATH | shim run FOLDER")
	return 2
}

// install copies this program.
func install(place string) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find own program: %w", err)
	}
	from, err := os.Open(self)
	if err != nil {
		return fmt.Errorf("install: %w", err)
	}
	defer func() { _ = from.Close() }()
	to, err := os.OpenFile(place, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o500) //nolint:gosec // it is to be executed
	if err != nil {
		return fmt.Errorf("install: %w", err)
	}
	_, err = io.Copy(to, from)
	if err := errors.Join(err, to.Chmod(0o555), to.Close()); err != nil {
		return fmt.Errorf("install: %w", err)
	}
	return nil
}

// Carrier carries out the job of one container.
type Carrier struct {
	// Job is the folder with the job's file and input.
	Job string
	// Output is the file that the program may leave its output in.
	Output string
	// Groups is where the container's own control groups are mounted.
	Groups string
	// LastWords is the file of the termination message; none if empty.
	LastWords string
	// Self is the shim's program; found if empty.
	Self string
}

// Run carries the job out and returns the program's exit status. Frames go to stdout.
func (c Carrier) Run(stdout, stderr io.Writer) int {
	// Other processes of the same user, the program's above all, get neither at this one's memory
	// nor at its stdout.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		_, _ = fmt.Fprintln(stderr, "shim: keep to itself:", err)
		return failed
	}
	// Processes that lose their parent become this one's, so that it can end them and count them.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		_, _ = fmt.Fprintln(stderr, "shim: adopt processes:", err)
		return failed
	}
	// The first process of a container gets signals that it handles alone; a runtime that is
	// sent one that it does not expect ends with a dump.
	signals := make(chan os.Signal, 16)
	signal.Notify(signals)
	defer signal.Stop(signals)

	r := &running{c: c, frames: NewFrames(stdout), began: time.Now(), signals: signals}
	r.group, _ = cgroup.Own(c.Groups) // what is not measured is absent
	report, err := r.run()
	if err != nil {
		report, err = &Report{ExitCode: failed, Start: err.Error()}, nil
	}
	if c.LastWords != "" {
		err = lastWords(c.LastWords, report)
	}
	if err := errors.Join(err, r.frames.Value(KindReport, report)); err != nil {
		_, _ = fmt.Fprintln(stderr, "shim: report:", err)
		return failed
	}
	return report.ExitCode
}

// lastWords goes over whatever the program wrote there.
func lastWords(place string, report *Report) error {
	text, err := json.Marshal(words{Report: *report, Key: os.Getenv(KeyVariable)})
	if err != nil {
		return fmt.Errorf("pack termination message: %w", err)
	}
	if err := os.WriteFile(place, text, 0o600); err != nil {
		return fmt.Errorf("write termination message: %w", err)
	}
	return nil
}

// running is a job in progress.
type running struct {
	c       Carrier
	spec    Spec
	frames  *Frames
	group   *cgroup.Group
	began   time.Time
	before  float64 // seconds of processor time of the group until then
	signals <-chan os.Signal

	mu     sync.Mutex
	child  int
	memory *float64
	full   bool
	ended  bool
	oom    bool
}

func (r *running) run() (*Report, error) {
	input, err := r.read()
	if err != nil {
		return nil, err
	}
	rx, tx := network()
	// What the container's own start took is nothing that the program used.
	if r.group != nil {
		if g, err := r.group.Stat(); err == nil && g.CPUSeconds != nil {
			r.before = *g.CPUSeconds
		}
	}
	r.began = time.Now()
	stdin, stdout, stderr, refused, child, err := r.begin()
	if err != nil {
		return nil, err
	}
	r.child = child
	go func() {
		// A program that does not read its input, or closes stdin, is no failure.
		_, _ = stdin.Write(append(input, '\n'))
		_ = stdin.Close()
	}()
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		var both sync.WaitGroup
		both.Go(func() { r.pass(stdout, KindStdout, KindStdoutPart, r.spec.MaxOutput, r.tooMuch) })
		both.Go(func() { r.pass(stderr, KindStderr, KindStderrPart, maxErrors, nil) })
		both.Wait()
	}()
	why, _ := io.ReadAll(io.LimitReader(refused, 4<<10)) // empty once the program runs
	_ = refused.Close()

	status := make(chan syscall.WaitStatus, 1)
	go r.reap(status)
	look := time.NewTicker(lookInterval)
	defer look.Stop()
	var end syscall.WaitStatus
	for looks := 1; ; looks++ {
		select {
		case end = <-status:
		case s := <-r.signals:
			if s == syscall.SIGTERM || s == syscall.SIGINT {
				r.mu.Lock()
				r.ended = true
				r.mu.Unlock()
				r.kill()
			}
			continue
		case <-look.C:
			u := r.usage(rx, tx)
			if looks%tellEvery == 0 {
				_ = r.frames.Value(KindUsage, u)
			}
			continue
		}
		break
	}
	r.kill() // what it left behind
	select {
	case <-drained:
	case <-time.After(drainTimeout):
	}
	report := &Report{ExitCode: exitCode(end), Start: string(why), Usage: r.usage(rx, tx)}
	r.mu.Lock()
	report.OOM, report.Full, report.Ended = r.oom, r.full, r.ended
	r.mu.Unlock()
	if report.Start != "" {
		report.ExitCode = failed
	}
	if report.ExitCode == 0 && !report.OOM && !report.Full {
		if err := r.output(report); err != nil {
			return nil, err
		}
	}
	return report, nil
}

// read reads the job.
func (r *running) read() ([]byte, error) {
	text, err := os.ReadFile(filepath.Join(r.c.Job, JobFile))
	if err != nil {
		return nil, fmt.Errorf("read the job: %w", err)
	}
	if err := json.Unmarshal(text, &r.spec); err != nil {
		return nil, fmt.Errorf("read the job: %w", err)
	}
	if len(r.spec.Program) == 0 {
		return nil, errors.New("the job names no program")
	}
	var input []byte
	for i := range r.spec.Parts {
		part, err := os.ReadFile(filepath.Join(r.c.Job, InputPart+strconv.Itoa(i)))
		if err != nil {
			return nil, fmt.Errorf("read the input: %w", err)
		}
		input = append(input, part...)
	}
	return input, nil
}

// begin starts the program: this one once more, which takes limits upon itself and becomes it.
// The last file tells why it could not.
func (r *running) begin() (stdin, stdout, stderr, refused *os.File, pid int, err error) {
	var files []*os.File
	pipe := func() (reader, writer *os.File) {
		if err != nil {
			return nil, nil
		}
		reader, writer, err = os.Pipe()
		files = append(files, reader, writer)
		return reader, writer
	}
	inR, inW := pipe()
	outR, outW := pipe()
	errR, errW := pipe()
	specR, specW := pipe()
	whyR, whyW := pipe()
	fail := func(err error) (*os.File, *os.File, *os.File, *os.File, int, error) {
		for _, f := range files {
			_ = f.Close()
		}
		return nil, nil, nil, nil, 0, fmt.Errorf("start: %w", err)
	}
	if err != nil {
		return fail(err)
	}
	self := r.c.Self
	if self == "" {
		if self, err = os.Executable(); err != nil {
			return fail(err)
		}
	}
	text, err := json.Marshal(r.spec)
	if err != nil {
		return fail(err)
	}
	process, err := os.StartProcess(self, []string{"shim", commandStart}, &os.ProcAttr{
		Env: r.environment(), Files: []*os.File{inR, outW, errW, specR, whyW}, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fail(err)
	}
	for _, f := range []*os.File{inR, outW, errW, specR, whyW} {
		_ = f.Close()
	}
	_, err = specW.Write(text)
	if err := errors.Join(err, specW.Close()); err != nil {
		_ = process.Kill()
	}
	pid = process.Pid
	_ = process.Release() // reaped with all others
	return inW, outR, errR, whyR, pid, nil
}

// environment is that of the image with the job's own over it. What Kubernetes adds says where the
// API of the cluster is, and is nobody's business; no more is the shim's key.
func (r *running) environment() []string {
	own := map[string]bool{KeyVariable: true}
	for _, v := range r.spec.Environment {
		name, _, _ := strings.Cut(v, "=")
		own[name] = true
	}
	env := slices.DeleteFunc(os.Environ(), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return own[name] || strings.HasPrefix(name, "KUBERNETES_")
	})
	if !slices.ContainsFunc(env, func(v string) bool { return strings.HasPrefix(v, "PATH=") }) {
		env = append(env, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	}
	return append(env, r.spec.Environment...)
}

// pass tells what the program writes, up to a bound.
func (r *running) pass(from *os.File, whole, part byte, most int64, over func()) {
	defer func() { _ = from.Close() }()
	buffer := make([]byte, 32<<10)
	told, cut := int64(0), false
	for {
		n, err := from.Read(buffer)
		data := buffer[:n]
		if told += int64(n); told > most {
			data = data[:max(0, int64(n)-(told-most))]
		}
		_ = r.frames.Lines(whole, part, data)
		if told > most && !cut {
			cut = true
			if over != nil {
				over()
			}
		}
		if err != nil {
			return
		}
	}
}

// tooMuch ends a program whose output is larger than one may be.
func (r *running) tooMuch() {
	r.mu.Lock()
	r.full = true
	r.mu.Unlock()
	r.kill()
}

// kill ends every process of the container but this one.
func (r *running) kill() {
	if os.Getpid() == 1 {
		_ = unix.Kill(-1, unix.SIGKILL)
		return
	}
	_ = unix.Kill(-r.child, unix.SIGKILL)
}

// reap collects every process that ends, until none is left, and tells how the program ended.
func (r *running) reap(status chan<- syscall.WaitStatus) {
	for {
		var s syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &s, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return // there is none left
		case pid == r.child && (s.Exited() || s.Signaled()):
			status <- s
		}
	}
}

func exitCode(s syscall.WaitStatus) int {
	if s.Signaled() {
		return 128 + int(s.Signal())
	}
	return s.ExitStatus()
}

// usage measures, and ends the program once the kernel has ended a part of it for its memory.
func (r *running) usage(rx, tx uint64) *Usage {
	u := &Usage{Seconds: time.Since(r.began).Seconds()}
	if nowRx, nowTx := network(); nowRx > 0 || nowTx > 0 {
		u.NetworkRxMB, u.NetworkTxMB = new(float64(nowRx-rx)/mebibyte), new(float64(nowTx-tx)/mebibyte)
	}
	if r.group == nil {
		return u
	}
	g, err := r.group.Stat()
	if err != nil {
		return u
	}
	r.mu.Lock()
	if g.MemoryMB != nil && *g.MemoryMB > 0 {
		r.memory = g.MemoryMB
	}
	kill := g.OOMKills > 0 && !r.oom
	r.oom = r.oom || g.OOMKills > 0
	if g.CPUSeconds != nil {
		u.CPUSeconds = new(max(*g.CPUSeconds-r.before, 0))
	}
	u.MemoryMB, u.PeakMemoryMB = r.memory, g.PeakMemoryMB
	u.DiskReadMB, u.DiskWriteMB = g.DiskReadMB, g.DiskWriteMB
	r.mu.Unlock()
	if r.group.Mode() == cgroup.V1 { // most goes through the page cache, which nobody is told of there
		u.DiskReadMB, u.DiskWriteMB = positive(u.DiskReadMB), positive(u.DiskWriteMB)
	}
	if kill {
		r.kill()
	}
	return u
}

func positive(v *float64) *float64 {
	if v == nil || *v <= 0 {
		return nil
	}
	return v
}

// network is what all interfaces but the loopback have received and sent, in bytes.
func network() (rx, tx uint64) {
	text, err := os.ReadFile("/proc/self/net/dev")
	if err != nil {
		return 0, 0
	}
	for line := range strings.Lines(string(text)) {
		name, figures, ok := strings.Cut(line, ":")
		fields := strings.Fields(figures)
		if !ok || strings.TrimSpace(name) == "lo" || len(fields) < 9 {
			continue
		}
		r, _ := strconv.ParseUint(fields[0], 10, 64)
		t, _ := strconv.ParseUint(fields[8], 10, 64)
		rx, tx = rx+r, tx+t
	}
	return rx, tx
}

// output tells what the program left in the output's file. Links are not followed, and pipes do
// not block.
func (r *running) output(report *Report) error {
	f, err := os.OpenFile(r.c.Output, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENXIO):
		report.Irregular = true
		return nil
	case err != nil:
		return fmt.Errorf("read the output: %w", err)
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("read the output: %w", err)
	}
	if !info.Mode().IsRegular() {
		report.Irregular = true
		return nil
	}
	if info.Size() > r.spec.MaxOutput {
		report.Full = true
		return nil
	}
	data, err := io.ReadAll(io.LimitReader(f, r.spec.MaxOutput))
	if err != nil {
		return fmt.Errorf("read the output: %w", err)
	}
	return r.frames.Lines(KindFile, KindFilePart, data)
}

// start becomes the program. It returns where it cannot, and has told why.
func start() {
	runtime.LockOSThread()
	why := os.NewFile(4, "why")
	unix.CloseOnExec(4)
	if err := become(os.NewFile(3, "spec")); err != nil {
		_, _ = io.WriteString(why, err.Error())
	}
}

func become(from *os.File) error {
	text, err := io.ReadAll(from)
	if err != nil {
		return fmt.Errorf("read what to run: %w", err)
	}
	_ = from.Close()
	var spec Spec
	if err := json.NewDecoder(bytes.NewReader(text)).Decode(&spec); err != nil {
		return fmt.Errorf("read what to run: %w", err)
	}
	program, err := exec.LookPath(spec.Program[0])
	if err != nil {
		return fmt.Errorf("there is no program %.200q: %w", spec.Program[0], errors.Unwrap(err))
	}
	if spec.FileBytes > 0 {
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: uint64(spec.FileBytes), Max: uint64(spec.FileBytes)}); err != nil {
			return fmt.Errorf("bound files: %w", err)
		}
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid new privileges: %w", err)
	}
	if spec.NoNetwork {
		if err := refuseSockets(); err != nil {
			return fmt.Errorf("take the network away: %w", err)
		}
	}
	// Last: the threads of this program's own count as well until it is the other.
	if spec.Processes > 0 {
		if err := unix.Setrlimit(unix.RLIMIT_NPROC, &unix.Rlimit{Cur: uint64(spec.Processes), Max: uint64(spec.Processes)}); err != nil {
			return fmt.Errorf("bound processes: %w", err)
		}
	}
	if err := syscall.Exec(program, spec.Program, os.Environ()); err != nil { //nolint:gosec // that is what it is for
		return fmt.Errorf("the program %.200q cannot be run: %w", program, err)
	}
	return nil
}
