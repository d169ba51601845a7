package postgres

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// Heartbeat implements [store.Store]. A buried owner's row stays, so that it does nothing more until it registers again.
func (s *Store) Heartbeat(ctx context.Context, owner string, register bool) (map[string]int64, error) {
	statement := "UPDATE jobs.tb_orchestrator SET beat = beat + 1, seen_at = clock_timestamp() WHERE id = $1 AND buried_at IS NULL RETURNING id, beat"
	if register {
		statement = `INSERT INTO jobs.tb_orchestrator AS o (id, beat) VALUES ($1, 1)
			ON CONFLICT (id) DO UPDATE SET beat = o.beat + 1, seen_at = clock_timestamp(), buried_at = NULL RETURNING id, beat`
	}
	out := map[string]int64{}
	err := s.within(ctx, s.writers, func(ctx context.Context, c *pgx.Conn) error {
		_, err := query(ctx, c, func(row pgx.CollectableRow) (struct{}, error) {
			var id string
			var beat int64
			err := row.Scan(&id, &beat)
			out[id] = beat
			return struct{}{}, err
		}, "WITH own AS ("+statement+") SELECT id, beat FROM own UNION ALL SELECT id, beat FROM jobs.tb_orchestrator WHERE id <> $1 AND buried_at IS NULL", owner)
		return err
	})
	if _, ok := out[owner]; err == nil && !ok {
		err = store.ErrFenced
	}
	if err != nil {
		return nil, fmt.Errorf("heartbeat of %s: %w", owner, err)
	}
	return out, nil
}

// Bury implements [store.Store].
func (s *Store) Bury(ctx context.Context, owner string, beat int64) (bool, error) {
	n, err := s.exec(ctx, "UPDATE jobs.tb_orchestrator SET buried_at = clock_timestamp() WHERE id = $1 AND beat = $2 AND buried_at IS NULL", owner, beat)
	if err != nil {
		return false, fmt.Errorf("bury %s: %w", owner, err)
	}
	return n > 0, nil
}

// unlessBuried is a condition that does not hold for a claim of a buried owner, $1.
const unlessBuried = "NOT EXISTS (SELECT FROM jobs.tb_orchestrator k WHERE k.id = $1 AND k.buried_at IS NOT NULL)"

// fenced is ErrFenced where an owner was buried, which a claim that gave nothing does not tell.
func (s *Store) fenced(ctx context.Context, c *pgx.Conn, owner string) error {
	var buried bool
	err := c.QueryRow(ctx, "SELECT EXISTS (SELECT FROM jobs.tb_orchestrator WHERE id = $1 AND buried_at IS NOT NULL)", owner).Scan(&buried)
	if err == nil && buried {
		err = store.ErrFenced
	}
	return err
}

// deadOwners finds the owners in a table that are neither $1 nor alive, by steps through its index: what it costs
// follows from the number of owners.
func deadOwners(table, where string) string {
	return fmt.Sprintf(`owners (owner) AS (
			(SELECT t.owner FROM %[1]s t WHERE %[2]s ORDER BY t.owner LIMIT 1)
			UNION ALL
			SELECT (SELECT t.owner FROM %[1]s t WHERE %[2]s AND t.owner > o.owner ORDER BY t.owner LIMIT 1) FROM owners o WHERE o.owner IS NOT NULL
		), dead AS (SELECT o.owner FROM owners o WHERE o.owner IS NOT NULL AND o.owner <> $1 AND %[3]s
			AND NOT EXISTS (SELECT FROM jobs.tb_orchestrator k WHERE k.id = o.owner AND k.buried_at IS NULL))`, table, where, unlessBuried)
}

// Bounds of what clients write, and of what a claim reads of it.
const (
	// maxEpoch is the last epoch: a run that has it is claimed no more.
	maxEpoch = 1 << 53
	// maxInput is how many bytes input_data of a job may have that a client inserted.
	maxInput = 4 << 20
	// maxClaim is how many bytes of input one claim reads; the first job counts in any case.
	maxClaim = 32 << 20
)

var (
	claimRuns = "WITH RECURSIVE " + deadOwners("jobs.tb_workflow_run", "t.status IN ('pending', 'running')") + fmt.Sprintf(`,
		picked AS (SELECT p.id FROM dead CROSS JOIN LATERAL (
				SELECT t.id FROM jobs.tb_workflow_run t WHERE t.status IN ('pending', 'running') AND t.owner = dead.owner AND t.epoch < %d
				ORDER BY t.id LIMIT $2 FOR UPDATE SKIP LOCKED) p
			LIMIT $2)
		UPDATE jobs.tb_workflow_run r SET owner = $1, epoch = r.epoch + 1, updated_at = now()
		FROM picked WHERE r.id = picked.id RETURNING `, maxEpoch) + runListColumns
	// What is not pending any more counts nothing, so that it leaves the queue.
	claimJobs = "WITH RECURSIVE " + deadOwners("jobs.tb_job_queue", "true") + fmt.Sprintf(`,
		picked AS MATERIALIZED (SELECT p.job_id, p.seq FROM dead CROSS JOIN LATERAL (
				SELECT t.job_id, t.seq FROM jobs.tb_job_queue t WHERE t.owner = dead.owner
				ORDER BY t.seq LIMIT $2 FOR UPDATE SKIP LOCKED) p
			ORDER BY p.seq LIMIT $2),
		sized AS (SELECT s.job_id, s.seq, CASE WHEN s.n <= %[1]d THEN s.n ELSE 0 END AS n FROM (
			SELECT p.job_id, p.seq, coalesce((SELECT octet_length(j.input_data::text) FROM jobs.tb_job_run j WHERE j.id = p.job_id AND j.status = 'pending'), 0) AS n
			FROM picked p OFFSET 0) s),
		taken AS (SELECT t.job_id FROM (SELECT job_id, sum(n) OVER (ORDER BY seq) - n AS before FROM sized) t WHERE t.before < %[2]d)
		UPDATE jobs.tb_job_queue q SET owner = $1 FROM taken WHERE q.job_id = taken.job_id RETURNING q.job_id`, maxInput, maxClaim)
)

// loose says that a job j has no run yet, in words that no index knows: rows are found by their ids, and not
// by going through all that wait, of which there may be many more than statistics tell.
const loose = "coalesce(j.run_id::text, '') = ''"

// Claim implements [store.Store]. Rows that another claim holds are passed over. ErrFenced where owner was buried.
func (s *Store) Claim(ctx context.Context, owner string, limit int) (runs []*store.Run, err error) {
	err = s.with(ctx, func(ctx context.Context, c *pgx.Conn) error {
		runs, err = query(ctx, c, scanRun, claimRuns, owner, pageSize(limit))
		if err != nil || len(runs) > 0 {
			return err
		}
		return s.fenced(ctx, c, owner)
	})
	if err != nil {
		return nil, fmt.Errorf("claim runs: %w", err)
	}
	slices.SortFunc(runs, func(a, b *store.Run) int { return strings.Compare(a.ID, b.ID) })
	return runs, nil
}

// ClaimJobs implements [store.Store]. What is no longer pending leaves the queue. A job whose input cannot be read, or is too
// large, comes without it and with an error. ErrFenced where owner was buried.
func (s *Store) ClaimJobs(ctx context.Context, owner string, limit int) (jobs []*store.Job, err error) {
	err = s.with(ctx, func(ctx context.Context, c *pgx.Conn) error {
		return pgx.BeginFunc(ctx, c, func(tx pgx.Tx) error {
			ids, err := query(ctx, tx, pgx.RowTo[[16]byte], claimJobs, owner, pageSize(limit))
			if err != nil {
				return err
			}
			if len(ids) == 0 {
				return s.fenced(ctx, c, owner)
			}
			jobs, err = s.queued(ctx, tx, "q.job_id = ANY ($1)", ids)
			if err != nil || len(jobs) == len(ids) {
				return err
			}
			_, err = tx.Exec(ctx, `DELETE FROM jobs.tb_job_queue q USING jobs.tb_job_run j
				WHERE q.job_id = ANY ($1) AND j.id = q.job_id AND (j.status <> 'pending' OR NOT `+loose+`)`, ids)
			return err
		})
	})
	if err != nil {
		return nil, fmt.Errorf("claim jobs: %w", err)
	}
	return jobs, nil
}

// queued reads jobs of the queue that are pending and of no run, oldest first.
func (s *Store) queued(ctx context.Context, q querier, where string, args ...any) ([]*store.Job, error) {
	return query(ctx, q, scanQueued, "SELECT "+s.sql.queuedColumns+` FROM jobs.tb_job_queue q JOIN jobs.tb_job_run j ON j.id = q.job_id
		LEFT JOIN jobs.tb_workflow_run r ON r.id = j.run_id
		WHERE `+where+` AND j.status = 'pending' AND `+loose+` ORDER BY q.seq`, args...)
}

// scanQueued reads a job whose input has its length behind it.
func scanQueued(row pgx.CollectableRow) (*store.Job, error) {
	var length int64
	j, err := scanJobAnd(row, &length)
	if err != nil {
		return nil, err
	}
	j.Err = nil // what a client wrote there
	switch {
	case length > maxInput:
		j.Err = fault.New(fault.Validation, "input_data has %d bytes; at most %d are taken", length, maxInput)
	case length > 0 && len(j.Input) == 0:
		j.Err = fault.New(fault.Validation, "input_data has a character or a number that jsonb does not hold, such as \\u0000")
	}
	return j, nil
}

// Release implements [store.Store].
func (s *Store) Release(ctx context.Context, owner string, runIDs []string) error {
	if len(runIDs) == 0 {
		return ctx.Err()
	}
	_, err := s.exec(ctx, `WITH released AS (UPDATE jobs.tb_workflow_run SET owner = '', updated_at = now()
			WHERE id = ANY ($2) AND owner = $1 AND status IN ('pending', 'running') RETURNING 1)
		SELECT pg_notify('specql_work', '') FROM (SELECT count(*) AS n FROM released) AS r WHERE n > 0`, owner, gather(runIDs, uuidValue))
	if err != nil {
		return fmt.Errorf("release runs: %w", err)
	}
	return nil
}

// Retire implements [store.Store].
func (s *Store) Retire(ctx context.Context, owner string) error {
	_, err := s.exec(ctx, `WITH gone AS (DELETE FROM jobs.tb_orchestrator WHERE id = $1),
		released AS (UPDATE jobs.tb_workflow_run SET owner = '', updated_at = now()
			WHERE owner = $1 AND owner <> '' AND status IN ('pending', 'running') RETURNING 1),
		queued AS (UPDATE jobs.tb_job_queue SET owner = '' WHERE owner = $1 AND owner <> '' RETURNING 1)
		SELECT pg_notify('specql_work', '') FROM (SELECT (SELECT count(*) FROM released) + (SELECT count(*) FROM queued) AS n) AS r WHERE n > 0`, owner)
	if err != nil {
		return fmt.Errorf("retire %s: %w", owner, err)
	}
	return nil
}

// ClaimRun implements [store.Store].
func (s *Store) ClaimRun(ctx context.Context, owner, runID string) (*store.Run, error) {
	run, err := first(ctx, s, scanRun, `UPDATE jobs.tb_workflow_run r SET owner = $1, epoch = r.epoch + 1, updated_at = now()
		WHERE r.id = $2 AND r.status IN ('failed', 'cancelled') AND r.epoch < $3 AND `+unlessBuried+` RETURNING `+runReadColumns,
		owner, uuidValue(runID), int64(maxEpoch))
	if isNotFound(err) {
		if err = s.with(ctx, func(ctx context.Context, c *pgx.Conn) error { return s.fenced(ctx, c, owner) }); err == nil {
			err = s.refused(ctx, runID)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("claim run %s: %w", runID, err)
	}
	return run, nil
}

// refused says why a run was not changed: ErrNotFound, or ErrState with the state it has.
func (s *Store) refused(ctx context.Context, runID string) error {
	status, err := first(ctx, s, pgx.RowTo[string], "SELECT status FROM jobs.tb_workflow_run WHERE id = $1", uuidValue(runID))
	if err != nil {
		return err
	}
	return &store.StateError{Status: store.Status(status)}
}

// RequestCancel implements [store.Store]. The first reason stays.
func (s *Store) RequestCancel(ctx context.Context, runID, reason string) error {
	n, err := s.exec(ctx, `WITH noted AS (UPDATE jobs.tb_workflow_run SET
				cancel_reason = CASE WHEN cancel_requested THEN cancel_reason ELSE $2 END, cancel_requested = true, updated_at = now()
			WHERE id = $1 AND status IN ('pending', 'running') RETURNING id)
		SELECT pg_notify('specql_request', id::text) FROM noted`, uuidValue(runID), nullText(plain(reason)))
	if err == nil && n == 0 {
		err = s.refused(ctx, runID)
	}
	if err != nil {
		return fmt.Errorf("cancel run %s: %w", runID, err)
	}
	return nil
}

// AddSignal implements [store.Store]. The run's row is held meanwhile, so that a run that ends has had every signal that was taken for it.
func (s *Store) AddSignal(ctx context.Context, sig *store.Signal) error {
	if len(sig.Payload) > 0 && !json.Valid(sig.Payload) {
		return fmt.Errorf("signal run %s: the payload is not JSON", sig.RunID)
	}
	created := sig.CreatedAt
	if created.IsZero() {
		created = s.now().UTC()
	}
	id, err := first(ctx, s, pgx.RowTo[int64], `WITH target AS (SELECT id FROM jobs.tb_workflow_run WHERE id = $1 AND status IN ('pending', 'running') FOR SHARE),
		waiting AS (SELECT count(*) AS number, coalesce(sum(pg_column_size(payload)), 0) AS bytes
			FROM jobs.tb_workflow_signal WHERE run_id = $1 AND taken_by IS NULL),
		made AS (INSERT INTO jobs.tb_workflow_signal (run_id, name, taken_by, created_at, payload)
			SELECT id, $2, $3, $4, $5::text::jsonb FROM target CROSS JOIN waiting WHERE number < $6 AND bytes < $7 RETURNING id)
		SELECT made.id FROM made CROSS JOIN LATERAL pg_notify('specql_request', $1::text)`,
		uuidValue(sig.RunID), plain(sig.Name), nullText(sig.TakenBy), created, nullJSON(sig.Payload), store.MaxSignals, store.MaxSignalBytes)
	if isNotFound(err) {
		err = store.SignalRefused(s.refused(ctx, sig.RunID))
	}
	if err != nil {
		return fmt.Errorf("signal run %s: %w", sig.RunID, err)
	}
	sig.ID, sig.CreatedAt = id, created
	return nil
}

// Requests implements [store.Store].
func (s *Store) Requests(ctx context.Context, owner string) (*store.Requests, error) {
	out := &store.Requests{Cancels: map[string]string{}}
	err := s.with(ctx, func(ctx context.Context, c *pgx.Conn) error {
		_, err := query(ctx, c, func(row pgx.CollectableRow) (struct{}, error) {
			var id, reason string
			err := row.Scan(&id, &reason)
			out.Cancels[id] = reason
			return struct{}{}, err
		}, `SELECT id::text, coalesce(cancel_reason, '') FROM jobs.tb_workflow_run
			WHERE owner = $1 AND status IN ('pending', 'running') AND cancel_requested`, owner)
		if err != nil {
			return err
		}
		out.Signals, err = query(ctx, c, scanSignal, "SELECT "+signalColumns+` FROM jobs.tb_workflow_signal s
			JOIN jobs.tb_workflow_run r ON r.id = s.run_id
			WHERE s.taken_by IS NULL AND r.owner = $1 AND r.status IN ('pending', 'running') ORDER BY s.id`, owner)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("requests: %w", err)
	}
	return out, nil
}
