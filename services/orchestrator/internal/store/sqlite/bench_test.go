package sqlite

import (
	"context"
	"encoding/json"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// benchRun is a run as the engine writes it, with steps to append.
type benchRun struct {
	id       string
	sequence int64
	last     *store.Job
}

func newBenchRun() *benchRun { return &benchRun{id: uuid.Must(uuid.NewV7()).String()} }

func (r *benchRun) create() *store.Record {
	now := time.Now()
	return &store.Record{RunID: r.id, Epoch: 1, Create: &store.Run{
		ID: r.id, Entity: "payment", Action: "process", Status: store.Running, Owner: "a", Epoch: 1, CreatedAt: now, StartedAt: now,
		Input: json.RawMessage(`{"amount": 12, "card_token": "tok_visa"}`), Snapshot: "abc",
	}}
}

// step ends the last job and starts the next one: what a step of a workflow costs.
func (r *benchRun) step() *store.Record {
	r.sequence++
	now := time.Now()
	rec := &store.Record{RunID: r.id, Epoch: 1, Sequence: r.sequence}
	if r.last != nil {
		r.last.Status, r.last.CompletedAt = store.Completed, now
		r.last.Output = json.RawMessage(`{"id": "ch_123", "status": "succeeded"}`)
		r.last.ResourceUsage = json.RawMessage(`{"duration_seconds": 0.01, "attempts": 1, "source": "http", "status_code": 200}`)
		r.last.SecurityContext = json.RawMessage(`{"policy_digest": "d", "checks": [{"rule": "allowed_domains", "subject": "api.stripe.com", "allowed": true}]}`)
		rec.ChangedJobs = []*store.Job{r.last}
	}
	r.last = &store.Job{
		ID: uuid.Must(uuid.NewV7()).String(), RunID: r.id, StepPath: fmt.Sprintf("steps[%d]", r.sequence), Service: "api", Operation: "call", ExecutionType: "http",
		Status: store.Running, Attempts: 1, MaxAttempts: 4, CreatedAt: now, StartedAt: now, Sequence: r.sequence,
		RunnerConfig: json.RawMessage(`{"base_url": "https://api.stripe.com", "auth_type": "bearer"}`), Input: json.RawMessage(`{"amount": 12}`),
	}
	rec.NewJobs = []*store.Job{r.last}
	return rec
}

// BenchmarkCommit1 is one caller who waits for each record.
func BenchmarkCommit1(b *testing.B) {
	st := openTest(b)
	run := newBenchRun()
	require.NoError(b, appendOne(b.Context(), st, run.create()))
	for b.Loop() {
		require.NoError(b, appendOne(b.Context(), st, run.step()))
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
}

func appendOne(ctx context.Context, st *Store, r *store.Record) error {
	results, err := st.Commit(ctx, []*store.Record{r})
	if err != nil {
		return err
	}
	return results[0]
}

// BenchmarkJournal64 is 64 runs at once, each waiting for its records.
func BenchmarkJournal64(b *testing.B) {
	st := openTest(b)
	var commits atomic.Int64
	j := store.NewJournal(st, store.JournalOptions{OnCommit: func(int, time.Duration, error) { commits.Add(1) }})
	const runs = 64
	todo := make(chan struct{})
	errs := make(chan error, runs)
	for range runs {
		go func() {
			run := newBenchRun()
			err := j.Append(b.Context(), run.create())
			for range todo {
				if err == nil {
					err = j.Append(b.Context(), run.step())
				}
			}
			errs <- err
		}()
	}
	for b.Loop() {
		todo <- struct{}{}
	}
	close(todo)
	for range runs {
		require.NoError(b, <-errs)
	}
	require.NoError(b, j.Close())
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
	b.ReportMetric(float64(commits.Load())/float64(b.N), "commits/record")
}
