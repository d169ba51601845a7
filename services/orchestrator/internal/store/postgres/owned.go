package postgres

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// Owned implements [store.Store].
func (s *Store) Owned(ctx context.Context, owner string) (runIDs []string, jobs []*store.Job, err error) {
	err = s.with(ctx, func(ctx context.Context, c *pgx.Conn) error {
		if runIDs, err = query(ctx, c, pgx.RowTo[string], `SELECT id::text FROM jobs.tb_workflow_run
			WHERE owner = $1 AND status IN ('pending', 'running') ORDER BY id`, owner); err != nil {
			return err
		}
		jobs, err = query(ctx, c, scanJob, "SELECT "+s.sql.jobColumns+` FROM jobs.tb_job_queue q JOIN jobs.tb_job_run j ON j.id = q.job_id
			LEFT JOIN jobs.tb_workflow_run r ON r.id = j.run_id
			WHERE q.owner = $1 AND j.status = 'pending' AND `+loose+` ORDER BY q.seq LIMIT $2`, owner, pageSize(0))
		return err
	})
	if err != nil {
		return nil, nil, fmt.Errorf("what %s owns: %w", owner, err)
	}
	return runIDs, jobs, nil
}
