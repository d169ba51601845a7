package sqlite

import (
	"context"
	"database/sql"
	"fmt"
)

// Query runs a statement that reads, such as SELECT * FROM jobs.v_job_queue_health, and
// returns the names of its columns and at most 10,000 rows. Values are nil, int64, float64,
// string or []byte. A statement that writes fails.
func (s *Store) Query(ctx context.Context, text string, args ...any) (columns []string, rows [][]any, err error) {
	end, err := s.read()
	if err != nil {
		return nil, nil, err
	}
	defer end()
	found, err := s.readDB.QueryContext(ctx, text, args...)
	if err != nil {
		return nil, nil, fmt.Errorf("query: %w", err)
	}
	defer func() { _ = found.Close() }()
	columns, err = found.Columns()
	if err != nil {
		return nil, nil, fmt.Errorf("query: %w", err)
	}
	err = eachRow(found, func(r *sql.Rows) error {
		if len(rows) == maxPage {
			return fmt.Errorf("more than %d rows; add a LIMIT", maxPage)
		}
		values, dest := make([]any, len(columns)), make([]any, len(columns))
		for i := range values {
			dest[i] = &values[i]
		}
		rows = append(rows, values)
		return r.Scan(dest...)
	})
	if err != nil {
		return nil, nil, fmt.Errorf("query: %w", err)
	}
	return columns, rows, nil
}
