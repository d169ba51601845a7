package storetest

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// testDenials: what a policy ended is a row a rule, whatever the error's code; what a target or a
// machine ended is none.
func testDenials(t *testing.T, st store.Store) {
	ctx := t.Context()
	run := newRun()
	commit(t, st, create(run))
	now := time.Now().UTC().Truncate(time.Microsecond)
	r := change(run)
	add := func(code fault.Code, age time.Duration, security string) *store.Job {
		j := newJob(run)
		j.Status, j.Err = store.Failed, fault.New(code, "why not")
		j.CreatedAt, j.StartedAt, j.CompletedAt = now.Add(-age), now.Add(-age), now.Add(-age)
		if security != "" {
			j.SecurityContext = json.RawMessage(security)
		}
		r.NewJobs = append(r.NewJobs, j)
		return j
	}
	memory := add(fault.ResourceExceeded, time.Minute, `{"checks": [{"rule": "allowed_commands", "subject": "/bin/cat", "allowed": true},
		{"rule": "resource_limits.memory_mb", "subject": "more than 64 MiB", "detail": "raise it", "rule_source": "r.yaml:7:3",
		 "allowed_by": [{"key": "resource_limits.memory_mb", "above": 64}]}]}`)
	add(fault.ResourceExceeded, time.Minute, "") // the machine's own memory
	rate := add(fault.RateLimited, 2*time.Minute, `{"checks": [{"rule": "rate_limit_per_minute", "subject": "svc"}]}`)
	add(fault.RateLimited, time.Minute, `{"checks": [{"rule": "allowed_domains", "subject": "h", "allowed": true}]}`) // a 429
	budget := add(fault.BudgetExceeded, 3*time.Minute, "")
	add(fault.RemoteError, time.Minute, `{"checks": [{"rule": "tls", "subject": "h"}]}`)
	violation := add(fault.PolicyViolation, 4*time.Minute, `{"runner": "sh@h", "checks": [{"rule": "a", "subject": "x"}, {"rule": "b", "subject": "y"}]}`)
	commit(t, st, r)

	v, err := st.Violations(ctx, store.JobFilter{}, 10)
	require.NoError(t, err)
	var got [][4]string
	for _, d := range v {
		got = append(got, [4]string{d.JobID, d.ErrorCode, d.Rule, d.Attempted})
	}
	require.Equal(t, [][4]string{
		{memory.ID, "RESOURCE_EXCEEDED", "resource_limits.memory_mb", "more than 64 MiB"},
		{rate.ID, "RATE_LIMITED", "rate_limit_per_minute", "svc"},
		{budget.ID, "BUDGET_EXCEEDED", "", ""},
		{violation.ID, "POLICY_VIOLATION", "a", "x"},
		{violation.ID, "POLICY_VIOLATION", "b", "y"},
	}, got)
	require.Equal(t, "r.yaml:7:3", v[0].RuleSource)
	require.JSONEq(t, `[{"key": "resource_limits.memory_mb", "above": 64}]`, string(v[0].AllowedBy))
	require.Equal(t, "why not", v[2].Detail)
	require.Empty(t, v[1].AllowedBy)
}
