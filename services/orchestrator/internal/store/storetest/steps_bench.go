package storetest

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// stepper is a run as the engine writes it, with steps to append.
type stepper struct {
	run  *store.Run
	last *store.Job
	seq  int64
}

// next ends the last job and starts the next one: what a step of a workflow costs.
func (s *stepper) next() *store.Record {
	s.seq++
	now := time.Now()
	r := &store.Record{RunID: s.run.ID, Epoch: s.run.Epoch, Sequence: s.seq}
	if s.last != nil {
		s.last.Status, s.last.CompletedAt, s.last.Sequence = store.Completed, now, s.seq
		s.last.Output = json.RawMessage(`{"id": "ch_123", "status": "succeeded"}`)
		s.last.ResourceUsage = json.RawMessage(`{"duration_seconds": 0.01, "attempts": 1, "source": "http", "status_code": 200}`)
		s.last.SecurityContext = json.RawMessage(`{"policy_digest": "d", "checks": [{"rule": "allowed_domains", "subject": "api.stripe.com", "allowed": true}]}`)
		r.ChangedJobs = []*store.Job{s.last}
	}
	s.last = &store.Job{
		ID: uuid.Must(uuid.NewV7()).String(), RunID: s.run.ID, StepPath: fmt.Sprintf("steps[%d]", s.seq), Service: "api", Operation: "call", ExecutionType: "http",
		Status: store.Running, Attempts: 1, MaxAttempts: 4, CreatedAt: now, StartedAt: now, Sequence: s.seq,
		RunnerConfig: json.RawMessage(`{"base_url": "https://api.stripe.com", "auth_type": "bearer"}`), Input: json.RawMessage(`{"amount": 12}`),
	}
	r.NewJobs = []*store.Job{s.last}
	return r
}

// BenchmarkSteps commits the steps of so many runs at once. The processor time is that of another process, the database's;
// nil where there is none.
func BenchmarkSteps(b *testing.B, st store.Store, cpu func() (seconds float64)) {
	for _, n := range []int{1, 10, 100} {
		b.Run(fmt.Sprintf("%d runs", n), func(b *testing.B) {
			runs := make([]*stepper, n)
			for i := range runs {
				runs[i] = &stepper{run: newRun()}
				require.NoError(b, appendAll(b.Context(), st, create(runs[i].run)))
			}
			begin := 0.0
			if cpu != nil {
				begin = cpu()
			}
			records := make([]*store.Record, n)
			for b.Loop() {
				for i := range runs {
					records[i] = runs[i].next()
				}
				if err := appendAll(b.Context(), st, records...); err != nil {
					b.Fatal(err)
				}
			}
			steps := float64(b.N * n)
			b.ReportMetric(steps/b.Elapsed().Seconds(), "steps/s")
			if cpu != nil {
				b.ReportMetric((cpu()-begin)*1000/steps, "cpu-ms/step")
			}
		})
	}
}
