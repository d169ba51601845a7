package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"text/template"
	"time"
)

// peer is another system, measured in the same shapes on the same PostgreSQL. Its driver (bench/peers) takes workloads on
// stdin; between its turns its processes are stopped, so that they cost the others nothing.
type peer struct {
	name string
	// only is the one shape that it has; empty for all.
	only   string
	driver *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Scanner
	// server is the process of a system that has one.
	server *exec.Cmd
}

// peerWait is how long a peer may take until it is ready.
const peerWait = 3 * time.Minute

// buildPeers builds the drivers and Temporal's own programs: a module of its own, so that none of what they need enters another.
func buildPeers(ctx context.Context, root, dir string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", dir+string(filepath.Separator), //nolint:gosec // our own
		"./dbos", "./river", "./temporal", "go.temporal.io/server/cmd/server", "go.temporal.io/server/cmd/tools/sql")
	cmd.Dir, cmd.Env = filepath.Join(root, "bench", "peers"), append(os.Environ(), "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build the peers: %w\n%s", err, out)
	}
	return nil
}

// startPeers starts DBOS Transact, River and Temporal on databases of their own in the cluster that everybody uses.
func (b *bench) startPeers(ctx context.Context) (peers []*peer, err error) {
	defer func() {
		if err != nil {
			for _, p := range peers {
				p.end()
			}
		}
	}()
	database, err := b.cluster.CreateDatabase()
	if err != nil {
		return nil, err
	}
	dbos, err := b.startPeer(ctx, "DBOS Transact", "dbos", database)
	if err != nil {
		return nil, err
	}
	peers = append(peers, dbos)
	if database, err = b.cluster.CreateDatabase(); err != nil {
		return peers, err
	}
	river, err := b.startPeer(ctx, "River", "river", database)
	if err != nil {
		return peers, err
	}
	river.only = one.shape
	peers = append(peers, river)
	server, address, err := b.startTemporal(ctx)
	if err != nil {
		return peers, err
	}
	temporal, err := b.startPeer(ctx, "Temporal", "temporal", address)
	if err != nil {
		return peers, errors.Join(err, server.Process.Kill(), server.Wait())
	}
	temporal.server = server
	return append(peers, temporal), nil
}

// startPeer starts a driver and waits until it says that it is ready.
func (b *bench) startPeer(ctx context.Context, name, program string, args ...string) (*peer, error) {
	p := &peer{name: name}
	var err error
	if p.driver, err = b.process(program, args...); err != nil {
		return nil, err
	}
	if p.in, err = p.driver.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.driver.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.out = bufio.NewScanner(out)
	if err := p.driver.Start(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, peerWait)
	defer cancel()
	line, err := p.line(ctx)
	if err == nil && !bytes.Contains(line, []byte(`"ready":true`)) {
		err = fmt.Errorf("it said %q", line)
	}
	if err != nil {
		p.end()
		return nil, fmt.Errorf("%s is not ready: %w; see %s", name, err, b.dir)
	}
	return p, p.signal(syscall.SIGSTOP)
}

// process is a program that ends with this one and logs to a file of its own.
func (b *bench) process(program string, args ...string) (*exec.Cmd, error) {
	log, err := os.Create(filepath.Join(b.dir, program+".log"))
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(filepath.Join(b.bin, program), args...) //nolint:gosec // built here
	cmd.Stderr, cmd.SysProcAttr = log, &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd, nil
}

// line reads what the driver answers.
func (p *peer) line(ctx context.Context) ([]byte, error) {
	type answer struct {
		text []byte
		err  error
	}
	got := make(chan answer, 1)
	go func() {
		if p.out.Scan() {
			got <- answer{text: bytes.Clone(p.out.Bytes())}
			return
		}
		got <- answer{err: errors.Join(errors.New("the driver ended"), p.out.Err())}
	}()
	select {
	case a := <-got:
		return a.text, a.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (p *peer) signal(s syscall.Signal) error {
	err := p.driver.Process.Signal(s)
	if p.server != nil {
		err = errors.Join(err, p.server.Process.Signal(s))
	}
	return err
}

// end kills what the peer consists of: nothing that it keeps is needed any more.
func (p *peer) end() {
	for _, cmd := range []*exec.Cmd{p.driver, p.server} {
		if cmd != nil && cmd.Process != nil {
			_ = cmd.Process.Kill() // it may have ended
			_ = cmd.Wait()         // killed
		}
	}
}

// drive has the peer run a workload.
func (p *peer) drive(ctx context.Context, shape string, concurrency int, d time.Duration) (*result, error) {
	ask, err := json.Marshal(map[string]any{"shape": shape, "concurrency": concurrency, "duration_ns": d})
	if err != nil {
		return nil, err
	}
	if _, err := p.in.Write(append(ask, '\n')); err != nil {
		return nil, err
	}
	text, err := p.line(ctx)
	if err != nil {
		return nil, err
	}
	var answer struct {
		result
		Error string `json:"error"`
	}
	if err := json.Unmarshal(text, &answer); err != nil {
		return nil, err
	}
	if answer.Error != "" {
		return nil, errors.New(answer.Error)
	}
	return &answer.result, nil
}

// measurePeer takes the floors, then the workload.
func (b *bench) measurePeer(ctx context.Context, p *peer, sh shape, concurrency int) (err error) {
	floors, err := b.before(ctx)
	if err != nil {
		return err
	}
	if err := p.signal(syscall.SIGCONT); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.signal(syscall.SIGSTOP)) }()
	// What was stopped finds its connections and its polls again.
	if _, err := p.drive(ctx, "1 step", concurrency, time.Second); err != nil {
		return err
	}
	m := &meter{db: b.db, parts: map[string]int{"postgresql": b.cluster.PID(), "driver": p.driver.Process.Pid}}
	if p.server != nil {
		m.parts["server"] = p.server.Process.Pid
	}
	from, err := m.read(ctx)
	if err != nil {
		return err
	}
	r, err := p.drive(ctx, sh.name, concurrency, b.duration)
	if err != nil {
		return err
	}
	to, err := m.read(ctx)
	if err != nil {
		return err
	}
	r.System, r.Shape, r.Steps, r.Concurrency = p.name, sh.name, sh.steps, concurrency
	floors.put(r)
	r.spend(from.until(to))
	b.add(r)
	return nil
}

// temporalConfig is Temporal's own for PostgreSQL (config/development-postgres12.yaml) with 128 history shards and enough connections.
var temporalConfig = template.Must(template.New("").Parse(`log: {stdout: false, level: error, outputFile: {{.Log}}}
persistence:
  defaultStore: main
  visibilityStore: visibility
  numHistoryShards: 128
  datastores:
    main: {sql: {pluginName: postgres12, databaseName: {{.Main}}, connectAddr: "{{.Address}}", connectProtocol: tcp, user: {{.User}}, password: "", maxConns: 40, maxIdleConns: 40, maxConnLifetime: 1h}}
    visibility: {sql: {pluginName: postgres12, databaseName: {{.Visibility}}, connectAddr: "{{.Address}}", connectProtocol: tcp, user: {{.User}}, password: "", maxConns: 10, maxIdleConns: 10, maxConnLifetime: 1h}}
global:
  membership: {maxJoinDuration: 30s, broadcastAddress: 127.0.0.1}
services:
{{- range $name, $ports := .Services}}
  {{$name}}: {rpc: {grpcPort: {{index $ports 0}}, membershipPort: {{index $ports 1}}, bindOnLocalHost: true}}
{{- end}}
clusterMetadata:
  enableGlobalNamespace: false
  failoverVersionIncrement: 10
  masterClusterName: active
  currentClusterName: active
  clusterInformation: {active: {enabled: true, initialFailoverVersion: 1, rpcName: frontend, rpcAddress: "{{.Frontend}}"}}
dcRedirectionPolicy: {policy: noop}
archival: {history: {state: disabled, enableRead: false}, visibility: {state: disabled, enableRead: false}}
`))

// lowPort is a free port that fits the smallint in which Temporal keeps it.
func lowPort(ctx context.Context) (int, error) {
	var lc net.ListenConfig
	for range 100 {
		port := 10000 + rand.IntN(20000) //nolint:gosec // no secret
		l, err := lc.Listen(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			return port, l.Close()
		}
	}
	return 0, errors.New("no port from 10000 to 30000 is free")
}

// startTemporal makes its two databases with its own tool, and starts its four services as one process.
func (b *bench) startTemporal(ctx context.Context) (_ *exec.Cmd, address string, err error) {
	ports := map[string][2]int{}
	for _, name := range []string{"frontend", "matching", "history", "worker"} {
		var two [2]int
		for i := range two {
			if two[i], err = lowPort(ctx); err != nil {
				return nil, "", err
			}
		}
		ports[name] = two
	}
	address = fmt.Sprintf("127.0.0.1:%d", ports["frontend"][0])
	values := map[string]any{"Log": filepath.Join(b.dir, "temporal-server.log"), "Services": ports, "Frontend": address}
	for key, schema := range map[string]string{"Main": "postgresql/v12/temporal", "Visibility": "postgresql/v12/visibility"} {
		database, err := b.cluster.CreateDatabase()
		if err != nil {
			return nil, "", err
		}
		u, err := url.Parse(database)
		if err != nil {
			return nil, "", err
		}
		name := strings.TrimPrefix(u.Path, "/")
		values[key], values["Address"], values["User"] = name, u.Host, u.User.Username()
		for _, verb := range [][]string{{"setup-schema", "-v", "0.0"}, {"update-schema", "--schema-name", schema}} {
			args := append([]string{"--plugin", "postgres12", "--ep", u.Hostname(), "-p", u.Port(), "-u", u.User.Username(), "--db", name}, verb...)
			if out, err := exec.CommandContext(ctx, filepath.Join(b.bin, "sql"), args...).CombinedOutput(); err != nil { //nolint:gosec // built here
				return nil, "", fmt.Errorf("%s of Temporal's database: %w\n%s", verb[0], err, out)
			}
		}
	}
	var config bytes.Buffer
	if err := temporalConfig.Execute(&config, values); err != nil {
		return nil, "", err
	}
	file := filepath.Join(b.dir, "temporal.yaml")
	if err := os.WriteFile(file, config.Bytes(), 0o600); err != nil {
		return nil, "", err
	}
	server, err := b.process("server", "--config-file", file, "--allow-no-auth", "start")
	if err != nil {
		return nil, "", err
	}
	return server, address, server.Start()
}
