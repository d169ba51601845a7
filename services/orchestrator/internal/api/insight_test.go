package api

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/timestamppb"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/auth"
	"github.com/specql/mesh/services/orchestrator/internal/store"
	"github.com/specql/mesh/services/orchestrator/internal/store/sqlite"
)

func TestShape(t *testing.T) {
	t.Parallel()
	for message, want := range map[string]string{
		`the service answered 503 after 1.25s`:                               `the service answered <n> after <n>s`,
		`no row 6a8f9d0e-0000-4000-8000-00000000abcd in "orders"`:            `no row <id> in <text>`,
		`it can't read 'a b' and won't try`:                                  `it can't read <text> and won't try`,
		`charge ch_3Nabc9 declined; request 9f86d081884c7d65 at 10.0.0.1:80`: `charge <id> declined; request <id> at <n>`,
		"two\n lines":        "two lines",
		"":                   "",
		`decade added faced`: `decade added faced`,
		"\xff":               "\uFFFD",
	} {
		require.Equal(t, want, shape(message))
	}
	long := shape(strings.Repeat("ü ", 1000))
	require.LessOrEqual(t, len(long), maxShape+len("…"))
	require.True(t, strings.HasSuffix(long, "…"))
}

func FuzzShape(f *testing.F) {
	f.Add(`"\"`, 7)
	f.Fuzz(func(t *testing.T, text string, n int) {
		one, two := shape(fmt.Sprintf("%s %d", text, n)), shape(fmt.Sprintf("%s %d", text, n/2))
		require.LessOrEqual(t, len(one), maxShape+len("…"))
		if n >= 0 {
			require.Equal(t, one, two, "numbers make no difference")
		}
	})
}

func TestDistribution(t *testing.T) {
	t.Parallel()
	require.Nil(t, distribution(nil))
	var values []float64
	for i := range 100 {
		values = append(values, float64(100-i))
	}
	d := distribution(values)
	require.Equal(t, []any{int64(100), 5050.0, 50.5, 50.0, 90.0, 95.0, 99.0, 100.0},
		[]any{d.GetSamples(), d.GetTotal(), d.GetAverage(), d.GetP50(), d.GetP90(), d.GetP95(), d.GetP99(), d.GetMax()})
	d = distribution([]float64{3})
	require.Equal(t, []float64{3, 3, 3}, []float64{d.GetP50(), d.GetP99(), d.GetMax()})
}

func TestInsight(t *testing.T) {
	t.Parallel()
	st, err := sqlite.Open(t.Context(), sqlite.Options{Path: filepath.Join(t.TempDir(), "specql.db"), Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, st.Close()) })
	now := time.Now().UTC().Truncate(time.Microsecond)
	run := &store.Run{ID: uuid.Must(uuid.NewV7()).String(), Action: "a", Status: store.Running, Owner: "o", Epoch: 1, Sequence: 1, CreatedAt: now, StartedAt: now}
	record := &store.Record{RunID: run.ID, Epoch: 1, Sequence: 1, Create: run}
	job := func(service, operation, kind string, age, took time.Duration, usage string, failure *fault.Error) {
		j := &store.Job{
			ID: uuid.Must(uuid.NewV7()).String(), RunID: run.ID, StepPath: fmt.Sprintf("steps[%d]", len(record.NewJobs)), Service: service, Operation: operation,
			ExecutionType: kind, Status: store.Completed, Attempts: 2, MaxAttempts: 2, Sequence: 1, CreatedAt: now.Add(-age), StartedAt: now.Add(-age),
			CompletedAt: now.Add(-age + took), ResourceUsage: json.RawMessage(usage), Err: failure,
		}
		if failure != nil {
			j.Status = store.Failed
		}
		record.NewJobs = append(record.NewJobs, j)
	}
	for i := range 20 {
		job("sh", "echo", "shell", time.Minute, time.Duration(i+1)*time.Second, fmt.Sprintf(`{"peak_memory_mb": %d, "future_figure": 1}`, i+1), nil)
	}
	for i := range 3 {
		job("sh", "fail", "shell", time.Duration(3+i)*time.Minute, time.Second, "", fault.New(fault.RemoteError, "exit status %d of '%d'", i, i))
	}
	job("sh", "fail", "shell", 48*time.Hour, time.Second, "", fault.New(fault.RemoteError, "killed"))
	job("fn", "resize", "serverless", time.Minute, time.Second, `{"cost_usd": 0.5, "oom_killed": true}`, nil)
	results, err := st.Commit(t.Context(), []*store.Record{record})
	require.NoError(t, err)
	require.NoError(t, results[0])

	insight := &Insight{Store: st}
	ctx, recent := auth.With(t.Context(), auth.Anonymous("test", "")), timestamppb.New(now.Add(-time.Hour))
	p, err := insight.GetPerformance(ctx, &specqlv1.GetPerformanceRequest{})
	require.NoError(t, err)
	require.Len(t, p.GetPerformance(), 2)
	require.Equal(t, []any{"shell", "", int64(24), int64(4)}, []any{
		p.GetPerformance()[1].GetExecutionType(), p.GetPerformance()[1].GetService(), p.GetPerformance()[1].GetJobs(), p.GetPerformance()[1].GetFailed(),
	})
	p, err = insight.GetPerformance(ctx, &specqlv1.GetPerformanceRequest{Filter: &specqlv1.JobFilter{Service: "sh", Since: recent}})
	require.NoError(t, err)
	require.Len(t, p.GetPerformance(), 2)
	echo, fail := p.GetPerformance()[0], p.GetPerformance()[1]
	require.Equal(t, []any{"echo", 1.0, 2.0}, []any{echo.GetOperation(), echo.GetSuccessRate(), echo.GetAverageAttempts()})
	require.InDelta(t, 19.0, echo.GetDurationSeconds().GetP95(), 1e-6)
	require.InDelta(t, 20.0, echo.GetDurationSeconds().GetMax(), 1e-6)
	require.Equal(t, []any{"fail", int64(3), 0.0}, []any{fail.GetOperation(), fail.GetJobs(), fail.GetSuccessRate()})
	require.False(t, p.GetTruncated())

	u, err := insight.GetResourceUsage(ctx, &specqlv1.GetResourceUsageRequest{Filter: &specqlv1.JobFilter{Service: "sh"}})
	require.NoError(t, err)
	require.Len(t, u.GetUsage(), 1, "an operation that nobody measured is left out")
	require.Equal(t, []any{int64(20), 10.0, 20.0, true}, []any{
		u.GetUsage()[0].GetMeasuredJobs(), u.GetUsage()[0].GetPeakMemoryMb().GetP50(), u.GetUsage()[0].GetPeakMemoryMb().GetMax(), u.GetUsage()[0].GetCpuSeconds() == nil,
	})
	u, err = insight.GetResourceUsage(ctx, &specqlv1.GetResourceUsageRequest{Filter: &specqlv1.JobFilter{ExecutionType: "serverless"}})
	require.NoError(t, err)
	require.Len(t, u.GetUsage(), 1)
	require.Equal(t, int64(1), u.GetUsage()[0].GetOomKilledJobs())
	require.Nil(t, u.GetUsage()[0].GetPeakMemoryMb())

	f, err := insight.GetFailurePatterns(ctx, &specqlv1.GetFailurePatternsRequest{Filter: &specqlv1.JobFilter{ExecutionType: "shell"}})
	require.NoError(t, err)
	require.Len(t, f.GetPatterns(), 2)
	first := f.GetPatterns()[0]
	require.Equal(t, []any{"exit status <n> of <text>", int64(3), int64(1), "REMOTE_ERROR", "exit status 0 of '0'", run.ID}, []any{
		first.GetShape(), first.GetFailures(), first.GetAffectedRuns(), first.GetErrorCode(), first.GetLastErrorMessage(), first.GetLastRunId(),
	})
	require.True(t, first.GetFirstSeenAt().AsTime().Before(first.GetLastSeenAt().AsTime()))
	f, err = insight.GetFailurePatterns(ctx, &specqlv1.GetFailurePatternsRequest{Filter: &specqlv1.JobFilter{Since: recent}})
	require.NoError(t, err)
	require.Len(t, f.GetPatterns(), 1)

	cost, err := insight.GetCost(ctx, &specqlv1.GetCostRequest{Service: "fn"})
	require.NoError(t, err)
	require.Len(t, cost.GetCosts(), 1)
	require.InDelta(t, 0.5, cost.GetCosts()[0].GetTotalUsd(), 1e-9)
	require.Nil(t, cost.GetCosts()[0].BilledDurationMs) //nolint:protogetter // absent is not zero
	q, err := insight.GetQueueHealth(ctx, &specqlv1.GetQueueHealthRequest{})
	require.NoError(t, err)
	require.Len(t, q.GetQueues(), 2)

	for field, call := range map[string]func() error{
		"filter.service": func() error {
			_, err := insight.GetPerformance(ctx, &specqlv1.GetPerformanceRequest{Filter: &specqlv1.JobFilter{Service: strings.Repeat("x", 256)}})
			return err
		},
		"filter.since": func() error {
			_, err := insight.GetResourceUsage(ctx, &specqlv1.GetResourceUsageRequest{Filter: &specqlv1.JobFilter{Since: &timestamppb.Timestamp{Seconds: 1 << 60}}})
			return err
		},
		"limit": func() error {
			_, err := insight.GetSecurityAudit(ctx, &specqlv1.GetSecurityAuditRequest{Limit: -1})
			return err
		},
		"execution_type": func() error {
			_, err := insight.GetQueueHealth(ctx, &specqlv1.GetQueueHealthRequest{ExecutionType: strings.Repeat("x", 256)})
			return err
		},
	} {
		e, ok := fault.As(call())
		require.True(t, ok, field)
		require.Equal(t, fault.Validation, e.Code)
		require.Equal(t, field, e.Violations[0].Field)
	}
}

// manyJobs has more jobs and violations than a report looks at, or just as many.
type manyJobs struct {
	store.Insight
	n int
}

func (m manyJobs) Figures(_ context.Context, _ store.JobFilter, limit int) ([]*store.JobFigures, error) {
	jobs := make([]*store.JobFigures, min(m.n, limit))
	for i := range jobs {
		// No two messages have a shape in common.
		letters := strings.Map(func(r rune) rune { return r - '0' + 'g' }, fmt.Sprint(i))
		jobs[i] = &store.JobFigures{Service: "s", Operation: "o", ExecutionType: "http", Status: store.Failed, Attempts: 1, ErrorMessage: letters}
	}
	return jobs, nil
}

func (m manyJobs) Violations(_ context.Context, _ store.JobFilter, limit int) ([]*store.Violation, error) {
	list := make([]*store.Violation, min(m.n, limit))
	for i := range list {
		list[i] = &store.Violation{}
	}
	return list, nil
}

func TestReportsAreBounded(t *testing.T) {
	t.Parallel()
	ctx, f := auth.With(t.Context(), auth.Anonymous("test", "")), &specqlv1.JobFilter{Service: "s"}
	for n, more := range map[int]bool{maxFigures: false, maxFigures + 1: true} {
		insight := &Insight{Store: manyJobs{n: n}}
		p, err := insight.GetPerformance(ctx, &specqlv1.GetPerformanceRequest{Filter: f})
		require.NoError(t, err)
		require.Equal(t, []any{more, int64(maxFigures)}, []any{p.GetTruncated(), p.GetPerformance()[0].GetJobs()})
		u, err := insight.GetResourceUsage(ctx, &specqlv1.GetResourceUsageRequest{Filter: f})
		require.NoError(t, err)
		require.Equal(t, more, u.GetTruncated())
	}
	for n, more := range map[int]bool{maxPatterns: false, maxPatterns + 1: true} {
		patterns, err := (&Insight{Store: manyJobs{n: n}}).GetFailurePatterns(ctx, &specqlv1.GetFailurePatternsRequest{Filter: f})
		require.NoError(t, err)
		require.Len(t, patterns.GetPatterns(), maxPatterns)
		require.Equal(t, more, patterns.GetTruncated())
		require.Equal(t, "INTERNAL", patterns.GetPatterns()[0].GetErrorCode(), "a failure without a code has one")
	}
	for limit, want := range map[int32]int{0: defaultViolations, 5: 5, 1 << 30: maxViolations} {
		for n, more := range map[int]bool{want: false, want + 1: true} {
			a, err := (&Insight{Store: manyJobs{n: n}}).GetSecurityAudit(ctx, &specqlv1.GetSecurityAuditRequest{Limit: limit})
			require.NoError(t, err)
			require.Len(t, a.GetViolations(), want)
			require.Equal(t, more, a.GetTruncated())
		}
	}
}
