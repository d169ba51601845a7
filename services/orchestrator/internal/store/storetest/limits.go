package storetest

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// perWindow is a limit of so many attempts; tests have short windows, as nothing but their length is special about a minute.
func perWindow(key string, n int64, window time.Duration) store.Limit {
	return store.Limit{Key: key, Window: window, MaxAttempts: n}
}

// taker makes the records of attempts.
type taker struct {
	run *store.Run
	seq int64
}

func newTaker(t *testing.T, st store.Store) *taker {
	t.Helper()
	return &taker{run: started(t, st), seq: 1}
}

func (k *taker) record() *store.Record {
	k.seq++
	return &store.Record{RunID: k.run.ID, Epoch: k.run.Epoch, Sequence: k.seq}
}

// start is the record that begins a job, with a slot.
func (k *taker) start(limits ...store.Limit) (*store.Record, *store.Take) {
	r := k.record()
	job := newJob(k.run)
	job.Sequence = k.seq
	r.NewJobs = []*store.Job{job}
	take := &store.Take{ID: newID(), JobID: job.ID, Limits: limits}
	r.Takes = []*store.Take{take}
	return r, take
}

// end is the record that ends an attempt.
func (k *taker) end(e store.SlotEnd) *store.Record {
	r := k.record()
	r.Ends = []store.SlotEnd{e}
	return r
}

// take commits an attempt of its own and gives what became of its slot.
func (k *taker) take(t *testing.T, st store.Store, limits ...store.Limit) *store.Take {
	t.Helper()
	r, take := k.start(limits...)
	commit(t, st, r)
	require.True(t, take.Result.Decided)
	return take
}

// until asks again until it is so. It asks in the test's own goroutine, as what it asks writes records.
func until(t *testing.T, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !so(); {
		require.True(t, time.Now().Before(deadline), "it never was so")
		<-time.After(10 * time.Millisecond)
	}
}

func testLimits(t *testing.T, st store.Store) {
	k := newTaker(t, st)
	const window = time.Second
	limit := perWindow("http:service/api", 2, window)

	first := k.take(t, st, limit)
	require.Equal(t, store.TakeResult{Decided: true, Granted: true, Used: 1, InFlight: 1, Free: 1}, first.Result)
	second := k.take(t, st, limit)
	require.True(t, second.Result.Granted)
	require.Zero(t, second.Result.Free)

	// The third one is refused, and written all the same: what it waits for is not known while both are in flight.
	r, third := k.start(limit)
	commit(t, st, r)
	require.Equal(t, store.TakeResult{Decided: true, Used: 2, InFlight: 2}, third.Result)
	require.Len(t, history(t, st, k.run.ID).Jobs, 3)

	// Asked for again, a slot is the same slot.
	again := &store.Take{ID: first.ID, JobID: first.JobID, Limits: []store.Limit{limit}}
	r = k.record()
	r.Takes = []*store.Take{again}
	commit(t, st, r)
	require.True(t, again.Result.Granted)

	// One that ended counts for the window yet; one that was not used counts no more.
	commit(t, st, k.end(store.SlotEnd{ID: first.ID, JobID: first.JobID}))
	refused := k.take(t, st, limit)
	require.False(t, refused.Result.Granted)
	require.Equal(t, int64(1), refused.Result.InFlight)
	require.Positive(t, refused.Result.Wait)
	require.LessOrEqual(t, refused.Result.Wait, window+10*time.Millisecond)
	commit(t, st, k.end(store.SlotEnd{ID: second.ID, JobID: second.JobID, Unused: true}))
	require.True(t, k.take(t, st, limit).Result.Granted)
	require.False(t, k.take(t, st, limit).Result.Granted)

	// The window passes for the one that ended.
	until(t, func() bool { return k.take(t, st, limit).Result.Granted })
	require.False(t, k.take(t, st, limit).Result.Granted, "the other one is in flight yet")
}

// testLimitsTogether: a slot of every limit, or of none.
func testLimitsTogether(t *testing.T, st store.Store) {
	k := newTaker(t, st)
	wide, narrow := perWindow("z/service", 10, time.Hour), perWindow("a/ceiling", 1, time.Hour)
	require.True(t, k.take(t, st, wide, narrow).Result.Granted)
	refused := k.take(t, st, wide, narrow)
	require.False(t, refused.Result.Granted)
	require.Equal(t, 1, refused.Result.Refused)
	alone := k.take(t, st, wide)
	require.True(t, alone.Result.Granted)
	require.Equal(t, int64(2), alone.Result.Used, "the one that was refused took none of the other limit")

	// Many in one commit, among records that take none: the first ones have the slots, and all are written.
	limit := perWindow("batch", 3, time.Hour)
	var records []*store.Record
	var takes []*store.Take
	for range 6 {
		other := newTaker(t, st)
		r, take := other.start(limit)
		records, takes = append(records, r), append(takes, take)
		plain := newTaker(t, st)
		r = plain.record()
		r.NewJobs = []*store.Job{newJob(plain.run)}
		records = append(records, r)
	}
	commit(t, st, records...)
	for i, take := range takes {
		require.True(t, take.Result.Decided)
		require.Equal(t, i < 3, take.Result.Granted, i)
	}
	for _, r := range records {
		require.Len(t, history(t, st, r.RunID).Jobs, 1)
	}
	// A record that fails takes nothing with it, and its batch is written.
	fenced := newTaker(t, st)
	r, _ := fenced.start(perWindow("fenced", 1, time.Hour))
	r.Epoch = 7
	good := newTaker(t, st)
	other, take := good.start(perWindow("fenced", 1, time.Hour))
	results := commitAll(t, st, r, other)
	require.ErrorIs(t, results[0], store.ErrFenced)
	require.NoError(t, results[1])
	require.True(t, take.Result.Granted)
}

func testLimitCost(t *testing.T, st store.Store) {
	k := newTaker(t, st)
	const window = time.Second
	limit := store.Limit{Key: "lambda", Window: window, MaxCost: 1, Cost: 0.4}
	first, second := k.take(t, st, limit), k.take(t, st, limit)
	require.True(t, first.Result.Granted)
	require.Equal(t, int64(1), first.Result.Free)
	require.True(t, second.Result.Granted)
	refused := k.take(t, st, limit)
	require.False(t, refused.Result.Granted)
	require.InDelta(t, 0.8, refused.Result.Cost, 1e-9)
	require.InDelta(t, 0.8, refused.Result.Reserved, 1e-9)

	// The first one did cost less than it could have; of the second one nobody knows.
	commit(t, st, k.end(store.SlotEnd{ID: first.ID, JobID: first.JobID, Cost: new(0.1)}))
	commit(t, st, k.end(store.SlotEnd{ID: second.ID, JobID: second.JobID}))
	third := k.take(t, st, limit)
	require.True(t, third.Result.Granted)
	require.InDelta(t, 0.9, third.Result.Cost, 1e-9)
	require.InDelta(t, 0.4, third.Result.Reserved, 1e-9)
	// It did cost more than the most that it could: that counts.
	commit(t, st, k.end(store.SlotEnd{ID: third.ID, JobID: third.JobID, Cost: new(5.0)}))
	refused = k.take(t, st, limit)
	require.False(t, refused.Result.Granted)
	require.Greater(t, refused.Result.Cost, 5.0)
	until(t, func() bool { return k.take(t, st, limit).Result.Granted })

	// What costs more than there is can never run; what costs nothing always can.
	require.False(t, k.take(t, st, store.Limit{Key: "dear", Window: window, MaxCost: 1, Cost: 1.5}).Result.Granted)
	require.True(t, k.take(t, st, store.Limit{Key: "free", Window: window, MaxCost: 1}).Result.Granted)
	// There is room for more of what costs next to nothing than an integer holds.
	cheap := k.take(t, st, store.Limit{Key: "cheap", Window: window, MaxCost: 9e11, Cost: 1e-300})
	require.True(t, cheap.Result.Granted)
	require.Equal(t, int64(store.Unbounded), cheap.Result.Free)
}

// testLimitOfTheDead: the slots of an attempt whose orchestrator died count until somebody goes on with the job, and the window from then.
func testLimitOfTheDead(t *testing.T, st store.Store) {
	k := newTaker(t, st)
	const window = 200 * time.Millisecond
	limit := perWindow("dead", 1, window)
	r, lost := k.start(limit)
	commit(t, st, r)
	require.True(t, lost.Result.Granted)
	begin := time.Now()
	until(t, func() bool {
		require.False(t, k.take(t, st, limit).Result.Granted, "nothing ends the slot")
		return time.Since(begin) > 2*window
	})

	// Who took the run over says that the attempt has ended by a time, and asks for the next one.
	k.run.Epoch++
	claimed, err := st.Claim(t.Context(), "orchestrator-b", 10)
	require.NoError(t, err)
	require.Len(t, claimed, 1)
	r = k.record()
	r.Ends = []store.SlotEnd{{JobID: lost.JobID, Margin: window}}
	next := &store.Take{ID: newID(), JobID: lost.JobID, Limits: []store.Limit{limit}}
	r.Takes = []*store.Take{next}
	commit(t, st, r)
	require.False(t, next.Result.Granted)
	require.Greater(t, next.Result.Wait, window, "the margin and the window")
	until(t, func() bool {
		r := k.record()
		r.Takes = []*store.Take{next}
		commit(t, st, r)
		return next.Result.Granted
	})
	// What has ended stays as it ended; the stale owner gives back nothing.
	stale := k.end(store.SlotEnd{ID: next.ID, JobID: next.JobID, Unused: true})
	stale.Epoch = 1
	require.ErrorIs(t, commitOne(t, st, stale), store.ErrFenced)
	require.False(t, k.take(t, st, limit).Result.Granted)
}

func testLimitClosed(t *testing.T, st store.Store) {
	k := newTaker(t, st)
	limit := perWindow("closed", 5, time.Hour)
	r := k.record()
	r.Closures = []store.Closure{{Key: "closed", For: 2 * time.Second, Reason: "429"}}
	commit(t, st, r)
	refused := k.take(t, st, limit)
	require.False(t, refused.Result.Granted)
	require.True(t, refused.Result.Closed)
	require.Positive(t, refused.Result.Wait)
	r = k.record()
	r.Closures = []store.Closure{{Key: "closed", For: time.Millisecond, Reason: "429"}}
	commit(t, st, r)
	require.Greater(t, k.take(t, st, limit).Result.Wait, time.Millisecond, "a shorter one opens nothing")
	require.True(t, k.take(t, st, perWindow("other", 5, time.Hour)).Result.Granted)
	until(t, func() bool { return k.take(t, st, limit).Result.Granted })
}

// testLimitFold: many that have ended are counted as few rows, and none is lost or counted for less than its window.
func testLimitFold(t *testing.T, st store.Store) {
	k := newTaker(t, st)
	const n = 2*store.FoldSlots + 100
	limit := store.Limit{Key: "many", Window: time.Hour, MaxAttempts: n, MaxCost: 1000, Cost: 1}
	for done := 0; done < n; {
		var records []*store.Record
		for range min(250, n-done) {
			r, take := k.start(limit)
			records = append(records, r)
			end := k.end(store.SlotEnd{ID: take.ID, JobID: take.JobID, Cost: new(0.25)})
			records = append(records, end)
			done++
		}
		// Both in commits of their own: a batch ends what it takes in no order that is promised.
		var starts, ends []*store.Record
		for i, r := range records {
			if i%2 == 0 {
				starts = append(starts, r)
			} else {
				ends = append(ends, r)
			}
		}
		for i := range starts {
			starts[i].Sequence, ends[i].Sequence = starts[len(starts)-1].Sequence, ends[len(ends)-1].Sequence
		}
		commit(t, st, starts...)
		for _, r := range starts {
			require.True(t, r.Takes[0].Result.Granted, "%+v", r.Takes[0].Result)
		}
		commit(t, st, ends...)
	}
	refused := k.take(t, st, limit)
	require.False(t, refused.Result.Granted)
	require.Equal(t, int64(n), refused.Result.Used)
	require.InDelta(t, n*0.25, refused.Result.Cost, 1e-6)
	require.Greater(t, refused.Result.Wait, 50*time.Minute)
}

// testLimitMaintain: what counts no more is deleted, and a slot whose job has ended without saying so ends.
func testLimitMaintain(t *testing.T, st store.Store) {
	k := newTaker(t, st)
	limit := perWindow("kept", 1, 100*time.Millisecond)
	take := k.take(t, st, limit)
	require.NoError(t, st.Maintain(t.Context(), 0))
	require.False(t, k.take(t, st, limit).Result.Granted, "it is in flight")
	commit(t, st, k.end(store.SlotEnd{ID: take.ID, JobID: take.JobID}))
	until(t, func() bool {
		require.NoError(t, st.Maintain(t.Context(), 0))
		return k.take(t, st, limit).Result.Granted
	})
}

// testConcurrentTakes: several orchestrators take and end slots as fast as they can, some of them die with attempts in flight.
// Whatever they do, no window has more attempts than the limit, by the times at which they were seen to run.
func testConcurrentTakes(t *testing.T, st store.Store) {
	const most, window, lasting, enough, patience = 10, 250 * time.Millisecond, 2 * time.Second, 40, time.Minute
	limits := [][]store.Limit{
		{perWindow("x", most, window), perWindow("y", 3*most, window)},
		{perWindow("y", 3*most, window), perWindow("x", most, window)}, // the other way round: nobody waits for each other for ever
	}
	var mu sync.Mutex
	var seen []time.Time
	begin := time.Now()
	goOn := func() bool {
		mu.Lock()
		defer mu.Unlock()
		return time.Since(begin) < lasting || len(seen) <= enough && time.Since(begin) < patience
	}
	parallel(t.Context(), t, 6, func(ctx context.Context, worker int) error {
		run := newRun()
		if err := appendAll(ctx, st, create(run)); err != nil {
			return err
		}
		seq := int64(1)
		for goOn() {
			var takes []*store.Take
			var records []*store.Record
			for range 3 {
				seq++
				job := newJob(run)
				take := &store.Take{ID: newID(), JobID: job.ID, Limits: limits[worker%2]}
				takes = append(takes, take)
				records = append(records, &store.Record{RunID: run.ID, Epoch: 1, Sequence: seq, NewJobs: []*store.Job{job}, Takes: []*store.Take{take}})
			}
			if err := appendPatiently(ctx, st, records...); err != nil {
				return err
			}
			seq++
			end := &store.Record{RunID: run.ID, Epoch: 1, Sequence: seq}
			for _, take := range takes {
				if !take.Result.Granted {
					continue
				}
				mu.Lock()
				seen = append(seen, time.Now())
				mu.Unlock()
				end.Ends = append(end.Ends, store.SlotEnd{ID: take.ID, JobID: take.JobID})
			}
			if err := appendPatiently(ctx, st, end); err != nil {
				return err
			}
		}
		return nil
	})
	slices.SortFunc(seen, func(a, b time.Time) int { return a.Compare(b) })
	for i := range seen {
		if i >= most {
			require.GreaterOrEqual(t, seen[i].Sub(seen[i-most]), window, "%d attempts within %s", most+1, window)
		}
	}
	require.Greater(t, len(seen), enough, "and slots are used")
}

// appendPatiently writes records as a journal does: what somebody's lock is in the way of is written later.
func appendPatiently(ctx context.Context, st store.Store, records ...*store.Record) error {
	for len(records) > 0 {
		results, err := st.Commit(ctx, records)
		if err != nil {
			return err
		}
		var busy []*store.Record
		for i, err := range results {
			switch {
			case errors.Is(err, store.ErrBusy):
				busy = append(busy, records[i])
			case err != nil:
				return err
			}
		}
		records = busy
	}
	return nil
}

// testHostileLimits: what the database does not take fails its own record alone.
func testHostileLimits(t *testing.T, st store.Store) {
	k := newTaker(t, st)
	good, take := newTaker(t, st).start(perWindow("good", 1, time.Hour))
	for name, l := range map[string]store.Limit{
		"no key": {Window: time.Minute, MaxAttempts: 1}, "no window": {Key: "k", MaxAttempts: 1},
		"long key": {Key: fmt.Sprintf("%01001d", 1), Window: time.Minute}, "not a number": {Key: "k", Window: time.Minute, MaxCost: 1, Cost: math.NaN()},
		"infinite": {Key: "k", Window: time.Minute, MaxCost: 1, Cost: math.Inf(1)},
	} {
		r, _ := k.start(l)
		require.ErrorIs(t, commitOne(t, st, r), store.ErrRefused, name)
	}
	bad, _ := k.start(store.Limit{Window: time.Minute})
	results := commitAll(t, st, bad, good)
	require.ErrorIs(t, results[0], store.ErrRefused)
	require.NoError(t, results[1])
	require.True(t, take.Result.Granted)
	// Two of these are no number any more, which would refuse every later take.
	require.ErrorIs(t, commitOne(t, st, k.end(store.SlotEnd{ID: take.ID, JobID: take.JobID, Cost: new(1e308)})), store.ErrRefused)
	odd := k.take(t, st, perWindow("quote's \"key\" \\ ü {}", 1, time.Hour))
	require.True(t, odd.Result.Granted)
	require.False(t, k.take(t, st, perWindow("quote's \"key\" \\ ü {}", 1, time.Hour)).Result.Granted)
}
