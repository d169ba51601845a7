package engine_test

import (
	"context"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// elsewhere is a store of runs that another orchestrator walks.
type elsewhere struct {
	members

	lock  sync.Mutex
	ended map[string]bool
	asked int
}

func (s *elsewhere) Run(_ context.Context, id string) (*store.Run, error) {
	s.lock.Lock()
	defer s.lock.Unlock()
	r := &store.Run{ID: id, Status: store.Running, Sequence: 1, Owner: "other"}
	if s.ended[id] {
		r.Status, r.Sequence = store.Completed, 2
	}
	return r, nil
}

func (s *elsewhere) RunStates(ctx context.Context, ids []string) (map[string]store.RunState, error) {
	states := map[string]store.RunState{}
	for _, id := range ids {
		r, _ := s.Run(ctx, id)
		states[id] = store.RunState{Status: r.Status, Sequence: r.Sequence}
	}
	s.lock.Lock()
	defer s.lock.Unlock()
	s.asked++
	return states, nil
}

func (*elsewhere) Jobs(context.Context, string, int64) ([]*store.Job, error) { return nil, nil }

func (s *elsewhere) asks() int {
	s.lock.Lock()
	defer s.lock.Unlock()
	return s.asked
}

func (s *elsewhere) end(id string) {
	s.lock.Lock()
	defer s.lock.Unlock()
	s.ended[id] = true
}

// Runs that are walked elsewhere are followed soon, also after a time in which nobody watched any, and are not asked for in between.
func TestRunsOfOthersAreFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &elsewhere{members: members{beats: map[string]int64{}}, ended: map[string]bool{}}
		e := engine.New(engine.Options{Store: s, Owner: "me", Logger: slog.New(slog.DiscardHandler)})
		_, err := e.Join(t.Context())
		require.NoError(t, err)
		defer e.Close(t.Context())
		for _, id := range []string{"first", "second", "third"} {
			before := s.asks()
			pass(time.Minute)
			require.Equal(t, before, s.asks())
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			done := make(chan error, 1)
			go func() { done <- e.Wait(ctx, id) }()
			pass(time.Second)
			s.end(id)
			began := time.Now()
			require.NoError(t, <-done)
			require.LessOrEqual(t, time.Since(began), 100*time.Millisecond)
			cancel()
		}
	})
}
