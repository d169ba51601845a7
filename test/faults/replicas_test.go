package faults

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/client"
	"github.com/specql/mesh/pkg/fault"
)

// A run is served by any replica, whoever owns it: it is shown, followed, signalled and cancelled.
func TestAnyReplicaServesAnyRun(t *testing.T) {
	m := startMesh(t, size{orchestrators: 2, runners: 2})
	other := m.orchestrators[1].client
	l := newLoad(m)
	id := l.waiting(0, "waits", 1)[0]
	m.untilOwned([]string{id}, "o1")

	run, err := other.Get(t.Context(), id)
	require.NoError(t, err)
	require.Equal(t, "STATUS_RUNNING", run.GetStatus().String())
	require.Len(t, run.GetWaiting(), 1)
	require.Equal(t, "go", run.GetWaiting()[0].GetSignal())

	// Followed through the other one from its start to its end; the signal is sent once the watcher has seen what there was.
	var steps, states []string
	err = other.Watch(t.Context(), id, func(e *client.Event) error {
		if j := e.GetJob(); j != nil {
			steps = append(steps, j.GetInput().AsMap()["step"].(string)+" "+j.GetStatus().String())
			if len(steps) == 1 {
				_, err := other.Signal(t.Context(), id, "go", nil)
				return err
			}
		}
		if r := e.GetRun(); r != nil {
			states = append(states, r.GetStatus().String())
		}
		return nil
	})
	require.NoError(t, err)
	require.Equal(t, "ahead STATUS_COMPLETED", steps[0])
	require.Equal(t, "after STATUS_COMPLETED", steps[len(steps)-1])
	require.Equal(t, "STATUS_COMPLETED", states[len(states)-1])

	// Cancelled through the other one: the answer comes when the request of the run has ended.
	m.recorder.hold("s1")
	held, err := m.orchestrators[0].client.Execute(t.Context(), client.Action{Workflow: chain(2).yaml})
	require.NoError(t, err)
	require.NoError(t, m.recorder.begun(t.Context(), "s1", 1))
	cancelled, err := other.Cancel(t.Context(), held.GetId(), "enough")
	require.NoError(t, err)
	require.Equal(t, "STATUS_CANCELLED", cancelled.GetStatus().String())
	require.Contains(t, cancelled.GetError().GetMessage(), "enough")
	require.NoError(t, m.recorder.wait(t.Context(), "the end of the request", func() bool {
		return !m.recorder.effects[len(m.recorder.effects)-1].Gone.IsZero()
	}))
	require.Empty(t, m.recorder.of("", "s2"))
}

// What is put in force through one replica is in force on all of them.
func TestWhatOneReplicaIsToldAllFollow(t *testing.T) {
	m := startMesh(t, size{orchestrators: 2, runners: 2})
	first, second := m.orchestrators[0], m.orchestrators[1]
	m.apply(t.Context(), first, m.registry+strings.ReplaceAll(m.registry[strings.Index(m.registry, "  - name"):], "worker", "another"))
	m.untilServices(t.Context(), second, 2)
	workflow := strings.ReplaceAll(chain(1).yaml, "worker", "another")
	_, err := second.client.ExecuteAndWait(t.Context(), client.Action{Workflow: workflow})
	require.NoError(t, err)

	_, err = first.client.Registry().SetExecutionTypes(t.Context(), &specqlv1.SetExecutionTypesRequest{Disable: []string{"http"}})
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		_, err := second.client.ExecuteAndWait(t.Context(), client.Action{Workflow: workflow})
		f, ok := fault.As(err)
		return ok && f.Code == fault.Disabled
	}, patience, 20*time.Millisecond, "calls of a type that is disabled elsewhere fail")
	arrived := len(m.recorder.all())
	_, err = first.client.ExecuteAndWait(t.Context(), client.Action{Workflow: workflow})
	require.Error(t, err)
	require.Len(t, m.recorder.all(), arrived, "nothing is called any more")

	_, err = second.client.Registry().SetExecutionTypes(t.Context(), &specqlv1.SetExecutionTypesRequest{Enable: []string{"http"}})
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		_, err := first.client.ExecuteAndWait(t.Context(), client.Action{Workflow: workflow})
		return err == nil
	}, patience, 20*time.Millisecond, "and are made again")
}

// Two starts with one key are one run, also at the same time and through two replicas.
func TestOneKeyIsOneRun(t *testing.T) {
	const keys = 100
	m := startMesh(t, size{orchestrators: 2, runners: 2})
	l := newLoad(m)
	var starts errgroup.Group
	ids := make([][2]string, keys)
	for n := range keys {
		key := fmt.Sprintf("key-%d", n)
		l.asked[key] = chain(2)
		for i, o := range m.orchestrators {
			starts.Go(func() error {
				run, err := o.client.Execute(t.Context(), client.Action{Workflow: chain(2).yaml, IdempotencyKey: key})
				ids[n][i] = run.GetId()
				return err
			})
		}
	}
	require.NoError(t, starts.Wait())
	require.NoError(t, m.untilEnded(t.Context(), patience))
	for n, id := range ids {
		require.Equal(t, id[0], id[1], "key %d", n)
		l.acknowledged[fmt.Sprintf("key-%d", n)] = id[0]
	}
	sum, bad, _ := m.verdict(t.Context(), l)
	m.requireGood(bad)
	m.requireOnce(sum)
	require.Equal(t, keys, sum.runs)
}
