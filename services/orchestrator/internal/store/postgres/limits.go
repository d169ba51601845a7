package postgres

import (
	"encoding/json"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// The parameters of fn_limits.
type (
	limitParam struct {
		Key      string  `json:"key"`
		Window   float64 `json:"window"`
		Attempts int64   `json:"attempts"`
		MaxCost  float64 `json:"max_cost"`
		Cost     float64 `json:"cost"`
	}
	takeParam struct {
		ID     string       `json:"id"`
		Job    string       `json:"job"`
		Limits []limitParam `json:"limits"`
	}
	closureParam struct {
		Key     string  `json:"key"`
		Seconds float64 `json:"seconds"`
		Reason  string  `json:"reason"`
	}
)

// maxClosure bounds what the interval of a closure may be.
const maxClosure = 30 * 24 * time.Hour

var slotEndColumns = []column[store.SlotEnd]{
	ids("id", func(e store.SlotEnd) string { return e.ID }),
	ids("job_id", func(e store.SlotEnd) string { return e.JobID }),
	floats("cost", func(e store.SlotEnd) *float64 { return e.Cost }),
	floats("margin", func(e store.SlotEnd) *float64 { return new(e.Margin.Seconds()) }),
}

// endSlots ends slots by a condition that finds them; freeSlots gives them back.
func endSlots(found string) string {
	return `UPDATE jobs.tb_limit_slot s SET ended_at = clock_timestamp(), cost = coalesce(d.cost, s.cost),
			until = clock_timestamp() + make_interval(secs => d.margin + s.window_seconds)
		FROM ` + source(slotEndColumns) + " WHERE " + found + " AND s.ended_at IS NULL"
}

func freeSlots(found string) string {
	return "DELETE FROM jobs.tb_limit_slot s USING " + source(slotEndColumns) + " WHERE " + found + " AND s.ended_at IS NULL"
}

var (
	endSlotsByID, endSlotsOfJob   = endSlots("s.id = d.id"), endSlots("s.job_id = d.job_id")
	freeSlotsByID, freeSlotsOfJob = freeSlots("s.id = d.id"), freeSlots("s.job_id = d.job_id")
)

// checkLimits refuses takes and closures that the database does not take.
func checkLimits(r *store.Record) error {
	if err := r.CheckLimits(); err != nil {
		return invalid(err)
	}
	for _, t := range r.Takes {
		if !isUUID(t.ID) || !isUUID(t.JobID) {
			return invalidf("%w: a slot and its job have UUIDs", store.ErrRefused)
		}
		for _, l := range t.Limits {
			if plain(l.Key) != l.Key {
				return invalidf("%w: limit %q is no text", store.ErrRefused, l.Key)
			}
		}
	}
	for _, c := range r.Closures {
		if plain(c.Key) != c.Key {
			return invalidf("%w: limit %q is no text", store.ErrRefused, c.Key)
		}
	}
	return nil
}

// queueLimits adds what records say of limits. It comes last, so that the rows of the limits, which several orchestrators
// want, are held for no longer than the commit takes.
func queueLimits(b *pgx.Batch, records []*store.Record, taken map[*store.Take]store.TakeResult) {
	var ends []store.SlotEnd
	var takes []*store.Take
	closures := []closureParam{}
	for _, r := range records {
		ends, takes = append(ends, r.Ends...), append(takes, r.Takes...)
		for _, c := range r.Closures {
			closures = append(closures, closureParam{c.Key, min(c.For, maxClosure).Seconds(), plain(c.Reason)})
		}
	}
	for _, kind := range []struct {
		text         string
		byID, unused bool
	}{{endSlotsByID, true, false}, {freeSlotsByID, true, true}, {endSlotsOfJob, false, false}, {freeSlotsOfJob, false, true}} {
		rows := slices.DeleteFunc(slices.Clone(ends), func(e store.SlotEnd) bool { return (e.ID != "") != kind.byID || e.Unused != kind.unused })
		queueRows(b, kind.text, slotEndColumns, rows, false)
	}
	if len(takes)+len(closures) == 0 {
		return
	}
	params := make([]takeParam, 0, len(takes))
	for _, t := range takes {
		p := takeParam{ID: t.ID, Job: t.JobID}
		for _, l := range t.Limits {
			p.Limits = append(p.Limits, limitParam{l.Key, l.Window.Seconds(), l.MaxAttempts, l.MaxCost, l.Cost})
		}
		params = append(params, p)
	}
	b.Queue("SELECT * FROM jobs.fn_limits($1::text::jsonb, $2::text::jsonb, $3, $4)", asJSON(params), asJSON(closures), int64(store.FoldSlots), store.CostTolerance).
		Query(func(rows pgx.Rows) error {
			n := 0
			for ; rows.Next(); n++ {
				var wait float64
				t := store.TakeResult{Decided: true}
				if err := rows.Scan(&t.Granted, &t.Refused, &t.Closed, &wait, &t.Used, &t.InFlight, &t.Cost, &t.Reserved, &t.Free); err != nil {
					return err
				}
				t.Wait = time.Duration(wait * float64(time.Second))
				if n < len(takes) {
					taken[takes[n]] = t
				}
			}
			return rows.Err()
		})
}

// asJSON is what is known to be JSON.
func asJSON(v any) string {
	raw, err := json.Marshal(v)
	if err != nil {
		return "null" // a number that is none, which the server refuses
	}
	return string(raw)
}
