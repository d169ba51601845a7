package store

import (
	"context"
	"encoding/json"
	"time"
)

// Insight is what a database tells of past and present jobs. All but [Insight.Figures] read
// the views of the database's documentation. A figure that is not known is nil.
type Insight interface {
	// The first four sum up all jobs that f.ExecutionType, f.Tenants and, for Costs, f.Service
	// choose; of f they look at nothing else. Of some tenants alone the sums are made of the jobs
	// themselves, and take as long as there are jobs.

	// Performance is a row an execution type.
	Performance(ctx context.Context, f JobFilter) ([]*Performance, error)
	// RunnerUsage tells what jobs used, a row a runner and execution type.
	RunnerUsage(ctx context.Context, f JobFilter) ([]*RunnerUsage, error)
	// QueueHealth tells what waits and runs, a row an execution type.
	QueueHealth(ctx context.Context, f JobFilter) ([]*QueueHealth, error)
	// Costs are those of priced jobs, a row a service and execution type, the most expensive first.
	Costs(ctx context.Context, f JobFilter) ([]*Cost, error)
	// Violations lists at most limit denials that happened at f.Since or later, newest first.
	Violations(ctx context.Context, f JobFilter, limit int) ([]*Violation, error)
	// Recorded returns at most limit jobs that completed or failed, of f.Service, f.Tenants and created at f.Since or
	// later, by descending id, which for the engine's own is newest first. before is the last id of the page before.
	Recorded(ctx context.Context, f JobFilter, before string, limit int) ([]*RecordedJob, error)
	// Figures returns at most limit jobs that were created at f.Since or later, newest first.
	Figures(ctx context.Context, f JobFilter, limit int) ([]*JobFigures, error)
}

// JobFilter chooses jobs; zero fields choose all.
type JobFilter struct {
	Service       string
	ExecutionType string
	Since         time.Time
	// Failed chooses the failed jobs alone.
	Failed bool
	// Tenants as in [RunFilter].
	Tenants []string
}

// Performance is a row of v_execution_performance_by_type.
type Performance struct {
	ExecutionType                              string
	Jobs, Completed, Failed, Cancelled, Active int64
	SuccessRate                                *float64
	// The durations are in seconds.
	Average, P50, P95, P99, Max *float64
	AverageAttempts             *float64
	LastJobAt                   time.Time
}

// RunnerUsage is a row of v_resource_usage_by_runner.
type RunnerUsage struct {
	ExecutionType                        string
	Runner                               string
	MeasuredJobs                         int64
	AverageCPUSeconds, TotalCPUSeconds   *float64
	AverageCPUPercent                    *float64
	AverageMemoryMB                      *float64
	AveragePeakMemoryMB, MaxPeakMemoryMB *float64
	TotalDiskReadMB, TotalDiskWriteMB    *float64
	TotalNetworkRxMB, TotalNetworkTxMB   *float64
	AverageDurationSeconds               *float64
	OOMKilledJobs                        int64
	LastJobAt                            time.Time
}

// QueueHealth is a row of v_job_queue_health.
type QueueHealth struct {
	ExecutionType                              string
	Pending, Running, WaitingForRetry, Overdue int64
	OldestPendingSeconds                       *float64
	LongestRunningSeconds                      *float64
	CompletedLastHour, FailedLastHour          int64
	AverageWaitSeconds                         *float64
}

// Cost is a row of v_cost_by_service, in US dollars.
type Cost struct {
	Service, ExecutionType string
	PricedJobs             int64
	Total, Average, Max    float64
	BilledDurationMS       *float64
	LastHour, LastDay      float64
	FirstJobAt, LastJobAt  time.Time
}

// Violation is a row of v_denials.
type Violation struct {
	JobID, RunID, StepPath            string
	Service, Operation, ExecutionType string
	ErrorCode                         string
	Rule, Attempted, Detail           string
	// RuleSource is the rule's place in the registry, AllowedBy a JSON list of specql.runner.v1.PolicyChange.
	RuleSource           string
	AllowedBy            json.RawMessage
	PolicyDigest, Runner string
	Subject, TenantID    string
	OccurredAt           time.Time
}

// RecordedJob is what is kept of a job that says what it did.
type RecordedJob struct {
	ID, RunID, Operation string
	Status               Status
	ErrorCode            string
	// Input is nil where it has more than MaxRecordedInput bytes.
	Input, RunnerConfig, SecurityContext, ResourceUsage json.RawMessage
	Subject                                             string
	CreatedAt                                           time.Time
	// Snapshot, Entity and Action are those of the run.
	Snapshot, Entity, Action string
}

// MaxRecordedInput is the largest input that [Insight.Recorded] returns, in bytes of its text.
const MaxRecordedInput = 64 << 10

// JobFigures is what reports need of a job.
type JobFigures struct {
	RunID                             string
	Service, Operation, ExecutionType string
	Status                            Status
	Attempts                          int
	// DurationSeconds is from start to end; nil until both are known.
	DurationSeconds *float64
	// ResourceUsage is as in [Job].
	ResourceUsage json.RawMessage
	ErrorCode     string
	// ErrorMessage is cut at MaxErrorMessage characters.
	ErrorMessage string
	CreatedAt    time.Time
	// EndedAt is zero until then.
	EndedAt time.Time
}

// MaxErrorMessage is how many characters of a message [Insight.Figures] returns.
const MaxErrorMessage = 2000
