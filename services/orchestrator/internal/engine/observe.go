package engine

import (
	"context"
	"time"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// Observer is told of what happens in an engine. Its methods are quick, and safe for
// concurrent use. The contexts are those of the run, for exemplars.
type Observer interface {
	RunEnded(ctx context.Context, status store.Status, took time.Duration)
	// JobEnded is told of each job once, by the orchestrator that writes its end.
	JobEnded(ctx context.Context, end *JobEnd)
	AttemptBegan(executionType string)
	// AttemptEnded says how long it was until a runner began the attempt, 0 where none did, and
	// how long it took in all.
	AttemptEnded(ctx context.Context, executionType string, queued, took time.Duration)
	// Retried is told of each failure that another attempt follows.
	Retried(executionType string, code fault.Code)
	// Denied is told of each rule of a policy that ended an attempt; rule is empty where it is not known.
	Denied(executionType, service, rule string, code fault.Code)
}

// JobEnd is how a job ended.
type JobEnd struct {
	ExecutionType string
	Service       string // empty where there is no such service
	Status        store.Status
	// Code is empty where the job completed.
	Code fault.Code
	// Took is the time from the first attempt's start to the end, pauses included.
	Took time.Duration
	// CostUSD is what the provider's prices say; 0 where nothing does.
	CostUSD float64
}

func (e *Engine) jobEnded(ctx context.Context, job *store.Job, cost float64) {
	end := &JobEnd{ExecutionType: job.ExecutionType, Service: job.Service, Status: job.Status, CostUSD: cost}
	if job.Err != nil {
		end.Code = job.Err.Code
	}
	if !job.StartedAt.IsZero() {
		end.Took = job.CompletedAt.Sub(job.StartedAt)
	}
	e.Observer.JobEnded(ctx, end)
}

// unobserved is an engine that nobody observes.
type unobserved struct{}

func (unobserved) RunEnded(context.Context, store.Status, time.Duration) {}

func (unobserved) JobEnded(context.Context, *JobEnd) {}

func (unobserved) AttemptBegan(string) {}

func (unobserved) AttemptEnded(context.Context, string, time.Duration, time.Duration) {}

func (unobserved) Retried(string, fault.Code) {}

func (unobserved) Denied(string, string, string, fault.Code) {}
