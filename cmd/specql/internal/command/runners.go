package command

import (
	"context"
	"fmt"
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

func newRunners(s IO) *cobra.Command {
	var verbose bool
	var wait time.Duration
	cmd := &cobra.Command{Use: "runners", Short: "Lists the runners, their load and how they isolate jobs", Args: cobra.NoArgs}
	cmd.Flags().BoolVar(&verbose, "verbose", false, "say why a feature is not available")
	cmd.Flags().DurationVar(&wait, "wait", 0, "ask again for so long until every runner is reachable; the status is 1 if one is not")
	return withClient(s, cmd, func(cmd *cobra.Command, c *client.Client, _ *connection, out *output, _ []string) error {
		res, err := during(s, "asking the runners", func() (*specqlv1.ListRunnersResponse, error) {
			return askRunners(cmd.Context(), c, wait)
		})
		if err != nil {
			return fault.FromError(err)
		}
		if out.json() {
			doc, err := jsonform.Message(res)
			if err != nil {
				return err
			}
			if err := s.print(doc); err != nil {
				return err
			}
		} else if err := s.lines(runnerLines(res.GetRunners(), s.out(), verbose), ""); err != nil {
			return err
		}
		if cmd.Flags().Changed("wait") && !allReachable(res) {
			return errShown
		}
		return nil
	})
}

// askAgain is the pause between two questions of --wait.
const askAgain = time.Second

// askRunners asks until every runner is reachable, for as long as it may take; then what was heard last is the answer.
func askRunners(ctx context.Context, c *client.Client, wait time.Duration) (*specqlv1.ListRunnersResponse, error) {
	for end := time.Now().Add(wait); ; {
		res, err := c.Registry().ListRunners(ctx, &specqlv1.ListRunnersRequest{})
		if err == nil && allReachable(res) || err != nil && fault.From(err).Code != fault.Unavailable || time.Now().After(end) {
			return res, err
		}
		select {
		case <-ctx.Done():
			return res, err
		case <-time.After(min(askAgain, time.Until(end))):
		}
	}
}

func allReachable(res *specqlv1.ListRunnersResponse) bool {
	return !slices.ContainsFunc(res.GetRunners(), func(r *specqlv1.Runner) bool { return !r.GetReachable() })
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
