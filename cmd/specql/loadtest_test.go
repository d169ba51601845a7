package main

import (
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// busyProject is a folder with services that can be called again and again, one of them a server of the test.
func busyProject(t *testing.T) (dir string, answered *atomic.Int64) {
	t.Helper()
	answered = &atomic.Int64{}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	web := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := answered.Add(1)
		if r.URL.Path == "/flaky" && n%5 == 0 {
			http.Error(w, "no", http.StatusTeapot)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte(`{"n": ` + strconv.FormatInt(n, 10) + `}`))
	})}
	go func() { _ = web.Serve(lis) }()
	t.Cleanup(func() { _ = web.Close() })
	dir = t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "registry"), 0o700))
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "entities"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "registry", "service_registry.yaml"), []byte(`
services:
  - name: web
    type: t
    category: c
    runner_config: {base_url: "http://`+lis.Addr().String()+`", timeout: 30}
    security_policy: {allow_private_networks: true, max_response_size: 100000}
    operations:
      - {name: count, input_schema: {name: string, size: {type: integer, minimum: 3}, note: string?}}
      - {name: flaky, max_retries: 0}
  - name: script
    type: t
    category: c
    execution_type: shell
    runner_config: {working_directory: /tmp, timeout: 60}
    security_policy: {allowed_commands: [/bin/cat], resource_limits: {memory_mb: 512, cpu_seconds: 20, timeout_seconds: 60}}
    operations: [{name: echo, command: [/bin/cat], input_schema: {text: string}}]
  - name: denied
    type: t
    category: c
    execution_type: shell
    runner_config: {working_directory: /tmp}
    security_policy: {allowed_commands: [/bin/cat]}
    operations:
      - {name: list, command: [/bin/ls]}
      - {name: run, script: job.py}
  - name: cloud
    type: t
    category: c
    execution_type: serverless
    runner_config: {provider: aws, function_name: f, region: eu-west-1, endpoint: "http://127.0.0.1:1"}
    operations: [{name: call, max_retries: 0}]
`), 0o600))
	return dir, answered
}

type spreadOf struct {
	Samples                                 int
	Average, P50, P90, P95, P99, Max, Total float64
}

type loadTest struct {
	Service, Operation, ExecutionType   string
	Requests, Completed, Failed, Unsent int
	Interrupted                         bool
	ElapsedSeconds, ThroughputPerSecond float64
	LatencySeconds                      spreadOf
	Errors                              []struct {
		Code    string
		Count   int
		Message string
	}
	ResourceUsage map[string]spreadOf
	Timeline      []struct{ Ended, Failed int }
}

func TestLoadTest(t *testing.T) {
	t.Parallel()
	dir, answered := busyProject(t)
	address, _ := devIn(t, dir, "--data", filepath.Join(t.TempDir(), "data"))
	at := func(args ...string) result {
		return specql(t, dir, append(append([]string{"load-test"}, args...), "--address", address)...)
	}

	t.Run("closed loop", func(t *testing.T) {
		before := answered.Load()
		file := filepath.Join(dir, "out.html")
		r := at("--service", "WEB", "--operation", "count", "--concurrency", "4", "--requests", "60", "-o", "json", "--report", file)
		require.Equal(t, 0, r.status, r.err)
		got := decode[loadTest](t, r.out)
		require.Equal(t, []any{"web", "count", "http", 60, 60, 0, false}, []any{got.Service, got.Operation, got.ExecutionType, got.Requests, got.Completed, got.Failed, got.Interrupted})
		require.Equal(t, int64(60), answered.Load()-before, "the calls are real")
		l := got.LatencySeconds
		require.Equal(t, 60, l.Samples)
		require.IsNonDecreasing(t, []float64{0.0001, l.P50, l.P90, l.P95, l.P99, l.Max})
		require.InDelta(t, 60/got.ElapsedSeconds, got.ThroughputPerSecond, 1e-6)
		require.Equal(t, 60, got.ResourceUsage["durationSeconds"].Samples, "what the runner measured")
		require.LessOrEqual(t, got.ResourceUsage["durationSeconds"].Max, l.Max)
		require.Positive(t, got.ResourceUsage["requestBytes"].Max)
		ended := 0
		for _, s := range got.Timeline {
			ended += s.Ended
		}
		require.Equal(t, 60, ended)
		page, err := os.ReadFile(file)
		require.NoError(t, err)
		require.Equal(t, 3, strings.Count(string(page), `<svg viewBox="0 0 720 250"`))
		require.Contains(t, string(page), "web.count")
		require.NotContains(t, r.err, "\x1b", "no bar where there is no terminal")
		listed := specql(t, dir, "runs", "list", "--limit", "1", "-o", "json", "--address", address)
		require.Contains(t, listed.out, `"correlationId": "load-test"`)
	})
	t.Run("open loop", func(t *testing.T) {
		r := at("--service", "script", "--rate", "50", "--duration", "2s", "--concurrency", "20", "--input", `{"text": "hi"}`, "-o", "json")
		require.Equal(t, 0, r.status, r.err)
		got := decode[loadTest](t, r.out)
		require.Equal(t, 100, got.Requests+got.Unsent, "the rate says how many are due")
		require.Positive(t, got.ResourceUsage["cpuSeconds"].Samples)
	})
	t.Run("failures", func(t *testing.T) {
		r := at("--service", "web", "--operation", "flaky", "--requests", "20", "--concurrency", "2", "--output", "json")
		require.Equal(t, 0, r.status, r.err)
		got := decode[loadTest](t, r.out)
		require.Equal(t, 4, got.Failed)
		require.Len(t, got.Errors, 1)
		require.Equal(t, []any{"REMOTE_ERROR", 4}, []any{got.Errors[0].Code, got.Errors[0].Count})
		require.Contains(t, got.Errors[0].Message, "418")
		r = at("--service", "web", "--operation", "flaky", "--requests", "20")
		require.Equal(t, 0, r.status, r.err)
		require.Regexp(t, `(?m)^CALLED +TYPE +CALLS +FAILED +PER SECOND`, r.out)
		require.Regexp(t, `(?m)^web\.flaky +http +20 +4 +[\d.]+ `, r.out)
		require.Regexp(t, `(?m)^web\.flaky +REMOTE_ERROR +4 +`, r.out)
		require.Regexp(t, `(?m)^web\.flaky +Time in the runner +`, r.out)
	})
	t.Run("none succeeds", func(t *testing.T) {
		r := at("--service", "denied", "--operation", "list", "--requests", "2")
		require.Equal(t, 1, r.status, r.err)
		require.Regexp(t, `(?m)^denied\.list +shell +2 +2 `, r.out)
		require.Contains(t, r.out, "POLICY_VIOLATION")
		require.NotContains(t, r.err, "may cost money")
	})
	t.Run("cost", func(t *testing.T) {
		r := at("--service", "cloud", "--requests", "200")
		require.Equal(t, 2, r.status, "what is wrong with all calls alike ends the test")
		require.Contains(t, r.err, "cloud.call: ")
		require.Contains(t, r.err, "may cost money")
		r = at("--service", "cloud", "--requests", "2", "--allow-cost")
		require.NotContains(t, r.err, "may cost money")
	})
	for _, args := range [][]string{{"load-test", "--duration", "1h"}, {"profile", "--requests", "10000"}} {
		t.Run("interrupted "+args[0], func(t *testing.T) {
			file := filepath.Join(dir, args[0]+".html")
			cmd := program(t.Context(), dir, append(args, "--service", "script", "--report", file, "-o", "json", "--address", address)...)
			var out, errs said
			cmd.Stdout, cmd.Stderr = &out, &errs
			before := listedRuns(t, dir, address)
			require.NoError(t, cmd.Start())
			require.Eventually(t, func() bool { return listedRuns(t, dir, address) != before }, time.Minute, 20*time.Millisecond)
			require.NoError(t, cmd.Process.Signal(syscall.SIGINT))
			require.NoError(t, cmd.Wait(), errs.String())
			got := decode[loadTest](t, out.String())
			require.True(t, got.Interrupted)
			require.Greater(t, got.Requests, got.Failed)
			page, err := os.ReadFile(file)
			require.NoError(t, err)
			require.Contains(t, string(page), "script.echo: the test was ended early.")
		})
	}
	t.Run("misuse", func(t *testing.T) {
		for want, args := range map[string][]string{
			"--service is needed":                                           {},
			`there is no service "wbe"; the`:                                {"--service", "wbe"},
			"several operations: say which with --operation: count, flaky":  {"--service", "web"},
			`no service "web.count"; write --service web --operation count`: {"--service", "web.count"},
			`has no operation "x"; it has: count`:                           {"--service", "web", "--operation", "x"},
			"--concurrency must be between 1":                               {"--service", "web", "--concurrency", "0"},
			"--requests must be between 1":                                  {"--service", "web", "--requests", "0"},
			"give one of them":                                              {"--service", "web", "--requests", "1", "--duration", "1s"},
			"--rate must be above 0":                                        {"--service", "web", "--rate", "NaN"},
			"--duration must be above 0":                                    {"--service", "web", "--duration", "-1s"},
			"--input is not JSON":                                           {"--service", "web", "--input", "{"},
			"--report":                                                      {"--service", "web", "--operation", "count", "--report", filepath.Join(dir, "no", "such", "folder.html")},
			"web.count: ":                                                   {"--service", "web", "--operation", "count", "--input", `{"name": 5, "size": 3}`},
		} {
			r := at(args...)
			require.Equal(t, 2, r.status, "%v: %s", args, r.err)
			require.Contains(t, r.err, want)
		}
		r := specql(t, dir, "load-test", "--service", "web", "--address", "127.0.0.1:1")
		require.Equal(t, 1, r.status)
		require.Contains(t, r.err, "no server answers at 127.0.0.1:1")
	})
}

// listedRuns is the id of the newest run.
func listedRuns(t *testing.T, dir, address string) string {
	t.Helper()
	r := specql(t, dir, "runs", "list", "--limit", "1", "--status", "completed", "-o", "json", "--address", address)
	require.Equal(t, 0, r.status, r.err)
	return regexp.MustCompile(`"id": "[^"]+"`).FindString(r.out)
}

func TestBenchmark(t *testing.T) {
	t.Parallel()
	dir, _ := busyProject(t)
	address, _ := devIn(t, dir, "--data", filepath.Join(t.TempDir(), "data"))
	at := func(args ...string) result {
		return specql(t, dir, append(append([]string{"benchmark"}, args...), "--address", address)...)
	}
	file := filepath.Join(dir, "out.html")
	r := at("--services", "web.count", "script", "--requests", "12", "--report", file, "-o", "json")
	require.Equal(t, 0, r.status, r.err)
	got := decode[struct{ Tests []loadTest }](t, r.out).Tests
	require.Len(t, got, 2)
	require.Equal(t, []any{"count", 12, "echo", "shell", 12}, []any{got[0].Operation, got[0].Completed, got[1].Operation, got[1].ExecutionType, got[1].Completed})
	page, err := os.ReadFile(file)
	require.NoError(t, err)
	for _, name := range []string{"web.count", "script.echo", "Processor time", "not measured"} {
		require.Contains(t, string(page), name)
	}
	r = at("--requests", "2", "--services", "script", "denied.list")
	require.Equal(t, 1, r.status, "no call of one of them succeeded")
	require.Regexp(t, `(?m)^script\.echo +shell +2 +0 `, r.out)
	require.Regexp(t, `(?m)^denied\.list +shell +2 +2 `, r.out)
	for want, args := range map[string][]string{
		"--services is needed":       {},
		"flag needs an argument":     {"--services"},
		"has script.echo twice":      {"--services", "script", "script.echo"},
		`there is no service "webs"`: {"--services", "script", "webs.count"},
		`has no operation "x"`:       {"--services", "web.x"},
		"several operations: say which as SERVICE.OPERATION: count, flaky": {"--services", "web"},
	} {
		r = at(args...)
		require.Equal(t, 2, r.status, args)
		require.Contains(t, r.err, want)
	}
}
