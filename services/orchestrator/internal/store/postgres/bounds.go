package postgres

import (
	"time"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// What a row may hold, in bytes and numbers: the bounds of jobs.fn_check_workflow_run and jobs.fn_check_job_run, which look at what
// others write. The store's own connections say that they have looked (see [settings]).
const (
	maxName   = 1000
	maxText   = 10_000
	maxCount  = 1_000_000
	maxSerial = 1 << 53
)

var (
	minTime = time.Date(1, 1, 1, 0, 0, 0, 0, time.UTC)
	maxTime = time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC)
)

// bounds collects the first value that is out of bounds.
type bounds struct{ err error }

func (b *bounds) text(column, value string, most int) {
	if len(value) > most && b.err == nil {
		b.err = invalidf("%w: %s has %d bytes, at most %d", store.ErrRefused, column, len(value), most)
	}
}

func (b *bounds) number(column string, value, most int64) {
	if (value < 0 || value > most) && b.err == nil {
		b.err = invalidf("%w: %s is %d, which is not between 0 and %d", store.ErrRefused, column, value, most)
	}
}

func (b *bounds) time(column string, value time.Time) {
	if !value.IsZero() && (value.Before(minTime) || value.After(maxTime)) && b.err == nil {
		b.err = invalidf("%w: %s is %s, which is not between the years 1 and 9999", store.ErrRefused, column, value.Format(time.RFC3339))
	}
}

func (b *bounds) fault(e *fault.Error) {
	if e != nil {
		b.text("error_code", string(e.Code), maxText)
		b.number("error_attempts", int64(e.Attempts), maxCount)
	}
}

// checkBounds refuses what nobody can work with.
func checkBounds(r *store.Record) error {
	b := &bounds{}
	b.number("epoch", r.Epoch, maxSerial)
	b.number("sequence", r.Sequence, maxSerial)
	if run := r.Create; run != nil {
		b.text("entity", run.Entity, maxName)
		b.text("action", run.Action, maxName)
		b.text("entity_schema", run.EntitySchema, maxName)
		b.text("owner", run.Owner, maxName)
		b.text("entity_id", run.EntityID, maxText)
		b.text("snapshot", run.Snapshot, maxText)
		b.text("correlation_id", run.CorrelationID, maxText)
		b.text("tenant_id", run.TenantID, maxText)
		b.text("triggered_by", run.Subject, maxText)
		b.text("traceparent", run.Traceparent, maxText)
		b.number("epoch", run.Epoch, maxSerial)
		b.number("sequence", run.Sequence, maxSerial)
		b.number("retries", int64(run.Retries), maxCount)
		b.time("created_at", run.CreatedAt)
		b.time("started_at", run.StartedAt)
		b.time("completed_at", run.CompletedAt)
		b.fault(run.Err)
	}
	if change := r.Run; change != nil {
		b.time("started_at", change.StartedAt)
		b.time("completed_at", change.CompletedAt)
		b.fault(change.Err)
		if m := change.Admit; m != nil {
			b.text("snapshot", m.Snapshot, maxText)
			b.text("entity_id", m.EntityID, maxText)
			b.text("entity_schema", m.EntitySchema, maxName)
		}
	}
	for _, jobs := range [][]*store.Job{r.NewJobs, r.ChangedJobs} {
		for _, j := range jobs {
			b.job(j)
		}
	}
	return b.err
}

func (b *bounds) job(j *store.Job) {
	b.text("service_name", j.Service, maxName)
	b.text("operation", j.Operation, maxName)
	b.text("execution_type", j.ExecutionType, maxName)
	b.text("correlation_id", j.CorrelationID, maxText)
	b.text("entity_type", j.EntityType, maxText)
	b.text("entity_pk", j.EntityPK, maxText)
	b.number("attempts", int64(j.Attempts), maxCount)
	b.number("max_attempts", int64(j.MaxAttempts), maxCount)
	b.number("generation", int64(j.Generation), maxCount)
	b.number("sequence", j.Sequence, maxSerial)
	b.time("next_attempt_at", j.NextAttemptAt)
	b.time("created_at", j.CreatedAt)
	b.time("started_at", j.StartedAt)
	b.time("completed_at", j.CompletedAt)
	b.fault(j.Err)
}
