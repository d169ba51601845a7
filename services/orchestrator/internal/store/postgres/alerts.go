package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// LeadAlerts implements [store.Store]. The database's clock decides.
func (s *Store) LeadAlerts(ctx context.Context, owner string, lease time.Duration) (bool, error) {
	n, err := s.exec(ctx, `INSERT INTO jobs.tb_alert_lease AS l (id, owner, expires_at) VALUES (1, $1, clock_timestamp() + make_interval(secs => $2))
		ON CONFLICT (id) DO UPDATE SET owner = excluded.owner, expires_at = excluded.expires_at
		WHERE l.owner = excluded.owner OR l.expires_at < clock_timestamp()`, owner, lease.Seconds())
	if err != nil {
		return false, fmt.Errorf("lead the alerts: %w", err)
	}
	return n > 0, nil
}

// LeaveAlerts implements [store.Store].
func (s *Store) LeaveAlerts(ctx context.Context, owner string) error {
	if _, err := s.exec(ctx, "DELETE FROM jobs.tb_alert_lease WHERE owner = $1", owner); err != nil {
		return fmt.Errorf("leave the alerts: %w", err)
	}
	return nil
}

// AlertLeader implements [store.Store].
func (s *Store) AlertLeader(ctx context.Context) (string, error) {
	owner, err := first(ctx, s, pgx.RowTo[string], "SELECT owner FROM jobs.tb_alert_lease WHERE expires_at >= clock_timestamp()")
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
	err := s.with(ctx, func(ctx context.Context, c *pgx.Conn) error {
		return pgx.BeginFunc(ctx, c, func(tx pgx.Tx) error {
			_, err := one(ctx, tx, pgx.RowTo[int64], `SELECT 1::bigint FROM jobs.tb_alert_lease
				WHERE owner = $1 AND expires_at >= clock_timestamp() FOR UPDATE`, owner)
			if errors.Is(err, store.ErrNotFound) {
				return store.ErrFenced
			}
			if err != nil {
				return err
			}
			names := make([]string, 0, len(states))
			for _, a := range states {
				names = append(names, a.Name)
				_, err := tx.Exec(ctx, `INSERT INTO jobs.tb_alert (name, state, since, held_since, evaluated_at, figures, detail)
					VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (name) DO UPDATE SET state = excluded.state, since = excluded.since,
					held_since = excluded.held_since, evaluated_at = excluded.evaluated_at, figures = excluded.figures, detail = excluded.detail`,
					a.Name, a.State, a.Since.UTC(), nullTime(a.HeldSince), a.EvaluatedAt.UTC(), orEmpty(a.Figures), plain(a.Detail))
				if err != nil {
					return err
				}
			}
			if _, err := tx.Exec(ctx, "DELETE FROM jobs.tb_alert WHERE name <> ALL ($1::text[])", names); err != nil {
				return err
			}
			_, err = tx.Exec(ctx, "DELETE FROM jobs.tb_alert_event WHERE alert <> ALL ($1::text[]) AND occurred_at < now() - make_interval(secs => $2)", names, store.RemovedAlertLife.Seconds())
			if err != nil {
				return err
			}
			for _, e := range events {
				_, err := tx.Exec(ctx, `INSERT INTO jobs.tb_alert_event (id, alert, old_state, new_state, occurred_at, figures, notify_status, notify_input)
					VALUES ($1::text::uuid, $2, $3, $4, $5, $6, $7, $8)`, e.ID, e.Alert, e.From, e.To, e.OccurredAt.UTC(), orEmpty(e.Figures), e.Notify, nullJSON(e.NotifyInput))
				if err != nil {
					return err
				}
				_, err = tx.Exec(ctx, `DELETE FROM jobs.tb_alert_event WHERE alert = $1 AND id NOT IN
					(SELECT id FROM jobs.tb_alert_event WHERE alert = $1 ORDER BY occurred_at DESC, id DESC LIMIT $2)`, e.Alert, store.MaxAlertEvents)
				if err != nil {
					return err
				}
			}
			return nil
		})
	})
	if err != nil {
		return fmt.Errorf("save alerts: %w", err)
	}
	return nil
}

func orEmpty(j json.RawMessage) []byte {
	if len(j) == 0 {
		return []byte("{}")
	}
	return j
}

// AlertStates implements [store.Store].
func (s *Store) AlertStates(ctx context.Context) ([]*store.AlertState, error) {
	states, err := all(ctx, s, func(row pgx.CollectableRow) (*store.AlertState, error) {
		a := &store.AlertState{}
		var since, held, evaluated moment
		err := row.Scan(&a.Name, &a.State, &since, &held, &evaluated, jsonOf(&a.Figures), &a.Detail)
		a.Since, a.HeldSince, a.EvaluatedAt = utc(since), utc(held), utc(evaluated)
		return a, err
	}, `SELECT name, state, since, held_since, evaluated_at, figures, detail FROM jobs.tb_alert ORDER BY name COLLATE "C"`)
	if err != nil {
		return nil, fmt.Errorf("alerts: %w", err)
	}
	return states, nil
}

const alertEvent = `SELECT id::text, alert, old_state, new_state, occurred_at, figures, notify_status, notify_input, notify_run_id, notify_error FROM jobs.tb_alert_event `

func scanAlertEvent(row pgx.CollectableRow) (*store.AlertEvent, error) {
	e := &store.AlertEvent{}
	var at moment
	err := row.Scan(&e.ID, &e.Alert, &e.From, &e.To, &at, jsonOf(&e.Figures), &e.Notify, jsonOf(&e.NotifyInput), &e.NotifyRunID, &e.NotifyError)
	e.OccurredAt = utc(at)
	return e, err
}

// AlertEvents implements [store.Store].
func (s *Store) AlertEvents(ctx context.Context, alert string, limit int) ([]*store.AlertEvent, error) {
	events, err := all(ctx, s, scanAlertEvent, alertEvent+"WHERE alert = $1 ORDER BY occurred_at DESC, id DESC LIMIT $2", plain(alert), int64(limit))
	if err != nil {
		return nil, fmt.Errorf("events of alert %.100q: %w", alert, err)
	}
	return events, nil
}

// PendingNotifications implements [store.Store].
func (s *Store) PendingNotifications(ctx context.Context, limit int) ([]*store.AlertEvent, error) {
	events, err := all(ctx, s, scanAlertEvent, alertEvent+"WHERE notify_status = 'pending' ORDER BY occurred_at, id LIMIT $1", int64(limit))
	if err != nil {
		return nil, fmt.Errorf("notifications: %w", err)
	}
	return events, nil
}

// Notified implements [store.Store].
func (s *Store) Notified(ctx context.Context, id, runID, failure string) error {
	_, err := s.exec(ctx, `UPDATE jobs.tb_alert_event SET notify_status = CASE WHEN $3 = '' THEN 'started' ELSE 'failed' END,
		notify_run_id = $2, notify_error = $3 WHERE id = $1::text::uuid AND notify_status = 'pending'`, id, runID, plain(failure))
	if err != nil {
		return fmt.Errorf("note a notification: %w", err)
	}
	return nil
}

// WindowFigures implements [store.Store]. No index is on a job's end, so that ending one is cheap:
// jobs are found through their runs, which have not ended or did so no earlier than their jobs.
func (s *Store) WindowFigures(ctx context.Context, since time.Time) ([]*store.WindowFigures, error) {
	rows, err := all(ctx, s, func(row pgx.CollectableRow) (*store.WindowFigures, error) {
		f := &store.WindowFigures{}
		return f, row.Scan(&f.ExecutionType, &f.Completed, &f.Failed, &f.Resource, &f.Security, &f.CostUSD, &f.P50, &f.P95, &f.P99)
	},
		`WITH runs AS MATERIALIZED (
			SELECT id FROM jobs.tb_workflow_run WHERE completed_at >= $1::timestamptz AND triggered_by IS DISTINCT FROM $2::text
			UNION ALL
			SELECT id FROM jobs.tb_workflow_run WHERE status IN ('pending', 'running') AND triggered_by IS DISTINCT FROM $2::text
		), ended AS (
			SELECT j.execution_type, j.status::text AS status, j.error_code,
				coalesce(j.duration_seconds, extract(epoch FROM j.completed_at - j.started_at))::double precision AS duration,
				jobs.fn_number(j.resource_usage, 'cost_usd') AS cost
			FROM runs r JOIN jobs.tb_job_run j ON j.run_id = r.id
			WHERE j.status IN ('completed', 'failed') AND j.completed_at >= $1
			UNION ALL
			SELECT execution_type, status::text, error_code, coalesce(duration_seconds, extract(epoch FROM completed_at - started_at))::double precision,
				jobs.fn_number(resource_usage, 'cost_usd')
			FROM jobs.tb_job_run WHERE run_id IS NULL AND created_at >= $1 AND status IN ('completed', 'failed')
		)
		SELECT coalesce(execution_type, ''), count(*) FILTER (WHERE status = 'completed'), count(*) FILTER (WHERE status = 'failed'),
			count(*) FILTER (WHERE status = 'failed' AND error_code = 'RESOURCE_EXCEEDED'), count(*) FILTER (WHERE status = 'failed' AND error_code = 'POLICY_VIOLATION'),
			coalesce(sum(cost), 0)::double precision, percentile_disc(0.5) WITHIN GROUP (ORDER BY duration),
			percentile_disc(0.95) WITHIN GROUP (ORDER BY duration), percentile_disc(0.99) WITHIN GROUP (ORDER BY duration)
		FROM ended GROUP BY GROUPING SETS ((execution_type), ()) HAVING count(*) > 0 ORDER BY 1`, since.UTC(), store.AlertSubject)
	if err != nil {
		return nil, fmt.Errorf("figures of a window: %w", err)
	}
	return rows, nil
}
