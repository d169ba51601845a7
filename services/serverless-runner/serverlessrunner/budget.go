package serverlessrunner

import (
	"fmt"
	"math"
	"sync"
	"time"

	"github.com/specql/mesh/pkg/fault"
)

const (
	budgetWindow  = time.Hour
	budgetSlot    = 10 * time.Second
	budgetSlots   = int(budgetWindow / budgetSlot)
	budgetMost    = 10_000
	budgetNoPrice = -1
)

// budget counts the invocations and the cost of each account over the last hour: one for each
// service, and one for the operator's limits, which hold for all services together, since whoever
// sends the jobs chooses the services' names.
//
// It counts in slots of ten seconds, and a slot counts until all of it is an hour old, so
// that a limit is never exceeded for the way it is counted. A call that runs counts with the most
// that it can cost, and a call of which the provider does not tell the cost has cost that.
type budget struct {
	mu       sync.Mutex
	services map[string]*spend
}

type spend struct {
	slots    [budgetSlots + 1]slot
	inFlight int
	// reserved is the most that the calls in flight can cost.
	reserved float64
	last     time.Time
}

type slot struct {
	start       int64 // in slots since the epoch
	invocations int64
	cost        float64
}

// ceilingAccount is that of the operator's limits; no service has an empty name.
const ceilingAccount = ""

// begin counts an invocation and reserves the most that it can cost, at every account or at none, or
// answers BUDGET_EXCEEDED. The function returned must be called once. It takes whether the
// function was called at all, and the cost of the call, budgetNoPrice where it is not known.
func (b *budget) begin(service string, e effective, most float64) (func(invoked bool, cost float64), error) {
	first, err := b.beginAt(service, service, e.Service.CostLimits, most)
	if err != nil || e.Ceiling == nil {
		return first, err
	}
	second, err := b.beginAt(ceilingAccount, "the runner", e.Ceiling.CostLimits, most)
	if err != nil {
		first(false, 0)
		return nil, err
	}
	return func(invoked bool, cost float64) { first(invoked, cost); second(invoked, cost) }, nil
}

func (b *budget) beginAt(account, what string, l CostLimits, most float64) (func(invoked bool, cost float64), error) {
	if l.MaxInvocationsPerHour == 0 && l.MaxCostPerHour == 0 {
		return func(bool, float64) {}, nil
	}
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	s, err := b.of(account, now)
	if err != nil {
		return nil, err
	}
	if err := s.check(what, l, most, now); err != nil {
		err.ceiling = account == ceilingAccount
		return nil, err
	}
	s.last = now
	s.inFlight++
	s.reserved += most
	begun := s.slot(now)
	begun.invocations++
	counted := begun.start
	return func(invoked bool, cost float64) {
		end := time.Now()
		b.mu.Lock()
		defer b.mu.Unlock()
		s.inFlight--
		s.reserved -= most
		if s.inFlight == 0 {
			s.reserved = 0 // and no rounding is carried along
		}
		s.last = end
		switch {
		case !invoked:
			if begun.start == counted {
				begun.invocations--
			}
			return
		case cost < 0:
			cost = most
		}
		if cost > 0 {
			s.slot(end).cost += cost
		}
	}, nil
}

// of finds the spend of a service. Services idle for an hour are forgotten.
func (b *budget) of(service string, now time.Time) (*spend, error) {
	if s := b.services[service]; s != nil {
		return s, nil
	}
	if b.services == nil {
		b.services = make(map[string]*spend)
	}
	if len(b.services) >= budgetMost {
		for name, s := range b.services {
			if s.inFlight == 0 && now.Sub(s.last) > budgetWindow+budgetSlot {
				delete(b.services, name)
			}
		}
		if len(b.services) >= budgetMost {
			return nil, fault.New(fault.BudgetExceeded, "more than %d services with cost_limits were called within an hour; run more serverless runners", budgetMost)
		}
	}
	s := &spend{}
	b.services[service] = s
	return s, nil
}

// spentError says which limit is used up.
type spentError struct {
	fault *fault.Error
	// key of the policy, and the value that would allow the call; ceiling says whose.
	key     string
	enough  float64
	ceiling bool
}

func (e *spentError) Error() string { return e.fault.Error() }
func (e *spentError) Unwrap() error { return e.fault }

func (s *spend) check(what string, l CostLimits, call float64, now time.Time) *spentError {
	invocations, cost := s.sum(now)
	if most := l.MaxInvocationsPerHour; most > 0 && invocations >= most {
		return &spentError{key: "cost_limits.max_invocations_per_hour", enough: float64(invocations + 1), fault: s.exceeded(now,
			fmt.Sprintf("%s was invoked %d times in the last hour and cost_limits.max_invocations_per_hour is %d", what, invocations, most))}
	}
	// The smallest part of a dollar is for what adding has rounded.
	if most := l.MaxCostPerHour; most > 0 && cost+s.reserved+call > most+1e-12 {
		return &spentError{key: "cost_limits.max_cost_per_hour", enough: math.Ceil((cost+s.reserved+call)*1e6) / 1e6, fault: s.exceeded(now, fmt.Sprintf("%s cost %.6f USD in the last hour, its %d calls in flight may cost %.6f USD, this one %.6f USD, and cost_limits.max_cost_per_hour is %g",
			what, cost, s.inFlight, s.reserved, call, most))}
	}
	return nil
}

// exceeded says when the oldest slot leaves the hour.
func (s *spend) exceeded(now time.Time, text string) *fault.Error {
	wait := budgetSlot
	oldest := int64(-1)
	for _, c := range s.slots {
		if c.inWindow(now) && (c.invocations > 0 || c.cost > 0) && (oldest < 0 || c.start < oldest) {
			oldest = c.start
		}
	}
	if oldest >= 0 {
		wait = time.Duration(oldest+1)*budgetSlot + budgetWindow - time.Duration(now.UnixNano())
	}
	e := fault.New(fault.BudgetExceeded, "%s; wait %s or raise the limit", text, wait.Round(time.Second))
	e.RetryAfter = wait
	return e
}

func (s *spend) sum(now time.Time) (invocations int64, cost float64) {
	for _, c := range s.slots {
		if c.inWindow(now) {
			invocations += c.invocations
			cost += c.cost
		}
	}
	return invocations, cost
}

// inWindow says whether any part of the slot is less than an hour ago.
func (c slot) inWindow(now time.Time) bool {
	return c.start > 0 && time.Duration(c.start+1)*budgetSlot > time.Duration(now.UnixNano())-budgetWindow
}

// slot is the one of a time, emptied where it held an older hour.
func (s *spend) slot(now time.Time) *slot {
	start := now.UnixNano() / int64(budgetSlot)
	c := &s.slots[start%int64(len(s.slots))]
	if c.start != start {
		*c = slot{start: start}
	}
	return c
}
