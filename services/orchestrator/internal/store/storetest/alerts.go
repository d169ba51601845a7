package storetest

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// testAlerts: one owner at a time evaluates, what it writes is fenced, and all of it is there for the next.
func testAlerts(t *testing.T, st store.Store) {
	ctx := t.Context()
	leader, err := st.AlertLeader(ctx)
	require.NoError(t, err)
	require.Empty(t, leader)
	lead := func(owner string, lease time.Duration) bool {
		t.Helper()
		ok, err := st.LeadAlerts(ctx, owner, lease)
		require.NoError(t, err)
		return ok
	}
	require.True(t, lead("a", time.Minute))
	require.True(t, lead("a", time.Minute), "it goes on")
	require.False(t, lead("b", time.Minute))
	leader, err = st.AlertLeader(ctx)
	require.NoError(t, err)
	require.Equal(t, "a", leader)

	now := time.Now().UTC().Truncate(time.Microsecond)
	firing := &store.AlertState{
		Name: `Größe "x"'; --`, State: "firing", Since: now, HeldSince: now.Add(time.Second), EvaluatedAt: now.Add(time.Minute),
		Figures: json.RawMessage(`{"http_failures": 12}`), Detail: "why",
	}
	quiet := &store.AlertState{Name: "quiet", State: "inactive", Since: now, EvaluatedAt: now}
	event := func(at time.Time, notify string) *store.AlertEvent {
		e := &store.AlertEvent{
			ID: uuid.NewString(), Alert: firing.Name, From: "pending", To: "firing", OccurredAt: at,
			Figures: json.RawMessage(`{"http_failures": 12}`), Notify: notify,
		}
		if notify != "" {
			e.NotifyInput = json.RawMessage(`{"alert": "x"}`)
		}
		return e
	}
	first, second := event(now, store.NotifyPending), event(now.Add(time.Second), "")
	require.ErrorIs(t, st.SaveAlerts(ctx, "b", []*store.AlertState{quiet}, nil), store.ErrFenced)
	require.NoError(t, st.SaveAlerts(ctx, "a", []*store.AlertState{firing, quiet}, []*store.AlertEvent{first, second}))
	states, err := st.AlertStates(ctx)
	require.NoError(t, err)
	require.Len(t, states, 2)
	require.JSONEq(t, string(firing.Figures), string(states[0].Figures))
	require.JSONEq(t, "{}", string(states[1].Figures))
	states[0].Figures, states[1].Figures = firing.Figures, nil
	require.Equal(t, []*store.AlertState{firing, quiet}, states)

	pending, err := st.PendingNotifications(ctx, 10)
	require.NoError(t, err)
	require.Len(t, pending, 1)
	require.Equal(t, first.ID, pending[0].ID)
	require.JSONEq(t, `{"alert": "x"}`, string(pending[0].NotifyInput))
	run := uuid.NewString()
	require.NoError(t, st.Notified(ctx, first.ID, run, ""))
	require.NoError(t, st.Notified(ctx, first.ID, "", "too late"))
	pending, err = st.PendingNotifications(ctx, 10)
	require.NoError(t, err)
	require.Empty(t, pending)
	events, err := st.AlertEvents(ctx, firing.Name, 10)
	require.NoError(t, err)
	require.Len(t, events, 2)
	require.Equal(t, []string{second.ID, first.ID}, []string{events[0].ID, events[1].ID}, "newest first")
	require.Equal(t, []any{store.NotifyStarted, run, "", now}, []any{events[1].Notify, events[1].NotifyRunID, events[1].NotifyError, events[1].OccurredAt})

	var many []*store.AlertEvent
	for i := range store.MaxAlertEvents + 5 {
		many = append(many, event(now.Add(time.Duration(i+2)*time.Second), ""))
	}
	require.NoError(t, st.SaveAlerts(ctx, "a", []*store.AlertState{quiet}, many))
	states, err = st.AlertStates(ctx)
	require.NoError(t, err)
	require.Len(t, states, 1, "an alert that is gone is forgotten")
	events, err = st.AlertEvents(ctx, firing.Name, 1000)
	require.NoError(t, err)
	require.Len(t, events, store.MaxAlertEvents)

	// Of one that is gone, what is old is forgotten, too.
	old, young := event(time.Now().Add(-store.RemovedAlertLife-time.Hour), ""), event(time.Now().Add(-time.Hour), "")
	old.Alert, young.Alert = "gone", "gone"
	require.NoError(t, st.SaveAlerts(ctx, "a", []*store.AlertState{quiet}, []*store.AlertEvent{old, young}))
	require.NoError(t, st.SaveAlerts(ctx, "a", []*store.AlertState{quiet}, nil))
	events, err = st.AlertEvents(ctx, "gone", 10)
	require.NoError(t, err)
	require.Len(t, events, 1)
	require.Equal(t, young.ID, events[0].ID)

	// The lease lapses, and the next one has it all.
	require.True(t, lead("a", time.Microsecond))
	require.Eventually(t, func() bool { return lead("b", time.Minute) }, 10*time.Second, time.Millisecond)
	require.ErrorIs(t, st.SaveAlerts(ctx, "a", nil, nil), store.ErrFenced)
	require.NoError(t, st.LeaveAlerts(ctx, "a"), "it is another one's now")
	require.False(t, lead("a", time.Minute))
	require.NoError(t, st.LeaveAlerts(ctx, "b"))
	require.True(t, lead("a", time.Minute))
}

// testWindowFigures: what ended within a window, whenever it began, and nothing else.
func testWindowFigures(t *testing.T, st store.Store) {
	ctx := t.Context()
	now := time.Now().UTC().Truncate(time.Microsecond)
	add := func(subject string, active bool, jobs ...*store.Job) {
		t.Helper()
		run := newRun()
		run.Subject, run.CreatedAt = subject, now.Add(-100*time.Hour)
		commit(t, st, create(run))
		r := change(run)
		r.NewJobs = jobs
		for _, j := range jobs {
			j.RunID = run.ID
		}
		if !active {
			r.Run = &store.RunChange{Status: store.Completed, CompletedAt: now}
		}
		commit(t, st, r)
	}
	n := 0
	job := func(kind string, status store.Status, ago, took time.Duration, code fault.Code, usage string) *store.Job {
		j := newJob(newRun())
		n++
		j.StepPath = fmt.Sprintf("steps[%d]", n)
		j.ExecutionType, j.Status = kind, status
		j.CompletedAt = now.Add(-ago)
		j.StartedAt = j.CompletedAt.Add(-took)
		j.CreatedAt = j.StartedAt
		if status == store.Running {
			j.CompletedAt = time.Time{}
		}
		if code != "" {
			j.Err = fault.New(code, "no")
		}
		if usage != "" {
			j.ResourceUsage = json.RawMessage(usage)
		}
		return j
	}
	rows, err := st.WindowFigures(ctx, now.Add(-time.Hour))
	require.NoError(t, err)
	require.Empty(t, rows)

	add("ann", false,
		job("http", store.Completed, time.Minute, time.Second, "", `{"cost_usd": 0.5}`),
		job("http", store.Completed, 2*time.Minute, 3*time.Second, "", ""),
		job("http", store.Failed, 59*time.Minute, 50*time.Hour, fault.RemoteError, `{"cost_usd": 0.25}`), // began long before the window
		job("http", store.Completed, 61*time.Minute, time.Second, "", `{"cost_usd": 8}`),
		job("http", store.Cancelled, time.Minute, time.Second, fault.Cancelled, ""),
	)
	add("ann", true,
		job("shell", store.Failed, time.Minute, time.Second, fault.ResourceExceeded, ""),
		job("shell", store.Failed, time.Minute, 2*time.Second, fault.PolicyViolation, ""),
		job("shell", store.Running, 0, time.Second, "", ""),
	)
	add(store.AlertSubject, false, job("http", store.Failed, time.Minute, time.Second, fault.RemoteError, ""))
	rows, err = st.WindowFigures(ctx, now.Add(-time.Hour))
	require.NoError(t, err)
	require.Len(t, rows, 3)
	figures := func(f *store.WindowFigures) []any {
		return []any{f.ExecutionType, f.Completed, f.Failed, f.Resource, f.Security, f.CostUSD, *f.P50, *f.P95}
	}
	require.Equal(t, []any{"", int64(2), int64(3), int64(1), int64(1), 0.75, 2.0, 180000.0}, figures(rows[0]))
	require.Equal(t, []any{"http", int64(2), int64(1), int64(0), int64(0), 0.75, 3.0, 180000.0}, figures(rows[1]))
	require.Equal(t, []any{"shell", int64(0), int64(2), int64(1), int64(1), 0.0, 1.0, 2.0}, figures(rows[2]))
	rows, err = st.WindowFigures(ctx, now.Add(-90*time.Second))
	require.NoError(t, err)
	require.Len(t, rows, 3)
	require.Equal(t, int64(1), rows[1].Completed)
}
