package serverlessrunner

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/runner/runnertest"
)

// FuzzRPC sends hostile requests to the runner. What they may reach is one server on loopback.
func FuzzRPC(f *testing.F) {
	for name, value := range map[string]string{
		"AWS_ACCESS_KEY_ID": "fuzz", "AWS_SECRET_ACCESS_KEY": "fuzz-secret", "AWS_EC2_METADATA_DISABLED": "true", "FUZZ_KEY": "fuzz-key",
	} {
		require.NoError(f, os.Setenv(name, value)) //nolint:usetesting // F.Setenv is refused beside parallel tests
	}
	remote := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("X-Amz-Log-Result", "UkVQT1JUIFJlcXVlc3RJZDogcgo=")
		_, _ = w.Write([]byte(`{"ok":true}`))
	}))
	f.Cleanup(remote.Close)
	host := remote.Listener.Addr().String()
	r, err := New(Options{Ceiling: &Policy{AllowedEndpoints: []string{host}, AllowedEnvVars: []string{"FUZZ_*"}, AllowedRoles: []string{}}})
	require.NoError(f, err)
	f.Cleanup(func() { require.NoError(f, r.Close()) })
	job := func(config, policy, input string) *runnerv1.Job {
		return &runnerv1.Job{
			Service:   &runnerv1.Service{Name: "s", ExecutionType: "serverless", RunnerConfig: []byte(config), SecurityPolicy: []byte(policy)},
			Operation: &runnerv1.Operation{Name: "o"}, Input: []byte(input),
		}
	}
	endpoint := "http://" + host
	runnertest.Fuzz(
		f, r,
		job(fmt.Sprintf(`{"provider":"aws","function_name":"f","region":"us-east-1","endpoint":%q}`, endpoint), `{}`, `{"a":1}`),
		job(fmt.Sprintf(`{"provider":"azure","function_name":"f","app_name":"a","endpoint":%q,"auth_config":{"function_key_env_var":"FUZZ_KEY"}}`, endpoint), `{}`, `{}`),
		job(fmt.Sprintf(`{"provider":"gcp","function_name":"f","project":"p","region":"r","endpoint":%q}`, endpoint), `{"allowed_regions":["r"],"cost_limits":{"max_cost_per_hour":0.1}}`, `{}`),
	)
}

func FuzzParseCeiling(f *testing.F) {
	f.Add([]byte(`{"allowed_providers":["aws"],"cost_limits":{"max_invocations_per_hour":1}}`))
	f.Fuzz(func(_ *testing.T, text []byte) {
		policy, err := ParseCeiling(text)
		if err != nil || policy == nil {
			return
		}
		if r, err := New(Options{Ceiling: policy}); err == nil {
			_ = r.Close()
		}
	})
}

func FuzzPrices(f *testing.F) {
	text, err := os.ReadFile("prices.yaml")
	require.NoError(f, err)
	f.Add(text)
	f.Add([]byte("aws: {us-east-1: {x86_64: -1}}"))
	file := filepath.Join(f.TempDir(), "prices.yaml")
	f.Fuzz(func(t *testing.T, text []byte) {
		require.NoError(t, os.WriteFile(file, text, 0o600))
		_, _ = LoadPrices(file)
	})
}
