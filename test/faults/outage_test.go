package faults

import (
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/test/pgtest"
)

// A database that is away for longer than an orchestrator may be silent costs nothing: the calls in flight end meanwhile, their results
// are written when it is back, nobody is taken for dead, and nothing is called again.
func TestDatabaseIsAway(t *testing.T) {
	const runs = 50
	for _, mode := range []pgtest.Mode{pgtest.Fast, pgtest.Immediate} {
		t.Run(map[pgtest.Mode]string{pgtest.Fast: "shut down", pgtest.Immediate: "crashed"}[mode], func(t *testing.T) {
			m := startMesh(t, size{orchestrators: 2, runners: 2})
			l := newLoad(m)
			m.recorder.hold("s1")
			for n := range runs {
				require.NoError(t, l.begin(t.Context(), n, fmt.Sprintf("run-%d", n), chain(3)))
			}
			require.NoError(t, m.recorder.begun(t.Context(), "s1", runs))

			require.NoError(t, m.cluster.Stop(mode))
			m.recorder.release("s1")
			require.NoError(t, m.recorder.wait(t.Context(), "the answer to each call", func() bool {
				answered := 0
				for _, f := range m.recorder.effects {
					if !f.Ended.IsZero() {
						answered++
					}
				}
				return answered == runs
			}))
			// Each has missed enough beats to be taken for dead by now.
			for _, o := range m.orchestrators {
				require.Eventually(t, func() bool {
					log := tail(filepath.Join(m.logs, o.name+".log"), 1<<30)
					return strings.Count(log, "could not say that it lives") > int(silence/time.Second)+1
				}, patience, 100*time.Millisecond, "%s sees that the database is away", o.name)
			}
			_, err := m.orchestrators[0].client.Get(t.Context(), l.acknowledged["run-0"])
			f, said := fault.As(err)
			require.True(t, said && f.Code == fault.Unavailable, "clients are told to ask again: %v", err)
			require.NoError(t, m.cluster.Start())
			require.NoError(t, m.untilEnded(t.Context(), patience))
			sum, bad, _ := m.verdict(t.Context(), l)
			m.requireGood(bad)
			m.requireOnce(sum)
			require.Zero(t, sum.takeovers, "nobody was taken for dead")
		})
	}
}

// Fewer connections than the orchestrators would like to have make them slower, and nothing else.
func TestTooFewConnections(t *testing.T) {
	const runs = 300
	m := startMesh(t, size{orchestrators: 2, runners: 2}, "max_connections=12")
	l := newLoad(m)
	var starts errgroup.Group
	starts.SetLimit(64)
	for n := range runs {
		starts.Go(func() error { return l.begin(t.Context(), n, fmt.Sprintf("run-%d", n), chain(3)) })
	}
	require.NoError(t, starts.Wait())
	require.NoError(t, m.untilEnded(t.Context(), patience))
	for _, o := range m.orchestrators { // the tests' own connections find room
		o.process().signal(syscall.SIGTERM)
		<-o.process().ended
	}
	sum, bad, _ := m.verdict(t.Context(), l)
	m.requireGood(bad)
	t.Logf("%s; %d starts refused and repeated", sum, l.refused)
}
