package ddl

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/specql/mesh/pkg/spec"
)

func (g *generator) checkIndex(e *spec.Entity, x *spec.Index, path string) {
	if len(x.Fields) == 0 {
		g.errorf(x.Position, path+".fields", "name at least one field", "the index has no fields")
	}
	if len(x.Fields) > 32 {
		g.errorf(x.Position, path+".fields", "", "an index may have 32 fields, this one has %d", len(x.Fields))
	}
	for _, name := range x.Fields {
		if e.Field(name) == nil {
			mend := ""
			if near := spec.DidYouMean(name, e.FieldNames()); near != "" {
				mend = fmt.Sprintf("did you mean %q?", near)
			}
			g.errorf(x.Position, path+".fields", mend, "the entity has no field %q", clip(name))
		}
	}
	if err := checkCondition(x.Where); err != nil {
		g.errorf(x.Position, path+".where", "write one condition, such as status = 'pending'", "%v", err)
	}
}

// index adds an index. Its name holds all that it is made of, so that another definition is
// another index.
func (g *generator) index(e *spec.Entity, x *spec.Index) {
	columns, names := make([]string, 0, len(x.Fields)), make([]string, 0, len(x.Fields))
	document := false
	for _, name := range x.Fields {
		f := e.Field(name)
		columns = append(columns, quote(f.Name))
		names = append(names, f.Name)
		document = document || ColumnType(f) == "jsonb"
	}
	kind, prefix, using := "INDEX", "ix_", ""
	switch {
	case x.Unique:
		kind, prefix = "UNIQUE INDEX", "ux_"
	case document && len(columns) == 1:
		// An index for search in documents, and one with no bound on their size.
		using = " USING gin"
	}
	name := prefix + e.Name + "__" + strings.Join(names, "__")
	full := name + "\x00" + x.Where
	if x.Where != "" {
		name = withDigest(name, full)
	}
	name = shorten(name)
	if slices.ContainsFunc(g.statements, func(s Statement) bool { return s.Entity == e && s.index == full }) {
		return // the same index twice
	}
	if g.relations[e.Schema+"."+name] {
		name = withDigest(name, e.Name+"\x00"+full)
	}
	g.relations[e.Schema+"."+name] = true
	text := "CREATE " + kind + " IF NOT EXISTS " + quote(name) + " ON " + TableName(e) + using + " (" + strings.Join(columns, ", ") + ")"
	if x.Where != "" {
		text += " WHERE " + x.Where
	}
	g.add(Statement{
		Kind: KindTable, Entity: e, SQL: text, index: full,
		Done: "to_regclass(" + literal(quote(e.Schema)+"."+quote(name)) + ") IS NOT NULL",
	})
}

// checkCondition says whether SQL of a file is one closed expression that cannot become
// another statement. What it means is PostgreSQL's to check.
func checkCondition(text string) error {
	depth := 0
	var open byte
	for i := range len(text) {
		c := text[i]
		next := byte(0)
		if i+1 < len(text) {
			next = text[i+1]
		}
		switch {
		case c == 0 || c == '\\' || c == '$':
			return errors.New("the condition must not hold a NUL, a backslash or a dollar sign")
		case open != 0:
			if c == open {
				open = 0 // of a doubled quote the second opens again
			}
		case c == '\'' || c == '"':
			open = c
		case c == ';' || c == '-' && next == '-' || c == '/' && next == '*' || c == '*' && next == '/':
			return errors.New("the condition must be one expression, without ; and comments")
		case c == '(':
			depth++
		case c == ')':
			if depth--; depth < 0 {
				return errors.New("the condition closes a parenthesis that it did not open")
			}
		}
	}
	if open != 0 || depth != 0 {
		return errors.New("the condition leaves a quote or a parenthesis open")
	}
	return nil
}

// reference adds the foreign key of a field.
func (g *generator) reference(e *spec.Entity, f *spec.Field, o Options) {
	path := "fields." + f.Name + ".references"
	target, column, problem, mend := g.target(e, f)
	switch {
	case problem != "":
		g.problems = append(g.problems, spec.Problem{Position: f.Position, Path: path, Message: problem, Mend: mend, Warning: o.OpenReferences})
		g.openReferences = append(g.openReferences, "No foreign key of "+e.Name+"."+f.Name+" to "+f.References+": "+problem+".")
		return
	case ColumnType(column) != ColumnType(f):
		g.errorf(f.Position, path, "give it the type "+column.Type, "%s is of type %s, and %s is of type %s", f.Name, f.Type, f.References, column.Type)
		return
	case !isKey(column) && !slices.ContainsFunc(target.Indexes, func(x *spec.Index) bool {
		return x.Unique && x.Where == "" && len(x.Fields) == 1 && strings.EqualFold(x.Fields[0], column.Name)
	}):
		g.errorf(f.Position, path, fmt.Sprintf("add `- {fields: [%s], unique: true}` to the indexes of %s, or refer to %s.id", column.Name, target.Name, target.Name),
			"%s is not unique, so that a reference could mean several rows", f.References)
		return
	}
	g.constrain(e, "fk", f.Name, "", "FOREIGN KEY ("+quote(f.Name)+") REFERENCES "+TableName(target)+" ("+quote(column.Name)+") DEFERRABLE")
}

// target finds what a reference means: the entity of this name in the same schema, else the
// only one in another.
func (g *generator) target(e *spec.Entity, f *spec.Field) (target *spec.Entity, column *spec.Field, problem, mend string) {
	name, field, _ := strings.Cut(f.References, ".")
	if field == "" {
		field = primaryKey
	}
	var found []*spec.Entity
	names := make([]string, 0, len(g.entities))
	for _, other := range g.entities {
		names = append(names, other.Name)
		if strings.EqualFold(other.Name, name) {
			found = append(found, other)
		}
	}
	if len(found) > 1 {
		if near := slices.DeleteFunc(slices.Clone(found), func(o *spec.Entity) bool { return o.Schema != e.Schema }); len(near) > 0 {
			found = near
		}
	}
	switch {
	case len(found) == 0:
		mend = "add its file, or mend the name"
		if near := spec.DidYouMean(name, names); near != "" {
			mend = fmt.Sprintf("did you mean %q?", near)
		}
		return nil, nil, fmt.Sprintf("there is no entity %s here", clip(name)), mend
	case len(found) > 1:
		return nil, nil, fmt.Sprintf("there are %d entities %s, in several schemas", len(found), clip(name)), "rename one of them"
	}
	target = found[0]
	if column = target.Field(field); column == nil && strings.EqualFold(field, primaryKey) {
		column = keyField(target)
	}
	if column == nil {
		return nil, nil, fmt.Sprintf("%s has no field %s", target.Name, clip(field)), "fields there are: " + strings.Join(target.FieldNames(), ", ")
	}
	return target, column, "", ""
}
