package sqlite

import (
	"context"
	"errors"
	"fmt"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// AppendLogs implements [store.Store]. Lines of runs that are not there are left out and said;
// the others are kept. Lines survive the end of the process at once; a power cut can take
// those since the last commit of a record, which syncs the same file.
func (s *Store) AppendLogs(ctx context.Context, lines []*store.LogLine) (err error) {
	if len(lines) == 0 {
		return nil
	}
	w, err := s.acquire(ctx)
	if err != nil {
		return err
	}
	defer func() { s.turn <- w }()
	defer func() {
		if err != nil {
			err = fmt.Errorf("append %d log lines: %w", len(lines), err)
		}
	}()
	if _, err := w.exec(syncNormal); err != nil {
		return err
	}
	var missing error
	err = w.transact(func(w *writer) error {
		kept := map[string]int64{}
		for _, l := range lines {
			have, ok := kept[l.RunID]
			if !ok {
				if have, err = w.logCount(l.RunID); err != nil {
					return err
				}
				if have < 0 && missing == nil {
					missing = fmt.Errorf("run %s: %w", l.RunID, store.ErrNotFound)
				}
			}
			if have < 0 || have >= s.maxLogLines {
				kept[l.RunID] = have
				continue
			}
			created := l.Time
			if created.IsZero() {
				created = s.timeNow()
			}
			n, err := w.exec(`INSERT INTO jobs.tb_job_log (run_id, sequence, job_id, step_path, attempt, line, stream, text, created_at)
				VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (run_id, sequence) DO NOTHING`,
				l.RunID, l.Sequence, l.JobID, l.StepPath, l.Attempt, l.Line, l.Stream, l.Text, timeValue(created))
			if err != nil {
				return err
			}
			kept[l.RunID] = have + n
		}
		for run, n := range kept {
			if n <= 0 {
				continue
			}
			if _, err := w.exec(`INSERT INTO jobs.tb_job_log_count (run_id, lines) VALUES (?, ?)
				ON CONFLICT (run_id) DO UPDATE SET lines = excluded.lines`, run, n); err != nil {
				return err
			}
		}
		return nil
	})
	if _, sync := w.exec(syncFull); sync != nil {
		return errors.Join(err, sync)
	}
	if err == nil {
		s.boundLog(ctx, w)
	}
	return errors.Join(err, missing)
}

// logCount is how many lines of a run are kept; -1 where there is no such run.
func (w *writer) logCount(runID string) (int64, error) {
	var n int64
	err := w.row(`SELECT CASE WHEN EXISTS (SELECT 1 FROM jobs.tb_workflow_run WHERE id = ?1)
		THEN coalesce((SELECT lines FROM jobs.tb_job_log_count WHERE run_id = ?1), 0) ELSE -1 END`, []any{runID}, &n)
	return n, err
}

// Logs implements [store.Store].
func (s *Store) Logs(ctx context.Context, runID string, after int64, limit int) ([]*store.LogLine, error) {
	end, err := s.read()
	if err != nil {
		return nil, err
	}
	defer end()
	lines, err := query(ctx, s.readDB, scanLog, `SELECT run_id, sequence, job_id, step_path, attempt, line, stream, text, created_at
		FROM jobs.tb_job_log WHERE run_id = ? AND sequence > ? ORDER BY sequence LIMIT ?`, runID, after, pageSize(limit))
	if err != nil {
		return nil, fmt.Errorf("logs of run %s: %w", runID, err)
	}
	return lines, nil
}

func scanLog(row scanner) (*store.LogLine, error) {
	l := &store.LogLine{}
	err := row.Scan(&l.RunID, &l.Sequence, &l.JobID, &l.StepPath, &l.Attempt, &l.Line, &l.Stream, &l.Text, timeColumn{&l.Time})
	if err != nil {
		return nil, err
	}
	return l, nil
}
