package storetest

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// testInsight: reports of a known set of jobs say the same on every database.
func testInsight(t *testing.T, st store.Store) {
	ctx := t.Context()
	reports := func(of store.JobFilter) (n int) {
		t.Helper()
		p, err := st.Performance(ctx, of)
		require.NoError(t, err)
		u, err := st.RunnerUsage(ctx, of)
		require.NoError(t, err)
		h, err := st.QueueHealth(ctx, of)
		require.NoError(t, err)
		c, err := st.Costs(ctx, of)
		require.NoError(t, err)
		v, err := st.Violations(ctx, of, 10)
		require.NoError(t, err)
		f, err := st.Figures(ctx, of, 10)
		require.NoError(t, err)
		return len(p) + len(u) + len(h) + len(c) + len(v) + len(f)
	}
	require.Zero(t, reports(store.JobFilter{}), "nothing is said of nothing")

	now := time.Now().UTC().Truncate(time.Microsecond)
	run := newRun()
	run.TenantID = tenant
	commit(t, st, create(run))
	var jobs []*store.Job
	job := func(service, operation, kind string, status store.Status, age, took time.Duration, usage string) *store.Job {
		j := newJob(run)
		j.Service, j.Operation, j.ExecutionType, j.Status, j.TenantID = service, operation, kind, status, tenant
		j.CreatedAt = now.Add(-age)
		j.StartedAt = j.CreatedAt
		if status.Final() {
			j.CompletedAt = j.StartedAt.Add(took)
		}
		if usage != "" {
			j.ResourceUsage = json.RawMessage(usage)
			j.SecurityContext = json.RawMessage(`{"runner": "runner@a"}`)
		}
		jobs = append(jobs, j)
		return j
	}
	for i := range 10 {
		job("api", "get", "http", store.Completed, time.Duration(i)*time.Minute, time.Second, `{"cpu_seconds": 0.5, "peak_memory_mb": 8}`)
	}
	for i := range 3 {
		j := job("api", "put", "http", store.Failed, time.Duration(20+i)*time.Minute, 3*time.Second, "")
		j.Err = fault.New(fault.RemoteError, "answer %d: %s", i, strings.Repeat("ü", store.MaxErrorMessage))
	}
	job("fn", "resize", "serverless", store.Completed, 30*time.Minute, time.Second, `{"cost_usd": 0.25, "billed_duration_ms": 100}`)
	job("fn", "resize", "serverless", store.Completed, 48*time.Hour, time.Second, `{"cost_usd": 0.75, "oom_killed": true}`)
	job("fn", "resize", "serverless", store.Running, 3*time.Minute, 0, "")
	denied := job("sh", "echo", "shell", store.Failed, time.Hour, time.Second, "")
	denied.Err = fault.New(fault.PolicyViolation, "no")
	denied.SecurityContext = json.RawMessage(`{"policy_digest": "d", "runner": "shell@b", "subject": "ann", "checks": [
		{"rule": "working_directory", "subject": "/srv", "allowed": true},
		{"rule": "allowed_commands", "subject": "/bin/rm", "detail": "add it"}]}`)
	bare := job("sh", "rm", "shell", store.Failed, 72*time.Hour, time.Second, "")
	bare.Err = fault.New(fault.PolicyViolation, "not even checked")
	r := change(run)
	r.NewJobs = jobs
	commit(t, st, r)

	// Of their own tenant everybody is told the same as of all, and nothing of another's.
	for _, f := range []store.JobFilter{{}, {Tenants: []string{tenant}}, {Tenants: []string{tenant2, tenant}}} {
		checkInsight(t, st, f, now, run, denied, bare)
	}
	for _, tenants := range [][]string{{tenant2}, {""}, {}} {
		require.Zero(t, reports(store.JobFilter{Tenants: tenants}), "%q", tenants)
	}
	// A name that is no UUID is kept with the run alone.
	named := newRun()
	named.TenantID = "acme"
	commit(t, st, create(named))
	j := newJob(named)
	j.TenantID, j.Status = "acme", store.Failed
	j.Err = fault.New(fault.PolicyViolation, "no")
	j.ResourceUsage, j.SecurityContext = json.RawMessage(`{"cost_usd": 1}`), json.RawMessage(`{"runner": "r"}`)
	j.StartedAt = now
	j.CompletedAt = now
	r = change(named)
	r.NewJobs = []*store.Job{j}
	commit(t, st, r)
	require.Equal(t, 6, reports(store.JobFilter{Tenants: []string{"acme"}}), "a row in each report")
	require.Zero(t, reports(store.JobFilter{Tenants: []string{""}}))
}

// checkInsight looks at the reports of the jobs of testInsight.
func checkInsight(t *testing.T, st store.Store, of store.JobFilter, now time.Time, run *store.Run, denied, bare *store.Job) {
	ctx := t.Context()
	p, err := st.Performance(ctx, of)
	require.NoError(t, err)
	require.Len(t, p, 3)
	require.Equal(t, []any{"http", int64(13), int64(10), int64(3), int64(0), int64(0)},
		[]any{p[0].ExecutionType, p[0].Jobs, p[0].Completed, p[0].Failed, p[0].Cancelled, p[0].Active})
	require.InDelta(t, 10.0/13, *p[0].SuccessRate, 1e-9)
	require.InEpsilon(t, 1.0, *p[0].P50, 0.02)
	require.InEpsilon(t, 3.0, *p[0].P99, 0.02)
	require.InEpsilon(t, 3.0, *p[0].Max, 0.02)
	require.WithinDuration(t, now, p[0].LastJobAt, time.Millisecond)
	require.Equal(t, int64(1), p[1].Active)
	p, err = st.Performance(ctx, store.JobFilter{ExecutionType: "shell", Tenants: of.Tenants})
	require.NoError(t, err)
	require.Len(t, p, 1)
	require.Zero(t, *p[0].SuccessRate)

	u, err := st.RunnerUsage(ctx, store.JobFilter{ExecutionType: "http", Tenants: of.Tenants})
	require.NoError(t, err)
	require.Len(t, u, 1)
	require.Equal(t, []any{"http", "runner@a", int64(10), int64(0)}, []any{u[0].ExecutionType, u[0].Runner, u[0].MeasuredJobs, u[0].OOMKilledJobs})
	require.InDelta(t, 5.0, *u[0].TotalCPUSeconds, 1e-9)
	require.InDelta(t, 8.0, *u[0].MaxPeakMemoryMB, 1e-9)
	require.Nil(t, u[0].TotalNetworkRxMB, "nobody measured it")

	h, err := st.QueueHealth(ctx, store.JobFilter{ExecutionType: "serverless", Tenants: of.Tenants})
	require.NoError(t, err)
	require.Len(t, h, 1)
	require.Equal(t, []int64{0, 1, 0, 0, 1}, []int64{h[0].Pending, h[0].Running, h[0].WaitingForRetry, h[0].Overdue, h[0].CompletedLastHour})
	require.Greater(t, *h[0].LongestRunningSeconds, 170.0)
	require.Nil(t, h[0].OldestPendingSeconds)

	c, err := st.Costs(ctx, store.JobFilter{Service: "fn", ExecutionType: "serverless", Tenants: of.Tenants})
	require.NoError(t, err)
	require.Len(t, c, 1)
	require.Equal(t, []any{int64(2), 1.0, 0.5, 0.75, 0.25}, []any{c[0].PricedJobs, c[0].Total, c[0].Average, c[0].Max, c[0].LastHour})
	require.InDelta(t, 100, *c[0].BilledDurationMS, 1e-9)
	require.False(t, c[0].FirstJobAt.IsZero() || c[0].LastJobAt.IsZero())
	c, err = st.Costs(ctx, store.JobFilter{Service: "api", Tenants: of.Tenants})
	require.NoError(t, err)
	require.Empty(t, c)

	v, err := st.Violations(ctx, store.JobFilter{Service: "sh", Tenants: of.Tenants}, 10)
	require.NoError(t, err)
	require.Len(t, v, 2)
	require.Equal(t, store.Violation{
		ErrorCode: "POLICY_VIOLATION",
		JobID:     denied.ID, RunID: run.ID, StepPath: denied.StepPath, Service: "sh", Operation: "echo", ExecutionType: "shell",
		Rule: "allowed_commands", Attempted: "/bin/rm", Detail: "add it", PolicyDigest: "d", Runner: "shell@b", Subject: "ann",
		TenantID: tenant, OccurredAt: denied.CompletedAt,
	}, *v[0])
	require.Equal(t, []string{bare.ID, "", "not even checked"}, []string{v[1].JobID, v[1].Rule, v[1].Detail})
	for want, f := range map[int]store.JobFilter{
		0: {Service: "sh' OR true --"}, 1: {Since: now.Add(-2 * time.Hour)}, 2: {ExecutionType: "shell"},
	} {
		f.Tenants = of.Tenants
		v, err = st.Violations(ctx, f, 10)
		require.NoError(t, err)
		require.Len(t, v, want, "%+v", f)
	}
	v, err = st.Violations(ctx, store.JobFilter{Tenants: of.Tenants}, 1)
	require.NoError(t, err)
	require.Len(t, v, 1)

	f, err := st.Figures(ctx, store.JobFilter{Service: "api", Since: now.Add(-21 * time.Minute), Tenants: of.Tenants}, 100)
	require.NoError(t, err)
	require.Len(t, f, 12, "a job that is as old as that counts")
	require.Equal(t, "get put", f[0].Operation+" "+f[11].Operation, "newest first")
	require.InDelta(t, 1.0, *f[0].DurationSeconds, 1e-6)
	require.JSONEq(t, `{"cpu_seconds": 0.5, "peak_memory_mb": 8}`, string(f[0].ResourceUsage))
	require.Equal(t, []any{run.ID, store.Completed, 1, ""}, []any{f[0].RunID, f[0].Status, f[0].Attempts, f[0].ErrorCode})
	f, err = st.Figures(ctx, store.JobFilter{ExecutionType: "http", Failed: true, Tenants: of.Tenants}, 2)
	require.NoError(t, err)
	require.Len(t, f, 2)
	require.Equal(t, "REMOTE_ERROR", f[0].ErrorCode)
	require.Equal(t, "answer 0: "+strings.Repeat("ü", store.MaxErrorMessage-len("answer 0: ")), f[0].ErrorMessage)
	require.Nil(t, f[0].ResourceUsage)
	require.Equal(t, now.Add(-20*time.Minute+3*time.Second), f[0].EndedAt)
	f, err = st.Figures(ctx, store.JobFilter{Service: "fn", Tenants: of.Tenants}, 1)
	require.NoError(t, err)
	require.Equal(t, store.Running, f[0].Status)
	require.True(t, f[0].DurationSeconds == nil && f[0].EndedAt.IsZero(), fmt.Sprint(f[0]))
}
