package server

import (
	"cmp"
	"context"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/telemetry"
	"github.com/specql/mesh/pkg/telemetry/scrape"
	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// maxServices is how many services have series of their own; the others are "other".
const maxServices = 1000

// maxRules is how many rules of policies have series of their own.
const maxRules = 100

// metrics are the orchestrator's own figures; docs/observability.md lists them. Labels are
// bounded: statuses, codes, execution types that have a runner, and so many services.
type metrics struct {
	registry    *prometheus.Registry
	types       *telemetry.Label
	services    *telemetry.Label
	runs        *prometheus.CounterVec
	runDuration *prometheus.HistogramVec
	jobs        *prometheus.CounterVec
	jobDuration *prometheus.HistogramVec
	cost        *prometheus.CounterVec
	retries     *prometheus.CounterVec
	inFlight    *prometheus.GaugeVec
	attempts    *prometheus.HistogramVec
	queued      *prometheus.HistogramVec
	commits     prometheus.Histogram
	records     prometheus.Histogram
	failures    prometheus.Counter
	alerts      *prometheus.CounterVec
	denials     *prometheus.CounterVec
	rules       *telemetry.Label

	ofJobs     series[jobLabels, jobSeries]
	ofAttempts series[string, attemptSeries]
}

// jobLabels are values of labels, bounded as these are.
type jobLabels struct {
	executionType, service string
	status                 store.Status
	code                   string
}

type jobSeries struct {
	ended prometheus.Counter
	took  prometheus.Observer
}

type attemptSeries struct {
	inFlight     prometheus.Gauge
	took, queued prometheus.Observer
}

// series keeps what belongs to the values of labels: each step asks for it, and to find it by the values takes a hash of each.
type series[K comparable, S any] struct {
	mu    sync.RWMutex
	known map[K]S
}

func (s *series[K, S]) of(labels K, find func() S) S {
	s.mu.RLock()
	found, ok := s.known[labels]
	s.mu.RUnlock()
	if ok {
		return found
	}
	found = find()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.known == nil {
		s.known = map[K]S{}
	}
	s.known[labels] = found
	return found
}

// newMetrics makes the figures of an orchestrator that has runners of these types.
func newMetrics(types []string) *metrics {
	seconds := prometheus.ExponentialBuckets(0.001, 4, 10)
	m := &metrics{
		registry: scrape.NewRegistry(), types: telemetry.NewLabel(len(types), types...), services: telemetry.NewLabel(maxServices), rules: telemetry.NewLabel(maxRules),
		runs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "specql_runs_ended_total", Help: "Runs that ended, by status.",
		}, []string{"status"}),
		runDuration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "specql_run_duration_seconds", Help: "Runs from their start to their end.", Buckets: seconds,
		}, []string{"status"}),
		jobs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "specql_jobs_total", Help: "Jobs that ended, by execution type, service, status and error code; the code of a completed one is OK.",
		}, []string{"execution_type", "service", "status", "code"}),
		jobDuration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "specql_job_duration_seconds", Help: "Jobs from their first attempt's start to their end, pauses included.", Buckets: seconds,
		}, []string{"execution_type", "status"}),
		cost: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "specql_job_cost_usd_total", Help: "What jobs cost by the price tables, in US dollars.",
		}, []string{"execution_type", "service"}),
		retries: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "specql_job_retries_total", Help: "Attempts that failed and were followed by another, by error code.",
		}, []string{"execution_type", "code"}),
		inFlight: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "specql_attempts_in_flight", Help: "Attempts that wait for a runner or run there now.",
		}, []string{"execution_type"}),
		attempts: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "specql_attempt_duration_seconds", Help: "Attempts from when they were to begin until their end.", Buckets: seconds,
		}, []string{"execution_type"}),
		queued: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "specql_attempt_queue_duration_seconds", Help: "How long attempts waited until a runner began them.", Buckets: seconds,
		}, []string{"execution_type"}),
		commits: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "specql_journal_commit_duration_seconds", Help: "How long a commit of the journal takes.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 4, 10),
		}),
		records: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "specql_journal_commit_records", Help: "How many records one commit of the journal holds.",
			Buckets: prometheus.ExponentialBuckets(1, 2, 9),
		}),
		alerts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "specql_alert_changes_total", Help: "Changes of alerts that this orchestrator evaluated, by the state after.",
		}, []string{"to"}),
		denials: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "specql_policy_denials_total", Help: "Attempts that a policy or a limit of one ended, by service, rule and error code.",
		}, []string{"execution_type", "service", "rule", "code"}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "specql_journal_commit_failures_total", Help: "Commits of the journal that failed for good.",
		}),
	}
	m.registry.MustRegister(m.runs, m.runDuration, m.jobs, m.jobDuration, m.cost, m.retries, m.inFlight, m.attempts, m.queued,
		m.commits, m.records, m.failures, m.alerts, m.denials)
	return m
}

func (m *metrics) walking(count func() int) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "specql_runs_walking", Help: "Runs that are being walked, sleeping ones included.",
	}, func() float64 { return float64(count()) }))
}

func (m *metrics) alertChanged(_, to string) { m.alerts.WithLabelValues(to).Inc() }

func (m *metrics) commit(records int, took time.Duration, err error) {
	m.commits.Observe(took.Seconds())
	m.records.Observe(float64(records))
	if err != nil {
		m.failures.Inc()
	}
}

// RunEnded implements engine.Observer, as the methods below do.
func (m *metrics) RunEnded(ctx context.Context, status store.Status, took time.Duration) {
	m.runs.WithLabelValues(string(status)).Inc()
	telemetry.Observe(ctx, m.runDuration.WithLabelValues(string(status)), took)
}

func (m *metrics) JobEnded(ctx context.Context, end *engine.JobEnd) {
	l := jobLabels{m.types.Value(end.ExecutionType), m.services.Value(end.Service), end.Status, cmp.Or(string(end.Code), "OK")}
	s := m.ofJobs.of(l, func() jobSeries {
		return jobSeries{m.jobs.WithLabelValues(l.executionType, l.service, string(l.status), l.code), m.jobDuration.WithLabelValues(l.executionType, string(l.status))}
	})
	telemetry.Count(ctx, s.ended, 1)
	telemetry.Observe(ctx, s.took, end.Took)
	if end.CostUSD > 0 {
		telemetry.Count(ctx, m.cost.WithLabelValues(l.executionType, l.service), end.CostUSD)
	}
}

// ofAttempt are the figures of a type's attempts.
func (m *metrics) ofAttempt(executionType string) attemptSeries {
	executionType = m.types.Value(executionType)
	return m.ofAttempts.of(executionType, func() attemptSeries {
		return attemptSeries{m.inFlight.WithLabelValues(executionType), m.attempts.WithLabelValues(executionType), m.queued.WithLabelValues(executionType)}
	})
}

func (m *metrics) AttemptBegan(executionType string) { m.ofAttempt(executionType).inFlight.Inc() }

func (m *metrics) AttemptEnded(ctx context.Context, executionType string, queued, took time.Duration) {
	s := m.ofAttempt(executionType)
	s.inFlight.Dec()
	telemetry.Observe(ctx, s.took, took)
	if queued > 0 {
		telemetry.Observe(ctx, s.queued, queued)
	}
}

// Denied implements engine.Observer.
func (m *metrics) Denied(executionType, service, rule string, code fault.Code) {
	m.denials.WithLabelValues(m.types.Value(executionType), m.services.Value(service), m.rules.Value(cmp.Or(rule, "unknown")), string(code)).Inc()
}

func (m *metrics) Retried(executionType string, code fault.Code) {
	m.retries.WithLabelValues(m.types.Value(executionType), string(code)).Inc()
}
