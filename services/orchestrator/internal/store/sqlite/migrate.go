package sqlite

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strconv"
	"strings"
)

//go:embed migrations/*.sql
var migrations embed.FS

// migration is one step of the tables' history.
type migration struct {
	version int
	name    string
	sql     string
}

// readMigrations reads files named NNNN_what.sql. They count from 1 without a gap.
func readMigrations(files fs.FS) ([]migration, error) {
	entries, err := fs.ReadDir(files, "migrations")
	if err != nil {
		return nil, err
	}
	var all []migration
	for _, e := range entries {
		number, _, _ := strings.Cut(e.Name(), "_")
		version, err := strconv.Atoi(number)
		if err != nil || version != len(all)+1 {
			return nil, fmt.Errorf("migration %s: want number %04d", e.Name(), len(all)+1)
		}
		text, err := fs.ReadFile(files, "migrations/"+e.Name())
		if err != nil {
			return nil, err
		}
		all = append(all, migration{version: version, name: e.Name(), sql: string(text)})
	}
	return all, nil
}

// migrate applies the migrations that the file lacks, each in a transaction of its own.
func migrate(ctx context.Context, conn *sql.Conn, logger *slog.Logger) error {
	all, err := readMigrations(migrations)
	if err != nil {
		return err
	}
	const table = `CREATE TABLE IF NOT EXISTS jobs.tb_schema_version (
		version    INTEGER NOT NULL PRIMARY KEY,
		name       TEXT    NOT NULL,
		applied_at TEXT    NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now') || '000'))`
	if _, err := conn.ExecContext(ctx, table); err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	var have int
	if err := conn.QueryRowContext(ctx, "SELECT coalesce(max(version), 0) FROM jobs.tb_schema_version").Scan(&have); err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	if have > len(all) {
		return fmt.Errorf("the data was written by a newer version (its schema is %d, this program knows %d); use that version", have, len(all))
	}
	for _, m := range all[have:] {
		if err := apply(ctx, conn, m); err != nil {
			return fmt.Errorf("migrate: %s: %w", m.name, err)
		}
		logger.DebugContext(ctx, "migrated the embedded database", slog.String("migration", m.name))
	}
	return nil
}

func apply(ctx context.Context, conn *sql.Conn, m migration) (err error) {
	tx, err := conn.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() {
		if rollback := tx.Rollback(); rollback != nil && !errors.Is(rollback, sql.ErrTxDone) {
			err = errors.Join(err, rollback)
		}
	}()
	if _, err := tx.ExecContext(ctx, m.sql); err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, "INSERT INTO jobs.tb_schema_version (version, name) VALUES (?, ?)", m.version, m.name); err != nil {
		return err
	}
	return tx.Commit()
}
