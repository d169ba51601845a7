package modernize

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"go.yaml.in/yaml/v4"

	"github.com/specql/mesh/pkg/spec"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func agree([]byte) (bool, error) { return true, nil }

func rewrite(t *testing.T, text string) (string, []Finding) {
	t.Helper()
	f := spec.File{Name: "r.yaml", Content: []byte(text)}
	found, err := Find(f)
	require.NoError(t, err)
	out, err := Rewrite(f, found, agree)
	require.NoError(t, err)
	return string(out), found
}

func TestRewriteKeepsTheRest(t *testing.T) {
	t.Parallel()
	for name, x := range map[string]struct{ before, after string }{
		"CRLF": {
			"services:\r\n- name: a\r\n  category: c\r\n  runner_config: {base_url: 'https://${H}/'}\r\n",
			"services:\r\n- name: a\r\n  category: c\r\n  execution_type: http\r\n  runner_config: {base_url: 'https://${H}/'}\r\n",
		},
		"no line end": {
			"services:\n- runner_config: {base_url: 'https://${H}/'}\n  name: a",
			"services:\n- runner_config: {base_url: 'https://${H}/'}\n  name: a\n  execution_type: http",
		},
		"braces, wide letters": {
			"services: [{name: Ünïcode 🙂, runner_config: {}, operations: []}]\n",
			"services: [{name: Ünïcode 🙂, execution_type: http, runner_config: {base_url: \"${SPECQL__N_CODE___BASE_URL:-}\"}, operations: []}]\n",
		},
		"nothing in a block": {
			"services:\n  - name: a\n    execution_type: http\n    runner_config: # to come\n    operations: []\n",
			"services:\n  - name: a\n    execution_type: http\n    runner_config: # to come\n      base_url: \"${SPECQL_A_BASE_URL:-}\"\n    operations: []\n",
		},
		"a policy that is there": {
			"services:\n  - name: a\n    execution_type: http\n    runner_config: {base_url: 'https://a.test:8443/x'}\n    security_policy:\n        # slowly\n        rate_limit_per_minute: 5\n    operations: []\n",
			"services:\n  - name: a\n    execution_type: http\n    runner_config: {base_url: 'https://a.test:8443/x'}\n    security_policy:\n        allowed_domains: [\"a.test\"]\n        # slowly\n        rate_limit_per_minute: 5\n    operations: []\n",
		},
		"what looks like a comment": {
			"services:\n  - name: a\n    description: |\n      text\n      # text\n\n    execution_type: http\n    runner_config:\n      base_url: https://a.test\n      headers:\n        X: |\n          v\n          # v\n    operations: []\n",
			"services:\n  - name: a\n    description: |\n      text\n      # text\n\n    execution_type: http\n    runner_config:\n      base_url: https://a.test\n      headers:\n        X: |\n          v\n          # v\n    operations: []\n",
		},
		"a value of two lines": {
			"services:\n  - name: a\n    category: one\n      two\n    runner_config: {base_url: 'https://${H}/'}\n",
			"services:\n  - name: a\n    category: one\n      two\n    runner_config: {base_url: 'https://${H}/'}\n",
		},
		"shared by an alias": {
			"x-c: &c {timeout: 5}\nservices:\n  - name: a\n    execution_type: http\n    runner_config: *c\n    operations: []\n",
			"x-c: &c {timeout: 5}\nservices:\n  - name: a\n    execution_type: http\n    runner_config: *c\n    operations: []\n",
		},
		"merged": {
			"x-s: &s {category: c, execution_type: docker}\nservices:\n  - <<: *s\n    name: a\n",
			"x-s: &s {category: c, execution_type: docker}\nservices:\n  - <<: *s\n    name: a\n",
		},
		"merged into another": {
			"services:\n  - &one\n    name: a\n    category: c\n    runner_config: {base_url: 'https://${H}/'}\n  - <<: *one\n    name: b\n",
			"services:\n  - &one\n    name: a\n    category: c\n    execution_type: http\n    runner_config: {base_url: 'https://${H}/'}\n  - <<: *one\n    name: b\n    execution_type: http\n",
		},
		"a metadata address": {
			"services:\n  - name: a\n    execution_type: http\n    runner_config: {base_url: 'http://169.254.169.254/'}\n",
			"services:\n  - name: a\n    execution_type: http\n    runner_config: {base_url: 'http://169.254.169.254/'}\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, found := rewrite(t, x.before)
			require.Equal(t, x.after, got)
			for _, f := range found {
				if f.Written {
					require.NotEmpty(t, f.Says())
				}
			}
			again, _ := rewrite(t, got)
			require.Equal(t, got, again, "a second time changes nothing")
		})
	}
}

func TestWhatTheCallerRefusesIsLeftOut(t *testing.T) {
	t.Parallel()
	f := spec.File{Content: []byte("services:\n- name: a\n  category: c\n- name: b\n  category: c\n")}
	found, err := Find(f)
	require.NoError(t, err)
	require.Len(t, found, 4)
	out, err := Rewrite(f, found, func(content []byte) (bool, error) { return !strings.Contains(string(content), "SPECQL_A_"), nil })
	require.NoError(t, err)
	require.Equal(t, "services:\n- name: a\n  category: c\n  execution_type: http\n- name: b\n  category: c\n  execution_type: http\n  runner_config:\n    base_url: \"${SPECQL_B_BASE_URL:-}\"\n", string(out))
	for _, x := range found {
		require.Equal(t, !strings.Contains(x.Modern, "SPECQL_A_"), x.Written, x.Modern)
	}
	out, err = Rewrite(f, found, func([]byte) (bool, error) { return false, nil })
	require.NoError(t, err)
	require.Equal(t, string(f.Content), string(out))
}

func TestSecretsAreNamedNotShown(t *testing.T) {
	t.Parallel()
	_, found := rewrite(t, `services:
  - name: a
    execution_type: docker
    runner_config:
      registry_auth: {username: topsecret1, password: topsecret2}
  - name: b
    execution_type: http
    runner_config:
      base_url: "${B}"
      auth_config: {token_env_var: B_TOKEN, client_secret: topsecret3}
      headers: {X-Api-Key: topsecret4, Accept: text/plain, authorization: Basic topsecret5, X-Token: "{token}"}
    operations:
      - {name: o, headers: {Authorization: "Bearer ${TOKEN}"}}
`)
	var got []string
	for _, f := range found {
		require.Equal(t, LiteralSecret, f.Pattern)
		require.NotContains(t, f.Message+f.Modern+f.Path, "topsecret")
		require.False(t, f.Fixable())
		got = append(got, f.Path)
	}
	require.Equal(t, []string{
		"services[0].runner_config.registry_auth.username", "services[0].runner_config.registry_auth.password",
		"services[1].runner_config.auth_config.client_secret",
		"services[1].runner_config.headers.X-Api-Key", "services[1].runner_config.headers.authorization",
		"services[1].operations[0].headers.Authorization",
	}, got)
}

func FuzzRewrite(f *testing.F) {
	f.Add("services:\n- name: a\n  category: c\n  runner_config: {base_url: 'https://a.test'}\n")
	f.Add("services: [{name: a, security_policy: {}}]\nx: {services: [{name: a, runner_config: {base_url: 'http://b'}}]}")
	f.Add("services: &a\n- <<: *a\n- *a\n")
	f.Fuzz(func(t *testing.T, text string) {
		file := spec.File{Name: "r.yaml", Content: []byte(text)}
		registry, _ := spec.ParseRegistry(file, spec.Options{})
		if registry == nil {
			return
		}
		found, err := Find(file)
		require.NoError(t, err)
		out, err := Rewrite(file, found, agree)
		require.NoError(t, err)
		var was, is any
		if yaml.Load([]byte(text), &was) == nil {
			require.NoError(t, yaml.Load(out, &is))
		}
	})
}
