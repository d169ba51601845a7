package command

import (
	"context"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/specql/mesh/cmd/specql/internal/jsonform"
	"github.com/specql/mesh/cmd/specql/internal/terminal"
	"github.com/specql/mesh/cmd/specql/internal/tree"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/client"
	"github.com/specql/mesh/pkg/fault"
)

func newExecutionTypes(s IO) *cobra.Command {
	var req specqlv1.SetExecutionTypesRequest
	cmd := &cobra.Command{
		Use:   "execution-types",
		Short: "Lists, disables and enables execution types, on every orchestrator at once",
		Long: "Without flags: which execution types there are, and whether their jobs are carried out. A job of a disabled\n" +
			"type fails with DISABLED, one that waits for its turn or its next attempt, too; one that runs already goes on. A change\n" +
			"takes hold at once on every orchestrator, and stays until it is changed again. To list them needs the role viewer.",
		Example: "  specql execution-types --disable shell docker serverless\n  specql execution-types --enable shell",
		Args:    cobra.NoArgs,
	}
	fs := cmd.Flags()
	fs.StringSliceVar(&req.Disable, "disable", nil, "types to disable: all words up to the next flag")
	fs.StringSliceVar(&req.Enable, "enable", nil, "types to enable: all words up to the next flag")
	return withClient(s, cmd, func(cmd *cobra.Command, c *client.Client, _ *connection, out *output, _ []string) error {
		types, err := setExecutionTypes(cmd.Context(), c, &req)
		if err != nil {
			return err
		}
		return s.printExecutionTypes(out, types, slices.Concat(req.GetDisable(), req.GetEnable()))
	})
}

func setExecutionTypes(ctx context.Context, c *client.Client, req *specqlv1.SetExecutionTypesRequest) (*specqlv1.SetExecutionTypesResponse, error) {
	res, err := c.Registry().SetExecutionTypes(ctx, req)
	if err != nil {
		return nil, fault.FromError(err)
	}
	return res, nil
}

// printExecutionTypes prints every type; those that were asked for are said on standard error.
func (s IO) printExecutionTypes(out *output, res *specqlv1.SetExecutionTypesResponse, changed []string) error {
	if out.json() {
		doc, err := jsonform.Message(res)
		if err != nil {
			return err
		}
		return s.print(doc)
	}
	table := tree.Table{Head: []string{"TYPE", "STATE", "CHANGED"}}
	for _, t := range res.GetTypes() {
		at := tree.Absent
		if c := t.GetChangedAt(); c != nil {
			at = c.AsTime().Local().Format(time.DateTime)
		}
		table.Rows = append(table.Rows, []string{t.GetName(), typeState(t), at})
		if slices.Contains(changed, t.GetName()) {
			s.say("%s is %s", terminal.Clean(t.GetName()), typeState(t))
		}
	}
	return s.lines(table.Lines(s.out()), "")
}

func typeState(t *specqlv1.ExecutionTypeState) string {
	if t.GetEnabled() {
		return "enabled"
	}
	return "disabled"
}
