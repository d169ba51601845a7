package command

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/specql/mesh/services/orchestrator/schema"
)

func newCheckPermissions(s IO) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check-permissions",
		Short: "Says what the role of a PostgreSQL URL may not do and the orchestrator has to",
		Long: "Looks at the rights of the role that the URL names, and changes nothing. Run it with the URL that the orchestrator\n" +
			"gets, which need not be that of migrate-schema. Every problem has its mend. Exit status 1 if there is one.",
		Args: cobra.NoArgs,
	}
	return withDatabase(s, cmd, func(ctx context.Context, d *database, out *output) error {
		problems, err := during(s, "looking at the rights", func() ([]schema.Problem, error) { return schema.CheckPermissions(ctx, d.url) })
		if err != nil {
			return err
		}
		return s.findings(out, problems, "The role may do all that the orchestrator has to.")
	})
}
