package postgres

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// Owned implements [store.Store]. Of jobs it returns as many as their inputs allow; the others come once these are adopted.
func (s *Store) Owned(ctx context.Context, owner string) (runIDs []string, jobs []*store.Job, err error) {
	err = s.with(ctx, func(ctx context.Context, c *pgx.Conn) error {
		runIDs, err = query(ctx, c, pgx.RowTo[string],
			"SELECT id::text FROM jobs.tb_workflow_run WHERE owner = $1 AND status IN ('pending', 'running') ORDER BY id", owner)
		if err != nil {
			return err
		}
		jobs, err = s.queued(ctx, c, ownedJobs, owner)
		return err
	})
	if err != nil {
		return nil, nil, fmt.Errorf("what %s owns: %w", owner, err)
	}
	return runIDs, jobs, nil
}

// ownedJobs are the rows of the queue that are $1's, up to the bytes of one claim.
var ownedJobs = fmt.Sprintf(`q.job_id IN (SELECT t.job_id FROM (
	SELECT s.job_id, sum(CASE WHEN s.n <= %[1]d THEN s.n ELSE 0 END) OVER (ORDER BY s.seq) - CASE WHEN s.n <= %[1]d THEN s.n ELSE 0 END AS before
	FROM (SELECT p.job_id, p.seq, coalesce((SELECT octet_length(o.input_data::text) FROM jobs.tb_job_run o WHERE o.id = p.job_id), 0) AS n
		FROM (SELECT k.job_id, k.seq FROM jobs.tb_job_queue k WHERE k.owner = $1 ORDER BY k.seq LIMIT %[3]d) p) s) t
	WHERE t.before < %[2]d)`, maxInput, maxClaim, maxPage)
