package command

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/specql/mesh/services/orchestrator/schema"
)

func newValidateSchema(s IO) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "validate-schema",
		Short: "Says what a PostgreSQL database lacks of the mesh's schema",
		Long: "Compares the tables, columns, indexes, triggers, functions and views of the schema jobs with what this version\n" +
			"needs, and changes nothing. Every problem has its mend. Exit status 1 if there is one.",
		Args: cobra.NoArgs,
	}
	return withDatabase(s, cmd, func(ctx context.Context, d *database, out *output) error {
		problems, err := during(s, "looking at the schema", func() ([]schema.Problem, error) { return schema.Validate(ctx, d.url) })
		if err != nil {
			return err
		}
		return s.findings(out, problems, "The schema is what this version needs.")
	})
}
