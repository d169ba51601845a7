package serverlessrunner

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/runner/runnertest"
)

// hostile is one thing that somebody tries who writes the workflow, its input, the registry, or the
// function; it runs over gRPC as the orchestrator's calls do.
type hostile struct {
	tries   string
	call    func(t *testing.T, w *world) *runner.Job
	timeout time.Duration
	code    fault.Code // "" where the call may succeed
	rule    string     // of the check that refuses, "" where none does
	says    string
	retried bool
	// calls is how often the function may be invoked.
	calls int64
	see   func(t *testing.T, o *runnertest.Outcome)
}

// world is what a hostile call finds.
type world struct {
	options Options
	calls   atomic.Int64
}

// function is an endpoint that tells a configuration and counts invocations.
func (w *world) function(t *testing.T, configuration string, serve http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		rw.Header().Set("X-Amzn-RequestId", "req-1")
		if r.Method == http.MethodGet {
			if configuration == "" {
				rw.Header().Set("X-Amzn-Errortype", "AccessDeniedException")
				rw.WriteHeader(http.StatusForbidden)
			}
			_, _ = io.WriteString(rw, configuration)
			return
		}
		w.calls.Add(1)
		if serve == nil {
			_, _ = io.WriteString(rw, `{}`)
			return
		}
		serve(rw, r)
	}))
	t.Cleanup(s.Close)
	return s.URL
}

// bytes serves what is written to the connection itself.
func (w *world) bytes(t *testing.T, reply func(c net.Conn)) string {
	t.Helper()
	return w.function(t, "", func(rw http.ResponseWriter, _ *http.Request) {
		c, _, err := http.NewResponseController(rw).Hijack()
		if err != nil {
			return
		}
		defer func() { _ = c.Close() }()
		reply(c)
	})
}

func (h hostile) run(t *testing.T) {
	t.Helper()
	awsKeys(t)
	w := &world{}
	j := h.call(t, w)
	r := newRunner(t, w.options)
	client, stop := runnertest.Serve(t, r)
	defer stop()
	job := wireJob(j)
	job.Operation.Name, job.CorrelationId = j.Operation.Name, j.CorrelationID
	if h.timeout > 0 {
		job.Timeout = durationpb.New(h.timeout)
	}
	o := runnertest.Execute(t, client, job)
	require.NotNil(t, o.Finished, "%v", o.Err)
	fin := o.Finished
	require.Equal(t, string(h.code), o.Code(), fin.GetError().GetMessage())
	require.Contains(t, fin.GetError().GetMessage(), h.says)
	require.Equal(t, h.retried, fin.GetError().GetRetryable(), fin.GetError().GetMessage())
	denied := ""
	for _, c := range fin.GetSecurity().GetChecks() {
		if !c.GetAllowed() {
			denied = c.GetRule()
			require.NotEmpty(t, c.GetDetail())
		}
	}
	require.Equal(t, h.rule, denied, fin.GetSecurity())
	require.Len(t, fin.GetSecurity().GetPolicyDigest(), 64)
	require.NotNil(t, fin.GetUsage().DurationSeconds, "usage is measured")
	require.Equal(t, h.calls, w.calls.Load(), "how often the function was invoked")
	require.NotContains(t, fmt.Sprint(fin, o.Logs), "wJalrXUtnFEMI")
	if h.see != nil {
		h.see(t, o)
	}
	require.NoError(t, r.Close())
}

func named(t *testing.T, ip string) *net.Resolver {
	t.Helper()
	return resolver(t, netip.MustParseAddr(ip))
}

// TestHostileEndpoints leads the runner to addresses that no function has, in the URL and by a name.
func TestHostileEndpoints(t *testing.T) {
	for _, address := range []string{
		"127.0.0.1", "0.0.0.0", "169.254.169.254", "168.63.129.16", "100.100.100.200", "224.0.0.1", "255.255.255.255", "192.0.0.192",
		"::1", "::", "::ffff:169.254.169.254", "::ffff:0:169.254.169.254", "64:ff9b::a9fe:a9fe", "64:ff9b::7f00:1", "64:ff9b:1::a9fe:a9fe", "2002:a9fe:a9fe::1",
		"2001:0:53aa:64c::80ff:fffe", "fd00:ec2::254", "fe80::1", "ff02::1", "100::1",
	} {
		hostile{
			tries: address + " by a name", code: fault.PolicyViolation, rule: "allowed_endpoints",
			call: func(t *testing.T, w *world) *runner.Job {
				w.options.Resolver = named(t, address)
				return newJob(t, lambdaConfig("https://lambda.example"), nil, nil)
			},
		}.named(t)
		if addr := netip.MustParseAddr(address); addr.Unmap().IsLoopback() {
			continue // an emulator is meant there; the ceiling decides, below
		}
		hostile{
			tries: address + " in the URL", code: fault.PolicyViolation, rule: "allowed_endpoints",
			call: func(t *testing.T, _ *world) *runner.Job {
				return newJob(t, lambdaConfig("https://"+net.JoinHostPort(address, "443")), nil, nil)
			},
		}.named(t)
	}
	for _, address := range []string{"127.0.0.1", "10.0.0.1", "fd12::1", "64:ff9b::a00:1"} {
		hostile{
			tries: address + " under a ceiling without endpoints", code: fault.PolicyViolation, rule: "allowed_endpoints",
			call: func(t *testing.T, w *world) *runner.Job {
				w.options.Ceiling, w.options.Resolver = &Policy{}, named(t, address)
				return newJob(t, lambdaConfig("https://lambda.example"), nil, nil)
			},
		}.named(t)
	}
	for tries, endpoint := range map[string]string{
		"decimal": "https://2130706433", "hexadecimal": "https://0x7f000001", "octal": "https://0177.0.0.1", "two parts": "https://127.1", "leading zeros": "https://127.000.000.001",
		"full-width digits": "https://１２７.0.0.1", "a letter that looks like another": "https://lаmbda.example", "an escaped slash": "https://127.0.0.1%2f.example.com",
		"a zone": "https://[fe80::1%25lo]", "a user": "https://lambda.example@127.0.0.1", "plain http to a name like localhost": "http://localhost.evil.test", "another protocol": "gopher://127.0.0.1",
	} {
		hostile{tries: tries, code: fault.Validation, says: "endpoint", call: func(t *testing.T, _ *world) *runner.Job {
			return newJob(t, lambdaConfig(endpoint), nil, nil)
		}}.named(t)
	}
}

func (h hostile) named(t *testing.T) {
	t.Helper()
	t.Run(h.tries, h.run)
}

// TestHostileFunctions: the function, the registry or the orchestrator is the attacker.
func TestHostileFunctions(t *testing.T) {
	job := func(configuration string, config, policy object, serve http.HandlerFunc) func(t *testing.T, w *world) *runner.Job {
		return func(t *testing.T, w *world) *runner.Job {
			c := lambdaConfig(w.function(t, configuration, serve))
			maps.Copy(c, config)
			return newJob(t, c, policy, nil)
		}
	}
	under := func(ceiling Policy, call func(t *testing.T, w *world) *runner.Job) func(t *testing.T, w *world) *runner.Job {
		return func(t *testing.T, w *world) *runner.Job {
			ceiling.AllowedEndpoints = []string{"127.0.0.1"}
			w.options.Ceiling = &ceiling
			return call(t, w)
		}
	}
	raw := func(reply func(c net.Conn)) func(t *testing.T, w *world) *runner.Job {
		return func(t *testing.T, w *world) *runner.Job { return newJob(t, lambdaConfig(w.bytes(t, reply)), nil, nil) }
	}
	flood := func(head, more string) func(c net.Conn) {
		return func(c net.Conn) {
			_, err := io.WriteString(c, head)
			for err == nil {
				_, err = io.WriteString(c, more)
			}
		}
	}
	const big, small = `{"MemorySize":10240,"Timeout":900,"FunctionArn":"arn:aws:lambda:us-east-1:000000000000:function:f","Architectures":["x86_64"]}`, `{"MemorySize":128,"Timeout":3}`
	limits := func(l object) object { return object{"resource_limits": l} }
	cap := func(usd float64) object { return object{"cost_limits": object{"max_cost_per_hour": usd}} }
	secrets := func(w http.ResponseWriter, _ *http.Request) {
		const s = "wJalrXUtnFEMI-not-a-real-key"
		all := strings.Join([]string{s, url.QueryEscape(s), hex.EncodeToString([]byte(s)), base64.StdEncoding.EncodeToString([]byte(s))}, " ")
		w.Header().Set("X-Amz-Log-Result", tail("log: "+all))
		w.Header().Set("X-Amz-Function-Error", "Unhandled")
		_, _ = fmt.Fprintf(w, `{"errorType":"%s","errorMessage":"%s","stackTrace":["%s"]}`, s, all, all)
	}
	for _, h := range []hostile{
		{tries: "more memory than it says", call: job(big, object{"memory_mb": 128}, limits(object{"memory_mb": 1024}), nil), code: fault.PolicyViolation, rule: "resource_limits.memory_mb", says: "10240 MB"},
		{tries: "more memory than the ceiling", call: under(Policy{ResourceLimits: ResourceLimits{MemoryMB: 1024}}, job(big, object{"memory_mb": 128}, nil, nil)), code: fault.PolicyViolation, rule: "resource_limits.memory_mb", says: "ceiling"},
		{tries: "to run on when the attempt has ended", call: job(big, nil, limits(object{"timeout_seconds": 60}), nil), code: fault.PolicyViolation, rule: "resource_limits.timeout_seconds", says: "15m0s"},
		{tries: "another region than it says", call: job(strings.Replace(big, "us-east-1", "eu-west-1", 1), nil, object{"allowed_regions": []string{"us-east-1"}}, nil), code: fault.PolicyViolation, rule: "allowed_regions", says: "eu-west-1"},
		{tries: "more memory, where the provider tells it only afterwards", call: job("", object{"memory_mb": 128}, limits(object{"memory_mb": 1024}), func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X-Amz-Log-Result", tail("REPORT RequestId: req-1\tBilled Duration: 1 ms\tMemory Size: 2048 MB"))
			_, _ = io.WriteString(w, `{}`)
		}), code: fault.ResourceExceeded, rule: "resource_limits.memory_mb", says: "2048 MB", calls: 1},
		{tries: "a role of somebody else", call: under(Policy{AllowedRoles: []string{"arn:aws:iam::123456789012:role/specql-*"}}, job("", object{"auth_config": object{"role_arn": "arn:aws:iam::123456789012:role/admin"}}, nil, nil)), code: fault.PolicyViolation, rule: "allowed_roles", says: "role/admin"},
		{tries: "one call that may cost more than the hour", call: job(big, nil, cap(0.1), nil), code: fault.BudgetExceeded, rule: "cost_limits", says: "this one 0.151667 USD"},
		{tries: "a small size in the registry, to reserve less", call: job("", object{"memory_mb": 128, "timeout": 1}, cap(0.1), nil), code: fault.BudgetExceeded, rule: "cost_limits", says: "lambda:GetFunctionConfiguration"},
		{tries: "a cheap processor in the registry", call: job(big, object{"architecture": "arm64"}, cap(0.14), nil), code: fault.BudgetExceeded, rule: "cost_limits", says: "0.151667"},
		{tries: "an event, which runs three times", call: job(big, object{"invocation_type": "event"}, cap(0.4), nil), code: fault.BudgetExceeded, rule: "cost_limits", says: "this one 0.455"},
		{tries: "a region without a price", call: job(small, object{"region": "mx-central-1"}, cap(5), nil), code: fault.PolicyViolation, rule: "cost_limits", says: "no price for mx-central-1"},
		{tries: "a provider that bills in silence", call: under(Policy{CostLimits: CostLimits{MaxCostPerHour: 5}}, func(t *testing.T, w *world) *runner.Job {
			return newJob(t, gcpConfig(w.function(t, "", nil)), nil, nil)
		}), code: fault.PolicyViolation, rule: "cost_limits", says: "gcp does not tell"},
		{tries: "another invocation under the ceiling", call: under(Policy{CostLimits: CostLimits{MaxCostPerHour: 0.1}}, job(big, nil, cap(1000), nil)), code: fault.BudgetExceeded, rule: "cost_limits", says: "the runner"},
		{tries: "a second header by the operation's name", call: func(t *testing.T, w *world) *runner.Job {
			j := newJob(t, gcpConfig(w.function(t, "", nil)), nil, nil)
			j.Operation.Name = "x\r\nX-Evil: 1"
			return j
		}, code: fault.Validation, says: "X-Specql-Operation"},
		{tries: "a second header by the correlation", call: func(t *testing.T, w *world) *runner.Job {
			j := newJob(t, gcpConfig(w.function(t, "", nil)), nil, nil)
			j.CorrelationID = "x\r\nX-Evil: 1"
			return j
		}, code: fault.Validation, says: "X-Correlation-Id"},
		{tries: "another path by the function's name", call: job("", object{"function_name": "../../2018-10-31/layers"}, nil, nil), code: fault.Validation, says: "function_name"},
		{tries: "another host by the region", call: func(t *testing.T, _ *world) *runner.Job {
			return newJob(t, object{"provider": "aws", "function_name": "f", "region": "x.evil.test/"}, nil, nil)
		}, code: fault.Validation, says: "region"},
		{tries: "a redirect to the metadata service", call: job("", nil, nil, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", "http://169.254.169.254/latest/meta-data/")
			w.WriteHeader(http.StatusTemporaryRedirect)
		}), code: fault.RemoteError, calls: 1},
		{tries: "the runner's keys, given back in every form", call: job("", nil, nil, secrets), code: fault.RemoteError, says: "***", calls: 1, see: func(t *testing.T, o *runnertest.Outcome) {
			require.Contains(t, strings.Join(o.Lines(""), "\n"), "***")
		}},
		{tries: "an answer without an end", call: raw(flood("HTTP/1.1 200 OK\r\n\r\n\"", strings.Repeat("x", 64<<10))), code: fault.ResourceExceeded, calls: 1},
		{tries: "a bomb", call: func(t *testing.T, w *world) *runner.Job {
			var b bytes.Buffer
			z := gzip.NewWriter(&b)
			_, err := z.Write(make([]byte, 16<<20))
			require.NoError(t, err)
			require.NoError(t, z.Close())
			return newJob(t, gcpConfig(w.function(t, "", func(rw http.ResponseWriter, _ *http.Request) {
				rw.Header().Set("Content-Encoding", "gzip")
				_, _ = rw.Write(b.Bytes())
			})), nil, nil)
		}, code: fault.ResourceExceeded, calls: 1},
		{tries: "a head without an end", call: raw(flood("HTTP/1.1 200 OK\r\n", "X-A: "+strings.Repeat("x", 1000)+"\r\n")), code: fault.RemoteError, calls: 1},
		{tries: "interim answers without an end", call: raw(flood("", "HTTP/1.1 103 Early Hints\r\n\r\n")), code: fault.RemoteError, calls: 1},
		{tries: "trailers without an end", call: raw(flood("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n", "X-A: "+strings.Repeat("x", 1000)+"\r\n")), code: fault.RemoteError, calls: 1},
		{tries: "an answer that does not end", call: raw(func(c net.Conn) {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
			_, _ = c.Read(make([]byte, 1))
		}), timeout: 3 * time.Second, code: fault.Timeout, retried: true, calls: 1},
		{tries: "a configuration that does not end", call: func(t *testing.T, w *world) *runner.Job {
			s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
			t.Cleanup(s.Close)
			return newJob(t, lambdaConfig(s.URL), limits(object{"memory_mb": 1024}), nil)
		}, timeout: 200 * time.Millisecond, code: fault.Timeout, retried: true},
	} {
		h.named(t)
	}
}

// TestSpendNeverPassesTheCap calls a function from many sides at once, under many names, by calls
// that break off, and adds up what the provider billed.
func TestSpendNeverPassesTheCap(t *testing.T) {
	awsKeys(t)
	w := &world{}
	const each = 0.0100002 // 50 s and 10 s of a cold start, with 10 GB
	var n atomic.Int64
	url := w.function(t, `{"MemorySize":10240,"Timeout":50}`, func(rw http.ResponseWriter, _ *http.Request) {
		switch n.Add(1) % 3 {
		case 0: // gone without a word of what it cost
			panic(http.ErrAbortHandler)
		case 1:
			rw.Header().Set("X-Amz-Log-Result", tail("REPORT RequestId: req-1\tBilled Duration: 60000 ms\tMemory Size: 10240 MB"))
		}
		_, _ = io.WriteString(rw, `{}`)
	})
	r := newRunner(t, Options{Ceiling: &Policy{AllowedEndpoints: []string{"127.0.0.1"}, CostLimits: CostLimits{MaxCostPerHour: 0.1}}})
	var all sync.WaitGroup
	var over atomic.Int64
	for i := range 60 {
		j := newJob(t, lambdaConfig(url), nil, nil)
		j.Service.Name = fmt.Sprintf("service-%d", i)
		all.Go(func() {
			result, err := r.Execute(t.Context(), j, &notes{})
			if err != nil {
				t.Error(err)
			} else if f := fault.From(result.Err); f != nil && f.Code == fault.BudgetExceeded {
				over.Add(1)
			}
		})
	}
	all.Wait()
	require.EqualValues(t, 9, w.calls.Load(), "nine may cost 0.09, ten more than 0.1")
	require.EqualValues(t, 60-9, over.Load())
	require.LessOrEqual(t, float64(w.calls.Load())*each, 0.1)
}

// TestSpendIsGivenBack: what the provider refused to run costs nothing.
func TestSpendIsGivenBack(t *testing.T) {
	awsKeys(t)
	w := &world{}
	url := w.function(t, `{"MemorySize":10240,"Timeout":50}`, func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("X-Amzn-Errortype", "TooManyRequestsException")
		rw.WriteHeader(http.StatusTooManyRequests)
		_, _ = io.WriteString(rw, `{}`)
	})
	r := newRunner(t, Options{})
	for range 5 {
		f, _ := failure(t, r, newJob(t, lambdaConfig(url), object{"cost_limits": object{"max_cost_per_hour": 0.011}}, nil))
		require.Equal(t, fault.RateLimited, f.Code, f.Message)
	}
	require.EqualValues(t, 5, w.calls.Load())
}
