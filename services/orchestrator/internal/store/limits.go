package store

import (
	"fmt"
	"time"
)

// Limit bounds, over all orchestrators, the attempts of one kind in any window.
type Limit struct {
	// Key names what is counted together; at most 1,000 bytes.
	Key string
	// Window is how long an attempt counts after its end; above zero.
	Window time.Duration
	// MaxAttempts in any window; 0 is no bound.
	MaxAttempts int64
	// MaxCost in any window, in US dollars; 0 is no bound.
	MaxCost float64
	// Cost is the most that the attempt can cost, in US dollars. It counts until it is known what the attempt did cost.
	Cost float64
}

// check is ErrRefused for a limit that no database takes.
func (l Limit) check() error {
	switch {
	case l.Key == "" || len(l.Key) > MaxLimitKey:
		return fmt.Errorf("%w: the key of a limit has 1 to %d bytes", ErrRefused, MaxLimitKey)
	case l.Window <= 0 || l.MaxAttempts < 0:
		return fmt.Errorf("%w: limit %s: a window and a number of attempts are above zero", ErrRefused, l.Key)
	case !(l.MaxCost >= 0 && l.MaxCost < MaxCost) || !(l.Cost >= 0 && l.Cost < MaxCost):
		return fmt.Errorf("%w: limit %s: costs are US dollars, from zero up", ErrRefused, l.Key)
	}
	return nil
}

// CheckLimits is ErrRefused where what a record says of limits is nothing that a database takes.
func (r *Record) CheckLimits() error {
	for _, t := range r.Takes {
		if len(t.Limits) == 0 {
			return fmt.Errorf("%w: a take without limits", ErrRefused)
		}
		for _, l := range t.Limits {
			if err := l.check(); err != nil {
				return err
			}
		}
	}
	for _, c := range r.Closures {
		if err := (Limit{Key: c.Key, Window: c.For}).check(); err != nil {
			return err
		}
	}
	for _, e := range r.Ends {
		if c := e.Cost; c != nil && (!(*c >= 0 && *c <= MaxCost)) || e.ID == "" && e.JobID == "" {
			return fmt.Errorf("%w: the end of a slot names it, and its cost is US dollars, from zero up", ErrRefused)
		}
	}
	return nil
}

// Take asks for a slot of every limit of one attempt: of all or of none. It is decided by the commit of its
// record, which is written either way.
//
// A slot is a row for each limit. It counts from its grant until the window after the attempt's
// end has passed, or until it is given back, however many orchestrators die meanwhile. The clock of the
// database alone decides.
type Take struct {
	// ID of the slot, a UUID of its own for each attempt. Asked for again, it is the same slot.
	ID string
	// JobID of the attempt.
	JobID  string
	Limits []Limit
	// Result is set by the commit; of a commit whose answer was lost it stays as it was.
	Result TakeResult
}

// TakeResult is what became of a take.
type TakeResult struct {
	// Decided says that the others are set.
	Decided bool
	Granted bool
	// Refused is the index of the limit that had no room.
	Refused int
	// Closed says that the limit is closed (see [Closure]).
	Closed bool
	// Wait is when there may be room; 0 where that is not known, because attempts have to end first.
	Wait time.Duration
	// Used are the attempts that count at the limit, and Cost what they count with in US dollars: at the
	// limit that refused, or else at the first. InFlight and Reserved are those of them that have not ended.
	Used, InFlight int64
	Cost, Reserved float64
	// Free is how many more attempts there is room for at every limit.
	Free int64
}

// SlotEnd says that attempts have ended, so that their slots count for their windows from now on. What has ended
// already stays as it is.
type SlotEnd struct {
	// ID of the slot; empty for all slots of JobID.
	ID    string
	JobID string
	// Unused gives the slot back: nothing was called.
	Unused bool
	// Cost of the attempt in US dollars; nil where it is not known, so that it counts with the most.
	Cost *float64
	// Margin is how much later than now the attempt may have ended.
	Margin time.Duration
}

// Closure refuses every take at a key for a time from now on; a longer one that is in force stays.
type Closure struct {
	Key    string
	For    time.Duration
	Reason string
}

// MaxCost of one attempt or limit, in US dollars: sums of many stay numbers.
const MaxCost = 1e12

// MaxLimitKey is how many bytes the key of a limit has at most.
const MaxLimitKey = 1000

// FoldSlots is how many rows of one key are counted at most before those that have ended are put together: into one
// row for each sixtieth of the window, which counts as long as the last one in it.
const FoldSlots = 200

// CostTolerance is what adding costs may have rounded, in US dollars.
const CostTolerance = 1e-9

// Unbounded is the Free of a take whose limits leave room for any number.
const Unbounded = 1 << 40

const (
	// StraySlot is how old a slot is at least that Maintain ends because its job has ended without saying so.
	StraySlot = time.Minute
	// IdleLimit is for how long the key of a limit is remembered that nothing counts at.
	IdleLimit = 24 * time.Hour
)
