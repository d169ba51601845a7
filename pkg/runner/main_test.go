package runner

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/mesh"
)

// output is a place for a program's log, safe to read while it writes.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// find waits for a line that matches, and gives the first group.
func (o *output) find(t *testing.T, pattern string) string {
	t.Helper()
	re := regexp.MustCompile(pattern)
	require.Eventually(t, func() bool { return re.MatchString(o.String()) }, 20*time.Second, time.Millisecond, pattern)
	return re.FindStringSubmatch(o.String())[1]
}

type idle struct {
	JobRunner
	closed chan struct{}
}

func (idle) Describe(context.Context) (*Description, error) {
	return &Description{Name: "idle", Types: []Type{{Name: "idle"}}}, nil
}

func (i idle) Close() error {
	close(i.closed)
	return nil
}

func noVariables(string) (string, bool) { return "", false }

func TestMainServesAndDrains(t *testing.T) {
	t.Parallel()
	a, err := mesh.NewAuthority()
	require.NoError(t, err)
	dir := t.TempDir()
	server, err := a.Issue("wasm-runner")
	require.NoError(t, err)
	cert, key, ca := server.PEM()
	for name, text := range map[string][]byte{"cert": cert, "key": key, "ca": ca, "policy.yaml": []byte("allowed: [a, b]\nlimits: {memory_mb: 5}\n")} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), text, 0o600))
	}
	variables := map[string]string{
		"SPECQL_TLS_CERT": filepath.Join(dir, "cert"), "SPECQL_TLS_KEY": filepath.Join(dir, "key"), "SPECQL_TLS_CA": filepath.Join(dir, "ca"),
		"SPECQL_MAX_CONCURRENCY": "3", "SPECQL_OWN": "from the environment",
	}
	out, closed := &output{}, make(chan struct{})
	var own string
	env := make(chan *Env, 1)
	p := program{
		name: "wasm-runner", out: out,
		lookup: func(name string) (string, bool) {
			v, ok := variables[name]
			return v, ok
		},
		build: func(_ context.Context, e *Env) (JobRunner, error) {
			env <- e
			return idle{closed: closed}, nil
		},
		options: []MainOption{Flags(func(fs *pflag.FlagSet) { fs.StringVar(&own, "own", "", "") })},
	}
	ctx, stop := context.WithCancel(t.Context())
	status := make(chan int, 1)
	go func() {
		status <- p.run(ctx, []string{"--listen", "127.0.0.1:0", "--metrics=127.0.0.1:0", "--policy", filepath.Join(dir, "policy.yaml"), "--log-format", "text"})
	}()
	address := out.find(t, `msg=ready .*address=(\S+)`)
	metrics := out.find(t, `msg=metrics .*address=(\S+)`)
	e := <-env
	require.JSONEq(t, `{"allowed":["a","b"],"limits":{"memory_mb":5}}`, string(e.PolicyJSON))
	require.Equal(t, "from the environment", own)
	require.NotNil(t, e.Flags.Lookup("own"))

	me, err := a.Issue(mesh.RoleOrchestrator)
	require.NoError(t, err)
	conn, err := mesh.Dial(address, me, mesh.DialOptions{ServerRole: "wasm-runner"})
	require.NoError(t, err)
	d, err := runnerv1.NewRunnerServiceClient(conn).Describe(t.Context(), &runnerv1.DescribeRequest{})
	require.NoError(t, err)
	require.EqualValues(t, 3, d.GetCapacity())
	require.NotEmpty(t, d.GetVersion())
	require.NoError(t, conn.Close())

	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+metrics+"/metrics", http.NoBody)
	require.NoError(t, err)
	resp, err := client.Do(req)
	require.NoError(t, err)
	text, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	require.Contains(t, string(text), `specql_grpc_calls_total{code="OK",method="/specql.runner.v1.RunnerService/Describe"} 1`)
	require.Contains(t, string(text), "specql_runner_jobs_in_flight 0")

	stop()
	require.Equal(t, 0, <-status)
	<-closed
	require.NotContains(t, out.String(), "BEGIN", "no key in the log")
}

func TestMainSaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad.yaml")
	require.NoError(t, os.WriteFile(bad, []byte("- a\n"), 0o600))
	build := func(context.Context, *Env) (JobRunner, error) { return nil, errors.New("no engine") }
	for name, c := range map[string]struct {
		args   []string
		status int
		text   string
	}{
		"no certificates":  {nil, 2, "--tls-cert or SPECQL_TLS_CERT is needed"},
		"insecure outside": {[]string{"--insecure", "--listen", ":9090"}, 2, "not a loopback address"},
		"both":             {[]string{"--insecure", "--tls-ca", "x"}, 2, "exclude one another"},
		"unknown flag":     {[]string{"--nope"}, 2, "unknown flag: --nope"},
		"a word":           {[]string{"serve"}, 2, `"serve" is not a flag`},
		"concurrency":      {[]string{"--insecure", "--max-concurrency", "0"}, 2, "must be 1 to 100000"},
		"drain":            {[]string{"--insecure", "--drain-timeout", "-1s"}, 2, "must not be negative"},
		"level":            {[]string{"--insecure", "--log-level", "loud"}, 2, "use debug, info, warn or error"},
		"format":           {[]string{"--insecure", "--log-format", "xml"}, 2, "use text or json"},
		"missing policy":   {[]string{"--insecure", "--policy", filepath.Join(dir, "none")}, 2, "--policy: "},
		"bad policy":       {[]string{"--insecure", "--policy", bad}, 2, "--policy: "},
		"missing files":    {[]string{"--tls-cert", "a", "--tls-key", "b", "--tls-ca", "c"}, 2, "certificates: "},
		"build fails":      {[]string{"--insecure"}, 1, "no engine"},
		"version":          {[]string{"--version"}, 0, "x-runner "},
		"help":             {[]string{"--help"}, 0, "--max-concurrency"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var out strings.Builder
			require.Equal(t, c.status, program{name: "x-runner", out: &out, lookup: noVariables, build: build}.run(t.Context(), c.args))
			require.Contains(t, out.String(), c.text)
		})
	}
}
