package server

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/specql/mesh/pkg/telemetry"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// metrics are the orchestrator's own figures. Labels are bounded: statuses, and the
// execution types of the registry.
type metrics struct {
	registry *prometheus.Registry
	runs     *prometheus.CounterVec
	jobs     *prometheus.HistogramVec
	commits  prometheus.Histogram
	records  prometheus.Histogram
}

func newMetrics() *metrics {
	m := &metrics{
		registry: telemetry.NewRegistry(),
		runs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "specql_runs_ended_total", Help: "Runs that ended, by status.",
		}, []string{"status"}),
		jobs: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "specql_orchestrator_job_duration_seconds", Help: "Jobs from their first attempt's start to their end, pauses included.",
			Buckets: prometheus.ExponentialBuckets(0.001, 4, 10),
		}, []string{"execution_type", "status"}),
		commits: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "specql_journal_commit_duration_seconds", Help: "How long a commit of the journal takes.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 4, 10),
		}),
		records: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "specql_journal_commit_records", Help: "How many records one commit of the journal holds.",
			Buckets: prometheus.ExponentialBuckets(1, 2, 9),
		}),
	}
	m.registry.MustRegister(m.runs, m.jobs, m.commits, m.records)
	return m
}

func (m *metrics) walking(count func() int) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "specql_runs_walking", Help: "Runs that are being walked, sleeping ones included.",
	}, func() float64 { return float64(count()) }))
}

func (m *metrics) commit(records int, took time.Duration, _ error) {
	m.commits.Observe(took.Seconds())
	m.records.Observe(float64(records))
}

func (m *metrics) runEnded(status store.Status) { m.runs.WithLabelValues(string(status)).Inc() }

func (m *metrics) jobEnded(executionType string, status store.Status, took time.Duration) {
	m.jobs.WithLabelValues(executionType, string(status)).Observe(took.Seconds())
}
