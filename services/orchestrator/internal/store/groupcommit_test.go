package store_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// gateStore is a store whose writes wait until the test lets them through.
type gateStore struct {
	store.Store
	// gate gives each write its outcome; nil lets all through.
	gate chan error

	mu      sync.Mutex
	batches [][]int64 // sequences of the records of each commit that was tried
	order   []string  // what was written, in order
	results func(*store.Record) error
	// states is what the database says of runs after a commit whose outcome was lost.
	states map[string]store.RunState
}

func (g *gateStore) RunStates(context.Context, []string) (map[string]store.RunState, error) {
	return g.states, nil
}

func (g *gateStore) Commit(_ context.Context, records []*store.Record) ([]error, error) {
	if g.gate != nil {
		if err := <-g.gate; err != nil {
			return nil, err
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	var batch []int64
	results := make([]error, len(records))
	for i, r := range records {
		batch = append(batch, r.Sequence)
		g.order = append(g.order, fmt.Sprintf("record %d", r.Sequence))
		if g.results != nil {
			results[i] = g.results(r)
		}
	}
	g.batches = append(g.batches, batch)
	return results, nil
}

func (g *gateStore) AppendLogs(_ context.Context, lines []*store.LogLine) error {
	if g.gate != nil {
		if err := <-g.gate; err != nil {
			return err
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, l := range lines {
		g.order = append(g.order, fmt.Sprintf("line %d", l.Sequence))
	}
	return nil
}

func record(sequence int64) *store.Record { return &store.Record{RunID: "r", Sequence: sequence} }

func logLine(sequence int64) *store.LogLine { return &store.LogLine{RunID: "r", Sequence: sequence} }

// appending appends in the background and returns where the outcome comes.
func appending(ctx context.Context, j *store.Journal, r *store.Record) <-chan error {
	done := make(chan error, 1)
	go func() { done <- j.Append(ctx, r) }()
	synctest.Wait()
	return done
}

func closeJournal(t *testing.T, j *store.Journal) {
	t.Helper()
	require.NoError(t, j.Close())
}

func TestJournalGathersWhileInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := &gateStore{gate: make(chan error)}
		var sizes []int
		j := store.NewJournal(st, store.JournalOptions{MaxBatch: 4, OnCommit: func(n int, _ time.Duration, err error) {
			require.NoError(t, err)
			sizes = append(sizes, n)
		}})
		var done []<-chan error
		for n := range int64(7) {
			done = append(done, appending(t.Context(), j, record(n)))
		}
		for range 3 {
			st.gate <- nil
		}
		for _, d := range done {
			require.NoError(t, <-d)
		}
		closeJournal(t, j)
		require.Equal(t, [][]int64{{0}, {1, 2, 3, 4}, {5, 6}}, st.batches)
		require.Equal(t, []int{1, 4, 2}, sizes)
	})
}

func TestJournalBoundsBatchBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := &gateStore{gate: make(chan error)}
		j := store.NewJournal(st, store.JournalOptions{MaxBatchBytes: 5000})
		var done []<-chan error
		for n := range int64(4) {
			r := record(n)
			r.Steps = []*store.Step{{Data: make([]byte, 3000)}}
			done = append(done, appending(t.Context(), j, r))
		}
		close(st.gate)
		for _, d := range done {
			require.NoError(t, <-d)
		}
		closeJournal(t, j)
		require.Equal(t, [][]int64{{0}, {1}, {2}, {3}}, st.batches)
	})
}

func TestJournalGivesEachItsOutcome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := &gateStore{gate: make(chan error), results: func(r *store.Record) error {
			if r.Sequence%2 == 1 {
				return fmt.Errorf("%d: %w", r.Sequence, store.ErrFenced)
			}
			return nil
		}}
		j := store.NewJournal(st, store.JournalOptions{})
		var done []<-chan error
		for n := range int64(6) {
			done = append(done, appending(t.Context(), j, record(n)))
		}
		close(st.gate)
		for n, d := range done {
			if err := <-d; n%2 == 1 {
				require.ErrorIs(t, err, store.ErrFenced)
				require.ErrorContains(t, err, fmt.Sprint(n))
			} else {
				require.NoError(t, err)
			}
		}
		closeJournal(t, j)
	})
}

func TestJournalWithdrawsWhatWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := &gateStore{gate: make(chan error)}
		j := store.NewJournal(st, store.JournalOptions{})
		ctx, cancel := context.WithCancel(t.Context())
		inFlight := appending(ctx, j, record(1))
		waiting := appending(ctx, j, record(2))
		other := appending(t.Context(), j, record(3))
		cancel()
		require.ErrorIs(t, <-waiting, context.Canceled)
		synctest.Wait()
		select {
		case err := <-inFlight:
			t.Fatalf("the outcome of a record in flight was not waited for: %v", err)
		default:
		}
		st.gate <- nil
		require.NoError(t, <-inFlight, "it was written: its caller has to know")
		st.gate <- nil
		require.NoError(t, <-other)
		require.ErrorIs(t, j.Append(ctx, record(4)), context.Canceled)
		closeJournal(t, j)
		require.Equal(t, [][]int64{{1}, {3}}, st.batches)
	})
}

func TestJournalBoundsItsQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := &gateStore{gate: make(chan error)}
		j := store.NewJournal(st, store.JournalOptions{MaxQueue: 2})
		first := appending(t.Context(), j, record(0))
		queued := []<-chan error{appending(t.Context(), j, record(1)), appending(t.Context(), j, record(2))}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.ErrorIs(t, j.Append(ctx, record(3)), context.DeadlineExceeded)
		late := appending(t.Context(), j, record(4))
		close(st.gate)
		for _, d := range append(queued, first, late) {
			require.NoError(t, <-d)
		}
		closeJournal(t, j)
		require.Equal(t, [][]int64{{0}, {1, 2}, {4}}, st.batches)
	})
}

func TestJournalTriesAgain(t *testing.T) {
	busy := errors.New("the disk is busy")
	synctest.Test(t, func(t *testing.T) {
		st := &gateStore{gate: make(chan error, 10)}
		j := store.NewJournal(st, store.JournalOptions{Tries: 3})
		st.gate <- busy
		st.gate <- busy
		st.gate <- nil
		require.NoError(t, j.Append(t.Context(), record(1)))

		for range 3 {
			st.gate <- busy
		}
		done := []<-chan error{appending(t.Context(), j, record(2))}
		for _, d := range done {
			require.ErrorIs(t, <-d, busy)
		}
		// What came meanwhile is not lost, and a closed store is not asked again.
		st.gate <- nil
		require.NoError(t, j.Append(t.Context(), record(3)))
		st.gate <- store.ErrClosed
		require.ErrorIs(t, j.Append(t.Context(), record(4)), store.ErrClosed)
		closeJournal(t, j)
		require.Equal(t, [][]int64{{1}, {3}}, st.batches)
	})
}

// TestJournalForgivesItsOwnFirstTry: a try whose outcome was unknown did create the run.
func TestJournalForgivesItsOwnFirstTry(t *testing.T) {
	for _, test := range []struct {
		first string
		lost  bool
	}{{"r", false}, {"other", true}} {
		synctest.Test(t, func(t *testing.T) {
			st := &gateStore{gate: make(chan error, 2), results: func(*store.Record) error { return &store.DuplicateError{RunID: test.first} }}
			st.gate <- errors.New("connection reset")
			st.gate <- nil
			j := store.NewJournal(st, store.JournalOptions{})
			err := j.Append(t.Context(), record(1))
			require.Equal(t, test.lost, err != nil, "%v", err)
			closeJournal(t, j)
		})
	}
}

// A commit whose answer was lost had taken effect for one record and not for the other: only
// that one is written again.
func TestJournalWritesNothingTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := &gateStore{gate: make(chan error, 8), states: map[string]store.RunState{
			"written": {Epoch: 1, Sequence: 7}, "before": {Epoch: 1, Sequence: 6}, "taken over": {Epoch: 2, Sequence: 9},
		}}
		j := store.NewJournal(st, store.JournalOptions{})
		held := appending(t.Context(), j, record(1)) // holds the next three back, so that they are one batch
		var done []<-chan error
		for _, id := range []string{"written", "before", "taken over"} {
			done = append(done, appending(t.Context(), j, &store.Record{RunID: id, Epoch: 1, Sequence: 7}))
		}
		st.gate <- nil
		require.NoError(t, <-held)
		st.gate <- fmt.Errorf("the server went away: %w", store.ErrUnavailable)
		st.gate <- nil
		for _, d := range done {
			require.NoError(t, <-d)
		}
		closeJournal(t, j)
		require.Equal(t, [][]int64{{1}, {7, 7}}, st.batches, "the second batch without the record that was written")
	})
}

// While the database cannot be reached nothing is given up, and at the end it is.
func TestJournalWaitsForTheDatabase(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := &gateStore{gate: make(chan error)}
		j := store.NewJournal(st, store.JournalOptions{Tries: 3})
		away := fmt.Errorf("connection refused: %w", store.ErrUnavailable)
		first := appending(t.Context(), j, record(1))
		for range 100 {
			st.gate <- away
		}
		st.gate <- nil
		require.NoError(t, <-first)
		second := appending(t.Context(), j, record(2))
		st.gate <- away
		synctest.Wait()
		closed := make(chan error, 1)
		go func() { closed <- j.Close() }()
		synctest.Wait()
		for range 3 {
			st.gate <- away
		}
		require.ErrorIs(t, <-second, store.ErrUnavailable)
		require.NoError(t, <-closed)
	})
}

// A record that meets somebody's lock holds up no other, and is tried again.
func TestJournalGoesPastALock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var locked atomic.Bool
		locked.Store(true)
		st := &gateStore{results: func(r *store.Record) error {
			if r.RunID == "locked" && locked.Load() {
				return fmt.Errorf("row of orders: %w", store.ErrBusy)
			}
			return nil
		}}
		j := store.NewJournal(st, store.JournalOptions{MaxQueue: 2})
		held := appending(t.Context(), j, &store.Record{RunID: "locked", Sequence: 1})
		for n := range int64(10) {
			require.NoError(t, j.Append(t.Context(), record(n+2)))
		}
		<-time.After(time.Minute)
		select {
		case err := <-held:
			require.Fail(t, "the lock was held", "%v", err)
		default:
		}
		locked.Store(false)
		require.NoError(t, <-held)

		// At the end it is given up.
		locked.Store(true)
		held = appending(t.Context(), j, &store.Record{RunID: "locked", Sequence: 2})
		closeJournal(t, j)
		require.ErrorIs(t, <-held, store.ErrBusy)
	})
}

// Whoever ends while the database is away does not wait for it.
func TestJournalHastens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := &gateStore{gate: make(chan error)}
		j := store.NewJournal(st, store.JournalOptions{Tries: 3, MaxBatch: 1})
		away := fmt.Errorf("connection refused: %w", store.ErrUnavailable)
		var done []<-chan error
		for n := range int64(5) {
			done = append(done, appending(t.Context(), j, record(n+1)))
		}
		st.gate <- away
		synctest.Wait()
		j.Hasten()
		go func() {
			for range 3 + 4 { // the first tries for all
				st.gate <- away
			}
		}()
		for _, d := range done {
			require.ErrorIs(t, <-d, store.ErrUnavailable)
		}
		closeJournal(t, j)
	})
}

func TestJournalWritesLinesBeforeLaterRecords(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := &gateStore{gate: make(chan error)}
		j := store.NewJournal(st, store.JournalOptions{})
		first := appending(t.Context(), j, record(1))
		require.NoError(t, j.AppendLogs(t.Context(), []*store.LogLine{logLine(1), logLine(2)}))
		second := appending(t.Context(), j, record(2))
		require.NoError(t, j.AppendLogs(t.Context(), []*store.LogLine{logLine(3)}))
		close(st.gate)
		require.NoError(t, <-first)
		require.NoError(t, <-second)
		require.NoError(t, j.Flush(t.Context()))
		closeJournal(t, j)
		require.Equal(t, []string{"record 1", "line 1", "line 2", "line 3", "record 2"}, st.order)
	})
}

func TestJournalBoundsItsLines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := &gateStore{gate: make(chan error)}
		j := store.NewJournal(st, store.JournalOptions{MaxLines: 2})
		hold := appending(t.Context(), j, record(0))
		require.NoError(t, j.AppendLogs(t.Context(), []*store.LogLine{logLine(1), logLine(2)}))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.ErrorIs(t, j.AppendLogs(ctx, []*store.LogLine{logLine(3)}), context.DeadlineExceeded)
		done := make(chan error, 1)
		go func() {
			done <- j.AppendLogs(t.Context(), []*store.LogLine{logLine(4), logLine(5), logLine(6), logLine(7), logLine(8)})
		}()
		close(st.gate)
		require.NoError(t, <-done)
		require.NoError(t, <-hold)
		closeJournal(t, j)
		require.Equal(t, []string{"record 0", "line 1", "line 2", "line 4", "line 5", "line 6", "line 7", "line 8"}, st.order)
	})
}

func TestJournalDropsLinesThatFailForGood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := &gateStore{gate: make(chan error, 3)}
		j := store.NewJournal(st, store.JournalOptions{Tries: 2})
		st.gate <- errors.New("full")
		st.gate <- errors.New("full")
		require.NoError(t, j.AppendLogs(t.Context(), []*store.LogLine{logLine(1)}))
		require.NoError(t, j.Flush(t.Context()))
		st.gate <- nil
		require.NoError(t, j.Append(t.Context(), record(1)))
		closeJournal(t, j)
		require.Equal(t, []string{"record 1"}, st.order)
	})
}

func TestJournalCloseDrains(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		st := &gateStore{gate: make(chan error)}
		j := store.NewJournal(st, store.JournalOptions{MaxBatch: 1, MaxQueue: 3})
		var done []<-chan error
		for n := range int64(4) {
			done = append(done, appending(t.Context(), j, record(n)))
		}
		require.NoError(t, j.AppendLogs(t.Context(), []*store.LogLine{logLine(1)}))
		// One more waits for a place when the journal closes.
		crowded := appending(t.Context(), j, record(4))
		closed := make(chan error, 1)
		go func() { closed <- j.Close() }()
		synctest.Wait()
		require.ErrorIs(t, <-crowded, store.ErrClosed)
		require.ErrorIs(t, j.Append(t.Context(), record(5)), store.ErrClosed)
		require.ErrorIs(t, j.AppendLogs(t.Context(), []*store.LogLine{logLine(2)}), store.ErrClosed)
		require.ErrorIs(t, j.Flush(t.Context()), store.ErrClosed)
		close(st.gate)
		for _, d := range done {
			require.NoError(t, <-d)
		}
		require.NoError(t, <-closed)
		require.NoError(t, j.Close())
		require.Equal(t, []string{"record 0", "line 1", "record 1", "record 2", "record 3"}, st.order)
	})
}
