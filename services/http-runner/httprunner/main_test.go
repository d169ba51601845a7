package httprunner

import (
	"context"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// sink keeps what a job says.
type sink struct {
	mu      sync.Mutex
	lines   []string
	secrets []string
}

func (s *sink) Log(stream, line string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lines = append(s.lines, stream+": "+line)
}

func (s *sink) Usage(*runnerv1.ResourceUsage) {}

func (s *sink) Secret(value string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.secrets = append(s.secrets, value)
}

// object is a JSON object in the making.
type object = map[string]any

func raw(t testing.TB, v any) json.RawMessage {
	t.Helper()
	if m, ok := v.(object); v == nil || ok && m == nil {
		return json.RawMessage(`{}`)
	}
	if text, ok := v.(string); ok {
		return json.RawMessage(text)
	}
	b, err := json.Marshal(v)
	require.NoError(t, err)
	return b
}

// attempt is a call to try.
type attempt struct {
	name      string // of the service
	operation string
	config    object
	op        object
	policy    object
	input     any // a JSON text or a value
	sink      *sink
}

// open is a policy that lets the test's own servers be reached.
func open(more ...object) object {
	p := object{"allow_private_networks": true}
	for _, m := range more {
		maps.Copy(p, m)
	}
	return p
}

func newRunner(t testing.TB, o Options) *Runner {
	t.Helper()
	r, err := New(o)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, r.Close()) })
	return r
}

func (a attempt) job(t testing.TB) *runner.Job {
	t.Helper()
	if a.name == "" {
		a.name = "svc"
	}
	if a.operation == "" {
		a.operation = "do_it"
	}
	if a.policy == nil {
		a.policy = open()
	}
	return &runner.Job{
		ID: "job-1", RunID: "run-1", Attempt: 1, IdempotencyKey: "key-1",
		Service:   runner.Service{Name: a.name, ExecutionType: ExecutionType, Config: raw(t, a.config), Policy: raw(t, a.policy)},
		Operation: runner.Operation{Name: a.operation, Config: raw(t, a.op)},
		Input:     raw(t, a.input),
	}
}

func (a attempt) run(ctx context.Context, t testing.TB, r *Runner) *runner.Result {
	t.Helper()
	if a.sink == nil {
		a.sink = &sink{}
	}
	result, err := r.Execute(ctx, a.job(t), a.sink)
	require.NoError(t, err)
	require.NotNil(t, result)
	require.NotNil(t, result.Usage)
	require.NotNil(t, result.Security)
	return result
}

// ok runs an attempt that must succeed and gives its output.
func (a attempt) ok(t testing.TB, r *Runner) string {
	t.Helper()
	result := a.run(t.Context(), t, r)
	require.NoError(t, result.Err)
	return string(result.Output)
}

// fails runs an attempt that must fail with a code.
func (a attempt) fails(t testing.TB, r *Runner, code fault.Code) *fault.Error {
	t.Helper()
	result := a.run(t.Context(), t, r)
	require.Error(t, result.Err)
	err, ok := fault.As(result.Err)
	require.True(t, ok, "%v", result.Err)
	require.Equal(t, code, err.Code, err.Message)
	require.Empty(t, result.Output)
	return err
}

// seen is a request that a recorder got.
type seen struct {
	Method, URI, Host string
	Header            http.Header
	Body              string
}

// recorder is a server that keeps what it was asked.
type recorder struct {
	*httptest.Server
	mu   sync.Mutex
	seen []seen
}

// record starts a server that keeps requests and then answers with h, or {} if that is nil.
func record(t testing.TB, h http.HandlerFunc) *recorder {
	t.Helper()
	rec := &recorder{}
	rec.Server = httptest.NewServer(rec.handler(h))
	t.Cleanup(rec.Close)
	return rec
}

func (rec *recorder) handler(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		rec.mu.Lock()
		rec.seen = append(rec.seen, seen{r.Method, r.RequestURI, r.Host, r.Header.Clone(), string(body)})
		rec.mu.Unlock()
		if h == nil {
			w.Header().Set("Content-Type", "application/json")
			_, _ = io.WriteString(w, `{}`)
			return
		}
		r.Body = io.NopCloser(strings.NewReader(string(body)))
		h(w, r)
	}
}

func (rec *recorder) all() []seen {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	return append([]seen(nil), rec.seen...)
}

func (rec *recorder) last(t testing.TB) seen {
	t.Helper()
	all := rec.all()
	require.NotEmpty(t, all)
	return all[len(all)-1]
}

func (rec *recorder) hostPort(t testing.TB) (host, port string) {
	t.Helper()
	u, err := url.Parse(rec.URL)
	require.NoError(t, err)
	return u.Hostname(), u.Port()
}

// answer is a handler that says the same always.
func answer(status int, contentType, body string, header ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", contentType)
		for i := 0; i+1 < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

func jsonAnswer(body string) http.HandlerFunc { return answer(200, "application/json", body) }
