package postgres

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// maintainLock is the advisory lock of the one who maintains.
const maintainLock = 7271450120553

// buriedFor is how long a buried orchestrator is remembered: one that sleeps for longer learns of it from its heartbeat alone.
const buriedFor = 24 * time.Hour

// pruneBatch is how many runs, or jobs of none, one transaction deletes at most.
const pruneBatch = 500

// Maintain implements [store.Store]. Snapshots stay: they are few, and runs point at them.
func (s *Store) Maintain(ctx context.Context, retain time.Duration) error {
	err := s.with(ctx, func(ctx context.Context, c *pgx.Conn) error {
		sums, err := lookAtSums(ctx, c)
		if err == nil {
			s.sums.Store(sums.same && slices.Equal(sums.columns, s.sql.sumColumns))
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("maintain the database: %w", err)
	}
	batch := pruneBatch
	for {
		more := false
		err := s.with(ctx, func(ctx context.Context, c *pgx.Conn) error {
			return pgx.BeginFunc(ctx, c, func(tx pgx.Tx) error {
				var mine bool
				if err := tx.QueryRow(ctx, "SELECT pg_try_advisory_xact_lock($1)", int64(maintainLock)).Scan(&mine); err != nil || !mine {
					return err
				}
				if retain > 0 {
					var err error
					if more, err = s.prune(ctx, tx, s.now().UTC().Add(-retain), batch); err != nil || more {
						return err
					}
				}
				if err := tidy(ctx, tx); err != nil {
					return err
				}
				_, err := tx.Exec(ctx, `SET LOCAL enable_seqscan = on; SET LOCAL enable_hashjoin = on; SET LOCAL enable_mergejoin = on;
					SELECT jobs.fn_stat_compact()`, pgx.QueryExecModeSimpleProtocol)
				return err
			})
		})
		if err != nil && ctx.Err() == nil && tookTooLong(err) && batch > 1 {
			batch /= 2 // what belongs to the runs is too much for one statement
			continue
		}
		if err != nil {
			return fmt.Errorf("maintain the database: %w", err)
		}
		if !more {
			return nil
		}
	}
}

// prune deletes some of what ended before a time, and reports whether there may be more.
func (s *Store) prune(ctx context.Context, tx pgx.Tx, before time.Time, batch int) (more bool, err error) {
	runs, err := tx.Exec(ctx, `DELETE FROM jobs.tb_workflow_run WHERE id IN (SELECT id FROM jobs.tb_workflow_run
		WHERE completed_at < $1 AND status IN ('completed', 'failed', 'cancelled') ORDER BY completed_at LIMIT $2 FOR UPDATE SKIP LOCKED)`, before, batch)
	if err != nil {
		return false, err
	}
	// Jobs of no run: those of the old table, and those that clients ended themselves.
	jobs, err := tx.Exec(ctx, `DELETE FROM jobs.tb_job_run WHERE id IN (SELECT id FROM jobs.tb_job_run
		WHERE run_id IS NULL AND created_at < $1 AND status IN ('completed', 'failed', 'cancelled') AND coalesce(completed_at, updated_at) < $1
		ORDER BY created_at LIMIT $2 FOR UPDATE SKIP LOCKED)`, before, batch)
	return runs.RowsAffected() == int64(batch) || jobs.RowsAffected() == int64(batch), err
}

// tookTooLong reports whether a statement did not end within its bound.
func tookTooLong(err error) bool {
	e, ok := ofServer(err)
	return ok && e.Code == codeCancelled || !ok && (errors.Is(err, context.DeadlineExceeded) || pgconn.Timeout(err))
}

// tidy takes out of the queue what was claimed and is no longer pending, and forgets who was buried long ago.
func tidy(ctx context.Context, tx pgx.Tx) error {
	_, err := tx.Exec(ctx, `DELETE FROM jobs.tb_job_queue q USING jobs.tb_job_run j
		WHERE q.owner <> '' AND j.id = q.job_id AND (j.status <> 'pending' OR NOT `+loose+`)`)
	if err != nil {
		return err
	}
	_, err = tx.Exec(ctx, "DELETE FROM jobs.tb_orchestrator WHERE buried_at < now() - make_interval(secs => $1)", buriedFor.Seconds())
	if err != nil {
		return err
	}
	return tidyLimits(ctx, tx)
}

// tidyLimits ends slots whose jobs have ended or are gone, deletes those that count no more, and forgets keys that were long not used.
func tidyLimits(ctx context.Context, tx pgx.Tx) error {
	_, err := tx.Exec(ctx, `UPDATE jobs.tb_limit_slot s SET ended_at = clock_timestamp(), until = clock_timestamp() + make_interval(secs => s.window_seconds)
		WHERE s.ended_at IS NULL AND s.taken_at < now() - make_interval(secs => $1)
			AND NOT EXISTS (SELECT FROM jobs.tb_job_run j WHERE j.id = s.job_id AND j.status IN ('pending', 'running'))`, store.StraySlot.Seconds())
	if err != nil {
		return err
	}
	if _, err = tx.Exec(ctx, "DELETE FROM jobs.tb_limit_slot WHERE ended_at IS NOT NULL AND until <= now()"); err != nil {
		return err
	}
	_, err = tx.Exec(ctx, `DELETE FROM jobs.tb_limit WHERE key IN (SELECT l.key FROM jobs.tb_limit l
		WHERE l.updated_at < now() - make_interval(secs => $1) AND coalesce(l.closed_until < now(), true)
			AND NOT EXISTS (SELECT FROM jobs.tb_limit_slot s WHERE s.key = l.key) ORDER BY l.key FOR UPDATE SKIP LOCKED)`, store.IdleLimit.Seconds())
	return err
}
