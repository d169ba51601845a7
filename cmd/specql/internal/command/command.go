// Package command holds the commands of specql, one file a command.
package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.opentelemetry.io/otel/trace"

	"github.com/specql/mesh/cmd/specql/internal/jsonform"
	"github.com/specql/mesh/cmd/specql/internal/terminal"
	"github.com/specql/mesh/pkg/config"
	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/telemetry"
)

// Exit statuses.
const (
	Done   = 0
	Failed = 1
	Misuse = 2
)

// IO is what a command works with in place of the process's own.
type IO struct {
	In        io.Reader
	Out, Err  io.Writer
	LookupEnv func(string) (string, bool)
	Version   string

	tracing *telemetry.Tracing // nil records nothing
}

func (s IO) getenv(name string) string {
	v, _ := s.LookupEnv(name)
	return v
}

// out is what standard output can show, err what standard error can.
func (s IO) out() terminal.Screen { return terminal.Detect(s.Out, s.getenv) }
func (s IO) err() terminal.Screen { return terminal.Detect(s.Err, s.getenv) }

// say writes a line for people on standard error.
func (s IO) say(format string, args ...any) {
	_, _ = fmt.Fprintf(s.Err, format+"\n", args...)
}

// exitError ends the program with a status other than [Failed].
type exitError struct {
	status int
	err    error // nil where everything has been said
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.status)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// misuse is an error of whoever typed the command.
func misuse(format string, args ...any) error {
	return &exitError{status: Misuse, err: fmt.Errorf(format, args...)}
}

// failed ends with status 1 and without a word: the failure has been shown.
var errShown = &exitError{status: Failed}

// Execute runs the command that the arguments name and returns the exit status.
func Execute(ctx context.Context, s IO, args []string) int {
	tracing, err := telemetry.NewTracing(ctx, "specql", s.Version, telemetry.NewLogger(s.Err, "warn", "text"))
	if err != nil {
		s.say("specql: %s", terminalLines(err.Error()))
		return Misuse
	}
	s.tracing = tracing
	root := newRoot(s)
	root.SetArgs(spread(args))
	cmd, err := root.ExecuteContextC(ctx)
	if cerr := tracing.Close(); cerr != nil {
		s.say("specql: %s", terminalLines(cerr.Error()))
	}
	if err == nil {
		return Done
	}
	if exit, ok := errors.AsType[*exitError](err); ok {
		if exit.err != nil {
			s.say("specql: %s", terminalLines(exit.err.Error()))
		}
		return exit.status
	}
	if f, ok := fault.As(err); ok {
		s.say("specql: %s", terminalLines(f.Message))
		// A single violation is the message.
		for _, v := range f.Violations[min(1, len(f.Violations)):] {
			text := terminal.Clean(v.Description)
			if v.Field != "" {
				text = terminal.Clean(v.Field) + ": " + text
			}
			s.say("  %s", text)
		}
		if f.Code == fault.Validation {
			return Misuse
		}
		return Failed
	}
	if _, ok := errors.AsType[*usageError](err); ok || !cmd.HasParent() {
		s.say("specql: %s", terminalLines(err.Error()))
		s.say("Run '%s --help' for usage.", cmd.CommandPath())
		return Misuse
	}
	s.say("specql: %s", terminalLines(err.Error()))
	return Failed
}

// terminalLines makes text of several lines harmless.
func terminalLines(text string) string {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	for i, l := range lines {
		lines[i] = terminal.Clean(l)
	}
	return strings.Join(lines, "\n")
}

// usageError is a flag or an argument that cobra refused.
type usageError struct{ error }

func newRoot(s IO) *cobra.Command {
	root := &cobra.Command{
		Use:   "specql",
		Short: "Runs workflows of HTTP, shell, Docker and serverless calls",
		Long: "SpecQL runs workflows written in YAML. Each call goes to a runner of its execution type, which checks\n" +
			"it against a policy, carries it out in isolation and tells what it used.\n\n" +
			"Exit status: 0 done, 1 the work failed, 2 used wrongly or invalid input.",
		Version:       s.Version,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetIn(s.In)
	root.SetOut(s.Out)
	root.SetErr(s.Err)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{err} })
	root.AddCommand(
		newDev(s), newDemo(s), newExecuteJob(s), newRuns(s), newRunners(s), newValidateConfig(s), newMigrationCheck(s), newCerts(s), newToken(s),
		newGenerateSchema(s), newMigrateSchema(s), newValidateSchema(s), newCheckPermissions(s), newExecutionTypes(s), newRollback(s), newLoadTest(s), newProfile(s), newBenchmark(s), newResourceCheck(s), newSecurityAudit(s), newDoctor(s), newAlerts(s),
	)
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, c := range descendants(root) {
		switch c.CommandPath() {
		case "specql completion":
			// Cobra prints help for a shell that it does not know, as if that were asked for.
			c.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
		case "specql help":
			c.RunE = func(cmd *cobra.Command, args []string) error {
				about, _, err := cmd.Root().Find(args)
				if err != nil {
					return &usageError{err}
				}
				about.InitDefaultHelpFlag()
				about.InitDefaultVersionFlag()
				return about.Help()
			}
		}
		s.trace(c)
		if args := c.Args; args != nil {
			c.Args = func(cmd *cobra.Command, a []string) error {
				if err := args(cmd, a); err != nil {
					return &usageError{err}
				}
				return nil
			}
		}
	}
	return root
}

// trace makes a span of each call of a command that talks to a server.
func (s IO) trace(c *cobra.Command) {
	run := c.RunE
	if run == nil || s.tracing == nil || c.Flags().Lookup("address") == nil {
		return
	}
	c.RunE = func(cmd *cobra.Command, args []string) error {
		ctx, span := telemetry.StartAs(cmd.Context(), s.tracing.Provider(), trace.SpanContext{}, cmd.CommandPath())
		defer span.End()
		cmd.SetContext(ctx)
		err := run(cmd, args)
		if f, ok := fault.As(err); ok {
			telemetry.Fail(span, f.Code)
		}
		return err
	}
}

func descendants(c *cobra.Command) []*cobra.Command {
	out := []*cobra.Command{c}
	for _, child := range c.Commands() {
		out = append(out, descendants(child)...)
	}
	return out
}

// manyWords are the flags that take every word up to the next flag: --disable shell docker.
var manyWords = []string{"--disable", "--enable", "--services"}

// spread repeats such a flag before each of its words, as the flag parser wants it. One
// without a word goes to the end, where the parser sees that its word is missing.
func spread(args []string) []string {
	var out, bare []string
	flag := ""
	for i, a := range args {
		switch {
		case a == "--":
			return slices.Concat(out, bare, args[i:])
		case strings.HasPrefix(a, "-"):
			name, _, written := strings.Cut(a, "=")
			flag = ""
			if slices.Contains(manyWords, name) {
				flag = name
			}
			switch {
			case flag == "" || written:
				out = append(out, a)
			case i+1 == len(args) || strings.HasPrefix(args[i+1], "-"):
				bare = append(bare, a)
			}
		case flag != "":
			out = append(out, flag, a)
		default:
			out = append(out, a)
		}
	}
	return append(out, bare...)
}

// bind gives flags that were not set their variable's value: --address that of SPECQL_ADDRESS.
func (s IO) bind(fs *pflag.FlagSet) error {
	if err := config.BindFrom(fs, s.LookupEnv); err != nil {
		return &usageError{err}
	}
	return nil
}

// output is the flag -o of commands that print data.
type output struct{ format string }

func (o *output) register(fs *pflag.FlagSet) {
	fs.StringVarP(&o.format, "output", "o", "text", "text or json: one JSON document on standard output")
}

func (o *output) json() bool { return o.format == "json" }

func (o *output) check() error {
	if o.format != "text" && o.format != "json" {
		return &usageError{fmt.Errorf("--output %q is not known: use text or json", o.format)}
	}
	return nil
}

// print writes a JSON document.
func (s IO) print(doc any) error { return jsonform.Write(s.Out, doc) }
