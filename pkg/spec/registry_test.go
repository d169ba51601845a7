package spec_test

import (
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/spec"
)

// marker finds the comments of testdata/mistakes.yaml.
var marker = regexp.MustCompile(`# (\d+): `)

func TestEveryPlantedMistakeIsFoundInItsLine(t *testing.T) {
	f := readFile(t, "mistakes.yaml")
	want := map[int]string{}
	for i, line := range strings.Split(string(f.Content), "\n") {
		if m := marker.FindStringSubmatch(line); m != nil {
			want[i+1] = m[1]
		}
	}
	require.Len(t, want, 25)

	_, problems := spec.ParseRegistry(f, spec.Options{LookupEnv: func(string) (string, bool) { return "", false }})
	for _, p := range problems {
		t.Log(p)
		require.NotEmpty(t, want[p.Line], "no mistake is planted in the line of: %s", p)
		delete(want, p.Line)
		require.False(t, p.Warning)
		require.Positive(t, p.Column)
		require.NotEmpty(t, p.Message)
		require.NotEmpty(t, p.Path)
	}
	require.Empty(t, want)
	require.Len(t, problems, 25)
}

// findings writes problems as "line:column path: message; mend".
func findings(problems spec.Problems) []string {
	out := []string{}
	for _, p := range problems {
		text := strings.TrimPrefix(p.String(), p.File+":")
		if p.Warning {
			text = "warning " + text
		}
		out = append(out, text)
	}
	return out
}

func parseRegistry(t *testing.T, text string, o spec.Options) (*spec.Registry, []string) {
	t.Helper()
	r, problems := spec.ParseRegistry(spec.File{Name: "r.yaml", Content: []byte(text)}, o)
	return r, findings(problems)
}

func env(pairs ...string) func(string) (string, bool) {
	return func(name string) (string, bool) {
		for i := 0; i < len(pairs); i += 2 {
			if pairs[i] == name {
				return pairs[i+1], true
			}
		}
		return "", false
	}
}

func TestRegistryProblems(t *testing.T) {
	for name, test := range map[string]struct {
		text string
		opts spec.Options
		want []string
	}{
		"empty":              {"", spec.Options{}, []string{"1:1: the file is empty"}},
		"only comments":      {"# nothing\n", spec.Options{}, []string{"1:1: the file is empty"}},
		"a list":             {"- a\n", spec.Options{}, []string{"1:1: a registry must be a map, is a list; begin it with `services:`"}},
		"no services":        {"x-defaults: {}\n", spec.Options{}, []string{"1:1: the registry holds no services; begin it with `services:`"}},
		"services are a map": {"services:\n  stripe: {}\n", spec.Options{}, []string{"2:3: services: must be a list, is a map; write each item behind a `- `"}},
		"two documents":      {"services: []\n---\nservices: []\n", spec.Options{}, []string{"2:1: the file holds more than one YAML document; keep one document in each file"}},
		"not UTF-8":          {"services: []\n# \xff\n", spec.Options{}, []string{"2:3: the file is not valid UTF-8; save it as UTF-8"}},
		"alias that holds itself": {
			"services: &a [*a]\n",
			spec.Options{},
			[]string{"1:11: services[0]: must be a map, is a list", "1:15: services[0][0]: the alias *a holds itself"},
		},
		"merge of a scalar": {
			"services:\n  - name: a\n    <<: b\n",
			spec.Options{},
			[]string{
				"2:5: services[0]: the key \"category\" is missing; add `category:`",
				"2:5: services[0]: the key \"operations\" is missing; add `operations:`",
				"2:5: services[0]: the key \"type\" is missing; add `type:`",
				"3:9: services[0].<<: only maps can be merged, this is a string; merge an alias of a map, as in `<<: *defaults`",
			},
		},
		"not finite":  {"services: []\nx-a: .inf\n", spec.Options{}, []string{"2:6: x-a: .inf is not a finite number; quote it if it is a string"}},
		"unknown tag": {"services: []\nx-a: !secret b\n", spec.Options{}, []string{"2:6: x-a: the tag !secret is not known; remove it"}},
		"unknown environment": {
			"services: []\nproduction: {services: []}\nstaging: {services: []}\n",
			spec.Options{Env: "prodution"},
			[]string{`1:1: the registry has no environment "prodution"; did you mean "production"?`},
		},
		"an environment where there are none": {"services: []\n", spec.Options{Env: "production"}, []string{}},
		"a mistake in an overlay that is not chosen": {
			"services: []\nproduction:\n  services:\n    - {name: a, type: t, category: c, operations: [], timeuot: 1}\n",
			spec.Options{},
			[]string{`4:55: production.services[0].timeuot: unknown key "timeuot"; there are: name, type, category, execution_type, runner_config, security_policy, operations, description`},
		},
		"variables of an overlay that is not chosen need not be set": {
			"services: []\nproduction:\n  services:\n    - {name: a, type: t, category: c, operations: [{name: o, timeout: '${T}'}]}\n", spec.Options{LookupEnv: env()}, []string{},
		},
		"more than services in an overlay": {
			"services: []\nproduction: {services: [], alerts: []}\n",
			spec.Options{},
			[]string{`2:1: production: unknown key "production"; an overlay may hold ` + "`services` alone"},
		},
		"near a built-in type": {
			"services: [{name: a, type: t, category: c, operations: [], execution_type: dokcer}]\n",
			spec.Options{},
			[]string{`warning 1:76: services[0].execution_type: "dokcer" is none of the built-in execution types; did you mean "docker"?`},
		},
		"strict": {
			"services: [{name: a, type: t, category: c, operations: [], execution_type: dokcer}]\n",
			spec.Options{Strict: true},
			[]string{`1:76: services[0].execution_type: "dokcer" is none of the built-in execution types; did you mean "docker"?`},
		},
		"a type of one's own": {"services: [{name: a, type: t, category: c, operations: [], execution_type: wasm}]\n", spec.Options{}, []string{}},
		"remote reference": {
			"services: [{name: a, type: t, category: c, operations: [{name: o, input_schema: {$schema: 'https://json-schema.org/draft/2020-12/schema', $ref: 'file:///etc/passwd'}}]}]\n",
			spec.Options{},
			[]string{"1:81: services[0].operations[0].input_schema: the schema is not valid: file:///etc/passwd is outside of the schema, and nothing is loaded from elsewhere"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, got := parseRegistry(t, test.text, test.opts)
			require.Empty(t, cmp.Diff(test.want, got))
		})
	}
}

func TestTabsAreNamedAsTheFault(t *testing.T) {
	_, got := parseRegistry(t, "services:\n\t- name: a\n", spec.Options{})
	require.Len(t, got, 1)
	require.True(t, strings.HasPrefix(got[0], "2:1: this is not YAML"), got[0])
	require.Contains(t, got[0], "indent with spaces, not with tabs")
}

func TestBoundsOnDocuments(t *testing.T) {
	var bomb strings.Builder
	bomb.WriteString("x-a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n")
	for i := 1; i < 12; i++ {
		last, next := strconv.Itoa(i-1), strconv.Itoa(i)
		bomb.WriteString("x-a" + next + ": &a" + next + " [" + strings.Repeat("*a"+last+",", 10) + "]\n")
	}
	bomb.WriteString("services: *a11\n")
	for name, test := range map[string]struct{ text, want string }{
		"size":    {"services: []\n#" + strings.Repeat("x", spec.MaxFileBytes), "the limit is 4194304"},
		"depth":   {"services: " + strings.Repeat("[", 2000) + strings.Repeat("]", 2000) + "\n", "depth"},
		"aliases": {bomb.String(), "aliases expand to more than 50000 values"},
	} {
		t.Run(name, func(t *testing.T) {
			began := time.Now()
			_, got := parseRegistry(t, test.text, spec.Options{})
			require.Len(t, got, 1)
			require.Contains(t, got[0], test.want)
			require.Less(t, time.Since(began), 5*time.Second)
		})
	}
}

const base = `
services:
  - name: Stripe
    type: payment
    category: financial
    runner_config:
      base_url: "${SCHEME:-https}://${HOST}/v1"
      timeout: 30
      auth_config: {token_env_var: "${NOT_READ}"}
      retry_config: {max_retries: 5, backoff_factor: 1.5}
      headers: {A: "1", B: "$${HOST} $$ ${input.x}"}
      tags: [a, b]
    operations:
      - name: charge
        input_schema: {amount: integer}
        path: /charges
      - name: refund
        timeout: ${T}
        max_retries: 0
        method: PUT
production:
  services:
    - name: STRIPE
      runner_config:
        headers: {A: "2"}
        tags: [c]
    - name: extra
      execution_type: shell
`

func TestRegistryWithOverlay(t *testing.T) {
	lookup := env("HOST", "api.example.com", "T", "2.5")
	r, got := parseRegistry(t, base, spec.Options{LookupEnv: lookup})
	require.Equal(t, []string{
		`warning 27:7: production.services[1]: the key "category" is missing; add ` + "`category:`",
		`warning 27:7: production.services[1]: the key "operations" is missing; add ` + "`operations:`",
		`warning 27:7: production.services[1]: the key "type" is missing; add ` + "`type:`",
	}, got)
	require.Equal(t, []string{"Stripe"}, r.ServiceNames())
	require.Equal(t, []string{"production"}, r.Envs)

	r, _ = parseRegistry(t, base, spec.Options{LookupEnv: lookup, Env: "production"})
	require.Equal(t, []string{"Stripe", "extra"}, r.ServiceNames())
	require.Equal(t, "production", r.Env)
	s := r.Service("stripe")
	require.Equal(t, "http", s.ExecutionType)
	require.Equal(t, "shell", r.Service("EXTRA").ExecutionType)
	require.Nil(t, r.Service("nobody"))
	require.Empty(t, cmp.Diff(map[string]any{
		"base_url":     "https://api.example.com/v1",
		"timeout":      int64(30),
		"auth_config":  map[string]any{"token_env_var": "${NOT_READ}"},
		"retry_config": map[string]any{"max_retries": int64(5), "backoff_factor": 1.5},
		"headers":      map[string]any{"A": "2", "B": "${HOST} $$ ${input.x}"},
		"tags":         []any{"c"},
	}, s.RunnerConfig))
	require.Empty(t, s.SecurityPolicy)
	require.Equal(t, spec.RetryPolicy{BackoffFactor: 1.5}, s.Retry())
	require.Equal(t, spec.RetryPolicy{BackoffFactor: 2}, r.Service("extra").Retry())

	charge, refund := s.Operation("charge"), s.Operation("refund")
	require.Equal(t, 30*time.Second, charge.Timeout)
	require.Equal(t, 5, *charge.MaxRetries)
	require.Equal(t, map[string]any{"path": "/charges"}, charge.Config)
	require.Nil(t, charge.Output)
	require.Equal(t, 2500*time.Millisecond, refund.Timeout)
	require.Equal(t, 0, *refund.MaxRetries)
	require.Nil(t, s.Operation("Charge"))

	for path, want := range map[string]string{
		"runner_config.base_url":             "r.yaml:7:17",
		"runner_config":                      "r.yaml:24:7",
		"runner_config.headers.A":            "r.yaml:25:22",
		"runner_config.headers.B":            "r.yaml:11:28",
		"runner_config.auth_config.nothing":  "r.yaml:9:7",
		"runner_config.tags[0]":              "r.yaml:26:16",
		"runner_config.tags[7]":              "r.yaml:26:9",
		"operations.charge.path":             "r.yaml:16:15",
		"operations[1].method":               "r.yaml:20:17",
		"operations.refund.nothing.at.all":   "r.yaml:17:9",
		"operations.nobody":                  "r.yaml:13:5",
		"security_policy.allowed_domains[0]": "r.yaml:3:5",
		"":                                   "r.yaml:3:5",
		"...[[":                              "r.yaml:3:5",
	} {
		require.Equal(t, want, s.PositionOf(path).String(), path)
	}
}

func TestVariablesMustBeSet(t *testing.T) {
	_, got := parseRegistry(t, "services: [{name: a, type: '${KIND}', category: c, operations: []}]\n", spec.Options{LookupEnv: env()})
	require.Equal(t, []string{"1:28: services[0].type: the environment variable KIND is not set; set KIND, or give it a default with `${KIND:-…}`; a secret belongs in a `*_env_var` field"}, got)
}

func TestAlerts(t *testing.T) {
	r, got := parseRegistry(t, `
alerts:
  - name: Slow
    condition: "shell_p95_seconds > 2 && cost_per_hour < 5.0"
    window: 15m
    notify: {service: mail, operation: send, input: {text: "$alert.name fired"}}
  - {name: Any, condition: "resource_violations > 5", execution_type: any}
`, spec.Options{})
	require.Empty(t, got)
	require.Len(t, r.Alerts, 2)
	require.Equal(t, 15*time.Minute, r.Alerts[0].Window)
	require.Equal(t, "mail", r.Alerts[0].Notify.Service)
	require.Equal(t, time.Hour, r.Alerts[1].Window)
	require.Equal(t, "any", r.Alerts[1].ExecutionType)
}

func TestDidYouMean(t *testing.T) {
	names := []string{"services", "alerts", "security_policy"}
	for name, want := range map[string]string{
		"servces": "services", "sevrices": "services", "Services": "services", "securitypolicy": "security_policy",
		"zebra": "", "": "", strings.Repeat("x", 10_000): "",
	} {
		require.Equal(t, want, spec.DidYouMean(name, names), name)
	}
}
