package httprunner

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/fault"
)

func TestStaticCredentials(t *testing.T) {
	t.Setenv("T_TOKEN", "s3cret-token\n")
	t.Setenv("T_USER", "user")
	t.Setenv("T_PASSWORD", "pass:word")
	t.Setenv("T_BAD", "bad\r\nX-Evil: 1")
	t.Setenv("T_EMPTY", "")
	rec := record(t, nil)
	r := newRunner(t, Options{})
	tests := []struct {
		name     string
		authType string
		auth     object
		header   string
		want     string
		secrets  []string
	}{
		{"none", "none", nil, "Authorization", "", nil},
		{"bearer", "bearer", object{"token_env_var": "T_TOKEN"}, "Authorization", "Bearer s3cret-token", []string{"s3cret-token"}},
		{"basic", "basic", object{"username_env_var": "T_USER", "password_env_var": "T_PASSWORD"}, "Authorization", "Basic dXNlcjpwYXNzOndvcmQ=", []string{"pass:word", "dXNlcjpwYXNzOndvcmQ="}},
		{"basic without password", "basic", object{"username_env_var": "T_TOKEN"}, "Authorization", "Basic czNjcmV0LXRva2VuOg==", []string{"s3cret-token"}},
		{"api key", "api_key", object{"api_key_env_var": "T_TOKEN"}, "X-Api-Key", "s3cret-token", []string{"s3cret-token"}},
		{"api key elsewhere", "api_key", object{"api_key_env_var": "T_TOKEN", "header_name": "x-custom"}, "X-Custom", "s3cret-token", []string{"s3cret-token"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := &sink{}
			a := attempt{config: object{"base_url": rec.URL, "auth_type": tt.authType}, sink: s}
			if tt.auth != nil {
				a.config["auth_config"] = tt.auth
			}
			a.ok(t, r)
			require.Equal(t, tt.want, rec.last(t).Header.Get(tt.header))
			for _, secret := range tt.secrets {
				require.Contains(t, s.secrets, secret)
			}
		})
	}
	before := len(rec.all())
	for _, tt := range []struct{ name, variable, says string }{
		{"not set", "T_NOT_SET", "T_NOT_SET is not set"},
		{"empty", "T_EMPTY", "T_EMPTY is empty"},
		{"with a line break", "T_BAD", "T_BAD holds line breaks"},
		{"not a name", "a value that is a secret", "must name an environment variable"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := attempt{config: object{"base_url": rec.URL, "auth_type": "bearer", "auth_config": object{"token_env_var": tt.variable}}}
			err := a.fails(t, r, fault.Validation)
			require.Contains(t, err.Message, tt.says)
			require.NotContains(t, err.Message, "X-Evil")
			require.NotContains(t, err.Message, "a value that")
			require.False(t, err.Retryable)
		})
	}
	require.Len(t, rec.all(), before)
}

func TestEchoedSecretCutInTwoIsNotShown(t *testing.T) {
	t.Setenv("T_TOKEN", "0123456789abcdef0123456789abcdef")
	rec := record(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusForbidden)
		_, _ = io.WriteString(w, strings.Repeat("x", maxExcerpt-10)+strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer "))
	})
	a := attempt{config: object{"base_url": rec.URL, "auth_type": "bearer", "auth_config": object{"token_env_var": "T_TOKEN"}}}
	err := a.fails(t, newRunner(t, Options{}), fault.RemoteError)
	require.Contains(t, err.Message, "x***")
	require.NotContains(t, err.Message, "0123")
}

// issuer is an OAuth server that issues token-1, token-2 and so on.
func issuer(t *testing.T, lifetime int) (rec *recorder, issued *atomic.Int64) {
	t.Helper()
	issued = &atomic.Int64{}
	rec = record(t, func(w http.ResponseWriter, r *http.Request) {
		id, secret, ok := r.BasicAuth()
		if !ok || id != "client-77" || secret != "client-secret" || r.PostFormValue("grant_type") != "client_credentials" {
			w.WriteHeader(http.StatusUnauthorized)
			_, _ = io.WriteString(w, `{"error":"invalid_client"}`)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = fmt.Fprintf(w, `{"access_token":"token-%d","token_type":"bearer","expires_in":%d}`, issued.Add(1), lifetime)
	})
	return rec, issued
}

func oauthConfig(base, token string) object {
	return object{"base_url": base, "auth_type": "oauth2_client_credentials", "auth_config": object{
		"client_id_env_var": "T_CLIENT", "client_secret_env_var": "T_SECRET", "token_url": token + "/token", "scopes": []string{"read", "write"},
	}}
}

func TestOAuth(t *testing.T) {
	t.Setenv("T_CLIENT", "client-77")
	t.Setenv("T_SECRET", "client-secret")
	t.Run("a token serves many calls", func(t *testing.T) {
		tokens, issued := issuer(t, 3600)
		rec := record(t, nil)
		r := newRunner(t, Options{})
		var all sync.WaitGroup
		for range 8 {
			s := &sink{}
			job := attempt{config: oauthConfig(rec.URL, tokens.URL)}.job(t)
			all.Go(func() {
				if result, err := r.Execute(t.Context(), job, s); err != nil || result.Err != nil {
					t.Errorf("%v %v", err, result.Err)
				}
			})
		}
		all.Wait()
		require.Equal(t, int64(1), issued.Load())
		require.Len(t, rec.all(), 8)
		require.Equal(t, "Bearer token-1", rec.last(t).Header.Get("Authorization"))
		require.Contains(t, tokens.last(t).Body, "scope=read+write")
	})
	t.Run("a short-lived token is asked for again", func(t *testing.T) {
		tokens, issued := issuer(t, 1)
		rec := record(t, nil)
		r := newRunner(t, Options{})
		for range 2 {
			attempt{config: oauthConfig(rec.URL, tokens.URL)}.ok(t, r)
		}
		require.Equal(t, int64(2), issued.Load())
	})
	t.Run("a token that was taken back is renewed once", func(t *testing.T) {
		tokens, issued := issuer(t, 3600)
		valid := &atomic.Value{}
		valid.Store("Bearer token-1")
		rec := record(t, func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Authorization") != valid.Load() {
				w.WriteHeader(http.StatusUnauthorized)
			}
		})
		r := newRunner(t, Options{})
		a := attempt{config: oauthConfig(rec.URL, tokens.URL), input: `{"a":1}`}
		a.ok(t, r)
		valid.Store("Bearer token-2")
		a.ok(t, r)
		require.Equal(t, `{"a":1}`, rec.last(t).Body)
		valid.Store("nothing")
		require.Contains(t, a.fails(t, r, fault.RemoteError).Message, "answered 401")
		require.Equal(t, int64(3), issued.Load())
	})
	t.Run("wrong secret", func(t *testing.T) {
		t.Setenv("T_SECRET", "wrong-secret")
		tokens, _ := issuer(t, 3600)
		rec := record(t, nil)
		err := attempt{config: oauthConfig(rec.URL, tokens.URL)}.fails(t, newRunner(t, Options{}), fault.RemoteError)
		require.Contains(t, err.Message, "invalid_client")
		require.NotContains(t, err.Message, "wrong-secret")
		require.False(t, err.Retryable)
		require.Empty(t, rec.all())
	})
	t.Run("issuer away", func(t *testing.T) {
		rec := record(t, nil)
		gone := httptest.NewServer(nil)
		gone.Close()
		err := attempt{config: oauthConfig(rec.URL, gone.URL)}.fails(t, newRunner(t, Options{}), fault.Unavailable)
		require.True(t, err.Retryable)
	})
	t.Run("issuer busy", func(t *testing.T) {
		rec := record(t, nil)
		busy := record(t, answer(503, "text/plain", "later", "Retry-After", "7"))
		err := attempt{config: oauthConfig(rec.URL, busy.URL)}.fails(t, newRunner(t, Options{}), fault.RemoteError)
		require.True(t, err.Retryable)
		require.Equal(t, 7*time.Second, err.RetryAfter)
	})
	t.Run("no token in the answer", func(t *testing.T) {
		rec := record(t, nil)
		for _, reply := range []string{`{}`, `not json`, `{"access_token":"a\r\nX-Evil: 1"}`} {
			odd := record(t, jsonAnswer(reply))
			err := attempt{config: oauthConfig(rec.URL, odd.URL)}.fails(t, newRunner(t, Options{}), fault.RemoteError)
			require.False(t, err.Retryable)
		}
		require.Empty(t, rec.all())
	})
	t.Run("the policy holds for the issuer", func(t *testing.T) {
		tokens, _ := issuer(t, 3600)
		rec := record(t, nil)
		host, _ := rec.hostPort(t)
		r := newRunner(t, Options{})
		err := attempt{
			config: oauthConfig(rec.URL, strings.Replace(tokens.URL, "127.0.0.1", "localhost", 1)),
			policy: open(object{"allowed_domains": []string{host}}),
		}.fails(t, r, fault.PolicyViolation)
		require.Contains(t, err.Message, "localhost")
		// The base URL passes for the check's sake; the issuer is private.
		a := attempt{config: oauthConfig("http://203.0.113.9", tokens.URL), policy: object{"allowed_domains": []string{"203.0.113.9", host}}}
		require.Contains(t, a.fails(t, r, fault.PolicyViolation).Message, "loopback")
		require.Empty(t, tokens.all())
		require.Empty(t, rec.all())
	})
	t.Run("the secret follows no redirect", func(t *testing.T) {
		tokens, _ := issuer(t, 3600)
		rec := record(t, nil)
		moved := record(t, http.RedirectHandler(tokens.URL+"/token", http.StatusTemporaryRedirect).ServeHTTP)
		attempt{config: oauthConfig(rec.URL, moved.URL)}.fails(t, newRunner(t, Options{}), fault.RemoteError)
		require.Empty(t, tokens.all())
	})
}

var signedHeaders = regexp.MustCompile(`SignedHeaders=([^,]+), Signature=([0-9a-f]+)`)

// verifySigV4 signs a received request again, as AWS does, and compares.
func verifySigV4(t *testing.T, got seen, service, session string) {
	t.Helper()
	m := signedHeaders.FindStringSubmatch(got.Header.Get("Authorization"))
	require.NotNil(t, m, got.Header)
	sum := sha256.Sum256([]byte(got.Body))
	hash := hex.EncodeToString(sum[:])
	require.Equal(t, hash, got.Header.Get("X-Amz-Content-Sha256"))
	require.Equal(t, session, got.Header.Get("X-Amz-Security-Token"))
	at, err := time.Parse("20060102T150405Z", got.Header.Get("X-Amz-Date"))
	require.NoError(t, err)
	uri := got.URI
	if service == "s3" { // which takes an escaped slash of the path for a plain one
		path, query, found := strings.Cut(uri, "?")
		uri = strings.ReplaceAll(path, "%2F", "/")
		if found {
			uri += "?" + query
		}
	}
	req, err := http.NewRequestWithContext(t.Context(), got.Method, "http://"+got.Host+uri, bytes.NewReader([]byte(got.Body)))
	require.NoError(t, err)
	for name := range strings.SplitSeq(m[1], ";") {
		if name != "host" && name != "content-length" && name != "x-amz-security-token" && name != "x-amz-date" {
			req.Header[http.CanonicalHeaderKey(name)] = got.Header.Values(name)
		}
	}
	require.NoError(t, v4.NewSigner().SignHTTP(t.Context(), aws.Credentials{AccessKeyID: "AKID", SecretAccessKey: "aws-secret", SessionToken: session},
		req, hash, service, "eu-central-1", at, func(o *v4.SignerOptions) { o.DisableURIPathEscaping = service == "s3" }))
	require.Equal(t, m[2], signedHeaders.FindStringSubmatch(req.Header.Get("Authorization"))[2])
}

func TestSigV4(t *testing.T) {
	t.Setenv("T_KEY_ID", "AKID")
	t.Setenv("T_SECRET_KEY", "aws-secret")
	t.Setenv("T_SESSION", "session-token")
	rec := record(t, nil)
	r := newRunner(t, Options{})
	for _, service := range []string{"s3", "execute-api"} {
		for _, session := range []string{"", "session-token"} {
			auth := object{"region": "eu-central-1", "service": service, "access_key_id_env_var": "T_KEY_ID", "secret_access_key_env_var": "T_SECRET_KEY"}
			if session != "" {
				auth["session_token_env_var"] = "T_SESSION"
			}
			a := attempt{
				config: object{"base_url": rec.URL + "/bucket", "auth_type": "aws_sigv4", "auth_config": auth},
				op:     object{"method": "PUT", "path": "/{+key}", "body": "raw", "query": object{"x-id": "Put Object", "a": "{tag}"}, "headers": object{"X-Amz-Meta-A": "two  spaces"}},
				input:  `{"key":"a b/c+d=e(1).csv","content":"1,2\n","tag":"x/y+z"}`,
			}
			a.ok(t, r)
			got := rec.last(t)
			require.Equal(t, "/bucket/a%20b/c%2Bd%3De%281%29.csv", strings.SplitN(got.URI, "?", 2)[0])
			require.Equal(t, "1,2\n", got.Body)
			require.Contains(t, got.Header.Get("Authorization"), "/eu-central-1/"+service+"/aws4_request")
			verifySigV4(t, got, service, session)

			a.op = object{"method": "GET", "path": "/{+key}"}
			a.input = `{"key":"a.csv","list-type":2}`
			a.ok(t, r)
			verifySigV4(t, rec.last(t), service, session)

			a.op = object{"method": "GET", "path": "/{key}"}
			a.input = `{"key":"dir/a.csv"}`
			a.ok(t, r)
			require.Equal(t, "/bucket/dir%2Fa.csv", rec.last(t).URI)
			verifySigV4(t, rec.last(t), service, session)
		}
	}
}

func TestAllowedEnvVars(t *testing.T) {
	t.Setenv("T_STRIPE_KEY", "sk_live_0123456789")
	t.Setenv("T_OTHER", "other-secret-0123")
	rec := record(t, nil)
	ceiling, err := ReadPolicy([]byte(`{"allow_private_networks":true,"allowed_env_vars":["T_STRIPE_*","T_EXACT"]}`))
	require.NoError(t, err)
	r := newRunner(t, Options{Ceiling: ceiling})
	a := attempt{config: object{"base_url": rec.URL, "auth_type": "bearer", "auth_config": object{"token_env_var": "T_OTHER"}}}
	ferr := a.fails(t, r, fault.PolicyViolation)
	require.Contains(t, ferr.Message, `allowed_env_vars forbids T_OTHER: allowed is T_STRIPE_*, T_EXACT; add "T_OTHER"`)
	require.Empty(t, rec.all(), "nothing was sent")
	checks := a.run(t.Context(), t, r).Security.GetChecks()
	require.Equal(t, "allowed_env_vars", checks[len(checks)-1].GetRule())

	a.config["auth_type"], a.config["auth_config"] = "api_key", object{"api_key_env_var": "T_STRIPE_KEY"}
	a.ok(t, r)
	require.Equal(t, "sk_live_0123456789", rec.last(t).Header.Get("X-Api-Key"))
	a.policy = open(object{"allowed_env_vars": []string{}})
	a.fails(t, r, fault.PolicyViolation) // a service may narrow it for itself
	a.policy = nil
	a.ok(t, newRunner(t, Options{Ceiling: &Policy{AllowPrivateNetworks: true}}))
	require.NotEqual(t, digestOf(&Policy{}, &Policy{}), digestOf(&Policy{}, &Policy{AllowedEnvVars: []string{}}))

	_, err = ReadPolicy([]byte(`{"allowed_env_vars":["A-B"]}`))
	require.ErrorContains(t, err, "allowed_env_vars[0]")
}
