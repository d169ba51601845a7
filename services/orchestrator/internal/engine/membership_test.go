package engine_test

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/services/orchestrator/internal/engine"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// members is a store of which only the membership is real.
type members struct {
	engine.Reader

	mu     sync.Mutex
	beats  map[string]int64
	down   bool
	buried []string
	claims []string
}

var errDown = fmt.Errorf("connection refused: %w", store.ErrUnavailable)

func (m *members) Heartbeat(_ context.Context, owner string, register bool) (map[string]int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.down {
		return nil, errDown
	}
	if _, there := m.beats[owner]; !there && !register {
		return nil, store.ErrFenced
	}
	m.beats[owner]++
	return maps.Clone(m.beats), nil
}

func (m *members) Bury(_ context.Context, owner string, beat int64) (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.beats[owner] != beat {
		return false, nil
	}
	delete(m.beats, owner)
	m.buried = append(m.buried, owner)
	return true, nil
}

func (m *members) Claim(_ context.Context, owner string, _ int) ([]*store.Run, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.claims = append(m.claims, owner)
	return nil, nil
}

func (m *members) Retire(_ context.Context, owner string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.beats, owner)
	return nil
}

func (*members) Requests(context.Context, string) (*store.Requests, error) {
	return &store.Requests{}, nil
}

func (*members) Listen(ctx context.Context, _ func(store.Notice)) error {
	<-ctx.Done()
	return ctx.Err()
}

func (*members) ExecutionTypes(context.Context) (map[string]store.ExecutionType, error) {
	return nil, nil
}
func (*members) Maintain(context.Context, time.Duration) error { return nil }

// pass lets time go by, which in a bubble takes none.
func pass(d time.Duration) { <-time.After(d) }

// set changes what the store is like.
func (m *members) set(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f()
}

func (m *members) get() (owners []string, buried []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for name := range m.beats {
		owners = append(owners, name)
	}
	return owners, append([]string(nil), m.buried...)
}

// joined is an engine that knows the others.
func joined(t *testing.T, m *members) *engine.Engine {
	t.Helper()
	e := engine.New(engine.Options{Store: m, Owner: "me", Logger: slog.New(slog.DiscardHandler)})
	_, err := e.Join(t.Context())
	require.NoError(t, err)
	return e
}

func TestASilentOwnerIsBuried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &members{beats: map[string]int64{"silent": 41, "alive": 1}}
		e := joined(t, m)
		defer e.Close(t.Context())
		for range 4 {
			pass(time.Second)
			m.set(func() { m.beats["alive"]++ })
		}
		_, buried := m.get()
		require.Empty(t, buried, "silence has to last for a while")
		for range 3 {
			pass(time.Second)
			m.set(func() { m.beats["alive"]++ })
		}
		owners, buried := m.get()
		require.Equal(t, []string{"silent"}, buried)
		require.ElementsMatch(t, []string{"alive", "me"}, owners)
	})
}

// Who could not reach the database cannot tell who is silent: after an outage the others have
// as long as ever to say that they live.
func TestAnOutageKillsNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &members{beats: map[string]int64{"other": 1}}
		e := joined(t, m)
		defer e.Close(t.Context())
		pass(3 * time.Second)
		m.set(func() { m.down = true })
		pass(time.Minute)
		m.set(func() { m.down = false })
		pass(4 * time.Second)
		_, buried := m.get()
		require.Empty(t, buried)
		m.set(func() { m.beats["other"]++ })
		pass(4 * time.Second)
		_, buried = m.get()
		require.Empty(t, buried)
		pass(4 * time.Second)
		_, buried = m.get()
		require.Equal(t, []string{"other"}, buried)
	})
}

// Calls in flight go on while the database is away, but not for ever: an orchestrator that is
// cut off alone has lost its runs.
func TestLeasesEndWithALongOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &members{beats: map[string]int64{}}
		e := joined(t, m)
		defer e.Close(t.Context())
		m.set(func() { m.down = true })
		pass(time.Minute)
		require.True(t, e.Renew())
		pass(2 * time.Minute)
		require.False(t, e.Renew())
		m.set(func() { m.down = false })
		pass(2 * time.Second)
		require.True(t, e.Renew())
	})
}

// An orchestrator that the others buried lets go of its runs without ending them, and joins
// again under another name.
func TestABuriedOwnerLetsGo(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := &buried{Reader: w.store, owners: make(chan string, 64)}
	let := make(chan error, 1)
	w.behave["hang"] = func(ctx context.Context, _ *engine.Call, _ map[string]any) *engine.Outcome {
		<-ctx.Done()
		let <- context.Cause(ctx)
		return &engine.Outcome{}
	}
	j := store.NewJournal(w.store, store.JournalOptions{})
	e := engine.New(engine.Options{
		Journal: j, Store: m, Plans: w, Dispatcher: w, Clock: fastClock{}, Logger: slog.New(slog.DiscardHandler), Owner: "me",
	})
	t.Cleanup(func() {
		e.Close(t.Context())
		require.NoError(t, j.Close())
	})
	_, err := e.Join(t.Context())
	require.NoError(t, err)
	require.Equal(t, "me", <-m.owners)
	r, err := e.Start(t.Context(), w.request(`actions: [{call_service: {service: svc, operation: hang}}]`, nil))
	require.NoError(t, err)
	require.Equal(t, "hang", <-w.arrive)
	require.Eventually(t, func() bool {
		gone, err := w.store.Bury(t.Context(), "me", m.last.Load()) // between two beats
		return err == nil && gone
	}, wait, tick)
	require.ErrorIs(t, <-let, engine.ErrHandBack)
	again := <-m.owners
	require.NotEqual(t, "me", again)
	got, err := w.store.Run(t.Context(), r.ID)
	require.NoError(t, err)
	require.Equal(t, store.Running, got.Status, "whoever owns it now goes on with it")
	// Here that is the same orchestrator under its new name: it repeats the call.
	require.Equal(t, "hang", <-w.arrive)
	require.Eventually(t, func() bool {
		got, err := w.store.Run(t.Context(), r.ID)
		return err == nil && got.Owner == again && got.Epoch == 2
	}, wait, tick)
	require.NoError(t, e.Cancel(t.Context(), r.ID, "enough"))
}

// buried tells of the owners that register.
type buried struct {
	engine.Reader
	owners chan string
	last   atomic.Int64
}

func (b *buried) Heartbeat(ctx context.Context, owner string, register bool) (map[string]int64, error) {
	beats, err := b.Reader.Heartbeat(ctx, owner, register)
	if err == nil {
		b.last.Store(beats[owner])
		if register {
			b.owners <- owner
		}
	}
	return beats, err
}
