package alert

import (
	"time"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// The states of an alert.
const (
	Inactive = "inactive"
	Pending  = "pending"
	Firing   = "firing"
	Resolved = "resolved"
)

// PendingFor is how long a condition has to hold before its alert fires: a sixtieth of the window, a
// second at least and a minute at most.
func PendingFor(window time.Duration) time.Duration {
	return min(max(window/60, time.Second), time.Minute)
}

// FiringFor is how long a condition must not hold, without a break, before its alert is resolved:
// five times as long, so that a figure that wavers about its threshold makes one alert and not many.
func FiringFor(window time.Duration) time.Duration { return 5 * PendingFor(window) }

// step moves an alert by one evaluation. The state is nil for an alert that is new.
func step(old *store.AlertState, name string, holds bool, window time.Duration, now time.Time) *store.AlertState {
	s := &store.AlertState{Name: name, State: Inactive, Since: now}
	if old != nil {
		*s = *old
	}
	s.EvaluatedAt = now
	to := func(state string) {
		s.State, s.Since, s.HeldSince = state, now, time.Time{}
	}
	switch s.State {
	case Firing:
		switch {
		case holds:
			s.HeldSince = time.Time{}
		case s.HeldSince.IsZero():
			s.HeldSince = now
		}
		if !holds && now.Sub(s.HeldSince) >= FiringFor(window) {
			to(Resolved)
		}
	case Pending:
		switch {
		case !holds:
			to(Inactive)
		case now.Sub(s.Since) >= PendingFor(window):
			to(Firing)
		}
	default: // inactive and resolved
		if holds {
			to(Pending)
		}
	}
	return s
}
