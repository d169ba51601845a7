package httprunner

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"net/http"
	"net/url"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"golang.org/x/net/http/httpguts"
	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

// authorize puts the credentials of the service into a request. It is called for requests to
// the service's own origin alone. reused says that a token of an earlier call was taken.
func (c *call) authorize(ctx context.Context, req *http.Request, body []byte) (reused bool, ferr *fault.Error) {
	a := c.plan.auth
	switch c.plan.config.AuthType {
	case authBearer:
		token, err := c.secret(a.TokenEnvVar)
		if err != nil {
			return false, err
		}
		return false, setSecretHeader(req, "Authorization", "Bearer "+token, a.TokenEnvVar)
	case authBasic:
		return false, c.basic(req, a)
	case authAPIKey:
		key, err := c.secret(a.APIKeyEnvVar)
		if err != nil {
			return false, err
		}
		name := a.HeaderName
		if name == "" {
			name = defaultAPIKeyHeader
		}
		return false, setSecretHeader(req, name, key, a.APIKeyEnvVar)
	case authOAuth2:
		return c.oauth2(ctx, req, a)
	case authSigV4:
		return false, c.sign(ctx, req, body, a)
	}
	return false, nil
}

// secret reads a secret, without the line end that secret files tend to leave behind.
func (c *call) secret(variable string) (string, *fault.Error) {
	if err := c.plan.policy.checkEnvVar(c.checks, variable); err != nil {
		return "", err
	}
	value, err := runner.ResolveSecret(c.sink, variable)
	if err != nil {
		return "", fault.From(err)
	}
	value = strings.TrimRight(value, "\r\n")
	c.hide(value)
	return value, nil
}

// hide makes a value unreadable in all that is said of the call.
func (c *call) hide(value string) {
	c.sink.Secret(value)
	c.secrets = append(c.secrets, runner.SecretForms(value)...)
}

// setSecretHeader sets a header from a secret; an error names the variable, never the value.
func setSecretHeader(req *http.Request, name, value, variable string) *fault.Error {
	if !httpguts.ValidHeaderFieldValue(value) {
		return fault.New(fault.Validation, "the value of the environment variable %s holds line breaks or control characters and cannot be sent in the header %s", variable, name)
	}
	req.Header.Set(name, value)
	return nil
}

func (c *call) basic(req *http.Request, a *AuthConfig) *fault.Error {
	user, err := c.secret(a.UsernameEnvVar)
	if err != nil {
		return err
	}
	password := ""
	if a.PasswordEnvVar != "" {
		if password, err = c.secret(a.PasswordEnvVar); err != nil {
			return err
		}
	}
	if strings.Contains(user, ":") {
		return fault.New(fault.Validation, "the value of the environment variable %s holds a colon, which basic authentication cannot carry in a user's name", a.UsernameEnvVar)
	}
	both := base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
	c.hide(both)
	req.Header.Set("Authorization", "Basic "+both)
	return nil
}

// sign signs a request for AWS. Headers that are set after it are not signed.
func (c *call) sign(ctx context.Context, req *http.Request, body []byte, a *AuthConfig) *fault.Error {
	var credentials aws.Credentials
	var err *fault.Error
	if credentials.AccessKeyID, err = c.secret(a.AccessKeyIDEnvVar); err != nil {
		return err
	}
	if credentials.SecretAccessKey, err = c.secret(a.SecretAccessKeyEnvVar); err != nil {
		return err
	}
	if a.SessionTokenEnvVar != "" {
		if credentials.SessionToken, err = c.secret(a.SessionTokenEnvVar); err != nil {
			return err
		}
		if !httpguts.ValidHeaderFieldValue(credentials.SessionToken) {
			return fault.New(fault.Validation, "the value of the environment variable %s holds line breaks or control characters", a.SessionTokenEnvVar)
		}
	}
	if !httpguts.ValidHeaderFieldValue(credentials.AccessKeyID) {
		return fault.New(fault.Validation, "the value of the environment variable %s holds line breaks or control characters", a.AccessKeyIDEnvVar)
	}
	sum := sha256.Sum256(body)
	hash := hex.EncodeToString(sum[:])
	req.Header.Set("X-Amz-Content-Sha256", hash)
	// S3 alone signs the path as it is, not escaped once more, and with plain slashes even where
	// they were sent escaped.
	s3 := a.Service == "s3" || strings.HasPrefix(a.Service, "s3-")
	sent := *req.URL
	if s3 {
		signed := sent
		signed.RawPath = strings.ReplaceAll(sent.EscapedPath(), "%2F", "/")
		req.URL = &signed
	}
	e := v4.NewSigner().SignHTTP(ctx, credentials, req, hash, a.Service, a.Region, c.runner.now().UTC(), func(o *v4.SignerOptions) {
		o.DisableURIPathEscaping = s3
	})
	if e != nil {
		return fault.Wrap(e, fault.Internal, "the request could not be signed for AWS")
	}
	sent.RawQuery = req.URL.RawQuery // put in order by the signer
	req.URL = &sent
	return nil
}

// tokenKey names a token: who asks where for what. The secret is held as its hash.
type tokenKey struct {
	url, id, scopes string
	secret          [sha256.Size]byte
	allowPrivate    bool
}

// tokenSource holds the token of a client. turn is held by whoever reads or renews it.
type tokenSource struct {
	turn   chan struct{}
	config *clientcredentials.Config
	token  *oauth2.Token
}

func (c *call) oauth2(ctx context.Context, req *http.Request, a *AuthConfig) (reused bool, ferr *fault.Error) {
	u, err := url.Parse(a.TokenURL)
	if err != nil {
		return false, fault.New(fault.Validation, "runner_config.auth_config.token_url is not a URL")
	}
	t, ferr := targetOf(u)
	if ferr != nil {
		return false, ferr
	}
	if ferr := c.plan.policy.check(c.checks, t, t.host); ferr != nil {
		return false, ferr
	}
	id, ferr := c.secret(a.ClientIDEnvVar)
	if ferr != nil {
		return false, ferr
	}
	secret, ferr := c.secret(a.ClientSecretEnvVar)
	if ferr != nil {
		return false, ferr
	}
	key := tokenKey{
		url: u.String(), id: id, scopes: strings.Join(a.Scopes, " "), secret: sha256.Sum256([]byte(secret)),
		allowPrivate: c.plan.policy.allowPrivate,
	}
	source := c.runner.tokens.getOrMake(key, func() *tokenSource {
		return &tokenSource{
			turn:   make(chan struct{}, 1),
			config: &clientcredentials.Config{ClientID: id, ClientSecret: secret, TokenURL: u.String(), Scopes: a.Scopes},
		}
	})
	select {
	case source.turn <- struct{}{}:
		defer func() { <-source.turn }()
	case <-ctx.Done():
		return false, fault.From(context.Cause(ctx))
	}
	reused = source.token.Valid()
	if reused && source.token.AccessToken == c.refused {
		reused = false
	}
	if !reused {
		if source.token, ferr = c.fetchToken(ctx, source.config, u); ferr != nil {
			return false, ferr
		}
	}
	c.hide(source.token.AccessToken)
	c.token = source.token.AccessToken
	value := source.token.Type() + " " + source.token.AccessToken
	if !httpguts.ValidHeaderFieldValue(value) {
		return false, fault.New(fault.RemoteError, "%s issued a token that holds line breaks or control characters", withoutSecrets(u))
	}
	req.Header.Set("Authorization", value)
	return reused, nil
}

func (c *call) fetchToken(ctx context.Context, config *clientcredentials.Config, u *url.URL) (*oauth2.Token, *fault.Error) {
	pool, ferr := c.transport()
	if ferr != nil {
		return nil, ferr
	}
	client := &http.Client{
		Transport: pool.Transport,
		// The client's secret goes to the token_url and nowhere else.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	token, err := config.Token(context.WithValue(c.meter.trace(ctx), oauth2.HTTPClient, client))
	c.noteConnections()
	if err == nil {
		return token, nil
	}
	var refused *oauth2.RetrieveError
	if !errors.As(err, &refused) || refused.Response == nil {
		if strings.HasPrefix(err.Error(), "oauth2: ") { // an answer that is not a token
			return nil, fault.Wrap(err, fault.RemoteError, "%s did not issue a token: %s", withoutSecrets(u), c.excerpt([]byte(err.Error())))
		}
		return nil, c.classify(ctx, err, http.MethodPost, u)
	}
	status := refused.Response.StatusCode
	ferr = fault.Wrap(err, fault.RemoteError, "%s refused to issue a token with status %d: %s", withoutSecrets(u), status, c.excerpt(refused.Body))
	ferr.Retryable = status == http.StatusTooManyRequests || status >= 500
	ferr.RetryAfter = retryAfter(refused.Response.Header, c.runner.now())
	return nil, ferr
}
