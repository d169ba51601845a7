package storetest

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// listed is a run as lists show it.
func listed(run *store.Run) *store.Run {
	out := *run
	out.Input, out.Output, out.EntityRow = nil, nil, nil
	return &out
}

func testClaim(t *testing.T, st store.Store) {
	ctx := t.Context()
	var active []*store.Run
	for _, status := range []store.Status{store.Pending, store.Running, store.Running} {
		run := newRun()
		run.Status = status
		run.Input = json.RawMessage(`{"x": 1}`)
		commit(t, st, create(run))
		active = append(active, run)
	}
	orphan := newRun()
	orphan.Owner, orphan.Epoch = "", 0
	commit(t, st, create(orphan))
	active = append(active, orphan)
	for _, status := range []store.Status{store.Completed, store.Failed, store.Cancelled} {
		ended(t, st, status)
	}

	first, err := st.Claim(ctx, "orchestrator-b", 3)
	require.NoError(t, err)
	require.Len(t, first, 3)
	second, err := st.Claim(ctx, "orchestrator-b", 3)
	require.NoError(t, err)
	require.Len(t, second, 1)
	claimed := map[string]*store.Run{}
	for _, run := range append(first, second...) {
		claimed[run.ID] = run
	}
	for _, run := range active {
		run.Owner, run.Epoch = "orchestrator-b", run.Epoch+1
		requireEqual(t, run, load(t, st, run.ID))
		requireEqual(t, listed(run), claimed[run.ID])
	}
	none, err := st.Claim(ctx, "orchestrator-b", 3)
	require.NoError(t, err)
	require.Empty(t, none, "an owner has its runs already")
}

func testClaimRun(t *testing.T, st store.Store) {
	ctx := t.Context()
	for _, status := range []store.Status{store.Failed, store.Cancelled} {
		run := ended(t, st, status)
		got, err := st.ClaimRun(ctx, "orchestrator-b", run.ID)
		require.NoError(t, err)
		stale := change(run)
		stale.Run = &store.RunChange{Status: store.Running, Retry: true}
		require.ErrorIs(t, commitOne(t, st, stale), store.ErrFenced)
		run.Owner, run.Epoch = "orchestrator-b", 2
		requireEqual(t, run, got)
		fresh := change(got)
		fresh.Run = &store.RunChange{Status: store.Running, Retry: true}
		commit(t, st, fresh)
	}
	for _, status := range []store.Status{store.Pending, store.Running, store.Completed} {
		run := newRun()
		run.Status = status
		commit(t, st, create(run))
		_, err := st.ClaimRun(ctx, "orchestrator-b", run.ID)
		require.ErrorIs(t, err, store.ErrState, status)
		require.Equal(t, int64(1), load(t, st, run.ID).Epoch)
	}
}

func testRequestCancel(t *testing.T, st store.Store) {
	ctx := t.Context()
	run := started(t, st)
	require.NoError(t, st.RequestCancel(ctx, run.ID, "first"))
	require.NoError(t, st.RequestCancel(ctx, run.ID, "second"))
	got := load(t, st, run.ID)
	require.True(t, got.CancelRequested)
	require.Equal(t, "first", got.CancelReason)
	require.Equal(t, store.Running, got.Status)
	commit(t, st, change(run)) // the owner keeps its epoch

	unnamed := started(t, st)
	require.NoError(t, st.RequestCancel(ctx, unnamed.ID, ""))
	require.True(t, load(t, st, unnamed.ID).CancelRequested)
	for _, status := range []store.Status{store.Completed, store.Failed, store.Cancelled} {
		run := ended(t, st, status)
		require.ErrorIs(t, st.RequestCancel(ctx, run.ID, "late"), store.ErrState)
		require.False(t, load(t, st, run.ID).CancelRequested)
	}
}

func testSignals(t *testing.T, st store.Store) {
	ctx := t.Context()
	run, other := started(t, st), started(t, st)
	var sent []*store.Signal
	for i, payload := range []string{`{"n": 1}`, `null`, ``} {
		sig := &store.Signal{RunID: run.ID, Name: "go", Payload: json.RawMessage(payload), CreatedAt: day}
		require.NoError(t, st.AddSignal(ctx, sig))
		require.NotZero(t, sig.ID)
		if i > 0 {
			require.Greater(t, sig.ID, sent[i-1].ID)
		}
		sent = append(sent, sig)
	}
	foreign := &store.Signal{RunID: other.ID, Name: "go"}
	require.NoError(t, st.AddSignal(ctx, foreign))
	require.False(t, foreign.CreatedAt.IsZero())
	requireEqual(t, sent, history(t, st, run.ID).Signals)

	r := change(run)
	r.TakenSignals = map[int64]string{sent[0].ID: "steps[2]"}
	commit(t, st, r)
	commit(t, st, r) // the same step once more
	sent[0].TakenBy = "steps[2]"
	requireEqual(t, sent, history(t, st, run.ID).Signals)

	r.TakenSignals = map[int64]string{sent[0].ID: "steps[3]"}
	require.ErrorIs(t, commitOne(t, st, r), store.ErrState)
	r.TakenSignals = map[int64]string{foreign.ID: "steps[3]"}
	require.ErrorIs(t, commitOne(t, st, r), store.ErrNotFound)
	requireEqual(t, sent, history(t, st, run.ID).Signals)

	require.Error(t, st.AddSignal(ctx, &store.Signal{RunID: run.ID, Name: "go", Payload: json.RawMessage(`{`)}))

	// So many wait and no more, until one is taken.
	full := started(t, st)
	for range store.MaxSignals {
		require.NoError(t, st.AddSignal(ctx, &store.Signal{RunID: full.ID, Name: "go"}))
	}
	require.ErrorIs(t, st.AddSignal(ctx, &store.Signal{RunID: full.ID, Name: "go"}), store.ErrFull)
	r = change(full)
	r.TakenSignals = map[int64]string{history(t, st, full.ID).Signals[0].ID: "steps[1]"}
	commit(t, st, r)
	require.NoError(t, st.AddSignal(ctx, &store.Signal{RunID: full.ID, Name: "go"}))
	large := started(t, st)
	for n := 0; ; n++ {
		payload := make([]byte, 700<<10) // no database makes random text much smaller
		_, _ = rand.Read(payload)
		err := st.AddSignal(ctx, &store.Signal{RunID: large.ID, Name: "go", Payload: json.RawMessage(strconv.Quote(hex.EncodeToString(payload)))})
		if err != nil {
			require.ErrorIs(t, err, store.ErrFull)
			require.Greater(t, n, 4)
			break
		}
		require.Less(t, n, 20)
	}

	for _, status := range []store.Status{store.Completed, store.Failed, store.Cancelled} {
		run := ended(t, st, status)
		require.ErrorIs(t, st.AddSignal(ctx, &store.Signal{RunID: run.ID, Name: "go"}), store.ErrState)
	}
}

func testOwned(t *testing.T, st store.Store) {
	var want []string
	for _, status := range []store.Status{store.Pending, store.Running} {
		run := newRun()
		run.Status = status
		commit(t, st, create(run))
		want = append(want, run.ID)
	}
	foreign := newRun()
	foreign.Owner = "orchestrator-b"
	commit(t, st, create(foreign))
	ended(t, st, store.Completed)
	runs, jobs, err := st.Owned(t.Context(), owner)
	require.NoError(t, err)
	require.ElementsMatch(t, want, runs)
	require.Empty(t, jobs)
	runs, jobs, err = st.Owned(t.Context(), "nobody")
	require.NoError(t, err)
	require.Empty(t, runs)
	require.Empty(t, jobs)
}
