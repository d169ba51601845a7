package command

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/specql/mesh/cmd/specql/internal/jsonform"
	"github.com/specql/mesh/cmd/specql/internal/terminal"
	"github.com/specql/mesh/pkg/telemetry"
	"github.com/specql/mesh/services/orchestrator/schema"
)

func newMigrateSchema(s IO) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "migrate-schema",
		Short: "Makes the mesh's tables in a PostgreSQL database, or brings them up to date",
		Long: "Makes the schema jobs with its tables, triggers and views, or brings it up to date. An HTTP-only jobs.tb_job_run\n" +
			"of earlier times keeps every row, and others may work with the database meanwhile. Run again it does nothing.\n" +
			"The same SQL is in migrations/, for psql. The role needs the right to create in the database, or the schema jobs of its own.",
		Example: "  specql migrate-schema --database postgres://owner@db.example.org/specql",
		Args:    cobra.NoArgs,
	}
	return withDatabase(s, cmd, func(ctx context.Context, d *database, out *output) error {
		applied, err := during(s, "bringing the schema up to date", func() ([]string, error) {
			return schema.Migrate(ctx, d.url, telemetry.NewLogger(s.Err, "warn", "text"))
		})
		if err != nil {
			return err
		}
		if out.json() {
			list := append([]string{}, applied...)
			return s.print(jsonform.Object{{Name: "applied", Value: list}})
		}
		lines := make([]string, 0, len(applied))
		for _, name := range applied {
			lines = append(lines, terminal.Clean("applied  "+name))
		}
		if len(lines) == 0 {
			lines = []string{"The schema is up to date: nothing was to be done."}
		}
		return s.lines(lines, "")
	})
}
