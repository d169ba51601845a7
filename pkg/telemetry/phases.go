package telemetry

import (
	"context"
	"sync"
	"time"
)

// maxPhases bounds the phases that are told apart; the time of more goes to [PhaseOther].
const maxPhases = 64

// PhaseOther is where the time of unknown phases goes.
const PhaseOther = "other"

// Phase is a part of a call and how long it took in all.
type Phase struct {
	Name string
	Took time.Duration
}

// Phases divides the time since they were made among phases that follow one another without a
// gap, by one monotonic clock. A nil one measures nothing. Its methods are safe for concurrent use.
type Phases struct {
	mu     sync.Mutex
	now    func() time.Time
	since  time.Time
	at     string
	closed bool
	list   []Phase
}

// NewPhases begins with a phase.
func NewPhases(first string) *Phases {
	p := &Phases{now: time.Now, at: first}
	p.since = p.now()
	return p
}

// Enter ends the phase that is on and begins another. It returns the one that ended.
func (p *Phases) Enter(name string) string {
	if p == nil {
		return ""
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.enter(name)
}

func (p *Phases) enter(name string) string {
	before := p.at
	if p.closed {
		return before
	}
	now := p.now()
	p.add(before, now.Sub(p.since))
	p.since, p.at = now, name
	return before
}

// EnterLast is Enter, after which nothing but [Phases.End] counts.
func (p *Phases) EnterLast(name string) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.enter(name)
	p.closed = true
}

// Within gives a part of the phase that is on to phases that another process measured
// meanwhile. They take no more than there is.
func (p *Phases) Within(parts []Phase) {
	if p == nil || len(parts) == 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	now := p.now()
	left := now.Sub(p.since)
	for _, part := range parts {
		took := min(max(part.Took, 0), left)
		p.add(part.Name, took)
		left -= took
	}
	p.add(p.at, left)
	p.since = now
}

func (p *Phases) add(name string, took time.Duration) {
	for i := range p.list {
		if p.list[i].Name == name {
			p.list[i].Took += took
			return
		}
	}
	if len(p.list) >= maxPhases {
		name = PhaseOther
		if p.list[maxPhases-1].Name != name {
			p.list[maxPhases-1].Name = name
		}
		p.list[maxPhases-1].Took += took
		return
	}
	p.list = append(p.list, Phase{name, took})
}

// End ends the last phase, and gives all of them in the order in which they first began.
func (p *Phases) End() []Phase {
	if p == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = false
	p.enter("")
	p.closed = true
	return p.list
}

type phasesKey struct{}

// WithPhases gives a context whose phases [Enter] finds.
func WithPhases(ctx context.Context, p *Phases) context.Context {
	if p == nil {
		return ctx
	}
	return context.WithValue(ctx, phasesKey{}, p)
}

// PhasesOf are the phases of a context; nil for none.
func PhasesOf(ctx context.Context) *Phases {
	p, _ := ctx.Value(phasesKey{}).(*Phases)
	return p
}

// Enter begins a phase of what the context is measured for, and returns the one that ended.
func Enter(ctx context.Context, name string) string { return PhasesOf(ctx).Enter(name) }
