package postgres

import (
	"context"
	"fmt"
	"time"

	"github.com/specql/mesh/migrations"
)

// Info is what a database says of itself.
type Info struct {
	// Server is the version of the server, such as 15.14.
	Server string
	// Schema is the version that the schema has, 0 for none, and Wanted the one that this program needs.
	Schema, Wanted int
	// Skew is how far the server's clock is ahead of this machine's, give or take Uncertain.
	Skew, Uncertain time.Duration
}

// Inspect asks a database for its versions and its clock, and changes nothing.
func Inspect(ctx context.Context, o Options) (*Info, error) {
	versions, err := migrations.Versions()
	if err != nil {
		return nil, err
	}
	c, err := connect(ctx, o)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close(context.WithoutCancel(ctx)) }()
	info := &Info{Wanted: len(versions)}
	var now time.Time
	if err := c.Ping(ctx); err != nil { // so that the clock is asked on a connection that is warm
		return nil, fmt.Errorf("inspect the database: %w", err)
	}
	asked := time.Now()
	if err := c.QueryRow(ctx, "SELECT current_setting('server_version'), clock_timestamp()").Scan(&info.Server, &now); err != nil {
		return nil, fmt.Errorf("inspect the database: %w", err)
	}
	took := time.Since(asked)
	info.Skew, info.Uncertain = now.Sub(asked.Add(took/2)), took/2
	if info.Schema, err = schemaVersion(ctx, c); err != nil {
		return nil, fmt.Errorf("inspect the database: %w", err)
	}
	return info, nil
}
