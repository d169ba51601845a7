// Package ddl writes the PostgreSQL that entities need: schemas, tables, columns, checks,
// foreign keys, indexes, and a function for each action that starts it in the caller's
// transaction. It is text alone and knows no database.
//
// Every statement can be run again: what is there stays, nothing that holds data is dropped,
// and a check or a foreign key that the entities no longer have is taken away. A check says what
// [spec.Entity.CheckRow] says; two values that differ as text alone, such as two spellings of
// one moment, are one value in the database.
package ddl

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/specql/mesh/pkg/spec"
)

// Kind is what a statement makes.
type Kind int

// The kinds, in the order that statements have to be run in.
const (
	KindSchema Kind = iota
	// KindTable is a table with its columns, checks and indexes.
	KindTable
	// KindConstraint is what spans tables, and what older tables lack.
	KindConstraint
	KindFunction
)

// Statement is one statement, without a semicolon at its end.
type Statement struct {
	Kind Kind
	// Entity is what the statement is for; nil where that is not one entity.
	Entity *spec.Entity
	SQL    string
	// Done is an SQL expression that is true where the statement would change nothing. It asks
	// for no right but USAGE of the schema, so that a role that may not change tables can find
	// that it need not.
	Done string
	// Notes are remarks for readers of the SQL.
	Notes []string

	// index tells an index from others of its table.
	index string
}

// Options say how references are read. The zero value is strict.
type Options struct {
	// OpenReferences makes a reference to an entity or a field that is not there a warning and
	// leaves its foreign key out: the table may be made elsewhere.
	OpenReferences bool
}

// primaryKey is the column that tells the rows of an entity apart.
const primaryKey = "id"

// mark begins the comment of every constraint made here; the digest of its definition follows.
const mark = "specql:"

// Tables gives the statements for the schemas and tables of entities: schemas first, then
// tables, then the foreign keys between them. Problems carry their place; with an error
// among them the statements must not be run.
func Tables(entities []*spec.Entity, o Options) ([]Statement, spec.Problems) {
	g := newGenerator(entities)
	for _, name := range g.schemas() {
		g.add(Statement{
			Kind: KindSchema, SQL: "CREATE SCHEMA IF NOT EXISTS " + quote(name),
			Done: "to_regnamespace(" + literal(quote(name)) + ") IS NOT NULL",
		})
	}
	for _, e := range g.entities {
		g.table(e)
	}
	for _, e := range g.entities {
		for _, f := range e.Fields {
			if f.References != "" {
				g.reference(e, f, o)
			}
		}
	}
	g.follow()
	g.problems.Sort()
	return g.statements, slices.Compact(g.problems)
}

// TableName is the quoted name of an entity's table, with its schema.
func TableName(e *spec.Entity) string { return quote(e.Schema) + "." + quote(e.Name) }

// Text joins statements to a script for psql.
func Text(statements []Statement) string {
	var b strings.Builder
	var last *spec.Entity
	kind := Kind(-1)
	for _, s := range statements {
		if s.Kind != kind || s.Entity != last {
			if b.Len() > 0 {
				b.WriteByte('\n')
			}
			if title := s.title(); title != "" {
				b.WriteString("-- " + title + "\n")
			}
			kind, last = s.Kind, s.Entity
		}
		for _, note := range s.Notes {
			b.WriteString("-- " + oneLine(note) + "\n")
		}
		b.WriteString(s.SQL + ";\n")
	}
	return b.String()
}

func (s Statement) title() string {
	if s.Entity == nil {
		return ""
	}
	switch s.Kind {
	case KindTable:
		return oneLine(strings.TrimRight("Entity "+s.Entity.Name+": "+s.Entity.Description, ": "))
	case KindFunction:
		return oneLine("Actions of " + s.Entity.Name)
	default:
		return ""
	}
}

// generator gathers statements and problems.
type generator struct {
	entities    []*spec.Entity
	statements  []Statement
	problems    spec.Problems
	constraints []constraint
	// openReferences tell why fields have no foreign key.
	openReferences []string
	// relations are the names in use: tables and indexes of one schema share them.
	relations map[string]bool
}

// newGenerator sorts out the entities that can have a table.
func newGenerator(entities []*spec.Entity) *generator {
	g := &generator{relations: map[string]bool{}}
	for _, e := range entities {
		if g.usable(e) {
			g.entities = append(g.entities, e)
			g.relations[e.Schema+"."+e.Name] = true
		}
	}
	return g
}

func (g *generator) add(s Statement) { g.statements = append(g.statements, s) }

func (g *generator) errorf(at spec.Position, path, mend, format string, args ...any) {
	g.problems = append(g.problems, spec.Problem{Position: at, Path: path, Mend: mend, Message: fmt.Sprintf(format, args...)})
}

// systemColumns are names that PostgreSQL keeps for itself.
var systemColumns = []string{"tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"}

// usable says whether the names and types of an entity can stand in a statement. Entities of
// files have been checked; others come from programs.
func (g *generator) usable(e *spec.Entity) bool {
	before := len(g.problems)
	switch {
	case !isName(e.Name):
		g.errorf(e.Position, "entity", nameMend, "%q cannot be the name of a table", clip(e.Name))
	case !isName(e.Schema):
		g.errorf(e.Position, "schema", nameMend, "%q cannot be the name of a schema", clip(e.Schema))
	case strings.HasPrefix(strings.ToLower(e.Schema), "pg_") || strings.EqualFold(e.Schema, "information_schema"):
		g.errorf(e.Position, "schema", "choose another, such as app", "the schema %s is PostgreSQL's own", e.Schema)
	case e.Schema == "jobs":
		g.errorf(e.Position, "schema", "choose another, such as app", "the schema jobs is the mesh's own")
	case g.relations[e.Schema+"."+e.Name]:
		g.errorf(e.Position, "entity", "rename one of the two", "there are two entities %s.%s", e.Schema, e.Name)
	}
	seen := map[string]bool{}
	for _, f := range e.Fields {
		path := "fields." + clip(f.Name)
		switch {
		case !isName(f.Name):
			g.errorf(f.Position, path, nameMend, "%q cannot be the name of a column", clip(f.Name))
		case slices.Contains(systemColumns, f.Name):
			g.errorf(f.Position, path, "rename the field", "PostgreSQL has a system column %s in every table", f.Name)
		case seen[strings.ToLower(f.Name)]:
			g.errorf(f.Position, path, "rename one of the two; case does not count", "the field %s is there twice", f.Name)
		case ColumnType(f) == "":
			g.errorf(f.Position, path, "", "unknown type %q", clip(f.Type))
		}
		seen[strings.ToLower(f.Name)] = true
	}
	for i, x := range e.Indexes {
		g.checkIndex(e, x, fmt.Sprintf("indexes[%d]", i))
	}
	return len(g.problems) == before
}

// schemas are those of the entities, by name.
func (g *generator) schemas() []string {
	var names []string
	for _, e := range g.entities {
		names = append(names, e.Schema)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

const nameMend = "use letters, digits and `_`, no digit first, at most 63"

// isName says whether a text can be a name without being cut or misread.
func isName(s string) bool {
	for i, c := range []byte(s) {
		if c != '_' && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (i == 0 || c < '0' || c > '9') {
			return false
		}
	}
	return s != "" && len(s) <= maxName
}

// maxName is PostgreSQL's bound on names, in bytes.
const maxName = 63

// shorten makes a name fit: a long one is cut, and a digest keeps it apart from others that
// begin the same.
func shorten(name string) string {
	if len(name) <= maxName {
		return name
	}
	return withDigest(name, name)
}

// withDigest puts the digest of what tells a name apart behind it.
func withDigest(name, of string) string {
	cut := min(len(name), maxName-9)
	return strings.ToValidUTF8(name[:cut], "") + "_" + digest(of)
}

// digest is short: it tells apart what one table has.
func digest(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:4])
}

// quote makes an identifier of a name.
func quote(name string) string { return `"` + strings.ReplaceAll(name, `"`, `""`) + `"` }

// literal makes a constant of a text without NUL. It means the same whatever
// standard_conforming_strings says.
func literal(text string) string {
	quoted := "'" + strings.ReplaceAll(text, "'", "''") + "'"
	if strings.Contains(text, `\`) {
		return "E" + strings.ReplaceAll(quoted, `\`, `\\`)
	}
	return quoted
}

// dollar quotes the body of a function or a DO block with a tag that is not in it.
func dollar(body string) string {
	tag := "$specql$"
	for i := 1; strings.Contains(body, tag); i++ {
		tag = fmt.Sprintf("$specql%d$", i)
	}
	return tag + "\n" + strings.Trim(body, "\n") + "\n" + tag
}

// oneLine keeps a remark from ending its comment.
func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }

// clip bounds a text in a message.
func clip(text string) string {
	if len(text) <= 80 {
		return text
	}
	return strings.ToValidUTF8(text[:77], "") + "..."
}
