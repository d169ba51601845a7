package faults

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
)

// takeoverLimit is how long the runs of an orchestrator that was killed may wait for another while the database is there.
const takeoverLimit = 10 * time.Second

// 500 runs of five steps go through two orchestrators and two runners, while one orchestrator and one runner are killed, the other
// runner is stopped, and PostgreSQL crashes. The orchestrator stays dead; the runner is started again, as a supervisor does, so
// that there is one left while the other is stopped for good.
func TestFaults(t *testing.T) {
	const runs, steps = 500, 5
	m := startMesh(t, size{orchestrators: 2, runners: 2})
	m.recorder.slow(20 * time.Millisecond)
	l := newLoad(m)
	begin := time.Now()
	var starts errgroup.Group
	starts.SetLimit(32)
	shape := chain(steps)
	var killedAt time.Time
	var away time.Duration
	faults := []struct {
		at     int // requests that have arrived
		strike func() error
	}{
		{runs * steps * 1 / 10, func() error { killedAt = m.orchestrators[0].kill(); return nil }},
		{runs * steps * 3 / 10, func() error { m.runners[0].kill(); return m.runners[0].start(t.Context()) }},
		{runs * steps * 5 / 10, func() (err error) { away, err = m.restartDatabase(); return err }},
		{runs * steps * 7 / 10, func() error { m.runners[1].process().stop(); return nil }},
	}
	struck := make(chan error, 1)
	go func() {
		for _, f := range faults {
			if err := m.recorder.arrived(t.Context(), f.at); err != nil {
				struck <- err
				return
			}
			t.Logf("%5.1f s: %d requests", time.Since(begin).Seconds(), f.at)
			if err := f.strike(); err != nil {
				struck <- err
				return
			}
		}
		struck <- nil
	}()
	for n := range runs {
		starts.Go(func() error { return l.begin(t.Context(), n, fmt.Sprintf("run-%d", n), shape) })
	}
	require.NoError(t, starts.Wait())
	require.NoError(t, <-struck)
	require.NoError(t, m.untilEnded(t.Context(), patience))
	ended := time.Since(begin)
	require.Len(t, l.acknowledged, runs)
	sum, bad, e := m.verdict(t.Context(), l)
	took, late := takeovers(e.changes, m.orchestrators[0].name, killedAt, takeoverLimit+away)
	m.requireGood(append(bad, late...))
	require.NotZero(t, took.runs, "the orchestrator that was killed had runs")
	t.Logf("%.1f s: %s; %d runs of the dead orchestrator had another owner after %.1f to %.1f s, in which the database was away for %.1f s",
		ended.Seconds(), sum, took.runs, took.first.Seconds(), took.longest.Seconds(), away.Seconds())
}
