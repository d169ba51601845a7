package sqlite

import (
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// limitState is what counts at one limit's key.
type limitState struct {
	closed time.Duration // how long it is closed yet
	// next is when the first of what has ended leaves the window; 0 for none.
	next           time.Duration
	used, inFlight int64
	cost, reserved float64
}

// decide says whether an attempt may be counted in at states, one for each of its limits, and counts it.
func decide(limits []store.Limit, states []*limitState) store.TakeResult {
	for i, l := range limits {
		s := states[i]
		full := l.MaxAttempts > 0 && s.used+1 > l.MaxAttempts || l.MaxCost > 0 && s.cost+l.Cost > l.MaxCost+store.CostTolerance
		if !full && s.closed <= 0 {
			continue
		}
		out := store.TakeResult{
			Decided: true, Refused: i, Closed: s.closed > 0, Wait: max(s.closed, 0),
			Used: s.used, InFlight: s.inFlight, Cost: s.cost, Reserved: s.reserved,
		}
		if full {
			out.Wait = max(out.Wait, s.next)
		}
		return out
	}
	out := store.TakeResult{Decided: true, Granted: true, Free: store.Unbounded}
	for i, l := range limits {
		s := states[i]
		s.used, s.inFlight, s.cost, s.reserved = s.used+1, s.inFlight+1, s.cost+l.Cost, s.reserved+l.Cost
		if i == 0 {
			out.Used, out.InFlight, out.Cost, out.Reserved = s.used, s.inFlight, s.cost, s.reserved
		}
		if l.MaxAttempts > 0 {
			out.Free = min(out.Free, l.MaxAttempts-s.used)
		}
		if left := l.MaxCost + store.CostTolerance - s.cost; l.MaxCost > 0 && l.Cost*float64(out.Free) > left {
			out.Free = max(0, int64(left/l.Cost)) // less than it was, so that it is no more than an integer holds
		}
	}
	return out
}

// limits ends the record's slots, closes keys and decides its takes. The one writer stands in for the lock of the keys.
func (a *application) limits() error {
	r := a.record
	if len(r.Ends)+len(r.Takes)+len(r.Closures) == 0 {
		return nil
	}
	now := a.store.timeNow()
	for _, e := range r.Ends {
		if err := a.endSlots(e, now); err != nil {
			return err
		}
	}
	for _, c := range r.Closures {
		_, err := a.exec(`INSERT INTO jobs.tb_limit (key, closed_until, closed_reason, updated_at) VALUES (?, ?, ?, ?)
			ON CONFLICT (key) DO UPDATE SET closed_until = excluded.closed_until, closed_reason = excluded.closed_reason, updated_at = excluded.updated_at
			WHERE coalesce(closed_until, '') < excluded.closed_until`, c.Key, timeValue(now.Add(c.For)), textValue(c.Reason), a.now)
		if err != nil {
			return err
		}
	}
	for _, t := range r.Takes {
		result, err := a.take(t, now)
		if err != nil {
			return err
		}
		a.takes = append(a.takes, result)
	}
	return nil
}

func (a *application) endSlots(e store.SlotEnd, now time.Time) error {
	column, id := "id", e.ID
	if id == "" {
		column, id = "job_id", e.JobID
	}
	if e.Unused {
		_, err := a.exec("DELETE FROM jobs.tb_limit_slot WHERE "+column+" = ? AND ended_at IS NULL", id)
		return err
	}
	var cost any
	if e.Cost != nil {
		cost = *e.Cost
	}
	_, err := a.exec(`UPDATE jobs.tb_limit_slot SET ended_at = ?, cost = coalesce(?, cost),
			until = strftime('%Y-%m-%d %H:%M:%f', ?, '+' || (window_seconds + 0.001) || ' seconds') || '000'
		WHERE `+column+` = ? AND ended_at IS NULL`, timeValue(now), cost, timeValue(now.Add(e.Margin)), id)
	return err
}

// take decides one take. A slot that is there already is the one that was asked for.
func (a *application) take(t *store.Take, now time.Time) (store.TakeResult, error) {
	states := make([]*limitState, len(t.Limits))
	for i, l := range t.Limits {
		var err error
		if states[i], err = a.limitState(l, now); err != nil {
			return store.TakeResult{}, err
		}
	}
	var have int
	if err := a.w.row("SELECT count(*) FROM jobs.tb_limit_slot WHERE id = ?", []any{t.ID}, &have); err != nil {
		return store.TakeResult{}, err
	}
	if have > 0 {
		return store.TakeResult{Decided: true, Granted: true}, nil
	}
	result := decide(t.Limits, states)
	if !result.Granted {
		return result, nil
	}
	for _, l := range t.Limits {
		_, err := a.exec(`INSERT INTO jobs.tb_limit_slot (id, key, job_id, window_seconds, cost, taken_at, until) VALUES (?, ?, ?, ?, ?, ?, '9999-12-31')
			ON CONFLICT DO NOTHING`, t.ID, l.Key, t.JobID, l.Window.Seconds(), l.Cost, timeValue(now))
		if err != nil {
			return result, err
		}
	}
	return result, nil
}

// limitState counts what a limit's key holds, and notes what the limit is.
func (a *application) limitState(l store.Limit, now time.Time) (*limitState, error) {
	_, err := a.exec(`INSERT INTO jobs.tb_limit (key, window_seconds, max_attempts, max_cost, updated_at) VALUES (?, ?, ?, ?, ?)
		ON CONFLICT (key) DO UPDATE SET window_seconds = excluded.window_seconds, max_attempts = excluded.max_attempts, max_cost = excluded.max_cost, updated_at = excluded.updated_at
		WHERE window_seconds IS NOT excluded.window_seconds OR max_attempts IS NOT excluded.max_attempts OR max_cost IS NOT excluded.max_cost`,
		l.Key, l.Window.Seconds(), numberValue(l.MaxAttempts), numberValue(l.MaxCost), a.now)
	if err != nil {
		return nil, err
	}
	s := &limitState{}
	var rows int
	var next, closed time.Time
	err = a.w.row(`SELECT count(*), coalesce(sum(attempts), 0), coalesce(sum(attempts) FILTER (WHERE ended_at IS NULL), 0),
			coalesce(sum(cost), 0.0), coalesce(sum(cost) FILTER (WHERE ended_at IS NULL), 0.0), min(until) FILTER (WHERE ended_at IS NOT NULL)
		FROM jobs.tb_limit_slot WHERE key = ? AND until > ?`, []any{l.Key, timeValue(now)},
		&rows, &s.used, &s.inFlight, &s.cost, &s.reserved, timeColumn{&next})
	if err == nil {
		err = a.w.row("SELECT closed_until FROM jobs.tb_limit WHERE key = ?", []any{l.Key}, timeColumn{&closed})
	}
	if errors.Is(err, sql.ErrNoRows) {
		err = nil
	}
	if err != nil {
		return nil, err
	}
	if !next.IsZero() {
		s.next = next.Sub(now)
	}
	if !closed.IsZero() {
		s.closed = closed.Sub(now)
	}
	if rows > store.FoldSlots {
		err = a.fold(l, now)
	}
	return s, err
}

// fold puts the slots of a key that have ended together.
func (a *application) fold(l store.Limit, now time.Time) error {
	part := max(l.Window/60, time.Microsecond)
	type sum struct {
		attempts int64
		cost     float64
		until    time.Time
	}
	sums := map[int64]*sum{}
	err := a.w.rows("DELETE FROM jobs.tb_limit_slot WHERE key = ? AND ended_at IS NOT NULL RETURNING attempts, cost, until", []any{l.Key}, func(rows *sql.Rows) error {
		var one sum
		if err := rows.Scan(&one.attempts, &one.cost, timeColumn{&one.until}); err != nil || !one.until.After(now) {
			return err
		}
		k := one.until.UnixNano() / int64(part)
		if sums[k] == nil {
			sums[k] = &sum{}
		}
		sums[k].attempts, sums[k].cost = sums[k].attempts+one.attempts, sums[k].cost+one.cost
		if one.until.After(sums[k].until) {
			sums[k].until = one.until
		}
		return nil
	})
	if err != nil {
		return err
	}
	a.wrote = true
	for _, x := range sums {
		_, err := a.exec(`INSERT INTO jobs.tb_limit_slot (id, key, job_id, attempts, window_seconds, cost, taken_at, ended_at, until) VALUES (?, ?, NULL, ?, ?, ?, ?, ?, ?)`,
			uuid.NewString(), l.Key, x.attempts, l.Window.Seconds(), x.cost, timeValue(now), timeValue(now), timeValue(x.until))
		if err != nil {
			return err
		}
	}
	return nil
}

func numberValue[T int64 | float64](n T) any {
	if n == 0 {
		return nil
	}
	return n
}

// tidyLimits deletes slots that count no more, ends those whose jobs have ended or are gone, and forgets keys that were long not used.
func (w *writer) tidyLimits(now time.Time) error {
	_, err := w.exec(`UPDATE jobs.tb_limit_slot SET ended_at = ?1, until = strftime('%Y-%m-%d %H:%M:%f', ?1, '+' || (window_seconds + 0.001) || ' seconds') || '000'
		WHERE ended_at IS NULL AND taken_at < ?2 AND NOT EXISTS (SELECT 1 FROM jobs.tb_job_run j WHERE j.id = job_id AND j.status IN ('pending', 'running'))`,
		timeValue(now), timeValue(now.Add(-store.StraySlot)))
	if err == nil {
		_, err = w.exec("DELETE FROM jobs.tb_limit_slot WHERE ended_at IS NOT NULL AND until <= ?", timeValue(now))
	}
	if err == nil {
		_, err = w.exec(`DELETE FROM jobs.tb_limit WHERE updated_at < ? AND coalesce(closed_until, '') < ? AND NOT EXISTS (SELECT 1 FROM jobs.tb_limit_slot s WHERE s.key = tb_limit.key)`,
			timeValue(now.Add(-store.IdleLimit)), timeValue(now))
	}
	if err != nil {
		return fmt.Errorf("tidy the limits: %w", err)
	}
	return nil
}
