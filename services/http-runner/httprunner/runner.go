// Package httprunner carries out calls of the execution type http.
//
// What may be called is decided where it counts: hosts and ports for the first request and each
// redirect, addresses when a connection is opened. Secrets are read from the environment for
// each call and never leave the package but in the request itself.
package httprunner

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
	"github.com/specql/mesh/pkg/telemetry"
)

// ExecutionType is the execution type that a [Runner] serves.
const ExecutionType = "http"

// defaultMaxRetries is how often a call is repeated where the registry does not say.
const defaultMaxRetries = 3

const (
	maxPlans = 1024
	// maxCachedPlan is the largest configuration, in bytes, whose plan is kept.
	maxCachedPlan = 64 << 10
	maxStates     = 4096
)

// The phases of a call that are told apart where its caller asks where its time goes.
const (
	phasePolicy    = "policy"
	phaseRunner    = "runner"
	phaseConnect   = "connect"
	phaseDNS       = "dns"
	phaseTLS       = "tls"
	phaseSend      = "send"
	phaseFirstByte = "first_byte"
	phaseBody      = "body"
)

// Options are the settings of a [Runner]; the zero value is ready for use.
type Options struct {
	// Ceiling is the operator's own policy; calls must be allowed by it as well. May be nil.
	Ceiling *Policy
	// Logger for the runner's own remarks; none by default.
	Logger *slog.Logger
	// Resolver for host names; the system's by default.
	Resolver *net.Resolver
	// RootCAs that targets' certificates are checked against; the system's by default.
	RootCAs *x509.CertPool
	// Isolation is what holds the process itself, in addition to the checks of each call.
	Isolation []runner.Feature
	// RequireIsolation names features without which New fails; all for every one.
	RequireIsolation []string
}

// Runner carries out HTTP calls. It implements [runner.JobRunner]; use [New] to make one.
type Runner struct {
	options     Options
	description *runner.Description
	// isolation names the features in force.
	isolation []string
	now       func() time.Time
	// public and private are the pools for policies without and with allow_private_networks.
	public, private *connections
	// own are those of services that name the CAs that they trust.
	own pools

	plans   *cache[planKey, *plan]
	windows *cache[windowKey, *window]
	// ceilings are the windows of the operator's limit; no number of services pushes them out.
	ceilings *cache[windowKey, *window]
	breakers *cache[breakerKey, breaker]
	tokens   *cache[tokenKey, *tokenSource]
}

var (
	_ runner.JobRunner = (*Runner)(nil)
	_ runner.Limiter   = (*Runner)(nil)
)

// New makes a runner. The error says what is wrong with the ceiling, or which isolation is missing.
func New(o Options) (*Runner, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Ceiling != nil {
		var wrong problems
		wrong.checkPolicy("policy", o.Ceiling)
		if len(wrong.list) > 0 {
			w := wrong.list[0]
			return nil, fault.New(fault.Validation, "%s: %s; %s", w.Path, w.Message, w.Mend)
		}
	}
	r := &Runner{
		options: o,
		now:     time.Now,
		public:  newConnections(false, o.RootCAs, &o),
		private: newConnections(true, o.RootCAs, &o),
		plans:   newCache[planKey, *plan](maxPlans),

		windows:  newCache[windowKey, *window](maxStates),
		ceilings: newCache[windowKey, *window](maxStates),
		breakers: newCache[breakerKey, breaker](maxStates),
		tokens:   newCache[tokenKey, *tokenSource](maxStates),
	}
	r.description = &runner.Description{
		Name: "http-runner",
		Types: []runner.Type{{
			Name:              ExecutionType,
			ConfigSchema:      runner.SchemaOf[Config](),
			PolicySchema:      runner.SchemaOf[Policy](),
			OperationSchema:   runner.SchemaOf[Operation](),
			DefaultMaxRetries: defaultMaxRetries,
		}},
		Isolation: append([]runner.Feature{
			{Name: "domain_check", Available: true},
			{Name: "address_check", Available: true},
			{Name: "tls_check", Available: true},
		}, o.Isolation...),
	}
	for _, f := range r.description.Isolation {
		if f.Available {
			r.isolation = append(r.isolation, f.Name)
		}
	}
	return r, runner.Require(r.description.Isolation, o.RequireIsolation)
}

// Close closes the idle connections. Calls that still run are not disturbed.
func (r *Runner) Close() error {
	r.public.closeIdle()
	r.private.closeIdle()
	r.own.closeIdle()
	return nil
}

// Describe tells what the runner serves.
func (r *Runner) Describe(context.Context) (*runner.Description, error) {
	return r.description, nil
}

// Validate checks a service and its operations without calling anything. That a policy would
// refuse the service's own URL is a warning: it may be what is wanted.
func (r *Runner) Validate(_ context.Context, s *runner.Service) ([]runner.Problem, error) {
	if s == nil {
		return nil, fault.New(fault.Validation, "no service to check")
	}
	return r.checkService(s), nil
}

// Execute makes one call.
func (r *Runner) Execute(ctx context.Context, job *runner.Job, sink runner.Sink) (*runner.Result, error) {
	if job == nil || sink == nil {
		return nil, fmt.Errorf("execute: no job or no sink")
	}
	start := time.Now()
	telemetry.Enter(ctx, phasePolicy)
	all := &struct { // in one piece, since each call has them
		call   call
		checks runner.Checks
		meter  meter
	}{}
	c := &all.call
	*c = call{runner: r, job: job, sink: sink, checks: &all.checks, meter: &all.meter, responseBytes: -1}
	result := &runner.Result{}
	digest := ""
	if p, err := r.planFor(&job.Service, &job.Operation); err != nil {
		result.Err = err
		policy := runner.Lenient[Policy](job.Service.Policy)
		digest = digestOf(normalPolicy(&policy), normalPolicy(r.options.Ceiling))
	} else {
		c.plan, digest = p, p.policy.digest
		if done, err := r.admit(ctx, job, p, c.checks); err != nil {
			result.Err = err
			// An open breaker of one replica keeps all of them from the target for as long.
			c.closes = err.Code == fault.Unavailable
		} else {
			output, err := c.run(ctx)
			done(c.outcome)
			if err != nil {
				result.Err = err
			} else {
				result.Output = output
			}
		}
	}
	result.Unused, result.Closes = !c.sent, c.closes
	result.Usage = c.usage()
	result.Usage.DurationSeconds = new(time.Since(start).Seconds())
	result.Security = c.checks.Context(digest, r.isolation...)
	return result, nil
}

func (r *Runner) transport(allowPrivate bool) *connections {
	if allowPrivate {
		return r.private
	}
	return r.public
}
