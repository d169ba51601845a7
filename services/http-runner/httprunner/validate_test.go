package httprunner

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/runner"
)

func TestValidate(t *testing.T) {
	t.Parallel()
	r := newRunner(t, Options{})
	const good = `{"base_url":"https://api.example.com/v1"}`
	tests := []struct {
		name               string
		config, op, policy string
		want               []string // "path: part of message", "~" before a warning
	}{
		{"good", `{"base_url":"https://api.stripe.com/v1","auth_type":"bearer","auth_config":{"token_env_var":"STRIPE_SECRET_KEY"},"timeout":30,"retry_config":{"max_retries":3,"backoff_factor":2.0},"headers":{"Stripe-Version":"2024-06-20"}}`, `{"method":"GET","path":"/charges/{id}?x={y}","query":{"a":1},"success_codes":[200]}`, `{"allowed_domains":["api.stripe.com"],"max_request_size":1048576,"rate_limit_per_minute":100,"circuit_breaker":{"failure_threshold":5,"recovery_timeout":30}}`, nil},
		{"no base url", `{}`, `{}`, `{}`, []string{"~runner_config.base_url: SPECQL_SVC_BASE_URL"}},
		{"relative", `{"base_url":"api.example.com"}`, `{}`, `{}`, []string{"runner_config.base_url: not an absolute"}},
		{"scheme", `{"base_url":"ftp://api.example.com"}`, `{}`, `{}`, []string{"runner_config.base_url: not an http"}},
		{"password", `{"base_url":"https://u:topsecret@api.example.com"}`, `{}`, `{}`, []string{"runner_config.base_url: user name or password"}},
		{"fragment", `{"base_url":"https://api.example.com/#x"}`, `{}`, `{}`, []string{"runner_config.base_url: fragment"}},
		{"unknown key", `{"base_url":"https://api.example.com","auth_tpye":"none"}`, `{}`, `{}`, []string{"runner_config.auth_tpye: unknown key"}},
		{"auth type", `{"base_url":"https://api.example.com","auth_type":"beerer"}`, `{}`, `{}`, []string{"runner_config.auth_type: not a known value"}},
		{"auth needs", `{"base_url":"https://api.example.com","auth_type":"bearer"}`, `{}`, `{}`, []string{"runner_config.auth_config.token_env_var: needs token_env_var"}},
		{"auth needs many", `{"base_url":"https://api.example.com","auth_type":"aws_sigv4","auth_config":{"region":"eu central"}}`, `{}`, `{}`, []string{
			"runner_config.auth_config.service: needs", "runner_config.auth_config.access_key_id_env_var: needs", "runner_config.auth_config.secret_access_key_env_var: needs", "runner_config.auth_config.region: not a region",
		}},
		{"auth unused", `{"base_url":"https://api.example.com","auth_config":{"token_env_var":"T"}}`, `{}`, `{}`, []string{"~runner_config.auth_config.token_env_var: does not use"}},
		{"secret in place of a name", `{"base_url":"https://api.example.com","auth_type":"bearer","auth_config":{"token_env_var":"topsecret-1"}}`, `{}`, `{}`, []string{"runner_config.auth_config.token_env_var: must name"}},
		{"token url", `{"base_url":"https://api.example.com","auth_type":"oauth2_client_credentials","auth_config":{"client_id_env_var":"A","client_secret_env_var":"B","token_url":"/token"}}`, `{}`, `{}`, []string{"runner_config.auth_config.token_url: not an absolute"}},
		{"header", `{"base_url":"https://api.example.com","headers":{"Host":"x"}}`, `{"headers":{"Content-Length":"1","A B":"c"}}`, `{}`, []string{"runner_config.headers.Host: set by the runner", "operations.op.headers.A B: not a header name", "operations.op.headers.Content-Length: set by the runner"}},
		{"credential in a header", `{"base_url":"https://api.example.com","headers":{"Authorization":"Bearer topsecret"}}`, `{}`, `{}`, []string{"~runner_config.headers.Authorization: credential"}},
		{"header twice", `{"base_url":"https://api.example.com","headers":{"X-A":"1","x-a":"2"}}`, `{}`, `{}`, []string{"runner_config.headers.x-a: twice"}},
		{"header value", `{"base_url":"https://api.example.com","headers":{"X-A":["1"]}}`, `{}`, `{}`, []string{"runner_config.headers.X-A: "}},
		{"path", good, `{"path":"https://evil.test/x"}`, `{}`, []string{"operations.op.path: whole URL"}},
		{"path braces", good, `{"path":"/a/{a b}"}`, `{}`, []string{"operations.op.path: holds a space", "operations.op.path: braces"}},
		{"path up", good, `{"path":"/a/../b"}`, `{}`, []string{"operations.op.path: .. segment"}},
		{"path percent", good, `{"path":"/100%"}`, `{}`, []string{"operations.op.path: percent"}},
		{"method, body", good, `{"method":"get","body":"xml"}`, `{}`, []string{"operations.op.body: not a known value", "operations.op.method: not a known value"}},
		{"query", good, `{"query":{"a":{"b":1},"c":null,"d":[1,[2]]}}`, `{}`, []string{"operations.op.query.a: not a value", "operations.op.query.c: not a value", "operations.op.query.d: not a value"}},
		{"statuses", `{"base_url":"https://api.example.com","retry_config":{"retry_status_codes":[99]}}`, `{"success_codes":[200,1000]}`, `{}`, []string{"runner_config.retry_config.retry_status_codes[0]: not an HTTP status", "operations.op.success_codes[1]: not an HTTP status"}},
		{"domains", good, `{}`, `{"allowed_domains":["https://api.example.com","api.example.com:443","*","*.*.x","api.example.com/v1",""]}`, []string{
			"security_policy.allowed_domains[0]: not a domain", "security_policy.allowed_domains[1]: not a domain", "security_policy.allowed_domains[2]: not a domain",
			"security_policy.allowed_domains[3]: not a domain", "security_policy.allowed_domains[4]: not a domain", "security_policy.allowed_domains[5]: not a domain",
		}},
		{"ports", good, `{}`, `{"allowed_ports":[0,443,70000]}`, []string{"security_policy.allowed_ports[0]: not a port", "security_policy.allowed_ports[2]: not a port"}},
		{"limits", good, `{}`, `{"rate_limit_per_minute":-1,"max_request_size":-5}`, []string{"security_policy.max_request_size: minimum", "security_policy.rate_limit_per_minute: minimum"}},
		{"out of reach", good, `{}`, `{"allowed_domains":["*.example.com"],"allowed_ports":[443]}`, nil},
		{"domain out of reach", good, `{}`, `{"allowed_domains":["example.com"]}`, []string{"~runner_config.base_url: every call would be refused"}},
		{"port out of reach", good, `{}`, `{"allowed_ports":[80]}`, []string{"~runner_config.base_url: every call would be refused"}},
		{"private", `{"base_url":"http://localhost:8080"}`, `{}`, `{}`, []string{"~runner_config.base_url: loopback"}},
		{"private address", `{"base_url":"http://[::ffff:10.0.0.1]:8080"}`, `{}`, `{}`, []string{"~runner_config.base_url: private"}},
		{"private allowed", `{"base_url":"http://localhost:8080"}`, `{}`, `{"allow_private_networks":true}`, nil},
		{"types", `{"base_url":5,"timeout":"x"}`, `{"path":5}`, `{"allowed_domains":"x"}`, []string{"runner_config.base_url: must be a string", "runner_config.timeout: must be a number", "operations.op.path: must be a string", "security_policy.allowed_domains: must be an array"}},
		{
			"everything at once", `{"base_url":"ftp://x","unknown":1,"timeout":"x","headers":{"X-A":["1"],"Host":"h"},"auth_type":"bearer","auth_config":{"token_env_var":5,"token_url":"/t"},"retry_config":{"retry_status_codes":[99]}}`,
			`{"unknown":1,"path":"/a/../b","headers":{"X-A":{},"Host":"h"},"query":{"a":{}},"success_codes":["x",1000]}`,
			`{"unknown":1,"allowed_ports":["x",70000],"max_response_size":4194305,"max_request_size":16777217,"allowed_env_vars":["A B","A*B","OK_*","OK","*"]}`,
			[]string{
				"runner_config.unknown: unknown key", "runner_config.timeout: must be a number", "runner_config.headers.X-A: ", "runner_config.auth_config.token_env_var: must be a string",
				"runner_config.base_url: not an http", "runner_config.headers.Host: set by the runner", "runner_config.auth_config.token_url: not an absolute", "~runner_config.auth_config.token_url: does not use",
				"runner_config.retry_config.retry_status_codes[0]: not an HTTP status",
				"operations.op.unknown: unknown key", "operations.op.headers.X-A: ", "operations.op.success_codes[0]: must be an integer",
				"operations.op.path: .. segment", "operations.op.headers.Host: set by the runner", "operations.op.query.a: not a value", "operations.op.success_codes[1]: not an HTTP status",
				"security_policy.unknown: unknown key", "security_policy.allowed_ports[0]: must be an integer", "security_policy.allowed_ports[1]: not a port",
				"~security_policy.max_response_size: 4194304 bytes at most", "~security_policy.max_request_size: 16777216 bytes at most",
				"security_policy.allowed_env_vars[0]: not the name", "security_policy.allowed_env_vars[1]: not the name",
			},
		},
		{"reach behind an unknown key", good, `{}`, `{"unknown":1,"allowed_domains":["example.com"]}`, []string{"security_policy.unknown: unknown key", "~runner_config.base_url: every call would be refused"}},
		{"auth type is no type", `{"base_url":"https://api.example.com","auth_type":5,"auth_config":{"token_env_var":"T"}}`, `{}`, `{}`, []string{"runner_config.auth_type: must be a string"}},
		{"variable out of reach", `{"base_url":"https://api.example.com","auth_type":"bearer","auth_config":{"token_env_var":"OTHER"}}`, `{}`, `{"allowed_env_vars":["STRIPE_*"]}`, []string{"~runner_config.auth_config.token_env_var: every call would be refused"}},
		{"not JSON", `{`, `[]`, `null`, []string{"runner_config: not JSON", "operations.op: must be an object", "security_policy: must be an object"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, err := r.Validate(t.Context(), &runner.Service{
				Name: "svc", ExecutionType: ExecutionType, Config: json.RawMessage(tt.config), Policy: json.RawMessage(tt.policy),
				Operations: []runner.Operation{{Name: "op", Config: json.RawMessage(tt.op)}},
			})
			require.NoError(t, err)
			var lines []string
			for _, p := range got {
				line := p.Path + ": " + p.Message
				if p.Warning {
					line = "~" + line
				}
				require.NotContains(t, line+p.Mend, "topsecret")
				lines = append(lines, line)
			}
			require.Len(t, lines, len(tt.want), "%s", strings.Join(lines, "\n"))
			for _, w := range tt.want {
				path, part, _ := strings.Cut(w, ": ")
				require.Condition(t, func() bool {
					for _, l := range lines {
						if strings.HasPrefix(l, path+": ") && strings.Contains(l, part) {
							return true
						}
					}
					return false
				}, "%s in\n%s", w, strings.Join(lines, "\n"))
			}
		})
	}
}

func TestBaseURLVariable(t *testing.T) {
	t.Parallel()
	require.Empty(t, cmp.Diff("SPECQL_MY_API_2_B_CHER_BASE_URL", BaseURLVariable("my-api.2 bücher")))
}

func FuzzPlan(f *testing.F) {
	f.Add(`{"base_url":"http://203.0.113.1/a"}`, `{"path":"/{a}","query":{"q":"{b}"}}`, `{"allowed_domains":["*.x.test"]}`, `{"a":"x","b":[1]}`)
	f.Add(`{"base_url":"http://[::1"}`, `{"body":"form"}`, `{"circuit_breaker":{}}`, `{"a":{"b":[null]}}`)
	r, err := New(Options{})
	require.NoError(f, err)
	f.Fuzz(func(t *testing.T, config, op, policy, in string) {
		a := attempt{input: in}
		job := a.job(t)
		job.Service.Config, job.Operation.Config, job.Service.Policy = json.RawMessage(config), json.RawMessage(op), json.RawMessage(policy)
		_, err := r.Validate(t.Context(), &job.Service)
		require.NoError(t, err)
		p, ferr := r.planFor(&job.Service, &job.Operation)
		if ferr != nil {
			return
		}
		c := &call{runner: r, plan: p, job: job, sink: &sink{}, checks: &runner.Checks{}, meter: &meter{}}
		input, ferr := readInput(job.Input)
		if ferr != nil {
			return
		}
		m, ferr := c.compose(input)
		if ferr != nil {
			return
		}
		require.Equal(t, p.base.url.Host, m.url.Host)
		require.False(t, dotSegments(strings.TrimPrefix(m.url.EscapedPath(), p.base.url.EscapedPath())))
	})
}
