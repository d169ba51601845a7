// Package modernize finds patterns of HTTP-only times in service registries, and writes their modern forms.
package modernize

import (
	"cmp"
	"fmt"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v4"

	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/http-runner/httprunner"
)

// The patterns that are found.
const (
	ImplicitExecutionType = "implicit_execution_type"
	ImplicitBaseURL       = "implicit_base_url"
	ImplicitDomains       = "implicit_allowed_domains"
	LiteralSecret         = "literal_secret"
)

// Finding is an old pattern at its place. It never holds the value of a secret.
type Finding struct {
	spec.Position
	// Path is the place in the document, such as `services[0].runner_config`.
	Path string
	// Pattern is one of the constants of this package.
	Pattern string
	// Message says what is old, Modern what to write.
	Message, Modern string
	// Written says that [Rewrite] has written the modern form.
	Written bool

	edit *edit
}

// Fixable says whether [Rewrite] can write the modern form.
func (f *Finding) Fixable() bool { return f.edit != nil }

// Find gives the old patterns of a registry, sorted by their places. The file must be one of which [spec.ParseRegistry]
// could read something. An error means that it is not YAML.
func Find(f spec.File) ([]Finding, error) {
	var document yaml.Node
	if err := yaml.Load(f.Content, &document); err != nil {
		return nil, fmt.Errorf("read %s: %w", f.Name, err)
	}
	root := &document
	if root.Kind == yaml.DocumentNode && len(root.Content) == 1 {
		root = root.Content[0]
	}
	d := &finder{file: f, base: map[string]*yaml.Node{}, overlays: map[string][]*yaml.Node{}}
	services := value(root, "services")
	each(services, func(_ int, service *yaml.Node) { d.base[name(service)] = service })
	type overlay struct {
		key      string
		services *yaml.Node
	}
	var others []overlay
	for i := 0; root.Kind == yaml.MappingNode && i+1 < len(root.Content); i += 2 {
		key, list := root.Content[i].Value, value(root.Content[i+1], "services")
		if key == "services" || key == "alerts" || strings.HasPrefix(key, "x-") || list == nil {
			continue
		}
		others = append(others, overlay{key, list})
		each(list, func(_ int, service *yaml.Node) {
			d.overlays[name(service)] = append(d.overlays[name(service)], service)
		})
	}
	each(services, func(i int, service *yaml.Node) { d.service(service, nil, []any{"services", i}) })
	for _, o := range others {
		each(o.services, func(i int, service *yaml.Node) {
			d.service(service, d.base[name(service)], []any{o.key, "services", i})
		})
	}
	slices.SortStableFunc(d.found, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	return d.found, nil
}

type finder struct {
	file     spec.File
	base     map[string]*yaml.Node
	overlays map[string][]*yaml.Node // by the service's name
	found    []Finding
}

func (d *finder) add(at *yaml.Node, path []any, pattern, message, modern string, e *edit) {
	d.found = append(d.found, Finding{
		Position: spec.Position{File: d.file.Name, Line: at.Line, Column: at.Column},
		Path:     pathText(path), Pattern: pattern, Message: message, Modern: modern, edit: e,
	})
}

// service looks at one service; base is what an overlay's service is merged into, nil for none.
func (d *finder) service(n, base *yaml.Node, path []any) {
	if n.Kind != yaml.MappingNode {
		return
	}
	if value(n, "execution_type") != nil && len(n.Content) <= 4 && value(n, "runner_config") == nil && value(n, "operations") == nil {
		return // switched off for a while, or an overlay that says the type alone
	}
	kind := scalar(value(n, "execution_type"))
	if kind == "" && base != nil {
		kind = scalar(value(base, "execution_type"))
	}
	if value(n, "execution_type") == nil && base == nil {
		d.add(n, path, ImplicitExecutionType, "the execution type is not said, and http is meant", "write `execution_type: http`",
			insertKey(n, path, "execution_type", "http", "category", "type", "name"))
	}
	if kind == "" || kind == spec.DefaultExecutionType {
		d.baseURL(n, base, path)
		d.domains(n, base, path)
	}
	d.secrets(n, path)
}

// baseURL finds a service whose base URL is in a variable that the registry does not name.
func (d *finder) baseURL(n, base *yaml.Node, path []any) {
	has := func(s *yaml.Node) bool { return value(value(s, "runner_config"), "base_url") != nil }
	key := name(n)
	if base != nil || has(n) || strings.Contains(key, "${") || slices.ContainsFunc(d.others(n), has) {
		return
	}
	variable := httprunner.BaseURLVariable(scalar(value(n, "name")))
	at, here := n, path
	if k := keyNode(n, "runner_config"); k != nil {
		at, here = k, join(path, "runner_config")
	}
	// An overlay that makes something else of the service has no use for the URL.
	var e *edit
	if !slices.ContainsFunc(d.others(n), func(o *yaml.Node) bool { return value(o, "execution_type") != nil }) {
		e = insertInto(n, path, "runner_config", "base_url", `"${`+variable+`:-}"`)
	}
	d.add(at, here, ImplicitBaseURL, "there is no base_url, so that "+variable+" of the runner's environment is taken",
		"write `base_url: \"${"+variable+"}\"`, or the URL; with `${"+variable+":-}` the runner's own variable still does", e)
}

// domains finds a service that may call the host of its base_url alone, which its policy does not say.
func (d *finder) domains(n, base *yaml.Node, path []any) {
	has := func(s *yaml.Node) bool { return value(value(s, "security_policy"), "allowed_domains") != nil }
	if has(n) || base != nil && has(base) {
		return
	}
	baseURL := value(value(n, "runner_config"), "base_url")
	u, err := url.Parse(scalar(baseURL))
	if err != nil || u.Hostname() == "" || strings.Contains(u.Host, "$") {
		return // the host is not known here, and what holds without allowed_domains follows it
	}
	host := strings.ToLower(u.Hostname())
	at, here := n, path
	if k := keyNode(n, "security_policy"); k != nil {
		at, here = k, join(path, "security_policy")
	}
	var e *edit
	// Naming a link-local address allows more than leaving the list out.
	if ip, err := netip.ParseAddr(host); hostPattern.MatchString(host) && (err != nil || !ip.IsLinkLocalUnicast()) {
		e = insertInto(n, path, "security_policy", "allowed_domains", `["`+host+`"]`)
	}
	d.add(at, here, ImplicitDomains, "security_policy does not say which hosts may be called, and the host of base_url is meant",
		fmt.Sprintf("write `allowed_domains: [%q]`", host), e)
}

var hostPattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$`)

// others are the services of overlays that are merged into one of the base.
func (d *finder) others(n *yaml.Node) []*yaml.Node {
	if d.base[name(n)] != n {
		return nil
	}
	return d.overlays[name(n)]
}

// secretKeys are what configurations of runners want the names of, each with _env_var behind it.
var secretKeys = []string{
	"token", "username", "password", "api_key", "client_id", "client_secret", "access_key_id", "secret_access_key", "session_token",
	"service_account_key", "function_key",
}

// secretHeader are headers that carry credentials.
var secretHeader = regexp.MustCompile(`(?i)^(proxy-)?authorization$|^cookie$|api[-_]?key|token|secret|password|credential`)

// wholeField is a header that is filled from the input.
var wholeField = regexp.MustCompile(`^\{\+?[A-Za-z0-9_-]+\}$`)

// secrets finds secrets that are written into the registry, or pass through the orchestrator on their way.
func (d *finder) secrets(n *yaml.Node, path []any) {
	config := value(n, "runner_config")
	for _, block := range []string{"auth_config", "registry_auth"} {
		pairs(value(config, block), func(key, v *yaml.Node) {
			if !slices.Contains(secretKeys, key.Value) || v.Kind != yaml.ScalarNode {
				return
			}
			d.add(key, join(path, "runner_config", block, key.Value), LiteralSecret, "a secret belongs in the runner's environment, not in the registry",
				fmt.Sprintf("write `%s_env_var:` with the name of a variable that the runner has", key.Value), nil)
		})
	}
	d.headers(value(config, "headers"), join(path, "runner_config", "headers"))
	each(value(n, "operations"), func(i int, op *yaml.Node) {
		d.headers(value(op, "headers"), join(path, "operations", i, "headers"))
	})
}

func (d *finder) headers(n *yaml.Node, path []any) {
	pairs(n, func(key, v *yaml.Node) {
		text := scalar(v)
		if !secretHeader.MatchString(key.Value) || strings.TrimSpace(text) == "" || wholeField.MatchString(text) {
			return
		}
		modern := "write `auth_type: api_key` with `auth_config: {header_name: " + key.Value + ", api_key_env_var: …}`"
		scheme, _, _ := strings.Cut(strings.ToLower(text), " ")
		switch {
		case strings.EqualFold(key.Value, "authorization") && scheme == "basic":
			modern = "write `auth_type: basic` with `auth_config: {username_env_var: …, password_env_var: …}`"
		case strings.EqualFold(key.Value, "authorization"):
			modern = "write `auth_type: bearer` with `auth_config: {token_env_var: …}`"
		}
		message := "a credential is written into a header"
		if strings.Contains(text, "${") {
			message = "the credential of a header passes through the orchestrator"
		}
		d.add(key, join(path, key.Value), LiteralSecret, message, modern+", which name variables that the runner has", nil)
	})
}

// value gives the value of a key, through aliases and merges; nil for none.
func value(n *yaml.Node, key string) *yaml.Node { return lookUp(n, key, map[*yaml.Node]bool{}) }

func lookUp(n *yaml.Node, key string, seen map[*yaml.Node]bool) *yaml.Node {
	n = resolve(n)
	if n == nil || n.Kind != yaml.MappingNode || seen[n] {
		return nil
	}
	seen[n] = true
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return resolve(n.Content[i+1])
		}
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value != "<<" {
			continue
		}
		sources := []*yaml.Node{resolve(n.Content[i+1])}
		if sources[0] != nil && sources[0].Kind == yaml.SequenceNode {
			sources = sources[0].Content
		}
		for _, source := range sources {
			if v := lookUp(source, key, seen); v != nil {
				return v
			}
		}
	}
	return nil
}

// resolve follows an alias.
func resolve(n *yaml.Node) *yaml.Node {
	if n != nil && n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

// keyNode is the node of a key that a mapping itself has; nil for none.
func keyNode(n *yaml.Node, key string) *yaml.Node {
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return n.Content[i]
		}
	}
	return nil
}

func scalar(n *yaml.Node) string {
	if n == nil || n.Kind != yaml.ScalarNode {
		return ""
	}
	return n.Value
}

// name is the key by which services are merged.
func name(service *yaml.Node) string { return strings.ToLower(scalar(value(service, "name"))) }

// each visits the items of a list that stand there themselves: what an alias repeats is seen where it is written.
func each(n *yaml.Node, visit func(int, *yaml.Node)) {
	if n == nil || n.Kind != yaml.SequenceNode {
		return
	}
	for i, item := range n.Content {
		if item.Kind == yaml.MappingNode {
			visit(i, item)
		}
	}
}

func pairs(n *yaml.Node, visit func(key, value *yaml.Node)) {
	if n == nil || n.Kind != yaml.MappingNode {
		return
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if v := resolve(n.Content[i+1]); v != nil {
			visit(n.Content[i], v)
		}
	}
}

func join(path []any, more ...any) []any { return slices.Concat(path, more) }

func pathText(path []any) string {
	var b strings.Builder
	for i, p := range path {
		switch p := p.(type) {
		case int:
			fmt.Fprintf(&b, "[%d]", p)
		default:
			if i > 0 {
				b.WriteByte('.')
			}
			fmt.Fprint(&b, p)
		}
	}
	return b.String()
}
