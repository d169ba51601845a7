package httprunner

import (
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"net/http"
	"net/textproto"
	"net/url"
	"os"
	"slices"
	"strings"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

// plan is an operation of a service made ready for calls. It is immutable and shared.
type plan struct {
	service string
	config  *Config
	auth    *AuthConfig // never nil
	policy  *effective

	base   base
	method string
	path   template // without the query
	// url is that of every call; nil where the path has fields.
	url     *url.URL
	query   []param
	headers []param
	body    string
	// restToQuery says that what remains of the input goes to the query string.
	restToQuery bool
	// noEmptyBody says that no body is sent where nothing of the input remains for it.
	noEmptyBody bool
	success     []int // nil: every 2xx
	retry       []int
}

// base is where a service lives.
type base struct {
	url    *url.URL // path without the final slash
	target target
}

// param is a named value, or several, of a query or a header.
type param struct {
	name   string
	where  string // for errors
	values []template
}

type planKey [sha256.Size]byte

func keyOf(s *runner.Service, o *runner.Operation, baseFromEnv string) planKey {
	h := sha256.New()
	var size [8]byte
	for _, part := range [][]byte{[]byte(s.Name), s.Config, s.Policy, []byte(o.Name), o.Config, []byte(baseFromEnv)} {
		binary.LittleEndian.PutUint64(size[:], uint64(len(part)))
		h.Write(size[:])
		h.Write(part)
	}
	return planKey(h.Sum(nil))
}

// planFor gives the plan of a call, from the cache where the same was asked for before.
func (r *Runner) planFor(s *runner.Service, o *runner.Operation) (*plan, *fault.Error) {
	fromEnv := os.Getenv(BaseURLVariable(s.Name))
	key := keyOf(s, o, fromEnv)
	if p, ok := r.plans.get(key); ok {
		return p, nil
	}
	p, err := r.newPlan(s, o, fromEnv)
	if err != nil {
		return nil, err
	}
	if len(s.Config)+len(s.Policy)+len(o.Config) > maxCachedPlan {
		return p, nil
	}
	return r.plans.getOrMake(key, func() *plan { return p }), nil
}

func (r *Runner) newPlan(s *runner.Service, o *runner.Operation, fromEnv string) (*plan, *fault.Error) {
	whole := *s
	whole.Operations = []runner.Operation{*o}
	var wrong []string
	for _, x := range r.checkService(&whole) {
		if !x.Warning {
			text := x.Path + ": " + x.Message
			if x.Mend != "" {
				text += "; " + x.Mend
			}
			wrong = append(wrong, text)
		}
	}
	if len(wrong) > 0 {
		return nil, fault.New(fault.Validation, "%s", list(wrong))
	}
	config, err := runner.Decode[Config](s.Config)
	if err != nil {
		return nil, fault.From(err)
	}
	op, err := runner.Decode[Operation](o.Config)
	if err != nil {
		return nil, fault.From(err)
	}
	policy, err := runner.Decode[Policy](s.Policy)
	if err != nil {
		return nil, fault.From(err)
	}
	p := &plan{
		service: s.Name, config: &config, auth: config.AuthConfig,
		policy: narrow(normalPolicy(&policy), normalPolicy(r.options.Ceiling)),
		method: op.Method, success: op.SuccessCodes, retry: defaultRetryStatusCodes(),
	}
	if p.auth == nil {
		p.auth = &AuthConfig{}
	}
	if p.method == "" {
		p.method = http.MethodPost
	}
	if config.RetryConfig != nil && config.RetryConfig.RetryStatusCodes != nil {
		p.retry = config.RetryConfig.RetryStatusCodes
	}
	p.body = op.Body
	if p.body == "" {
		p.body = bodyJSON
		switch p.method {
		case http.MethodGet, http.MethodHead:
			p.body, p.restToQuery = bodyNone, true
		case http.MethodDelete:
			// Some servers refuse a DELETE with a body: none is sent to say nothing.
			p.noEmptyBody = true
		}
	}
	if ferr := p.setBase(s.Name, config.BaseURL, fromEnv); ferr != nil {
		return nil, ferr
	}
	p.setPath(o.Name, op.Path)
	if !p.path.hasFields() {
		if path, ferr := p.path.fill(nil, "path", nil); ferr == nil {
			p.url, _ = p.base.join(path) // where it cannot be joined, each call says so
		}
	}
	p.setQuery(op.Query)
	p.setHeaders(config.Headers, op.Headers)
	return p, nil
}

func (p *plan) setBase(service, baseURL, fromEnv string) *fault.Error {
	where := "runner_config.base_url"
	if baseURL == "" {
		where, baseURL = BaseURLVariable(service), fromEnv
		if baseURL == "" {
			return fault.New(fault.Validation, "the service %s has no base_url, and %s is not set where the runner starts; set one of them", service, where)
		}
	}
	var wrong problems
	wrong.checkURL(where, baseURL)
	if len(wrong.list) > 0 {
		return fault.New(fault.Validation, "%s: %s; %s", where, wrong.list[0].Message, wrong.list[0].Mend)
	}
	u, err := url.Parse(baseURL)
	if err != nil {
		return fault.New(fault.Validation, "%s is not a URL", where)
	}
	t, ferr := targetOf(u)
	if ferr != nil {
		return ferr
	}
	p.addQuery(u.RawQuery, where)
	u.RawQuery, u.ForceQuery, u.Fragment, u.RawFragment = "", false, "", ""
	p.base = base{url: u, target: t}
	return nil
}

func (p *plan) setPath(operation, path string) {
	if path == "" {
		path = "/" + url.PathEscape(operation)
	}
	path, query, _ := strings.Cut(path, "?")
	if path != "" && !strings.HasPrefix(path, "/") {
		path = "/" + path
	}
	p.path = parseTemplate(path)
	p.addQuery(query, "path")
}

// addQuery adds the parameters of a query string.
func (p *plan) addQuery(query, where string) {
	if query == "" {
		return
	}
	for pair := range strings.SplitSeq(query, "&") {
		if pair == "" {
			continue
		}
		name, value, _ := strings.Cut(pair, "=")
		p.query = append(p.query, param{name: unescaped(name), where: where, values: []template{parseTemplate(unescaped(value))}})
	}
}

func unescaped(s string) string {
	if plain, err := url.QueryUnescape(s); err == nil {
		return plain
	}
	return s
}

func (p *plan) setQuery(query map[string]any) {
	for _, name := range slices.Sorted(maps.Keys(query)) {
		values, isList := query[name].([]any)
		if !isList {
			values = []any{query[name]}
		}
		x := param{name: name, where: "query." + name}
		for _, v := range values {
			x.values = append(x.values, parseTemplate(scalarText(v)))
		}
		p.query = append(p.query, x)
	}
}

func (p *plan) setHeaders(service, operation map[string]Scalar) {
	merged := map[string]Scalar{}
	for name, value := range service {
		merged[textproto.CanonicalMIMEHeaderKey(name)] = value
	}
	for name, value := range operation {
		merged[textproto.CanonicalMIMEHeaderKey(name)] = value
	}
	for _, name := range slices.Sorted(maps.Keys(merged)) {
		p.headers = append(p.headers, param{name: name, where: "headers." + name, values: []template{parseTemplate(string(merged[name]))}})
	}
}

// succeeded says whether a status means success.
func (p *plan) succeeded(status int) bool {
	if p.success == nil {
		return status >= 200 && status <= 299
	}
	return slices.Contains(p.success, status)
}
