package faults

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/client"
	"github.com/specql/mesh/test/pgtest"
)

// mesh is orchestrators and runners, each a process, over one PostgreSQL. Between an orchestrator and the database, each runner and
// its clients there is a link that can be cut.
type mesh struct {
	t             testing.TB
	logs, certs   string
	names         *names
	recorder      *recorder
	cluster       *pgtest.Cluster
	database      string        // as the tests reach it
	db            *pgxpool.Pool // of the tests, past every link
	orchestrators []*orchestrator
	runners       []*runner
	// workflows by name, as entities hold none of them.
	registry string
}

// node is a program that can be started again.
type node struct {
	name string
	m    *mesh

	mu   sync.Mutex
	proc *process
	// again says that it has been ready once: from then on one that ends is started again.
	again bool
	// peakMB is the most memory that any of its processes held.
	peakMB float64
}

type orchestrator struct {
	node
	api *link
	db  *link
	// runners are the links to each of them.
	runners []*link
	host    string // the name of its runners
	client  *client.Client
	args    []string
}

type runner struct {
	node
	args []string
}

// size says what a mesh consists of.
type size struct {
	orchestrators, runners int
	// runner adds a runner of another type, as --runner takes it; nil for none.
	runner func(*mesh) string
}

// registryYAML has one service, behind which is the recorder. Faults may cost a call more attempts than the default allows.
const registryYAML = `
services:
  - name: worker
    type: test
    category: test
    execution_type: http
    runner_config:
      base_url: %s
      timeout: 30
      retry_config: {max_retries: 50, backoff_factor: 1}
    security_policy: {allowed_domains: ["127.0.0.1"], allow_private_networks: true}
    operations:
      - name: work
        input_schema: {run: string, step: string, before: string}
        output_schema: {token: string}
`

// startMesh starts a mesh of its own, with a PostgreSQL of its own, until the end of the test, and puts the registry in force. Settings
// are PostgreSQL's.
func startMesh(t testing.TB, s size, settings ...string) *mesh {
	t.Helper()
	m := &mesh{t: t, names: newNames(t), recorder: newRecorder(t)}
	m.makeFolders()
	m.startDatabase(settings)
	for n := range s.orchestrators {
		o := &orchestrator{host: fmt.Sprintf("http-runner.o%d.test", n+1)}
		o.node = node{name: fmt.Sprintf("o%d", n+1), m: m}
		m.orchestrators = append(m.orchestrators, o)
	}
	for n := range s.runners {
		r := &runner{}
		r.node = node{name: fmt.Sprintf("http-runner-%d", n+1), m: m}
		m.runners = append(m.runners, r)
	}
	t.Cleanup(m.close)
	m.makeLinks()
	if s.runner != nil {
		other := s.runner(m)
		for _, o := range m.orchestrators {
			o.args = append(o.args, "--runner", other)
		}
	}
	var starts errgroup.Group
	for _, r := range m.runners {
		starts.Go(func() error { return r.start(t.Context()) })
	}
	for _, o := range m.orchestrators {
		starts.Go(func() error { return o.start(t.Context()) })
	}
	require.NoError(t, starts.Wait())
	m.registry = fmt.Sprintf(registryYAML, m.recorder.url)
	m.apply(t.Context(), m.orchestrators[0], m.registry)
	for _, o := range m.orchestrators {
		m.untilServices(t.Context(), o, 1)
	}
	return m
}

// apply puts a registry in force through one orchestrator.
func (m *mesh) apply(ctx context.Context, o *orchestrator, registry string, entities ...*specqlv1.Document) {
	m.t.Helper()
	res, err := o.client.Registry().ApplyRegistry(ctx, &specqlv1.ApplyRegistryRequest{
		Registry: &specqlv1.Document{Name: "registry.yaml", Content: []byte(registry)}, Entities: entities,
	})
	require.NoError(m.t, err)
	require.True(m.t, res.GetApplied(), "%v", res.GetProblems())
}

// untilServices waits until so many services are in force in an orchestrator.
func (m *mesh) untilServices(ctx context.Context, o *orchestrator, n int) {
	m.t.Helper()
	require.Eventually(m.t, func() bool {
		res, err := o.client.Registry().GetRegistry(ctx, &specqlv1.GetRegistryRequest{})
		return err == nil && len(res.GetServices()) == n
	}, patience, 20*time.Millisecond, "%s does not know the registry that was applied elsewhere", o.name)
}

func (m *mesh) makeFolders() {
	m.t.Helper()
	var err error
	m.logs, err = filepath.Abs(filepath.Join(root, ".cache", "faults", strings.ReplaceAll(m.t.Name(), "/", "-")))
	require.NoError(m.t, err)
	require.NoError(m.t, os.RemoveAll(m.logs))
	require.NoError(m.t, os.MkdirAll(m.logs, 0o700))
	m.certs = filepath.Join(m.logs, "certs")
	m.specql("certs", m.certs)
}

// specql runs a command to its end and gives what it printed.
func (m *mesh) specql(args ...string) string {
	m.t.Helper()
	cmd := exec.CommandContext(m.t.Context(), program(m.t, "specql"), args...)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	require.NoError(m.t, cmd.Run(), "specql %v\n%s", args, &stderr)
	return stdout.String()
}

func (m *mesh) startDatabase(settings []string) {
	m.t.Helper()
	m.cluster = pgtest.Start(m.t, settings...)
	m.database = m.cluster.NewDatabase(m.t)
	m.specql("migrate-schema", "--database", m.database)
	var err error
	m.db, err = pgxpool.New(m.t.Context(), m.database)
	require.NoError(m.t, err)
	m.t.Cleanup(m.db.Close)
	_, err = m.db.Exec(m.t.Context(), auditSQL)
	require.NoError(m.t, err)
}

// makeLinks makes the addresses of everything, before anything is started. All replicas of a runner have one port, as behind one
// name; so a link to each of them listens at an address of its own.
func (m *mesh) makeLinks() {
	m.t.Helper()
	for n, o := range m.orchestrators {
		o.api = newLink(m.t, "")
		o.db = newLink(m.t, m.cluster.Address())
		o.runners = m.linksToRunners(n)
		var addresses []netip.Addr
		var port string
		for _, l := range o.runners {
			a := l.lis.Addr().(*net.TCPAddr).AddrPort()
			addresses, port = append(addresses, a.Addr()), fmt.Sprint(a.Port())
		}
		m.names.set(o.host, addresses...)
		own, err := url.Parse(m.database)
		require.NoError(m.t, err)
		own.Host = o.db.address()
		q := own.Query()
		q.Set("application_name", o.name)
		own.RawQuery = q.Encode()
		o.args = append([]string{
			"--listen", "127.0.0.1:0", "--database", own.String(), "--log-format", "json", "--drain-timeout", "60s",
			"--runner", "http=" + m.names.target(o.host, port),
		}, m.tls("orchestrator")...)
		o.client = m.client(o.api.address())
	}
	for _, r := range m.runners {
		r.args = append([]string{"--listen", "127.0.0.1:0", "--log-format", "json", "--max-concurrency", "256"}, m.tls("http-runner")...)
	}
}

func (m *mesh) tls(role string) []string {
	file := func(name string) string { return filepath.Join(m.certs, name) }
	return []string{"--tls-cert", file(role + ".crt"), "--tls-key", file(role + ".key"), "--tls-ca", file("ca.crt")}
}

func (m *mesh) client(address string) *client.Client {
	m.t.Helper()
	file := func(name string) string { return filepath.Join(m.certs, name) }
	c, err := client.New(address, client.WithCA(file("ca.crt")), client.WithCertificate(file("client.crt"), file("client.key")))
	require.NoError(m.t, err)
	m.t.Cleanup(func() { _ = c.Close() })
	return c
}

// linksToRunners makes the links of one orchestrator: 127.77.N.1, 127.77.N.2 and so on, with one port.
func (m *mesh) linksToRunners(n int) []*link {
	m.t.Helper()
	port := "0"
	var links []*link
	for tries := 0; len(links) < len(m.runners); {
		l, err := listenLink(net.JoinHostPort(fmt.Sprintf("127.77.%d.%d", n+1, len(links)+1), port))
		if err != nil {
			// The port is taken at one of the addresses: another one.
			tries++
			require.Less(m.t, tries, 20, "%v", err)
			for _, l := range links {
				l.close()
			}
			links, port = nil, "0"
			continue
		}
		_, port, _ = net.SplitHostPort(l.address())
		links = append(links, l)
	}
	for _, l := range links {
		m.t.Cleanup(l.close)
	}
	return links
}

// start starts the orchestrator, again after it has ended, and returns when it is ready.
func (o *orchestrator) start(ctx context.Context) error {
	address, err := o.launch(ctx, "orchestrator", "api", o.args)
	if err == nil {
		o.api.connect(address)
	}
	return err
}

// start starts the runner, again after it has ended, and returns when it is ready.
func (r *runner) start(ctx context.Context) error {
	address, err := r.launch(ctx, "http-runner", "address", r.args)
	if err != nil {
		return err
	}
	for n, other := range r.m.runners {
		if other == r {
			for _, o := range r.m.orchestrators {
				o.runners[n].connect(address)
			}
		}
	}
	return nil
}

// launch starts a process of the node until one is ready, as a supervisor does: one that finds no database ends.
func (n *node) launch(ctx context.Context, binary, field string, args []string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		p, err := launch(n.m.logs, n.name, binary, args...)
		if err != nil {
			return "", err
		}
		n.mu.Lock()
		n.proc = p
		n.mu.Unlock()
		address, err := p.untilReady(ctx, field)
		if err == nil || ctx.Err() != nil || p.alive() || !n.again {
			n.again = n.again || err == nil
			return address, err
		}
		pause := time.NewTimer(200 * time.Millisecond)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			return "", err
		}
	}
}

func (n *node) process() *process {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.proc
}

// kill ends the process at once and gives the time just before that.
func (n *node) kill() time.Time {
	p := n.process()
	at := time.Now()
	p.kill()
	n.note(p)
	return at
}

// note keeps the peak of memory of a process.
func (n *node) note(p *process) float64 {
	peak := p.measure()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.peakMB = max(n.peakMB, peak)
	return n.peakMB
}

// restartDatabase ends PostgreSQL as a crash does and starts it again, and says for how long it was away.
func (m *mesh) restartDatabase() (away time.Duration, err error) {
	begin := time.Now()
	if err := m.cluster.Stop(pgtest.Immediate); err != nil {
		return 0, err
	}
	err = m.cluster.Start()
	return time.Since(begin), err
}

func (m *mesh) close() {
	var all sync.WaitGroup
	for _, n := range m.nodes() {
		if p := n.process(); p != nil {
			all.Go(p.kill)
		}
	}
	all.Wait()
	for _, n := range m.nodes() {
		for line := range lines(tail(filepath.Join(m.logs, n.name+".log"), 1<<30)) {
			for _, sign := range []string{"panic", "fatal error:", "DATA RACE"} {
				if strings.Contains(line, sign) {
					m.t.Errorf("%s: %s", n.name, line)
				}
			}
		}
	}
	if m.t.Failed() {
		m.t.Logf("the logs are in %s", m.logs)
		for _, n := range m.nodes() {
			m.t.Logf("%s:\n%s", n.name, tail(filepath.Join(m.logs, n.name+".log"), 4<<10))
		}
	}
}

func (m *mesh) nodes() []*node {
	var out []*node
	for _, o := range m.orchestrators {
		out = append(out, &o.node)
	}
	for _, r := range m.runners {
		out = append(out, &r.node)
	}
	return out
}

// untilEnded waits until every run has ended.
func (m *mesh) untilEnded(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	left := -1
	for {
		n, err := unfinished(ctx, m.db)
		if err == nil {
			left = n
		}
		if left == 0 {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%d runs have not ended after %s", left, limit)
		}
	}
}

// verdict checks all there is.
func (m *mesh) verdict(ctx context.Context, l *load) (summary, []string, evidence) {
	m.t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	e := evidence{
		asked: l.asked, acknowledged: l.acknowledged, rows: runRows(ctx, m.t, m.db),
		inserted: l.inserted, loose: looseRows(ctx, m.t, m.db),
		effects: m.recorder.all(), changes: changes(ctx, m.t, m.db),
	}
	sum, bad := check(e)
	return sum, bad, e
}

// requireGood fails the test with the first violations, if there are some.
func (m *mesh) requireGood(bad []string) {
	m.t.Helper()
	if n := len(bad); n > 0 {
		require.Fail(m.t, fmt.Sprintf("%d violations", n), "%s", strings.Join(bad[:min(n, 30)], "\n"))
	}
}

func tail(file string, most int64) string {
	raw, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	return string(raw[max(0, int64(len(raw))-most):])
}
