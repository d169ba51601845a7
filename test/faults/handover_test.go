package faults

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/pkg/client"
)

// silence is how long an orchestrator may be silent before the others take its runs over.
const silence = 5 * time.Second

// signalled is a workflow that waits for a signal between two calls.
func signalled() *shape {
	s := &shape{name: "signalled", last: "after", before: map[string]string{"ahead": "", "after": "ahead"}}
	s.yaml = fmt.Sprintf("actions:\n  - %s\n  - await_signal: {name: go, timeout: 600}\n  - %s\noutput: {token: $after.token}\n", call("ahead", ""), call("after", "ahead"))
	return s
}

// waiting are runs of an orchestrator that wait for a signal.
func (l *load) waiting(o int, prefix string, n int) []string {
	t := l.m.t
	t.Helper()
	s := signalled()
	var ids []string
	for i := range n {
		key := fmt.Sprintf("%s-%d", prefix, i)
		require.NoError(t, l.begin(t.Context(), o, key, s))
		ids = append(ids, l.acknowledged[key])
	}
	require.Eventually(t, func() bool {
		var waiting int
		err := l.m.db.QueryRow(t.Context(), "SELECT count(*) FROM jobs.tb_workflow_step WHERE kind = 'await_signal' AND status = 'running' AND run_id::text = ANY($1)", ids).Scan(&waiting)
		return err == nil && waiting == n
	}, patience, 20*time.Millisecond, "the runs wait for a signal")
	return ids
}

// untilOwned waits until runs are owned by a process, which is seen by who wrote that.
func (m *mesh) untilOwned(ids []string, writer string) {
	m.t.Helper()
	require.Eventually(m.t, func() bool {
		var n int
		err := m.db.QueryRow(m.t.Context(), `
SELECT count(*) FROM jobs.tb_workflow_run r
WHERE r.id::text = ANY($1) AND EXISTS (SELECT 1 FROM audit.tb_change c WHERE c.run = r.id::text AND c.epoch = r.epoch AND c.owner = r.owner AND c.writer = $2)`,
			ids, writer).Scan(&n)
		return err == nil && n == len(ids)
	}, patience, 20*time.Millisecond, "%d runs are owned by %s", len(ids), writer)
}

// signalAll sends the runs on, through one orchestrator.
func (m *mesh) signalAll(o *orchestrator, ids []string) {
	m.t.Helper()
	for _, id := range ids {
		_, err := o.client.Signal(m.t.Context(), id, "go", nil)
		require.NoError(m.t, err)
	}
}

// requireOnce fails where a step was asked for more than once.
func (m *mesh) requireOnce(sum summary) {
	m.t.Helper()
	require.Zero(m.t, sum.repeats, "nothing is repeated")
}

// An orchestrator that drains hands the runs that wait over at once, and ends the call that is under way, whose run goes on elsewhere.
func TestDrainHandsOver(t *testing.T) {
	const waits = 20
	m := startMesh(t, size{orchestrators: 2, runners: 2})
	l := newLoad(m)
	ids := l.waiting(0, "waits", waits)
	m.recorder.hold("s1")
	require.NoError(t, l.begin(t.Context(), 0, "calls", chain(3)))
	require.NoError(t, m.recorder.begun(t.Context(), "s1", 1))

	asked := time.Now()
	leaving := m.orchestrators[0].process()
	leaving.signal(syscall.SIGTERM)
	m.untilOwned(ids, "o2")
	require.True(t, leaving.alive(), "the call is under way")
	m.signalAll(m.orchestrators[1], ids)
	require.NoError(t, m.recorder.begun(t.Context(), "after", waits))
	require.Len(t, m.recorder.of("", "s1"), 1)
	m.recorder.release("s1")
	require.NoError(t, m.untilEnded(t.Context(), patience))
	select {
	case <-leaving.ended:
	case <-time.After(patience):
		require.Fail(t, "it does not end although nothing is left to do")
	}
	require.Zero(t, leaving.cmd.ProcessState.ExitCode())

	sum, bad, e := m.verdict(t.Context(), l)
	took, late := takeovers(e.changes, "o1", asked, takeoverLimit)
	m.requireGood(append(bad, late...))
	m.requireOnce(sum)
	require.Equal(t, waits+1, took.runs)
	// The run of the call is handed over once the call has ended; the others are not kept waiting for it.
	handed := map[string]time.Duration{}
	for _, c := range e.changes {
		if _, ok := handed[c.Run]; !ok && c.Epoch > 1 {
			handed[c.Run] = c.At.Sub(asked)
		}
	}
	var longest time.Duration
	for _, id := range ids {
		longest = max(longest, handed[id])
	}
	require.Less(t, longest, silence, "handed over, and not found to be silent")
	t.Logf("%d runs had another owner %d to %d ms after SIGTERM", waits, took.first.Milliseconds(), longest.Milliseconds())
}

// An orchestrator that is stopped for longer than it may be silent loses its runs. When it goes on, what it writes changes nothing, it
// serves fresh runs, and the request that it had under way has ended although nobody closed a connection.
func TestStoppedOrchestrator(t *testing.T) {
	const waits = 20
	m := startMesh(t, size{orchestrators: 2, runners: 2})
	o1, o2 := m.orchestrators[0], m.orchestrators[1]
	// Each orchestrator has a runner of its own, so that the second one cannot attach to what the first one has begun.
	o1.runners[1].sever()
	o2.runners[0].sever()
	l := newLoad(m)
	ids := l.waiting(0, "waits", waits)
	m.recorder.hold("s1")
	require.NoError(t, l.begin(t.Context(), 0, "calls", chain(3)))
	calls := l.acknowledged["calls"]
	require.NoError(t, m.recorder.begun(t.Context(), "s1", 1))

	stopped := time.Now()
	o1.process().stop()
	m.untilOwned(append(ids, calls), "o2")
	require.NoError(t, m.recorder.begun(t.Context(), "s1", 2), "the second one makes the call again")
	require.NoError(t, m.recorder.wait(t.Context(), "the end of the request of the one that is stopped", func() bool {
		for _, f := range m.recorder.effects {
			if f.Step == "s1" {
				return !f.Gone.IsZero() // the first of them
			}
		}
		return false
	}))
	lapsed := time.Since(stopped)
	m.signalAll(o2, ids[:waits/2])
	o1.process().cont()

	m.recorder.release("s1")
	m.signalAll(o1, ids[waits/2:])
	require.NoError(t, m.untilEnded(t.Context(), patience))
	// It serves, with runs of its own.
	require.True(t, o1.process().alive())
	require.Eventually(t, func() bool {
		run, err := o1.client.ExecuteAndWait(t.Context(), client.Action{Workflow: chain(2).yaml})
		if err != nil {
			return false
		}
		l.asked[run.GetIdempotencyKey()] = chain(2)
		var foreign int
		err = m.db.QueryRow(t.Context(), "SELECT count(*) FROM audit.tb_change WHERE run = $1 AND writer <> 'o1'", run.GetId()).Scan(&foreign)
		return err == nil && foreign == 0
	}, patience, 20*time.Millisecond, "a run of its own")

	sum, bad, e := m.verdict(t.Context(), l)
	took, late := takeovers(e.changes, "o1", stopped, takeoverLimit)
	m.requireGood(append(bad, late...))
	require.Equal(t, waits+1, took.runs)
	require.GreaterOrEqual(t, sum.repeats, 1)
	lost := map[string]int64{}
	for _, c := range e.changes {
		if c.Owner != "" && c.Epoch > 1 && lost[c.Run] == 0 {
			lost[c.Run] = c.N
		}
	}
	for _, c := range e.changes {
		if at := lost[c.Run]; at > 0 && c.N > at && c.Writer == "o1" && c.Run == calls {
			require.Fail(t, "a stale write", "change %d: %+v", c.N, c)
		}
	}
	t.Logf("%d runs had another owner %.1f to %.1f s after SIGSTOP, and the request under way was ended after %.1f s",
		took.runs, took.first.Seconds(), took.longest.Seconds(), lapsed.Seconds())
}
