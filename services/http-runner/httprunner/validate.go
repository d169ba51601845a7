package httprunner

import (
	"fmt"
	"maps"
	"net/netip"
	"net/textproto"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/net/http/httpguts"

	"github.com/specql/mesh/pkg/runner"
)

// problems gathers what is wrong below a path.
type problems struct {
	list []runner.Problem
}

func (p *problems) add(path, mend, format string, args ...any) {
	p.list = append(p.list, runner.Problem{Path: path, Message: fmt.Sprintf(format, args...), Mend: mend})
}

func (p *problems) warn(path, mend, format string, args ...any) {
	p.add(path, mend, format, args...)
	p.list[len(p.list)-1].Warning = true
}

// checkService gives everything that is wrong with a service: what the schemas say, then what
// they cannot say. A fault that a schema found hides nothing but what follows from it.
func (r *Runner) checkService(s *runner.Service) []runner.Problem {
	found := runner.CheckService[Config, Operation, Policy](s)
	config, policy := runner.Lenient[Config](s.Config), runner.Lenient[Policy](s.Policy)
	p := problems{}
	p.checkConfig(s.Name, &config)
	if !concerns(found, "runner_config.auth_type") {
		p.checkUnused(&config)
	}
	for i := range s.Operations {
		op := runner.Lenient[Operation](s.Operations[i].Config)
		p.checkOperation("operations."+s.Operations[i].Name, &op)
	}
	p.checkPolicy(registryName, &policy)
	p.checkSizes(&policy)
	// What a schema has said of a place is not said of it, or of what is in it, once more.
	p.list = slices.DeleteFunc(p.list, func(x runner.Problem) bool {
		return slices.ContainsFunc(found, func(f runner.Problem) bool { return within(x.Path, f.Path) })
	})
	found = append(found, p.list...)
	reach := problems{}
	reach.checkReach(&config, narrow(normalPolicy(&policy), normalPolicy(r.options.Ceiling)))
	for _, x := range reach.list {
		// What is wrong already decides nothing.
		if !concerns(found, x.Path, registryName+".allowed_domains", registryName+".allowed_ports", registryName+".allow_private_networks", registryName+".allowed_env_vars") {
			found = append(found, x)
		}
	}
	return found
}

// within says whether a path is a place or something in it.
func within(path, place string) bool {
	rest, below := strings.CutPrefix(path, place)
	return below && (rest == "" || place == "" || rest[0] == '.' || rest[0] == '[')
}

// concerns says whether a problem makes the value at one of the paths doubtful.
func concerns(list []runner.Problem, paths ...string) bool {
	return slices.ContainsFunc(list, func(x runner.Problem) bool {
		return slices.ContainsFunc(paths, func(path string) bool { return within(path, x.Path) || within(x.Path, path) })
	})
}

// BaseURLVariable is the variable that holds the base URL of a service without one.
func BaseURLVariable(service string) string {
	name := strings.Map(func(c rune) rune {
		switch {
		case c >= 'a' && c <= 'z':
			return c - 'a' + 'A'
		case c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
			return c
		}
		return '_'
	}, service)
	return "SPECQL_" + name + "_BASE_URL"
}

func (p *problems) checkConfig(service string, c *Config) {
	if c.BaseURL == "" {
		variable := BaseURLVariable(service)
		if value := os.Getenv(variable); value == "" {
			p.warn("runner_config.base_url", "set base_url, or "+variable+" where the runner starts", "there is no base_url, and %s is not set in the runner's environment", variable)
		}
	} else {
		p.checkURL("runner_config.base_url", c.BaseURL)
	}
	p.checkHeaders("runner_config.headers", c.Headers, c)
	p.checkAuth(c)
	if c.CAEnvVar != "" && !envName.MatchString(c.CAEnvVar) {
		p.add("runner_config.ca_env_var", "write the variable's name, such as INTERNAL_CA", "must name an environment variable, not hold a value")
	}
	if c.RetryConfig != nil {
		p.checkStatuses("runner_config.retry_config.retry_status_codes", c.RetryConfig.RetryStatusCodes)
	}
}

// checkURL checks that a URL can be called.
func (p *problems) checkURL(path, text string) {
	const mend = "write an absolute URL such as https://api.example.com/v1"
	if strings.Contains(text, "{") {
		p.add(path, "put {field} into the operation's path, query or headers", "holds braces; the host and the base path are not filled from the input")
		return
	}
	u, err := url.Parse(text)
	if err != nil {
		p.add(path, mend, "is not a URL")
		return
	}
	if u.Scheme == "" || u.Host == "" {
		p.add(path, mend, "%q is not an absolute http or https URL", clip(withoutSecrets(u)))
		return
	}
	if _, ferr := targetOf(u); ferr != nil {
		p.add(path, mend, "%s", ferr.Message)
		return
	}
	if u.Fragment != "" {
		p.add(path, "remove the part after #", "a fragment is never sent")
	}
	if dotSegments(u.EscapedPath()) {
		p.add(path, "write the path without . and .. segments", "holds a . or .. segment")
	}
}

// ownHeaders are set by the protocol, not by a configuration.
var ownHeaders = []string{
	"Host", "Content-Length", "Connection", "Transfer-Encoding", "Upgrade", "Te", "Trailer", "Keep-Alive", "Proxy-Connection",
	"Proxy-Authorization", "Proxy-Authenticate", "Expect", "Http2-Settings", "Forwarded", "Traceparent", "Tracestate",
}

func (p *problems) checkHeaderName(path, name string) bool {
	// Gateways such as CGI read an underscore as a hyphen.
	canonical := textproto.CanonicalMIMEHeaderKey(strings.ReplaceAll(name, "_", "-"))
	switch {
	case !httpguts.ValidHeaderFieldName(name):
		p.add(path, "use letters, digits and hyphens", "%q is not a header name", clip(name))
	case slices.Contains(ownHeaders, canonical):
		p.add(path, "remove it", "the header %s is set by the runner", canonical)
	default:
		return true
	}
	return false
}

func (p *problems) checkHeaders(path string, headers map[string]Scalar, c *Config) {
	seen := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(headers)) {
		at := path + "." + clip(name)
		if !p.checkHeaderName(at, name) {
			continue
		}
		value := string(headers[name])
		if !httpguts.ValidHeaderFieldValue(value) {
			p.add(at, "remove line breaks and control characters", "the value cannot be sent in a header")
		}
		canonical := textproto.CanonicalMIMEHeaderKey(name)
		if other, dup := seen[canonical]; dup {
			p.add(at, "keep one of them", "the header is there twice, also as %s", other)
		}
		seen[canonical] = name
		if canonical == "Authorization" && c != nil {
			if c.AuthType != "" && c.AuthType != authNone {
				p.warn(at, "remove the header, or auth_type", "auth_type %s sets this header as well and wins", c.AuthType)
			} else {
				p.warn(at, "use auth_type and name the secret with a *_env_var key", "a credential in the registry is seen by everybody who can read it")
			}
		}
	}
}

var (
	envName  = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	envEntry = regexp.MustCompile(`^([A-Za-z_][A-Za-z0-9_]*)?\*$|^[A-Za-z_][A-Za-z0-9_]*$`)
)

// authKeys are the keys of auth_config that each auth_type needs and may have.
func authKeys(authType string) (needs, may []string) {
	switch authType {
	case authBearer:
		return []string{"token_env_var"}, nil
	case authBasic:
		return []string{"username_env_var"}, []string{"password_env_var"}
	case authAPIKey:
		return []string{"api_key_env_var"}, []string{"header_name"}
	case authOAuth2:
		return []string{"client_id_env_var", "client_secret_env_var", "token_url"}, []string{"scopes"}
	case authSigV4:
		return []string{"region", "service", "access_key_id_env_var", "secret_access_key_env_var"}, []string{"session_token_env_var"}
	}
	return nil, nil
}

const authPath = "runner_config.auth_config"

// authValues gives what is written in auth_config, by key.
func authValues(a *AuthConfig) map[string]string {
	if a == nil {
		return nil
	}
	set := map[string]string{
		"token_env_var": a.TokenEnvVar, "username_env_var": a.UsernameEnvVar, "password_env_var": a.PasswordEnvVar,
		"api_key_env_var": a.APIKeyEnvVar, "header_name": a.HeaderName, "client_id_env_var": a.ClientIDEnvVar,
		"client_secret_env_var": a.ClientSecretEnvVar, "token_url": a.TokenURL, "scopes": strings.Join(a.Scopes, " "),
		"region": a.Region, "service": a.Service, "access_key_id_env_var": a.AccessKeyIDEnvVar,
		"secret_access_key_env_var": a.SecretAccessKeyEnvVar, "session_token_env_var": a.SessionTokenEnvVar,
	}
	maps.DeleteFunc(set, func(_, value string) bool { return value == "" })
	return set
}

func (p *problems) checkAuth(c *Config) {
	set := authValues(c.AuthConfig)
	needs, _ := authKeys(c.AuthType)
	for _, key := range needs {
		if set[key] == "" {
			p.add(authPath+"."+key, "add "+key, "auth_type %s needs %s", c.AuthType, key)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(set)) {
		if strings.HasSuffix(key, "_env_var") && !envName.MatchString(set[key]) {
			// The value is not shown: it may be the secret itself.
			p.add(authPath+"."+key, "write the variable's name, such as API_TOKEN", "must name an environment variable, not hold a value")
		}
	}
	if set["token_url"] != "" {
		p.checkURL(authPath+".token_url", set["token_url"])
	}
	if set["header_name"] != "" {
		p.checkHeaderName(authPath+".header_name", set["header_name"])
	}
	for _, key := range []string{"region", "service"} {
		if strings.ContainsAny(set[key], "/ \r\n,=") {
			p.add(authPath+"."+key, "write it as AWS does, such as eu-central-1 or s3", "%q is not a %s", clip(set[key]), key)
		}
	}
}

// checkUnused warns of keys that the auth_type does not use.
func (p *problems) checkUnused(c *Config) {
	needs, may := authKeys(c.AuthType)
	authType := c.AuthType
	if authType == "" {
		authType = authNone
	}
	for _, key := range slices.Sorted(maps.Keys(authValues(c.AuthConfig))) {
		if !slices.Contains(needs, key) && !slices.Contains(may, key) {
			p.warn(authPath+"."+key, "remove it, or set the auth_type that uses it", "auth_type %s does not use %s", authType, key)
		}
	}
}

func (p *problems) checkStatuses(path string, codes []int) {
	for i, code := range codes {
		if code < 100 || code > 599 {
			p.add(fmt.Sprintf("%s[%d]", path, i), "write a status from 100 to 599", "%d is not an HTTP status", code)
		}
	}
}

func (p *problems) checkOperation(path string, o *Operation) {
	p.checkPath(path+".path", o.Path)
	for _, name := range slices.Sorted(maps.Keys(o.Query)) {
		if !queryValue(o.Query[name], true) {
			p.add(path+".query."+clip(name), "write text, a number, a boolean or a list of them", "is not a value of a query parameter")
		}
	}
	p.checkHeaders(path+".headers", o.Headers, nil)
	p.checkStatuses(path+".success_codes", o.SuccessCodes)
}

func (p *problems) checkPath(path, text string) {
	plain, _, _ := strings.Cut(text, "?")
	switch {
	case text == "":
		return
	case strings.Contains(text, "://"):
		p.add(path, "move scheme and host to base_url", "is a whole URL; only the part after base_url is written here")
		return
	case strings.Contains(text, "#"):
		p.add(path, "remove the part after #, or write it as %23", "a fragment is never sent")
	}
	if strings.ContainsFunc(text, func(c rune) bool { return c <= ' ' || c == 0x7f || c == '\\' }) {
		p.add(path, "write it percent-encoded", "holds a space, a backslash or a control character")
	}
	if left := place.ReplaceAllString(text, ""); strings.ContainsAny(left, "{}") {
		p.add(path, "write {field} with the name of an input field, letters, digits, _ and -", "holds braces that are not around a field's name")
	}
	literal := place.ReplaceAllString(plain, "x")
	if dotSegments(literal) {
		p.add(path, "write the path without . and .. segments", "holds a . or .. segment")
	}
	if _, err := url.PathUnescape(literal); err != nil {
		p.add(path, "write a percent sign as %25", "holds a percent sign that begins no escape")
	}
}

// queryValue says whether a decoded JSON value can be a query parameter.
func queryValue(v any, lists bool) bool {
	switch v := v.(type) {
	case string, float64, bool:
		return true
	case []any:
		return lists && !slices.ContainsFunc(v, func(x any) bool { return !queryValue(x, false) })
	}
	return false
}

func (p *problems) checkPolicy(path string, policy *Policy) {
	for i, d := range policy.AllowedDomains {
		at := fmt.Sprintf("%s.allowed_domains[%d]", path, i)
		if _, err := normalDomain(d); err != nil {
			p.add(at, "write a host such as api.example.com or *.example.com, without scheme, port or path", "%v", err)
		}
	}
	for i, port := range policy.AllowedPorts {
		if port < 1 || port > 65535 {
			p.add(fmt.Sprintf("%s.allowed_ports[%d]", path, i), "write a port from 1 to 65535", "%d is not a port", port)
		}
	}
	for i, entry := range policy.AllowedEnvVars {
		if !envEntry.MatchString(entry) {
			p.add(fmt.Sprintf("%s.allowed_env_vars[%d]", path, i), "write a variable's name such as STRIPE_KEY, or the beginning of names such as STRIPE_*", "%q is not the name of a variable", clip(entry))
		}
	}
}

// checkSizes warns of bounds above those that always hold.
func (p *problems) checkSizes(policy *Policy) {
	for _, x := range []struct {
		key        string
		size, most int64
		what       string
	}{
		{"max_response_size", policy.MaxResponseSize, maxResponseBytes, "an answer becomes the output, which"},
		{"max_request_size", policy.MaxRequestSize, maxRequestBytes, "a request is made of the input and"},
	} {
		if x.size > x.most {
			p.warn(registryName+"."+x.key, fmt.Sprintf("write %d or less", x.most), "%s may have %d bytes at most; that holds, not %d", x.what, x.most, x.size)
		}
	}
}

// checkReach warns where the service's own URLs and secrets would be refused by its policies.
func (p *problems) checkReach(c *Config, e *effective) {
	warn := func(path, text string) {
		u, err := url.Parse(text)
		if err != nil || u.Host == "" {
			return
		}
		t, ferr := targetOf(u)
		if ferr != nil {
			return
		}
		if ferr := e.check(&runner.Checks{}, t, t.host); ferr != nil {
			p.warn(path, "", "every call would be refused: %s", ferr.Message)
		}
		what := ""
		if addr, err := netip.ParseAddr(t.host); err == nil {
			what = privateAddress(addr)
		} else if t.host == "localhost" || strings.HasSuffix(t.host, ".localhost") {
			what = "loopback"
		}
		if what != "" && !e.allowPrivate {
			p.warn(path, "set allow_private_networks: true in "+e.privateBy, "every call would be refused: %s is a %s address", t.host, what)
		}
	}
	warn("runner_config.base_url", c.BaseURL)
	if c.AuthType == authOAuth2 && c.AuthConfig != nil {
		warn(authPath+".token_url", c.AuthConfig.TokenURL)
	}
	if c.CAEnvVar != "" {
		if ferr := e.checkEnvVar(&runner.Checks{}, c.CAEnvVar); ferr != nil {
			p.warn("runner_config.ca_env_var", "", "every call would be refused: %s", ferr.Message)
		}
	}
	set := authValues(c.AuthConfig)
	for _, key := range slices.Sorted(maps.Keys(set)) {
		if !strings.HasSuffix(key, "_env_var") {
			continue
		}
		if ferr := e.checkEnvVar(&runner.Checks{}, set[key]); ferr != nil {
			p.warn(authPath+"."+key, "", "every call would be refused: %s", ferr.Message)
		}
	}
}

// normalPolicy gives a policy with its domains in normal form. What is not a domain matches
// nothing; [problems.checkPolicy] reports it.
func normalPolicy(p *Policy) *Policy {
	if p == nil {
		return nil
	}
	n := *p
	if p.AllowedDomains != nil {
		n.AllowedDomains = make([]string, 0, len(p.AllowedDomains))
		for _, d := range p.AllowedDomains {
			if host, err := normalDomain(d); err == nil {
				n.AllowedDomains = append(n.AllowedDomains, host)
			}
		}
	}
	return &n
}
