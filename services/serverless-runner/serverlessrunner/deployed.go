package serverlessrunner

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/lambda"
	"github.com/aws/smithy-go"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

// deployed is what a provider tells of a function. What it does not tell is zero.
type deployed struct {
	memoryMB     int64
	timeout      time.Duration
	architecture string
	region       string
}

const (
	// deployedFor is how long an answer is taken for true. The report of each invocation is read as well.
	deployedFor = time.Minute
	// askFor bounds the question.
	askFor = 5 * time.Second
	// longestLambda is the longest that any Lambda function may run, and largestLambda the most memory in MB that it may have.
	longestLambda = 900 * time.Second
	largestLambda = 10240
	// initPhase is what a cold start may be billed in addition to the function's timeout.
	initPhase = 10 * time.Second
	// eventAttempts is how often Lambda runs a function for one event, its own retries included.
	eventAttempts = 3
)

// functions keeps what was told.
type functions struct {
	mu    sync.Mutex
	known map[functionKey]toldFunction
}

type functionKey struct{ endpoint, region, name, qualifier, role string }

type toldFunction struct {
	deployed
	at time.Time
}

// deployedAs asks Lambda what the function is, where a policy limits that. A runner that may not ask,
// or an endpoint that does not know the question, leaves it open.
func (r *Runner) deployedAs(ctx context.Context, c *call) (deployed, error) {
	if c.config.Provider != providerAWS || !c.policy.asksProvider() {
		return deployed{}, nil
	}
	key := functionKey{c.target.url.String(), c.config.Region, c.config.FunctionName, c.config.Qualifier, c.config.AuthConfig.RoleARN}
	r.functions.mu.Lock()
	told, ok := r.functions.known[key]
	r.functions.mu.Unlock()
	if ok && time.Since(told.at) < deployedFor {
		return told.deployed, nil
	}
	client, err := r.lambda(ctx, c)
	if err != nil {
		return deployed{}, err
	}
	in := &lambda.GetFunctionConfigurationInput{FunctionName: aws.String(c.config.FunctionName)}
	if c.config.Qualifier != "" {
		in.Qualifier = aws.String(c.config.Qualifier)
	}
	asking, cancel := context.WithTimeout(ctx, askFor)
	defer cancel()
	out, err := client.GetFunctionConfiguration(asking, in)
	if err != nil {
		if ctx.Err() != nil {
			return deployed{}, fault.From(context.Cause(ctx))
		}
		if isRefused(err) {
			return deployed{}, err
		}
		why := "it cannot be asked"
		if api, ok := errors.AsType[smithy.APIError](err); ok {
			why = clip(api.ErrorCode(), 100)
		}
		c.sink.Log("runner", fmt.Sprintf("Lambda does not tell the function's configuration (%s): its limits are checked on the report of the invocation; give the runner lambda:GetFunctionConfiguration on it", why))
	} else {
		told.deployed = deployed{
			memoryMB: int64(aws.ToInt32(out.MemorySize)), timeout: time.Duration(aws.ToInt32(out.Timeout)) * time.Second,
		}
		if len(out.Architectures) == 1 {
			told.architecture = string(out.Architectures[0])
		}
		if region, ok := arnRegion(aws.ToString(out.FunctionArn)); ok {
			told.region = clip(region, 64)
		}
	}
	told.at = time.Now()
	r.functions.mu.Lock()
	defer r.functions.mu.Unlock()
	if r.functions.known == nil || len(r.functions.known) >= maxCached {
		r.functions.known = make(map[functionKey]toldFunction)
	}
	r.functions.known[key] = told
	return told.deployed, nil
}

// checkDeployed holds the function against the policies before it is called.
func (r *Runner) checkDeployed(ctx context.Context, c *call) error {
	d, err := r.deployedAs(ctx, c)
	if err != nil {
		return err
	}
	c.deployed = d
	if d.architecture != "" {
		c.config.Architecture = d.architecture
	}
	if want := c.config.MemoryMB; want != 0 && d.memoryMB != 0 && want != d.memoryMB {
		c.sink.Log("runner", fmt.Sprintf("the function has %d MB, runner_config.memory_mb says %d", d.memoryMB, want))
	}
	return c.policy.authorizeDeployed(d, c.checks)
}

// errLimitsChanged: the call may cost more than was reserved for it at limits that span replicas.
var errLimitsChanged = errors.New("the function is larger than what its cost was reserved for")

// mostCost is the most that the call can cost, 0 where no policy bounds that. What is written in the
// registry does not make it less: only the provider is asked.
func (r *Runner) mostCost(c *call) (float64, error) {
	if !c.policy.capped() {
		return 0, nil
	}
	p, priced := r.prices.find(c.config.Provider, c.config.Region, c.config.Architecture)
	switch {
	case c.config.Provider != providerAWS:
		return 0, c.checks.Deny("cost_limits", c.job.Service.Name, c.config.Provider+" does not tell what an invocation is billed, so that max_cost_per_hour cannot be held; write max_invocations_per_hour in its place")
	case !priced:
		return 0, c.checks.Deny("cost_limits", c.job.Service.Name, "the price table has no price for "+c.config.Region+", so that max_cost_per_hour cannot be held; add the region to a table of your own (--price-table)")
	}
	memory, longest := c.deployed.memoryMB, c.deployed.timeout
	if memory == 0 {
		memory = largestLambda
	}
	if longest == 0 {
		longest = longestLambda
	}
	most := p.cost(float64((longest + initPhase).Milliseconds()), float64(memory))
	if c.config.InvocationType == invokeEvent {
		most *= eventAttempts
	}
	return most, nil
}

// Limits implements [runner.Limiter]: cost_limits of the service, and of the operator for all services together. A
// service that cannot be called has none.
func (r *Runner) Limits(ctx context.Context, s *runner.Service) ([]runner.Limit, error) {
	if s == nil || len(s.Operations) != 1 {
		return nil, fault.New(fault.Validation, "limits are asked of one operation")
	}
	c := &call{
		job: &runner.Job{Service: *s, Operation: s.Operations[0]}, sink: silent{}, checks: &runner.Checks{}, usage: &runnerv1.ResourceUsage{},
	}
	if err := r.prepare(c); err != nil {
		return nil, nil //nolint:nilerr // every call of it fails, and says why
	}
	var limits []runner.Limit
	add := func(key, rule string, ceiling bool, l CostLimits) {
		if l != (CostLimits{}) {
			limits = append(limits, runner.Limit{
				Key: key, Window: budgetWindow, MaxAttempts: l.MaxInvocationsPerHour, MaxCost: l.MaxCostPerHour, Budget: true, Rule: rule,
				AttemptsKey: "cost_limits.max_invocations_per_hour", CostKey: "cost_limits.max_cost_per_hour", Ceiling: ceiling,
			})
		}
	}
	add("service/"+s.Name, "cost_limits of "+s.Name+" in its security_policy", false, c.policy.Service.CostLimits)
	if c.policy.Ceiling != nil {
		add("all", "cost_limits of all services in the operator's policy (--policy of the runner)", true, c.policy.Ceiling.CostLimits)
	}
	if len(limits) == 0 || !c.policy.capped() {
		return limits, nil
	}
	to, err := c.config.target()
	if err != nil {
		return nil, nil //nolint:nilerr // as above
	}
	c.target = to
	if err := c.policy.authorize(c.config, c.target, c.checks); err == nil {
		// Where the function's size is not known, the most of any function is reserved.
		if err := r.checkDeployed(ctx, c); err != nil {
			r.logger.Debug("limits: the provider does not tell what the function is", "service", s.Name, "error", err)
		}
	}
	most, err := r.mostCost(c)
	if err != nil {
		return nil, nil //nolint:nilerr // as above
	}
	for i := range limits {
		limits[i].Cost = most
	}
	return limits, nil
}

// silent takes what is said of a call that is not made.
type silent struct{}

func (silent) Log(string, string) {}

func (silent) Usage(*runnerv1.ResourceUsage) {}

func (silent) Secret(string) {}

// reserve takes the most that the call can cost from what the policies allow, as this runner counts it. Where the
// orchestrators count as well, no less than that has to be reserved there.
func (r *Runner) reserve(c *call) (func(invoked bool, cost float64), error) {
	most, err := r.mostCost(c)
	if err != nil {
		return nil, err
	}
	if have := c.job.ReservedCost; have != nil && most > *have*(1+1e-9) {
		return nil, fault.Wrap(errLimitsChanged, fault.Unavailable, "%v: %.6f USD, and now it is %.6f", errLimitsChanged, *have, most)
	}
	done, err := r.budget.begin(c.job.Service.Name, c.policy, most)
	if err != nil {
		return nil, c.noteBudget(err, c.deployed.memoryMB == 0 && most > 0)
	}
	if most > 0 {
		c.checks.Allow("cost_limits", fmt.Sprintf("%.6f USD reserved", most))
	}
	return done, nil
}

// noteBudget records a budget that is used up among the checks. untold says that the provider did
// not tell what the function is.
func (c *call) noteBudget(err error, untold bool) error {
	f := fault.From(err)
	if untold && strings.Contains(f.Message, "max_cost_per_hour") {
		f.Message += "; the most of any function was counted, since Lambda did not tell this one's: give the runner lambda:GetFunctionConfiguration on it"
	}
	var changes []*runnerv1.PolicyChange
	if spent, ok := errors.AsType[*spentError](err); ok {
		changes = append(changes, runner.SetTo(spent.ceiling, spent.key, spent.enough))
	}
	_ = c.checks.Deny("cost_limits", c.job.Service.Name, f.Message, changes...)
	return f
}
