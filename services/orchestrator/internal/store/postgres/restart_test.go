package postgres

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/services/orchestrator/internal/store"
	"github.com/specql/mesh/test/pgtest"
)

func newID() string { return uuid.Must(uuid.NewV7()).String() }

// create is the record that creates a running run with a job.
func create(id string) *store.Record {
	return &store.Record{
		RunID: id, Epoch: 1, Sequence: 1,
		Create:  &store.Run{ID: id, Action: "act", Status: store.Running, Owner: "a", Epoch: 1, Sequence: 1, CreatedAt: time.Now()},
		NewJobs: []*store.Job{newJob(id, 1)},
	}
}

func newJob(runID string, n int64) *store.Job {
	return &store.Job{
		ID: newID(), RunID: runID, StepPath: fmt.Sprintf("steps[%d]", n), Service: "api", Operation: "call", ExecutionType: "http",
		Status: store.Running, Attempts: 1, MaxAttempts: 4, Sequence: n, CreatedAt: time.Now(), StartedAt: time.Now(),
	}
}

// TestServerRestarts: the server goes down at once, several times, in the middle of commits. What was acknowledged is there, nothing
// is there twice, and writers only wait.
func TestServerRestarts(t *testing.T) {
	c := pgtest.Start(t)
	url := c.NewDatabase(t)
	_, err := Migrate(t.Context(), Options{URL: url})
	require.NoError(t, err)
	st := openAt(t, url)
	j := store.NewJournal(st, store.JournalOptions{})

	heard := make(chan store.Notice, 1000)
	listening, stop := context.WithCancel(t.Context())
	listened := make(chan error, 1)
	go func() { listened <- st.Listen(listening, func(n store.Notice) { heard <- n }) }()

	const writers, restarts = 16, 3
	var acknowledged [writers]int64
	var total atomic.Int64
	runs := make([]string, writers)
	done := make(chan struct{})
	var writing sync.WaitGroup
	errs := make([]error, writers)
	for i := range writers {
		runs[i] = newID()
		writing.Go(func() {
			r := create(runs[i])
			for n := int64(1); ; n++ {
				if errs[i] = j.Append(context.WithoutCancel(t.Context()), r); errs[i] != nil {
					return
				}
				acknowledged[i] = n
				total.Add(1)
				select {
				case <-done:
					return
				default:
				}
				r = &store.Record{RunID: runs[i], Epoch: 1, Sequence: n + 1, NewJobs: []*store.Job{newJob(runs[i], n+1)}}
			}
		})
	}
	for range restarts {
		before := total.Load()
		require.Eventually(t, func() bool { return total.Load() > before+200 }, time.Minute, time.Millisecond)
		require.NoError(t, c.Stop(pgtest.Immediate))
		_, err := st.Run(t.Context(), runs[0])
		require.ErrorIs(t, err, store.ErrUnavailable)
		require.NotErrorIs(t, err, store.ErrNotFound)
		_, err = st.Commit(t.Context(), []*store.Record{create(newID())})
		require.ErrorIs(t, err, store.ErrUnavailable)
		require.NoError(t, c.Start())
	}
	before := total.Load()
	require.Eventually(t, func() bool { return total.Load() > before+200 }, time.Minute, time.Millisecond)
	close(done)
	writing.Wait()
	require.NoError(t, j.Close())
	for i, id := range runs {
		require.NoError(t, errs[i])
		h, err := st.History(t.Context(), id)
		require.NoError(t, err)
		require.Equal(t, acknowledged[i], h.Run.Sequence)
		require.Len(t, h.Jobs, int(acknowledged[i]), "each record once")
	}

	// Whoever listened hears again, after each connection of everything that may have been missed.
	seen := map[store.Notice]int{}
	limit := time.After(time.Minute)
	for seen[store.NoticeWork] < 2 || seen[store.NoticeRequest] < 2 || seen[store.NoticeRegistry] < 2 {
		select {
		case n := <-heard:
			seen[n]++
		case <-limit:
			require.Fail(t, "no notices after the restart", "%v", seen)
		}
	}
	// A connection's own notices begin with that of work: more of requests than of work is a signal's doing.
	// One that was sent before the last connection listened is lost.
	for seen[store.NoticeRequest] <= seen[store.NoticeWork] {
		select {
		case n := <-heard:
			seen[n]++
		case <-time.After(200 * time.Millisecond):
			require.NoError(t, st.AddSignal(t.Context(), &store.Signal{RunID: runs[0], Name: "go"}))
		case <-limit:
			require.Fail(t, "no notice of the signal", "%v", seen)
		}
	}
	stop()
	require.ErrorIs(t, <-listened, context.Canceled)
}

// TestStoppedConnections: the database ends every connection; the next caller gets a new one.
func TestStoppedConnections(t *testing.T) {
	st := openTest(t)
	id := newID()
	results, err := st.Commit(t.Context(), []*store.Record{create(id)})
	require.NoError(t, err)
	require.NoError(t, results[0])
	require.NoError(t, run(t, st, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"))
	require.Eventually(t, func() bool {
		_, err := st.Run(t.Context(), id)
		return err == nil
	}, time.Minute, time.Millisecond)
}

// TestTooManyConnections: a server without room is not there for now; nothing is refused for good.
func TestTooManyConnections(t *testing.T) {
	c := pgtest.Start(t, "max_connections=5", "superuser_reserved_connections=0")
	url := c.NewDatabase(t)
	_, err := Migrate(t.Context(), Options{URL: url})
	require.NoError(t, err)
	st, err := Open(t.Context(), Options{URL: url, MaxConnections: 20})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, st.Close()) })
	j := store.NewJournal(st, store.JournalOptions{})
	var wg sync.WaitGroup
	var good, unavailable atomic.Int64
	for range 20 {
		wg.Go(func() {
			id := newID()
			if err := j.Append(t.Context(), create(id)); err != nil {
				t.Error(err)
			}
			for {
				_, err := st.History(t.Context(), id)
				if err == nil {
					good.Add(1)
					return
				}
				if !errors.Is(err, store.ErrUnavailable) {
					t.Error(err)
					return
				}
				unavailable.Add(1)
			}
		})
	}
	wg.Wait()
	require.NoError(t, j.Close())
	require.Equal(t, int64(20), good.Load())
	t.Logf("%d reads had to wait for a connection", unavailable.Load())
}

// TestServerHangs: the sessions of the server stop in the middle of a commit. The store gives up waiting and tries again on
// others, but writes nothing until it is certain what became of the first try, which the server carries out when it goes on.
func TestServerHangs(t *testing.T) {
	url := ready(t)
	st, err := Open(t.Context(), Options{URL: url, Timeout: time.Second})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, st.Close()) })
	j := store.NewJournal(st, store.JournalOptions{})
	id := newID()
	require.NoError(t, j.Append(t.Context(), create(id)))
	c := pgtest.Shared(t)
	for n := int64(2); n <= 4; n++ {
		var stopped []int
		for pid := range strings.Lines(c.Psql(t, url, "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'specql-orchestrator'")) {
			number, err := strconv.Atoi(strings.TrimSpace(pid))
			require.NoError(t, err)
			require.NoError(t, syscall.Kill(number, syscall.SIGSTOP))
			stopped = append(stopped, number)
		}
		goOn := sync.OnceFunc(func() {
			for _, pid := range stopped {
				_ = syscall.Kill(pid, syscall.SIGCONT)
			}
		})
		t.Cleanup(goOn)
		appended := make(chan error, 1)
		go func() {
			appended <- j.Append(t.Context(), &store.Record{RunID: id, Epoch: 1, Sequence: n, NewJobs: []*store.Job{newJob(id, n)}})
		}()
		require.Eventually(t, func() bool {
			st.mu.RLock()
			defer st.mu.RUnlock()
			return len(st.doubts) > 0
		}, time.Minute, time.Millisecond)
		_, err := st.RunStates(t.Context(), []string{id})
		require.ErrorIs(t, err, store.ErrUnavailable, "nobody can say")
		select {
		case err := <-appended:
			require.Fail(t, "the record cannot have been written", "%v", err)
		default:
		}
		goOn()
		require.NoError(t, <-appended)
		h, err := st.History(t.Context(), id)
		require.NoError(t, err)
		require.Equal(t, n, h.Run.Sequence)
		require.Len(t, h.Jobs, int(n), "once")
	}
	require.NoError(t, j.Close())
}
