package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/plan"
	"github.com/specql/mesh/services/orchestrator/internal/quota"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

const (
	// MaxSlotWait is how long an attempt waits at most for slots of its limits.
	MaxSlotWait = time.Hour
	// takeoverMargin is how much longer than its timeout the attempt of another orchestrator may take from now on: it is begun
	// within 15 s of its grant, or not at all.
	takeoverMargin = 20 * time.Second
	// doubtMargin is how much later than its end a request may arrive of which nobody knows what became of it.
	doubtMargin = 5 * time.Second
	// mostAgain is how often a call is made anew within one attempt, and longestAgain for how long one for which no runner
	// has a place.
	mostAgain    = 20
	longestAgain = time.Hour
	// undecidedPause is before a slot is asked for again whose answer was lost.
	undecidedPause = 50 * time.Millisecond
)

// slot is what an attempt holds of its limits; nil for one without limits.
type slot struct {
	take   *store.Take
	limits []Limit
}

// reserved is the most that the attempt may cost.
func (s *slot) reserved() *float64 {
	if s == nil {
		return nil
	}
	most := 0.0
	for _, l := range s.limits {
		most = max(most, l.Cost)
	}
	return &most
}

// end notes, in the record that says what became of the attempt, that its slot counts for the window from then on.
func (s *slot) end(r *run, out *Outcome) {
	if s == nil {
		return
	}
	e := store.SlotEnd{ID: s.take.ID, JobID: s.take.JobID, Unused: out.Unused}
	if out.Unknown || out.Err != nil && out.Err.Code == fault.Timeout {
		e.Margin = doubtMargin
	}
	if cost := out.Usage.GetCostUsd(); cost > 0 {
		e.Cost = new(min(cost, store.MaxCost)) // whatever a runner says
	}
	r.note(func(rec *store.Record) {
		rec.Ends = append(rec.Ends, e)
		if !out.Closes || out.Err == nil || out.Err.RetryAfter <= 0 {
			return
		}
		for _, l := range s.limits {
			if !l.Budget {
				rec.Closures = append(rec.Closures, store.Closure{Key: l.Key, For: min(out.Err.RetryAfter, MaxRetryAfter), Reason: clip(out.Err.Message, 500)})
			}
		}
	})
}

// orphaned says that the attempts of a job that was another walk's end without it, which may be cut off but well for a while.
func orphaned(job *store.Job) store.SlotEnd {
	return store.SlotEnd{JobID: job.ID, Margin: takeoverMargin + min(job.Timeout, detachedLimit)}
}

// limited says whether the call is one with limits, as far as that can be known.
func (r *run) limited(ctx context.Context, n *plan.Call) bool {
	limits, err := r.e.Dispatcher.Limits(ctx, n, false)
	return err == nil && len(limits) > 0
}

// giveBack gives a slot back that was not used because the run is handed back, as well as that can be done now.
func (r *run) giveBack(ctx context.Context, job *store.Job, s *slot) {
	if s == nil {
		return
	}
	s.end(r, &Outcome{Unused: true})
	job.NextAttemptAt = r.e.Clock.Now() // whoever goes on with it does not count the attempt
	r.noteJob(job, false)
	_ = r.flush(ctx)
}

// admission makes what was noted durable, and with it takes the slots that the attempt needs: at once, or when its
// turn has come. refused is why it cannot begin; a retryable one is the attempt's outcome.
func (r *run) admission(ctx context.Context, n *plan.Call, job *store.Job, changed bool) (_ *slot, refused *fault.Error, err error) {
	limits, err := r.e.Dispatcher.Limits(ctx, n, changed)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return nil, nil, cause
		}
		f := *fault.From(err) // others may have been told the same
		return nil, &f, r.flush(ctx)
	}
	if len(limits) == 0 {
		return nil, nil, r.flush(ctx)
	}
	id, err := uuid.NewV7()
	if err != nil {
		return nil, nil, fmt.Errorf("make the id of a slot: %w", err)
	}
	s := &slot{take: &store.Take{ID: id.String(), JobID: job.ID}, limits: limits}
	for _, l := range limits {
		s.take.Limits = append(s.take.Limits, l.Limit)
	}
	w := &slotWait{r: r, job: job, slot: s, until: time.Now().Add(MaxSlotWait)}
	defer func() { w.leave(0) }()
	at := 0 // the limit that was looked at last
	defer func() {
		if refused != nil && !refused.Retryable {
			r.limitDenied(ctx, n, job, &limits[at], refused)
		}
	}()
	// Who comes later than others that wait, waits behind them.
	for i, l := range limits {
		if r.e.lines.Waits(l.Key) {
			at = i
			if refused, err = w.wait(ctx, i, 0, false); refused != nil || err != nil {
				return nil, refused, err
			}
			break
		}
	}
	for {
		take := *s.take // each record has its own
		r.note(func(rec *store.Record) { rec.Takes = append(rec.Takes, &take) })
		if err := r.flush(ctx); err != nil {
			r.cancelTake(&take)
			return nil, nil, err
		}
		res := take.Result
		switch {
		case res.Granted:
			w.leave(res.Free)
			return s, nil, nil
		case !res.Decided:
			if err := (SystemClock{}).Sleep(ctx, undecidedPause); err != nil {
				return nil, nil, err
			}
			continue
		}
		at = res.Refused
		if refused := overBudget(&limits[res.Refused], &res); refused != nil {
			return nil, refused, nil
		}
		if limits[res.Refused].Budget && !res.Closed {
			res.Wait = 0 // there is room once attempts have ended that cost less than they could
		}
		if refused, err = w.wait(ctx, res.Refused, res.Wait, true); refused != nil || err != nil {
			return nil, refused, err
		}
	}
}

// cancelTake sees to it that a take of which the answer is not waited for counts nowhere: it is not asked for any more, or what
// it may get is given back by the next record.
func (r *run) cancelTake(take *store.Take) {
	r.note(func(rec *store.Record) {
		if i := slices.Index(rec.Takes, take); i >= 0 {
			rec.Takes = slices.Delete(rec.Takes, i, i+1)
			return
		}
		rec.Ends = append(rec.Ends, store.SlotEnd{ID: take.ID, JobID: take.JobID, Unused: true})
	})
}

// overBudget is the failure of an attempt for which a budget has no room: not even once all that is reserved for the attempts
// in flight turns out not to be needed.
func overBudget(l *Limit, res *store.TakeResult) *fault.Error {
	if !l.Budget || res.Closed {
		return nil
	}
	window := l.Window.String()
	if l.Window == time.Hour {
		window = "hour"
	}
	var e *fault.Error
	switch {
	case l.MaxAttempts > 0 && res.Used+1 > l.MaxAttempts:
		e = fault.New(fault.BudgetExceeded, "%s: %d attempts count in the last %s over all orchestrators, %d of them in flight, and the limit is %d", l.Rule, res.Used, window, res.InFlight, l.MaxAttempts)
	case l.MaxCost > 0 && res.Cost-res.Reserved+l.Cost > l.MaxCost+store.CostTolerance:
		e = fault.New(fault.BudgetExceeded, "%s: %.6f USD were spent in the last %s over all orchestrators, %.6f USD are reserved for %d attempts in flight, this one may cost %.6f USD, and the limit is %g USD",
			l.Rule, res.Cost-res.Reserved, window, res.Reserved, res.InFlight, l.Cost, l.MaxCost)
	default:
		return nil
	}
	if res.Wait > 0 {
		e.Message += "; the first of them leaves the window in " + res.Wait.Round(time.Second).String()
	}
	e.Retryable = false
	return e
}

// slotWait is the place of an attempt in the line of one limit.
type slotWait struct {
	r     *run
	job   *store.Job
	slot  *slot
	place *quota.Place
	at    int // the limit
	until time.Time
}

func (w *slotWait) leave(free int64) {
	if w.place != nil {
		w.place.Leave(free)
		w.place = nil
	}
}

// wait waits until the attempt is to ask. after is when there may be room for the first in line, as the answer said that it
// was asked for.
func (w *slotWait) wait(ctx context.Context, limit int, after time.Duration, asked bool) (refused *fault.Error, err error) {
	if w.place == nil || w.at != limit {
		joined := w.r.e.lines.Join(w.slot.limits[limit].Key)
		w.leave(0)
		w.place, w.at = joined, limit
	}
	if asked || w.place.Ahead() == 0 {
		w.place.Refused(after)
	}
	l := &w.slot.limits[limit]
	expected := after
	if l.MaxAttempts > 0 {
		expected = max(expected, time.Duration(float64(w.place.Ahead())/float64(l.MaxAttempts)*float64(l.Window)))
	}
	left := time.Until(w.until)
	if expected > left {
		return w.tooLong(l, expected), nil
	}
	w.note(l, expected)
	if err := w.r.flush(ctx); err != nil {
		return nil, err
	}
	w.r.sleep()
	refused, err = w.sleep(ctx, l, left)
	if werr := w.r.wake(ctx); err == nil || werr != nil && errors.Is(err, errDisabled) {
		err = werr
	}
	if refused == nil && err == nil {
		w.job.NextAttemptAt, w.job.Err = time.Time{}, nil
		w.r.noteJob(w.job, false)
	}
	return refused, err
}

// note says in the job's row that it waits.
func (w *slotWait) note(l *Limit, expected time.Duration) {
	w.job.NextAttemptAt = w.r.e.Clock.Now().Add(max(expected, time.Second))
	w.job.Err = fault.New(fault.RateLimited, "%s: the attempt waits for its turn", l.Rule)
	w.job.Err.Attempts = w.job.Attempts - 1
	w.r.noteJob(w.job, false)
}

func (w *slotWait) sleep(ctx context.Context, l *Limit, left time.Duration) (*fault.Error, error) {
	timer := time.NewTimer(left)
	defer timer.Stop()
	select {
	case <-w.place.Turn():
		return nil, nil
	case <-timer.C:
		return w.tooLong(l, MaxSlotWait), nil
	case <-w.r.e.whenDisabled(w.job.ExecutionType):
		return nil, errDisabled
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-w.r.e.drain.Done():
		return nil, ErrHandBack
	}
}

func (w *slotWait) tooLong(l *Limit, expected time.Duration) *fault.Error {
	code := fault.RateLimited
	if l.Budget {
		code = fault.BudgetExceeded
	}
	e := fault.New(code, "%s: the attempt would wait for %s or more, and at most %s are waited", l.Rule, cmp.Or(expected.Round(time.Second), time.Second), MaxSlotWait)
	e.Retryable = false
	return e
}
