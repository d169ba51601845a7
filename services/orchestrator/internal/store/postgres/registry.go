package postgres

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// SaveSnapshot implements [store.Store].
func (s *Store) SaveSnapshot(ctx context.Context, digest string, content []byte) error {
	if content == nil {
		content = []byte{}
	}
	_, err := s.exec(ctx, `INSERT INTO jobs.tb_snapshot (digest, created_at, content) VALUES ($1, $2, $3)
		ON CONFLICT (digest) DO NOTHING`, digest, s.now().UTC(), content)
	if err != nil {
		return fmt.Errorf("save snapshot %s: %w", digest, err)
	}
	return nil
}

// Snapshot implements [store.Store].
func (s *Store) Snapshot(ctx context.Context, digest string) ([]byte, error) {
	content, err := first(ctx, s, pgx.RowTo[[]byte], "SELECT content FROM jobs.tb_snapshot WHERE digest = $1", digest)
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", digest, err)
	}
	return content, nil
}

// SetRegistry implements [store.Store]. ErrNotFound where no such snapshot was saved.
func (s *Store) SetRegistry(ctx context.Context, digest string) error {
	n, err := s.exec(ctx, `WITH applied AS (INSERT INTO jobs.tb_registry (id, digest, applied_at)
			SELECT 1, digest, $2 FROM jobs.tb_snapshot WHERE digest = $1
			ON CONFLICT (id) DO UPDATE SET digest = excluded.digest, applied_at = excluded.applied_at RETURNING 1)
		SELECT pg_notify('specql_registry', '') FROM applied`, digest, s.now().UTC())
	if err == nil && n == 0 {
		err = fmt.Errorf("snapshot: %w", store.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("put registry %s in force: %w", digest, err)
	}
	return nil
}

// Registry implements [store.Store].
func (s *Store) Registry(ctx context.Context) (digest string, appliedAt time.Time, err error) {
	_, err = first(ctx, s, func(row pgx.CollectableRow) (struct{}, error) {
		return struct{}{}, row.Scan(&digest, &appliedAt)
	}, "SELECT digest, applied_at FROM jobs.tb_registry")
	if err != nil {
		return "", time.Time{}, fmt.Errorf("registry in force: %w", err)
	}
	return digest, appliedAt.UTC(), nil
}

// SetExecutionTypes implements [store.Store].
func (s *Store) SetExecutionTypes(ctx context.Context, disable, enable []string) error {
	// The last word on a name counts, as if they were set one after the other.
	last := map[string]bool{}
	for _, name := range disable {
		last[name] = false
	}
	for _, name := range enable {
		last[name] = true
	}
	names, enabled := make([]string, 0, len(last)), make([]bool, 0, len(last))
	for name, on := range last {
		names, enabled = append(names, name), append(enabled, on)
	}
	_, err := s.exec(ctx, `WITH changed AS (INSERT INTO jobs.tb_execution_type (name, enabled, changed_at)
			SELECT name, enabled, $3 FROM unnest($1::text[], $2::boolean[]) AS d (name, enabled) ORDER BY name
			ON CONFLICT (name) DO UPDATE SET enabled = excluded.enabled, changed_at = excluded.changed_at RETURNING 1)
		SELECT pg_notify('specql_registry', '') FROM (SELECT count(*) FROM changed) AS c`, names, enabled, s.now().UTC())
	if err != nil {
		return fmt.Errorf("set execution types %s: %w", strings.Join(append(append([]string{}, disable...), enable...), ", "), err)
	}
	return nil
}

// ExecutionTypes implements [store.Store].
func (s *Store) ExecutionTypes(ctx context.Context) (map[string]store.ExecutionType, error) {
	out := map[string]store.ExecutionType{}
	_, err := all(ctx, s, func(row pgx.CollectableRow) (struct{}, error) {
		var name string
		var t store.ExecutionType
		err := row.Scan(&name, &t.Enabled, &t.ChangedAt)
		t.ChangedAt = t.ChangedAt.UTC()
		out[name] = t
		return struct{}{}, err
	}, "SELECT name, enabled, changed_at FROM jobs.tb_execution_type")
	if err != nil {
		return nil, fmt.Errorf("execution types: %w", err)
	}
	return out, nil
}
