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

	"github.com/google/uuid"
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

func (*members) Owned(context.Context, string) ([]string, []*store.Job, error) { return nil, nil, nil }

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

// Who could not reach the database cannot tell who is silent: after an outage who lived before it has
// about as long as ever to say so.
func TestAnOutageKillsNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &members{beats: map[string]int64{"other": 1}}
		e := joined(t, m)
		defer e.Close(t.Context())
		pass(time.Millisecond)
		for range 3 {
			m.set(func() { m.beats["other"]++ })
			pass(time.Second)
		}
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

// What was seen before an outage counts after it: who died shortly before the database did is not waited for once more. Who was
// late still has half of the time.
func TestAnOutageIsNoNewBeginning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &members{beats: map[string]int64{"dead": 1, "late": 1}}
		e := joined(t, m)
		defer e.Close(t.Context())
		pass(4*time.Second + time.Millisecond)
		m.set(func() { m.down = true })
		pass(6 * time.Second)
		m.set(func() { m.down = false })
		pass(2 * time.Second)
		_, buried := m.get()
		require.Empty(t, buried, "it may only have been cut off earlier, and for longer")
		m.set(func() { m.beats["late"]++ })
		pass(2 * time.Second)
		_, buried = m.get()
		require.Equal(t, []string{"dead"}, buried)
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
	e := w.joinedOn(m, nil)
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

// joinedOn is an engine that has joined on a reader of its own.
func (w *world) joinedOn(reader engine.Reader, options func(*engine.Options)) *engine.Engine {
	w.t.Helper()
	j := store.NewJournal(w.store, store.JournalOptions{})
	o := engine.Options{Journal: j, Store: reader, Plans: w, Dispatcher: w, Clock: fastClock{}, Logger: slog.New(slog.DiscardHandler), Owner: "me"}
	if options != nil {
		options(&o)
	}
	e := engine.New(o)
	w.t.Cleanup(func() {
		e.Close(w.t.Context())
		require.NoError(w.t, j.Close())
	})
	_, err := e.Join(w.t.Context())
	require.NoError(w.t, err)
	return e
}

// lossy loses the answer to a claim that took effect.
type lossy struct {
	engine.Reader
	lose atomic.Bool
	lost atomic.Int64
}

func (l *lossy) Claim(ctx context.Context, owner string, limit int) ([]*store.Run, error) {
	runs, err := l.Reader.Claim(ctx, owner, limit)
	if len(runs) > 0 && l.lose.Load() {
		l.lost.Add(int64(len(runs)))
		return nil, errDown
	}
	return runs, err
}

func TestAClaimWithoutAnAnswerIsFoundAgain(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	reader := &lossy{Reader: w.store}
	e := w.joinedOn(reader, nil)
	reader.lose.Store(true)
	req := w.request(`actions: [{call_service: {service: svc, operation: echo, input: {v: 1}}}]`, nil)
	id := uuid.Must(uuid.NewV7()).String()
	results, err := w.store.Commit(t.Context(), []*store.Record{{RunID: id, Epoch: 1, Sequence: 1, Create: &store.Run{
		ID: id, Action: "orphan", Snapshot: req.Snapshot, Status: store.Pending, Input: []byte("{}"), Owner: "nobody", Epoch: 1, CreatedAt: time.Now(),
	}}})
	require.NoError(t, err)
	require.NoError(t, results[0])
	require.Eventually(t, func() bool { return reader.lost.Load() == 1 }, wait, tick)
	require.Equal(t, store.Completed, w.ended(t, e, id).Status)
}

// A run whose documents are not there ends, and so does one that is cancelled then.
func TestARunThatCannotBeReadFails(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.lostPlans = true
	e := w.joinedOn(w.store, nil)
	id := uuid.Must(uuid.NewV7()).String()
	results, err := w.store.Commit(t.Context(), []*store.Record{{RunID: id, Epoch: 1, Sequence: 1, Create: &store.Run{
		ID: id, Action: "lost", Snapshot: "unknown", Status: store.Pending, Input: []byte("{}"), Owner: "nobody", Epoch: 1, CreatedAt: time.Now(),
	}}})
	require.NoError(t, err)
	require.NoError(t, results[0])
	got := w.ended(t, e, id)
	require.Equal(t, store.Failed, got.Status)
	require.Contains(t, got.Err.Message, "what the run began with is not there")
	require.ErrorContains(t, e.Retry(t.Context(), id), "cannot be retried")
}

// A caller that goes away while nothing can be written leaves no run behind.
func TestACallerThatGoesAwayTakesItsRunBack(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	gate := make(chan struct{})
	stuck := &stuckStore{Store: w.store, gate: gate, stuck: make(chan struct{}, 8)}
	j := store.NewJournal(stuck, store.JournalOptions{})
	e := engine.New(engine.Options{Journal: j, Store: w.store, Plans: w, Dispatcher: w, Clock: fastClock{}, Logger: slog.New(slog.DiscardHandler), Owner: "me"})
	t.Cleanup(func() {
		e.Close(t.Context())
		require.NoError(t, j.Close())
	})
	req := w.request(`actions: [{call_service: {service: svc, operation: echo, input: {v: 1}}}]`, nil)
	first := make(chan error, 1)
	go func() {
		_, err := e.Start(t.Context(), req)
		first <- err
	}()
	<-stuck.stuck // its record is on its way
	ctx, cancel := context.WithCancel(t.Context())
	second := make(chan error, 1)
	go func() {
		_, err := e.Start(ctx, req)
		second <- err
	}()
	require.Eventually(t, func() bool { return e.Walking() == 2 }, wait, tick)
	cancel()
	require.ErrorIs(t, <-second, context.Canceled)
	require.Eventually(t, func() bool { return e.Walking() == 1 }, wait, tick)
	close(gate)
	require.NoError(t, <-first)
	e.Close(t.Context())
	runs, err := w.store.Runs(t.Context(), store.RunFilter{})
	require.NoError(t, err)
	require.Len(t, runs, 1)
}

// stuckStore holds its commits back.
type stuckStore struct {
	store.Store
	gate, stuck chan struct{}
}

func (s *stuckStore) Commit(ctx context.Context, records []*store.Record) ([]error, error) {
	select {
	case s.stuck <- struct{}{}:
	default:
	}
	<-s.gate
	return s.Store.Commit(ctx, records)
}

// What waits for a slot is given up as soon as draining begins, not when the last call has ended.
func TestDrainingGivesTheBacklogUpAtOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	release := make(chan struct{})
	w.behave["hang"] = func(_ context.Context, c *engine.Call, _ map[string]any) *engine.Outcome {
		<-release
		return &engine.Outcome{Output: c.Job.Input}
	}
	e := w.joinedOn(w.store, func(o *engine.Options) { o.MaxRuns = 1 })
	_, err := e.Start(t.Context(), w.request(`actions: [{call_service: {service: svc, operation: hang}}]`, nil))
	require.NoError(t, err)
	require.Equal(t, "hang", <-w.arrive)
	waiting, err := e.Start(t.Context(), w.request(`actions: [{call_service: {service: svc, operation: echo}}]`, nil))
	require.NoError(t, err)
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		e.Close(t.Context())
	}()
	require.Eventually(t, func() bool {
		r, err := w.store.Run(t.Context(), waiting.ID)
		return err == nil && r.Owner == ""
	}, wait, tick)
	close(release)
	<-closed
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
