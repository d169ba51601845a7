package httprunner

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
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
