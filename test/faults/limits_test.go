package faults

import (
	"bufio"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/client"
)

// beginAll starts n runs of a shape, over all orchestrators.
func (l *load) beginAll(ctx context.Context, prefix string, n int, s *shape) error {
	var starts errgroup.Group
	starts.SetLimit(24)
	for i := range n {
		starts.Go(func() error { return l.begin(ctx, i, fmt.Sprintf("%s-%d", prefix, i), s) })
	}
	return starts.Wait()
}

// TestRateHoldsOverReplicas: three orchestrators and two runners that all call as often as they may, one of the orchestrators killed
// in the middle of the first burst, another one stopped for a while: in no minute does the service see more than its limit, and it sees most of it.
func TestRateHoldsOverReplicas(t *testing.T) {
	const most = 100
	m := startMesh(t, size{orchestrators: 3, runners: 2})
	m.apply(t.Context(), m.orchestrators[0], strings.Replace(m.registry, "allow_private_networks: true}", fmt.Sprintf("allow_private_networks: true, rate_limit_per_minute: %d}", most), 1))
	m.untilSame(t.Context())
	m.recorder.slow(100 * time.Millisecond)
	l := newLoad(m)
	minutes := int(rateFor.Minutes()) + 1
	began := time.Now()
	starting := make(chan error, 1)
	go func() { starting <- l.beginAll(t.Context(), "rate", most*(minutes+1), chain(1)) }()

	require.NoError(t, m.recorder.arrived(t.Context(), most/3))
	m.orchestrators[2].kill()
	require.NoError(t, m.orchestrators[2].start(t.Context()))
	require.NoError(t, <-starting)
	stopped := m.orchestrators[1].process()
	stopped.stop()
	require.Eventually(t, func() bool { return time.Since(began) > 25*time.Second }, time.Minute, 100*time.Millisecond, "the others take its runs over meanwhile")
	stopped.cont()
	require.Eventually(t, func() bool { return time.Since(began) > *rateFor }, *rateFor+time.Minute, 100*time.Millisecond)

	seen := m.recorder.all()
	worst := 0
	for i := range seen {
		n := 0
		for j := i; j < len(seen) && seen[j].Began.Sub(seen[i].Began) < time.Minute; j++ {
			n++
		}
		worst = max(worst, n)
	}
	windows := int(*rateFor / time.Minute)
	t.Logf("%d calls in %s; at most %d within any minute; the limit is %d", len(seen), rateFor, worst, most)
	require.LessOrEqual(t, worst, most)
	// The attempts of the one that was killed count for longer, since nobody knows when they ended.
	require.GreaterOrEqual(t, len(seen), most*windows+most/2, "and most of what is allowed is used")
	var counted int
	require.NoError(t, m.db.QueryRow(t.Context(), "SELECT attempts FROM jobs.v_limit_usage WHERE key = 'http:service/worker'").Scan(&counted))
	require.LessOrEqual(t, counted, most)
}

// untilSame waits until all orchestrators have the registry in force that the first one has.
func (m *mesh) untilSame(ctx context.Context) {
	m.t.Helper()
	want, err := m.orchestrators[0].client.Registry().GetRegistry(ctx, &specqlv1.GetRegistryRequest{})
	require.NoError(m.t, err)
	for _, o := range m.orchestrators {
		require.Eventually(m.t, func() bool {
			res, err := o.client.Registry().GetRegistry(ctx, &specqlv1.GetRegistryRequest{})
			return err == nil && res.GetDigest() == want.GetDigest()
		}, patience, 20*time.Millisecond, "%s does not know the registry that was applied elsewhere", o.name)
	}
}

// bills is a provider's account: it stands before Lambda and adds up what every invocation was billed, whoever heard of it.
type bills struct {
	t      testing.TB
	url    string
	target string
	mu     sync.Mutex
	n      int
	total  float64
}

// The prices of the test: one call is dear, so that few of them are what an hour allows.
const (
	pricesYAML = "source: test\nas_of: \"2026-11\"\nproviders:\n  aws:\n    us-east-1:\n      x86_64: {gb_second: 0.000001, request: 0.05}\n"
	perRequest = 0.05
	perGB      = 0.000001
	// dearest is what the function costs at most beside the request: 1 GB for its timeout and a cold start.
	dearest = (30 + 10) * perGB
)

var (
	billed = regexp.MustCompile(`Billed Duration: (\d+) ms`)
	sized  = regexp.MustCompile(`Memory Size: (\d+) MB`)
)

// ServeHTTP implements http.Handler. A client that goes away is billed all the same.
func (b *bills) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	out := r.Clone(context.WithoutCancel(r.Context()))
	raw, err := io.ReadAll(r.Body)
	if err != nil {
		return // it never arrived
	}
	out.Body, out.RequestURI, out.URL.Scheme, out.URL.Host = io.NopCloser(strings.NewReader(string(raw))), "", "http", b.target
	res, err := http.DefaultTransport.RoundTrip(out)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer func() { _ = res.Body.Close() }()
	if log, err := base64.StdEncoding.DecodeString(res.Header.Get("X-Amz-Log-Result")); err == nil && res.StatusCode == http.StatusOK {
		ms, mb := billed.FindSubmatch(log), sized.FindSubmatch(log)
		if ms != nil && mb != nil {
			duration, _ := strconv.ParseFloat(string(ms[1]), 64)
			memory, _ := strconv.ParseFloat(string(mb[1]), 64)
			b.mu.Lock()
			b.n++
			b.total += perRequest + perGB*duration/1000*memory/1024
			b.mu.Unlock()
		}
	}
	maps.Copy(w.Header(), res.Header)
	w.WriteHeader(res.StatusCode)
	_, _ = io.Copy(w, res.Body)
}

func (b *bills) sum() (n int, total float64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.n, b.total
}

// startLambda starts the stand-in of Lambda with a function in it, behind an account.
func startLambda(t testing.TB) *bills {
	t.Helper()
	dir, err := filepath.Abs(filepath.Join(root, ".cache", "standins"))
	require.NoError(t, err)
	out, err := exec.CommandContext(t.Context(), filepath.Join(root, "test", "standins", "build.sh"), dir, "lambda-resize", "lambda-endpoint").CombinedOutput()
	require.NoError(t, err, "%s", out)
	cmd := exec.Command(filepath.Join(dir, "lambda-endpoint"), "-function", "image-resize-service="+filepath.Join(dir, "lambda-resize")+",memory=1024,timeout=30,concurrency=12")
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	require.NoError(t, err)
	b := &bills{t: t, target: strings.TrimPrefix(strings.TrimSpace(line), "listening http://")}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	b.url = "http://" + lis.Addr().String()
	server := &http.Server{Handler: b, ReadHeaderTimeout: time.Minute}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(lis)
	}()
	t.Cleanup(func() {
		_ = server.Close()
		<-done
		http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	})
	return b
}

const resizeYAML = `
services:
  - name: resize
    type: test
    category: test
    execution_type: serverless
    runner_config: {provider: aws, function_name: image-resize-service, region: us-east-1, endpoint: %s, timeout: 30}
    security_policy: {cost_limits: {max_cost_per_hour: 3}}
    operations:
      - {name: resize, max_retries: 10}
`

// TestSpendHoldsOverReplicas: three orchestrators spend the money of an hour as fast as they can, one of them is killed in the middle.
// By the provider's own account no more than the limit was spent, and most of it was.
func TestSpendHoldsOverReplicas(t *testing.T) {
	const most = 3.0
	b := startLambda(t)
	var serverless *link
	m := startMesh(t, size{orchestrators: 3, runners: 1, runner: func(m *mesh) string {
		serverless = newLink(t, "")
		return "serverless=" + serverless.address()
	}})
	require.NoError(t, os.MkdirAll(filepath.Join(m.logs, ".aws"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(m.logs, ".aws", "credentials"), []byte("[default]\naws_access_key_id = AKIDEXAMPLE\naws_secret_access_key = not-a-real-key\n"), 0o600))
	prices := filepath.Join(m.logs, "prices.yaml")
	require.NoError(t, os.WriteFile(prices, []byte(pricesYAML), 0o600))
	r := &node{name: "serverless-runner", m: m}
	address, err := r.launch(t.Context(), "serverless-runner", "address", append([]string{
		"--listen", "127.0.0.1:0", "--log-format", "json", "--max-concurrency", "12", "--price-table", prices,
	}, m.tls("serverless-runner")...))
	require.NoError(t, err)
	t.Cleanup(func() { r.kill() })
	serverless.connect(address)
	m.apply(t.Context(), m.orchestrators[0], fmt.Sprintf(resizeYAML, b.url))
	m.untilSame(t.Context())
	s := &shape{name: "resize", yaml: "actions:\n  - call_service: {service: resize, operation: resize, input: {image_url: \"https://example.com/cat.png\", width: 8, height: 8}}\n"}
	l := newLoad(m)
	starting := make(chan error, 1)
	go func() { starting <- l.beginAll(t.Context(), "spend", 120, s) }()
	require.Eventually(t, func() bool { n, _ := b.sum(); return n >= 15 }, patience, 5*time.Millisecond)
	m.orchestrators[2].kill()
	require.NoError(t, m.orchestrators[2].start(t.Context()))
	require.NoError(t, <-starting)
	require.NoError(t, m.untilEnded(t.Context(), patience))

	n, total := b.sum()
	var refused, inFlight int
	var counted float64
	require.NoError(t, m.db.QueryRow(t.Context(), "SELECT count(*) FROM jobs.tb_job_run WHERE error_code = 'BUDGET_EXCEEDED'").Scan(&refused))
	require.NoError(t, m.db.QueryRow(t.Context(), "SELECT in_flight, cost_usd FROM jobs.v_limit_usage WHERE key = 'serverless:service/resize'").Scan(&inFlight, &counted))
	t.Logf("%d invocations cost %.4f USD by the provider's account, %.4f by the mesh's; %d calls were refused; the limit is %g USD", n, total, counted, refused, most)
	require.LessOrEqual(t, total, most)
	require.GreaterOrEqual(t, counted, 0.95*most, "and what is allowed is used up")
	require.GreaterOrEqual(t, counted, total-1e-6, "what was billed counts")
	// Of the attempts of the one that was killed nobody knows what they cost, so that they count with the most that they could.
	var lost int
	require.NoError(t, m.db.QueryRow(t.Context(), "SELECT count(*) FROM jobs.tb_limit_slot WHERE cost > $1", perRequest+dearest/2).Scan(&lost))
	require.LessOrEqual(t, counted-total, float64(lost)*(perRequest+dearest)+0.001, "nothing else is counted for more than it cost")
	require.Less(t, lost, 40, "the killed one had a third of the calls")
	require.Positive(t, refused)
	require.Zero(t, inFlight)
	_, err = m.orchestrators[0].client.ExecuteAndWait(t.Context(), client.Action{Workflow: s.yaml})
	require.ErrorContains(t, err, "over all orchestrators")
}
