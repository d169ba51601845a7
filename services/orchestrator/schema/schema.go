// Package schema makes PostgreSQL databases ready for the orchestrator, and says what they lack. It is for
// commands; the orchestrator itself changes no schema.
package schema

import (
	"context"
	"log/slog"

	"github.com/specql/mesh/services/orchestrator/internal/store/postgres"
)

// Problem is what a database lacks: What is wrong, with its place, and the Mend.
type Problem = postgres.Problem

// Info is what a database says of itself.
type Info = postgres.Info

// Inspect asks a database for its versions and its clock, and changes nothing.
func Inspect(ctx context.Context, url string) (*Info, error) {
	return postgres.Inspect(ctx, postgres.Options{URL: url})
}

// Migrate brings the database at a URL to the schema that this program knows, and returns the names of the migrations
// that it applied: none where nothing was amiss. Others may work in the database meanwhile. What the server warns of
// goes to the logger, which may be nil.
func Migrate(ctx context.Context, url string, logger *slog.Logger) ([]string, error) {
	return postgres.Migrate(ctx, postgres.Options{URL: url, Logger: logger})
}

// Validate lists what the database lacks of the schema that this program needs; nothing where it is ready.
func Validate(ctx context.Context, url string) ([]Problem, error) {
	return postgres.Validate(ctx, postgres.Options{URL: url})
}

// CheckPermissions lists what the role of the URL may not do and the orchestrator has to; nothing where it may do all.
func CheckPermissions(ctx context.Context, url string) ([]Problem, error) {
	return postgres.CheckPermissions(ctx, postgres.Options{URL: url})
}
