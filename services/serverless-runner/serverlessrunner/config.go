package serverlessrunner

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/specql/mesh/pkg/runner"
)

// The providers.
const (
	providerAWS   = "aws"
	providerGCP   = "gcp"
	providerAzure = "azure"
)

// The ways to invoke a function.
const (
	invokeRequestResponse = "request_response"
	invokeEvent           = "event"
)

// Config is the runner_config of a serverless service.
type Config struct {
	Provider       string  `json:"provider" jsonschema:"enum=aws,enum=gcp,enum=azure,description=Whose function it is"`
	FunctionName   string  `json:"function_name" jsonschema:"minLength=1,maxLength=256,description=Name of the function; on AWS also its ARN; on Azure the route behind /api/"`
	Region         string  `json:"region,omitempty" jsonschema:"maxLength=64,description=Region such as us-east-1 (aws) or europe-west1 (gcp) or westeurope (azure)"`
	Project        string  `json:"project,omitempty" jsonschema:"maxLength=64,description=Google Cloud project id"`
	AppName        string  `json:"app_name,omitempty" jsonschema:"maxLength=64,description=Name of the Azure function app"`
	Endpoint       string  `json:"endpoint,omitempty" jsonschema:"maxLength=2048,description=URL in place of the provider's own: an emulator or a private endpoint or on gcp the function's own URL"`
	Qualifier      string  `json:"qualifier,omitempty" jsonschema:"maxLength=128,description=Version or alias of a Lambda function"`
	InvocationType string  `json:"invocation_type,omitempty" jsonschema:"enum=request_response,enum=event,description=Wait for the answer (default) or hand over an event (aws alone; an event carries no idempotency key)"`
	MemoryMB       int64   `json:"memory_mb,omitempty" jsonschema:"minimum=1,description=Memory that the function is deployed with in MB"`
	Architecture   string  `json:"architecture,omitempty" jsonschema:"enum=x86_64,enum=arm64,description=Processor that the function is deployed on; it decides the price; default x86_64"`
	Timeout        float64 `json:"timeout,omitempty" jsonschema:"exclusiveMinimum=0,description=Longest time of one attempt in seconds"`
	AuthConfig     Auth    `json:"auth_config,omitzero" jsonschema:"description=Credentials; without any the provider's default chain"`
}

// Auth names the credentials. Keys that end in _env_var name a variable of the runner's
// own environment.
type Auth struct {
	RoleARN                 string `json:"role_arn,omitempty" jsonschema:"maxLength=2048,description=AWS role to assume"`
	ServiceAccountKeyEnvVar string `json:"service_account_key_env_var,omitempty" jsonschema:"maxLength=256,description=Variable that holds a Google service account key as JSON"`
	FunctionKeyEnvVar       string `json:"function_key_env_var,omitempty" jsonschema:"maxLength=256,description=Variable that holds an Azure function key"`
	Scope                   string `json:"scope,omitempty" jsonschema:"maxLength=512,description=Scope of the Entra token such as api://CLIENT_ID/.default; default https://APP_NAME.azurewebsites.net/.default"`
}

type envVarKey struct{ key, name string }

// envVars gives the keys that name variables of the runner and are set.
func (a Auth) envVars() []envVarKey {
	return slices.DeleteFunc([]envVarKey{
		{"service_account_key_env_var", a.ServiceAccountKeyEnvVar}, {"function_key_env_var", a.FunctionKeyEnvVar},
	}, func(k envVarKey) bool { return k.name == "" })
}

// Operation holds what an operation says over its service.
type Operation struct {
	FunctionName   string `json:"function_name,omitempty" jsonschema:"maxLength=256,description=Function of this operation over the service's"`
	Qualifier      string `json:"qualifier,omitempty" jsonschema:"maxLength=128,description=Version or alias over the service's"`
	InvocationType string `json:"invocation_type,omitempty" jsonschema:"enum=request_response,enum=event,description=How to invoke over the service's"`
}

// with gives the configuration of one operation, defaults filled in.
func (c Config) with(o Operation) Config {
	c.FunctionName = cmp.Or(o.FunctionName, c.FunctionName)
	c.Qualifier = cmp.Or(o.Qualifier, c.Qualifier)
	c.InvocationType = cmp.Or(o.InvocationType, c.InvocationType, invokeRequestResponse)
	c.Architecture = cmp.Or(c.Architecture, "x86_64")
	return c
}

// The names end up in host names and paths: nothing else may pass.
var (
	awsRegion    = regexp.MustCompile(`^[a-z]{2}(-[a-z]+)+-[0-9]{1,2}$`)
	gcpRegion    = regexp.MustCompile(`^[a-z]+-[a-z]+[0-9]{1,2}$`)
	azureRegion  = regexp.MustCompile(`^[a-z][a-z0-9]{2,30}$`)
	awsFunction  = regexp.MustCompile(`^(arn:aws[a-z-]*:lambda:[a-z0-9-]+:[0-9]{12}:function:|[0-9]{12}:function:)?[a-zA-Z0-9_-]{1,140}(:(\$LATEST|[a-zA-Z0-9_-]{1,128}))?$`)
	awsQualifier = regexp.MustCompile(`^(\$LATEST|[a-zA-Z0-9_-]{1,128})$`)
	gcpFunction  = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9_-]{0,62}$`)
	azureRoute   = regexp.MustCompile(`^[a-zA-Z0-9_~-][a-zA-Z0-9._~-]*(/[a-zA-Z0-9_~-][a-zA-Z0-9._~-]*)*$`)
	gcpProject   = regexp.MustCompile(`^[a-z][a-z0-9-]{4,28}[a-z0-9]$`)
	azureApp     = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9-]{0,58}[a-zA-Z0-9])?$`)
	roleARN      = regexp.MustCompile(`^arn:aws[a-z-]*:iam::[0-9]{12}:role/[\w+=,.@/-]{1,512}$`)
	envVar       = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	envEntry     = regexp.MustCompile(`^([A-Za-z_][A-Za-z0-9_]*)?\*$|^[A-Za-z_][A-Za-z0-9_]*$`)
)

// minMemoryMB is the smallest function of every provider.
const minMemoryMB = 128

// maxMemoryMB is the largest function that a provider deploys.
func maxMemoryMB(provider string) int64 {
	switch provider {
	case providerAWS:
		return 10240
	case providerGCP:
		return 32768
	default:
		return 16384
	}
}

// faults lists what is wrong with a configuration beyond its schema. at is the path of
// function_name, qualifier and invocation_type; the other keys are the service's.
func (c Config) faults(at string) []runner.Problem {
	const service = "runner_config."
	f := faultList{}
	f.names(c, at)
	f.auth(c, service)
	if c.Endpoint != "" {
		if _, err := parseEndpoint(c.Endpoint); err != nil {
			f.add(service+"endpoint", err.Error(), "write an https URL; http is for loopback addresses, such as http://127.0.0.1:9001")
		}
	}
	if most := maxMemoryMB(c.Provider); knownProvider(c.Provider) && c.MemoryMB != 0 && (c.MemoryMB < minMemoryMB || c.MemoryMB > most) {
		f.add(service+"memory_mb", fmt.Sprintf("%d MB is no size of a function of %s", c.MemoryMB, c.Provider), fmt.Sprintf("write a number from %d to %d", minMemoryMB, most))
	}
	if c.Provider == providerAWS && c.Timeout > 900 {
		f.warn(service+"timeout", "AWS ends a function after 900 seconds", "write 900 or less")
	}
	return f.list
}

// operationFaults lists what an operation makes wrong: what is wrong with the service as well is
// not said of an operation that does not touch it.
func (c Config) operationFaults(name string, o Operation) []runner.Problem {
	own := "operations." + name + "."
	var keys []string
	for _, k := range []struct{ key, value string }{{"function_name", o.FunctionName}, {"qualifier", o.Qualifier}, {"invocation_type", o.InvocationType}} {
		if k.value != "" {
			keys = append(keys, own+k.key)
		}
	}
	if len(keys) == 0 {
		return nil
	}
	inherited := c.with(Operation{}).faults(own)
	var list []runner.Problem
	for _, f := range c.with(o).faults(own) {
		switch {
		case !strings.HasPrefix(f.Path, own):
			continue
		case slices.Contains(keys, f.Path):
		case slices.Contains(inherited, f):
			continue
		default:
			f.Path = keys[0] // the service's key is wrong beside the operation's
		}
		list = append(list, f)
	}
	return list
}

type faultList struct{ list []runner.Problem }

func (f *faultList) add(path, message, mend string) {
	f.list = append(f.list, runner.Problem{Path: path, Message: message, Mend: mend})
}

func (f *faultList) warn(path, message, mend string) {
	f.list = append(f.list, runner.Problem{Path: path, Message: message, Mend: mend, Warning: true})
}

// form checks a value that must not be missing.
func (f *faultList) form(path, value string, re *regexp.Regexp, what, mend string) {
	switch {
	case value == "":
		f.add(path, what+" is missing", mend)
	case !re.MatchString(value):
		f.add(path, fmt.Sprintf("%q is not %s", clip(value, 100), what), mend)
	}
}

func (f *faultList) names(c Config, at string) {
	const service = "runner_config."
	switch c.Provider {
	case providerAWS:
		f.form(service+"region", c.Region, awsRegion, "an AWS region", "write one such as us-east-1")
		f.form(at+"function_name", c.FunctionName, awsFunction, "a Lambda function", "write its name or its ARN")
		if region, ok := arnRegion(c.FunctionName); ok && c.Region != "" && region != c.Region {
			f.add(at+"function_name", "the ARN is of region "+region+", the service of "+c.Region, "write region: "+region)
		}
		if c.Qualifier != "" {
			f.form(at+"qualifier", c.Qualifier, awsQualifier, "a version or an alias", "write a version such as 7, an alias or $LATEST")
			if arnQualified(c.FunctionName) {
				f.add(at+"qualifier", "function_name has a qualifier already", "remove one of the two")
			}
		}
	case providerGCP:
		f.form(at+"function_name", c.FunctionName, gcpFunction, "a Cloud Function's name", "write letters, digits, - and _")
		if c.Endpoint == "" {
			f.form(service+"region", c.Region, gcpRegion, "a Google Cloud region", "write one such as europe-west1, or endpoint: with the function's URL")
			f.form(service+"project", c.Project, gcpProject, "a Google Cloud project id", "write project: with its id, or endpoint: with the function's URL")
		} else if c.Region != "" {
			f.form(service+"region", c.Region, gcpRegion, "a Google Cloud region", "write one such as europe-west1")
		}
	case providerAzure:
		f.form(at+"function_name", c.FunctionName, azureRoute, "an Azure function's route", "write its name, or its route without /api/")
		if c.Endpoint == "" {
			f.form(service+"app_name", c.AppName, azureApp, "the name of an Azure function app", "write app_name: with the name before .azurewebsites.net, or endpoint:")
		}
		if c.Region != "" {
			f.form(service+"region", c.Region, azureRegion, "an Azure region", "write one such as westeurope")
		}
	}
	if knownProvider(c.Provider) && c.Provider != providerAWS {
		if c.Qualifier != "" {
			f.add(at+"qualifier", "only AWS has qualifiers", "remove it")
		}
		if c.InvocationType == invokeEvent {
			f.add(at+"invocation_type", "only AWS takes events", "write request_response")
		}
	}
}

func (f *faultList) auth(c Config, service string) {
	a, path := c.AuthConfig, service+"auth_config."
	only := func(key, value, provider string) {
		if value != "" && knownProvider(c.Provider) && c.Provider != provider {
			f.add(path+key, key+" is for provider "+provider, "remove it")
		}
	}
	only("role_arn", a.RoleARN, providerAWS)
	only("service_account_key_env_var", a.ServiceAccountKeyEnvVar, providerGCP)
	only("function_key_env_var", a.FunctionKeyEnvVar, providerAzure)
	only("scope", a.Scope, providerAzure)
	if a.RoleARN != "" {
		f.form(path+"role_arn", a.RoleARN, roleARN, "the ARN of a role", "write one such as arn:aws:iam::123456789012:role/invoker")
	}
	for _, k := range a.envVars() {
		if !envVar.MatchString(k.name) {
			// The text may be a secret written in the wrong place: do not repeat it.
			f.add(path+k.key, "this is not the name of an environment variable", "write the name of the variable, not the secret")
		}
	}
	if a.Scope != "" && a.FunctionKeyEnvVar != "" {
		f.add(path+"scope", "a function key needs no scope", "remove scope or function_key_env_var")
	}
}

// arnRegion is the region in a function's ARN.
func arnRegion(name string) (string, bool) {
	parts := strings.Split(name, ":")
	if len(parts) < 7 || parts[0] != "arn" {
		return "", false
	}
	return parts[3], true
}

// arnQualified says whether a function's name ends in a version or alias.
func arnQualified(name string) bool {
	n := strings.Count(name, ":")
	return n == 1 || n == 3 || n == 7
}

// endpoint is a parsed endpoint.
type endpoint struct {
	url *url.URL
	// loopback: the address was written as one, so that nothing else may be connected to.
	loopback bool
}

// parseEndpoint reads an endpoint. Plain http is for loopback addresses alone.
func parseEndpoint(raw string) (endpoint, error) {
	u, err := url.Parse(raw)
	if err != nil || u.Host == "" || u.Hostname() == "" {
		return endpoint{}, fmt.Errorf("%q is not an absolute URL", clip(raw, 100))
	}
	switch {
	case u.Scheme != "https" && u.Scheme != "http":
		return endpoint{}, fmt.Errorf("the scheme %q is neither https nor http", clip(u.Scheme, 20))
	case u.User != nil:
		return endpoint{}, fmt.Errorf("the endpoint holds a user or a password")
	case u.RawQuery != "" || u.Fragment != "":
		return endpoint{}, fmt.Errorf("the endpoint has a query or a fragment")
	}
	if err := checkHost(u.Hostname()); err != nil {
		return endpoint{}, err
	}
	e := endpoint{url: u, loopback: isLoopbackHost(u.Hostname())}
	if u.Scheme == "http" && !e.loopback {
		return endpoint{}, fmt.Errorf("plain http to %s is not encrypted", clip(u.Host, 100))
	}
	return e, nil
}

// checkHost refuses hosts that two readers take for two different ones: what is compared with
// allowed_endpoints must be what is connected to.
func checkHost(host string) error {
	if addr, err := netip.ParseAddr(host); err == nil {
		if addr.Zone() != "" {
			return fmt.Errorf("the address has a zone")
		}
		return nil
	}
	if strings.ContainsFunc(host, func(c rune) bool {
		return (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && !strings.ContainsRune("-._", c)
	}) {
		return fmt.Errorf("the host %q has characters that no host name has; write an international name in its xn-- form", clip(host, 100))
	}
	name := strings.ToLower(strings.TrimSuffix(host, "."))
	last := name[strings.LastIndexByte(name, '.')+1:]
	digits, hex := strings.CutPrefix(last, "0x")
	if strings.Trim(last, "0123456789") == "" || hex && strings.Trim(digits, "0123456789abcdef") == "" {
		return fmt.Errorf("the host %q is an IPv4 address in a form that resolvers read in different ways; write four decimal numbers", clip(host, 100))
	}
	return nil
}

func isLoopbackHost(host string) bool {
	if strings.EqualFold(host, "localhost") {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.Unmap().IsLoopback()
}

// hostPort is the host in the form that allowed_endpoints are compared with.
func (e endpoint) hostPort() (host, port string) {
	port = e.url.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[e.url.Scheme]
	}
	return strings.ToLower(strings.TrimSuffix(e.url.Hostname(), ".")), port
}

// matchHost says whether an entry of allowed_endpoints (host, *.domain, either with :port)
// covers a host and port.
func matchHost(entry, host, port string) bool {
	entry = strings.ToLower(entry)
	if h, p, err := net.SplitHostPort(entry); err == nil {
		if p != port {
			return false
		}
		entry = h
	}
	if suffix, wild := strings.CutPrefix(entry, "*."); wild {
		return strings.HasSuffix(host, "."+suffix)
	}
	return strings.Trim(entry, "[]") == host
}

// providers in the order of the documentation.
func providers() []string { return []string{providerAWS, providerGCP, providerAzure} }

func knownProvider(p string) bool { return slices.Contains(providers(), p) }

// clip shortens hostile text for a message.
func clip(s string, most int) string {
	if len(s) <= most {
		return strings.ToValidUTF8(s, "\uFFFD")
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}
