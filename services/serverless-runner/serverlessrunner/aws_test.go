package serverlessrunner

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/runnertest"
)

func lambdaConfig(endpoint string) object {
	return object{"provider": "aws", "function_name": "image-resize-service", "region": "us-east-1", "endpoint": endpoint}
}

// realLambda is an aws-lambda-go process behind the Invoke wire format.
func realLambda(t *testing.T, options string) string {
	t.Helper()
	return startStandin(t, "lambda-endpoint", "-secret-key", "wJalrXUtnFEMI-not-a-real-key", "-access-key", "AKIDEXAMPLE",
		"-function", "image-resize-service=DIR/lambda-resize"+options)
}

func TestLambda(t *testing.T) {
	awsKeys(t)
	url := realLambda(t, ",memory=1024,timeout=1,concurrency=1,version=7,alias=live")
	r := newRunner(t, Options{})

	t.Run("answers and is measured", func(t *testing.T) {
		config := lambdaConfig(url)
		config["memory_mb"] = 1024
		config["qualifier"] = "live"
		policy := object{
			"allowed_providers": []string{"aws"}, "allowed_regions": []string{"us-east-1", "us-west-2"},
			"resource_limits": object{"memory_mb": 3072, "timeout_seconds": 900},
			"cost_limits":     object{"max_invocations_per_hour": 1000, "max_cost_per_hour": 5.0},
		}
		j := newJob(t, config, policy, object{"image_url": "https://example.com/cat.png", "width": 64, "height": 32})
		span := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}, TraceFlags: trace.FlagsSampled})
		n := &notes{}
		result, err := r.Execute(trace.ContextWithSpanContext(t.Context(), span), j, n)
		require.NoError(t, err)
		out := output(t, result)
		require.Contains(t, out["resized_url"], "data:image/png;base64,")
		require.EqualValues(t, 64, out["width"])
		require.Positive(t, out["new_size"])
		require.Equal(t, "key-1", out["idempotency_key"], "the key reached the function")
		require.Equal(t, "resize", out["operation"])

		u := result.Usage
		require.Equal(t, "7", u.GetExecutedVersion())
		require.Positive(t, u.GetBilledDurationMs())
		require.Positive(t, u.GetPeakMemoryMb())
		require.Nil(t, u.CpuSeconds, "nobody measured it")
		require.Nil(t, u.MemoryMb, "nobody measured it")
		require.EqualValues(t, 200, u.GetStatusCode())
		require.InDelta(t, 0.0000002+0.0000166667*u.GetBilledDurationMs()/1000, u.GetCostUsd(), 1e-12)
		require.InDelta(t, len(j.Input), u.GetRequestBytes(), 0)

		require.Contains(t, n.text(), "stdout: resize to 64x32 idempotency_key=key-1 traceparent=00-01000000")
		require.Contains(t, n.text(), "runner: REPORT RequestId: ")
		require.Contains(t, n.secrets, "wJalrXUtnFEMI-not-a-real-key")
		for _, c := range result.Security.GetChecks() {
			require.True(t, c.GetAllowed(), c)
		}
		require.Len(t, result.Security.GetChecks(), 8, "four before the provider is asked, three on what it tells, one on the cost")
	})

	t.Run("an error of the function is not retried", func(t *testing.T) {
		f, result := failure(t, r, newJob(t, lambdaConfig(url), nil, object{"width": 0, "height": 1}))
		require.Equal(t, fault.RemoteError, f.Code)
		require.False(t, f.Retryable)
		require.Contains(t, f.Message, "errorString: width and height must be 1 to 4096 pixels")
		require.Positive(t, result.Usage.GetBilledDurationMs(), "a failure is billed as well")
		require.Positive(t, result.Usage.GetCostUsd())
	})

	t.Run("a panic", func(t *testing.T) {
		j := newJob(t, lambdaConfig(url), nil, object{"width": 1, "height": 1, "simulate": "panic"})
		result, n := execute(t, r, j)
		f := fault.From(result.Err)
		require.Equal(t, fault.RemoteError, f.Code)
		require.Contains(t, f.Message, "asked to panic")
		require.Contains(t, n.text(), "stderr: [{\"path\"")
	})

	t.Run("an exit", func(t *testing.T) {
		f, _ := failure(t, r, newJob(t, lambdaConfig(url), nil, object{"width": 1, "height": 1, "simulate": "exit"}))
		require.Equal(t, fault.RemoteError, f.Code)
		require.Contains(t, f.Message, "Runtime.ExitError")
	})

	t.Run("the function's timeout, and one call too many meanwhile", func(t *testing.T) {
		// Two at once where one has room: one of them is refused, the other takes its whole second.
		results := make(chan *runner.Result, 2)
		for range 2 {
			slow := newJob(t, lambdaConfig(url), nil, object{"width": 1, "height": 1, "simulate": "sleep"})
			go func() {
				result, _ := r.Execute(t.Context(), slow, &notes{})
				results <- result
			}()
		}
		busy := fault.From((<-results).Err)
		require.Equal(t, fault.RateLimited, busy.Code)
		require.True(t, busy.Retryable)
		require.Equal(t, time.Second, busy.RetryAfter)

		result := <-results
		f := fault.From(result.Err)
		require.Equal(t, fault.Timeout, f.Code)
		require.True(t, f.Retryable)
		require.Contains(t, f.Message, "Task timed out after 1.00 seconds")
		require.Positive(t, result.Usage.GetCostUsd())
	})

	t.Run("an event", func(t *testing.T) {
		config := lambdaConfig(url)
		config["invocation_type"] = "event"
		result, _ := execute(t, r, newJob(t, config, nil, object{"width": 1, "height": 1}))
		out := output(t, result)
		require.EqualValues(t, 202, out["status_code"])
		require.NotEmpty(t, out["request_id"])
		require.Nil(t, result.Usage.CostUsd)
		require.Nil(t, result.Usage.BilledDurationMs)
	})

	t.Run("no such function", func(t *testing.T) {
		config := lambdaConfig(url)
		config["function_name"] = "nothing"
		f, _ := failure(t, r, newJob(t, config, nil, nil))
		require.Equal(t, fault.RemoteError, f.Code)
		require.False(t, f.Retryable)
		require.Contains(t, f.Message, "ResourceNotFoundException")
		require.Contains(t, f.Message, "check that nothing exists in us-east-1")
	})

	t.Run("an operation with a function of its own", func(t *testing.T) {
		config := lambdaConfig(url)
		config["function_name"] = "nothing"
		j := newJob(t, config, nil, object{"width": 1, "height": 1})
		j.Operation.Config = raw(t, object{"function_name": "arn:aws:lambda:us-east-1:000000000000:function:image-resize-service", "qualifier": "7"})
		require.Eventually(t, func() bool { // the event of before may still run
			result, _ := execute(t, r, j)
			return result.Err == nil && result.Usage.GetExecutedVersion() == "7"
		}, 5*time.Second, time.Millisecond)
	})

	t.Run("a wrong key", func(t *testing.T) {
		t.Setenv("AWS_SECRET_ACCESS_KEY", "another")
		f, _ := failure(t, newRunner(t, Options{}), newJob(t, lambdaConfig(url), nil, nil))
		require.Equal(t, fault.RemoteError, f.Code)
		require.Contains(t, f.Message, "InvalidSignatureException")
		require.Contains(t, f.Message, "check the runner's AWS credentials and clock")
	})
}

func TestLambdaWithoutCredentials(t *testing.T) {
	noCloud(t)
	f, _ := failure(t, newRunner(t, Options{}), newJob(t, lambdaConfig("http://127.0.0.1:1"), nil, nil))
	require.Equal(t, fault.Validation, f.Code)
	require.Contains(t, f.Message, "AWS_ACCESS_KEY_ID")
}

// fakeLambda answers every invocation in the wire format of Lambda.
func fakeLambda(t *testing.T, status int, header map[string]string, body string) string {
	t.Helper()
	return toldLambda(t, "", status, header, body)
}

// toldLambda is fakeLambda that also tells the function's configuration; "" is a runner that may not ask.
func toldLambda(t *testing.T, configuration string, status int, header map[string]string, body string) string {
	t.Helper()
	return server(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("X-Amzn-RequestId", "req-1")
		if r.Method == http.MethodGet {
			if configuration == "" || !strings.HasSuffix(r.URL.Path, "/configuration") {
				w.Header().Set("X-Amzn-Errortype", "AccessDeniedException")
				w.WriteHeader(http.StatusForbidden)
			}
			_, _ = io.WriteString(w, configuration)
			return
		}
		for k, v := range header {
			w.Header().Set(k, v)
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	})
}

func TestLambdaErrors(t *testing.T) {
	awsKeys(t)
	kind := func(k string) map[string]string { return map[string]string{"X-Amzn-Errortype": k} }
	for name, tt := range map[string]struct {
		status    int
		header    map[string]string
		body      string
		code      fault.Code
		retryable bool
		after     time.Duration
		text      string
	}{
		"throttled by body":   {429, kind("TooManyRequestsException"), `{"retryAfterSeconds":"7","message":"Rate Exceeded."}`, fault.RateLimited, true, 0, "Rate Exceeded."},
		"throttled by header": {429, map[string]string{"X-Amzn-Errortype": "TooManyRequestsException", "Retry-After": "9"}, `{}`, fault.RateLimited, true, 9 * time.Second, "429"},
		"service exception":   {500, kind("ServiceException"), `{"Message":"oops"}`, fault.RemoteError, true, 0, "oops"},
		"service unavailable": {503, kind("ServiceUnavailableException"), `{}`, fault.Unavailable, true, 0, "503"},
		"bad gateway as html": {502, nil, `<html>bad</html>`, fault.RemoteError, true, 0, "502"},
		"not ready":           {502, kind("ResourceNotReadyException"), `{}`, fault.Unavailable, true, 0, ""},
		"conflict":            {409, kind("ResourceConflictException"), `{}`, fault.Unavailable, true, 0, ""},
		"kms":                 {502, kind("KMSDisabledException"), `{"Message":"key off"}`, fault.RemoteError, false, 0, "key off"},
		"denied":              {403, kind("AccessDeniedException"), `{"Message":"not authorized"}`, fault.RemoteError, false, 0, "lambda:InvokeFunction"},
		"too large":           {413, kind("RequestTooLargeException"), `{"message":"big"}`, fault.Validation, false, 0, "big"},
		"redirect":            {302, map[string]string{"Location": "http://169.254.169.254/"}, ``, fault.RemoteError, false, 0, ""},
		"out of memory": {
			200,
			map[string]string{"X-Amz-Function-Error": "Unhandled", "X-Amz-Log-Result": tail("REPORT RequestId: req-1\tDuration: 1.00 ms\tBilled Duration: 1 ms\tMemory Size: 128 MB\tMax Memory Used: 128 MB\t")},
			`{"errorType":"Runtime.ExitError","errorMessage":"RequestId: req-1 Error: Runtime exited with error: signal: killed"}`, fault.ResourceExceeded, false, 0, "128 MB (peak 128 MB)",
		},
		"timed out, old form": {200, map[string]string{"X-Amz-Function-Error": "Unhandled"}, `{"errorMessage":"2026-11-01T00:00:00.000Z req-1 Task timed out after 3.00 seconds"}`, fault.Timeout, true, 0, "3.00"},
		"handled":             {200, map[string]string{"X-Amz-Function-Error": "Handled"}, `{"errorType":"Bad","errorMessage":"no","stackTrace":["a"]}`, fault.RemoteError, false, 0, "(Handled): Bad: no"},
		"error without form":  {200, map[string]string{"X-Amz-Function-Error": "Unhandled"}, `not JSON`, fault.RemoteError, false, 0, "not JSON"},
	} {
		t.Run(name, func(t *testing.T) {
			f, _ := failure(t, newRunner(t, Options{}), newJob(t, lambdaConfig(fakeLambda(t, tt.status, tt.header, tt.body)), nil, nil))
			require.Equal(t, tt.code, f.Code, f.Message)
			require.Equal(t, tt.retryable, f.Retryable, f.Message)
			require.Contains(t, f.Message, tt.text)
			if tt.after > 0 {
				require.Equal(t, tt.after, f.RetryAfter)
			}
		})
	}
}

func tail(lines ...string) string {
	return base64.StdEncoding.EncodeToString([]byte(strings.Join(lines, "\n") + "\n"))
}

func TestLambdaAnswers(t *testing.T) {
	awsKeys(t)
	r := newRunner(t, Options{})
	run := func(t *testing.T, policy object, header map[string]string, body string) (*runner.Result, *notes) {
		t.Helper()
		return execute(t, r, newJob(t, lambdaConfig(fakeLambda(t, 200, header, body)), policy, nil))
	}
	t.Run("numbers keep their digits", func(t *testing.T) {
		result, _ := run(t, nil, nil, `{"n":12345678901234567890.12}`)
		require.NoError(t, result.Err)
		require.JSONEq(t, `{"n":12345678901234567890.12}`, string(result.Output))
		require.Contains(t, string(result.Output), "12345678901234567890.12")
	})
	t.Run("no JSON", func(t *testing.T) {
		result, _ := run(t, nil, nil, "plain \xff")
		require.Equal(t, "plain \uFFFD", output(t, result)["body"])
	})
	t.Run("nothing is measured without a report", func(t *testing.T) {
		result, _ := run(t, nil, map[string]string{"X-Amz-Log-Result": "%%%"}, `{}`)
		require.NoError(t, result.Err)
		require.Nil(t, result.Usage.BilledDurationMs)
		require.Nil(t, result.Usage.CostUsd)
		require.Nil(t, result.Usage.PeakMemoryMb)
	})
	t.Run("a function cannot forge its report", func(t *testing.T) {
		result, _ := run(t, nil, map[string]string{"X-Amz-Log-Result": tail(
			"REPORT RequestId: req-1\tDuration: 1 ms\tBilled Duration: 1 ms\tMemory Size: 1 MB\tMax Memory Used: 1 MB",
			"REPORT RequestId: req-1\tDuration: 102.25 ms\tBilled Duration: 103 ms\tMemory Size: 512 MB\tMax Memory Used: 91 MB\tInit Duration: 132.00 ms\t",
			"REPORT RequestId: req-11\tBilled Duration: 5 ms",
		)}, `{}`)
		require.NoError(t, result.Err)
		require.InDelta(t, 103, result.Usage.GetBilledDurationMs(), 0)
		require.InDelta(t, 91, result.Usage.GetPeakMemoryMb(), 0)
		require.InDelta(t, 0.0000002+0.0000166667*0.103*0.5, result.Usage.GetCostUsd(), 1e-15)
	})
	t.Run("JSON log format", func(t *testing.T) {
		result, n := run(t, nil, map[string]string{"X-Amz-Log-Result": tail(
			`{"level":"INFO","message":"hello"}`,
			`{"time":"2026-11-01T00:00:00Z","type":"platform.report","record":{"requestId":"req-1","metrics":{"durationMs":1.5,"billedDurationMs":2,"memorySizeMB":128,"maxMemoryUsedMB":30},"status":"success"}}`,
		)}, `{}`)
		require.NoError(t, result.Err)
		require.InDelta(t, 2, result.Usage.GetBilledDurationMs(), 0)
		require.Contains(t, n.text(), `stdout: {"level":"INFO"`)
		require.Contains(t, n.text(), `runner: {"time"`)
	})
	t.Run("the memory that the function really has", func(t *testing.T) {
		result, _ := run(t, object{"resource_limits": object{"memory_mb": 256}}, map[string]string{"X-Amz-Log-Result": tail(
			"REPORT RequestId: req-1\tDuration: 1 ms\tBilled Duration: 1 ms\tMemory Size: 512 MB\tMax Memory Used: 91 MB",
		)}, `{}`)
		f := fault.From(result.Err)
		require.Equal(t, fault.ResourceExceeded, f.Code)
		require.Contains(t, f.Message, "512 MB")
		require.Contains(t, f.Message, "memory_mb is 256 (peak 91 MB)")
		require.Positive(t, result.Usage.GetCostUsd())
	})
	t.Run("an answer that is too large", func(t *testing.T) {
		result, _ := run(t, nil, nil, `"`+strings.Repeat("x", maxAnswer)+`"`)
		require.Equal(t, fault.ResourceExceeded, fault.From(result.Err).Code, result.Err)
	})
	t.Run("a region without a price", func(t *testing.T) {
		config := lambdaConfig(fakeLambda(t, 200, map[string]string{"X-Amz-Log-Result": tail("REPORT RequestId: req-1\tBilled Duration: 1 ms\tMemory Size: 512 MB")}, `{}`))
		config["region"] = "mx-central-1"
		result, _ := execute(t, r, newJob(t, config, nil, nil))
		require.NoError(t, result.Err)
		require.NotNil(t, result.Usage.BilledDurationMs)
		require.Nil(t, result.Usage.CostUsd)
	})
}

func TestLambdaUnreachable(t *testing.T) {
	awsKeys(t)
	f, _ := failure(t, newRunner(t, Options{}), newJob(t, lambdaConfig("http://127.0.0.1:1"), nil, nil))
	require.Equal(t, fault.Unavailable, f.Code)
	require.True(t, f.Retryable)
	require.Contains(t, f.Message, "127.0.0.1:1")
}

func TestLambdaBreaksOff(t *testing.T) {
	awsKeys(t)
	url := server(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "100")
		_, _ = io.WriteString(w, `{"a":`)
	})
	f, _ := failure(t, newRunner(t, Options{}), newJob(t, lambdaConfig(url), nil, nil))
	require.Equal(t, fault.Unavailable, f.Code, f.Message)
	require.True(t, f.Retryable)
}

func TestAssumeRole(t *testing.T) {
	awsKeys(t)
	status := 200
	sts := server(t, func(w http.ResponseWriter, r *http.Request) {
		_ = r.ParseForm()
		w.Header().Set("Content-Type", "text/xml")
		if status != 200 {
			w.WriteHeader(status)
			_, _ = io.WriteString(w, `<ErrorResponse><Error><Type>Sender</Type><Code>AccessDenied</Code><Message>not you</Message></Error></ErrorResponse>`)
			return
		}
		_, _ = fmt.Fprintf(w, `<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleResult><Credentials><AccessKeyId>ASIAROLE</AccessKeyId>`+
			`<SecretAccessKey>role-secret</SecretAccessKey><SessionToken>role-token</SessionToken><Expiration>%s</Expiration></Credentials>`+
			`<AssumedRoleUser><Arn>%s</Arn><AssumedRoleId>A</AssumedRoleId></AssumedRoleUser></AssumeRoleResult></AssumeRoleResponse>`,
			time.Now().Add(time.Hour).UTC().Format(time.RFC3339), r.Form.Get("RoleArn"))
	})
	t.Setenv("AWS_ENDPOINT_URL_STS", sts)
	var token, authorization string
	url := server(t, func(w http.ResponseWriter, r *http.Request) {
		token, authorization = r.Header.Get("X-Amz-Security-Token"), r.Header.Get("Authorization")
		_, _ = io.WriteString(w, `{}`)
	})
	config := lambdaConfig(url)
	config["auth_config"] = object{"role_arn": "arn:aws:iam::123456789012:role/invoker"}
	result, n := execute(t, newRunner(t, Options{}), newJob(t, config, nil, nil))
	require.NoError(t, result.Err)
	require.Equal(t, "role-token", token)
	require.Contains(t, authorization, "Credential=ASIAROLE/")
	require.Subset(t, n.secrets, []string{"role-secret", "role-token"})

	status = 403
	f, _ := failure(t, newRunner(t, Options{}), newJob(t, config, nil, nil))
	require.Equal(t, fault.RemoteError, f.Code)
	require.Contains(t, f.Message, "AccessDenied: not you")
	http.DefaultClient.CloseIdleConnections()
}

func TestClientContext(t *testing.T) {
	c := &call{job: &runner.Job{IdempotencyKey: "k", RunID: strings.Repeat("r", 4000)}}
	encoded, err := c.clientContext()
	require.NoError(t, err)
	decoded, err := base64.StdEncoding.DecodeString(encoded)
	require.NoError(t, err)
	require.JSONEq(t, `{"custom":{"idempotency_key":"k"}}`, string(decoded))
	c.job.IdempotencyKey = strings.Repeat("k", 4000)
	_, err = c.clientContext()
	require.Equal(t, fault.Validation, fault.From(err).Code)
}

// TestConformance drives the runner over mutual TLS, as the orchestrator does.
func TestConformance(t *testing.T) {
	awsKeys(t)
	url := server(t, func(w http.ResponseWriter, r *http.Request) {
		var in struct{ Slow, Big, Echo bool }
		body, _ := io.ReadAll(r.Body)
		_ = json.Unmarshal(body, &in)
		w.Header().Set("X-Amzn-RequestId", "req-1")
		switch {
		case in.Slow:
			<-r.Context().Done()
		case in.Big:
			_, _ = io.WriteString(w, `"`+strings.Repeat("x", runner.MaxOutputBytes)+`"`)
		default:
			w.Header().Set("X-Amz-Log-Result", tail("the key is wJalrXUtnFEMI-not-a-real-key"))
			_, _ = io.WriteString(w, `{"ok":true,"leak":"wJalrXUtnFEMI-not-a-real-key"}`)
		}
	})
	r := newRunner(t, Options{})
	runnertest.Conformance(t, r, runnertest.Cases{
		Good: wireJob(newJob(t, lambdaConfig(url), nil, nil)),
		Check: func(t *testing.T, o *runnertest.Outcome) {
			require.JSONEq(t, `{"ok":true,"leak":"***"}`, string(o.Finished.GetOutput()), "secrets are masked")
			require.Equal(t, []string{"the key is ***"}, o.Lines("stdout"))
		},
		Slow: wireJob(newJob(t, lambdaConfig(url), nil, object{"slow": true})),
		Big:  wireJob(newJob(t, lambdaConfig(url), nil, object{"big": true})),
		Gone: func(t *testing.T) { require.NoError(t, r.Close()) },
	})
}

// tracedClient sends a trace context with each job, as gRPC metadata.
type tracedClient struct {
	runnerv1.RunnerServiceClient
	traceparent string
}

func (c tracedClient) Execute(ctx context.Context, o ...grpc.CallOption) (grpc.BidiStreamingClient[runnerv1.ExecuteRequest, runnerv1.ExecuteResponse], error) {
	return c.RunnerServiceClient.Execute(metadata.AppendToOutgoingContext(ctx, "traceparent", c.traceparent), o...)
}

func TestTraceContextOfTheCallReachesTheFunction(t *testing.T) {
	awsKeys(t)
	t.Setenv("NOTIFY_KEY", "local-function-key")
	seen := make(chan http.Header, 1)
	url := server(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		seen <- r.Header.Clone()
		_, _ = io.WriteString(w, `{}`)
	})
	client := tracedClient{runnertest.Start(t, newRunner(t, Options{})), "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
	azure := azureConfig(url)
	azure["auth_config"] = object{"function_key_env_var": "NOTIFY_KEY"}
	for provider, config := range map[string]object{providerAWS: lambdaConfig(url), providerGCP: gcpConfig(url), providerAzure: azure} {
		t.Run(provider, func(t *testing.T) {
			j := wireJob(newJob(t, config, nil, nil))
			j.Id = provider // the result of another job is not given again
			o := runnertest.Execute(t, client, j)
			require.Empty(t, o.Code(), o.Finished.GetError().GetMessage())
			header := <-seen
			got := header.Get("Traceparent")
			if provider == providerAWS {
				var c struct{ Custom map[string]string }
				text, err := base64.StdEncoding.DecodeString(header.Get("X-Amz-Client-Context"))
				require.NoError(t, err)
				require.NoError(t, json.Unmarshal(text, &c))
				got = c.Custom["traceparent"]
			}
			require.Regexp(t, "^00-0af7651916cd43dd8448eb211c80319c-[0-9a-f]{16}-01$", got)
		})
	}
}

func TestTimeouts(t *testing.T) {
	awsKeys(t)
	url := server(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if r.Method == http.MethodGet {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		<-r.Context().Done()
	})
	r := newRunner(t, Options{Ceiling: &Policy{AllowedEndpoints: []string{"127.0.0.1"}, ResourceLimits: ResourceLimits{TimeoutSeconds: 0.5}}})
	for name, policy := range map[string]object{"ceiling": nil, "both": {"resource_limits": object{"timeout_seconds": 60}}} {
		t.Run(name, func(t *testing.T) {
			j := newJob(t, lambdaConfig(url), policy, nil)
			j.Timeout = time.Minute
			result, n := execute(t, r, j)
			f := fault.From(result.Err)
			require.Equal(t, fault.Timeout, f.Code)
			require.Contains(t, f.Message, "resource_limits.timeout_seconds of 500ms")
			require.Contains(t, n.text(), "may still be running")
		})
	}
	t.Run("the service's, where the job has none", func(t *testing.T) {
		config := lambdaConfig(url)
		config["timeout"] = 0.02
		f, _ := failure(t, newRunner(t, Options{}), newJob(t, config, nil, nil))
		require.Equal(t, fault.Timeout, f.Code)
		require.Contains(t, f.Message, "runner_config.timeout of 20ms")
	})
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(fault.New(fault.Cancelled, "enough"))
		result, err := newRunner(t, Options{}).Execute(ctx, newJob(t, lambdaConfig(url), nil, nil), &notes{})
		require.NoError(t, err)
		require.Equal(t, fault.Cancelled, fault.From(result.Err).Code)
	})
}
