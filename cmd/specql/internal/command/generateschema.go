package command

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/specql/mesh/cmd/specql/internal/jsonform"
	"github.com/specql/mesh/cmd/specql/internal/local"
	"github.com/specql/mesh/cmd/specql/internal/terminal"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/pkg/spec/ddl"
)

func newGenerateSchema(s IO) *cobra.Command {
	var out output
	var dir string
	cmd := &cobra.Command{
		Use:   "generate-schema DIR",
		Short: "Prints the PostgreSQL of entities: tables, checks, indexes, and a function for each action",
		Long: "Reads the entity files of DIR and prints the SQL that makes their tables, with checks, foreign keys and\n" +
			"indexes, and a function for each action that starts it in the caller's transaction:\n\n" +
			"  SELECT app.process_payment('ID', '{\"card_token\": \"x\"}');\n\n" +
			"The SQL can be run again after each change of the files: nothing that holds data is dropped. With --out it goes\n" +
			"to files, to be run in the order of their names. Needs no server and no database. Exit status 2 if a file is not valid.",
		Example: "  specql generate-schema entities/ | psql -v ON_ERROR_STOP=1 -d DATABASE\n  specql generate-schema entities/ --out schema/",
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := out.check(); err != nil {
				return err
			}
			files, err := local.ReadEntities(args[0])
			if err != nil {
				return misuse("%w", err)
			}
			if len(files) == 0 {
				return misuse("%s holds no .yaml or .yml file", args[0])
			}
			scripts, problems := schemaScripts(files)
			if problems.HasErrors() {
				scripts = nil
			}
			switch {
			case out.json():
				err = s.print(scriptsDocument(scripts, problems))
			default:
				for _, line := range problemLines(problems, s.err()) {
					s.say("%s", line)
				}
				if dir == "" && !problems.HasErrors() {
					err = s.printScripts(scripts)
				}
			}
			if err == nil && problems.HasErrors() {
				err = &exitError{status: Misuse}
				if !out.json() {
					s.say("%s", summary(args[0], problems, s.err()))
				}
			}
			if err != nil || dir == "" {
				return err
			}
			return s.writeScripts(dir, scripts, out.json())
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&dir, "out", "", "folder to write the SQL to: a file for each entity, and one each for schemas, constraints and functions")
	out.register(fs)
	return cmd
}

// script is a file of SQL. Scripts are run in the order of their names.
type script struct{ name, sql string }

// madeBy begins every file, so that one that is no longer needed is known for ours.
const madeBy = "-- Made by specql generate-schema"

const scriptHead = madeBy + " from entity files. It can be run again after each change of them:\n-- psql -v ON_ERROR_STOP=1 -d DATABASE -f FILE\n"

// schemaScripts are the SQL of entity files.
func schemaScripts(files []spec.File) ([]script, spec.Problems) {
	var entities []*spec.Entity
	var problems spec.Problems
	for _, f := range files {
		e, found := spec.ParseEntity(f, spec.Options{})
		problems = append(problems, found...)
		if e != nil {
			entities = append(entities, e)
		}
	}
	if problems.HasErrors() {
		problems.Sort()
		return nil, problems
	}
	tables, found := ddl.Tables(entities, ddl.Options{})
	problems = append(problems, found...)
	functions, found := ddl.Functions(entities)
	for _, p := range found {
		// What is wrong with an entity itself has been said.
		if strings.HasPrefix(p.Path, "actions.") {
			problems = append(problems, p)
		}
	}
	problems.Sort()
	var out []script
	add := func(name, before string, statements []ddl.Statement) {
		if len(statements) > 0 {
			out = append(out, script{name + ".sql", before + ddl.Text(statements)})
		}
	}
	of := func(kind ddl.Kind, e *spec.Entity) []ddl.Statement {
		return slices.DeleteFunc(slices.Clone(tables), func(st ddl.Statement) bool { return st.Kind != kind || st.Entity != e })
	}
	add("00_schemas", "", of(ddl.KindSchema, nil))
	for _, e := range entities {
		add("10_"+e.Schema+"."+e.Name, "", of(ddl.KindTable, e))
	}
	add("20_constraints", "", of(ddl.KindConstraint, nil))
	add("30_functions", ddl.Grants(entities)+"\n", functions)
	return out, problems
}

func scriptsDocument(scripts []script, problems spec.Problems) jsonform.Object {
	list := make([]jsonform.Object, 0, len(scripts))
	for _, f := range scripts {
		list = append(list, jsonform.Object{{Name: "name", Value: f.name}, {Name: "sql", Value: f.sql}})
	}
	return append(jsonform.Object{{Name: "files", Value: list}}, problemsDocument(problems)...)
}

func (s IO) printScripts(scripts []script) error {
	var b strings.Builder
	b.WriteString(scriptHead)
	for _, f := range scripts {
		b.WriteString("\n" + f.sql)
	}
	_, err := s.Out.Write([]byte(b.String()))
	return err
}

// writeScripts writes the files, and removes those of entities that are gone.
func (s IO) writeScripts(dir string, scripts []script, hush bool) error {
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // SQL for everyone who may read the folder
		return fmt.Errorf("--out: %w", err)
	}
	names := map[string]bool{}
	var lines []string
	for _, f := range scripts {
		name := filepath.Join(dir, f.name)
		if err := writeFile(name, []byte(scriptHead+"\n"+f.sql), 0o644); err != nil {
			return err
		}
		names[name] = true
		lines = append(lines, "wrote    "+terminal.Clean(name))
	}
	old, err := filepath.Glob(filepath.Join(globEscape(dir), "[0-9][0-9]_*.sql"))
	if err != nil {
		return fmt.Errorf("--out: %w", err)
	}
	var errs []error
	for _, name := range old {
		if names[name] {
			continue
		}
		text, err := readFile(name)
		if err == nil && bytes.HasPrefix(text, []byte(madeBy)) {
			err = os.Remove(name)
			lines = append(lines, "removed  "+terminal.Clean(name))
		}
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil || hush {
		return err
	}
	return s.lines(lines, "")
}

// globEscape makes a folder's name stand for itself in a pattern.
func globEscape(name string) string {
	return strings.NewReplacer(`\`, `\\`, "*", `\*`, "?", `\?`, "[", `\[`).Replace(name)
}
