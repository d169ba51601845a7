package command

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/specql/mesh/cmd/specql/internal/jsonform"
	"github.com/specql/mesh/cmd/specql/internal/local"
	"github.com/specql/mesh/cmd/specql/internal/terminal"
	"github.com/specql/mesh/pkg/mesh"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/server"
)

// runnerFlags say where custom runners are and how to speak to them.
type runnerFlags struct {
	runners       []string
	cert, key, ca string
	insecure      bool
}

func (r *runnerFlags) register(fs *pflag.FlagSet) {
	fs.StringSliceVar(&r.runners, "runner", nil, "TYPE=ADDRESS of a custom runner (repeatable, or with commas)")
	fs.StringVar(&r.cert, "tls-cert", "", "PEM file of the certificate to show to custom runners")
	fs.StringVar(&r.key, "tls-key", "", "PEM file of its key")
	fs.StringVar(&r.ca, "tls-ca", "", "PEM file of the CA of custom runners")
	fs.BoolVar(&r.insecure, "insecure", false, "speak plaintext with custom runners, on loopback alone (so without --tls-cert anyway)")
}

// addresses are the custom runners by execution type.
func (r *runnerFlags) addresses() (map[string]string, error) {
	out := map[string]string{}
	for _, pair := range r.runners {
		kind, address, ok := strings.Cut(pair, "=")
		if !ok || kind == "" || address == "" {
			return nil, misuse("--runner %q is not TYPE=ADDRESS, such as wasm=127.0.0.1:9090", pair)
		}
		if _, twice := out[kind]; twice {
			return nil, misuse("--runner %s is given twice", kind)
		}
		out[kind] = address
	}
	return out, nil
}

func (r *runnerFlags) credentials(addresses map[string]string) (*mesh.Credentials, error) {
	if r.cert == "" && r.key == "" && r.ca == "" {
		for kind, address := range addresses {
			if err := mesh.CheckInsecure(address); err != nil {
				return nil, misuse("--runner %s: %w", kind, err)
			}
		}
		return nil, nil
	}
	if r.insecure {
		return nil, misuse("--insecure and --tls-cert exclude each other")
	}
	creds, err := mesh.LoadCredentials(r.cert, r.key, r.ca)
	if err != nil {
		return nil, misuse("--tls-cert, --tls-key, --tls-ca: %w", err)
	}
	return creds, nil
}

func newValidateConfig(s IO) *cobra.Command {
	var (
		out             output
		custom          runnerFlags
		in              server.ValidateInput
		entities        string
		verbose, strict bool
	)
	cmd := &cobra.Command{
		Use:   "validate-config FILE",
		Short: "Checks a service registry and, with --entities, the actions against it",
		Long: "Checks a service registry: its form, and each service against the schema of its runner. With --entities,\n" +
			"the entities and their actions too. Needs no server. Exit status 0 if it is valid, 2 if it is not.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := s.bind(cmd.Flags()); err != nil {
				return err
			}
			if err := out.check(); err != nil {
				return err
			}
			var err error
			if in.Registry, err = local.ReadFile(args[0]); err != nil {
				return misuse("%w", err)
			}
			if entities != "" {
				if in.Entities, err = local.ReadEntities(entities); err != nil {
					return misuse("--entities: %w", err)
				}
			}
			if in.RunnerAddresses, err = custom.addresses(); err != nil {
				return err
			}
			if in.RunnerCredentials, err = custom.credentials(in.RunnerAddresses); err != nil {
				return err
			}
			runners, closeRunners, err := local.BuiltIn(slog.New(slog.DiscardHandler))
			if err != nil {
				return err
			}
			defer closeRunners()
			in.Runners, in.LookupEnv, in.Strict = runners, s.LookupEnv, strict
			problems, err := server.ValidateFiles(cmd.Context(), in)
			if err != nil {
				return err
			}
			if out.json() {
				err = s.print(problemsDocument(problems))
			} else {
				err = s.printProblems(problems, in, verbose)
			}
			if err == nil && problems.HasErrors() {
				err = &exitError{status: Misuse}
			}
			return err
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&in.Env, "env", "", "the overlay to use, such as production (SPECQL_ENV)")
	fs.StringVar(&entities, "entities", "", "folder of entity files to check too")
	fs.BoolVar(&strict, "strict", false, "make warnings errors")
	fs.BoolVar(&verbose, "verbose", false, "show the line of each problem and what was checked")
	custom.register(fs)
	out.register(fs)
	return cmd
}

// problemsDocument is the JSON form of problems.
func problemsDocument(problems spec.Problems) jsonform.Object {
	list := make([]jsonform.Object, 0, len(problems))
	for _, p := range problems {
		list = append(list, jsonform.Object{
			{Name: "file", Value: p.File},
			{Name: "line", Value: p.Line},
			{Name: "column", Value: p.Column},
			{Name: "path", Value: p.Path},
			{Name: "message", Value: p.Message},
			{Name: "mend", Value: p.Mend},
			{Name: "warning", Value: p.Warning},
		})
	}
	return jsonform.Object{{Name: "valid", Value: !problems.HasErrors()}, {Name: "problems", Value: list}}
}

// printProblems prints a line for each problem and a summary, on standard output: they are
// what the command is for.
func (s IO) printProblems(problems spec.Problems, in server.ValidateInput, verbose bool) error {
	screen := s.out()
	lines := problemLines(problems, screen)
	if verbose {
		lines = nil
		files := append([]spec.File{in.Registry}, in.Entities...)
		for i, line := range problemLines(problems, screen) {
			lines = append(append(lines, line), excerpt(problems[i], files, screen)...)
		}
		lines = append(lines, checked(in)...)
	}
	return s.lines(append(lines, summary(in.Registry.Name, problems, screen)), "")
}

func problemLines(problems spec.Problems, screen terminal.Screen) []string {
	lines := make([]string, 0, len(problems))
	for _, p := range problems {
		kind, style := "error", terminal.Red
		if p.Warning {
			kind, style = "warning", terminal.Yellow
		}
		text := terminal.Clean(p.String())
		place := terminal.Clean(p.Position.String()) + ": "
		rest := strings.TrimPrefix(text, place)
		lines = append(lines, place+screen.Paint(style, kind)+": "+rest)
	}
	return lines
}

func summary(name string, problems spec.Problems, screen terminal.Screen) string {
	errs := 0
	for _, p := range problems {
		if !p.Warning {
			errs++
		}
	}
	text := terminal.Clean(name) + " is valid"
	style := terminal.Green
	if errs > 0 {
		text, style = terminal.Clean(name)+" is not valid: "+count(errs, "error"), terminal.Red
	}
	if n := len(problems) - errs; n > 0 {
		text += ", " + count(n, "warning")
	}
	return screen.Paint(style, text)
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// excerpt is the line of a problem with a mark below its column.
func excerpt(p spec.Problem, files []spec.File, screen terminal.Screen) []string {
	i := slices.IndexFunc(files, func(f spec.File) bool { return f.Name == p.File })
	if i < 0 || p.Line < 1 {
		return nil
	}
	lines := strings.Split(string(files[i].Content), "\n")
	if p.Line > len(lines) {
		return nil
	}
	text := []rune(strings.TrimRight(lines[p.Line-1], "\r"))
	before := terminal.Width(terminal.Clean(string(text[:min(max(p.Column-1, 0), len(text))])))
	return []string{
		"    " + terminal.Cut(terminal.Clean(string(text)), 160),
		"    " + strings.Repeat(" ", min(before, 159)) + screen.Paint(terminal.Red, "^"),
	}
}

// checked says what was looked at.
func checked(in server.ValidateInput) []string {
	registry, _ := spec.ParseRegistry(in.Registry, spec.Options{Env: in.Env, LookupEnv: in.LookupEnv})
	if registry == nil {
		return nil
	}
	var lines []string
	for _, service := range registry.Services {
		names := make([]string, 0, len(service.Operations))
		for _, o := range service.Operations {
			names = append(names, o.Name)
		}
		lines = append(lines, terminal.Clean(fmt.Sprintf("service %s (%s): %s", service.Name, service.ExecutionType, strings.Join(names, ", "))))
	}
	for _, f := range in.Entities {
		lines = append(lines, terminal.Clean("entity file "+f.Name))
	}
	if others := slices.DeleteFunc(slices.Clone(registry.Envs), func(e string) bool { return e == in.Env }); len(others) > 0 {
		lines = append(lines, terminal.Clean("overlays not checked (use --env): "+strings.Join(others, ", ")))
	}
	return lines
}

// invalid prints the problems of a registry that cannot be served.
func (s IO) invalid(err error) error {
	var invalid *server.InvalidError
	if !errors.As(err, &invalid) {
		return err
	}
	for _, line := range problemLines(invalid.Problems, s.err()) {
		s.say("%s", line)
	}
	return misuse("the registry is not valid: nothing was started")
}
