package storetest

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// BenchmarkTakes is what a step costs whose call has a limit, one after the other at one key, beside a step without: each commit
// ends an attempt and begins the next one. The window is so long that everything counts. cpu, if there is one, is how long the
// database's own processes have worked.
func BenchmarkTakes(b *testing.B, st store.Store, cpu func() (seconds float64)) {
	for _, c := range []struct {
		name   string
		limits []store.Limit
	}{
		{"none", nil},
		{"one limit", []store.Limit{perWindow("one", 1<<40, time.Hour)}},
		{"two limits", []store.Limit{perWindow("first", 1<<40, time.Hour), perWindow("second", 1<<40, time.Hour)}},
	} {
		b.Run(c.name, func(b *testing.B) {
			run := newRun()
			require.NoError(b, appendAll(b.Context(), st, create(run)))
			k := &taker{run: run, seq: run.Sequence}
			var last *store.Take
			begin := 0.0
			if cpu != nil {
				begin = cpu()
			}
			for b.Loop() {
				r, take := k.start(c.limits...)
				if c.limits == nil {
					r.Takes = nil
				} else if last != nil {
					r.Ends = []store.SlotEnd{{ID: last.ID, JobID: last.JobID}}
				}
				if err := appendAll(b.Context(), st, r); err != nil || c.limits != nil && !take.Result.Granted {
					b.Fatal(err, take.Result)
				}
				last = take
			}
			if cpu != nil {
				b.ReportMetric((cpu()-begin)*1000/float64(b.N), "cpu-ms/op")
			}
		})
	}
}
