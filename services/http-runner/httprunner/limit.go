package httprunner

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/failsafe-go/failsafe-go/circuitbreaker"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/runner"
)

const (
	// claimWithin is how long after its time a promised slot is kept for the job.
	claimWithin = 15 * time.Second
	// maxPromises bounds the slots that are kept; later jobs are told a time that others are told, too.
	maxPromises = 4096
	// maxPromisedID bounds the ids that are remembered, in bytes.
	maxPromisedID = 256
	// waitHere is the longest wait that is spent in the runner. A job that comes for its slot may
	// find that one before it came some milliseconds late; that is not worth an attempt.
	waitHere = time.Second
)

// window lets most calls pass in any minute, exactly: it remembers when the last ones were.
//
// A job that has to wait is promised a slot of its own. If all were told the same time, all
// would come back at it, most in vain, until their attempts are used up.
type window struct {
	mu   sync.Mutex
	most int
	// times is a ring of the last calls; next is the oldest once the ring is full.
	times []time.Time
	next  int
	// promised slots, by time.
	promised []promise
}

// promise is a slot that is kept for a job.
type promise struct {
	job string
	at  time.Time
}

// take lets a call of a job pass, or says how long it has to wait.
func (w *window) take(job string, now time.Time) (wait time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.promised = slices.DeleteFunc(w.promised, func(p promise) bool { return now.Sub(p.at) > claimWithin })
	var at time.Time
	if i := w.find(job); i >= 0 {
		if at = w.promised[i].at; at.After(now) {
			return at.Sub(now) // too early: the slot stays
		}
		w.promised = slices.Delete(w.promised, i, i+1)
		at = w.after(now, len(w.times)-w.most, nil)
	} else {
		at = w.after(now, len(w.times)+len(w.promised)-w.most, w.promised)
	}
	if at.After(now) {
		w.keep(promise{job, at})
		return at.Sub(now)
	}
	if len(w.times) < w.most {
		w.times = append(w.times, now)
		return 0
	}
	w.times[w.next] = now
	w.next = (w.next + 1) % w.most
	return 0
}

// after is the first time from now on that is a minute after the slot with number i of the past
// calls followed by the promised ones. With i as the last but most of these, no minute holds more
// than most slots then, whatever the order in which the promises are redeemed.
func (w *window) after(now time.Time, i int, promised []promise) time.Time {
	if i < 0 {
		return now
	}
	var at time.Time
	if i < len(w.times) {
		at = w.times[(w.next+i)%len(w.times)]
	} else {
		at = promised[i-len(w.times)].at
	}
	if at = at.Add(time.Minute); at.Before(now) {
		return now
	}
	return at
}

func (w *window) find(job string) int {
	if job == "" {
		return -1
	}
	return slices.IndexFunc(w.promised, func(p promise) bool { return p.job == job })
}

func (w *window) keep(p promise) {
	if p.job == "" || len(p.job) > maxPromisedID || len(w.promised) >= maxPromises {
		return
	}
	i, _ := slices.BinarySearchFunc(w.promised, p.at, func(q promise, at time.Time) int {
		if q.at.After(at) {
			return 1
		}
		return -1 // behind those of the same time
	})
	w.promised = slices.Insert(w.promised, i, p)
}

// giveBack frees the slot that was taken last, if that was at the time given. The slot of then is
// the oldest again, and a minute old.
func (w *window) giveBack(at time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n := len(w.times); n < w.most {
		if n > 0 && w.times[n-1].Equal(at) {
			w.times = w.times[:n-1]
		}
		return
	}
	if last := (w.next + w.most - 1) % w.most; w.times[last].Equal(at) {
		w.times[last], w.next = at.Add(-time.Minute), last
	}
}

// giveUp takes back what a job was promised.
func (w *window) giveUp(job string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if i := w.find(job); i >= 0 {
		w.promised = slices.Delete(w.promised, i, i+1)
	}
}

// Limits implements [runner.Limiter]: rate_limit_per_minute of the service, and of the operator for its origin. A service
// that cannot be called has none.
func (r *Runner) Limits(_ context.Context, s *runner.Service) ([]runner.Limit, error) {
	if s == nil || len(s.Operations) != 1 {
		return nil, fault.New(fault.Validation, "limits are asked of one operation")
	}
	p, err := r.planFor(s, &s.Operations[0])
	if err != nil {
		return nil, nil //nolint:nilerr // every call of it fails, and says why
	}
	var limits []runner.Limit
	if n := p.policy.ratePerMinute; n > 0 {
		limits = append(limits, runner.Limit{
			Key: "service/" + s.Name, Window: time.Minute, MaxAttempts: int64(n), Rule: "rate_limit_per_minute of " + s.Name + " in " + registryName,
			AttemptsKey: rateRule,
		})
	}
	if n := p.policy.ceilingPerMinute; n > 0 {
		origin := p.base.target.origin()
		limits = append(limits, runner.Limit{
			Key: "origin/" + origin, Window: time.Minute, MaxAttempts: int64(n), Rule: "rate_limit_per_minute for " + origin + " in " + ceilingName,
			AttemptsKey: rateRule, Ceiling: true,
		})
	}
	return limits, nil
}

// rateRule is the key of the policy for rates.
const rateRule = "rate_limit_per_minute"

type windowKey struct {
	// service, or for the operator's limit the origin: a service may be called by any name.
	service, origin string
	most            int
}

type breakerKey struct {
	service, origin string
	threshold       int
	recovery        time.Duration
}

type breaker = circuitbreaker.CircuitBreaker[any]

func (r *Runner) newBreaker(k breakerKey) breaker {
	note := func(text string) func(circuitbreaker.StateChangedEvent) {
		return func(circuitbreaker.StateChangedEvent) {
			r.options.Logger.Warn(text, "called_service", k.service, "origin", k.origin)
		}
	}
	return circuitbreaker.NewBuilder[any]().
		WithFailureThreshold(uint(k.threshold)).
		WithDelay(k.recovery).
		WithSuccessThreshold(1).
		OnOpen(note("circuit breaker opened")).
		OnClose(note("circuit breaker closed")).
		Build()
}

// admit asks the breaker and the rate limit of a service whether a call may go out now. done
// must be called with the call's outcome.
func (r *Runner) admit(ctx context.Context, job *runner.Job, p *plan, checks *runner.Checks) (done func(outcome), refused *fault.Error) {
	service := job.Service.Name
	done = func(outcome) {}
	if n := p.policy.breakerThreshold; n > 0 {
		key := breakerKey{service, p.base.target.origin(), n, p.policy.breakerRecovery}
		b := r.breakers.getOrMake(key, func() breaker { return r.newBreaker(key) })
		if !b.TryAcquirePermit() {
			err := fault.New(fault.Unavailable, "the circuit breaker of %s is open after %d failures in a row; it lets a call through again in %s",
				service, n, b.RemainingDelay().Round(time.Millisecond))
			err.RetryAfter = b.RemainingDelay()
			return nil, err
		}
		done = func(o outcome) { tell(b, o) }
	}
	if refused := r.admitRate(ctx, job, p, checks); refused != nil {
		done(unknown)
		return nil, refused
	}
	return done, nil
}

// admitRate takes a slot of each limit, of both or of none.
func (r *Runner) admitRate(ctx context.Context, job *runner.Job, p *plan, checks *runner.Checks) *fault.Error {
	if p.policy.ratePerMinute <= 0 && p.policy.ceilingPerMinute <= 0 {
		return nil
	}
	origin := p.base.target.origin()
	var first *window
	var taken time.Time
	for _, limit := range []struct {
		windows     *cache[windowKey, *window]
		key         windowKey
		what, whose string
	}{
		{r.windows, windowKey{service: job.Service.Name, most: p.policy.ratePerMinute}, job.Service.Name, registryName},
		{r.ceilings, windowKey{origin: origin, most: p.policy.ceilingPerMinute}, origin, ceilingName},
	} {
		n := limit.key.most
		if n <= 0 {
			continue
		}
		w := limit.windows.getOrMake(limit.key, func() *window { return &window{most: n} })
		wait, at, err := r.pace(ctx, w, job.ID)
		if err == nil && wait > 0 {
			err = fault.New(fault.RateLimited, "rate_limit_per_minute of %s: %s may be called %d times a minute; the next call may go out in %s",
				limit.whose, limit.what, n, wait.Round(time.Millisecond))
			err.RetryAfter = wait
			_ = checks.Deny("rate_limit_per_minute", "call of "+limit.what, err.Message, runner.RaiseAbove(limit.whose == ceilingName, "rate_limit_per_minute", float64(n)))
		}
		if err != nil {
			if first != nil {
				first.giveBack(taken)
			}
			return err
		}
		first, taken = w, at
	}
	return nil
}

// pace takes a slot of the window and gives its time. It waits where that takes no longer than
// waitHere, else it gives the wait.
func (r *Runner) pace(ctx context.Context, w *window, job string) (wait time.Duration, at time.Time, err *fault.Error) {
	for range 3 {
		at = r.now()
		wait = w.take(job, at)
		deadline, limited := ctx.Deadline()
		if wait <= 0 || wait > waitHere || limited && time.Until(deadline) <= wait {
			return wait, at, nil
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			w.giveUp(job)
			return 0, at, fault.From(context.Cause(ctx))
		}
	}
	at = r.now()
	return w.take(job, at), at, nil
}

// outcome is what a call tells about the health of its target.
type outcome int

const (
	unknown outcome = iota // the call ended before the target could answer
	healthy
	failing
)

func tell(b breaker, o outcome) {
	switch o {
	case healthy:
		b.RecordSuccess()
	case failing:
		b.RecordFailure()
	case unknown:
		// In the half-open state the permit must be given back; nothing was learnt, so the
		// breaker stays open for another while.
		if b.IsHalfOpen() {
			b.RecordFailure()
		}
	}
}
