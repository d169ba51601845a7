package alert

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/google/uuid"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/pkg/spec/expr"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// Clock tells the time and waits.
type Clock interface {
	Now() time.Time
	// Sleep waits for d or until ctx ends, and then returns its cause.
	Sleep(ctx context.Context, d time.Duration) error
}

// Options of an evaluator.
type Options struct {
	Store store.Alerts
	// Alerts are those of the registry in force.
	Alerts func() []*spec.Alert
	// Notify begins a run of one call and returns its id. The same key begins it once. A *fault.Error
	// that cannot be retried says that it never will.
	Notify func(ctx context.Context, service, operation string, input map[string]any, key string) (runID string, err error)
	Clock  Clock
	Logger *slog.Logger
	// Owner names this orchestrator.
	Owner string
	// Changed is told of each change of state, for metrics. May be nil.
	Changed func(alert, to string)
}

// Bounds of the evaluator.
const (
	shortestPause = time.Second
	longestPause  = 5 * time.Second
	// idlePause is how often one looks that does not evaluate.
	idlePause = 3 * time.Second
	// costShare is how many times as long as its queries took an evaluator rests at least, and longestRest
	// how long at most.
	costShare   = 20
	longestRest = 2 * time.Minute
	// notifyBatch is how many notifications begin at once, and notifyFor how long one is tried.
	notifyBatch = 100
	notifyFor   = 10 * time.Minute
)

// lease is for how long the others wait for one who evaluates.
func lease(pause time.Duration) time.Duration { return max(3*pause, 15*time.Second) }

// Run evaluates the alerts until ctx ends, while no other orchestrator does.
func Run(ctx context.Context, o Options) {
	if o.Changed == nil {
		o.Changed = func(string, string) {}
	}
	defer func() {
		leaving, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		if err := o.Store.LeaveAlerts(leaving, o.Owner); err != nil && !errors.Is(err, store.ErrClosed) {
			o.Logger.Debug("the lease of the alerts stays until it lapses", "error", err)
		}
	}()
	e := &evaluator{Options: o}
	for {
		pause, err := e.tick(ctx)
		if err != nil && ctx.Err() == nil && !errors.Is(err, store.ErrFenced) {
			o.Logger.Warn("the alerts could not be evaluated; they are again in a moment", "error", err)
		}
		if o.Clock.Sleep(ctx, pause) != nil {
			return
		}
	}
}

type evaluator struct {
	Options
	// cost is how long the last evaluation took.
	cost time.Duration
}

// tick evaluates all alerts once, if that is ours to do, and returns how long to wait.
func (e *evaluator) tick(ctx context.Context) (time.Duration, error) {
	alerts := e.Alerts()
	pause := longestPause
	for _, a := range alerts {
		pause = min(pause, max(PendingFor(a.Window)/3, shortestPause))
	}
	leads, err := e.Store.LeadAlerts(ctx, e.Owner, max(lease(pause), 4*e.cost))
	if err != nil || !leads {
		return idlePause, err
	}
	began := e.Clock.Now()
	if err = e.evaluate(ctx, alerts); err == nil {
		err = e.notify(ctx, alerts)
	}
	// What failed has cost its time, too: what took longer than the lease takes a longer one next time.
	e.cost = e.Clock.Now().Sub(began)
	rest := max(pause, min(costShare*e.cost, longestRest))
	switch {
	case errors.Is(err, store.ErrFenced):
		return pause, err
	case err != nil:
		return rest, err
	case rest > lease(pause)/2:
		_, err = e.Store.LeadAlerts(ctx, e.Owner, lease(rest)) // it has to last until the next time
	}
	return rest, err
}

func (e *evaluator) evaluate(ctx context.Context, alerts []*spec.Alert) error {
	known := map[string]*store.AlertState{}
	states, err := e.Store.AlertStates(ctx)
	if err != nil {
		return err
	}
	for _, s := range states {
		known[s.Name] = s
	}
	if len(alerts) == 0 && len(states) == 0 {
		return nil
	}
	now := e.Clock.Now()
	windows := map[time.Duration]figures{} // alerts of one window share a query
	var after []*store.AlertState
	var events []*store.AlertEvent
	for _, a := range alerts {
		if _, ok := windows[a.Window]; !ok {
			rows, err := e.Store.WindowFigures(ctx, now.Add(-a.Window))
			if err != nil {
				return err
			}
			windows[a.Window] = figuresOf(rows)
		}
		v := evaluate(a, windows[a.Window])
		s := step(known[a.Name], a.Name, v.holds, a.Window, now)
		s.Detail = v.detail
		if s.Figures, err = json.Marshal(v.values); err != nil {
			return fmt.Errorf("figures of alert %q: %w", a.Name, err)
		}
		after = append(after, s)
		before := Inactive
		if old := known[a.Name]; old != nil {
			before = old.State
		}
		if before == s.State {
			continue
		}
		event, err := e.event(a, before, s, v)
		if err != nil {
			return err
		}
		events = append(events, event)
	}
	if err := e.Store.SaveAlerts(ctx, e.Owner, after, events); err != nil {
		return err
	}
	for _, ev := range events {
		e.Changed(ev.Alert, ev.To)
		level := slog.LevelInfo
		if ev.To == Firing {
			level = slog.LevelWarn
		}
		e.Logger.Log(ctx, level, "an alert changed", "alert", ev.Alert, "from", ev.From, "to", ev.To, "figures", string(ev.Figures))
	}
	return nil
}

// event notes a change. Somebody is told when an alert fires and when it is resolved.
func (*evaluator) event(a *spec.Alert, before string, s *store.AlertState, v verdict) (*store.AlertEvent, error) {
	id, err := uuid.NewV7()
	if err != nil {
		return nil, fmt.Errorf("name an event: %w", err)
	}
	ev := &store.AlertEvent{ID: id.String(), Alert: a.Name, From: before, To: s.State, OccurredAt: s.EvaluatedAt, Figures: s.Figures}
	if a.Notify == nil || s.State != Firing && s.State != Resolved {
		return ev, nil
	}
	input, err := notifyInput(a, s, v)
	if err != nil {
		// The registry's own mistake: it is told in the history, and keeps nobody from evaluating.
		input = nil
	}
	ev.Notify = store.NotifyPending
	if ev.NotifyInput, err = json.Marshal(input); err != nil {
		return nil, fmt.Errorf("input of the notification of alert %q: %w", a.Name, err)
	}
	return ev, nil
}

// notifyInput is what the call is told: the input of the registry's own with the alert as $alert,
// or the alert itself.
func notifyInput(a *spec.Alert, s *store.AlertState, v verdict) (map[string]any, error) {
	values := map[string]any{}
	for name, value := range v.values {
		values[name] = value
	}
	about := map[string]any{
		"alert": a.Name, "name": a.Name, "state": s.State, "condition": a.Condition.Source(), "execution_type": a.ExecutionType,
		"values": values, "value": nil, "threshold": nil, "window_seconds": a.Window.Seconds(), "window": a.Window.String(),
		"since": s.Since.UTC().Format(time.RFC3339Nano),
	}
	if names := roots(a.Condition); len(names) == 1 {
		if value, ok := v.values[names[0]]; ok {
			about["value"] = value
		}
	}
	if t, ok := Threshold(a.Condition); ok {
		about["threshold"] = t
	}
	if a.Notify.Input == nil {
		delete(about, "name")
		return about, nil
	}
	input, err := a.Notify.Input.Eval(expr.MapScope{"alert": about})
	if err != nil {
		return nil, err
	}
	object, ok := input.(map[string]any)
	if !ok {
		return nil, errors.New("notify.input has to be a map")
	}
	return object, nil
}

// notify begins the runs that tell of changes. Their jobs count in no alert's figures, and a run that
// fails is not repeated, so that an alert about the service that is told makes no more of itself.
func (e *evaluator) notify(ctx context.Context, alerts []*spec.Alert) error {
	pending, err := e.Store.PendingNotifications(ctx, notifyBatch)
	if err != nil {
		return err
	}
	for _, ev := range pending {
		runID, failure := "", ""
		switch n := notification(alerts, ev.Alert); {
		case n == nil:
			failure = "the alert is no longer in the registry, or tells nobody"
		default:
			var input map[string]any
			if json.Unmarshal(ev.NotifyInput, &input) != nil || input == nil {
				failure = "notify.input could not be evaluated; its names are $alert.name, .state, .condition, .execution_type, .value, .values, .threshold, .window, .window_seconds and .since"
				break
			}
			runID, err = e.Notify(ctx, n.Service, n.Operation, input, "alert-"+ev.ID)
			if err == nil {
				break
			}
			f, known := fault.As(err)
			if (!known || f.Retryable || f.Code == fault.Unavailable) && e.Clock.Now().Sub(ev.OccurredAt) < notifyFor {
				e.Logger.Warn("nobody could be told of an alert; it is tried again", "alert", ev.Alert, "error", err)
				continue
			}
			failure = fault.From(err).Message
		}
		if failure != "" {
			e.Logger.Error("nobody is told of an alert", "alert", ev.Alert, "to", ev.To, "error", failure)
		}
		if err := e.Store.Notified(ctx, ev.ID, runID, failure); err != nil {
			return err
		}
	}
	return nil
}

func notification(alerts []*spec.Alert, name string) *spec.Notification {
	for _, a := range alerts {
		if a.Name == name {
			return a.Notify
		}
	}
	return nil
}
