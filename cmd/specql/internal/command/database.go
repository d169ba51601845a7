package command

import (
	"context"
	"errors"
	"net/url"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/specql/mesh/cmd/specql/internal/jsonform"
	"github.com/specql/mesh/cmd/specql/internal/terminal"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/services/orchestrator/schema"
)

// database is the flag of commands that work on a PostgreSQL database without a server.
type database struct{ url string }

func (d *database) register(fs *pflag.FlagSet) {
	fs.StringVar(&d.url, "database", "", "URL of the PostgreSQL database (SPECQL_DATABASE, DATABASE_URL); a password is better kept in PGPASSWORD or ~/.pgpass")
}

// resolve fills the URL in from the environment and checks its form. No error shows it, for
// there may be a password in it.
func (d *database) resolve(s IO, fs *pflag.FlagSet) error {
	if err := s.bind(fs); err != nil {
		return err
	}
	if d.url == "" {
		d.url = s.getenv("DATABASE_URL")
	}
	if d.url == "" {
		return misuse("--database, SPECQL_DATABASE or DATABASE_URL is needed: the URL of the PostgreSQL database, such as postgres://user@host/database")
	}
	return checkDatabaseURL(d.url)
}

func checkDatabaseURL(text string) error {
	if strings.HasPrefix(text, "sqlite:") {
		return misuse("--database: an SQLite database makes its tables by itself; this is for PostgreSQL, postgres://user@host/database")
	}
	if !isPostgreSQL(text) {
		return misuse("--database is not the URL of a PostgreSQL database: write postgres://user@host/database")
	}
	if _, err := url.Parse(text); err != nil {
		return misuse("--database is not a URL: write postgres://user@host/database, and characters such as / @ : # %% in the password as %%2F %%40 %%3A %%23 %%25")
	}
	return nil
}

// isPostgreSQL says whether a database is meant to be PostgreSQL's.
func isPostgreSQL(text string) bool {
	return strings.HasPrefix(text, "postgres://") || strings.HasPrefix(text, "postgresql://")
}

// redactURL is a URL of a database without what is secret in it. Anything else stays as it is.
func redactURL(text string) string {
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "postgres" && u.Scheme != "postgresql" {
		return text
	}
	q := u.Query()
	for _, name := range secretParameters {
		if q.Has(name) {
			q.Set(name, "xxxxx")
		}
	}
	u.RawQuery = q.Encode()
	return u.Redacted()
}

// secretParameters are those of a URL that hold a password.
var secretParameters = []string{"password", "sslpassword"}

// hide takes the URL and its passwords out of an error. A fault stays one.
func (d *database) hide(err error) error {
	if err == nil {
		return nil
	}
	if f, ok := fault.As(err); ok {
		clean := *f
		clean.Message = d.hideIn(f.Message)
		return &clean
	}
	return errors.New(d.hideIn(err.Error()))
}

func (d *database) hideIn(text string) string {
	text = strings.ReplaceAll(text, d.url, redactURL(d.url))
	u, err := url.Parse(d.url)
	if err != nil {
		return "the URL of the database cannot be read"
	}
	var secrets []string
	if password, ok := u.User.Password(); ok {
		_, written, _ := strings.Cut(u.User.String(), ":")
		secrets = append(secrets, password, written)
	}
	for _, name := range secretParameters {
		secrets = append(secrets, u.Query().Get(name))
	}
	for _, secret := range secrets {
		// A shorter one would take pieces out of words, and is no secret.
		if len(secret) >= 4 {
			text = strings.ReplaceAll(text, secret, "xxxxx")
		}
	}
	return text
}

// withDatabase makes a command that works on the database of its flags.
func withDatabase(s IO, cmd *cobra.Command, do func(ctx context.Context, d *database, out *output) error) *cobra.Command {
	var d database
	var out output
	d.register(cmd.Flags())
	out.register(cmd.Flags())
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := out.check(); err != nil {
			return err
		}
		if err := d.resolve(s, cmd.Flags()); err != nil {
			return err
		}
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		err := do(ctx, &d, &out)
		if _, ok := errors.AsType[*exitError](err); ok {
			return err
		}
		return d.hide(err)
	}
	return cmd
}

// findings prints what a check found, each with its mend; there being any is a failure.
func (s IO) findings(out *output, problems []schema.Problem, fine string) error {
	if out.json() {
		list := make([]jsonform.Object, 0, len(problems))
		for _, p := range problems {
			list = append(list, jsonform.Object{{Name: "message", Value: p.What}, {Name: "mend", Value: p.Mend}})
		}
		if err := s.print(jsonform.Object{{Name: "valid", Value: len(problems) == 0}, {Name: "problems", Value: list}}); err != nil {
			return err
		}
	} else {
		screen := s.out()
		lines := make([]string, 0, len(problems)+1)
		for _, p := range problems {
			lines = append(lines, screen.Paint(terminal.Red, "error")+": "+terminal.Clean(p.What+"; "+p.Mend))
		}
		if len(problems) == 0 {
			lines = append(lines, screen.Paint(terminal.Green, fine))
		} else {
			lines = append(lines, screen.Paint(terminal.Red, count(len(problems), "problem")))
		}
		if err := s.lines(lines, ""); err != nil {
			return err
		}
	}
	if len(problems) > 0 {
		return errShown
	}
	return nil
}
