package httprunner

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/runnertest"
)

// FuzzRPC sends hostile requests to the runner. What they may reach is one server on loopback.
func FuzzRPC(f *testing.F) {
	remote := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/again" {
			w.Header().Set("Retry-After", r.URL.Query().Get("after"))
			w.WriteHeader(http.StatusTooManyRequests)
		}
		_, _ = w.Write([]byte(`{"path":` + strconv.Quote(r.URL.Path) + `}`))
	}))
	f.Cleanup(remote.Close)
	_, text, err := net.SplitHostPort(remote.Listener.Addr().String())
	require.NoError(f, err)
	port, err := strconv.Atoi(text)
	require.NoError(f, err)
	r, err := New(Options{Ceiling: &Policy{AllowedDomains: []string{"127.0.0.1"}, AllowedPorts: []int{port}, AllowPrivateNetworks: true}})
	require.NoError(f, err)
	job := func(config, policy, operation, input string) *runnerv1.Job {
		return &runnerv1.Job{
			Service:   &runnerv1.Service{Name: "s", ExecutionType: "http", RunnerConfig: []byte(config), SecurityPolicy: []byte(policy)},
			Operation: &runnerv1.Operation{Name: "o", Config: []byte(operation)}, Input: []byte(input),
		}
	}
	base := fmt.Sprintf(`{"base_url":%q}`, remote.URL)
	open := `{"allow_private_networks":true,"allowed_domains":["127.0.0.1"]}`
	runnertest.Fuzz(
		f, r,
		job(base, open, `{"method":"GET","path":"/{a}/x","query":{"q":"{b}"}}`, `{"a":"x/y","b":[1,true]}`),
		job(base, open, `{"method":"POST","path":"/again?after=3","body":"form"}`, `{"a":1}`),
		job(fmt.Sprintf(`{"base_url":%q,"auth_type":"bearer","auth_config":{"token_env_var":"NOT_SET"},"headers":{"X-A":"{a}"}}`, remote.URL), open, `{}`, `{"a":"\r\nX: y"}`),
		job(`{"base_url":"http://[::1]:1/"}`, `{}`, `{"body":"raw","success_codes":[201]}`, `[]`),
	)
}

// FuzzReadPolicy reads an operator's policy.
func FuzzReadPolicy(f *testing.F) {
	f.Add([]byte(`{"allowed_domains":["*.example.com"],"allowed_ports":[443],"circuit_breaker":{"failure_threshold":1}}`))
	f.Add([]byte(`{"allowed_domains":[""]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		policy, err := ReadPolicy(text)
		if err != nil || policy == nil {
			return
		}
		_, err = json.Marshal(policy)
		require.NoError(t, err)
		if r, err := New(Options{Ceiling: policy}); err == nil {
			require.NotNil(t, r)
		}
	})
}

// FuzzRetryAfter reads how long a target asks to be left alone.
func FuzzRetryAfter(f *testing.F) {
	now := time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)
	for _, text := range []string{
		"3", "-1", "0", "", " 7 ", "-9223372037", "9223372036854775807", "-9223372036854775808", "1e400", "NaN",
		"Sun, 01 Nov 2026 12:00:09 GMT", "Sunday, 01-Nov-26 12:00:09 GMT", "Sun Nov  1 12:00:09 2026", "Fri, 31 Dec 9999 23:59:59 GMT",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		d := retryAfter(http.Header{"Retry-After": {text}}, now)
		require.True(t, d >= 0 && d <= maxRetryAfter, "%q: %s", text, d)
		if strings.HasPrefix(strings.TrimSpace(text), "-") {
			require.Zero(t, d, "%q", text)
		}
	})
}

// FuzzAnswer calls a target that answers with hostile bytes, over a real connection.
func FuzzAnswer(f *testing.F) {
	var answer atomic.Pointer[[]byte]
	host := runnertest.Answering(f, &answer)
	r, err := New(Options{Ceiling: &Policy{AllowedDomains: []string{"127.0.0.1"}, AllowPrivateNetworks: true}})
	require.NoError(f, err)
	for _, text := range []string{
		"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n\xff\xfe\x00",
		"HTTP/1.1 429 Slow\r\nRetry-After: -9223372037\r\n\r\n", "HTTP/1.1 503 No\r\nRetry-After: 99999999999999999999\r\n\r\n",
		"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\n\r\n", "HTTP/1.1 307 Again\r\nLocation: //[::ffff:169.254.169.254%25eth0]/\r\nConnection: close\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n\x1f\x8b\x08\x00\x00\r\n0\r\n\r\n",
		"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 101 Switch\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "",
	} {
		f.Add([]byte(text))
	}
	config := fmt.Appendf(nil, `{"base_url":"http://%s"}`, host)
	f.Fuzz(func(t *testing.T, text []byte) {
		answer.Store(&text)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		res, err := r.Execute(ctx, &runner.Job{
			Service:   runner.Service{Name: "s", Config: config, Policy: []byte(`{"allow_private_networks":true,"allowed_domains":["127.0.0.1"]}`)},
			Operation: runner.Operation{Name: "o", Config: []byte(`{"method":"GET","path":"/"}`)}, Input: []byte(`{}`), Attempt: 1,
		}, runnertest.Quiet{})
		require.NoError(t, ctx.Err(), "the answer held the runner up")
		require.NoError(t, err)
		if res.Err == nil {
			require.True(t, json.Valid(res.Output))
			return
		}
		require.Less(t, len(res.Err.Error()), 64<<10)
		if failure, ok := errors.AsType[*fault.Error](res.Err); ok {
			require.True(t, failure.RetryAfter >= 0 && failure.RetryAfter <= maxRetryAfter)
		}
	})
}
