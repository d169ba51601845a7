package spec

import (
	"math"
	"regexp"
	"slices"
	"strings"
)

// DefaultSchema is the PostgreSQL schema of entities that name none.
const DefaultSchema = "app"

const primaryKey = "id"

// fieldTypes are the types of an entity's fields.
var fieldTypes = []string{"string", "text", "integer", "number", "decimal", "boolean", "object", "json", "array", "uuid", "date", "timestamp"}

// Entity is a kind of record with the actions on it.
type Entity struct {
	Name string
	// Schema is the PostgreSQL schema that the table lives in.
	Schema      string
	Description string
	// Fields in the order of the file. The primary key `id` is always among them, first where the file does not declare it.
	Fields  []*Field
	Actions []*Action
	Indexes []*Index
	Position
}

// Field is a column.
type Field struct {
	Name string
	// Type is one of string text integer number decimal boolean object json array uuid date timestamp.
	Type     string
	Required bool
	// Default is the value of a row that is made without one; nil for none.
	Default any
	// References is `entity.field`, and empty for none.
	References string
	// Validation is nil where every value of the type is fine.
	Validation *FieldValidation
	// Implicit says that the file does not declare the field.
	Implicit bool
	Position

	pattern *regexp.Regexp
}

// FieldValidation narrows the values of a field.
type FieldValidation struct {
	// Enum lists all values there are; nil for no such list.
	Enum []any
	// Pattern is a regular expression (RE2) that a string must match somewhere.
	Pattern string
	// Min and Max bound numbers, themselves included.
	Min, Max *float64
}

// Index is an index of the table.
type Index struct {
	Fields []string
	Unique bool
	// Where is SQL: the condition of a partial index; empty for none.
	Where string
	Position
}

// Field finds a field without regard to case, as SQL does; nil if there is none.
func (e *Entity) Field(name string) *Field {
	for _, f := range e.Fields {
		if strings.EqualFold(f.Name, name) {
			return f
		}
	}
	return nil
}

// FieldNames lists the fields, in order.
func (e *Entity) FieldNames() []string {
	names := make([]string, len(e.Fields))
	for i, f := range e.Fields {
		names[i] = f.Name
	}
	return names
}

// PrimaryKey returns the field `id`.
func (e *Entity) PrimaryKey() *Field { return e.Field(primaryKey) }

// Action finds an action; nil if there is none.
func (e *Entity) Action(name string) *Action {
	for _, a := range e.Actions {
		if a.Name == name {
			return a
		}
	}
	return nil
}

// ActionNames lists the actions, in order.
func (e *Entity) ActionNames() []string {
	names := make([]string, len(e.Actions))
	for i, a := range e.Actions {
		names[i] = a.Name
	}
	return names
}

// ParseEntity reads an entity. It is also returned next to problems, with what could be read; it is nil if nothing could.
func ParseEntity(f File, o Options) (*Entity, Problems) {
	c := &collector{strict: o.Strict}
	root := load(f, c)
	if root == nil {
		return nil, c.sorted()
	}
	p := &entityParser{reader{c}}
	if root.kind != mappingNode {
		p.errorf(root.pos, "", "begin it with `entity:`", "an entity must be a map, is %s", root.describe())
		return nil, c.sorted()
	}
	if root.get("entity") == nil && root.get("services") != nil {
		p.errorf(root.entry("services").pos, "services", "", "this is a service registry, not an entity")
		return nil, c.sorted()
	}
	e := p.parse(root)
	return e, c.sorted()
}

type entityParser struct{ reader }

func (p *entityParser) parse(root *node) *Entity {
	e := &Entity{Schema: DefaultSchema, Position: root.pos}
	p.known(root, "", "entity", "schema", "description", "fields", "actions", "indexes")
	if n := root.get("entity"); n == nil {
		p.missing(root, "", "entity", "add `entity:` with its name")
	} else {
		e.Name, _ = p.sqlName(n, "entity")
	}
	if n := root.get("schema"); n != nil {
		if name, ok := p.sqlName(n, "schema"); ok {
			e.Schema = name
		}
	}
	if n := root.get("description"); n != nil {
		e.Description, _ = p.str(n, "description")
	}
	p.fields(e, root.get("fields"))
	if e.PrimaryKey() == nil {
		e.Fields = slices.Insert(e.Fields, 0, &Field{Name: primaryKey, Type: "uuid", Required: true, Implicit: true, Position: root.pos})
	}
	p.indexes(e, root.get("indexes"))
	p.actions(e, root.get("actions"))
	return e
}

// maxSQLName is PostgreSQL's bound on names, in bytes.
const maxSQLName = 63

// sqlName reads a name that becomes one in SQL.
func (r reader) sqlName(n *node, path string) (string, bool) {
	name, ok := r.identifier(n, path)
	if ok && len(name) > maxSQLName {
		r.errorf(n.pos, path, "", "a name in SQL may have %d bytes, this one has %d", maxSQLName, len(name))
		return name, false
	}
	return name, ok
}

func (p *entityParser) fields(e *Entity, n *node) {
	if !p.mapping(n, "fields") {
		return
	}
	if len(n.entries) > maxFields {
		p.errorf(n.pos, "fields", "split the entity", "an entity may have %d fields, this one has %d", maxFields, len(n.entries))
		return
	}
	for _, entry := range n.entries {
		path := keyPath("fields", entry.key)
		if !isIdentifier(entry.key) || len(entry.key) > maxSQLName {
			p.errorf(entry.pos, path, "use letters, digits and `_`, and no digit first", "%q cannot be the name of a field", clip(entry.key))
			continue
		}
		if before := e.Field(entry.key); before != nil {
			p.errorf(entry.pos, path, "rename one of the two; case does not count", "the field %q is there twice, first in line %d", entry.key, before.Line)
			continue
		}
		if f := p.field(entry, path); f != nil {
			e.Fields = append(e.Fields, f)
		}
	}
}

func (p *entityParser) field(e entry, path string) *Field {
	f := &Field{Name: e.key, Position: e.pos}
	n := e.value
	if n.kind == scalarNode && n.value != nil {
		name, ok := p.text(n, path)
		if !ok {
			return f
		}
		switch {
		case strings.HasSuffix(name, "!"):
			name, f.Required = strings.TrimSuffix(name, "!"), true
		case strings.HasSuffix(name, "?"):
			name = strings.TrimSuffix(name, "?")
		}
		p.fieldType(f, n, path, name)
		return f
	}
	if n.isNull() {
		p.errorf(e.pos, path, "write a type, as in `"+e.key+": string`", "the field has no type")
		return f
	}
	if !p.mapping(n, path) {
		return f
	}
	p.known(n, path, "type", "required", "default", "references", "validation", "description")
	if t := n.get("type"); t == nil {
		p.missing(n, path, "type", "the types are: "+strings.Join(fieldTypes, ", "))
	} else if name, ok := p.text(t, keyPath(path, "type")); ok {
		if short, bang := strings.CutSuffix(name, "!"); bang {
			name, f.Required = short, true
		}
		p.fieldType(f, t, keyPath(path, "type"), name)
	}
	if r := n.get("required"); r != nil {
		if required, ok := p.boolean(r, keyPath(path, "required")); ok {
			f.Required = required
		}
	}
	if r := n.get("references"); r != nil {
		p.references(f, r, keyPath(path, "references"))
	}
	if v := n.get("validation"); !v.isNull() {
		p.validation(f, v, keyPath(path, "validation"))
	}
	if d := n.get("default"); !d.isNull() {
		f.Default = d.native()
		if f.Type != "" {
			if fault := f.check(f.Default); fault != "" {
				p.errorf(d.pos, keyPath(path, "default"), "", "the default does not match: %s", fault)
				f.Default = nil
			}
		}
	}
	return f
}

func (p *entityParser) fieldType(f *Field, n *node, path, name string) {
	if !slices.Contains(fieldTypes, name) {
		p.errorf(n.pos, path, suggestType(name, fieldTypes), "unknown type %q", clip(name))
		return
	}
	f.Type = name
}

func (p *entityParser) references(f *Field, n *node, path string) {
	text, ok := p.text(n, path)
	if !ok {
		return
	}
	entity, field, found := strings.Cut(text, ".")
	if !found {
		field = primaryKey
	}
	if !isIdentifier(entity) || !isIdentifier(field) {
		p.errorf(n.pos, path, "write `entity.field`, as in `order.id`", "%q is not a field of an entity", clip(text))
		return
	}
	f.References = entity + "." + field
}

func (p *entityParser) validation(f *Field, n *node, path string) {
	if !p.mapping(n, path) {
		return
	}
	p.known(n, path, "enum", "pattern", "min", "max")
	v := &FieldValidation{}
	numeric := slices.Contains([]string{"integer", "number", "decimal"}, f.Type)
	textual := slices.Contains([]string{"string", "text"}, f.Type)
	for _, bound := range []struct {
		key    string
		target **float64
	}{{"min", &v.Min}, {"max", &v.Max}} {
		b := n.get(bound.key)
		if b == nil {
			continue
		}
		here := keyPath(path, bound.key)
		if f.Type != "" && !numeric {
			p.errorf(b.pos, here, "", "only numbers have a bound, this field is of type %s", f.Type)
			continue
		}
		if x, ok := p.number(b, here); ok {
			*bound.target = &x
		}
	}
	if v.Min != nil && v.Max != nil && *v.Min > *v.Max {
		p.errorf(n.get("min").pos, keyPath(path, "min"), "", "min is more than max")
	}
	if e := n.get("pattern"); e != nil {
		here := keyPath(path, "pattern")
		if f.Type != "" && !textual {
			p.errorf(e.pos, here, "", "only strings have a pattern, this field is of type %s", f.Type)
		} else if text, ok := p.text(e, here); ok {
			compiled, err := regexp.Compile(text)
			if err != nil || len(text) > 1000 {
				p.errorf(e.pos, here, "use the syntax of RE2", "is not a regular expression")
			} else {
				v.Pattern, f.pattern = text, compiled
			}
		}
	}
	f.Validation = v
	if e := n.get("enum"); e != nil && p.sequence(e, keyPath(path, "enum")) {
		p.enum(f, e, keyPath(path, "enum"))
	}
}

func (p *entityParser) enum(f *Field, n *node, path string) {
	if len(n.items) == 0 {
		p.errorf(n.pos, path, "", "lists no value")
		return
	}
	var values []any
	for i, item := range n.items {
		v := item.native()
		if f.Type != "" {
			if fault := f.check(v); fault != "" || v == nil {
				p.errorf(item.pos, indexPath(path, i), "", "is no value of the field: %s", orElse(fault, "must not be null"))
				continue
			}
		}
		values = append(values, v)
	}
	f.Validation.Enum = values
}

func orElse(s, fallback string) string {
	if s == "" {
		return fallback
	}
	return s
}

func (p *entityParser) indexes(e *Entity, n *node) {
	if !p.sequence(n, "indexes") {
		return
	}
	for i, item := range n.items {
		path := indexPath("indexes", i)
		index := &Index{Position: item.pos}
		if item.isNull() || !p.mapping(item, path) {
			if item.isNull() {
				p.errorf(item.pos, path, "", "must be a map, is empty")
			}
			continue
		}
		p.known(item, path, "fields", "unique", "where")
		if item.get("fields").isNull() {
			p.missing(item, path, "fields", "add `fields:` with a list")
		} else if list := item.get("fields"); p.sequence(list, keyPath(path, "fields")) {
			p.indexFields(e, index, list, keyPath(path, "fields"))
		}
		if u := item.get("unique"); u != nil {
			index.Unique, _ = p.boolean(u, keyPath(path, "unique"))
		}
		if w := item.get("where"); w != nil {
			index.Where, _ = p.text(w, keyPath(path, "where"))
		}
		e.Indexes = append(e.Indexes, index)
	}
}

// timeFields may be indexed without being declared; then they are made.
var timeFields = []string{"created_at", "updated_at"}

func (p *entityParser) indexFields(e *Entity, index *Index, n *node, path string) {
	if len(n.items) == 0 {
		p.errorf(n.pos, path, "", "lists no field")
	}
	for i, item := range n.items {
		here := indexPath(path, i)
		name, ok := p.text(item, here)
		if !ok {
			continue
		}
		field := e.Field(name)
		if field == nil && slices.Contains(timeFields, name) {
			field = &Field{Name: name, Type: "timestamp", Implicit: true, Position: item.pos}
			e.Fields = append(e.Fields, field)
		}
		if field == nil {
			p.errorf(item.pos, here, p.suggest(name, e.FieldNames()), "the entity has no field %q", clip(name))
			continue
		}
		if slices.Contains(index.Fields, field.Name) {
			p.errorf(item.pos, here, "", "the field %q is there twice", field.Name)
			continue
		}
		index.Fields = append(index.Fields, field.Name)
	}
}

var actionKeys = []string{"name", "description", "input", "output", "preconditions", "actions", "steps"}

// actions reads a map of names, or a list with `name`.
func (p *entityParser) actions(e *Entity, n *node) {
	if n.isNull() {
		return
	}
	parser := &actionParser{reader: p.reader, entity: e}
	switch n.kind {
	case mappingNode:
		for _, entry := range n.entries {
			path := keyPath("actions", entry.key)
			if problem := checkName(entry.key); problem != "" || entry.key == "" {
				p.errorf(entry.pos, path, "use letters, digits, `_`, `-` and `.`", "%s", orElse(problem, "the action has no name"))
				continue
			}
			if entry.value.isNull() {
				p.errorf(entry.pos, path, "add `actions:` with a list of steps", "the action is empty")
				continue
			}
			if !p.mapping(entry.value, path) {
				continue
			}
			p.known(entry.value, path, actionKeys...)
			if own := entry.value.get("name"); own != nil {
				if name, ok := own.scalarString(); !ok || name != entry.key {
					p.errorf(own.pos, keyPath(path, "name"), "remove it", "the action is already named %q", entry.key)
				}
			}
			a := parser.action(entry.value, path)
			a.Name, a.Position = entry.key, entry.pos
			e.Actions = append(e.Actions, a)
		}
	case sequenceNode:
		first := map[string]int{}
		for i, item := range n.items {
			p.listedAction(e, parser, item, indexPath("actions", i), first)
		}
	default:
		p.errorf(n.pos, "actions", "write a map of names, or a list with `name`", "must be a map or a list, is %s", n.describe())
	}
}

func (p *entityParser) listedAction(e *Entity, parser *actionParser, n *node, path string, first map[string]int) {
	if n.isNull() || n.kind != mappingNode {
		p.errorf(n.pos, path, "write `- name: …`", "must be a map, is %s", n.describe())
		return
	}
	if len(n.entries) > 0 && slices.Contains(stepKinds, n.entries[0].key) {
		p.errorf(n.pos, path, "write `- name: …` with the steps below `actions:`", "this is a step, where an action with a name is expected")
		return
	}
	p.known(n, path, actionKeys...)
	a := parser.action(n, path)
	if n.get("name") == nil {
		p.missing(n, path, "name", "add `name:`")
		return
	}
	name, ok := p.name(n.get("name"), keyPath(path, "name"))
	if !ok {
		return
	}
	if line, twice := first[name]; twice {
		p.errorf(n.get("name").pos, keyPath(path, "name"), "rename one of the two", "the action %q is there twice, first in line %d", clip(name), line)
		return
	}
	first[name] = n.pos.Line
	a.Name = name
	e.Actions = append(e.Actions, a)
}

func isWhole(f float64) bool { return f == math.Trunc(f) && math.Abs(f) <= 1<<63 }
