//go:build linux

package shim

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/specql/mesh/pkg/runner/cgroup"
)

// The test binary is the shim, and the programs that it runs.
const (
	asCarrier = "SHIM_TEST_CARRIER"
	asProgram = "SHIM_TEST_PROGRAM"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[0] == "shim" && os.Args[1] == commandStart {
		os.Exit(Main(os.Args[1:], os.Stdout, os.Stderr))
	}
	if text := os.Getenv(asCarrier); text != "" && os.Getenv(asProgram) == "" {
		var c Carrier
		if err := json.Unmarshal([]byte(text), &c); err != nil {
			os.Exit(failed)
		}
		os.Exit(c.Run(os.Stdout, os.Stderr))
	}
	if program := os.Getenv(asProgram); program != "" {
		os.Exit(play(program))
	}
	runtime.LockOSThread() // so that no test is on the first thread, where a group cannot be joined
	os.Exit(m.Run())
}

// play is a program that the shim runs.
func play(program string) int {
	report := func(v any) int {
		_ = json.NewEncoder(os.Stdout).Encode(v)
		return 0
	}
	switch program {
	case "echo":
		in, _ := io.ReadAll(os.Stdin)
		_, _ = os.Stdout.Write(in)
		_, _ = io.WriteString(os.Stderr, "a warning\nwithout an end")
		return 0
	case "environment":
		return report(os.Environ())
	case "output":
		_ = os.WriteFile(os.Getenv("OUT"), []byte("{\n \"a\": 1\n}"), 0o600)
		return 0
	case "link":
		_ = os.Symlink("/etc/passwd", os.Getenv("OUT"))
		return 0
	case "fail":
		_, _ = io.WriteString(os.Stderr, "no luck\n")
		return 3
	case "die":
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	case "flood":
		line := bytes.Repeat([]byte("x"), 1<<16)
		for {
			if _, err := os.Stdout.Write(line); err != nil {
				return 1
			}
		}
	case "hog":
		var kept [][]byte
		for range 400 {
			block := make([]byte, 1<<20)
			for i := range block {
				block[i] = byte(i)
			}
			kept = append(kept, block)
		}
		return len(kept)
	case "burn":
		// By its own count, however long that takes on a busy machine.
		var used syscall.Rusage
		for n := 0; time.Duration(used.Utime.Nano()+used.Stime.Nano()) < 300*time.Millisecond; n++ {
			if err := syscall.Getrusage(syscall.RUSAGE_SELF, &used); err != nil {
				return 1
			}
		}
		return report(map[string]bool{"burnt": true})
	case "sockets":
		_, tcp := net.Listen("tcp", "127.0.0.1:0")
		_, file := net.Listen("unix", filepath.Join(os.TempDir(), "s-"+strconv.Itoa(os.Getpid())))
		return report(map[string]string{"tcp": text(tcp), "unix": text(file)})
	case "steal":
		parent := "/proc/" + strconv.Itoa(os.Getppid())
		_, out := os.OpenFile(parent+"/fd/1", os.O_WRONLY, 0)
		_, memory := os.Open(parent + "/mem")
		_, environment := os.ReadFile(parent + "/environ")
		_ = os.WriteFile(os.Getenv("WORDS"), []byte(`{"exit":0,"usage":{"cpu":1e9}}`), 0o600)
		return report(map[string]string{"fd": text(out), "mem": text(memory), "environ": text(environment)})
	case "break":
		// As no handler of a runtime expects it: not the first process of a container survives that.
		_ = os.WriteFile(os.Getenv("WORDS"), []byte(`{"exit":2,"usage":{"cpu":0.001}}`), 0o600)
		var info [128]byte
		binary.NativeEndian.PutUint32(info[:], uint32(syscall.SIGSEGV))
		binary.NativeEndian.PutUint32(info[8:], math.MaxUint32) // SI_QUEUE
		_, _, errno := unix.Syscall(unix.SYS_RT_SIGQUEUEINFO, uintptr(os.Getppid()), uintptr(syscall.SIGSEGV), uintptr(unsafe.Pointer(&info)))
		return int(errno)
	case "leave":
		child := exec.Command("/proc/self/exe") //nolint:noctx // it is left behind
		child.Env = append(os.Environ(), asProgram+"=sleep")
		child.Stdout = os.Stdout
		if err := child.Start(); err != nil {
			return 1
		}
		return report(map[string]int{"pid": child.Process.Pid})
	case "sleep":
		select {}
	}
	return 99
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// done is what came of a run of the shim.
type done struct {
	stdout, stderr, file string
	usages               int
	report               *Report
	words                string
	code                 int
}

type job struct {
	t      *testing.T
	spec   Spec
	input  string
	groups string
	// start begins the shim, in place of its own method.
	start func(*exec.Cmd) error
	// during is called while it runs.
	during func(*os.Process)
	// dir is for the job, the output and the last words.
	dir string
	uid uint32
}

func (j job) command() *exec.Cmd {
	self, err := os.Executable()
	require.NoError(j.t, err)
	place := filepath.Join(j.dir, "job")
	require.NoError(j.t, os.MkdirAll(place, 0o755))
	if j.input != "" {
		half := len(j.input) / 2
		require.NoError(j.t, os.WriteFile(filepath.Join(place, InputPart+"0"), []byte(j.input[:half]), 0o644))
		require.NoError(j.t, os.WriteFile(filepath.Join(place, InputPart+"1"), []byte(j.input[half:]), 0o644))
		j.spec.Parts = 2
	}
	if j.spec.MaxOutput == 0 {
		j.spec.MaxOutput = 1 << 20
	}
	spec, err := json.Marshal(j.spec)
	require.NoError(j.t, err)
	require.NoError(j.t, os.WriteFile(filepath.Join(place, JobFile), spec, 0o644))
	carrier, err := json.Marshal(Carrier{Job: place, Output: filepath.Join(j.dir, OutputFile), Groups: j.groups, LastWords: filepath.Join(j.dir, "words"), Self: self})
	require.NoError(j.t, err)
	cmd := exec.CommandContext(j.t.Context(), self)
	cmd.Env = append(os.Environ(), asCarrier+"="+string(carrier), "KUBERNETES_SERVICE_HOST=10.0.0.1", KeyVariable+"=k3y", "SPECQL_INPUT=of the image", "TMPDIR="+j.dir)
	if j.uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: j.uid, Gid: j.uid}}
	}
	return cmd
}

func (j job) run() done {
	j.t.Helper()
	cmd := j.command()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	begin := (*exec.Cmd).Start
	if j.start != nil {
		begin = func(c *exec.Cmd) error { return j.start(c) }
	}
	require.NoError(j.t, begin(cmd))
	if j.during != nil {
		j.during(cmd.Process)
	}
	err := cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		require.NoError(j.t, err)
	}
	require.Empty(j.t, stderr.String())
	d := done{code: cmd.ProcessState.ExitCode()}
	words, err := os.ReadFile(filepath.Join(j.dir, "words"))
	require.NoError(j.t, err)
	d.words = string(words)
	next := uint64(0)
	for r := NewFrameReader(&stdout); ; next++ {
		f, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(j.t, err)
		require.Equal(j.t, next, f.Number)
		switch f.Kind {
		case KindStdout, KindStdoutPart:
			d.stdout += string(f.Text) + end(f.Kind == KindStdout)
		case KindStderr, KindStderrPart:
			d.stderr += string(f.Text) + end(f.Kind == KindStderr)
		case KindFile, KindFilePart:
			d.file += string(f.Text) + end(f.Kind == KindFile)
		case KindUsage:
			d.usages++
		case KindReport:
			d.report, err = ParseReport(f.Text)
			require.NoError(j.t, err)
		}
	}
	require.NotNil(j.t, d.report, "the shim always reports")
	return d
}

func end(whole bool) string {
	if whole {
		return "\n"
	}
	return ""
}

func newJob(t *testing.T, program string, more ...string) job {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, os.Chmod(dir, 0o777)) // for programs of another user
	require.NoError(t, os.Chmod(filepath.Dir(dir), 0o755))
	self, err := os.Executable()
	require.NoError(t, err)
	return job{t: t, dir: dir, groups: filepath.Join(dir, "none"), spec: Spec{
		Program:     append([]string{self}, more...),
		Environment: []string{asProgram + "=" + program, "OUT=" + filepath.Join(dir, OutputFile), "WORDS=" + filepath.Join(dir, "words")},
	}}
}

func TestInputAndOutput(t *testing.T) {
	t.Parallel()
	j := newJob(t, "echo")
	j.input = `{"name":"` + strings.Repeat("é", 20000) + `"}`
	d := j.run()
	require.Equal(t, j.input+"\n", d.stdout, "pieces come together again")
	require.Equal(t, "a warning\nwithout an end", d.stderr)
	require.Equal(t, 0, d.code)
	words, err := ParseWords([]byte(d.words), "k3y")
	require.NoError(t, err)
	require.Equal(t, d.report, words)
	_, err = ParseWords([]byte(d.words), "another")
	require.Error(t, err)

	d = newJob(t, "output").run()
	require.Equal(t, "{\n \"a\": 1\n}", d.file)
	d = newJob(t, "link").run()
	require.True(t, d.report.Irregular)
	require.Empty(t, d.file)
}

func TestEnvironment(t *testing.T) {
	t.Parallel()
	j := newJob(t, "environment")
	j.spec.Environment = append(j.spec.Environment, "GREETING=$(HOME) $x", "SPECQL_INPUT={}")
	var env []string
	require.NoError(t, json.Unmarshal([]byte(j.run().stdout), &env))
	require.Contains(t, env, "GREETING=$(HOME) $x")
	require.Contains(t, env, "SPECQL_INPUT={}", "the job's own goes over the image's")
	require.NotContains(t, env, "SPECQL_INPUT=of the image")
	for _, v := range env {
		require.NotContains(t, v, "KUBERNETES_")
		require.NotContains(t, v, "k3y")
	}
}

func TestEnds(t *testing.T) {
	t.Parallel()
	d := newJob(t, "fail").run()
	require.Equal(t, 3, d.code)
	require.Equal(t, 3, d.report.ExitCode)
	require.Equal(t, "no luck\n", d.stderr)
	d = newJob(t, "die").run()
	require.Equal(t, 137, d.report.ExitCode)
	require.False(t, d.report.OOM)

	j := newJob(t, "echo")
	j.spec.Program = []string{"no-such-program"}
	require.Contains(t, j.run().report.Start, `there is no program "no-such-program"`)
	j.spec.Program = []string{"/etc/passwd"}
	require.Contains(t, j.run().report.Start, "permission denied")
	j.spec.Program = nil
	require.Contains(t, j.run().report.Start, "the job names no program")
}

func TestStdoutIsBounded(t *testing.T) {
	t.Parallel()
	d := newJob(t, "flood").run()
	require.True(t, d.report.Full)
	require.Len(t, d.stdout, 1<<20)
}

func TestSignals(t *testing.T) {
	t.Parallel()
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		j := newJob(t, "sleep")
		j.during = func(p *os.Process) {
			require.Eventually(t, func() bool { return len(children(p.Pid)) > 0 }, 30*time.Second, 10*time.Millisecond)
			// What a program may send to the first process of its container changes nothing.
			require.NoError(t, p.Signal(syscall.SIGQUIT))
			require.NoError(t, p.Signal(syscall.SIGSEGV))
			require.NoError(t, p.Signal(s))
		}
		d := j.run()
		require.True(t, d.report.Ended)
		require.Equal(t, 137, d.report.ExitCode)
	}
}

func children(pid int) []string {
	text, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/task/" + strconv.Itoa(pid) + "/children")
	all := strings.Fields(string(text))
	tasks, _ := os.ReadDir("/proc/" + strconv.Itoa(pid) + "/task")
	for _, task := range tasks {
		text, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/task/" + task.Name() + "/children")
		all = append(all, strings.Fields(string(text))...)
	}
	return all
}

func TestNoNetwork(t *testing.T) {
	t.Parallel()
	j := newJob(t, "sockets")
	var got map[string]string
	require.NoError(t, json.Unmarshal([]byte(j.run().stdout), &got))
	require.Equal(t, map[string]string{"tcp": "", "unix": ""}, got)
	j = newJob(t, "sockets")
	j.spec.NoNetwork = true
	require.NoError(t, json.Unmarshal([]byte(j.run().stdout), &got))
	require.Contains(t, got["tcp"], "permission denied")
	require.Empty(t, got["unix"])
}

// TestTheProgramCannotSpeakForTheShim: with the same user, it gets neither at its stdout nor at its
// memory, and what it writes as last words is written over.
func TestTheProgramCannotSpeakForTheShim(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Log("not root: the test runs as its own user")
	}
	j := newJob(t, "steal")
	if os.Getuid() == 0 {
		j.uid = 54321
		open(t, j.spec.Program[0])
	}
	d := j.run()
	var got map[string]string
	require.NoError(t, json.Unmarshal([]byte(d.stdout), &got))
	require.Contains(t, got["fd"], "permission denied")
	require.Contains(t, got["mem"], "permission denied")
	require.Contains(t, got["environ"], "permission denied")
	require.NotContains(t, d.words, "1e9")
}

// TestWhoEndsTheShimIsNotBelieved: a program of the same user finds a way to end it, and what it left as last words is
// not taken for the shim's.
func TestWhoEndsTheShimIsNotBelieved(t *testing.T) {
	t.Parallel()
	j := newJob(t, "break")
	if os.Getuid() == 0 {
		j.uid = 54323
		open(t, j.spec.Program[0])
	}
	cmd := j.command()
	require.Error(t, cmd.Run())
	require.Equal(t, 2, cmd.ProcessState.ExitCode(), "the shim ended with what its runtime says of a fault")
	words, err := os.ReadFile(filepath.Join(j.dir, "words"))
	require.NoError(t, err)
	require.NotEmpty(t, words)
	_, err = ParseWords(words, "k3y")
	require.ErrorContains(t, err, "not the shim's")
}

// open lets any user execute the test binary.
func open(t *testing.T, path string) {
	t.Helper()
	for dir := filepath.Dir(path); dir != "/" && dir != "/tmp"; dir = filepath.Dir(dir) {
		require.NoError(t, os.Chmod(dir, 0o755))
	}
	require.NoError(t, os.Chmod(path, 0o755))
}

func TestProcessesAreBounded(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		return // the bound is of a user's processes, and the test's own has others
	}
	j := newJob(t, "leave")
	j.uid = 54322
	open(t, j.spec.Program[0])
	j.spec.Processes = 1
	d := j.run()
	require.NotEqual(t, 0, d.report.ExitCode, "a Go program alone has more threads: %s", d.stderr)
}

// groups gives a real control group, and the place where a container would have it mounted.
func groups(t *testing.T, l cgroup.Limits) (g *cgroup.Group, place string) {
	t.Helper()
	if mode, why := cgroup.Detect(); mode == cgroup.None {
		require.FailNow(t, "no control groups", why)
	}
	g, err := cgroup.New("shimtest", strings.ToLower(strings.ReplaceAll(t.Name(), "/", "-")), l)
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, g.Kill())
		require.NoError(t, g.Remove())
		_ = cgroup.Release("shimtest")
	})
	if g.Mode() == cgroup.V2 {
		return g, "/sys/fs/cgroup" + g.Path()
	}
	place = t.TempDir()
	for _, controller := range []string{"cpuacct", "memory", "blkio", "pids"} {
		at := filepath.Join("/sys/fs/cgroup", controller) + g.Path()
		if _, err := os.Stat(at); err == nil {
			require.NoError(t, os.Symlink(at, filepath.Join(place, controller)))
		}
	}
	return g, place
}

// inside begins a command in a group, by a thread that does nothing else meanwhile.
func inside(g *cgroup.Group) func(*exec.Cmd) error {
	return func(cmd *exec.Cmd) error {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		return g.Start(cmd)
	}
}

func TestMeasuresARealGroup(t *testing.T) {
	t.Parallel()
	g, place := groups(t, cgroup.Limits{})
	j := newJob(t, "burn")
	j.groups, j.start = place, inside(g)
	d := j.run()
	u := d.report.Usage
	require.NotNil(t, u.CPUSeconds)
	require.Greater(t, *u.CPUSeconds, 0.28)
	require.GreaterOrEqual(t, u.Seconds, 0.3)
	require.NotNil(t, u.PeakMemoryMB)
	require.Greater(t, *u.PeakMemoryMB, 0.5)
	require.NotNil(t, u.MemoryMB)
	require.False(t, d.report.OOM)
	require.Less(t, len(d.words), 4096, "Kubernetes cuts longer ones")
}

func TestTellsMemory(t *testing.T) {
	t.Parallel()
	g, place := groups(t, cgroup.Limits{MemoryMB: 64})
	if g.Mode() == cgroup.V2 {
		t.Log("v2: the whole group ends, and Kubernetes tells it")
		return
	}
	j := newJob(t, "hog")
	j.groups, j.start = place, inside(g)
	d := j.run()
	require.True(t, d.report.OOM)
	require.InDelta(t, 64, *d.report.Usage.PeakMemoryMB, 4)
}

func TestFrames(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	f := NewFrames(&b)
	data := append(bytes.Repeat([]byte("0123456789"), 3000), []byte("\n\n\xff\x00Ue\n")...)
	require.NoError(t, f.Lines(KindStdout, KindStdoutPart, data))
	for line := range bytes.Lines(b.Bytes()) {
		require.LessOrEqual(t, len(line), maxFrame+24)
	}
	var back []byte
	for r := NewFrameReader(&b); ; {
		f, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(t, err)
		back = append(back, f.Text...)
		if f.Kind == KindStdout {
			back = append(back, '\n')
		}
	}
	require.Equal(t, data, back)
	for _, wrong := range []string{"", "12", "x", "O", "1Zx", "99999999999999999999O", "-1O"} {
		_, err := ParseFrame([]byte(wrong))
		require.ErrorIs(t, err, ErrFrame, "%q", wrong)
	}
}

func FuzzFrame(f *testing.F) {
	f.Add([]byte("0Ohello"))
	f.Add([]byte(`7R{"exit":1,"usage":{"cpu":1}}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		frame, err := ParseFrame(line)
		if err != nil {
			return
		}
		var b bytes.Buffer
		frames := &Frames{w: &b, next: frame.Number}
		require.NoError(t, frames.Write(frame.Kind, frame.Text))
		again, err := ParseFrame(bytes.TrimSuffix(b.Bytes(), []byte("\n")))
		require.NoError(t, err)
		require.Equal(t, frame, again)
		_, _ = ParseReport(frame.Text)
	})
}
