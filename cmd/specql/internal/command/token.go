package command

import (
	"encoding/json"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/specql/mesh/pkg/mesh"
)

// newTokenEntry is a token with its entry of the orchestrator's file. The entry is YAML in that
// JSON is.
type newTokenEntry struct {
	Subject string   `json:"subject"`
	Role    string   `json:"role"`
	Tenants []string `json:"tenants,omitempty"`
	Hash    string   `json:"hash"`
	Expires string   `json:"expires,omitempty"`
}

func newToken(s IO) *cobra.Command {
	var (
		e       newTokenEntry
		expires time.Duration
		out     output
	)
	cmd := &cobra.Command{
		Use:   "token --subject NAME --role ROLE",
		Short: "Makes a token for callers of the API, and its entry for --auth-tokens",
		Long: "Makes a token and prints it once, with the entry that goes into the file that the orchestrator reads with\n" +
			"--auth-tokens. The entry has the token's hash alone: who loses the token makes another.",
		Example: "  specql token --subject ci --role operator --tenant acme --expires-in 8760h",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if err := out.check(); err != nil {
				return err
			}
			if e.Subject == "" || len(e.Subject) > 255 || strings.ContainsFunc(e.Subject, func(r rune) bool { return r < ' ' || r == 0x7f }) {
				return misuse("--subject has between 1 and 255 bytes, of one line")
			}
			if !slices.Contains([]string{"viewer", "operator", "admin"}, e.Role) {
				return misuse("--role is viewer, operator or admin")
			}
			if expires < 0 {
				return misuse("--expires-in has to be positive")
			}
			if expires > 0 {
				e.Expires = time.Now().Add(expires).UTC().Format(time.RFC3339)
			}
			token, err := mesh.NewToken()
			if err != nil {
				return err
			}
			e.Hash = mesh.HashToken(token)
			if out.json() {
				return s.print(map[string]any{"token": token, "entry": e})
			}
			line, err := json.Marshal(e)
			if err != nil {
				return err
			}
			s.say("The token is shown this once. The line below it goes into the orchestrator's --auth-tokens file.")
			return s.lines([]string{token, "- " + string(line)}, "")
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&e.Subject, "subject", "", "who has the token; is written down with what it does")
	fs.StringVar(&e.Role, "role", "", "viewer, operator or admin")
	fs.StringSliceVar(&e.Tenants, "tenant", nil, "a tenant that the token is of (repeatable); '*' for all")
	fs.DurationVar(&expires, "expires-in", 0, "how long the token holds, such as 720h; for ever if absent")
	out.register(fs)
	return cmd
}
