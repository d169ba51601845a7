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

var logColumns = []column[*store.LogLine]{
	ids("run_id", func(l *store.LogLine) string { return l.RunID }),
	numbers("sequence", func(l *store.LogLine) int64 { return l.Sequence }),
	texts("job_id", func(l *store.LogLine) string { return plain(l.JobID) }),
	texts("step_path", func(l *store.LogLine) string { return plain(l.StepPath) }),
	numbers("attempt", func(l *store.LogLine) int64 { return int64(l.Attempt) }),
	numbers("line", func(l *store.LogLine) int64 { return l.Line }),
	texts("stream", func(l *store.LogLine) string { return plain(l.Stream) }),
	texts("text", func(l *store.LogLine) string { return plain(l.Text) }),
	times("created_at", func(l *store.LogLine) time.Time { return l.Time }),
}

var insertLogs = "WITH kept AS (" + insert("jobs.tb_job_log", logColumns, func(c column[*store.LogLine]) string {
	switch c.name {
	case "created_at":
		return "coalesce(d.created_at, now())"
	case "attempt":
		return "d.attempt::integer"
	}
	return "d." + c.name
}) + ` ON CONFLICT (run_id, sequence) DO NOTHING RETURNING run_id)
	INSERT INTO jobs.tb_job_log_count AS c (run_id, lines) SELECT run_id, count(*) FROM kept GROUP BY run_id ORDER BY run_id
	ON CONFLICT (run_id) DO UPDATE SET lines = c.lines + excluded.lines`

// AppendLogs implements [store.Store]. Lines of runs that are not there are left out and said;
// the others are kept. Lines outlive the end of this process at once; a crash of the server can take
// those since the last commit of a record, which is written behind them.
func (s *Store) AppendLogs(ctx context.Context, lines []*store.LogLine) error {
	if len(lines) == 0 {
		return nil
	}
	var missing error
	err := s.with(ctx, func(ctx context.Context, c *pgx.Conn) error {
		kept, err := keptLines(ctx, c, lines)
		if err != nil {
			return err
		}
		fresh := make([]*store.LogLine, 0, len(lines))
		for _, l := range lines {
			have, ok := kept[uuidValue(l.RunID).Bytes]
			switch {
			case !ok && missing == nil:
				missing = fmt.Errorf("run %s: %w", l.RunID, store.ErrNotFound)
			case ok && have < s.maxLogLines:
				kept[uuidValue(l.RunID).Bytes]++
				fresh = append(fresh, l)
			}
		}
		if len(fresh) == 0 {
			return nil
		}
		b := &pgx.Batch{}
		b.Queue("BEGIN")
		b.Queue("SET LOCAL synchronous_commit = off")
		b.Queue(insertLogs, arguments(logColumns, fresh)...)
		committed := false
		b.Queue("COMMIT").Exec(func(tag pgconn.CommandTag) error {
			committed = tag.String() == "COMMIT"
			return nil
		})
		err = c.SendBatch(ctx, b).Close()
		if err == nil && !committed {
			err = errors.New("the server rolled the transaction back")
		}
		if err != nil && !c.IsClosed() && c.PgConn().TxStatus() != 'I' {
			_, undo := c.Exec(ctx, "ROLLBACK")
			err = errors.Join(err, undo)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("append %d log lines: %w", len(lines), err)
	}
	if missing != nil {
		return fmt.Errorf("append %d log lines: %w", len(lines), missing)
	}
	return nil
}

// keptLines is how many lines are kept of the runs of some lines; runs that are not there are left out.
func keptLines(ctx context.Context, c *pgx.Conn, lines []*store.LogLine) (map[[16]byte]int64, error) {
	var runs [][16]byte
	for _, l := range lines {
		if id := uuidValue(l.RunID); id.Valid && !slices.Contains(runs, id.Bytes) {
			runs = append(runs, id.Bytes)
		}
	}
	kept := map[[16]byte]int64{}
	_, err := query(ctx, c, func(row pgx.CollectableRow) (struct{}, error) {
		var id [16]byte
		var n int64
		err := row.Scan(&id, &n)
		kept[id] = n
		return struct{}{}, err
	}, `SELECT r.id, coalesce(k.lines, 0) FROM unnest($1::uuid[]) AS d (id) JOIN jobs.tb_workflow_run r ON r.id = d.id
		LEFT JOIN jobs.tb_job_log_count k ON k.run_id = r.id`, runs)
	return kept, err
}

// Logs implements [store.Store].
func (s *Store) Logs(ctx context.Context, runID string, after int64, limit int) ([]*store.LogLine, error) {
	lines, err := all(ctx, s, scanLog, `SELECT run_id::text, sequence, job_id, step_path, attempt, line, stream, text, created_at
		FROM jobs.tb_job_log WHERE run_id = $1 AND sequence > $2 ORDER BY sequence LIMIT $3`, uuidValue(runID), after, pageSize(limit))
	if err != nil {
		return nil, fmt.Errorf("logs of run %s: %w", runID, err)
	}
	return lines, nil
}

func scanLog(row pgx.CollectableRow) (*store.LogLine, error) {
	l := &store.LogLine{}
	err := row.Scan(&l.RunID, &l.Sequence, &l.JobID, &l.StepPath, &l.Attempt, &l.Line, &l.Stream, &l.Text, &l.Time)
	l.Time = l.Time.UTC()
	return l, err
}
