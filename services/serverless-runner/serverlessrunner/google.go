package serverlessrunner

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"

	"cloud.google.com/go/auth"
	"cloud.google.com/go/auth/credentials"
	"cloud.google.com/go/auth/credentials/idtoken"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

// callGoogle calls a Cloud Function over HTTPS with an identity token.
//
// The token comes from service_account_key_env_var or from Google's default chain
// (GOOGLE_APPLICATION_CREDENTIALS, workload identity, the metadata server). A loopback endpoint over
// plain http, which is an emulator, gets a token only with service_account_key_env_var.
func (r *Runner) callGoogle(ctx context.Context, c *call) (json.RawMessage, error) {
	header := http.Header{}
	if c.config.AuthConfig.ServiceAccountKeyEnvVar != "" || c.target.url.Scheme == "https" {
		token, err := r.google.token(ctx, c)
		if err != nil {
			return nil, err
		}
		header.Set("Authorization", "Bearer "+token)
	}
	return r.post(ctx, c, header, "give the runner's service account the role roles/cloudfunctions.invoker (1st generation) or roles/run.invoker (2nd generation) on it")
}

// audience of the identity token: a Cloud Run service is named by its origin, a function by its URL.
func audience(e endpoint) string {
	u := *e.url
	if host, _ := e.hostPort(); strings.HasSuffix(host, ".run.app") {
		u.Path, u.RawPath = "", ""
	}
	return strings.TrimSuffix(u.String(), "/")
}

// googleTokens keeps credentials by audience and key; each keeps its token until shortly before its end.
type googleTokens struct {
	mu          sync.Mutex
	credentials map[[sha256.Size]byte]*auth.Credentials
}

func (g *googleTokens) token(ctx context.Context, c *call) (string, error) {
	key := ""
	if name := c.config.AuthConfig.ServiceAccountKeyEnvVar; name != "" {
		value, err := c.secret(name)
		if err != nil {
			return "", err
		}
		if err := maskKey(c.sink, name, value); err != nil {
			return "", err
		}
		key = value
	}
	creds, err := g.of(ctx, audience(c.target), key)
	if err != nil {
		if key != "" {
			// The library's text may hold parts of the key.
			return "", fault.New(fault.Validation, "the variable %s does not hold a usable service account key", c.config.AuthConfig.ServiceAccountKeyEnvVar)
		}
		return "", fault.Wrap(err, fault.Validation, "the runner has no Google credentials that give identity tokens: %s; "+
			"name a key with auth_config.service_account_key_env_var, or set GOOGLE_APPLICATION_CREDENTIALS where the runner starts", clip(err.Error(), 300))
	}
	t, err := creds.Token(ctx)
	if err != nil {
		return "", googleFault(err)
	}
	c.sink.Secret(t.Value)
	return t.Value, nil
}

// maskKey checks the shape of a key and masks the part that is secret by itself.
func maskKey(sink runner.Sink, name, value string) error {
	var k struct {
		Type       string `json:"type"`
		PrivateKey string `json:"private_key"`
	}
	if err := json.Unmarshal([]byte(value), &k); err != nil || k.Type != "service_account" || k.PrivateKey == "" {
		return fault.New(fault.Validation, `the variable %s does not hold a service account key; put the key file's JSON text into it, with "type": "service_account"`, name)
	}
	sink.Secret(k.PrivateKey)
	return nil
}

func (g *googleTokens) of(ctx context.Context, audience, key string) (*auth.Credentials, error) {
	id := sha256.Sum256([]byte(audience + "\x00" + key))
	g.mu.Lock()
	c := g.credentials[id]
	g.mu.Unlock()
	if c != nil {
		return c, nil
	}
	c, err := newCredentials(ctx, audience, key)
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.credentials == nil || len(g.credentials) >= maxCached {
		g.credentials = make(map[[sha256.Size]byte]*auth.Credentials)
	}
	g.credentials[id] = c
	return c, nil
}

// newCredentials finds credentials. The default chain asks for a metadata server without
// looking at a context, for seconds where there is none: the call does not wait beyond its own end.
func newCredentials(ctx context.Context, audience, key string) (*auth.Credentials, error) {
	o := &idtoken.Options{Audience: audience}
	if key != "" {
		return idtoken.NewCredentialsFromJSON(credentials.ServiceAccount, []byte(key), o) // the caller says what it was
	}
	type found struct {
		credentials *auth.Credentials
		err         error
	}
	done := make(chan found, 1)
	go func() {
		c, err := idtoken.NewCredentials(o)
		done <- found{c, err}
	}()
	select {
	case f := <-done:
		return f.credentials, f.err
	case <-ctx.Done():
		return nil, fmt.Errorf("look for credentials: %w", context.Cause(ctx))
	}
}

// googleFault turns a failure to get a token into a fault.
func googleFault(err error) error {
	var a *auth.Error
	if errors.As(err, &a) && a.Response != nil {
		code := fault.RemoteError
		if a.Response.StatusCode >= 500 || a.Response.StatusCode == http.StatusTooManyRequests {
			code = fault.Unavailable
		}
		return fault.Wrap(err, code, "Google gives the runner no identity token: %s: %s", statusText(a.Response.StatusCode), clip(string(a.Body), 300))
	}
	return fault.Wrap(err, fault.Unavailable, "Google cannot be reached for an identity token: %s", clip(err.Error(), 300))
}
