package httprunner

import "github.com/specql/mesh/pkg/runner"

// Config is the runner_config of an http service.
type Config struct {
	BaseURL     string            `json:"base_url,omitempty" jsonschema:"description=Absolute http or https URL that the operations' paths are added to. Without it SPECQL_<NAME>_BASE_URL of the runner's environment is taken"`
	AuthType    string            `json:"auth_type,omitempty" jsonschema:"description=How calls prove who they are; none by default,enum=none,enum=bearer,enum=basic,enum=api_key,enum=oauth2_client_credentials,enum=aws_sigv4"`
	AuthConfig  *AuthConfig       `json:"auth_config,omitempty" jsonschema:"description=What the auth_type needs. Keys that end in _env_var name variables of the runner's environment"`
	CAEnvVar    string            `json:"ca_env_var,omitempty" jsonschema:"description=The variable of the runner's environment that holds the certificates (PEM) of the CAs that are trusted for this service; they take the place of the system's"`
	Headers     map[string]Scalar `json:"headers,omitempty" jsonschema:"description=Headers of every request. {field} is filled from the input"`
	Timeout     float64           `json:"timeout,omitempty" jsonschema:"description=Longest time of one attempt in seconds,exclusiveMinimum=0"`
	RetryConfig *RetryConfig      `json:"retry_config,omitempty" jsonschema:"description=Defaults of the operations' retries"`
}

// AuthConfig holds what the auth types need. Secrets are named, never written.
type AuthConfig struct {
	TokenEnvVar           string   `json:"token_env_var,omitempty" jsonschema:"description=bearer: the variable that holds the token"`
	UsernameEnvVar        string   `json:"username_env_var,omitempty" jsonschema:"description=basic: the variable that holds the user's name"`
	PasswordEnvVar        string   `json:"password_env_var,omitempty" jsonschema:"description=basic: the variable that holds the password; without it the password is empty"`
	APIKeyEnvVar          string   `json:"api_key_env_var,omitempty" jsonschema:"description=api_key: the variable that holds the key"`
	HeaderName            string   `json:"header_name,omitempty" jsonschema:"description=api_key: the header that carries the key; X-API-Key by default"`
	ClientIDEnvVar        string   `json:"client_id_env_var,omitempty" jsonschema:"description=oauth2_client_credentials: the variable that holds the client's id"`
	ClientSecretEnvVar    string   `json:"client_secret_env_var,omitempty" jsonschema:"description=oauth2_client_credentials: the variable that holds the client's secret"`
	TokenURL              string   `json:"token_url,omitempty" jsonschema:"description=oauth2_client_credentials: where tokens are issued. The security policy holds for it too"`
	Scopes                []string `json:"scopes,omitempty" jsonschema:"description=oauth2_client_credentials: the scopes to ask for"`
	Region                string   `json:"region,omitempty" jsonschema:"description=aws_sigv4: the region such as eu-central-1"`
	Service               string   `json:"service,omitempty" jsonschema:"description=aws_sigv4: the service's signing name such as s3"`
	AccessKeyIDEnvVar     string   `json:"access_key_id_env_var,omitempty" jsonschema:"description=aws_sigv4: the variable that holds the access key's id"`
	SecretAccessKeyEnvVar string   `json:"secret_access_key_env_var,omitempty" jsonschema:"description=aws_sigv4: the variable that holds the secret access key"`
	SessionTokenEnvVar    string   `json:"session_token_env_var,omitempty" jsonschema:"description=aws_sigv4: the variable that holds the session token of temporary credentials"`
}

// RetryConfig holds the defaults of a service's retries. The orchestrator retries; the runner
// says which statuses are worth it.
type RetryConfig struct {
	MaxRetries       *int    `json:"max_retries,omitempty" jsonschema:"description=How often a failed call is repeated; 3 by default,minimum=0,maximum=100"`
	BackoffFactor    float64 `json:"backoff_factor,omitempty" jsonschema:"description=What the time between two attempts is multiplied by,minimum=1,maximum=100"`
	RetryStatusCodes []int   `json:"retry_status_codes,omitempty" jsonschema:"description=The statuses that are worth another attempt; 429 500 502 503 504 by default"`
}

// Operation says how one operation is called.
//
// A {field} in path, query or headers is filled from the input and leaves it. What remains of
// the input is the body; for GET and HEAD, where no body is asked for, it is added to the
// query string.
type Operation struct {
	Method       string            `json:"method,omitempty" jsonschema:"description=The HTTP method; POST by default,enum=GET,enum=HEAD,enum=POST,enum=PUT,enum=PATCH,enum=DELETE,enum=OPTIONS"`
	Path         string            `json:"path,omitempty" jsonschema:"description=Added to base_url; /<operation> by default. {field} is filled and escaped from the input; {+field} keeps the slashes of its value"`
	Query        map[string]any    `json:"query,omitempty" jsonschema:"description=Query parameters: text or numbers or lists of them. {field} is filled from the input; a parameter that is nothing but an absent field is left out"`
	Headers      map[string]Scalar `json:"headers,omitempty" jsonschema:"description=Headers over those of the service. {field} is filled from the input; a header that is nothing but an absent field is left out"`
	Body         string            `json:"body,omitempty" jsonschema:"description=What the rest of the input becomes: json (default; none for GET and HEAD) or form (nested as a[b]=c) or raw (the field body as it is or body_base64 decoded or the one field that remains) or none,enum=json,enum=form,enum=raw,enum=none"`
	SuccessCodes []int             `json:"success_codes,omitempty" jsonschema:"description=The statuses that mean success; every 2xx by default"`
}

// Policy is the security_policy of an http service, and the operator's ceiling.
type Policy struct {
	AllowedDomains       []string        `json:"allowed_domains,omitempty" jsonschema:"description=Hosts that may be called: exact or *.example.com. Without it only the host of base_url"`
	AllowedPorts         []int           `json:"allowed_ports,omitempty" jsonschema:"description=Ports that may be called; any by default"`
	AllowPrivateNetworks bool            `json:"allow_private_networks,omitempty" jsonschema:"description=Whether loopback and link-local and private and metadata addresses may be connected to; false by default"`
	MaxRequestSize       int64           `json:"max_request_size,omitempty" jsonschema:"description=Largest request body and query string in bytes; 4194304 by default and 16777216 at most,minimum=1"`
	MaxResponseSize      int64           `json:"max_response_size,omitempty" jsonschema:"description=Largest response body in bytes after decompression; 4194304 by default and at most,minimum=1"`
	RateLimitPerMinute   int             `json:"rate_limit_per_minute,omitempty" jsonschema:"description=Most calls of the service in any minute,minimum=1,maximum=1000000"`
	CircuitBreaker       *CircuitBreaker `json:"circuit_breaker,omitempty" jsonschema:"description=Stops calling a service that keeps failing"`
	AllowedEnvVars       []string        `json:"allowed_env_vars,omitzero" jsonschema:"description=Variables of the runner that the *_env_var keys may name: exact or PREFIX_*. Any by default. Meant for the operator's policy"`
}

// CircuitBreaker stops calls to a target that keeps failing.
type CircuitBreaker struct {
	FailureThreshold int     `json:"failure_threshold,omitempty" jsonschema:"description=Failures in a row that open the breaker; 5 by default,minimum=1,maximum=100000"`
	RecoveryTimeout  float64 `json:"recovery_timeout,omitempty" jsonschema:"description=Seconds until one call is let through to try; 30 by default,exclusiveMinimum=0,maximum=86400"`
}

const (
	authNone   = "none"
	authBearer = "bearer"
	authBasic  = "basic"
	authAPIKey = "api_key"
	authOAuth2 = "oauth2_client_credentials"
	authSigV4  = "aws_sigv4"

	bodyJSON = "json"
	bodyForm = "form"
	bodyRaw  = "raw"
	bodyNone = "none"

	defaultAPIKeyHeader = "X-API-Key" //nolint:gosec // a header's name
	defaultMaxBytes     = 4 << 20
	// maxResponseBytes is the largest answer that any policy allows: an output cannot hold more.
	maxResponseBytes = runner.MaxOutputBytes
	// maxRequestBytes is the largest request that any policy allows: escaping makes up to three
	// bytes of each byte of an input.
	maxRequestBytes = 4 * runner.MaxInputBytes
	// maxRedirects is how many redirects one call follows.
	maxRedirects = 10
)

func defaultRetryStatusCodes() []int { return []int{429, 500, 502, 503, 504} }
