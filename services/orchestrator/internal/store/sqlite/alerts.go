package sqlite

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// LeadAlerts implements [store.Store].
func (s *Store) LeadAlerts(ctx context.Context, owner string, lease time.Duration) (leads bool, err error) {
	now := s.timeNow()
	err = s.write(ctx, func(w *writer) error {
		n, err := w.exec(`INSERT INTO jobs.tb_alert_lease (id, owner, expires_at) VALUES (1, ?1, ?2)
			ON CONFLICT (id) DO UPDATE SET owner = excluded.owner, expires_at = excluded.expires_at
			WHERE owner = excluded.owner OR expires_at < ?3`, owner, timeValue(now.Add(lease)), timeValue(now))
		leads = n > 0
		return err
	})
	if err != nil {
		return false, fmt.Errorf("lead the alerts: %w", err)
	}
	return leads, nil
}

// LeaveAlerts implements [store.Store].
func (s *Store) LeaveAlerts(ctx context.Context, owner string) error {
	err := s.write(ctx, func(w *writer) error {
		_, err := w.exec("DELETE FROM jobs.tb_alert_lease WHERE owner = ?", owner)
		return err
	})
	if err != nil {
		return fmt.Errorf("leave the alerts: %w", err)
	}
	return nil
}

// AlertLeader implements [store.Store].
func (s *Store) AlertLeader(ctx context.Context) (string, error) {
	end, err := s.read()
	if err != nil {
		return "", err
	}
	defer end()
	owner, err := one(ctx, s.readDB, func(row scanner) (owner string, err error) {
		return owner, row.Scan(&owner)
	}, "SELECT owner FROM jobs.tb_alert_lease WHERE expires_at >= ?", timeValue(s.timeNow()))
	if errors.Is(err, store.ErrNotFound) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("who evaluates alerts: %w", err)
	}
	return owner, nil
}

// SaveAlerts implements [store.Store].
func (s *Store) SaveAlerts(ctx context.Context, owner string, states []*store.AlertState, events []*store.AlertEvent) error {
	err := s.write(ctx, func(w *writer) error {
		var mine int
		err := w.row("SELECT 1 FROM jobs.tb_alert_lease WHERE owner = ? AND expires_at >= ?", []any{owner, timeValue(s.timeNow())}, &mine)
		if errors.Is(err, sql.ErrNoRows) {
			return store.ErrFenced
		}
		if err != nil {
			return err
		}
		names := make([]string, 0, len(states))
		for _, a := range states {
			names = append(names, a.Name)
			_, err := w.exec(`INSERT INTO jobs.tb_alert (name, state, since, held_since, evaluated_at, figures, detail) VALUES (?, ?, ?, ?, ?, ?, ?)
				ON CONFLICT (name) DO UPDATE SET state = excluded.state, since = excluded.since, held_since = excluded.held_since,
				evaluated_at = excluded.evaluated_at, figures = excluded.figures, detail = excluded.detail`,
				a.Name, a.State, timeValue(a.Since), timeValue(a.HeldSince), timeValue(a.EvaluatedAt), orEmpty(a.Figures), a.Detail)
			if err != nil {
				return err
			}
		}
		list, err := json.Marshal(names)
		if err != nil {
			return err
		}
		if _, err := w.exec("DELETE FROM jobs.tb_alert WHERE name NOT IN (SELECT value FROM json_each(?))", string(list)); err != nil {
			return err
		}
		_, err = w.exec("DELETE FROM jobs.tb_alert_event WHERE alert NOT IN (SELECT value FROM json_each(?)) AND occurred_at < ?", string(list), timeValue(time.Now().Add(-store.RemovedAlertLife)))
		if err != nil {
			return err
		}
		for _, e := range events {
			_, err := w.exec(`INSERT INTO jobs.tb_alert_event (id, alert, old_state, new_state, occurred_at, figures, notify_status, notify_input)
				VALUES (?, ?, ?, ?, ?, ?, ?, ?)`, e.ID, e.Alert, e.From, e.To, timeValue(e.OccurredAt), orEmpty(e.Figures), e.Notify, jsonValue(e.NotifyInput))
			if err != nil {
				return err
			}
			_, err = w.exec(`DELETE FROM jobs.tb_alert_event WHERE alert = ?1 AND id NOT IN
				(SELECT id FROM jobs.tb_alert_event WHERE alert = ?1 ORDER BY occurred_at DESC, id DESC LIMIT ?2)`, e.Alert, store.MaxAlertEvents)
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("save alerts: %w", err)
	}
	return nil
}

func orEmpty(j json.RawMessage) string {
	if len(j) == 0 {
		return "{}"
	}
	return string(j)
}

// AlertStates implements [store.Store].
func (s *Store) AlertStates(ctx context.Context) ([]*store.AlertState, error) {
	return rowsOf(ctx, s, "alerts", func(a *store.AlertState) []any {
		return []any{
			&a.Name, &a.State,
			timeColumn{&a.Since},
			timeColumn{&a.HeldSince},
			timeColumn{&a.EvaluatedAt},
			jsonColumn{&a.Figures},
			&a.Detail,
		}
	}, "SELECT name, state, since, held_since, evaluated_at, figures, detail FROM jobs.tb_alert ORDER BY name")
}

const alertEvent = `SELECT id, alert, old_state, new_state, occurred_at, figures, notify_status, notify_input, notify_run_id, notify_error FROM jobs.tb_alert_event `

func alertEventColumns(e *store.AlertEvent) []any {
	return []any{
		&e.ID, &e.Alert, &e.From, &e.To,
		timeColumn{&e.OccurredAt},
		jsonColumn{&e.Figures},
		&e.Notify,
		jsonColumn{&e.NotifyInput},
		&e.NotifyRunID, &e.NotifyError,
	}
}

// AlertEvents implements [store.Store].
func (s *Store) AlertEvents(ctx context.Context, alert string, limit int) ([]*store.AlertEvent, error) {
	return rowsOf(ctx, s, "events of an alert", alertEventColumns, alertEvent+"WHERE alert = ? ORDER BY occurred_at DESC, id DESC LIMIT ?", alert, limit)
}

// PendingNotifications implements [store.Store].
func (s *Store) PendingNotifications(ctx context.Context, limit int) ([]*store.AlertEvent, error) {
	return rowsOf(ctx, s, "notifications", alertEventColumns, alertEvent+"WHERE notify_status = 'pending' ORDER BY occurred_at, id LIMIT ?", limit)
}

// Notified implements [store.Store].
func (s *Store) Notified(ctx context.Context, id, runID, failure string) error {
	err := s.write(ctx, func(w *writer) error {
		_, err := w.exec(`UPDATE jobs.tb_alert_event SET notify_status = CASE WHEN ?3 = '' THEN 'started' ELSE 'failed' END,
			notify_run_id = ?2, notify_error = ?3 WHERE id = ?1 AND notify_status = 'pending'`, id, runID, failure)
		return err
	})
	if err != nil {
		return fmt.Errorf("note a notification: %w", err)
	}
	return nil
}

// WindowFigures implements [store.Store]. Jobs are found through their runs, which have not ended
// or did so no earlier than their jobs.
func (s *Store) WindowFigures(ctx context.Context, since time.Time) ([]*store.WindowFigures, error) {
	return rowsOf(ctx, s, "figures of a window", func(f *store.WindowFigures) []any {
		return []any{&f.ExecutionType, &f.Completed, &f.Failed, &f.Resource, &f.Security, &f.CostUSD, &f.P50, &f.P95, &f.P99}
	}, `WITH runs AS MATERIALIZED (
			SELECT id FROM jobs.tb_workflow_run WHERE completed_at >= ?1 AND triggered_by IS NOT ?2
			UNION ALL
			SELECT id FROM jobs.tb_workflow_run WHERE status IN ('pending', 'running') AND triggered_by IS NOT ?2
		), ended AS MATERIALIZED (
			SELECT j.execution_type, j.status, j.error_code, j.duration_seconds AS duration, j.resource_usage ->> '$.cost_usd' AS cost
			FROM runs r CROSS JOIN jobs.tb_job_run j ON j.run_id = r.id
			WHERE j.status IN ('completed', 'failed') AND j.completed_at >= ?1
			UNION ALL
			SELECT execution_type, status, error_code, duration_seconds, resource_usage ->> '$.cost_usd'
			FROM jobs.tb_job_run WHERE run_id IS NULL AND created_at >= ?1 AND status IN ('completed', 'failed')
		), named AS (
			SELECT execution_type AS name, * FROM ended UNION ALL SELECT '', * FROM ended
		), ranked AS (
			SELECT name, duration, row_number() OVER (PARTITION BY name ORDER BY duration) AS place, count(*) OVER (PARTITION BY name) AS n
			FROM named WHERE duration IS NOT NULL
		), durations AS (
			SELECT name, min(CASE WHEN place >= n * 0.50 THEN duration END) AS p50, min(CASE WHEN place >= n * 0.95 THEN duration END) AS p95,
				min(CASE WHEN place >= n * 0.99 THEN duration END) AS p99
			FROM ranked GROUP BY name
		), sums AS (
			SELECT name, count(*) FILTER (WHERE status = 'completed') AS completed, count(*) FILTER (WHERE status = 'failed') AS failed,
				count(*) FILTER (WHERE status = 'failed' AND error_code = 'RESOURCE_EXCEEDED') AS resource,
				count(*) FILTER (WHERE status = 'failed' AND error_code = 'POLICY_VIOLATION') AS security, coalesce(sum(cost), 0.0) AS cost
			FROM named GROUP BY name
		)
		SELECT s.name, s.completed, s.failed, s.resource, s.security, s.cost, d.p50, d.p95, d.p99
		FROM sums s LEFT JOIN durations d ON d.name = s.name ORDER BY s.name`, timeValue(since), store.AlertSubject)
}

// rowsOf reads the rows of a query.
func rowsOf[T any](ctx context.Context, s *Store, what string, dest func(*T) []any, text string, args ...any) ([]*T, error) {
	end, err := s.read()
	if err != nil {
		return nil, err
	}
	defer end()
	rows, err := query(ctx, s.readDB, func(row scanner) (*T, error) {
		v := new(T)
		return v, row.Scan(dest(v)...)
	}, text, args...)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return rows, nil
}
