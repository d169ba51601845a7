package postgres

import (
	"math"
	"strconv"
	"strings"
	"time"

	runnerv1 "github.com/specql/mesh/gen/specql/runner/v1"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// keepsRules reports whether a record leaves nothing for the triggers of tb_job_run to do: its jobs begin as running and end once, and
// all that the sums of jobs count is known here. Rows of entities are others': what happens with them is not known.
func keepsRules(r *store.Record) bool {
	if r.InsertRow != nil || r.UpdateRow != nil {
		return false
	}
	for _, j := range r.NewJobs {
		if j.Adopted || j.Status != store.Running || !atStart(j) {
			return false
		}
	}
	for _, j := range r.ChangedJobs {
		switch {
		case j.Status == store.Running:
		case !j.Status.Final(), j.CreatedAt.IsZero(), j.CompletedAt.IsZero(),
			j.Status == store.Failed && (j.Err == nil || j.Err.Code == ""),
			len(j.ResourceUsage) > 0 && j.Usage == nil, len(j.SecurityContext) > 0 && j.Security == nil:
			return false
		}
	}
	return true
}

// sumKey is what a row of tb_job_stat is about.
type sumKey struct {
	createdAt, endedAt                        int64 // begins of spans of time, in seconds since 1970
	executionType, service, operation, runner string
	status                                    store.Status
}

// total counts values, and adds them up.
type total struct {
	n        int64
	sum, max float64
}

func (t *total) add(v *float64) {
	if v == nil || math.IsNaN(*v) || math.IsInf(*v, 0) {
		return
	}
	if t.n == 0 || *v > t.max {
		t.max = *v
	}
	t.n++
	t.sum += *v
}

// jobSum is what jobs of one key add to the sums: see jobs.tb_job_stat and the triggers that fill it for others.
type jobSum struct {
	key                                                    sumKey
	jobs, tried, attempts, measured, oom                   int64
	slots                                                  []int64
	duration, wait, cpu, percent, memory, peak, span, cost total
	diskRead, diskWrite, networkRx, networkTx, billed      total
	pricedFirst, pricedLast, lastCreated, lastEnded        time.Time
}

// sumJobs works out what jobs that have ended add to the sums.
func sumJobs(jobs []*store.Job, now time.Time) []*jobSum {
	var out []*jobSum
	for _, j := range jobs {
		if !j.Status.Final() {
			continue
		}
		key := sumKey{
			createdAt: spanOf(j.CreatedAt, now), endedAt: spanOf(j.CompletedAt, now),
			executionType: j.ExecutionType, service: j.Service, operation: j.Operation, runner: j.Security.GetRunner(), status: j.Status,
		}
		var s *jobSum
		for _, o := range out { // few
			if o.key == key {
				s = o
				break
			}
		}
		if s == nil {
			s = &jobSum{key: key}
			out = append(out, s)
		}
		s.add(j)
	}
	return out
}

func (s *jobSum) add(j *store.Job) {
	s.jobs++
	if j.Attempts > 0 {
		s.tried++
		s.attempts += int64(j.Attempts)
	}
	if d := jobSeconds(j); d != nil {
		s.duration.add(d)
		s.slots = append(s.slots, slotOf(*d))
	}
	if !j.StartedAt.IsZero() {
		s.wait.add(new(float64(j.StartedAt.UnixMicro()-j.CreatedAt.UnixMicro()) / 1e6))
	}
	if u := j.Usage; u != nil && len(j.ResourceUsage) > 0 {
		s.addUsage(u, j.CreatedAt)
	}
	s.lastCreated = later(s.lastCreated, j.CreatedAt)
	s.lastEnded = later(s.lastEnded, j.CompletedAt)
}

func (s *jobSum) addUsage(u *runnerv1.ResourceUsage, createdAt time.Time) {
	s.measured++
	s.cpu.add(u.CpuSeconds)
	s.percent.add(u.CpuUsagePercent)
	s.memory.add(u.MemoryMb)
	s.peak.add(u.PeakMemoryMb)
	s.span.add(u.DurationSeconds)
	s.diskRead.add(u.DiskReadMb)
	s.diskWrite.add(u.DiskWriteMb)
	s.networkRx.add(u.NetworkRxMb)
	s.networkTx.add(u.NetworkTxMb)
	if u.GetOomKilled() {
		s.oom++
	}
	if priced := s.cost.n; u.CostUsd != nil {
		if s.cost.add(u.CostUsd); s.cost.n == priced {
			return
		}
		s.billed.add(u.BilledDurationMs)
		if s.pricedFirst.IsZero() || createdAt.Before(s.pricedFirst) {
			s.pricedFirst = createdAt
		}
		s.pricedLast = later(s.pricedLast, createdAt)
	}
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// spanOf is jobs.fn_stat_time: the minute of a recent time, the hour of one some days ago, else the day.
func spanOf(t, now time.Time) int64 {
	span := int64(24 * 60 * 60)
	switch {
	case t.After(now.Add(-2 * time.Hour)):
		span = 60
	case t.After(now.Add(-48 * time.Hour)):
		span = 60 * 60
	}
	seconds := t.Unix()
	return seconds - ((seconds%span)+span)%span
}

// slotOf is jobs.fn_stat_slot.
func slotOf(seconds float64) int64 {
	return int64(math.Floor(math.Log(min(max(seconds, 1e-6), 1e12)*1e6) / math.Log(1.02)))
}

// sumColumns are the columns of tb_job_stat, and how the text of a value is added; nothing for null.
var sumColumns = map[string]func(b []byte, s *jobSum) []byte{
	"created_at":      func(b []byte, s *jobSum) []byte { return appendMoment(b, time.Unix(s.key.createdAt, 0)) },
	"ended_at":        func(b []byte, s *jobSum) []byte { return appendMoment(b, time.Unix(s.key.endedAt, 0)) },
	"execution_type":  func(b []byte, s *jobSum) []byte { return appendText(b, s.key.executionType) },
	"service_name":    func(b []byte, s *jobSum) []byte { return appendText(b, s.key.service) },
	"operation":       func(b []byte, s *jobSum) []byte { return appendText(b, s.key.operation) },
	"status":          func(b []byte, s *jobSum) []byte { return appendText(b, string(s.key.status)) },
	"jobs":            func(b []byte, s *jobSum) []byte { return appendCount(b, s.jobs) },
	"tried_jobs":      func(b []byte, s *jobSum) []byte { return appendCount(b, s.tried) },
	"attempts":        func(b []byte, s *jobSum) []byte { return appendCount(b, s.attempts) },
	"timed_jobs":      func(b []byte, s *jobSum) []byte { return appendCount(b, s.duration.n) },
	"duration":        func(b []byte, s *jobSum) []byte { return appendSum(b, &s.duration) },
	"max_duration":    func(b []byte, s *jobSum) []byte { return appendMax(b, &s.duration) },
	"waited_jobs":     func(b []byte, s *jobSum) []byte { return appendCount(b, s.wait.n) },
	"wait":            func(b []byte, s *jobSum) []byte { return appendSum(b, &s.wait) },
	"measured_jobs":   func(b []byte, s *jobSum) []byte { return appendCount(b, s.measured) },
	"cpu_jobs":        func(b []byte, s *jobSum) []byte { return appendCount(b, s.cpu.n) },
	"cpu":             func(b []byte, s *jobSum) []byte { return appendSum(b, &s.cpu) },
	"percent_jobs":    func(b []byte, s *jobSum) []byte { return appendCount(b, s.percent.n) },
	"percent":         func(b []byte, s *jobSum) []byte { return appendSum(b, &s.percent) },
	"memory_jobs":     func(b []byte, s *jobSum) []byte { return appendCount(b, s.memory.n) },
	"memory":          func(b []byte, s *jobSum) []byte { return appendSum(b, &s.memory) },
	"peak_jobs":       func(b []byte, s *jobSum) []byte { return appendCount(b, s.peak.n) },
	"peak":            func(b []byte, s *jobSum) []byte { return appendSum(b, &s.peak) },
	"max_peak":        func(b []byte, s *jobSum) []byte { return appendMax(b, &s.peak) },
	"disk_read":       func(b []byte, s *jobSum) []byte { return appendSum(b, &s.diskRead) },
	"disk_write":      func(b []byte, s *jobSum) []byte { return appendSum(b, &s.diskWrite) },
	"network_rx":      func(b []byte, s *jobSum) []byte { return appendSum(b, &s.networkRx) },
	"network_tx":      func(b []byte, s *jobSum) []byte { return appendSum(b, &s.networkTx) },
	"span_jobs":       func(b []byte, s *jobSum) []byte { return appendCount(b, s.span.n) },
	"span":            func(b []byte, s *jobSum) []byte { return appendSum(b, &s.span) },
	"oom_jobs":        func(b []byte, s *jobSum) []byte { return appendCount(b, s.oom) },
	"priced_jobs":     func(b []byte, s *jobSum) []byte { return appendCount(b, s.cost.n) },
	"cost":            func(b []byte, s *jobSum) []byte { return appendSum(b, &s.cost) },
	"max_cost":        func(b []byte, s *jobSum) []byte { return appendMax(b, &s.cost) },
	"billed":          func(b []byte, s *jobSum) []byte { return appendSum(b, &s.billed) },
	"priced_first_at": func(b []byte, s *jobSum) []byte { return appendTime(b, s.pricedFirst) },
	"priced_last_at":  func(b []byte, s *jobSum) []byte { return appendTime(b, s.pricedLast) },
	"last_created_at": func(b []byte, s *jobSum) []byte { return appendTime(b, s.lastCreated) },
	"last_ended_at":   func(b []byte, s *jobSum) []byte { return appendTime(b, s.lastEnded) },
	"runner": func(b []byte, s *jobSum) []byte {
		if s.key.runner == "" {
			return b
		}
		return appendText(b, s.key.runner)
	},
	"slots": func(b []byte, s *jobSum) []byte {
		return appendList(b, s.slots, func(b []byte, slot int64) []byte { return strconv.AppendInt(b, slot, 10) })
	},
	"slot_jobs": func(b []byte, s *jobSum) []byte {
		return appendList(b, s.slots, func(b []byte, _ int64) []byte { return append(b, '1') })
	},
}

func appendCount(b []byte, n int64) []byte {
	if n == 0 {
		return b
	}
	return strconv.AppendInt(b, n, 10)
}

func appendSum(b []byte, t *total) []byte {
	if t.n == 0 {
		return b
	}
	return strconv.AppendFloat(b, t.sum, 'g', -1, 64)
}

func appendMax(b []byte, t *total) []byte {
	if t.n == 0 {
		return b
	}
	return strconv.AppendFloat(b, t.max, 'g', -1, 64)
}

func appendTime(b []byte, t time.Time) []byte {
	if t.IsZero() {
		return b
	}
	return appendMoment(b, t)
}

// appendMoment adds a time as PostgreSQL keeps it: what is below a microsecond is cut off.
func appendMoment(b []byte, t time.Time) []byte {
	return time.UnixMicro(t.UnixMicro()).UTC().AppendFormat(b, "2006-01-02 15:04:05.999999Z07:00")
}

func appendText(b []byte, text string) []byte {
	b = append(b, '"')
	b = append(b, rowQuotes.Replace(plain(text))...)
	return append(b, '"')
}

func appendList(b []byte, list []int64, add func([]byte, int64) []byte) []byte {
	if len(list) == 0 {
		return b
	}
	b = append(b, `"{`...)
	for i, v := range list {
		if i > 0 {
			b = append(b, ',')
		}
		b = add(b, v)
	}
	return append(b, `}"`...)
}

// Quotes of a value in the text of a row, and of that in the text of an array.
var (
	rowQuotes   = strings.NewReplacer(`\`, `\\`, `"`, `""`)
	arrayQuotes = strings.NewReplacer(`\`, `\\`, `"`, `\"`)
)

// rowsOf are sums as the text of an array of rows with these columns.
func rowsOf(sums []*jobSum, columns []string) string {
	b := []byte{'{'}
	var row []byte
	for i, s := range sums {
		row = append(row[:0], '(')
		for k, name := range columns {
			if k > 0 {
				row = append(row, ',')
			}
			if add := sumColumns[name]; add != nil {
				row = add(row, s)
			}
		}
		row = append(row, ')')
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, '"')
		b = append(b, arrayQuotes.Replace(string(row))...)
		b = append(b, '"')
	}
	return string(append(b, '}'))
}
