// Package runner is the kit that runner services are made with. A runner is a Go type that
// implements [JobRunner]; [Serve] puts it behind a gRPC server with mutual TLS, health,
// reflection, metrics, limits, cancellation, leases and log bounds.
package runner

import (
	"context"
	"encoding/json"
	"time"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
)

// JobRunner carries out the calls of one or more execution types.
//
// Implementations are called from many goroutines at once.
type JobRunner interface {
	// Describe tells what the runner serves. It is called often and must be quick.
	Describe(ctx context.Context) (*Description, error)
	// Validate checks a service and its operations without running anything. What is wrong
	// with the service is a Problem; an error means that the runner could not check.
	Validate(ctx context.Context, s *Service) ([]Problem, error)
	// Execute carries out one attempt. Work that ran and failed, or that a policy forbids, is
	// a Result with Err set; an error means that the runner itself could not work.
	//
	// When ctx ends, Execute ends everything that it started, down to the last process or
	// container, and only then returns, with what was measured; [context.Cause] tells
	// Timeout from Cancelled, where Err of a context made of ctx may say Canceled for both, and the kit fills in Err where it is nil then.
	Execute(ctx context.Context, job *Job, sink Sink) (*Result, error)
}

// Limiter is a [JobRunner] with limits that hold over all of its replicas: the orchestrators count for it.
type Limiter interface {
	// Limits of the one operation that the service comes with; none where nothing is to be counted. It is asked
	// now and then, and again where a Result says that the limits changed. An error means that the runner could not tell.
	Limits(ctx context.Context, s *Service) ([]Limit, error)
}

// Drainer is a [JobRunner] that keeps something for jobs to come.
type Drainer interface {
	// Draining is called once no further job comes, while the running ones go on. It must be quick.
	Draining()
}

// Limit bounds the attempts with one key in any window. An attempt counts from before it begins until the window
// after its end has passed.
type Limit struct {
	// Key names what is counted together, such as service/stripe_api; at most 500 bytes.
	Key    string
	Window time.Duration
	// MaxAttempts in any window; 0 is no bound.
	MaxAttempts int64
	// MaxCost in any window, in US dollars; 0 is no bound. Cost is the most that one attempt can cost, which counts
	// until CostUsd of its usage is known.
	MaxCost, Cost float64
	// Budget makes attempts for which there is no room fail with BUDGET_EXCEEDED; others wait.
	Budget bool
	// Rule names the limit in messages, such as security_policy.rate_limit_per_minute of stripe_api.
	Rule string
	// AttemptsKey and CostKey are the keys of the policy that MaxAttempts and MaxCost are from; Ceiling says that it is
	// the operator's.
	AttemptsKey, CostKey string
	Ceiling              bool
}

// Description is what a runner says of itself.
type Description struct {
	// Name of the service, such as shell-runner.
	Name string
	// Types served.
	Types []Type
	// Isolation features and whether they work here.
	Isolation []Feature
}

// Type is one execution type. The schemas are JSON Schemas, best made by [SchemaOf].
type Type struct {
	// Name as in execution_type.
	Name            string
	ConfigSchema    json.RawMessage
	PolicySchema    json.RawMessage
	OperationSchema json.RawMessage
	// DefaultMaxRetries is how often a call is repeated where the registry does not say.
	DefaultMaxRetries int
}

// Feature is one way of holding a job.
type Feature struct {
	Name      string
	Available bool
	// Detail says why it is not available, and the mend.
	Detail string
}

// Service is a service of the registry with its operations.
type Service struct {
	Name          string
	ExecutionType string
	// Config is the runner_config object; never empty, {} for none.
	Config json.RawMessage
	// Policy is the security_policy object; never empty, {} for none.
	Policy     json.RawMessage
	Operations []Operation
}

// Operation is an operation of a service.
type Operation struct {
	Name string
	// Config holds the keys that say how the call is made; never empty, {} for none.
	Config json.RawMessage
}

// Problem is one thing wrong in a service.
type Problem struct {
	// Path in the service, such as runner_config.base_url or operations.charge.path.
	Path    string
	Message string
	// Mend is what to write instead.
	Mend    string
	Warning bool
}

// Job is one attempt of one call.
type Job struct {
	ID       string
	RunID    string
	StepPath string
	// Attempt counts from 1.
	Attempt        int
	IdempotencyKey string
	Epoch          int64
	// Service has no Operations here.
	Service   Service
	Operation Operation
	// Input is a JSON object.
	Input json.RawMessage
	// Timeout of the attempt; the context carries it already.
	Timeout time.Duration
	// ReservedCost is what was reserved for the attempt at limits of costs, in US dollars; nil where nobody counts them
	// over all replicas.
	ReservedCost  *float64
	Subject       string
	TenantID      string
	CorrelationID string
}

// Result is the outcome of an attempt.
type Result struct {
	// Output is a JSON value. Ignored where Err is set.
	Output json.RawMessage
	// Err says why the job failed: a *fault.Error, or any error, which counts as Internal.
	Err error
	// Usage is what was measured; a figure that was not is left nil.
	Usage *runnerv1.ResourceUsage
	// Security is what was checked. The kit adds subject, tenant and runner.
	Security *runnerv1.SecurityContext
	// Unused says that nothing was called, so that the attempt gives back its slots of limits.
	Unused bool
	// Closes says that no replica is to call the service before RetryAfter of Err has passed.
	Closes bool
	// LimitsChanged says that nothing was called because the limits are not those that were reserved for. It counts as
	// no attempt.
	LimitsChanged bool
}

// Sink takes what a job says while it runs. Its methods may be called from many
// goroutines, never block for long and may be called until Execute returns.
type Sink interface {
	// Log takes one line without its end. stream is stdout, stderr or runner.
	Log(stream, line string)
	// Usage takes a measurement.
	Usage(u *runnerv1.ResourceUsage)
	// Secret makes a value unreadable in everything that leaves the runner for this job:
	// log lines, output and errors. Values under four bytes are not masked.
	Secret(value string)
}
