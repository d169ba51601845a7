package serverlessrunner

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/lambda/types"
	"github.com/stretchr/testify/require"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/runnertest"
)

func setFuzzKeys(f *testing.F) {
	f.Helper()
	for name, value := range map[string]string{
		"AWS_ACCESS_KEY_ID": "fuzz", "AWS_SECRET_ACCESS_KEY": "fuzz-secret", "AWS_EC2_METADATA_DISABLED": "true", "FUZZ_KEY": "fuzz-key",
	} {
		require.NoError(f, os.Setenv(name, value)) //nolint:usetesting // F.Setenv is refused beside parallel tests
	}
}

// FuzzRPC sends hostile requests to the runner. What they may reach is one server on loopback.
func FuzzRPC(f *testing.F) {
	setFuzzKeys(f)
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

// FuzzRetryAfter reads how long a function asks to be left alone: as a header, and as Lambda says it.
func FuzzRetryAfter(f *testing.F) {
	for _, text := range []string{
		"3", "0.5", "-1", "0", "", " 7 ", "-9223372037", "9223372036854775807", "1e400", "-1e400", "NaN", "Inf", "-Inf", "0x1p62", "1_0",
		"Sun, 01 Nov 2026 12:00:09 GMT", "Fri, 31 Dec 9999 23:59:59 GMT",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		header := retryAfter(text)
		require.True(t, header >= 0 && header <= maxRetryAfter, "%q: %s", text, header)
		lambda := lambdaRetryAfter(&types.TooManyRequestsException{RetryAfterSeconds: &text}, nil)
		require.True(t, lambda >= 0 && lambda <= maxRetryAfter, "%q: %s", text, lambda)
	})
}

// FuzzAnswer calls functions that answer with hostile bytes, over a real connection.
func FuzzAnswer(f *testing.F) {
	setFuzzKeys(f)
	var answer atomic.Pointer[[]byte]
	host := runnertest.Answering(f, &answer)
	r, err := New(Options{Ceiling: &Policy{AllowedEndpoints: []string{host}, AllowedEnvVars: []string{"FUZZ_*"}, AllowedRoles: []string{}}})
	require.NoError(f, err)
	f.Cleanup(func() { require.NoError(f, r.Close()) })
	endpoint := "http://" + host
	jobs := []*runner.Job{
		{Service: runner.Service{Name: "s", Config: fmt.Appendf(nil, `{"provider":"aws","function_name":"f","region":"us-east-1","endpoint":%q}`, endpoint)}},
		{Service: runner.Service{Name: "s", Config: fmt.Appendf(nil, `{"provider":"azure","function_name":"f","app_name":"a","endpoint":%q,"auth_config":{"function_key_env_var":"FUZZ_KEY"}}`, endpoint)}},
	}
	for _, text := range []string{
		"HTTP/1.1 200 OK\r\nX-Amz-Log-Result: UkVQT1JUIFJlcXVlc3RJZDogcgo=\r\nContent-Length: 2\r\n\r\n{}",
		"HTTP/1.1 200 OK\r\nX-Amz-Function-Error: Unhandled\r\nContent-Length: 22\r\n\r\n{\"errorMessage\":\"boom\"}",
		"HTTP/1.1 429 Slow\r\nRetry-After: -9223372037\r\nX-Amzn-ErrorType: TooManyRequestsException\r\nContent-Length: 28\r\n\r\n{\"retryAfterSeconds\":\"1e99\"}",
		"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n\x1f\x8b\x08\x00\x00\r\n0\r\n\r\n", "",
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		answer.Store(&text)
		for _, job := range jobs {
			job.Operation, job.Input, job.Attempt = runner.Operation{Name: "o"}, []byte(`{}`), 1
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			res, err := r.Execute(ctx, job, runnertest.Quiet{})
			require.NoError(t, ctx.Err(), "the answer held the runner up")
			cancel()
			require.NoError(t, err)
			if res.Err != nil {
				require.Less(t, len(res.Err.Error()), 64<<10)
				if failure, ok := errors.AsType[*fault.Error](res.Err); ok {
					require.True(t, failure.RetryAfter >= 0 && failure.RetryAfter <= maxRetryAfter)
				}
				continue
			}
			require.True(t, json.Valid(res.Output))
		}
	})
}
