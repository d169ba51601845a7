package sqlite

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// Claim implements [store.Store]. The lock on the folder makes every other owner a dead one.
func (s *Store) Claim(ctx context.Context, owner string, limit int) ([]*store.Run, error) {
	var runs []*store.Run
	err := s.write(ctx, func(w *writer) error {
		return w.rows(`UPDATE jobs.tb_workflow_run SET owner = ?, epoch = epoch + 1, updated_at = ?
			WHERE id IN (SELECT id FROM jobs.tb_workflow_run
				WHERE status IN ('pending', 'running') AND owner <> ? ORDER BY id LIMIT ?)
			RETURNING `+runListColumns,
			[]any{owner, timeValue(s.timeNow()), owner, pageSize(limit)},
			func(rows *sql.Rows) error {
				r, err := scanRun(rows)
				if err != nil {
					return err
				}
				runs = append(runs, r)
				return nil
			})
	})
	if err != nil {
		return nil, fmt.Errorf("claim runs: %w", err)
	}
	slices.SortFunc(runs, func(a, b *store.Run) int { return strings.Compare(a.ID, b.ID) })
	return runs, nil
}

// ClaimRun implements [store.Store].
func (s *Store) ClaimRun(ctx context.Context, owner, runID string) (*store.Run, error) {
	var run *store.Run
	err := s.write(ctx, func(w *writer) error {
		n, err := w.exec(`UPDATE jobs.tb_workflow_run SET owner = ?, epoch = epoch + 1, updated_at = ?
			WHERE id = ? AND status IN ('failed', 'cancelled')`, owner, timeValue(s.timeNow()), runID)
		if err != nil {
			return err
		}
		if n == 0 {
			return w.refused(runID)
		}
		return w.rows("SELECT "+runColumns+" FROM jobs.tb_workflow_run WHERE id = ?", []any{runID}, func(rows *sql.Rows) error {
			run, err = scanRun(rows)
			return err
		})
	})
	if err != nil {
		return nil, fmt.Errorf("claim run %s: %w", runID, err)
	}
	return run, nil
}

// refused says why a run was not changed: ErrNotFound, or ErrState with the state it has.
func (w *writer) refused(runID string) error {
	var status string
	err := w.row("SELECT status FROM jobs.tb_workflow_run WHERE id = ?", []any{runID}, &status)
	if errors.Is(err, sql.ErrNoRows) {
		return store.ErrNotFound
	}
	if err != nil {
		return err
	}
	return &store.StateError{Status: store.Status(status)}
}

// RequestCancel implements [store.Store]. The first reason stays.
func (s *Store) RequestCancel(ctx context.Context, runID, reason string) error {
	err := s.write(ctx, func(w *writer) error {
		n, err := w.exec(`UPDATE jobs.tb_workflow_run SET
				cancel_reason = CASE WHEN cancel_requested THEN cancel_reason ELSE ? END, cancel_requested = 1, updated_at = ?
			WHERE id = ? AND status IN ('pending', 'running')`, textValue(reason), timeValue(s.timeNow()), runID)
		if err == nil && n == 0 {
			return w.refused(runID)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("cancel run %s: %w", runID, err)
	}
	return nil
}

// AddSignal implements [store.Store].
func (s *Store) AddSignal(ctx context.Context, sig *store.Signal) error {
	if len(sig.Payload) > 0 && !json.Valid(sig.Payload) {
		return fmt.Errorf("signal run %s: the payload is not JSON", sig.RunID)
	}
	created := sig.CreatedAt
	if created.IsZero() {
		created = s.timeNow()
	}
	var id int64
	err := s.write(ctx, func(w *writer) error {
		err := w.row(`INSERT INTO jobs.tb_workflow_signal (run_id, name, taken_by, created_at, payload)
			SELECT r.id, ?, ?, ?, ? FROM jobs.tb_workflow_run r CROSS JOIN
				(SELECT count(*) AS number, coalesce(sum(octet_length(payload)), 0) AS bytes FROM jobs.tb_workflow_signal WHERE run_id = ? AND taken_by IS NULL) w
			WHERE r.id = ? AND r.status IN ('pending', 'running') AND w.number < ? AND w.bytes < ?
			RETURNING id`,
			[]any{sig.Name, textValue(sig.TakenBy), timeValue(created), jsonValue(sig.Payload), sig.RunID, sig.RunID, store.MaxSignals, store.MaxSignalBytes}, &id)
		if errors.Is(err, sql.ErrNoRows) {
			return store.SignalRefused(w.refused(sig.RunID))
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("signal run %s: %w", sig.RunID, err)
	}
	sig.ID, sig.CreatedAt = id, created
	return nil
}
