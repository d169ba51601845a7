package storetest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

func testCancelledContext(t *testing.T, st store.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	run := newRun()
	_, err := st.Commit(ctx, []*store.Record{create(run)})
	require.ErrorIs(t, err, context.Canceled)
	_, err = st.Run(t.Context(), run.ID)
	require.ErrorIs(t, err, store.ErrNotFound)
	_, err = st.Claim(ctx, "b", 1)
	require.ErrorIs(t, err, context.Canceled)
	require.ErrorIs(t, st.AppendLogs(ctx, []*store.LogLine{{RunID: run.ID, Sequence: 1}}), context.Canceled)
	_, err = st.Runs(ctx, store.RunFilter{})
	require.ErrorIs(t, err, context.Canceled)
	commit(t, st, create(run))
}

// testConcurrentCommits has writers of different runs and readers at the same time.
func testConcurrentCommits(t *testing.T, st store.Store) {
	const writers, steps = 8, 10
	parallel(t.Context(), t, writers, func(ctx context.Context, _ int) error {
		run := newRun()
		if err := appendAll(ctx, st, create(run)); err != nil {
			return err
		}
		for n := range int64(steps) {
			job := newJob(run)
			r := &store.Record{RunID: run.ID, Epoch: 1, Sequence: 2 + n, NewJobs: []*store.Job{job}}
			if err := appendAll(ctx, st, r); err != nil {
				return err
			}
			h, err := st.History(ctx, run.ID)
			if err != nil {
				return err
			}
			if h.Run.Sequence != 2+n || len(h.Jobs) != int(n)+1 {
				return fmt.Errorf("after %d steps the run has sequence %d and %d jobs", n+1, h.Run.Sequence, len(h.Jobs))
			}
		}
		return nil
	})
}

func appendAll(ctx context.Context, st store.Store, records ...*store.Record) error {
	results, err := st.Commit(ctx, records)
	return errors.Join(append(results, err)...)
}

// testConcurrentKeys lets many callers race for one key: one wins, the others learn its run.
func testConcurrentKeys(t *testing.T, st store.Store) {
	const callers = 16
	var mu sync.Mutex
	winners, answers := []string{}, map[string]int{}
	parallel(t.Context(), t, callers, func(ctx context.Context, _ int) error {
		run := newRun()
		run.IdempotencyKey = "race"
		results, err := st.Commit(ctx, []*store.Record{create(run)})
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		if d, ok := errors.AsType[*store.DuplicateError](results[0]); ok {
			answers[d.RunID]++
			return nil
		}
		winners = append(winners, run.ID)
		return results[0]
	})
	require.Len(t, winners, 1)
	require.Equal(t, map[string]int{winners[0]: callers - 1}, answers)
}

// testConcurrentClaims: each run goes to one claim.
func testConcurrentClaims(t *testing.T, st store.Store) {
	const runs, claimers = 40, 4
	for range runs {
		started(t, st)
	}
	var mu sync.Mutex
	seen := map[string]int{}
	parallel(t.Context(), t, claimers, func(ctx context.Context, _ int) error {
		for {
			got, err := st.Claim(ctx, "orchestrator-b", 3)
			if err != nil || len(got) == 0 {
				return err
			}
			mu.Lock()
			for _, r := range got {
				seen[r.ID]++
			}
			mu.Unlock()
		}
	})
	require.Len(t, seen, runs)
	for id, n := range seen {
		require.Equal(t, 1, n, id)
	}
}

// testConcurrentEverything is for the race detector, and for deadlocks.
func testConcurrentEverything(t *testing.T, st store.Store) {
	e := paymentEntity(t, st)
	run := started(t, st)
	row := insert(e, newID(), map[string]any{"status": "new", "amount": 0})
	commit(t, st, row)
	const rounds = 15
	work := []func(context.Context, int64) error{
		func(ctx context.Context, n int64) error {
			return appendAll(ctx, st, &store.Record{RunID: run.ID, Epoch: 1, Sequence: 2 + n, NewJobs: []*store.Job{newJob(run)}})
		},
		func(ctx context.Context, n int64) error {
			r := change(row.Create)
			r.UpdateRow = &store.EntityRow{Schema: e.Schema, Entity: e.Name, ID: row.InsertRow.ID, Values: map[string]any{"amount": n}}
			return appendAll(ctx, st, r)
		},
		func(ctx context.Context, n int64) error {
			return st.AppendLogs(ctx, []*store.LogLine{{RunID: run.ID, Sequence: n + 1, JobID: newID(), Stream: "stdout", Time: day}})
		},
		func(ctx context.Context, _ int64) error {
			return st.AddSignal(ctx, &store.Signal{RunID: run.ID, Name: "go"})
		},
		func(ctx context.Context, n int64) error {
			return st.SaveSnapshot(ctx, fmt.Sprintf("d%d", n%3), []byte("x"))
		},
		func(ctx context.Context, _ int64) error { return st.RequestCancel(ctx, run.ID, "stop") },
		func(ctx context.Context, _ int64) error { _, err := st.History(ctx, run.ID); return err },
		func(ctx context.Context, _ int64) error {
			_, err := st.Runs(ctx, store.RunFilter{Limit: 5})
			return err
		},
		func(ctx context.Context, _ int64) error { _, err := st.Logs(ctx, run.ID, 0, 5); return err },
		func(ctx context.Context, _ int64) error { _, err := st.EntityRow(ctx, e, row.InsertRow.ID); return err },
		func(ctx context.Context, n int64) error {
			if n%5 == 0 {
				return nil
			}
			_, err := st.Jobs(ctx, run.ID, n)
			return err
		},
	}
	parallel(t.Context(), t, len(work), func(ctx context.Context, i int) error {
		for n := range int64(rounds) {
			if err := work[i](ctx, n); err != nil {
				return fmt.Errorf("worker %d: %w", i, err)
			}
		}
		return nil
	})
	h := history(t, st, run.ID)
	require.Len(t, h.Jobs, rounds)
	require.Len(t, h.Signals, rounds)
}

// testJournal drives the store through a journal, as the engine does.
func testJournal(t *testing.T, st store.Store) {
	j := store.NewJournal(st, store.JournalOptions{})
	const runs, steps = 16, 10
	parallel(t.Context(), t, runs, func(ctx context.Context, _ int) error {
		run := newRun()
		if err := j.Append(ctx, create(run)); err != nil {
			return err
		}
		for n := range int64(steps) {
			line := &store.LogLine{RunID: run.ID, Sequence: 100 + n, JobID: newID(), Stream: "stdout", Text: "x", Time: day}
			if err := j.AppendLogs(ctx, []*store.LogLine{line}); err != nil {
				return err
			}
			job := newJob(run)
			if err := j.Append(ctx, &store.Record{RunID: run.ID, Epoch: 1, Sequence: 2 + n, NewJobs: []*store.Job{job}}); err != nil {
				return err
			}
			lines, err := st.Logs(ctx, run.ID, 0, 100)
			if err != nil {
				return err
			}
			if len(lines) != int(n)+1 {
				return fmt.Errorf("%d lines are there before the record after line %d", len(lines), n+1)
			}
		}
		end := &store.Record{RunID: run.ID, Epoch: 1, Sequence: 50, Run: &store.RunChange{Status: store.Completed, Output: json.RawMessage(`1`)}}
		if err := j.Append(ctx, end); err != nil {
			return err
		}
		if err := j.Append(ctx, &store.Record{RunID: run.ID, Epoch: 0, Sequence: 51}); !errors.Is(err, store.ErrFenced) {
			return fmt.Errorf("want ErrFenced, have %w", err)
		}
		h, err := st.History(ctx, run.ID)
		if err == nil && (len(h.Jobs) != steps || h.Run.Status != store.Completed) {
			err = fmt.Errorf("the run is %s with %d jobs", h.Run.Status, len(h.Jobs))
		}
		return err
	})
	require.NoError(t, j.Close())
	require.ErrorIs(t, j.Append(t.Context(), create(newRun())), store.ErrClosed)
}

func testClosed(t *testing.T, st store.Store) {
	ctx := t.Context()
	run := started(t, st)
	require.NoError(t, st.Close())
	require.NoError(t, st.Close())
	_, err := st.Commit(ctx, []*store.Record{change(run)})
	require.ErrorIs(t, err, store.ErrClosed)
	_, err = st.Run(ctx, run.ID)
	require.ErrorIs(t, err, store.ErrClosed)
	_, err = st.History(ctx, run.ID)
	require.ErrorIs(t, err, store.ErrClosed)
	require.ErrorIs(t, st.AppendLogs(ctx, []*store.LogLine{{RunID: run.ID}}), store.ErrClosed)
	require.ErrorIs(t, st.RequestCancel(ctx, run.ID, ""), store.ErrClosed)
}
