package command

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"github.com/specql/mesh/cmd/specql/internal/jsonform"
	"github.com/specql/mesh/cmd/specql/internal/local"
	"github.com/specql/mesh/cmd/specql/internal/modernize"
	"github.com/specql/mesh/cmd/specql/internal/terminal"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/server"
)

func newMigrationCheck(s IO) *cobra.Command {
	var (
		out    output
		custom runnerFlags
		in     server.ValidateInput
		fix    bool
	)
	cmd := &cobra.Command{
		Use:   "migration-check FILE",
		Short: "Finds old patterns in a service registry, and with --fix writes their modern forms",
		Long: "Finds patterns of HTTP-only times in a service registry, each with its place and its modern form. They go on\n" +
			"working: what is told is advice. --fix writes the modern forms into the file; comments and order stay, and\n" +
			"what the registry says stays the same. Secrets cannot be moved by it: it names the key to use.\n\n" +
			"Needs no server. Exit status 0, whether or not there are old patterns; 1 if the file could not be written;\n" +
			"2 if the registry is not valid, and then nothing is written.",
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
			in.Runners, in.LookupEnv = runners, s.LookupEnv
			return s.migrationCheck(cmd.Context(), in, fix, out)
		},
	}
	fs := cmd.Flags()
	fs.BoolVar(&fix, "fix", false, "write the modern forms into the file")
	fs.StringVar(&in.Env, "env", "", "the overlay to check the registry with, such as production (SPECQL_ENV); old patterns are found in all")
	custom.register(fs)
	out.register(fs)
	return cmd
}

// migrationCheck finds old patterns and tells them, rewritten where that is asked for and can be done.
func (s IO) migrationCheck(ctx context.Context, in server.ValidateInput, fix bool, out output) error {
	problems, err := server.ValidateFiles(ctx, in)
	if err != nil {
		return err
	}
	errs := slices.DeleteFunc(slices.Clone(problems), func(p spec.Problem) bool { return p.Warning })
	registry, _ := spec.ParseRegistry(in.Registry, spec.Options{Env: in.Env, LookupEnv: in.LookupEnv})
	var found []modernize.Finding
	if registry != nil {
		if found, err = modernize.Find(in.Registry); err != nil {
			return err
		}
	}
	if fix && len(errs) == 0 {
		same := func(content []byte) (bool, error) { return sameProblems(ctx, in, registry.Envs, content) }
		content, err := modernize.Rewrite(in.Registry, found, same)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(found, func(f modernize.Finding) bool { return f.Written }) {
			if err := replaceFile(in.Registry, content); err != nil {
				return err
			}
		}
	}
	if out.json() {
		err = s.print(findingsDocument(found, errs))
	} else {
		err = s.printFindings(in.Registry.Name, found, errs, fix)
	}
	if err == nil && len(errs) > 0 {
		err = &exitError{status: Misuse}
	}
	return err
}

// sameProblems says whether a changed registry has no problem that the one in the file has not, with any overlay.
func sameProblems(ctx context.Context, in server.ValidateInput, envs []string, content []byte) (bool, error) {
	type said struct{ path, message string }
	for _, env := range slices.Compact(slices.Sorted(slices.Values(append([]string{"", in.Env}, envs...)))) {
		in.Env = env
		before, err := server.ValidateFiles(ctx, in)
		if err != nil {
			return false, err
		}
		changed := in
		changed.Registry.Content = content
		after, err := server.ValidateFiles(ctx, changed)
		if err != nil {
			return false, err
		}
		have := map[said]int{}
		for _, p := range before {
			have[said{p.Path, p.Message}]++
		}
		for _, p := range after {
			if have[said{p.Path, p.Message}]--; have[said{p.Path, p.Message}] < 0 {
				return false, nil
			}
		}
	}
	return true, nil
}

// replaceFile puts the new content in the place of the file as it was read, with the same mode.
func replaceFile(f spec.File, content []byte) error {
	// A link stays one.
	name, err := filepath.EvalSymlinks(f.Name)
	if err != nil {
		return err
	}
	info, err := os.Stat(name)
	if err != nil {
		return err
	}
	now, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	if string(now) != string(f.Content) {
		return fmt.Errorf("%s has changed meanwhile and was left alone; run the command again", f.Name)
	}
	return writeFile(name, content, info.Mode().Perm())
}

// findingsDocument is the JSON form of what was found.
func findingsDocument(found []modernize.Finding, errs spec.Problems) jsonform.Object {
	list := make([]jsonform.Object, 0, len(found))
	for _, f := range found {
		list = append(list, jsonform.Object{
			{Name: "file", Value: f.File},
			{Name: "line", Value: f.Line},
			{Name: "column", Value: f.Column},
			{Name: "path", Value: f.Path},
			{Name: "pattern", Value: f.Pattern},
			{Name: "message", Value: f.Message},
			{Name: "modern", Value: f.Modern},
			{Name: "fixable", Value: f.Fixable()},
			{Name: "written", Value: f.Written},
		})
	}
	doc := problemsDocument(errs)
	return append(doc, jsonform.Field{Name: "findings", Value: list})
}

// printFindings prints a line for each finding and each error, and a summary, on standard output.
func (s IO) printFindings(name string, found []modernize.Finding, errs spec.Problems, fix bool) error {
	screen := s.out()
	type placed struct {
		spec.Position
		line string
	}
	var list []placed
	written, fixable := 0, 0
	for _, f := range found {
		kind, style, mend := "old", terminal.Yellow, f.Modern
		switch {
		case f.Written:
			kind, style, mend, written = "written", terminal.Green, "`"+f.Says()+"`", written+1
		case f.Fixable():
			fixable++
		}
		place := terminal.Clean(f.Position.String()) + ": "
		list = append(list, placed{f.Position, place + screen.Paint(style, kind) + ": " + terminal.Clean(f.Path+": "+f.Message+"; "+mend)})
	}
	for i, line := range problemLines(errs, screen) {
		list = append(list, placed{errs[i].Position, line})
	}
	slices.SortStableFunc(list, func(a, b placed) int { return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column)) })
	lines := make([]string, 0, len(list)+1)
	for _, p := range list {
		lines = append(lines, p.line)
	}
	name = terminal.Clean(name)
	left := len(found) - written
	text, style := name+" has no old patterns", terminal.Green
	switch {
	case len(errs) > 0:
		text, style = name+" is not valid: "+count(len(errs), "error")+", "+count(len(found), "old pattern"), terminal.Red
		if fix {
			text += "; nothing was written"
		}
	case written > 0:
		text = name + ": " + count(written, "modern form") + " written"
		if left > 0 {
			text, style = text+", "+count(left, "old pattern")+" left to you", terminal.Yellow
		}
	case fix && left > 0:
		text, style = name+": "+count(left, "old pattern")+" left to you, nothing to write", terminal.Yellow
	case left > 0:
		text, style = name+" has "+count(left, "old pattern"), terminal.Yellow
		if fixable > 0 {
			text += fmt.Sprintf("; --fix writes %d", fixable)
		}
	}
	return s.lines(append(lines, screen.Paint(style, text)), "")
}
