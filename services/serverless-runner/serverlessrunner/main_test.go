package serverlessrunner

import (
	"bufio"
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// environ is that of the machine, before a test hides what is in it.
var environ = os.Environ()

// standins builds the stand-ins once, by the script that everybody uses.
var standins = sync.OnceValues(func() (string, error) {
	dir, err := filepath.Abs("../../../.cache/standins")
	if err != nil {
		return "", err
	}
	cmd := exec.Command("../../../test/standins/build.sh", dir, "lambda-resize", "lambda-endpoint", "gcf-analysis", "azure-notify")
	cmd.Env = environ
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", &buildError{err: err, out: string(out)}
	}
	return dir, nil
})

type buildError struct {
	err error
	out string
}

func (e *buildError) Error() string { return "test/standins/build.sh: " + e.err.Error() + "\n" + e.out }

// startStandin starts a stand-in until the test ends and gives its URL.
func startStandin(t *testing.T, name string, args ...string) string {
	t.Helper()
	dir, err := standins()
	require.NoError(t, err)
	for i, a := range args {
		args[i] = strings.ReplaceAll(a, "DIR/", dir+"/")
	}
	cmd := exec.Command(filepath.Join(dir, name), args...)
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	require.NoError(t, err)
	url, ok := strings.CutPrefix(strings.TrimSpace(line), "listening ")
	require.True(t, ok, line)
	return url
}

// awsKeys sets credentials, and keeps the SDK from looking anywhere else.
func awsKeys(t *testing.T) {
	t.Helper()
	noCloud(t)
	t.Setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI-not-a-real-key")
}

// noCloud hides every credential of the machine.
func noCloud(t *testing.T) {
	t.Helper()
	for _, name := range []string{
		"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_CONTAINER_CREDENTIALS_FULL_URI",
		"AWS_WEB_IDENTITY_TOKEN_FILE", "GOOGLE_APPLICATION_CREDENTIALS",
	} {
		t.Setenv(name, "")
	}
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	t.Setenv("HOME", t.TempDir())
	t.Setenv("AWS_CONFIG_FILE", "/nonexistent")
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
}

func newRunner(t *testing.T, o Options) *Runner {
	t.Helper()
	r, err := New(o)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, r.Close()) })
	return r
}

// server is an httptest server that ends with the test.
func server(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}

type object = map[string]any

func raw(t testing.TB, v any) json.RawMessage {
	t.Helper()
	b, err := json.Marshal(v)
	require.NoError(t, err)
	return b
}

// newJob makes a job; nil maps count as {}.
func newJob(t testing.TB, config, policy, input object) *runner.Job {
	t.Helper()
	for _, m := range []*object{&config, &policy, &input} {
		if *m == nil {
			*m = object{}
		}
	}
	return &runner.Job{
		ID: "job-1", RunID: "run-1", Attempt: 1, IdempotencyKey: "key-1", CorrelationID: "order-7",
		Service:   runner.Service{Name: "images", ExecutionType: "serverless", Config: raw(t, config), Policy: raw(t, policy)},
		Operation: runner.Operation{Name: "resize", Config: json.RawMessage(`{}`)},
		Input:     raw(t, input),
	}
}

func wireJob(j *runner.Job) *runnerv1.Job {
	return &runnerv1.Job{
		Id: j.ID, RunId: j.RunID, Attempt: 1, IdempotencyKey: j.IdempotencyKey,
		Service:   &runnerv1.Service{Name: j.Service.Name, ExecutionType: "serverless", RunnerConfig: j.Service.Config, SecurityPolicy: j.Service.Policy},
		Operation: &runnerv1.Operation{Name: j.Operation.Name},
		Input:     j.Input,
	}
}

// notes is a sink that keeps everything.
type notes struct {
	mu      sync.Mutex
	lines   []string
	secrets []string
}

func (n *notes) Log(stream, line string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.lines = append(n.lines, stream+": "+line)
}

func (n *notes) Usage(*runnerv1.ResourceUsage) {}

func (n *notes) Secret(value string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.secrets = append(n.secrets, value)
}

func (n *notes) text() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return strings.Join(n.lines, "\n")
}

func execute(t *testing.T, r *Runner, j *runner.Job) (*runner.Result, *notes) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	n := &notes{}
	result, err := r.Execute(ctx, j, n)
	require.NoError(t, err)
	require.NotNil(t, result.Usage.DurationSeconds)
	require.Equal(t, "provider", result.Usage.GetSource())
	require.Len(t, result.Security.GetPolicyDigest(), 64)
	return result, n
}

// failure runs a job that must fail.
func failure(t *testing.T, r *Runner, j *runner.Job) (*fault.Error, *runner.Result) {
	t.Helper()
	result, _ := execute(t, r, j)
	require.Error(t, result.Err)
	require.Nil(t, result.Output)
	return fault.From(result.Err), result
}

func output(t *testing.T, result *runner.Result) object {
	t.Helper()
	require.NoError(t, result.Err)
	var out object
	require.NoError(t, json.Unmarshal(result.Output, &out))
	return out
}
