package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/telemetry"
	"github.com/specql/mesh/services/orchestrator/internal/plan"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// siblingError is the cause of branches that end because another one failed.
type siblingError struct{ path string }

func (e *siblingError) Error() string {
	if e.path == "" {
		return "cancelled because another branch failed"
	}
	return "cancelled because " + e.path + " failed"
}

// Kinds of steps that are recorded.
const (
	stepUpdate = "update"
	stepWait   = "wait"
	stepAwait  = "await_signal"
)

// body walks everything.
func (r *run) body() error {
	if err := context.Cause(r.ctx); err != nil {
		return err
	}
	for _, c := range r.plan.Preconditions {
		ok, err := r.holds(c, nil)
		if err != nil {
			return fault.Wrap(err, fault.Validation, "precondition %s: %v", c.Source(), err)
		}
		if !ok {
			return fault.New(fault.Validation, "the precondition does not hold: %s", c.Source())
		}
	}
	return r.sequence(r.ctx, r.plan.Nodes, nil)
}

func (r *run) sequence(ctx context.Context, nodes []plan.Node, f *frame) error {
	for _, n := range nodes {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if err := r.node(ctx, n, f); err != nil {
			return err
		}
	}
	return nil
}

func (r *run) node(ctx context.Context, n plan.Node, f *frame) error {
	switch n := n.(type) {
	case *plan.Call:
		return r.call(ctx, n, f)
	case *plan.Parallel:
		return r.branchOut(ctx, len(n.Branches), n.MaxConcurrency, n.WaitAll, func(ctx context.Context, i int) error {
			return r.sequence(ctx, n.Branches[i], f)
		}, func(i int) string { return at(f, n) + ".branches[" + strconv.Itoa(i) + "]" })
	case *plan.If:
		ok, err := r.holds(n.Condition, f)
		if err != nil {
			return r.invalid(f, n, err)
		}
		if ok {
			return r.sequence(ctx, n.Then, f)
		}
		return r.sequence(ctx, n.Else, f)
	case *plan.Foreach:
		return r.foreach(ctx, n, f)
	case *plan.Validate:
		for _, c := range n.Conditions {
			ok, err := r.holds(c, f)
			if err != nil {
				return r.invalid(f, n, err)
			}
			if !ok {
				return fault.New(fault.Validation, "%s: the condition does not hold: %s", at(f, n), c.Source())
			}
		}
		return nil
	case *plan.Update:
		return r.update(ctx, n, f)
	case *plan.Fail:
		msg, err := r.eval(n.Message, f)
		if err != nil {
			return r.invalid(f, n, err)
		}
		return fault.New(fault.Validation, "%s: %s", at(f, n), text(msg))
	case *plan.Wait:
		return r.wait(ctx, n, f)
	case *plan.AwaitSignal:
		return r.awaitSignal(ctx, n, f)
	}
	return fault.New(fault.Internal, "%s: a step of an unknown kind %T", n.Path(), n)
}

func at(f *frame, n plan.Node) string {
	if k, ok := n.(keyed); ok {
		return f.of(k)
	}
	return n.Path()
}

func (r *run) invalid(f *frame, n plan.Node, err error) error {
	return fault.Wrap(err, fault.Validation, "%s: %v", at(f, n), err)
}

func text(v any) string {
	if s, ok := v.(string); ok {
		return s
	}
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Sprint(v)
	}
	return string(b)
}

// deepen makes the stack of a new goroutine as large as a call needs it: grown step by step in the depth of the call, with all
// that is on it copied each time, it took a fifteenth of the time of a step.
//
//go:noinline
func deepen() {
	var room [12 << 10]byte
	runtime.KeepAlive(&room)
}

// branchOut walks branches at the same time and returns when all have ended. The first to
// fail is the block's error; unless all are waited for, it ends the others.
func (r *run) branchOut(ctx context.Context, n, limit int, waitAll bool, branch func(context.Context, int) error, path func(int) string) error {
	if n == 0 {
		return nil
	}
	if limit <= 0 || limit > n {
		limit = n
	}
	if limit == 1 && !waitAll {
		for i := range n {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			if err := branch(ctx, i); err != nil {
				return err
			}
		}
		return nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var (
		wg         sync.WaitGroup
		mu         sync.Mutex
		first      error
		sibling    error
		failed     bool
		failures   int
		lowest     int
		handedBack bool
		ended      int
		done       atomic.Int64 // branches that came to their end
		given      int          // places among the live branches that were given back
		tokens     = make(chan struct{}, limit)
	)
	// As long as branches are to come, one that ends is followed by another.
	end := func() {
		<-tokens
		mu.Lock()
		ended++
		spare := ended < n && n-ended < limit
		if spare {
			given++
		}
		mu.Unlock()
		if spare {
			r.branches(-1)
		}
	}
	r.fork(1)
	defer r.fork(-1)
	r.branches(limit - 1)
	for i := range n {
		tokens <- struct{}{}
		mu.Lock()
		over := handedBack || (failed && !waitAll)
		mu.Unlock()
		if over || context.Cause(ctx) != nil {
			<-tokens
			break
		}
		wg.Go(func() {
			deepen()
			defer end()
			err := r.protect(func() error { return branch(ctx, i) })
			// What the branch did last must not wait for its slower siblings. What the last of them did is written with what
			// follows.
			if err == nil && done.Add(1) < int64(n) {
				err = r.forward()
			} else if err != nil && waitAll && !errors.Is(err, ErrHandBack) {
				_ = r.forward() // the branch has its error
			}
			if err == nil {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if errors.Is(err, ErrHandBack) {
				// Its siblings' calls go on: whoever drains waits for them.
				handedBack = true
				return
			}
			if _, ok := errors.AsType[*siblingError](err); ok {
				// The branch that failed ends the others; where this is a replay, it fails again.
				sibling = err
				return
			}
			// Of several failures the first branch's counts, whichever came first.
			if failures++; !failed || i < lowest {
				first, failed, lowest = err, true, i
			}
			if !waitAll {
				cancel(&siblingError{path(i)})
			}
		})
	}
	wg.Wait()
	r.branches(1 - limit + given)
	switch {
	case failed && (!waitAll || !handedBack):
		if f, ok := fault.As(first); ok && waitAll && failures > 1 {
			all := *f
			all.Message += fmt.Sprintf(" (and %d more branches failed)", failures-1)
			return &all
		}
		return first
	case handedBack:
		return ErrHandBack
	case context.Cause(ctx) != nil:
		return context.Cause(ctx)
	}
	return sibling
}

func (r *run) foreach(ctx context.Context, n *plan.Foreach, f *frame) error {
	v, err := r.eval(n.Items, f)
	if err != nil {
		return r.invalid(f, n, err)
	}
	items, ok := v.([]any)
	if !ok {
		return fault.New(fault.Validation, "%s: items has to be a list and is %s", at(f, n), kind(v))
	}
	if len(items) > MaxIterations {
		return fault.New(fault.Validation, "%s: %d items; at most %d are taken", at(f, n), len(items), MaxIterations)
	}
	key := f.of(n)
	r.mu.Lock()
	r.counts[key] = len(items)
	r.mu.Unlock()
	return r.branchOut(ctx, len(items), n.MaxConcurrency, false, func(ctx context.Context, i int) error {
		return r.sequence(ctx, n.Do, &frame{key: iteration(key, i), loop: n, index: i, item: items[i], parent: f})
	}, func(i int) string { return iteration(key, i) })
}

func kind(v any) string {
	switch v.(type) {
	case nil:
		return "null"
	case map[string]any:
		return "an object"
	case []any:
		return "a list"
	case string:
		return "a string"
	case bool:
		return "a boolean"
	}
	return "a number"
}

// recorded returns a step's record of this try, nil where it has none.
func (r *run) recorded(key string) *store.Step {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.steps[key]
	if s == nil || (s.Status != store.Completed && s.Generation < r.state.Retries) {
		return nil
	}
	return s
}

func (r *run) newStep(key, kind string) *store.Step {
	return &store.Step{
		RunID: r.id, StepPath: key, Generation: r.state.Retries, Kind: kind, Status: store.Running, StartedAt: r.e.Clock.Now(),
	}
}

func (r *run) update(ctx context.Context, n *plan.Update, f *frame) error {
	key := f.of(n)
	if s := r.recorded(key); s != nil && s.Status == store.Completed {
		set, err := decodeObject(s.Data)
		if err != nil {
			return fault.Wrap(err, fault.Internal, "%s: the record of the update is damaged", key)
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.setRow(set)
		return nil
	}
	set := make(map[string]any, len(n.Set))
	for _, a := range n.Set {
		v, err := r.eval(a.Value, f)
		if err != nil {
			return fault.Wrap(err, fault.Validation, "%s: set.%s: %v", key, a.Field, err)
		}
		set[a.Field] = v
	}
	if err := r.plan.Entity.CheckRow(set); err != nil {
		return fault.Wrap(err, fault.Validation, "%s: %v", key, err)
	}
	data, err := json.Marshal(set)
	if err != nil {
		return r.invalid(f, n, err)
	}
	s := r.newStep(key, stepUpdate)
	s.Status, s.Data, s.CompletedAt = store.Completed, data, r.e.Clock.Now()
	if err := r.lockForUpdate(ctx); err != nil {
		return err
	}
	r.setRow(set)
	r.noteStepLocked(s)
	b := r.next
	if b.rec.UpdateRow == nil {
		b.rec.UpdateRow = &store.EntityRow{Schema: r.state.EntitySchema, Entity: r.state.Entity, ID: r.state.EntityID, Values: map[string]any{}}
	}
	maps.Copy(b.rec.UpdateRow.Values, set)
	r.mu.Unlock()
	if err := r.flush(ctx); err != nil {
		return err
	}
	if b.rowErr != nil {
		if e, ok := fault.As(b.rowErr); ok {
			return fault.Wrap(b.rowErr, e.Code, "%s: %s", key, e.Message)
		}
		return fault.Wrap(b.rowErr, fault.Validation, "%s: the row of %s could not be updated: %v", key, r.plan.Entity.Name, b.rowErr)
	}
	return nil
}

// lockForUpdate locks r.mu once no other step's update gathers in the next record: the table would refuse both where it refuses one.
func (r *run) lockForUpdate(ctx context.Context) error {
	for {
		r.mu.Lock()
		b := r.next
		if b.rec.UpdateRow == nil {
			return nil
		}
		r.mu.Unlock()
		if err := r.forward(); err != nil {
			return err
		}
		select {
		case <-b.done:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// setRow changes the row as the run sees it. Rows are replaced, never changed, as an
// expression may hold one. r.mu is held.
func (r *run) setRow(values map[string]any) {
	row := make(map[string]any, len(r.entityRow)+len(values))
	maps.Copy(row, r.entityRow)
	maps.Copy(row, values)
	r.entityRow = row
}

func (r *run) wait(ctx context.Context, n *plan.Wait, f *frame) error {
	key := f.of(n)
	s := r.recorded(key)
	if s != nil && s.Status == store.Completed {
		return nil
	}
	if s != nil && s.Status == store.Cancelled {
		return &siblingError{}
	}
	if s == nil {
		s = r.newStep(key, stepWait)
		switch {
		case n.Seconds != nil:
			d, err := r.seconds(n.Seconds, f)
			if err != nil {
				return r.invalid(f, n, err)
			}
			s.Until = s.StartedAt.Add(d)
		default:
			v, err := r.eval(n.Until, f)
			if err != nil {
				return r.invalid(f, n, err)
			}
			t, err := time.Parse(time.RFC3339Nano, text(v))
			if err != nil {
				return fault.New(fault.Validation, "%s: until is %q, which is no time; write it like 2030-01-31T12:00:00Z (RFC 3339)", key, text(v))
			}
			s.Until = t
		}
		if s.Until.Before(s.StartedAt) {
			s.Until = s.StartedAt // the zero time would mean never
		}
	}
	if err := r.pause(ctx, s, nil); err != nil {
		return err
	}
	s.Status, s.CompletedAt = store.Completed, r.e.Clock.Now()
	r.noteStep(s)
	r.endStep(ctx, s)
	return nil
}

// maxSeconds is a hundred years.
const maxSeconds = 100 * 365 * 24 * 3600

// seconds evaluates a template to a duration.
func (r *run) seconds(t *plan.Template, f *frame) (time.Duration, error) {
	v, err := r.eval(t, f)
	if err != nil {
		return 0, err
	}
	if d, err := time.ParseDuration(text(v)); err == nil && d >= 0 {
		return d, nil
	}
	n, err := strconv.ParseFloat(text(v), 64)
	if err != nil || !(n >= 0 && n <= maxSeconds) { // NaN is neither
		return 0, fmt.Errorf("%s is no number of seconds between 0 and a hundred years, and no duration such as 90s or 2h", text(v))
	}
	return time.Duration(n * float64(time.Second)), nil
}

// errSignal ends a pause because a signal came.
var errSignal = errors.New("a signal came")

// pause records a step that waits and waits until its time has come, or until ready says
// that it need not: then it returns errSignal.
func (r *run) pause(ctx context.Context, s *store.Step, ready func() bool) error {
	r.noteStep(s)
	if err := r.flush(ctx); err != nil {
		return err
	}
	r.sleep()
	err := r.idle(ctx, s.Until, ready, "")
	if werr := r.wake(ctx); werr != nil && (err == nil || errors.Is(err, errSignal)) {
		err = werr
	}
	if err != nil && !errors.Is(err, errSignal) && !errors.Is(err, ErrHandBack) {
		s.Status, s.CompletedAt = store.Cancelled, r.e.Clock.Now()
		r.noteStep(s)
		r.endStep(ctx, s)
	}
	return err
}

// idle waits until a time, a zero one for ever, or until ready says that it need not. Where it waits for the next
// attempt of a call, it ends once that call's execution type is disabled.
func (r *run) idle(ctx context.Context, until time.Time, ready func() bool, executionType string) error {
	var disabled <-chan struct{}
	if executionType != "" {
		if r.e.disabled(executionType) {
			return errDisabled
		}
		disabled = r.e.whenDisabled(executionType)
	}
	if (ready == nil || !ready()) && r.mayPark(ctx, until, executionType) {
		return ErrHandBack
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// Draining ends a pause: whoever takes the run over goes on with it.
	defer context.AfterFunc(r.e.drain, func() { cancel(ErrHandBack) })()
	timer := make(chan error, 1)
	if !until.IsZero() {
		d := until.Sub(r.e.Clock.Now())
		go func() { timer <- r.e.Clock.Sleep(ctx, d) }()
	}
	for {
		r.mu.Lock()
		signalled := r.signalled
		r.mu.Unlock()
		if ready != nil && ready() {
			return errSignal
		}
		select {
		case err := <-timer:
			return err
		case <-signalled:
		case <-disabled:
			return errDisabled
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// doze waits for the time of a job's next attempt, without a slot. It returns errDisabled once there is not to be one.
func (r *run) doze(ctx context.Context, d time.Duration, job *store.Job) error {
	before := telemetry.Enter(ctx, "pause")
	defer telemetry.Enter(ctx, before)
	r.sleep()
	err := r.idle(ctx, r.e.Clock.Now().Add(d), nil, job.ExecutionType)
	if werr := r.wake(ctx); err == nil || werr != nil && errors.Is(err, errDisabled) {
		err = werr
	}
	return err
}

func (r *run) awaitSignal(ctx context.Context, n *plan.AwaitSignal, f *frame) error {
	key := f.of(n)
	s := r.recorded(key)
	if s == nil {
		s = r.newStep(key, stepAwait)
		s.Name = n.Name
		if n.Timeout != nil {
			d, err := r.seconds(n.Timeout, f)
			if err != nil {
				return r.invalid(f, n, err)
			}
			s.Until = s.StartedAt.Add(d)
		}
	}
	if s.Status == store.Running {
		sig := r.takeSignal(n.Name, key)
		if sig == nil {
			var err error
			switch err = r.pause(ctx, s, func() bool { sig = r.takeSignal(n.Name, key); return sig != nil }); {
			case errors.Is(err, errSignal):
			case err != nil:
				return err
			}
		}
		s.CompletedAt = r.e.Clock.Now()
		if sig == nil {
			s.Status = store.Failed
			s.Err = fault.New(fault.Timeout, "%s: no signal %q came within its timeout; send one with `specql runs signal %s %s`", key, n.Name, r.id, n.Name)
		} else {
			s.Status, s.Data = store.Completed, sig.Payload
			r.note(func(rec *store.Record) {
				if rec.TakenSignals == nil {
					rec.TakenSignals = map[int64]string{}
				}
				rec.TakenSignals[sig.ID] = key
			})
		}
		r.noteStep(s)
		r.endStep(ctx, s)
	}
	switch s.Status {
	case store.Failed:
		return s.Err
	case store.Cancelled:
		return &siblingError{}
	case store.Pending, store.Running, store.Completed:
	}
	v, err := decode(s.Data)
	if err != nil {
		return fault.Wrap(err, fault.Internal, "%s: the payload of the signal is damaged", key)
	}
	r.mu.Lock()
	r.results[key] = &result{output: v}
	r.mu.Unlock()
	return nil
}

// takeSignal takes the oldest signal of a name that no other step has.
func (r *run) takeSignal(name, key string) *store.Signal {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.signals {
		if s.Name == name && (s.TakenBy == "" || s.TakenBy == key) {
			s.TakenBy = key
			return s
		}
	}
	return nil
}
