// Package serverlessrunner invokes functions at AWS Lambda, Google Cloud Functions and
// Azure Functions. It is the only importer of the providers' SDKs.
package serverlessrunner

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/lambda"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/telemetry"
)

// usageSource is the source of all figures but the duration.
const usageSource = "provider"

// defaultTimeout holds an attempt for which nobody gave a timeout; the longest that a Lambda function may take.
const defaultTimeout = 900 * time.Second

// Options configure [New]. The zero value works.
type Options struct {
	// Ceiling is the operator's policy; what runs is allowed by it and by the service's. Nil: no ceiling.
	Ceiling *Policy
	// Prices is the price table; nil is [DefaultPrices].
	Prices *PriceTable
	// PriceTable is a file to load in place of Prices.
	PriceTable string
	// Logger takes the runner's own remarks; nil drops them.
	Logger *slog.Logger
	// RootCAs are trusted for endpoints; nil is the system's.
	RootCAs *x509.CertPool
	// Resolver looks hosts up; nil is the system's.
	Resolver *net.Resolver
	// Isolation is what holds the process itself, in addition to the checks of each call.
	Isolation []runner.Feature
	// RequireIsolation names features without which New fails; all for every one.
	RequireIsolation []string
}

// Runner implements [runner.JobRunner] for the execution type serverless.
type Runner struct {
	ceiling *Policy
	prices  *PriceTable
	logger  *slog.Logger
	clients map[reach]*http.Client
	budget  budget
	aws     awsClients
	google  googleTokens
	entra   entraTokens
	types   []runner.Type
	// functions holds what the providers told of them.
	functions functions
	features  []runner.Feature
	isolation []string
}

var (
	_ runner.JobRunner = (*Runner)(nil)
	_ runner.Limiter   = (*Runner)(nil)
)

// New makes a runner. It reaches no provider before the first job.
func New(o Options) (*Runner, error) {
	r := &Runner{ceiling: o.Ceiling, prices: o.Prices, logger: o.Logger, clients: make(map[reach]*http.Client)}
	if r.logger == nil {
		r.logger = slog.New(slog.DiscardHandler)
	}
	var err error
	switch {
	case o.PriceTable != "":
		r.prices, err = LoadPrices(o.PriceTable)
	case r.prices == nil:
		r.prices, err = DefaultPrices()
	}
	if err != nil {
		return nil, err
	}
	for _, reach := range []reach{reachPublic, reachEndpoint, reachLoopback} {
		r.clients[reach] = newClient(reach, o.RootCAs, o.Resolver)
	}
	r.types = []runner.Type{{
		Name:              "serverless",
		ConfigSchema:      runner.SchemaOf[Config](),
		PolicySchema:      runner.SchemaOf[Policy](),
		OperationSchema:   runner.SchemaOf[Operation](),
		DefaultMaxRetries: 3,
	}}
	r.features = append([]runner.Feature{
		{Name: "provider", Available: true, Detail: "functions run in the provider's own sandbox"},
		{Name: "address_check", Available: true},
		{Name: "tls_check", Available: true},
	}, o.Isolation...)
	for _, f := range r.features {
		if f.Available {
			r.isolation = append(r.isolation, f.Name)
		}
	}
	return r, runner.Require(r.features, o.RequireIsolation)
}

// Close closes the connections that are kept open.
func (r *Runner) Close() error {
	for _, c := range r.clients {
		c.CloseIdleConnections()
	}
	return nil
}

// Describe implements [runner.JobRunner].
func (r *Runner) Describe(context.Context) (*runner.Description, error) {
	return &runner.Description{
		Name:      "serverless-runner",
		Types:     r.types,
		Isolation: r.features,
	}, nil
}

// Validate implements [runner.JobRunner]. A fault that a schema found hides nothing but what
// follows from it.
func (r *Runner) Validate(_ context.Context, s *runner.Service) ([]runner.Problem, error) {
	if s == nil {
		return nil, fault.New(fault.Validation, "no service to check")
	}
	found := runner.CheckService[Config, Operation, Policy](s)
	c, p := runner.Lenient[Config](s.Config), runner.Lenient[Policy](s.Policy)
	more := c.with(Operation{}).faults("runner_config.")
	for _, o := range s.Operations {
		more = append(more, c.operationFaults(o.Name, runner.Lenient[Operation](o.Config))...)
	}
	more = append(more, p.faults("security_policy.")...)
	// What a schema has said of a place is not said of it, or of what is in it, once more.
	more = slices.DeleteFunc(more, func(x runner.Problem) bool {
		return slices.ContainsFunc(found, func(f runner.Problem) bool { return covers(f.Path, x.Path) })
	})
	found = append(found, more...)
	return append(found, r.policyFaults(c.with(Operation{}), p, found)...), nil
}

// covers says whether a place is a path, or holds it.
func covers(place, path string) bool {
	rest, below := strings.CutPrefix(path, place)
	return below && (rest == "" || rest[0] == '.' || rest[0] == '[')
}

// doubtful says whether a problem makes the value at one of the paths doubtful.
func doubtful(found []runner.Problem, paths ...string) bool {
	return slices.ContainsFunc(found, func(x runner.Problem) bool {
		return !x.Warning && slices.ContainsFunc(paths, func(path string) bool { return covers(x.Path, path) || covers(path, x.Path) })
	})
}

// policyFaults finds a service that its own policy forbids, and limits that nothing can hold.
// What is wrong already decides nothing.
func (r *Runner) policyFaults(c Config, p Policy, found []runner.Problem) []runner.Problem {
	const config, security = "runner_config.", "security_policy."
	f := faultList{}
	policy := effective{Service: p, Ceiling: r.ceiling}
	if doubtful(found, config+"provider") {
		return nil
	}
	to, err := c.target()
	if err == nil && !doubtful(found, config+"region", config+"endpoint", config+"memory_mb", config+"project", config+"app_name", config+"auth_config.scope",
		security+"allowed_providers", security+"allowed_regions", security+"allowed_endpoints", security+"resource_limits") {
		if _, err := entraScope(c, to); err != nil && asksEntra(c, to) {
			f.add(config+"auth_config.scope", strings.TrimPrefix(fault.From(err).Message, "auth_config.scope: "), "remove it to name the app itself")
		} else if err := policy.authorize(c, to, &runner.Checks{}); err != nil {
			f.warn("security_policy", "every call would be refused: "+fault.From(err).Message, "")
		}
	}
	for _, k := range c.AuthConfig.envVars() {
		if doubtful(found, config+"auth_config."+k.key, security+"allowed_env_vars") {
			continue
		}
		if err := policy.authorizeEnvVar(k.name, &runner.Checks{}); err != nil {
			f.warn("security_policy", "every call would be refused: "+fault.From(err).Message, "")
		}
	}
	if policy.capped() && !doubtful(found, config+"region", security+"cost_limits") {
		_, priced := r.prices.find(c.Provider, c.Region, c.Architecture)
		switch {
		case c.Provider != providerAWS:
			f.warn(security+"cost_limits.max_cost_per_hour", c.Provider+" does not report what an invocation is billed, so that every call would be refused", "write max_invocations_per_hour")
		case !priced:
			f.warn(security+"cost_limits.max_cost_per_hour", "the price table has no price for "+c.Region+", so that every call would be refused", "add the region to a table of your own (--price-table)")
		}
	}
	return f.list
}

// call is one attempt on its way.
type call struct {
	job    *runner.Job
	config Config
	target endpoint
	policy effective
	checks *runner.Checks
	sink   runner.Sink
	usage  *runnerv1.ResourceUsage
	// traceparent of the attempt, empty without a trace.
	traceparent string
	// invoked: the function was called, or may have been.
	invoked bool
	// deployed is what the provider tells of the function.
	deployed deployed
	aws      *lambda.Client
	// costUSD of the attempt, budgetNoPrice where it is not known; zero where nothing ran.
	costUSD float64
}

// Execute implements [runner.JobRunner].
func (r *Runner) Execute(ctx context.Context, job *runner.Job, sink runner.Sink) (*runner.Result, error) {
	start := time.Now()
	c := &call{
		job: job, sink: sink, checks: &runner.Checks{},
		usage:   &runnerv1.ResourceUsage{Source: usageSource},
		costUSD: budgetNoPrice,
		policy:  effective{Service: runner.Lenient[Policy](job.Service.Policy), Ceiling: r.ceiling},
	}
	output, err := r.execute(ctx, c)
	c.usage.DurationSeconds = new(time.Since(start).Seconds())
	result := &runner.Result{
		Output: output, Usage: c.usage,
		Security: c.checks.Context(c.policy.digest(), r.isolation...),
	}
	if err != nil {
		result.Output, result.Err = nil, err
	}
	if c.invoked && c.costUSD == 0 && result.Usage.CostUsd == nil {
		c.invoked = false // the provider took nothing
	}
	result.Unused, result.LimitsChanged = !c.invoked, errors.Is(err, errLimitsChanged)
	return result, nil
}

func (r *Runner) execute(ctx context.Context, c *call) (json.RawMessage, error) {
	telemetry.Enter(ctx, "policy")
	if err := r.prepare(c); err != nil {
		return nil, err
	}
	to, err := c.config.target()
	if err != nil {
		return nil, fault.Wrap(err, fault.Validation, "%v", err)
	}
	c.target = to
	_, check := telemetry.Start(ctx, "policy check")
	err = c.policy.authorize(c.config, c.target, c.checks)
	check.End()
	if err != nil {
		return nil, err
	}
	if err := c.checkInput(); err != nil {
		return nil, err
	}
	ctx, cancel := c.withTimeout(ctx)
	defer cancel()
	if err := r.checkDeployed(ctx, c); err != nil {
		return nil, r.noteAddress(c, err)
	}
	done, err := r.reserve(c)
	if err != nil {
		return nil, err
	}
	defer func() { done(c.invoked, c.costUSD) }()

	// The function goes on with this span's trace.
	telemetry.Enter(ctx, "remote")
	ctx, remote := telemetry.Start(ctx, "remote", trace.WithSpanKind(trace.SpanKindClient))
	defer remote.End()
	carrier := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, carrier)
	c.traceparent = carrier.Get("traceparent")

	var output json.RawMessage
	switch c.config.Provider {
	case providerAWS:
		output, err = r.invokeLambda(ctx, c)
	case providerGCP:
		output, err = r.callGoogle(ctx, c)
	default:
		output, err = r.callAzure(ctx, c)
	}
	if err == nil {
		return output, nil
	}
	if ctx.Err() != nil {
		if c.invoked {
			c.sink.Log("runner", "the function may still be running: "+c.config.Provider+" ends it at its own timeout")
		}
		return nil, fault.From(context.Cause(ctx))
	}
	return nil, r.noteAddress(c, err)
}

// prepare reads and checks the job's configuration, once more where Validate did: a job is input like any other.
func (r *Runner) prepare(c *call) error {
	config, err := runner.Decode[Config](c.job.Service.Config)
	if err != nil {
		return fmt.Errorf("runner_config: %w", err)
	}
	operation, err := runner.Decode[Operation](c.job.Operation.Config)
	if err != nil {
		return fmt.Errorf("operation %s: %w", c.job.Operation.Name, err)
	}
	policy, err := runner.Decode[Policy](c.job.Service.Policy)
	if err != nil {
		return fmt.Errorf("security_policy: %w", err)
	}
	c.config = config.with(operation)
	c.policy = effective{Service: policy, Ceiling: r.ceiling}
	if !knownProvider(c.config.Provider) {
		return fault.New(fault.Validation, "runner_config.provider: %q is no provider; write one of %s", clip(c.config.Provider, 40), strings.Join(providers(), ", "))
	}
	var texts []string
	for _, f := range c.config.faults("runner_config.") {
		if !f.Warning {
			texts = append(texts, fmt.Sprintf("%s: %s; %s", f.Path, f.Message, f.Mend))
		}
	}
	if len(texts) > 0 {
		return fault.New(fault.Validation, "%s", strings.Join(texts, "\n"))
	}
	return nil
}

// Largest payloads in bytes. Google and Azure take more; what the mesh carries is the bound there.
const (
	maxSyncPayload  = 6 << 20
	maxEventPayload = 1 << 20
)

func (c *call) checkInput() error {
	if len(c.job.Input) == 0 {
		c.job.Input = json.RawMessage(`{}`)
	}
	if !json.Valid(c.job.Input) {
		return fault.New(fault.Validation, "the input is not JSON")
	}
	limit, what := maxSyncPayload, "a function's input"
	if c.config.InvocationType == invokeEvent {
		limit, what = maxEventPayload, "an event"
	}
	if n := len(c.job.Input); n > limit {
		return fault.New(fault.Validation, "the input is %d bytes and %s may have %d; store large data and send its place", n, what, limit)
	}
	c.usage.RequestBytes = new(float64(len(c.job.Input)))
	return nil
}

// withTimeout holds the attempt to the policy's limit and, where the job says nothing, to the service's timeout.
// The job's own timeout is in ctx already.
func (c *call) withTimeout(ctx context.Context) (context.Context, context.CancelFunc) {
	limit, why := time.Duration(0), ""
	if c.job.Timeout <= 0 {
		limit, why = seconds(c.config.Timeout), "runner_config.timeout"
		if limit == 0 {
			limit, why = defaultTimeout, "the longest time a function may take"
		}
	}
	if p := c.policy.timeout(); p > 0 && (limit == 0 || p < limit) {
		limit, why = p, "resource_limits.timeout_seconds"
	}
	if limit == 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeoutCause(ctx, limit, fault.New(fault.Timeout, "the attempt took longer than %s of %s", why, limit))
}

// noteAddress turns an address that was refused into a policy violation.
func (r *Runner) noteAddress(c *call, err error) error {
	var refused *addressError
	if !errors.As(err, &refused) {
		return err
	}
	why := "it is " + refused.why
	var changes []*runnerv1.PolicyChange
	switch {
	case refused.private && c.config.Endpoint == "":
		why += "; where that is meant, write runner_config.endpoint"
	case refused.private:
		host, _ := c.target.hostPort()
		why += "; " + mendCeiling(host)
		changes = append(changes, runner.AddTo(true, "allowed_endpoints", host))
	}
	return c.checks.Deny("allowed_endpoints", refused.addr.String(), why, changes...)
}

// secret reads a variable of the runner that the policies allow.
func (c *call) secret(name string) (string, error) {
	if err := c.policy.authorizeEnvVar(name, c.checks); err != nil {
		return "", err
	}
	return runner.ResolveSecret(c.sink, name)
}

// client is the HTTP client for what the call may reach.
func (r *Runner) client(c *call) *http.Client {
	switch {
	case c.config.Endpoint == "" || c.policy.publicOnly():
		return r.clients[reachPublic]
	case c.target.loopback:
		return r.clients[reachLoopback]
	default:
		return r.clients[reachEndpoint]
	}
}
