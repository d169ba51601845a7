package sqlite

import (
	"context"
	"database/sql"
	"fmt"
	"strings"
	"time"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// Heartbeat implements [store.Store]. The lock on the folder makes the owner the only one.
func (s *Store) Heartbeat(ctx context.Context, owner string, register bool) (map[string]int64, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.owner != owner {
		if !register {
			return nil, fmt.Errorf("heartbeat of %s: %w", owner, store.ErrFenced)
		}
		s.owner, s.beat = owner, 0
	}
	s.beat++
	return map[string]int64{owner: s.beat}, nil
}

// Bury implements [store.Store].
func (s *Store) Bury(_ context.Context, owner string, beat int64) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.owner != owner || s.beat != beat {
		return false, nil
	}
	s.owner = ""
	return true, nil
}

// Release implements [store.Store].
func (s *Store) Release(ctx context.Context, owner string, runIDs []string) error {
	err := s.write(ctx, func(w *writer) error {
		for _, id := range runIDs {
			if _, err := w.exec(`UPDATE jobs.tb_workflow_run SET owner = '', updated_at = ?
				WHERE id = ? AND owner = ? AND status IN ('pending', 'running')`, timeValue(s.timeNow()), id, owner); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("release runs: %w", err)
	}
	return nil
}

// Retire implements [store.Store].
func (s *Store) Retire(ctx context.Context, owner string) error {
	s.mu.Lock()
	if s.owner == owner {
		s.owner = ""
	}
	s.mu.Unlock()
	err := s.write(ctx, func(w *writer) error {
		_, err := w.exec(`UPDATE jobs.tb_workflow_run SET owner = '', updated_at = ?
			WHERE owner = ? AND status IN ('pending', 'running')`, timeValue(s.timeNow()), owner)
		return err
	})
	if err != nil {
		return fmt.Errorf("retire %s: %w", owner, err)
	}
	return nil
}

// ClaimJobs implements [store.Store]. The file has no other clients.
func (s *Store) ClaimJobs(ctx context.Context, _ string, _ int) ([]*store.Job, error) {
	return nil, ctx.Err()
}

// Owned implements [store.Store].
func (s *Store) Owned(ctx context.Context, owner string) ([]string, []*store.Job, error) {
	end, err := s.read()
	if err != nil {
		return nil, nil, err
	}
	defer end()
	ids, err := query(ctx, s.readDB, func(row scanner) (id string, err error) {
		err = row.Scan(&id)
		return id, err
	}, "SELECT id FROM jobs.tb_workflow_run WHERE owner = ? AND status IN ('pending', 'running') ORDER BY id", owner)
	if err != nil {
		return nil, nil, fmt.Errorf("runs of %s: %w", owner, err)
	}
	return ids, nil, nil
}

// Listen implements [store.Store].
func (s *Store) Listen(ctx context.Context, _ func(store.Notice)) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-s.closed:
		return store.ErrClosed
	}
}

// Requests implements [store.Store].
func (s *Store) Requests(ctx context.Context, owner string) (*store.Requests, error) {
	end, err := s.read()
	if err != nil {
		return nil, err
	}
	defer end()
	out := &store.Requests{Cancels: map[string]string{}}
	_, err = query(ctx, s.readDB, func(row scanner) (struct{}, error) {
		var id, reason string
		err := row.Scan(&id, textColumn{&reason})
		out.Cancels[id] = reason
		return struct{}{}, err
	}, `SELECT id, cancel_reason FROM jobs.tb_workflow_run
		WHERE owner = ? AND cancel_requested AND status IN ('pending', 'running')`, owner)
	if err != nil {
		return nil, fmt.Errorf("requests: %w", err)
	}
	out.Signals, err = query(ctx, s.readDB, scanSignal, `SELECT s.id, s.run_id, s.name, s.taken_by, s.created_at, s.payload
		FROM jobs.tb_workflow_signal s JOIN jobs.tb_workflow_run r ON r.id = s.run_id
		WHERE r.owner = ? AND r.status IN ('pending', 'running') AND s.taken_by IS NULL ORDER BY s.id`, owner)
	if err != nil {
		return nil, fmt.Errorf("requests: %w", err)
	}
	return out, nil
}

// RunStates implements [store.Store].
func (s *Store) RunStates(ctx context.Context, ids []string) (map[string]store.RunState, error) {
	end, err := s.read()
	if err != nil {
		return nil, err
	}
	defer end()
	out := make(map[string]store.RunState, len(ids))
	for _, id := range ids {
		state, err := one(ctx, s.readDB, func(row scanner) (st store.RunState, err error) {
			err = row.Scan(&st.Status, &st.Owner, &st.Epoch, &st.Sequence, &st.LogSequence)
			return st, err
		}, `SELECT status, owner, epoch, sequence,
				coalesce((SELECT max(sequence) FROM jobs.tb_job_log l WHERE l.run_id = r.id), 0)
			FROM jobs.tb_workflow_run r WHERE id = ?`, id)
		if isNotFound(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("states of runs: %w", err)
		}
		out[id] = state
	}
	return out, nil
}

// pruneBatch is how many runs one transaction deletes at most.
const pruneBatch = 500

// Maintain implements [store.Store].
func (s *Store) Maintain(ctx context.Context, retain time.Duration) error {
	if err := s.write(ctx, func(w *writer) error { return w.tidyLimits(s.timeNow()) }); err != nil {
		return err
	}
	if retain <= 0 {
		return nil
	}
	before := timeValue(s.timeNow().Add(-retain))
	for {
		var n int64
		err := s.write(ctx, func(w *writer) error {
			var err error
			n, err = w.exec(`DELETE FROM jobs.tb_workflow_run WHERE id IN (SELECT id FROM jobs.tb_workflow_run
				WHERE completed_at < ? AND status IN ('completed', 'failed', 'cancelled') ORDER BY completed_at LIMIT ?)`, before, pruneBatch)
			return err
		})
		if err != nil {
			return fmt.Errorf("delete what ended before %s: %w", s.timeNow().Add(-retain).Format(time.RFC3339), err)
		}
		if n < pruneBatch {
			return nil
		}
	}
}

// SetExecutionTypes implements [store.Store].
func (s *Store) SetExecutionTypes(ctx context.Context, disable, enable []string) error {
	err := s.write(ctx, func(w *writer) error {
		for enabled, names := range [][]string{disable, enable} {
			for _, name := range names {
				if _, err := w.exec(`INSERT INTO jobs.tb_execution_type (name, enabled, changed_at) VALUES (?, ?, ?)
					ON CONFLICT (name) DO UPDATE SET enabled = excluded.enabled, changed_at = excluded.changed_at`,
					name, enabled, timeValue(s.timeNow())); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("set execution types %s: %w", strings.Join(append(append([]string{}, disable...), enable...), ", "), err)
	}
	return nil
}

// ExecutionTypes implements [store.Store].
func (s *Store) ExecutionTypes(ctx context.Context) (map[string]store.ExecutionType, error) {
	end, err := s.read()
	if err != nil {
		return nil, err
	}
	defer end()
	rows, err := s.readDB.QueryContext(ctx, "SELECT name, enabled, changed_at FROM jobs.tb_execution_type")
	if err != nil {
		return nil, fmt.Errorf("execution types: %w", err)
	}
	defer func() { _ = rows.Close() }()
	out := map[string]store.ExecutionType{}
	err = eachRow(rows, func(rows *sql.Rows) error {
		var name string
		var t store.ExecutionType
		err := rows.Scan(&name, &t.Enabled, timeColumn{&t.ChangedAt})
		out[name] = t
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("execution types: %w", err)
	}
	return out, nil
}
