package faults

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// root is the top of the repository, seen from the folder that go test runs in.
const root = "../.."

// patience is how long a test waits for what has to come: long, since the machine may be slow and busy.
const patience = 2 * time.Minute

// programs builds what the tests run, once, and gives the folder that it is in. SPECQL_TEST_BIN is one with programs that are there
// already, such as those of a release.
var programs = sync.OnceValues(func() (string, error) {
	if dir := os.Getenv("SPECQL_TEST_BIN"); dir != "" {
		return dir, nil
	}
	dir, err := filepath.Abs(filepath.Join(root, ".cache", "bin"))
	if err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-o", dir+string(filepath.Separator), "./services/orchestrator", "./services/http-runner", "./services/serverless-runner", "./cmd/specql")
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the programs: %w\n%s", err, out)
	}
	return dir, nil
})

func program(t testing.TB, name string) string {
	t.Helper()
	dir, err := programs()
	require.NoError(t, err)
	return filepath.Join(dir, name)
}

// parent starts processes from one thread that lives as long as the tests, so that they die with it.
type parent struct {
	work chan func()
	once sync.Once
}

var nursery parent

func (p *parent) start(cmd *exec.Cmd) error {
	p.once.Do(func() {
		p.work = make(chan func())
		go func() {
			runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
			for f := range p.work {
				f()
			}
		}()
	})
	cmd.SysProcAttr = dieWithParent()
	started := make(chan error)
	p.work <- func() { started <- cmd.Start() }
	return <-started
}

func (p *parent) close() {
	p.once.Do(func() { p.work = make(chan func()) })
	close(p.work)
}

// process is a running program of the mesh. It logs JSON lines, one of which says that it is ready.
type process struct {
	name  string
	cmd   *exec.Cmd
	log   string // the file of its log
	began time.Time
	// ready gets the line that says so.
	ready chan map[string]any
	ended chan struct{}

	mu     sync.Mutex
	peakMB float64
}

// launch starts a program; its log goes to logs/NAME.log, after what was there.
func launch(logs, name, binary string, args ...string) (*process, error) {
	dir, err := programs()
	if err != nil {
		return nil, err
	}
	p := &process{
		name: name, log: filepath.Join(logs, name+".log"), began: time.Now(),
		cmd: exec.Command(filepath.Join(dir, binary), args...), ready: make(chan map[string]any, 1), ended: make(chan struct{}),
	}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	p.cmd.Env = []string{"LANG=C.UTF-8", "PATH=" + os.Getenv("PATH"), "HOME=" + logs}
	stderr, err := p.cmd.StderrPipe()
	if err == nil {
		err = nursery.start(p.cmd)
	}
	if err != nil {
		return nil, errors.Join(err, log.Close())
	}
	go func() {
		defer close(p.ended)
		lines := bufio.NewReader(stderr)
		for {
			line, err := lines.ReadBytes('\n')
			_, _ = log.Write(line)
			var entry map[string]any
			if json.Unmarshal(line, &entry) == nil && entry["msg"] == "ready" {
				select {
				case p.ready <- entry:
				default:
				}
			}
			if err != nil {
				break
			}
		}
		_ = p.cmd.Wait() // how it ended is in cmd.ProcessState
		_ = log.Close()
	}()
	return p, nil
}

// untilReady waits for the ready line and gives one of its fields.
func (p *process) untilReady(ctx context.Context, field string) (string, error) {
	select {
	case entry := <-p.ready:
		address, _ := entry[field].(string)
		return address, nil
	case <-p.ended:
		return "", fmt.Errorf("%s ended: %s; its log is %s", p.name, p.cmd.ProcessState, p.log)
	case <-ctx.Done():
		return "", fmt.Errorf("%s is not ready after %s; its log is %s", p.name, time.Since(p.began).Round(time.Second), p.log)
	}
}

func (p *process) signal(s syscall.Signal) { _ = p.cmd.Process.Signal(s) }

// stop halts the process until cont: it keeps its connections and answers nobody.
func (p *process) stop() { p.signal(syscall.SIGSTOP) }
func (p *process) cont() { p.signal(syscall.SIGCONT) }

// kill ends the process at once, also a stopped one, and waits until it is gone.
func (p *process) kill() {
	p.measure()
	p.signal(syscall.SIGKILL)
	<-p.ended
}

// alive says whether the process has not ended.
func (p *process) alive() bool {
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

// measure notes the most memory that the process has held so far, in MB, and gives it.
func (p *process) measure() float64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return p.peakMB
	}
	for line := range lines(string(status)) {
		var kb float64
		if _, err := fmt.Sscanf(line, "VmHWM: %f kB", &kb); err == nil {
			p.peakMB = max(p.peakMB, kb/1024)
		}
	}
	return p.peakMB
}
