package serverlessrunner

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"regexp"
	"strings"
	"sync"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"

	"github.com/specql/mesh/pkg/fault"
)

// callAzure calls an Azure Function's HTTP trigger with a function key or an Entra token.
//
// The token comes from Azure's default chain (environment, workload identity, managed identity, az).
// A loopback endpoint over plain http, which is an emulator, is called without a token.
func (r *Runner) callAzure(ctx context.Context, c *call) (json.RawMessage, error) {
	header := http.Header{}
	mend := "name the function's key with auth_config.function_key_env_var"
	switch name := c.config.AuthConfig.FunctionKeyEnvVar; {
	case name != "":
		key, err := c.secret(name)
		if err != nil {
			return nil, err
		}
		if strings.ContainsFunc(key, func(r rune) bool { return r <= ' ' || r > '~' }) {
			return nil, fault.New(fault.Validation, "the variable %s does not hold a function key: it has spaces or other characters that no key has", name)
		}
		header.Set("X-Functions-Key", key)
		mend = "check the key in " + name
	case asksEntra(c.config, c.target):
		token, err := r.entra.token(ctx, c)
		if err != nil {
			return nil, err
		}
		header.Set("Authorization", "Bearer "+token)
		mend = "give the runner's identity access to the app, or " + mend
	}
	return r.post(ctx, c, header, mend)
}

// asksEntra says whether a call carries an Entra token.
func asksEntra(c Config, target endpoint) bool {
	return c.Provider == providerAzure && c.AuthConfig.FunctionKeyEnvVar == "" && target.url.Scheme == "https"
}

var applicationScope = regexp.MustCompile(`^api://[A-Za-z0-9._~/-]{1,400}/\.default$`)

// entraScope is what the token is for. It names the app that is called, or an application
// of one's own (api://…): never another service, whose token the app could use.
// Where such an application's token may go is for [effective.authorizeScope].
func entraScope(c Config, target endpoint) (string, error) {
	host, _ := target.hostPort()
	own := "https://" + host + "/.default"
	switch scope := c.AuthConfig.Scope; {
	case scope == "" || scope == own:
		return own, nil
	case applicationScope.MatchString(scope):
		return scope, nil
	default:
		return "", fault.New(fault.Validation, "auth_config.scope: %q is not for this app; write api://CLIENT_ID/.default or %s", clip(scope, 200), own)
	}
}

// entraTokens keeps the credential of Azure's default chain, which keeps its tokens.
type entraTokens struct {
	mu         sync.Mutex
	credential azcore.TokenCredential
}

func (e *entraTokens) token(ctx context.Context, c *call) (string, error) {
	scope, err := entraScope(c.config, c.target)
	if err != nil {
		return "", err
	}
	credential, err := e.chain()
	if err != nil {
		return "", fault.Wrap(err, fault.Validation, "the runner's Azure credentials cannot be used: %s", clip(err.Error(), 300))
	}
	t, err := credential.GetToken(ctx, policy.TokenRequestOptions{Scopes: []string{scope}})
	if err != nil {
		return "", azureFault(err, scope)
	}
	c.sink.Secret(t.Token)
	return t.Token, nil
}

func (e *entraTokens) chain() (azcore.TokenCredential, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.credential != nil {
		return e.credential, nil
	}
	credential, err := azidentity.NewDefaultAzureCredential(nil)
	if err != nil {
		return nil, err // the caller says what it was
	}
	e.credential = credential
	return credential, nil
}

// azureFault turns a failure to get a token into a fault.
func azureFault(err error, scope string) error {
	var failed *azidentity.AuthenticationFailedError
	if errors.As(err, &failed) && failed.RawResponse != nil {
		code := fault.RemoteError
		if failed.RawResponse.StatusCode >= 500 || failed.RawResponse.StatusCode == http.StatusTooManyRequests {
			code = fault.Unavailable
		}
		return fault.Wrap(err, code, "Entra gives the runner no token for %s: %s", scope, statusText(failed.RawResponse.StatusCode))
	}
	return fault.Wrap(err, fault.Validation, "the runner has no Azure credentials for %s; "+
		"name a function key with auth_config.function_key_env_var, or set AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET where the runner starts", scope)
}
