package serverlessrunner

import (
	"context"
	"encoding/json"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

func mustAddr(s string) netip.Addr { return netip.MustParseAddr(s) }

func TestAddresses(t *testing.T) {
	for text, want := range map[string][3]bool{ // public, endpoint, loopback
		"8.8.8.8":                  {true, true, false},
		"2607:f8b0::1":             {true, true, false},
		"127.0.0.1":                {false, false, true},
		"127.9.9.9":                {false, false, true},
		"::1":                      {false, false, true},
		"::ffff:127.0.0.1":         {false, false, true},
		"10.1.2.3":                 {false, true, false},
		"172.16.0.1":               {false, true, false},
		"192.168.1.1":              {false, true, false},
		"::ffff:10.0.0.1":          {false, true, false},
		"100.64.0.1":               {false, true, false},
		"fd12::1":                  {false, true, false},
		"64:ff9b::a00:1":           {false, true, false},
		"2002:a00:1::":             {false, true, false},
		"64:ff9b::808:808":         {true, true, false},
		"169.254.169.254":          {false, false, false},
		"::ffff:169.254.169.254":   {false, false, false},
		"64:ff9b::a9fe:a9fe":       {false, false, false},
		"2002:a9fe:a9fe::":         {false, false, false},
		"64:ff9b::7f00:1":          {false, false, false},
		"fe80::1":                  {false, false, false},
		"fd00:ec2::254":            {false, false, false},
		"168.63.129.16":            {false, false, false},
		"100.100.100.200":          {false, false, false},
		"0.0.0.0":                  {false, false, false},
		"0.1.2.3":                  {false, false, false},
		"::":                       {false, false, false},
		"224.0.0.1":                {false, false, false},
		"ff02::1":                  {false, false, false},
		"255.255.255.255":          {false, false, false},
		"2001:0:53aa:64c:0:fffe::": {false, false, false},
	} {
		for i, r := range []reach{reachPublic, reachEndpoint, reachLoopback} {
			require.Equal(t, want[i], r.checkAddr(mustAddr(text)) == nil, "%s, reach %d", text, r)
		}
	}
	require.Error(t, reachEndpoint.checkAddr(mustAddr("fe80::1%eth0")))
}

func TestEndpoints(t *testing.T) {
	for text, why := range map[string]string{
		"https://api.example.com":   "",
		"https://10.0.0.1:8443/x":   "",
		"http://127.0.0.1:9001":     "",
		"http://[::1]:9001":         "",
		"http://LOCALHOST:9001":     "",
		"http://example.com":        "plain http",
		"http://10.0.0.1":           "plain http",
		"http://127.0.0.1.evil.com": "plain http",
		"http://localhost.evil.com": "plain http",
		"https://u:p@example.com":   "user or a password",
		"https://example.com/?a=b":  "query",
		"https://example.com/#x":    "fragment",
		"ftp://example.com":         "scheme",
		"//example.com":             "scheme",
		"example.com":               "not an absolute URL",
		"https://":                  "not an absolute URL",
		"https://:443":              "not an absolute URL",
		"https://exa mple.com":      "not an absolute URL",
		"http://127.0.0.1\r\nx":     "not an absolute URL",
	} {
		_, err := parseEndpoint(text)
		if why == "" {
			require.NoError(t, err, text)
			continue
		}
		require.ErrorContains(t, err, why, text)
	}
	require.True(t, matchHost("*.example.com", "a.example.com", "443"))
	require.False(t, matchHost("*.example.com", "example.com", "443"))
	require.False(t, matchHost("*.example.com", "evilexample.com", "443"))
	require.True(t, matchHost("Example.com:8443", "example.com", "8443"))
	require.False(t, matchHost("example.com:8443", "example.com", "443"))
	require.True(t, matchHost("[::1]:80", "::1", "80"))
}

func TestPolicy(t *testing.T) {
	noCloud(t)
	aws := object{"provider": "aws", "function_name": "f", "region": "us-east-1", "endpoint": "http://127.0.0.1:1", "memory_mb": 1024}
	azure := object{"provider": "azure", "function_name": "f", "app_name": "a", "endpoint": "http://127.0.0.1:1"}
	for name, tt := range map[string]struct {
		config  object
		policy  object
		ceiling string
		rule    string // "" for allowed
	}{
		"nothing written":              {aws, nil, ``, ""},
		"provider":                     {aws, object{"allowed_providers": []string{"gcp"}}, ``, "allowed_providers"},
		"provider by the ceiling":      {aws, object{"allowed_providers": []string{"aws"}}, `{"allowed_providers":["gcp","azure"]}`, "allowed_providers"},
		"no provider":                  {aws, object{"allowed_providers": []string{}}, ``, "allowed_providers"},
		"no provider by the ceiling":   {aws, nil, `{"allowed_providers":[]}`, "allowed_providers"},
		"region":                       {aws, object{"allowed_regions": []string{"us-west-2"}}, ``, "allowed_regions"},
		"region by the ceiling":        {aws, object{"allowed_regions": []string{"us-east-1"}}, `{"allowed_regions":["eu-west-1"]}`, "allowed_regions"},
		"a region must be named":       {azure, object{"allowed_regions": []string{"westeurope"}}, ``, "allowed_regions"},
		"memory":                       {aws, object{"resource_limits": object{"memory_mb": 512}}, ``, "resource_limits.memory_mb"},
		"memory by the ceiling":        {aws, object{"resource_limits": object{"memory_mb": 4096}}, `{"resource_limits":{"memory_mb":1023}}`, "resource_limits.memory_mb"},
		"endpoint":                     {aws, object{"allowed_endpoints": []string{"*.amazonaws.com"}}, ``, "allowed_endpoints"},
		"endpoint by the ceiling":      {aws, nil, `{"allowed_endpoints":["*.amazonaws.com"]}`, "allowed_endpoints"},
		"endpoint allowed by both":     {aws, object{"allowed_endpoints": []string{"127.0.0.1"}}, `{"allowed_endpoints":["127.0.0.1:1"]}`, ""},
		"everything allowed by both":   {aws, object{"allowed_regions": []string{"us-east-1"}}, `{"allowed_providers":["aws"],"allowed_regions":["us-east-1"],"allowed_endpoints":["127.0.0.1"],"resource_limits":{"memory_mb":1024}}`, ""},
		"the ceiling does not widen":   {aws, object{"allowed_providers": []string{"gcp"}}, `{"allowed_providers":["aws"]}`, "allowed_providers"},
		"azure by app, without region": {azure, nil, `{"allowed_endpoints":["*.azurewebsites.net"]}`, "allowed_endpoints"},
	} {
		t.Run(name, func(t *testing.T) {
			ceiling, err := ParseCeiling(json.RawMessage(tt.ceiling))
			require.NoError(t, err)
			f, result := failure(t, newRunner(t, Options{Ceiling: ceiling}), newJob(t, tt.config, tt.policy, nil))
			if tt.rule == "" {
				require.NotEqual(t, fault.PolicyViolation, f.Code, f.Message)
				return
			}
			require.Equal(t, fault.PolicyViolation, f.Code, f.Message)
			require.Contains(t, f.Message, tt.rule)
			checks := result.Security.GetChecks()
			require.Equal(t, tt.rule, checks[len(checks)-1].GetRule())
			require.False(t, checks[len(checks)-1].GetAllowed())
		})
	}
}

func TestCeilingIsChecked(t *testing.T) {
	p, err := ParseCeiling(nil)
	require.NoError(t, err)
	require.Nil(t, p)
	_, err = ParseCeiling(json.RawMessage(`{"allowed_provider":["aws"],"resource_limits":{"memory_mb":-1}}`))
	require.ErrorContains(t, err, `did you mean "allowed_providers"?`)
	require.ErrorContains(t, err, "memory_mb")
	_, err = ParseCeiling(json.RawMessage(`{"allowed_providers":["amazon"]}`))
	require.ErrorContains(t, err, `"amazon" is not a provider`)
}

func TestDigestTellsNothingFromAnything(t *testing.T) {
	nothing := effective{Service: Policy{AllowedProviders: []string{}}}
	require.NotEqual(t, effective{}.digest(), nothing.digest())
}

func limited(l CostLimits) effective { return effective{Service: Policy{CostLimits: l}} }

func TestBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &budget{}
		l, most := CostLimits{MaxInvocationsPerHour: 3, MaxCostPerHour: 1}, 0.0
		refused := func(text string) time.Duration {
			t.Helper()
			_, err := b.begin("s", limited(l), most)
			f := fault.From(err)
			require.Equal(t, fault.BudgetExceeded, f.Code)
			require.Contains(t, f.Message, text)
			require.False(t, f.Retryable)
			require.Positive(t, f.RetryAfter)
			return f.RetryAfter
		}
		for range 3 {
			done, err := b.begin("s", limited(l), most)
			require.NoError(t, err)
			done(true, budgetNoPrice)
		}
		b.services["s"].slot(time.Now()).invocations--
		done, err := b.begin("s", limited(l), most)
		require.NoError(t, err)
		done(false, budgetNoPrice)
		done, err = b.begin("s", limited(l), most)
		require.NoError(t, err, "a call that was not made does not count")
		done(true, budgetNoPrice)
		wait := refused("max_invocations_per_hour is 3")
		require.LessOrEqual(t, wait, budgetWindow+budgetSlot)
		_, err = b.begin("another", limited(l), most)
		require.NoError(t, err, "each service has its own")
		<-time.After(wait - 11*time.Second)
		refused("max_invocations_per_hour")
		<-time.After(11 * time.Second)

		// Cost: a call in flight counts with the most that it can cost.
		l, most = CostLimits{MaxCostPerHour: 1}, 0.5
		done, err = b.begin("s", limited(l), most)
		require.NoError(t, err)
		second, err := b.begin("s", limited(l), most)
		require.NoError(t, err, "1.0 in flight")
		refused("its 2 calls in flight may cost 1.000000 USD, this one 0.500000 USD, and cost_limits.max_cost_per_hour is 1")
		done(true, 0.1)
		refused("cost 0.100000 USD")
		second(true, budgetNoPrice) // which nobody tells has cost the most
		refused("cost 0.600000 USD")
		most = 0.4
		third, err := b.begin("s", limited(l), most)
		require.NoError(t, err)
		third(false, budgetNoPrice)
		third, err = b.begin("s", limited(l), most)
		require.NoError(t, err, "a call that was not made costs nothing")
		third(true, 0)
		third, err = b.begin("s", limited(l), most)
		require.NoError(t, err, "nor does one that the provider refused")
		third(true, 0.4)
		refused("cost 1.0")
		<-time.After(budgetWindow + budgetSlot)
		_, err = b.begin("s", limited(l), most)
		require.NoError(t, err)
	})
}

func TestBudgetIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &budget{}
		l, most := CostLimits{MaxInvocationsPerHour: 1}, 0.0
		for i := range budgetMost {
			done, err := b.begin(strings.Repeat("s", i%100)+string(rune(0x4e00+i)), limited(l), most)
			require.NoError(t, err)
			done(true, budgetNoPrice)
		}
		_, err := b.begin("one more", limited(l), most)
		require.Equal(t, fault.BudgetExceeded, fault.From(err).Code)
		<-time.After(2 * time.Hour)
		_, err = b.begin("one more", limited(l), most)
		require.NoError(t, err)
		require.Len(t, b.services, 1)
	})
}

func TestBudgetOfJobs(t *testing.T) {
	awsKeys(t)
	url := toldLambda(t, `{"MemorySize":10240,"Timeout":50}`, 200, map[string]string{"X-Amz-Log-Result": tail("REPORT RequestId: req-1\tBilled Duration: 60000 ms\tMemory Size: 10240 MB")}, `{}`)
	j := newJob(t, lambdaConfig(url), object{"cost_limits": object{"max_cost_per_hour": 0.0201}}, nil)
	r := newRunner(t, Options{})
	for range 2 { // 0.01 USD each
		result, _ := execute(t, r, j)
		require.NoError(t, result.Err)
		require.InDelta(t, 0.0100002, result.Usage.GetCostUsd(), 1e-7)
	}
	f, result := failure(t, r, j)
	require.Equal(t, fault.BudgetExceeded, f.Code)
	require.Nil(t, result.Usage.StatusCode, "nothing was called")
	checks := result.Security.GetChecks()
	require.Equal(t, "cost_limits", checks[len(checks)-1].GetRule())
}

func TestPrices(t *testing.T) {
	table, err := DefaultPrices()
	require.NoError(t, err)
	require.NotEmpty(t, table.Source)
	for region, architectures := range table.Providers["aws"] {
		require.Regexp(t, awsRegion, region)
		for _, a := range []string{"x86_64", "arm64"} {
			p, ok := table.find("aws", region, a)
			require.True(t, ok, region)
			require.InDelta(t, 1.7e-5, p.GBSecond, 8e-6)
			require.InDelta(t, 2.4e-7, p.Request, 5e-8)
		}
		require.Len(t, architectures, 2)
	}
	p, ok := table.find("aws", "us-east-1", "x86_64")
	require.True(t, ok)
	require.InDelta(t, 0.0000166667+0.0000002, p.cost(1000, 1024), 1e-15)
	require.InDelta(t, 2.0, Price{GBSecond: 10, RoundUpMS: 100}.cost(101, 1024), 1e-12)

	file := filepath.Join(t.TempDir(), "prices.json")
	require.NoError(t, os.WriteFile(file, []byte(`{"providers":{"aws":{"us-east-1":{"x86_64":{"gb_second":1,"request":0.5}}}}}`), 0o600))
	r := newRunner(t, Options{PriceTable: file})
	p, ok = r.prices.find("aws", "us-east-1", "x86_64")
	require.True(t, ok)
	require.InDelta(t, 0.5+0.002, p.cost(1.5, 1024), 1e-12)
	_, ok = r.prices.find("aws", "us-west-2", "x86_64")
	require.False(t, ok, "the file takes the place of the table as a whole")

	for text, why := range map[string]string{
		`providers: {}`: "no prices", `{`: "not a price table", `provider: {}`: "not a price table",
		`providers: {amazon: {}}`:                                                   "unknown provider",
		`providers: {aws: {us-east-1: {x86_64: {gb_second: -1}}}}`:                  "-1 is not a price",
		`providers: {aws: {us-east-1: {x86_64: {gb_second: .nan}}}}`:                "is not a price",
		`providers: {aws: {us-east-1: {x86_64: {gb_seconds: 1}}}}`:                  "gb_seconds",
		"a: &a [1,1]\nb: &b [*a,*a]\nproviders: {aws: {us-east-1: {x86_64: [*b]}}}": "",
	} {
		_, err := ParsePrices([]byte(text))
		require.ErrorContains(t, err, why, text)
	}
	_, err = New(Options{PriceTable: "/nonexistent"})
	require.ErrorContains(t, err, "/nonexistent")
}

func TestValidate(t *testing.T) {
	r := newRunner(t, Options{})
	ask := func(config, policy, operation object) []runner.Problem {
		t.Helper()
		s := &runner.Service{Name: "s", ExecutionType: "serverless", Config: raw(t, config), Policy: raw(t, policy)}
		if policy == nil {
			s.Policy = json.RawMessage(`{}`)
		}
		if operation != nil {
			s.Operations = []runner.Operation{{Name: "op", Config: raw(t, operation)}}
		}
		problems, err := r.Validate(context.Background(), s)
		require.NoError(t, err)
		return problems
	}
	aws := func(more object) object {
		c := object{"provider": "aws", "function_name": "f", "region": "us-east-1"}
		maps.Copy(c, more)
		return c
	}
	// The seed's service.
	require.Empty(t, ask(
		object{"provider": "aws", "function_name": "image-resize-service", "region": "us-east-1", "memory_mb": 1024, "timeout": 300},
		object{
			"allowed_providers": []string{"aws"}, "allowed_regions": []string{"us-east-1", "us-west-2"},
			"resource_limits": object{"memory_mb": 3072, "timeout_seconds": 900}, "cost_limits": object{"max_invocations_per_hour": 1000, "max_cost_per_hour": 5.0},
		}, object{}))

	for name, tt := range map[string]struct {
		config, policy, operation object
		paths                     []string
	}{
		"all missing":          {object{}, nil, nil, []string{"runner_config.function_name", "runner_config.provider"}},
		"provider":             {object{"provider": "amazon", "function_name": "f"}, nil, nil, []string{"runner_config.provider"}},
		"unknown keys":         {aws(object{"memory": 1}), object{"allowed_region": []string{}}, object{"path": "/"}, []string{"runner_config.memory", "operations.op.path", "security_policy.allowed_region"}},
		"aws region missing":   {object{"provider": "aws", "function_name": "f"}, nil, nil, []string{"runner_config.region"}},
		"aws region":           {aws(object{"region": "us-east1"}), nil, nil, []string{"runner_config.region"}},
		"aws region as a host": {aws(object{"region": "x.evil.com/"}), nil, nil, []string{"runner_config.region"}},
		"aws function":         {aws(object{"function_name": "a/../b"}), nil, nil, []string{"runner_config.function_name"}},
		"aws arn":              {aws(object{"function_name": "arn:aws:lambda:eu-west-1:123456789012:function:f"}), nil, nil, []string{"runner_config.function_name"}},
		"two qualifiers":       {aws(object{"function_name": "f:1", "qualifier": "2"}), nil, nil, []string{"runner_config.qualifier"}},
		"memory":               {aws(object{"memory_mb": 64}), nil, nil, []string{"runner_config.memory_mb"}},
		"timeout":              {aws(object{"timeout": 901}), nil, nil, []string{"runner_config.timeout"}},
		"role":                 {aws(object{"auth_config": object{"role_arn": "role"}}), nil, nil, []string{"runner_config.auth_config.role_arn"}},
		"foreign keys":         {aws(object{"auth_config": object{"function_key_env_var": "K"}}), nil, nil, []string{"runner_config.auth_config.function_key_env_var"}},
		"gcp":                  {object{"provider": "gcp", "function_name": "f"}, nil, nil, []string{"runner_config.region", "runner_config.project"}},
		"gcp by endpoint":      {object{"provider": "gcp", "function_name": "f", "endpoint": "https://f.a.run.app"}, nil, nil, nil},
		"gcp events":           {object{"provider": "gcp", "function_name": "f", "endpoint": "https://f.a.run.app", "invocation_type": "event", "qualifier": "1"}, nil, nil, []string{"runner_config.qualifier", "runner_config.invocation_type"}},
		"azure":                {object{"provider": "azure", "function_name": "f"}, nil, nil, []string{"runner_config.app_name"}},
		"azure dots":           {object{"provider": "azure", "function_name": "../x", "app_name": "a.b"}, nil, nil, []string{"runner_config.function_name", "runner_config.app_name"}},
		"secret as a name":     {object{"provider": "azure", "function_name": "f", "app_name": "a", "auth_config": object{"function_key_env_var": "s3cr3t=="}}, nil, nil, []string{"runner_config.auth_config.function_key_env_var"}},
		"endpoint":             {aws(object{"endpoint": "http://10.0.0.1"}), nil, nil, []string{"runner_config.endpoint"}},
		"operation":            {aws(nil), nil, object{"function_name": "a b"}, []string{"operations.op.function_name"}},
		"everything at once": {
			aws(object{"unknown": 1, "function_name": "a/../b", "region": 5, "memory_mb": 64, "timeout": "x", "qualifier": "a b", "auth_config": object{"unknown": 1, "role_arn": "role"}}),
			object{"unknown": 1, "allowed_providers": []any{5, "amazon"}, "allowed_env_vars": []string{"A B", "OK_*"}, "cost_limits": object{"max_cost_per_hour": "x"}},
			object{"unknown": 1, "function_name": "c d"},
			[]string{
				"runner_config.unknown", "runner_config.region", "runner_config.timeout", "runner_config.auth_config.unknown",
				"runner_config.function_name", "runner_config.memory_mb", "runner_config.qualifier", "runner_config.auth_config.role_arn",
				"operations.op.unknown", "operations.op.function_name",
				"security_policy.unknown", "security_policy.allowed_providers[0]", "security_policy.allowed_providers[1]",
				"security_policy.allowed_env_vars[0]", "security_policy.cost_limits.max_cost_per_hour",
			},
		},
		"policy behind an unknown key":    {aws(object{"unknown": 1}), object{"unknown": 1, "allowed_regions": []string{"eu-west-1"}}, nil, []string{"runner_config.unknown", "security_policy.unknown", "security_policy"}},
		"no provider, no guesses":         {object{"provider": "amazon", "function_name": "f", "qualifier": "1", "invocation_type": "event", "auth_config": object{"role_arn": "arn:aws:iam::123456789012:role/x"}, "memory_mb": 20000}, object{"allowed_providers": []string{"aws"}, "cost_limits": object{"max_cost_per_hour": 1}}, nil, []string{"runner_config.provider"}},
		"a missing region is said once":   {object{"provider": "aws", "function_name": "f"}, object{"allowed_regions": []string{"us-east-1"}, "cost_limits": object{"max_cost_per_hour": 1}}, object{"qualifier": "1"}, []string{"runner_config.region"}},
		"function of the service alone":   {aws(object{"function_name": "a b"}), nil, object{"qualifier": "7"}, []string{"runner_config.function_name"}},
		"function of the operation too":   {aws(object{"function_name": "a b"}), nil, object{"function_name": "c d"}, []string{"runner_config.function_name", "operations.op.function_name"}},
		"qualifier of the service":        {aws(object{"qualifier": "a b"}), nil, object{"function_name": "g"}, []string{"runner_config.qualifier"}},
		"two qualifiers by the operation": {aws(object{"qualifier": "2"}), nil, object{"function_name": "f:1"}, []string{"operations.op.function_name"}},
		"event by the operation":          {object{"provider": "gcp", "function_name": "f", "endpoint": "https://f.a.run.app"}, nil, object{"invocation_type": "event"}, []string{"operations.op.invocation_type"}},
		"not JSON":                        {nil, nil, nil, []string{"runner_config"}},
		"scope of another service":        {object{"provider": "azure", "function_name": "f", "app_name": "a", "auth_config": object{"scope": "https://management.azure.com/.default"}}, nil, nil, []string{"runner_config.auth_config.scope"}},
		"own policy":                      {aws(nil), object{"allowed_regions": []string{"eu-west-1"}}, nil, []string{"security_policy"}},
		"policy provider":                 {aws(nil), object{"allowed_providers": []string{"aws", "amazon"}}, nil, []string{"security_policy.allowed_providers[1]"}},
		"cost without reports":            {object{"provider": "gcp", "function_name": "f", "endpoint": "https://f.a.run.app"}, object{"cost_limits": object{"max_cost_per_hour": 1}}, nil, []string{"security_policy.cost_limits.max_cost_per_hour"}},
		"cost without price":              {aws(object{"region": "mx-central-1"}), object{"cost_limits": object{"max_cost_per_hour": 1}}, nil, []string{"security_policy.cost_limits.max_cost_per_hour"}},
	} {
		t.Run(name, func(t *testing.T) {
			problems := ask(tt.config, tt.policy, tt.operation)
			var paths []string
			for _, p := range problems {
				paths = append(paths, p.Path)
				require.NotEmpty(t, p.Message)
				require.NotContains(t, p.Message, "s3cr3t")
				require.True(t, p.Mend != "" || p.Path == "security_policy" || strings.HasPrefix(p.Message, "must be "), p) // a type says what to write
			}
			slices.Sort(paths)
			slices.Sort(tt.paths)
			require.Empty(t, cmp.Diff(tt.paths, paths), problems)
		})
	}
}

func TestHostileJobs(t *testing.T) {
	noCloud(t)
	r := newRunner(t, Options{})
	for _, c := range []string{
		``, `null`, `[]`, `{`, `{"provider":1}`, `{"provider":"aws"}`, `{"provider":"azure","function_name":"f","app_name":"a.evil.com/"}`,
		`{"provider":"gcp","function_name":"f","region":"a-b1","project":"x@evil.com"}`, `{"provider":"aws","function_name":"f","region":"us-east-1","endpoint":"http://169.254.169.254"}`,
	} {
		j := newJob(t, nil, nil, nil)
		j.Service.Config = json.RawMessage(c)
		f, _ := failure(t, r, j)
		require.Equal(t, fault.Validation, f.Code, c)
	}
	j := newJob(t, lambdaConfig("http://127.0.0.1:1"), nil, nil)
	j.Input = json.RawMessage(`{`)
	f, _ := failure(t, r, j)
	require.Equal(t, fault.Validation, f.Code)
	config := lambdaConfig("http://127.0.0.1:1")
	config["invocation_type"] = "event"
	f, _ = failure(t, r, newJob(t, config, nil, object{"x": strings.Repeat("x", maxEventPayload)}))
	require.Equal(t, fault.Validation, f.Code)
	require.Contains(t, f.Message, "an event may have 1048576")
}

func FuzzTail(f *testing.F) {
	f.Add("REPORT RequestId: r\tDuration: 1 ms\tBilled Duration: 1 ms\tMemory Size: 1 MB", "r")
	f.Add(`{"type":"platform.report","record":{"requestId":"r","metrics":{"durationMs":1}}}`, "r")
	f.Fuzz(func(t *testing.T, line, id string) {
		got, err := parseTail(tail(line), id)
		require.NoError(t, err)
		if got.report != nil {
			require.NotEmpty(t, id)
		}
		_, _ = parseTail(line, id)
	})
}
