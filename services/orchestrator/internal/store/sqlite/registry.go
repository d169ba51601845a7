package sqlite

import (
	"context"
	"fmt"
	"time"

	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// SaveSnapshot implements [store.Store].
func (s *Store) SaveSnapshot(ctx context.Context, digest string, content []byte) error {
	if content == nil {
		content = []byte{}
	}
	err := s.write(ctx, func(w *writer) error {
		_, err := w.exec(`INSERT INTO jobs.tb_snapshot (digest, created_at, content) VALUES (?, ?, ?)
			ON CONFLICT (digest) DO NOTHING`, digest, timeValue(s.timeNow()), content)
		return err
	})
	if err != nil {
		return fmt.Errorf("save snapshot %s: %w", digest, err)
	}
	return nil
}

// Snapshot implements [store.Store].
func (s *Store) Snapshot(ctx context.Context, digest string) ([]byte, error) {
	end, err := s.read()
	if err != nil {
		return nil, err
	}
	defer end()
	content, err := one(ctx, s.readDB, func(row scanner) (content []byte, err error) {
		err = row.Scan(&content)
		return content, err
	}, "SELECT content FROM jobs.tb_snapshot WHERE digest = ?", digest)
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", digest, err)
	}
	return content, nil
}

// SetRegistry implements [store.Store]. ErrNotFound where no such snapshot was saved.
func (s *Store) SetRegistry(ctx context.Context, digest string) error {
	err := s.write(ctx, func(w *writer) error {
		n, err := w.exec(`INSERT INTO jobs.tb_registry (id, digest, applied_at)
			SELECT 1, digest, ? FROM jobs.tb_snapshot WHERE digest = ?
			ON CONFLICT (id) DO UPDATE SET digest = excluded.digest, applied_at = excluded.applied_at`, timeValue(s.timeNow()), digest)
		if err == nil && n == 0 {
			return fmt.Errorf("snapshot: %w", store.ErrNotFound)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("put registry %s in force: %w", digest, err)
	}
	return nil
}

// Registry implements [store.Store].
func (s *Store) Registry(ctx context.Context) (digest string, appliedAt time.Time, err error) {
	end, err := s.read()
	if err != nil {
		return "", time.Time{}, err
	}
	defer end()
	_, err = one(ctx, s.readDB, func(row scanner) (struct{}, error) {
		return struct{}{}, row.Scan(&digest, timeColumn{&appliedAt})
	}, "SELECT digest, applied_at FROM jobs.tb_registry")
	if err != nil {
		return "", time.Time{}, fmt.Errorf("registry in force: %w", err)
	}
	return digest, appliedAt, nil
}
