package store

import (
	"context"
	"encoding/json"
	"time"
)

// Alerts keeps how alerts stand, so that it survives whoever evaluates them.
type Alerts interface {
	// LeadAlerts makes owner the one who evaluates alerts for a while, unless another one is, and
	// reports whether it is. Called again before that time is over, it goes on.
	LeadAlerts(ctx context.Context, owner string, lease time.Duration) (bool, error)
	// LeaveAlerts lets another one evaluate alerts at once.
	LeaveAlerts(ctx context.Context, owner string) error
	// AlertLeader is who evaluates alerts; empty for nobody.
	AlertLeader(ctx context.Context) (string, error)
	// SaveAlerts writes how alerts stand, forgets those that are not among them, and adds events, all at
	// once; ErrFenced where owner does not evaluate alerts any more. Of each alert the newest
	// MaxAlertEvents events are kept, of one that is not among the states for RemovedAlertLife.
	SaveAlerts(ctx context.Context, owner string, states []*AlertState, events []*AlertEvent) error
	// AlertStates returns how alerts stand, by name.
	AlertStates(ctx context.Context) ([]*AlertState, error)
	// AlertEvents returns at most limit events of an alert, newest first.
	AlertEvents(ctx context.Context, alert string, limit int) ([]*AlertEvent, error)
	// PendingNotifications returns at most limit events of which somebody is still to be told, oldest first.
	PendingNotifications(ctx context.Context, limit int) ([]*AlertEvent, error)
	// Notified sets the outcome of a notification: the run that it began, or why it could not be begun.
	Notified(ctx context.Context, id, runID, failure string) error
	// WindowFigures sums up the jobs that ended at since or later, a row an execution type and one with
	// an empty type for all of them. Jobs that were cancelled, and those of runs of [AlertSubject], are left
	// out. A job of no run counts from when it was recorded.
	WindowFigures(ctx context.Context, since time.Time) ([]*WindowFigures, error)
}

// AlertSubject is who asks for the runs that tell of alerts.
const AlertSubject = "system:alerts"

// MaxAlertEvents is how many events of an alert are kept.
const MaxAlertEvents = 100

// RemovedAlertLife is for how long the events of an alert are kept that is not in the registry any more.
const RemovedAlertLife = 30 * 24 * time.Hour

// AlertState is a row of tb_alert.
type AlertState struct {
	Name string
	// State is inactive, pending, firing or resolved, Since its begin.
	State string
	Since time.Time
	// HeldSince is when the condition began to hold without a break, or, of a firing alert,
	// not to hold; zero where it does what the state says.
	HeldSince   time.Time
	EvaluatedAt time.Time
	// Figures are those of the condition, as a JSON object of numbers.
	Figures json.RawMessage
	// Detail says why the condition could not be evaluated.
	Detail string
}

// The outcomes of a notification; empty where there is none.
const (
	NotifyPending = "pending"
	NotifyStarted = "started"
	NotifyFailed  = "failed"
)

// AlertEvent is a row of tb_alert_event.
type AlertEvent struct {
	// ID is a UUID.
	ID         string
	Alert      string
	From, To   string
	OccurredAt time.Time
	Figures    json.RawMessage
	// Notify is the outcome of the notification, NotifyInput the JSON object that it sends.
	Notify      string
	NotifyInput json.RawMessage
	NotifyRunID string
	NotifyError string
}

// WindowFigures are sums over jobs that ended within a window.
type WindowFigures struct {
	// ExecutionType is empty for all of them.
	ExecutionType string
	// Completed and Failed jobs. Resource and Security are the failed ones that a limit or a policy ended.
	Completed, Failed, Resource, Security int64
	// CostUSD of the jobs whose cost is known.
	CostUSD float64
	// The durations are in seconds, by nearest rank; nil where no job has one.
	P50, P95, P99 *float64
}
