package command

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/specql/mesh/cmd/specql/internal/jsonform"
	"github.com/specql/mesh/cmd/specql/internal/terminal"
	"github.com/specql/mesh/cmd/specql/internal/tree"
	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/client"
	"github.com/specql/mesh/pkg/fault"
)

func newRunners(s IO) *cobra.Command {
	var verbose bool
	cmd := &cobra.Command{Use: "runners", Short: "Lists the runners, their load and how they isolate jobs", Args: cobra.NoArgs}
	cmd.Flags().BoolVar(&verbose, "verbose", false, "say why a feature is not available")
	return withClient(s, cmd, func(cmd *cobra.Command, c *client.Client, _ *connection, out *output, _ []string) error {
		res, err := during(s, "asking the runners", func() (*specqlv1.ListRunnersResponse, error) {
			return c.Registry().ListRunners(cmd.Context(), &specqlv1.ListRunnersRequest{})
		})
		if err != nil {
			return fault.FromError(err)
		}
		if out.json() {
			doc, err := jsonform.Message(res)
			if err != nil {
				return err
			}
			return s.print(doc)
		}
		return s.lines(runnerLines(res.GetRunners(), s.out(), verbose), "")
	})
}

func runnerLines(runners []*specqlv1.Runner, screen terminal.Screen, verbose bool) []string {
	table := tree.Table{Head: []string{"TYPE", "ADDRESS", "NAME", "VERSION", "JOBS", "ISOLATION"}, Right: map[int]bool{4: true}}
	var missing []string
	for _, r := range runners {
		d := r.GetDescription()
		if !r.GetReachable() {
			table.Rows = append(table.Rows, []string{r.GetExecutionType(), r.GetAddress(), tree.Absent, tree.Absent, tree.Absent, "not reachable: " + r.GetError()})
			continue
		}
		features := ""
		for _, f := range d.GetIsolation() {
			if !f.GetAvailable() {
				missing = append(missing, terminal.Clean(fmt.Sprintf("%s: no %s: %s", r.GetExecutionType(), f.GetName(), f.GetDetail())))
				continue
			}
			if features != "" {
				features += " "
			}
			features += f.GetName()
		}
		table.Rows = append(table.Rows, []string{
			r.GetExecutionType(), r.GetAddress(), d.GetName(), d.GetVersion(), fmt.Sprintf("%d/%d", d.GetInFlight(), d.GetCapacity()), features,
		})
	}
	lines := table.Lines(screen)
	if verbose && len(missing) > 0 {
		lines = append(append(lines, ""), missing...)
	}
	return lines
}
