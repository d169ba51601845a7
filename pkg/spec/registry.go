package spec

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/specql/mesh/pkg/spec/expr"
)

// DefaultExecutionType is the one of services that name none.
const DefaultExecutionType = "http"

// Registry is a parsed service registry with the chosen overlay merged in.
type Registry struct {
	Services []*Service
	// Duplicates are services whose name is taken, which is a problem. They are here to be checked, not to be called.
	Duplicates []*Service
	Alerts     []*Alert
	// Envs names the overlays that the file holds, sorted.
	Envs []string
	// Env is the overlay that was merged; empty for none.
	Env string

	byName map[string]*Service
}

// Service is one entry of the registry.
type Service struct {
	// Name is as written; services are looked up without regard to case.
	Name, Type, Category string
	ExecutionType        string
	Description          string
	// RunnerConfig and SecurityPolicy belong to the runner of the execution type. They are never nil and must not be changed.
	RunnerConfig, SecurityPolicy map[string]any
	Operations                   []*Operation
	// Path is the service's place in the document, such as `services[0]`.
	Path string
	Position

	source *node
}

// Operation is one thing that a service can do.
type Operation struct {
	Name        string
	Description string
	// Input and Output are nil where anything goes.
	Input, Output *Schema
	// Timeout of one attempt: the operation's own, else runner_config.timeout, else 0.
	Timeout time.Duration
	// MaxRetries is the operation's own, else runner_config.retry_config.max_retries, else nil.
	MaxRetries *int
	// Config holds the remaining keys, whose meaning is the runner's. Never nil; must not be changed.
	Config map[string]any
	Position
}

// RetryPolicy says how attempts follow each other.
type RetryPolicy struct {
	// BackoffFactor by which the wait grows from attempt to attempt.
	BackoffFactor float64
}

// Alert is a condition that is watched.
type Alert struct {
	Name string
	// Condition over the metrics, which are the roots of its references.
	Condition *expr.Condition
	// ExecutionType that the metrics are of, or "any".
	ExecutionType string
	// Window of time that the metrics are taken over.
	Window time.Duration
	// Notify is the call that tells somebody; nil for none.
	Notify *Notification
	Position
}

// Notification is the call that an alert makes.
type Notification struct {
	Service, Operation string
	Input              *expr.Template
	Position
}

// Service finds a service without regard to case; nil if there is none.
func (r *Registry) Service(name string) *Service {
	if r == nil {
		return nil
	}
	return r.byName[strings.ToLower(name)]
}

// ServiceNames lists the services as written, in order.
func (r *Registry) ServiceNames() []string {
	names := make([]string, len(r.Services))
	for i, s := range r.Services {
		names[i] = s.Name
	}
	return names
}

// Operation finds an operation; nil if there is none.
func (s *Service) Operation(name string) *Operation {
	for _, op := range s.Operations {
		if op.Name == name {
			return op
		}
	}
	return nil
}

// OperationNames lists the operations, in order.
func (s *Service) OperationNames() []string {
	names := make([]string, len(s.Operations))
	for i, op := range s.Operations {
		names[i] = op.Name
	}
	return names
}

// Retry gives the retry policy from runner_config.retry_config, with its defaults.
func (s *Service) Retry() RetryPolicy {
	policy := RetryPolicy{BackoffFactor: 2}
	if f, ok := s.source.get("runner_config").get("retry_config").get("backoff_factor").number(); ok && f >= 1 && f <= 100 {
		policy.BackoffFactor = f
	}
	return policy
}

// PositionOf gives the place of a value of the service, such as `runner_config.base_url`, `security_policy.allowed_domains[0]` or
// `operations.charge.path`; operations go by name or by index. What is not in the document has the place of its nearest
// parent that is.
func (s *Service) PositionOf(path string) Position {
	return s.source.positionOf(s.Position, path)
}

// positionOf follows a path from n, which is at a place, as far as it leads.
func (n *node) positionOf(at Position, path string) Position {
	for path != "" && n != nil {
		var next *node
		var pos Position
		next, pos, path = n.step(path)
		if next == nil {
			break
		}
		at, n = pos, next
	}
	return at
}

// step takes one step of a path: an index, a key, the name of a list's item, or a key that itself holds dots.
func (n *node) step(path string) (next *node, pos Position, rest string) {
	path = strings.TrimPrefix(path, ".")
	if strings.HasPrefix(path, "[") {
		inner, after, ok := strings.Cut(path[1:], "]")
		if !ok {
			return nil, Position{}, ""
		}
		if i, err := strconv.Atoi(inner); err == nil {
			if n.kind == sequenceNode && i >= 0 && i < len(n.items) {
				return n.items[i], n.items[i].pos, after
			}
			return nil, Position{}, ""
		}
		path = strings.Trim(inner, `"'`)
		if e := n.entry(path); e != nil {
			return e.value, e.place(), after
		}
		return nil, Position{}, ""
	}
	for end := 0; end <= len(path); end++ {
		if end < len(path) && path[end] != '.' && path[end] != '[' {
			continue
		}
		key := path[:end]
		if e := n.entry(key); e != nil {
			return e.value, e.place(), path[end:]
		}
		if n.kind == sequenceNode {
			for i, item := range n.items {
				name, _ := item.get("name").scalarString()
				if key != "" && (name == key || key == strconv.Itoa(i)) {
					return item, item.pos, path[end:]
				}
			}
		}
	}
	return nil, Position{}, ""
}

func (n *node) scalarString() (string, bool) {
	if n == nil {
		return "", false
	}
	s, ok := n.value.(string)
	return s, ok
}

// place is where a problem with the value is shown: a scalar's own place, the key of anything larger.
func (e *entry) place() Position {
	if e.value.kind == scalarNode && e.value.pos.File == e.pos.File && e.value.value != nil {
		return e.value.pos
	}
	return e.pos
}

// ParseRegistry reads a service registry. A registry is also returned next to problems, with what could be read of it; it is nil if nothing could.
func ParseRegistry(f File, o Options) (*Registry, Problems) {
	c := &collector{strict: o.Strict}
	root := load(f, c)
	if root == nil {
		return nil, c.sorted()
	}
	p := &registryParser{reader: reader{c}, options: o}
	r := p.parse(root)
	return r, c.sorted()
}

type registryParser struct {
	reader
	options    Options
	duplicates []located
}

const maxMetricName = 64

var executionTypePattern = regexp.MustCompile(`^[a-z][a-z0-9_-]{0,62}$`)

var builtinTypes = []string{"http", "shell", "docker", "serverless"}

func (p *registryParser) parse(root *node) *Registry {
	if root.kind != mappingNode {
		p.errorf(root.pos, "", "begin it with `services:`", "a registry must be a map, is %s", root.describe())
		return nil
	}
	overlays := map[string]*node{}
	for _, e := range root.entries {
		switch {
		case e.key == "services" || e.key == "alerts" || strings.HasPrefix(e.key, "x-"):
		case isOverlay(e.value):
			overlays[e.key] = e.value
		default:
			mend := p.suggest(e.key, []string{"services", "alerts"})
			if e.value.kind == mappingNode && e.value.get("services") != nil {
				mend = "an overlay may hold `services` alone"
			}
			p.errorf(e.pos, e.key, mend, "unknown key %q", clip(e.key))
		}
	}
	r := &Registry{byName: map[string]*Service{}}
	for name := range overlays {
		r.Envs = append(r.Envs, name)
	}
	slices.Sort(r.Envs)
	if root.get("services") == nil && root.get("alerts") == nil && len(overlays) == 0 && len(p.problems) == 0 {
		p.errorf(root.pos, "", "begin it with `services:`", "the registry holds no services")
	}

	base := p.checkServices(root.get("services"), "services", false)
	places := placesOf(base)
	var chosen []located
	for _, name := range r.Envs {
		services := p.checkServices(overlays[name].get("services"), name+".services", true)
		if name == p.options.Env {
			chosen, r.Env = services, name
			continue
		}
		// The other overlays are checked too, so that a mistake shows before the day it is deployed. Their variables need not be set here.
		for _, s := range services {
			if at, there := places[s.key()]; there {
				s = located{node: mergeService(base[at].node, s.node), path: base[at].path}
			}
			p.service(s, pretend)
		}
	}
	if p.options.Env != "" && r.Env == "" && len(r.Envs) > 0 {
		p.errorf(root.pos, "", p.suggest(p.options.Env, r.Envs), "the registry has no environment %q", clip(p.options.Env))
	}
	for _, s := range mergeServices(base, chosen) {
		service := p.service(s, p.options.LookupEnv)
		if service != nil && r.byName[strings.ToLower(service.Name)] == nil {
			r.byName[strings.ToLower(service.Name)] = service
			r.Services = append(r.Services, service)
		}
	}
	for _, s := range p.duplicates {
		if service := p.service(s, pretend); service != nil {
			r.Duplicates = append(r.Duplicates, service)
		}
	}
	r.Alerts = p.alerts(root.get("alerts"))
	return r
}

// isOverlay says whether a top-level value is an environment: a map with services and nothing else.
func isOverlay(n *node) bool {
	return n.kind == mappingNode && len(n.entries) == 1 && n.entries[0].key == "services"
}

// located is a service's node with its path in the document.
type located struct {
	node    *node
	path    string
	partial bool // type, category and operations may be missing
}

// key is the name by which services are merged.
func (s located) key() string {
	name, _ := s.node.get("name").scalarString()
	return strings.ToLower(name)
}

func placesOf(services []located) map[string]int {
	places := make(map[string]int, len(services))
	for i, s := range services {
		places[s.key()] = i
	}
	return places
}

// pretend stands for an environment in which every variable is set, to a value that is a number and a boolean too.
func pretend(string) (string, bool) { return "1", true }

// checkServices checks a list of services on its own, the overlays that are not chosen included, and gives those that have a name.
func (p *registryParser) checkServices(n *node, path string, partial bool) []located {
	if !p.sequence(n, path) {
		return nil
	}
	first := map[string]Position{}
	var out []located
	for i, item := range n.items {
		here := indexPath(path, i)
		if item.isNull() || !p.mapping(item, here) {
			if item.isNull() {
				p.errorf(item.pos, here, "", "must be a map, is empty")
			}
			continue
		}
		if item.get("name") == nil {
			p.missing(item, here, "name", "add `name:`")
			continue
		}
		item = p.substituteName(item, here)
		name, ok := p.name(item.get("name"), keyPath(here, "name"))
		if !ok {
			continue
		}
		if before, twice := first[strings.ToLower(name)]; twice {
			p.errorf(item.get("name").pos, keyPath(here, "name"), "rename one of the two; case does not count", "the service %q is there twice, first in line %d", clip(name), before.Line)
			// Its other mistakes are told all the same.
			p.duplicates = append(p.duplicates, located{node: item, path: here, partial: partial})
			continue
		}
		first[strings.ToLower(name)] = item.pos
		out = append(out, located{node: item, path: here, partial: partial})
	}
	return out
}

// substituteName puts variables into the name, by which services are merged; the rest has to wait until they are.
func (p *registryParser) substituteName(n *node, path string) *node {
	out := *n
	out.entries = slices.Clone(n.entries)
	if e := out.entry("name"); e != nil && e.value.kind == scalarNode {
		e.value = substitute(e.value, p.options.LookupEnv, p.collector, keyPath(path, "name"))
	}
	return &out
}

// mergeServices merges the services of an overlay into those of the base, by name.
func mergeServices(base, overlay []located) []located {
	out := slices.Clone(base)
	places := placesOf(base)
	for _, over := range overlay {
		at, there := places[over.key()]
		if !there {
			out = append(out, over)
			continue
		}
		out[at].node = mergeService(out[at].node, over.node)
	}
	return out
}

// mergeService is merge with the base's spelling of the name.
func mergeService(base, over *node) *node {
	merged := merge(base, over)
	if name := merged.entry("name"); name != nil && merged != over {
		*name = *base.entry("name")
	}
	return merged
}

// merge puts over on top of base: maps deeply, everything else whole.
func merge(base, over *node) *node {
	if base == nil || base.kind != mappingNode || over.kind != mappingNode {
		return over
	}
	merged := &node{kind: mappingNode, pos: base.pos, entries: slices.Clone(base.entries)}
	for _, e := range over.entries {
		if mine := merged.entry(e.key); mine != nil {
			mine.value, mine.pos = merge(mine.value, e.value), e.pos
		} else {
			merged.entries = append(merged.entries, e)
		}
	}
	return merged
}

func (p *registryParser) service(s located, lookup func(string) (string, bool)) *Service {
	n := substitute(s.node, lookup, p.collector, s.path)
	p.known(n, s.path, "name", "type", "category", "execution_type", "runner_config", "security_policy", "operations", "description")
	service := &Service{Position: n.pos, Path: s.path, ExecutionType: DefaultExecutionType, source: n}
	service.Name, _ = n.get("name").scalarString()
	if stub := isStub(n); stub {
		s.partial = true
	}
	for _, field := range []struct {
		key    string
		target *string
	}{{"type", &service.Type}, {"category", &service.Category}} {
		if n.get(field.key) == nil {
			p.absent(n, s, field.key)
			continue
		}
		*field.target, _ = p.text(n.get(field.key), keyPath(s.path, field.key))
	}
	if d := n.get("description"); d != nil {
		service.Description, _ = p.str(d, keyPath(s.path, "description"))
	}
	if t := n.get("execution_type"); t != nil {
		p.executionType(service, t, keyPath(s.path, "execution_type"))
	}
	service.RunnerConfig = p.opaque(n.get("runner_config"), keyPath(s.path, "runner_config"))
	service.SecurityPolicy = p.opaque(n.get("security_policy"), keyPath(s.path, "security_policy"))
	if n.get("operations") == nil {
		p.absent(n, s, "operations")
	}
	p.operations(service, n.get("operations"), keyPath(s.path, "operations"))
	return service
}

// isStub says whether a service has a name and an execution type alone, as when it is switched off for a while.
func isStub(n *node) bool {
	for _, e := range n.entries {
		if e.key != "name" && e.key != "execution_type" {
			return false
		}
	}
	return n.get("execution_type") != nil
}

func (p *registryParser) absent(n *node, s located, key string) {
	mend := fmt.Sprintf("add `%s:`", key)
	if s.partial {
		p.warnf(n.pos, s.path, mend, "the key %q is missing", key)
		return
	}
	p.missing(n, s.path, key, mend)
}

func (p *registryParser) executionType(service *Service, n *node, path string) {
	name, ok := p.text(n, path)
	if !ok {
		return
	}
	if !executionTypePattern.MatchString(name) {
		mend := p.suggest(name, builtinTypes)
		p.errorf(n.pos, path, mend, "%q is not an execution type", clip(name))
		return
	}
	service.ExecutionType = name
	if near := DidYouMean(name, builtinTypes); near != "" && !slices.Contains(builtinTypes, name) {
		p.warnf(n.pos, path, fmt.Sprintf("did you mean %q?", near), "%q is none of the built-in execution types", name)
	}
}

// opaque reads a map whose content is the runner's.
func (p *registryParser) opaque(n *node, path string) map[string]any {
	if !p.mapping(n, path) {
		return map[string]any{}
	}
	m, _ := n.native().(map[string]any)
	return m
}

var operationKeys = []string{"name", "input_schema", "output_schema", "timeout", "max_retries", "description"}

// callKeys are the keys by which the built-in runners make a call. They are not checked here, but one that is nearer to a key of
// operationKeys than to any of them is a typing error.
var callKeys = []string{"method", "path", "query", "headers", "body", "success_codes", "command", "script"}

func (p *registryParser) operations(service *Service, n *node, path string) {
	if !p.sequence(n, path) {
		return
	}
	first := map[string]int{}
	for i, item := range n.items {
		here := indexPath(path, i)
		if item.isNull() || item.kind != mappingNode {
			p.errorf(item.pos, here, "write `- name: "+mendName(item)+"`", "must be a map, is %s", item.describe())
			continue
		}
		op := p.operation(service, item, here)
		if op == nil {
			continue
		}
		if line, twice := first[op.Name]; twice {
			p.errorf(item.get("name").pos, keyPath(here, "name"), "rename one of the two", "the operation %q is there twice, first in line %d", clip(op.Name), line)
			continue
		}
		first[op.Name] = item.pos.Line
		service.Operations = append(service.Operations, op)
	}
}

func mendName(n *node) string {
	if s, ok := n.scalarString(); ok && checkName(s) == "" && s != "" {
		return s
	}
	return "…"
}

func (p *registryParser) operation(service *Service, n *node, path string) *Operation {
	op := &Operation{Position: n.pos, Config: map[string]any{}}
	config := service.source.get("runner_config")
	if f, ok := config.get("timeout").number(); ok && f > 0 && f <= maxSeconds {
		op.Timeout = time.Duration(f * float64(time.Second))
	}
	if f, ok := config.get("retry_config").get("max_retries").number(); ok && f >= 0 && f <= maxRetries {
		retries := int(f)
		op.MaxRetries = &retries
	}
	for _, e := range n.entries {
		here := keyPath(path, e.key)
		switch e.key {
		case "name":
		case "description":
			op.Description, _ = p.str(e.value, here)
		case "input_schema":
			op.Input = p.schema(e.value, here)
		case "output_schema":
			op.Output = p.schema(e.value, here)
		case "timeout":
			if d, ok := p.seconds(e.value, here); ok {
				op.Timeout = d
			}
		case "max_retries":
			if retries, ok := p.integer(e.value, here, 0, maxRetries); ok {
				op.MaxRetries = &retries
			}
		default:
			if near := DidYouMean(e.key, append(slices.Clone(operationKeys), callKeys...)); slices.Contains(operationKeys, near) && !slices.Contains(callKeys, e.key) {
				p.errorf(e.pos, here, fmt.Sprintf("did you mean %q?", near), "unknown key %q", clip(e.key))
				continue
			}
			op.Config[e.key] = e.value.native()
		}
	}
	if n.get("name") == nil {
		p.missing(n, path, "name", "add `name:`")
		return nil
	}
	name, ok := p.name(n.get("name"), keyPath(path, "name"))
	if !ok {
		return nil
	}
	op.Name = name
	return op
}

// maxRetries bounds what a document may ask for.
const maxRetries = 100

var metricSuffixes = []string{"_error_rate", "_failures", "_p50_seconds", "_p95_seconds", "_p99_seconds"}

var plainMetrics = []string{"resource_violations", "security_violations", "cost_per_hour"}

func (p *registryParser) alerts(n *node) []*Alert {
	if !p.sequence(n, "alerts") {
		return nil
	}
	var out []*Alert
	first := map[string]int{}
	for i, item := range n.items {
		here := indexPath("alerts", i)
		if item.isNull() || !p.mapping(item, here) {
			if item.isNull() {
				p.errorf(item.pos, here, "", "must be a map, is empty")
			}
			continue
		}
		a := p.alert(substitute(item, p.options.LookupEnv, p.collector, here), here)
		if line, twice := first[a.Name]; twice && a.Name != "" {
			p.errorf(item.get("name").pos, keyPath(here, "name"), "rename one of the two", "the alert %q is there twice, first in line %d", clip(a.Name), line)
			continue
		}
		first[a.Name] = item.pos.Line
		out = append(out, a)
	}
	return out
}

func (p *registryParser) alert(n *node, path string) *Alert {
	a := &Alert{ExecutionType: "any", Window: time.Hour, Position: n.pos}
	p.known(n, path, "name", "condition", "execution_type", "window", "notify", "description")
	for _, key := range []string{"name", "condition"} {
		if n.get(key) == nil {
			p.missing(n, path, key, "add `"+key+":`")
		}
	}
	for _, e := range n.entries {
		here := keyPath(path, e.key)
		switch e.key {
		case "name":
			a.Name, _ = p.text(e.value, here)
		case "condition":
			a.Condition = p.metricCondition(e.value, here)
		case "execution_type":
			if t, ok := p.text(e.value, here); ok {
				if !executionTypePattern.MatchString(t) {
					p.errorf(e.value.pos, here, p.suggest(t, append([]string{"any"}, builtinTypes...)), "%q is not an execution type", clip(t))
					continue
				}
				a.ExecutionType = t
			}
		case "window":
			if d, ok := p.duration(e.value, here); ok {
				a.Window = d
			}
		case "notify":
			a.Notify = p.notification(e.value, here)
		}
	}
	return a
}

// duration reads `1h`, `90s` or a number of seconds.
func (p *registryParser) duration(n *node, path string) (time.Duration, bool) {
	if f, ok := n.number(); ok && f > 0 && f <= maxSeconds {
		return time.Duration(f * float64(time.Second)), true
	}
	if s, ok := n.scalarString(); ok {
		if d, err := time.ParseDuration(s); err == nil && d > 0 && d <= maxSeconds*time.Second {
			return d, true
		}
	}
	p.errorf(n.pos, path, "write a time such as `1h`, `15m` or `30s`", "is not a time")
	return 0, false
}

func (p *registryParser) metricCondition(n *node, path string) *expr.Condition {
	if _, ok := p.text(n, path); !ok {
		return nil
	}
	condition := p.condition(n, path)
	if condition == nil {
		return nil
	}
	for _, ref := range condition.Refs() {
		known := slices.Contains(plainMetrics, ref.Root) || slices.ContainsFunc(metricSuffixes, func(suffix string) bool {
			return strings.HasSuffix(ref.Root, suffix) && len(ref.Root) > len(suffix) && len(ref.Root) <= maxMetricName
		})
		if !known {
			p.errorf(n.pos, path, p.suggest(ref.Root, metricNames()), "unknown metric %q", clip(ref.Root))
		} else if ref.Path != "" {
			p.errorf(n.pos, path, "write "+ref.Root, "the metric %s is a number and has no fields", ref.Root)
		}
	}
	return condition
}

func metricNames() []string {
	names := slices.Clone(plainMetrics)
	for _, t := range builtinTypes {
		for _, suffix := range metricSuffixes {
			names = append(names, t+suffix)
		}
	}
	return names
}

func (p *registryParser) notification(n *node, path string) *Notification {
	if n.isNull() || !p.mapping(n, path) {
		return nil
	}
	p.known(n, path, "service", "operation", "input")
	out := &Notification{Position: n.pos}
	for _, field := range []struct {
		key    string
		target *string
	}{{"service", &out.Service}, {"operation", &out.Operation}} {
		if n.get(field.key) == nil {
			p.missing(n, path, field.key, "add `"+field.key+":`")
			continue
		}
		*field.target, _ = p.name(n.get(field.key), keyPath(path, field.key))
	}
	if input := n.get("input"); input != nil {
		out.Input = p.template(input, keyPath(path, "input"))
	}
	return out
}
