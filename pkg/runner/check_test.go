package runner

import (
	"encoding/json"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/fault"
)

type sampleConfig struct {
	BaseURL  string            `json:"base_url" jsonschema:"description=Where the target is,minLength=1"`
	AuthType string            `json:"auth_type,omitempty" jsonschema:"enum=none,enum=bearer,enum=basic"`
	Headers  map[string]string `json:"headers,omitempty"`
	Timeout  float64           `json:"timeout,omitempty" jsonschema:"minimum=0,maximum=60"`
	Retry    *sampleRetry      `json:"retry_config,omitempty"`
}

type sampleRetry struct {
	MaxRetries int   `json:"max_retries,omitempty"`
	Codes      []int `json:"retry_status_codes,omitempty"`
}

type sampleOperation struct {
	Path string `json:"path,omitempty"`
}

type samplePolicy struct {
	AllowedDomains []string `json:"allowed_domains,omitempty"`
}

func TestSchemaOf(t *testing.T) {
	t.Parallel()
	var schema map[string]any
	require.NoError(t, json.Unmarshal(SchemaOf[sampleConfig](), &schema))
	require.Equal(t, "https://json-schema.org/draft/2020-12/schema", schema["$schema"])
	require.Equal(t, false, schema["additionalProperties"])
	require.Equal(t, []any{"base_url"}, schema["required"])
	properties, ok := schema["properties"].(map[string]any)
	require.True(t, ok)
	require.Equal(t, map[string]any{"type": "string", "minLength": 1.0, "description": "Where the target is"}, properties["base_url"])
	retry, ok := properties["retry_config"].(map[string]any)
	require.True(t, ok)
	require.Equal(t, false, retry["additionalProperties"], "nested structs are inlined and closed")
}

func TestCheckServiceReportsEveryFaultAtItsPlace(t *testing.T) {
	t.Parallel()
	got := CheckService[sampleConfig, sampleOperation, samplePolicy](&Service{
		Config: json.RawMessage(`{"base_ulr":"x","auth_type":"baerer","timeout":99,"headers":{"a":1},"retry_config":{"max_retry":1,"retry_status_codes":[1,"x"]}}`),
		Policy: json.RawMessage(`{"allowed_domains":"x"}`),
		Operations: []Operation{
			{Name: "charge", Config: json.RawMessage(`{"pth":"/x"}`)},
			{Name: "refund"},
		},
	})
	want := []Problem{
		{Path: "runner_config.auth_type", Message: `"baerer" is not a known value`, Mend: `did you mean "bearer"? One of none, bearer, basic`},
		{Path: "runner_config.base_ulr", Message: `unknown key "base_ulr"`, Mend: `did you mean "base_url"?`},
		{Path: "runner_config.base_url", Message: `"base_url" is missing`, Mend: `add "base_url"`},
		{Path: "runner_config.headers.a", Message: "must be a string, is a number"},
		{Path: "runner_config.retry_config.max_retry", Message: `unknown key "max_retry"`, Mend: `did you mean "max_retries"?`},
		{Path: "runner_config.retry_config.retry_status_codes[1]", Message: "must be an integer, is a string"},
		{Path: "runner_config.timeout", Message: "maximum: got 99, want 60"},
		{Path: "operations.charge.pth", Message: `unknown key "pth"`, Mend: `did you mean "path"?`},
		{Path: "security_policy.allowed_domains", Message: "must be an array, is a string"},
	}
	require.Empty(t, cmp.Diff(want, got))
}

func TestCheckSchemaOfHostileInput(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ schema, value string }{
		"not json":          {`{}`, `{`},
		"bad schema":        {`{"type":5}`, `{}`},
		"schema not json":   {`{`, `{}`},
		"file reference":    {`{"$ref":"file:///etc/passwd"}`, `{}`},
		"network reference": {`{"$ref":"http://127.0.0.1/x"}`, `{}`},
		"any of":            {`{"anyOf":[{"type":"string"},{"type":"object","required":["a"]}]}`, `{}`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			require.Len(t, CheckSchema(json.RawMessage(c.schema), json.RawMessage(c.value), "x"), 1)
		})
	}
	require.Empty(t, CheckSchema(json.RawMessage(`true`), nil, "x"))
}

func TestDecode(t *testing.T) {
	t.Parallel()
	got, err := Decode[sampleConfig](json.RawMessage(`{"base_url":"x","timeout":1.5}`))
	require.NoError(t, err)
	require.Equal(t, sampleConfig{BaseURL: "x", Timeout: 1.5}, got)

	for _, empty := range []string{"", " \n", "{}", "null"} {
		got, err = Decode[sampleConfig](json.RawMessage(empty))
		require.NoError(t, err)
		require.Zero(t, got)
	}
	for raw, want := range map[string]string{
		`{"base_ulr":"x"}`:                   `VALIDATION: base_ulr: unknown key "base_ulr"; did you mean "base_url"?`,
		`{"retry_config":{"max_retrys":1}}`:  `VALIDATION: retry_config.max_retrys: unknown key "max_retrys"; did you mean "max_retries"?`,
		`{"base_url":5}`:                     `VALIDATION: base_url: must be a string, is a number`,
		`[]`:                                 `VALIDATION: must be an object, is an array`,
		`{"base_url":"x"} {}`:                `VALIDATION: not JSON: `,
		`{`:                                  `VALIDATION: not JSON: `,
		strings.Repeat(`{"headers":`, 20000): `VALIDATION: not JSON: `,
	} {
		_, err := Decode[sampleConfig](json.RawMessage(raw))
		require.ErrorContains(t, err, want)
		f, ok := fault.As(err)
		require.True(t, ok)
		require.Equal(t, fault.Validation, f.Code)
	}
}

func TestDigestIgnoresOrderAndSpace(t *testing.T) {
	t.Parallel()
	a := Digest(json.RawMessage(`{"b":[1,2.50],"a":{"y":1,"x":12345678901234567890}}`))
	b := Digest(json.RawMessage(`{ "a" : {"x":12345678901234567890,"y":1}, "b":[1,2.50] }`))
	require.Equal(t, a, b)
	require.Len(t, a, 64)
	require.NotEqual(t, a, Digest(json.RawMessage(`{}`)))
	require.Empty(t, Digest(func() {}))
}

func TestChecks(t *testing.T) {
	t.Parallel()
	var c Checks
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			for range 200 {
				c.Allow("allowed_domains", "example.com")
			}
		})
	}
	wg.Wait()
	err := c.Deny("allowed_ports", "25", "allowed_ports lists 443; add 25")
	require.Equal(t, fault.PolicyViolation, err.Code)
	require.Equal(t, "allowed_ports forbids 25: allowed_ports lists 443; add 25", err.Message)
	security := c.Context("abc", "cgroup")
	require.Len(t, security.GetChecks(), maxChecks+1, "bounded, and the denial is never lost")
	require.False(t, security.GetChecks()[maxChecks].GetAllowed())
	require.Equal(t, "abc", security.GetPolicyDigest())
	require.Equal(t, []string{"cgroup"}, security.GetIsolation())
}

type secretSink struct {
	Sink
	values []string
}

func (s *secretSink) Secret(v string) { s.values = append(s.values, v) }

func TestResolveSecret(t *testing.T) {
	t.Setenv("SPECQL_TEST_SECRET", "s3cr3t")
	t.Setenv("SPECQL_TEST_EMPTY", "")
	sink := &secretSink{}
	got, err := ResolveSecret(sink, "SPECQL_TEST_SECRET")
	require.NoError(t, err)
	require.Equal(t, "s3cr3t", got)
	require.Equal(t, []string{"s3cr3t"}, sink.values)

	_, err = ResolveSecret(sink, "SPECQL_TEST_EMPTY")
	require.ErrorContains(t, err, "VALIDATION: the environment variable SPECQL_TEST_EMPTY is empty")
	_, err = ResolveSecret(sink, "SPECQL_TEST_NOT_SET")
	require.ErrorContains(t, err, "VALIDATION: the environment variable SPECQL_TEST_NOT_SET is not set")
	_, err = ResolveSecret(sink, "")
	require.Error(t, err)

	// What opens the mesh itself is given to no service.
	for _, own := range []string{"SPECQL_TOKEN", "SPECQL_DATABASE", "DATABASE_URL"} {
		t.Setenv(own, "the-mesh's-own")
		_, err = ResolveSecret(sink, own)
		require.ErrorContains(t, err, "POLICY_VIOLATION: the environment variable "+own+" belongs to the mesh itself")
		require.NotContains(t, err.Error(), "the-mesh's-own")
	}
	require.Len(t, sink.values, 1)
}

func TestEnvVarAllowed(t *testing.T) {
	t.Parallel()
	require.True(t, EnvVarAllowed(nil, "ANY"))
	require.False(t, EnvVarAllowed([]string{}, "ANY"))
	list := []string{"EXACT", "PAY_*"}
	for name, allowed := range map[string]bool{"EXACT": true, "EXACTLY": false, "PAY_KEY": true, "PAY": false, "XPAY_KEY": false, "": false} {
		require.Equal(t, allowed, EnvVarAllowed(list, name), name)
	}
}
