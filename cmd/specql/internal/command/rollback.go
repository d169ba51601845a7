package command

import (
	"slices"
	"strings"

	"github.com/spf13/cobra"

	specqlv1 "github.com/specql/mesh/gen/specql/v1"
	"github.com/specql/mesh/pkg/client"
)

// httpOnly is the state that rollback knows: every call goes over HTTP, as it did before
// there were other execution types.
const httpOnly = "http-only"

func newRollback(s IO) *cobra.Command {
	var to string
	cmd := &cobra.Command{
		Use:   "rollback --to " + httpOnly,
		Short: "Disables every execution type but http, on every orchestrator at once",
		Long: "Disables every execution type that the mesh knows but http, which it enables. Jobs of the others fail with\n" +
			"DISABLED; those that run already go on. `specql execution-types --enable …` is the way back.",
		Args: cobra.NoArgs,
	}
	cmd.Flags().StringVar(&to, "to", "", "what to go back to: "+httpOnly)
	return withClient(s, cmd, func(cmd *cobra.Command, c *client.Client, _ *connection, out *output, _ []string) error {
		switch {
		case to == "":
			return misuse("say what to go back to: --to " + httpOnly)
		case to != httpOnly:
			return misuse("--to %q is not known: use %s", to, httpOnly)
		}
		known, err := setExecutionTypes(cmd.Context(), c, &specqlv1.SetExecutionTypesRequest{})
		if err != nil {
			return err
		}
		req := &specqlv1.SetExecutionTypesRequest{Enable: []string{"http"}}
		for _, t := range known.GetTypes() {
			if !strings.EqualFold(t.GetName(), "http") {
				req.Disable = append(req.Disable, t.GetName())
			}
		}
		types, err := setExecutionTypes(cmd.Context(), c, req)
		if err != nil {
			return err
		}
		return s.printExecutionTypes(out, types, slices.Concat(req.GetDisable(), req.GetEnable()))
	})
}
