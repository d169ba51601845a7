package serverlessrunner

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

func gcpConfig(endpoint string) object {
	return object{"provider": "gcp", "function_name": "analyze", "region": "europe-west1", "project": "my-project", "endpoint": endpoint}
}

func azureConfig(endpoint string) object {
	return object{"provider": "azure", "function_name": "notify", "app_name": "my-app", "endpoint": endpoint}
}

func TestCloudFunction(t *testing.T) {
	noCloud(t)
	url := startStandin(t, "gcf-analysis")
	r := newRunner(t, Options{})
	result, _ := execute(t, r, newJob(t, gcpConfig(url), nil, object{"numbers": []int{4, 1, 3, 2}}))
	out := output(t, result)
	require.InDelta(t, 2.5, out["mean"], 0)
	require.InDelta(t, 2.5, out["median"], 0)
	require.Equal(t, "key-1", out["idempotency_key"])
	require.EqualValues(t, 200, result.Usage.GetStatusCode())
	require.Positive(t, result.Usage.GetResponseBytes())
	require.Nil(t, result.Usage.BilledDurationMs, "Google does not say")
	require.Nil(t, result.Usage.CostUsd)

	f, _ := failure(t, r, newJob(t, gcpConfig(url), nil, object{"numbers": []int{}}))
	require.Equal(t, fault.RemoteError, f.Code)
	require.False(t, f.Retryable)
	require.Contains(t, f.Message, "400 Bad Request: numbers is empty")
}

func TestAzureFunction(t *testing.T) {
	noCloud(t)
	t.Setenv("NOTIFY_KEY", "local-function-key")
	url := startStandin(t, "azure-notify")
	config := azureConfig(url)
	config["auth_config"] = object{"function_key_env_var": "NOTIFY_KEY"}
	r := newRunner(t, Options{})
	j := newJob(t, config, nil, object{"to": "a@example.com", "message": "hello"})
	result, n := execute(t, r, j)
	out := output(t, result)
	require.Equal(t, "queued", out["status"])
	require.Equal(t, "key-1", out["idempotency_key"])
	require.Contains(t, n.secrets, "local-function-key")

	t.Setenv("NOTIFY_KEY", "another-key-9")
	f, _ := failure(t, r, j)
	require.Equal(t, fault.RemoteError, f.Code)
	require.Contains(t, f.Message, "401 Unauthorized; check the key in NOTIFY_KEY")
	require.NotContains(t, f.Message, "another-key-9")

	t.Setenv("NOTIFY_KEY", "")
	f, _ = failure(t, r, j)
	require.Equal(t, fault.Validation, f.Code)
	require.Contains(t, f.Message, "NOTIFY_KEY is empty")

	t.Setenv("NOTIFY_KEY", "a\r\nX-Evil: 1")
	f, _ = failure(t, r, j)
	require.Equal(t, fault.Validation, f.Code)
	require.NotContains(t, f.Message, "Evil")
}

func TestHTTPAnswers(t *testing.T) {
	noCloud(t)
	for name, tt := range map[string]struct {
		status    int
		header    map[string]string
		code      fault.Code
		retryable bool
		after     time.Duration
	}{
		"crash":        {500, nil, fault.RemoteError, true, 0},
		"bad gateway":  {502, nil, fault.RemoteError, true, 0},
		"overload":     {503, map[string]string{"Retry-After": "3"}, fault.Unavailable, true, 3 * time.Second},
		"timeout":      {504, nil, fault.Timeout, true, 0},
		"timeout, 1st": {408, nil, fault.Timeout, true, 0},
		"throttled":    {429, map[string]string{"Retry-After": "120"}, fault.RateLimited, true, 2 * time.Minute},
		"endless":      {429, map[string]string{"Retry-After": "1e300"}, fault.RateLimited, true, time.Hour},
		"negative":     {429, map[string]string{"Retry-After": "-5"}, fault.RateLimited, true, 0},
		"not found":    {404, nil, fault.RemoteError, false, 0},
		"forbidden":    {403, nil, fault.RemoteError, false, 0},
		"redirect":     {307, map[string]string{"Location": "http://169.254.169.254/latest"}, fault.RemoteError, false, 0},
	} {
		t.Run(name, func(t *testing.T) {
			calls := 0
			url := server(t, func(w http.ResponseWriter, _ *http.Request) {
				calls++
				for k, v := range tt.header {
					w.Header().Set(k, v)
				}
				w.WriteHeader(tt.status)
			})
			f, result := failure(t, newRunner(t, Options{}), newJob(t, gcpConfig(url), nil, nil))
			require.Equal(t, tt.code, f.Code, f.Message)
			require.Equal(t, tt.retryable, f.Retryable)
			require.Equal(t, tt.after, f.RetryAfter)
			require.EqualValues(t, tt.status, result.Usage.GetStatusCode())
			require.Equal(t, 1, calls)
		})
	}
	t.Run("text", func(t *testing.T) {
		url := server(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Set-Cookie", "session=1")
			w.WriteHeader(http.StatusAccepted)
			_, _ = io.WriteString(w, "queued")
		})
		result, _ := execute(t, newRunner(t, Options{}), newJob(t, gcpConfig(url), nil, nil))
		out := output(t, result)
		require.Equal(t, "queued", out["body"])
		require.EqualValues(t, 202, out["status_code"])
		require.NotContains(t, out["headers"], "set-cookie")
	})
	t.Run("an endless answer", func(t *testing.T) {
		url := server(t, func(w http.ResponseWriter, r *http.Request) {
			chunk := make([]byte, 1<<16)
			for r.Context().Err() == nil {
				if _, err := w.Write(chunk); err != nil {
					return
				}
			}
		})
		f, _ := failure(t, newRunner(t, Options{}), newJob(t, gcpConfig(url), nil, nil))
		require.Equal(t, fault.ResourceExceeded, f.Code)
	})
	t.Run("headers that would be split", func(t *testing.T) {
		j := newJob(t, gcpConfig("http://127.0.0.1:1"), nil, nil)
		j.CorrelationID = "a\r\nX-Evil: 1"
		f, _ := failure(t, newRunner(t, Options{}), j)
		require.Equal(t, fault.Validation, f.Code)
	})
	t.Run("a certificate that nobody knows", func(t *testing.T) {
		t.Setenv("NOTIFY_KEY", "local-function-key")
		s := httptest.NewUnstartedServer(http.NotFoundHandler())
		s.Config.ErrorLog = log.New(io.Discard, "", 0)
		s.StartTLS()
		defer s.Close()
		config := azureConfig(s.URL)
		config["auth_config"] = object{"function_key_env_var": "NOTIFY_KEY"}
		f, _ := failure(t, newRunner(t, Options{}), newJob(t, config, nil, nil))
		require.Equal(t, fault.RemoteError, f.Code)
		require.False(t, f.Retryable)
		require.Contains(t, f.Message, "certificate")
	})
}

// serviceAccountKey is a key file whose token server is at url.
func serviceAccountKey(t *testing.T, url string) string {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	return string(raw(t, object{
		"type": "service_account", "client_email": "runner@my-project.iam.gserviceaccount.com", "private_key_id": "1", "token_uri": url,
		"private_key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})),
	}))
}

func TestGoogleIdentityToken(t *testing.T) {
	noCloud(t)
	var assertion object
	asked, status := 0, http.StatusOK
	identity := "e30." + base64.RawURLEncoding.EncodeToString([]byte(`{"aud":"x","exp":4102444800}`)) + ".c2ln"
	tokens := server(t, func(w http.ResponseWriter, r *http.Request) {
		asked++
		parts := strings.Split(r.FormValue("assertion"), ".")
		if payload, err := base64.RawURLEncoding.DecodeString(parts[min(1, len(parts)-1)]); err == nil {
			_ = json.Unmarshal(payload, &assertion)
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(object{"id_token": identity, "error": "invalid_grant"})
	})
	var authorization string
	url := server(t, func(w http.ResponseWriter, r *http.Request) {
		authorization = r.Header.Get("Authorization")
		_, _ = io.WriteString(w, `{}`)
	})
	defer http.DefaultClient.CloseIdleConnections()
	key := serviceAccountKey(t, tokens)
	t.Setenv("GCP_KEY", key)
	config := gcpConfig(url + "/analyze")
	config["auth_config"] = object{"service_account_key_env_var": "GCP_KEY"}
	r := newRunner(t, Options{})
	for range 2 {
		result, n := execute(t, r, newJob(t, config, nil, nil))
		require.NoError(t, result.Err)
		require.Equal(t, "Bearer "+identity, authorization)
		require.Contains(t, n.secrets, identity)
		require.Contains(t, n.secrets, key)
	}
	require.Equal(t, 1, asked, "the token is kept")
	require.Equal(t, url+"/analyze", assertion["target_audience"])

	status = http.StatusBadRequest
	f, _ := failure(t, newRunner(t, Options{}), newJob(t, config, nil, nil))
	require.Equal(t, fault.RemoteError, f.Code)
	require.Contains(t, f.Message, "invalid_grant")

	for _, bad := range []string{"/path/to/key.json", `{"type":"authorized_user","refresh_token":"hush-hush"}`, `{"type":"service_account","private_key":"hush-hush"}`} {
		t.Setenv("GCP_KEY", bad)
		f, _ := failure(t, r, newJob(t, config, nil, nil))
		require.Equal(t, fault.Validation, f.Code)
		require.Contains(t, f.Message, "GCP_KEY")
		require.NotContains(t, f.Message, "hush")
	}
}

func TestAudience(t *testing.T) {
	for given, want := range map[string]string{
		"https://analyze-abc123-ew.a.run.app/":                        "https://analyze-abc123-ew.a.run.app",
		"https://analyze-123.europe-west1.run.app/path":               "https://analyze-123.europe-west1.run.app",
		"https://europe-west1-my-project.cloudfunctions.net/analyze":  "https://europe-west1-my-project.cloudfunctions.net/analyze",
		"https://europe-west1-my-project.cloudfunctions.net/analyze/": "https://europe-west1-my-project.cloudfunctions.net/analyze",
	} {
		e, err := parseEndpoint(given)
		require.NoError(t, err)
		require.Equal(t, want, audience(e))
	}
}

// credential gives Entra tokens.
type credential struct {
	scopes []string
	err    error
}

func (c *credential) GetToken(_ context.Context, o policy.TokenRequestOptions) (azcore.AccessToken, error) {
	c.scopes = o.Scopes
	return azcore.AccessToken{Token: "entra-token", ExpiresOn: time.Now().Add(time.Hour)}, c.err
}

func TestEntraToken(t *testing.T) {
	noCloud(t)
	var authorization, path string
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		authorization, path = r.Header.Get("Authorization"), r.URL.Path
		_, _ = io.WriteString(w, `{}`)
	}))
	defer s.Close()
	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	r := newRunner(t, Options{RootCAs: roots, Ceiling: &Policy{AllowedEndpoints: []string{"127.0.0.1"}}})
	c := &credential{}
	r.entra.credential = c
	run := func(scope string) error {
		config := azureConfig(s.URL)
		if scope != "" {
			config["auth_config"] = object{"scope": scope}
		}
		result, n := execute(t, r, newJob(t, config, nil, nil))
		if result.Err == nil {
			require.Contains(t, n.secrets, "entra-token")
		}
		return result.Err
	}
	require.NoError(t, run(""))
	require.Equal(t, "Bearer entra-token", authorization)
	require.Equal(t, "/api/notify", path)
	require.Equal(t, []string{"https://127.0.0.1/.default"}, c.scopes)
	require.NoError(t, run("api://00000000-0000-0000-0000-000000000000/.default"))
	for _, foreign := range []string{"https://management.azure.com/.default", "00000003-0000-0000-c000-000000000000/.default", "api://x/../.default y"} {
		require.Equal(t, fault.Validation, fault.From(run(foreign)).Code, foreign)
	}
	c.err = errors.New("no credential")
	f := fault.From(run(""))
	require.Equal(t, fault.Validation, f.Code)
	require.Contains(t, f.Message, "function_key_env_var")
}

func TestEntraTokenForAnApplicationGoesNowhereElse(t *testing.T) {
	noCloud(t)
	var asked []string
	s := httptest.NewTLSServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.Header.Get("Authorization"))
	}))
	defer s.Close()
	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	const scope = "api://victim-api/.default"
	for name, tt := range map[string]struct {
		config  object
		ceiling *Policy
		allowed bool
	}{
		"a host of the registry":       {azureConfig(s.URL), nil, false},
		"a public host":                {azureConfig("https://attacker.example"), nil, false},
		"a name that looks like it":    {azureConfig("https://azurewebsites.net.attacker.example"), nil, false},
		"a suffix that looks like it":  {azureConfig("https://attackerazurewebsites.net"), nil, false},
		"a ceiling without a host":     {azureConfig("https://attacker.example"), &Policy{}, false},
		"a host of the ceiling":        {azureConfig(s.URL), &Policy{AllowedEndpoints: []string{"127.0.0.1"}}, true},
		"another host of the ceiling":  {azureConfig(s.URL), &Policy{AllowedEndpoints: []string{"api.example.com"}}, false},
		"Azure's own host":             {object{"provider": "azure", "function_name": "notify", "app_name": "my-app"}, nil, true},
		"Azure's own host and a route": {azureConfig("https://my-app.azurewebsites.net/v1"), nil, true},
	} {
		t.Run(name, func(t *testing.T) {
			asked = nil
			r := newRunner(t, Options{RootCAs: roots, Ceiling: tt.ceiling, Resolver: fakeDNS(t, netipBytes{127, 0, 0, 1})})
			c := &credential{}
			r.entra.credential = c
			tt.config["auth_config"] = object{"scope": scope}
			j := newJob(t, tt.config, nil, nil)
			result, _ := execute(t, r, j)
			problems, err := r.Validate(t.Context(), &j.Service)
			require.NoError(t, err)
			if tt.allowed { // the fake name server leads inside, where the call ends
				require.Equal(t, []string{scope}, c.scopes)
				require.Empty(t, problems)
				return
			}
			require.Error(t, result.Err)
			require.Equal(t, fault.PolicyViolation, fault.From(result.Err).Code, result.Err)
			require.Contains(t, result.Err.Error(), "allowed_endpoints")
			require.Empty(t, c.scopes, "no token is asked for")
			require.Empty(t, asked)
			require.Len(t, problems, 1)
			require.Equal(t, "security_policy", problems[0].Path)
		})
	}
}

// TestEndpointsInsideAreTheOperators: with a ceiling, a registry does not choose what inside is called.
func TestEndpointsInsideAreTheOperators(t *testing.T) {
	awsKeys(t)
	calls := 0
	url := server(t, func(w http.ResponseWriter, _ *http.Request) {
		calls++
		_, _ = io.WriteString(w, `{}`)
	})
	_, port, err := net.SplitHostPort(strings.TrimPrefix(url, "http://"))
	require.NoError(t, err)
	for name, tt := range map[string]struct {
		endpoint string
		resolved netipBytes
		ceiling  *Policy
		checked  bool // found before anything is connected to
		allowed  bool
	}{
		"no ceiling":                    {url, netipBytes{}, nil, false, true},
		"loopback":                      {url, netipBytes{}, &Policy{}, true, false},
		"localhost":                     {"http://localhost:" + port, netipBytes{127, 0, 0, 1}, &Policy{}, true, false},
		"IPv6 loopback":                 {"http://[::1]:" + port, netipBytes{}, &Policy{}, true, false},
		"a private address":             {"https://10.0.0.7", netipBytes{}, &Policy{}, true, false},
		"a mapped private address":      {"https://[::ffff:10.0.0.7]", netipBytes{}, &Policy{}, true, false},
		"a name of a private address":   {"https://inside.example", netipBytes{10, 0, 0, 7}, &Policy{AllowedProviders: []string{"gcp", "aws"}}, false, false},
		"loopback that the ceiling has": {url, netipBytes{}, &Policy{AllowedEndpoints: []string{"127.0.0.1:" + port}}, false, true},
	} {
		for provider, config := range map[string]object{providerGCP: gcpConfig(tt.endpoint), providerAWS: lambdaConfig(tt.endpoint)} {
			if provider == providerGCP && !strings.HasPrefix(tt.endpoint, "http://") {
				continue // it would look for a token first
			}
			t.Run(name+" "+provider, func(t *testing.T) {
				before := calls
				r := newRunner(t, Options{Ceiling: tt.ceiling, Resolver: fakeDNS(t, tt.resolved)})
				j := newJob(t, config, nil, nil)
				result, _ := execute(t, r, j)
				problems, err := r.Validate(t.Context(), &j.Service)
				require.NoError(t, err)
				if tt.allowed {
					require.NoError(t, result.Err)
					require.Equal(t, before+1, calls)
					require.Empty(t, problems)
					return
				}
				require.Error(t, result.Err)
				f := fault.From(result.Err)
				require.Equal(t, fault.PolicyViolation, f.Code, f.Message)
				require.Contains(t, f.Message, "to allowed_endpoints of the ceiling")
				require.Equal(t, before, calls)
				if tt.checked {
					require.Len(t, problems, 1)
				}
			})
		}
	}
	// With a list, what a name in it leads to may be private.
	r := newRunner(t, Options{})
	listed := effective{Ceiling: &Policy{AllowedEndpoints: []string{"inside.example"}}}
	require.Same(t, r.clients[reachEndpoint], r.client(&call{config: Config{Endpoint: "x"}, policy: listed}))
}

func TestAllowedEnvVars(t *testing.T) {
	noCloud(t)
	t.Setenv("T_NOTIFY_KEY", "local-function-key")
	t.Setenv("T_OTHER", `{"type":"service_account","private_key":"hush-hush"}`)
	var key string
	calls := 0
	url := server(t, func(w http.ResponseWriter, r *http.Request) {
		calls++
		key = r.Header.Get("X-Functions-Key")
		_, _ = io.WriteString(w, `{}`)
	})
	ceiling, err := ParseCeiling([]byte(`{"allowed_endpoints":["127.0.0.1"],"allowed_env_vars":["T_NOTIFY_*","T_EXACT"]}`))
	require.NoError(t, err)
	r := newRunner(t, Options{Ceiling: ceiling})
	azure, google := azureConfig(url), gcpConfig(url)
	azure["auth_config"] = object{"function_key_env_var": "T_OTHER"}
	google["auth_config"] = object{"service_account_key_env_var": "T_OTHER"}
	for _, config := range []object{azure, google} {
		j := newJob(t, config, nil, nil)
		f, result := failure(t, r, j)
		require.Equal(t, fault.PolicyViolation, f.Code)
		require.Contains(t, f.Message, `allowed_env_vars forbids T_OTHER: the operator's ceiling (--policy of the runner) allows T_NOTIFY_*, T_EXACT; add "T_OTHER"`)
		checks := result.Security.GetChecks()
		require.Equal(t, "allowed_env_vars", checks[len(checks)-1].GetRule())
		problems, err := r.Validate(t.Context(), &j.Service)
		require.NoError(t, err)
		require.Len(t, problems, 1)
		require.Contains(t, problems[0].Message, "every call would be refused: allowed_env_vars forbids T_OTHER")
	}
	require.Zero(t, calls)
	azure["auth_config"] = object{"function_key_env_var": "T_NOTIFY_KEY"}
	result, _ := execute(t, r, newJob(t, azure, nil, nil))
	require.NoError(t, result.Err)
	require.Equal(t, "local-function-key", key)
	f, _ := failure(t, r, newJob(t, azure, object{"allowed_env_vars": []string{}}, nil))
	require.Equal(t, fault.PolicyViolation, f.Code, "a service may narrow it for itself")

	_, err = ParseCeiling([]byte(`{"allowed_env_vars":["A-B"]}`))
	require.ErrorContains(t, err, `allowed_env_vars[0]: "A-B" is not the name of a variable`)
}

func TestTarget(t *testing.T) {
	for want, c := range map[string]Config{
		"https://lambda.eu-west-1.amazonaws.com":                     {Provider: "aws", Region: "eu-west-1", FunctionName: "f"},
		"https://lambda.cn-north-1.amazonaws.com.cn":                 {Provider: "aws", Region: "cn-north-1", FunctionName: "f"},
		"https://europe-west1-my-project.cloudfunctions.net/analyze": {Provider: "gcp", Region: "europe-west1", Project: "my-project", FunctionName: "analyze"},
		"https://f-x.a.run.app":                                      {Provider: "gcp", Endpoint: "https://f-x.a.run.app", FunctionName: "analyze"},
		"https://my-app.azurewebsites.net/api/notify":                {Provider: "azure", AppName: "my-app", FunctionName: "notify"},
		"https://gw.example.com/v1/orders/create":                    {Provider: "azure", Endpoint: "https://gw.example.com/v1", FunctionName: "orders/create"},
		"http://localhost:7071/api/notify":                           {Provider: "azure", Endpoint: "http://localhost:7071/", FunctionName: "notify"},
	} {
		e, err := c.target()
		require.NoError(t, err)
		require.Equal(t, want, e.url.String())
	}
}

// fakeDNS answers every question for an IPv4 address with one.
func fakeDNS(t *testing.T, answer netipBytes) *net.Resolver {
	t.Helper()
	return resolver(t, netip.AddrFrom4(answer))
}

// resolver answers every question for an address with one.
func resolver(t *testing.T, answer netip.Addr) *net.Resolver {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = conn.WriteTo(dnsAnswer(buf[:n], answer), from)
		}
	}()
	t.Cleanup(func() {
		_ = conn.Close()
		<-done
	})
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "udp", conn.LocalAddr().String())
	}}
}

type netipBytes [4]byte

// dnsAnswer answers the one question of a query, with the address if it asks for one of its kind.
func dnsAnswer(query []byte, a netip.Addr) []byte {
	end := 12
	for end < len(query) && query[end] != 0 {
		end += int(query[end]) + 1
	}
	end += 5
	if end > len(query) {
		return nil
	}
	out := append([]byte{}, query[:end]...)
	out[2], out[3] = 0x81, 0x80
	for i := 4; i < 12; i++ {
		out[i] = 0
	}
	out[5] = 1      // one question
	kind := byte(1) // A
	if a.Is6() {
		kind = 28 // AAAA
	}
	if query[end-4] == 0 && query[end-3] == kind {
		out[7] = 1 // one answer
		raw := a.AsSlice()
		out = append(append(out, 0xc0, 12, 0, kind, 0, 1, 0, 0, 0, 0, 0, byte(len(raw))), raw...)
	}
	return out
}

func TestNamesThatLeadInside(t *testing.T) {
	awsKeys(t)
	t.Setenv("NOTIFY_KEY", "local-function-key")
	for name, a := range map[string]netipBytes{"loopback": {127, 0, 0, 1}, "metadata": {169, 254, 169, 254}, "private": {10, 0, 0, 7}} {
		for provider, config := range map[string]object{
			"aws":   {"provider": "aws", "function_name": "f", "region": "us-east-1"},
			"azure": {"provider": "azure", "function_name": "f", "app_name": "my-app", "auth_config": object{"function_key_env_var": "NOTIFY_KEY"}},
		} {
			t.Run(name+" "+provider, func(t *testing.T) {
				r := newRunner(t, Options{Resolver: fakeDNS(t, a)})
				f, result := failure(t, r, newJob(t, config, nil, nil))
				require.Equal(t, fault.PolicyViolation, f.Code, f.Message)
				require.False(t, f.Retryable)
				checks := result.Security.GetChecks()
				last := checks[len(checks)-1]
				require.False(t, last.GetAllowed())
				require.Equal(t, net.IP(a[:]).String(), last.GetSubject())
			})
		}
	}
	t.Run("localhost that is elsewhere", func(t *testing.T) {
		// Plain http is for loopback addresses: the name alone does not do.
		r := newRunner(t, Options{})
		require.Error(t, reachLoopback.checkAddr(mustAddr("10.0.0.1")))
		require.Same(t, r.clients[reachLoopback], r.client(&call{config: Config{Endpoint: "x"}, target: endpoint{loopback: true}}))
	})
}

var _ runner.Sink = (*notes)(nil)
