package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/specql/mesh/pkg/client"
	"github.com/specql/mesh/pkg/mesh"
)

// startWait is how long a program may take to say that it is ready.
const startWait = time.Minute

// program is a running process of the mesh.
type program struct {
	name  string
	cmd   *exec.Cmd
	ready chan string
	done  chan struct{}
}

// start starts a program that logs JSON lines to stderr and waits until one of them says ready.
func start(ctx context.Context, logs, name, path string, args ...string) (*program, string, error) {
	p := &program{name: name, cmd: exec.Command(path, args...), ready: make(chan string, 1), done: make(chan struct{})} //nolint:gosec // built here
	log, err := os.Create(filepath.Join(logs, name+".log"))                                                             //nolint:gosec // our own folder
	if err != nil {
		return nil, "", err
	}
	p.cmd.Env = append(os.Environ(), "SPECQL_LOG_FORMAT=json")
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		return nil, "", errors.Join(err, log.Close())
	}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return nil, "", errors.Join(err, log.Close())
	}
	go func() {
		defer close(p.done)
		lines := bufio.NewScanner(stderr)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			_, _ = fmt.Fprintln(log, lines.Text())
			var entry struct{ Msg, API, Address string }
			if json.Unmarshal(lines.Bytes(), &entry) == nil && entry.Msg == "ready" {
				select {
				case p.ready <- entry.API + entry.Address:
				default:
				}
			}
		}
		_ = p.cmd.Wait() // how it ended is seen by who needs it
		_ = log.Close()
	}()
	timer := time.NewTimer(startWait)
	defer timer.Stop()
	select {
	case address := <-p.ready:
		return p, address, nil
	case <-p.done:
		return nil, "", fmt.Errorf("%s ended at its start: see %s", name, log.Name())
	case <-timer.C:
	case <-ctx.Done():
	}
	p.end()
	return nil, "", fmt.Errorf("%s was not ready within %s: see %s", name, startWait, log.Name())
}

// end asks the process to end, and makes it.
func (p *program) end() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may be gone
	timer := time.NewTimer(15 * time.Second)
	defer timer.Stop()
	select {
	case <-p.done:
	case <-timer.C:
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// system is an orchestrator and a runner, each a process, with mutual TLS between them and to the client.
type system struct {
	orchestrator, runner *program
	client               *client.Client
	// flags are those of the orchestrator, but for where the runner is.
	flags []string
	// address is that of the runner.
	address string
}

const registry = `services:
  - name: bench
    type: bench
    category: bench
    execution_type: noop
    operations:
      - {name: noop}
      - name: fibonacci
        input_schema: {n: integer}
        output_schema: {value: integer}
`

// programs builds what is measured, as a release is built.
func programs(ctx context.Context, root, dir string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", dir+string(filepath.Separator), "./services/orchestrator", "./cmd/specql") //nolint:gosec // our own
	cmd.Dir, cmd.Env = root, append(os.Environ(), "GOWORK=")                                                                                     // this program is built without the workspace, and may be run so
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build the programs: %w\n%s", err, out)
	}
	cmd = exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", dir+string(filepath.Separator), "./noop-runner") //nolint:gosec // our own
	cmd.Dir, cmd.Env = filepath.Join(root, "bench"), append(os.Environ(), "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build the runner: %w\n%s", err, out)
	}
	return nil
}

func startSystem(ctx context.Context, ca *mesh.Authority, bin, dir, database string) (_ *system, err error) {
	out, err := exec.CommandContext(ctx, filepath.Join(bin, "specql"), "migrate-schema", "--database", database).CombinedOutput() //nolint:gosec // built here
	if err != nil {
		return nil, fmt.Errorf("migrate-schema: %w\n%s", err, out)
	}
	file := filepath.Join(dir, "registry.yaml")
	if err := os.WriteFile(file, []byte(registry), 0o600); err != nil {
		return nil, err
	}
	s := &system{}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.end())
		}
	}()
	tls, err := certificates(ca, dir, "noop-runner")
	if err != nil {
		return nil, err
	}
	address, err := freeAddress(ctx)
	if err != nil {
		return nil, err
	}
	s.address = address
	if s.runner, _, err = start(ctx, dir, "noop-runner", filepath.Join(bin, "noop-runner"), append(tls, "--listen", address, "--max-concurrency", "100000")...); err != nil {
		return nil, err
	}
	if tls, err = certificates(ca, dir, "orchestrator"); err != nil {
		return nil, err
	}
	var api string
	s.flags = append(tls, "--listen", "127.0.0.1:0", "--database", database, "--registry", file, "--max-runs", "1000000")
	if s.orchestrator, api, err = start(ctx, dir, "orchestrator", filepath.Join(bin, "orchestrator"), s.orchestratorFlags()...); err != nil {
		return nil, err
	}
	if _, err = certificates(ca, dir, "client"); err != nil {
		return nil, err
	}
	s.client, err = s.dial(dir, api)
	return s, err
}

func (s *system) orchestratorFlags() []string {
	return append(slices.Clone(s.flags), "--runner", "noop="+s.address)
}

func (*system) dial(dir, api string) (*client.Client, error) {
	return client.New(api, client.WithCA(filepath.Join(dir, "client-ca.pem")),
		client.WithCertificate(filepath.Join(dir, "client-cert.pem"), filepath.Join(dir, "client-key.pem")))
}

func (s *system) end() error {
	var err error
	if s.client != nil {
		err = s.client.Close()
	}
	for _, p := range []*program{s.orchestrator, s.runner} {
		if p != nil {
			p.end()
		}
	}
	return err
}

// certificates issues a certificate for a role and gives the flags of a service that has it.
func certificates(ca *mesh.Authority, dir, role string, hosts ...string) ([]string, error) {
	c, err := ca.Issue(role, hosts...)
	if err != nil {
		return nil, err
	}
	cert, key, authority := c.PEM()
	var flags []string
	for name, content := range map[string][]byte{"cert": cert, "key": key, "ca": authority} {
		file := filepath.Join(dir, role+"-"+name+".pem")
		if err := os.WriteFile(file, content, 0o600); err != nil {
			return nil, err
		}
		flags = append(flags, "--tls-"+name, file)
	}
	return flags, nil
}

func freeAddress(ctx context.Context) (string, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// shape is a workflow that is measured.
type shape struct {
	name     string
	steps    int
	workflow string
	// peers have it too.
	peers bool
}

func sequential(name string, n int, step string) shape {
	return shape{name, n, "actions:\n" + strings.Repeat(step, n), n <= 40}
}

const (
	noopStep = "  - call_service: {service: bench, operation: noop}\n"
	fibStep  = "  - call_service: {service: bench, operation: fibonacci, input: {n: 10}}\n"
)

// shapes are those of the peers' own benchmarks.
func shapes() []shape {
	return []shape{
		sequential("1 step", 1, noopStep),
		sequential("10 sequential", 10, noopStep),
		sequential("40 sequential", 40, fibStep),
		{"100 parallel", 100, "actions:\n  - parallel:\n" + strings.ReplaceAll(strings.Repeat(noopStep, 100), "  - call", "      - call"), true},
		sequential("400 sequential", 400, fibStep),
	}
}
