package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"strings"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// primaryKey is the column that tells the rows of an entity apart.
const primaryKey = "id"

// table is what the store knows of an entity's table: the declared type of each column, by
// its name in lower case.
type table map[string]string

// The declared types. SQLite takes the affinity from the words in them: a decimal and a JSON
// text stay exactly as they were written.
const (
	typeText      = "TEXT"
	typeInteger   = "INTEGER"
	typeReal      = "REAL"
	typeBoolean   = "BOOLEAN"
	typeDecimal   = "DECIMAL BLOB"
	typeJSON      = "JSON TEXT"
	typeUUID      = "UUID TEXT"
	typeDate      = "DATE TEXT"
	typeTimestamp = "TIMESTAMP TEXT"
)

// columnType is the declared type of a field's column.
func columnType(f *spec.Field) (string, error) {
	switch f.Type {
	case "string", "text":
		return typeText, nil
	case "integer":
		return typeInteger, nil
	case "number":
		return typeReal, nil
	case "decimal":
		return typeDecimal, nil
	case "boolean":
		return typeBoolean, nil
	case "object", "array", "json":
		return typeJSON, nil
	case "uuid":
		return typeUUID, nil
	case "date":
		return typeDate, nil
	case "timestamp":
		return typeTimestamp, nil
	}
	return "", fmt.Errorf("field %s: unknown type %q", f.Name, f.Type)
}

// identifier is what the store takes as a name of a schema, an entity or a field.
var identifier = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,62}$`)

// quote makes a name safe to stand in a statement.
func quote(name string) string { return `"` + strings.ReplaceAll(name, `"`, `""`) + `"` }

// tableName is the name of an entity's table: the schema is a part of it, since the file is
// one schema.
func tableName(schema, entity string) (string, error) {
	for _, name := range []string{schema, entity} {
		if !identifier.MatchString(name) {
			return "", fmt.Errorf("%q is not a name: want letters, digits and _, a letter first, at most 63", name)
		}
	}
	return schema + "." + entity, nil
}

// EnsureEntities implements [store.Store]. Fields are checked before they are written, and
// references between entities are not enforced here.
func (s *Store) EnsureEntities(ctx context.Context, entities []*spec.Entity) error {
	err := s.write(ctx, func(w *writer) error {
		for _, e := range entities {
			if err := s.ensure(ctx, w, e); err != nil {
				return fmt.Errorf("entity %s: %w", e.Name, err)
			}
		}
		return nil
	})
	s.mu.Lock()
	clear(s.tables)
	s.mu.Unlock()
	if err != nil {
		return fmt.Errorf("make tables of entities: %w", err)
	}
	return nil
}

func (s *Store) ensure(ctx context.Context, w *writer, e *spec.Entity) error {
	name, err := tableName(e.Schema, e.Name)
	if err != nil {
		return err
	}
	have, err := readTable(name, w.rows)
	if err != nil {
		return err
	}
	if len(have) == 0 {
		have, err = w.createTable(name, e)
	} else {
		err = w.addColumns(name, e, have)
	}
	if err != nil {
		return err
	}
	for _, index := range e.Indexes {
		if err := s.ensureIndex(ctx, w, name, index, have); err != nil {
			return err
		}
	}
	return nil
}

func (w *writer) createTable(name string, e *spec.Entity) (table, error) {
	made := table{}
	var columns []string
	if e.Field(primaryKey) == nil {
		made[primaryKey] = typeUUID
		columns = append(columns, quote(primaryKey)+" "+typeUUID+" NOT NULL PRIMARY KEY")
	}
	for _, f := range e.Fields {
		column, err := columnDefinition(f, made)
		if err != nil {
			return nil, err
		}
		switch {
		case strings.EqualFold(f.Name, primaryKey) && f.Type == "integer":
			column += " PRIMARY KEY"
		case strings.EqualFold(f.Name, primaryKey):
			column += " NOT NULL PRIMARY KEY"
		case f.Required:
			column += " NOT NULL"
		}
		columns = append(columns, column)
	}
	_, err := w.exec("CREATE TABLE jobs." + quote(name) + " (" + strings.Join(columns, ", ") + ")")
	return made, err
}

// addColumns adds what an existing table lacks. Rows are there already, so that the columns
// take null; spec requires the fields of new rows.
func (w *writer) addColumns(name string, e *spec.Entity, have table) error {
	seen := table{}
	for _, f := range e.Fields {
		column, err := columnDefinition(f, seen)
		if err != nil {
			return err
		}
		key := strings.ToLower(f.Name)
		if have[key] != "" {
			if have[key] != seen[key] {
				return fmt.Errorf("field %s is %s in the table and %s (%s) in the file; a column's type is not changed: give the field another name",
					f.Name, have[key], f.Type, seen[key])
			}
			continue
		}
		if _, err := w.exec("ALTER TABLE jobs." + quote(name) + " ADD COLUMN " + column); err != nil {
			return err
		}
		have[key] = seen[key]
	}
	return nil
}

// columnDefinition is name and type of a column; it notes the column.
func columnDefinition(f *spec.Field, noted table) (string, error) {
	if !identifier.MatchString(f.Name) {
		return "", fmt.Errorf("field %q is not a name: want letters, digits and _, a letter first, at most 63", f.Name)
	}
	kind, err := columnType(f)
	if err != nil {
		return "", err
	}
	key := strings.ToLower(f.Name)
	if noted[key] != "" {
		return "", fmt.Errorf("field %s is declared twice", f.Name)
	}
	noted[key] = kind
	return quote(f.Name) + " " + kind, nil
}

func (s *Store) ensureIndex(ctx context.Context, w *writer, name string, index *spec.Index, have table) error {
	if len(index.Fields) == 0 {
		return errors.New("an index has no fields")
	}
	var columns []string
	for _, f := range index.Fields {
		if have[strings.ToLower(f)] == "" {
			return fmt.Errorf("an index is on %q, which is not a field", f)
		}
		columns = append(columns, quote(f))
	}
	kind := "INDEX"
	if index.Unique {
		kind = "UNIQUE INDEX"
	}
	statement := fmt.Sprintf("CREATE %s IF NOT EXISTS jobs.%s ON %s (%s)", kind,
		quote(indexName(name, index)), quote(name), strings.Join(columns, ", "))
	if index.Where != "" {
		if strings.ContainsAny(index.Where, ";\x00") || strings.Contains(index.Where, "--") || strings.Contains(index.Where, "/*") {
			return fmt.Errorf("the where of the index on %s must be one condition, without ; and comments", strings.Join(index.Fields, ", "))
		}
		statement += " WHERE " + index.Where
	}
	_, err := w.exec(statement)
	if err == nil {
		return nil
	}
	// A condition may be of PostgreSQL's own making. Without a plain index everything still works.
	if !index.Unique && index.Where != "" {
		s.logger.WarnContext(ctx, "left out an index that SQLite does not take", slog.String("table", name),
			slog.String("where", index.Where), slog.Any("error", err))
		return nil
	}
	return fmt.Errorf("index on %s: %w", strings.Join(index.Fields, ", "), err)
}

func indexName(table string, index *spec.Index) string {
	name := table + "." + strings.ToLower(strings.Join(index.Fields, "_"))
	if index.Unique {
		name += ".unique"
	}
	if index.Where != "" {
		name += "." + index.Where
	}
	return name
}

// readTable reads the columns of a table; none where there is no such table.
func readTable(name string, rows func(string, []any, func(*sql.Rows) error) error) (table, error) {
	t := table{}
	err := rows("SELECT name, type FROM pragma_table_info(?, 'jobs')", []any{name}, func(r *sql.Rows) error {
		var column, kind string
		if err := r.Scan(&column, &kind); err != nil {
			return err
		}
		t[strings.ToLower(column)] = kind
		return nil
	})
	return t, err
}

// columns returns the columns of an entity's table, remembered after the first time.
func (s *Store) columns(name string, rows func(string, []any, func(*sql.Rows) error) error) (table, error) {
	s.mu.RLock()
	t, ok := s.tables[name]
	s.mu.RUnlock()
	if ok {
		return t, nil
	}
	t, err := readTable(name, rows)
	if err != nil {
		return nil, err
	}
	if len(t) == 0 {
		return nil, fmt.Errorf("table %s: %w", name, store.ErrNotFound)
	}
	s.mu.Lock()
	s.tables[name] = t
	s.mu.Unlock()
	return t, nil
}

// rowColumns gives the quoted columns of a row's values and the values as SQLite keeps them.
func (a *application) rowColumns(row *store.EntityRow, without string) (name string, columns []string, values []any, err error) {
	if name, err = tableName(row.Schema, row.Entity); err != nil {
		return "", nil, nil, invalid(err)
	}
	t, err := a.store.columns(name, a.w.rows)
	if err != nil {
		if errors.Is(err, store.ErrNotFound) {
			err = invalid(err)
		}
		return "", nil, nil, err
	}
	// In the order of the names, so that equal sets of columns share a statement.
	for _, column := range sortedKeys(row.Values) {
		if strings.EqualFold(column, without) {
			continue
		}
		kind, ok := t[strings.ToLower(column)]
		if !ok {
			return "", nil, nil, invalid(fault.New(fault.Validation, "%s has no field %q", row.Entity, column))
		}
		v, err := encode(kind, row.Values[column])
		if err != nil {
			return "", nil, nil, invalid(fault.New(fault.Validation, "%s.%s: %v", row.Entity, column, err))
		}
		columns = append(columns, quote(column))
		values = append(values, v)
	}
	return name, columns, values, nil
}

// insertRow creates an entity's row. Without an id, SQLite counts one where the key is an integer.
func (a *application) insertRow(row *store.EntityRow) error {
	without := ""
	if row.ID != "" {
		without = primaryKey
	}
	name, columns, values, err := a.rowColumns(row, without)
	if err != nil {
		return err
	}
	if row.ID != "" {
		id, err := a.key(name, row)
		if err != nil {
			return err
		}
		columns = append(columns, quote(primaryKey))
		values = append(values, id)
	}
	statement := "INSERT INTO jobs." + quote(name)
	if len(columns) == 0 {
		statement += " DEFAULT VALUES"
	} else {
		statement += " (" + strings.Join(columns, ", ") + ") VALUES (?" + strings.Repeat(", ?", len(columns)-1) + ")"
	}
	var id string
	if err := a.w.row(statement+" RETURNING "+quote(primaryKey), values, textColumn{&id}); err != nil {
		return asRowError(row.Entity, row.ID, err)
	}
	a.wrote = true
	if row.ID != "" {
		return nil
	}
	a.rowID = id
	_, err = a.exec("UPDATE jobs.tb_workflow_run SET entity_id = ? WHERE id = ? AND entity_id IS NULL", id, a.record.RunID)
	return err
}

// updateRow sets columns of an entity's row.
func (a *application) updateRow(row *store.EntityRow) error {
	name, columns, values, err := a.rowColumns(row, "")
	if err != nil {
		return err
	}
	if len(columns) == 0 {
		return nil
	}
	id, err := a.key(name, row)
	if err != nil {
		return err
	}
	n, err := a.exec("UPDATE jobs."+quote(name)+" SET "+strings.Join(columns, " = ?, ")+" = ? WHERE "+quote(primaryKey)+" = ?",
		append(values, id)...)
	if err != nil {
		return asRowError(row.Entity, row.ID, err)
	}
	if n == 0 {
		return invalidf("%s %s: %w", row.Entity, row.ID, store.ErrNotFound)
	}
	return nil
}

// key is a row's primary key as its column keeps it.
func (a *application) key(name string, row *store.EntityRow) (any, error) {
	t, err := a.store.columns(name, a.w.rows)
	if err != nil {
		return nil, err
	}
	return keyValue(t, row.ID), nil
}

// keyValue is a primary key as its column keeps it; UUIDs are equal in either case.
func keyValue(t table, id string) any {
	if t[primaryKey] == typeUUID {
		return strings.ToLower(id)
	}
	return id
}

// EntityRow implements [store.Store]. A field without a value is nil.
func (s *Store) EntityRow(ctx context.Context, e *spec.Entity, id string) (map[string]any, error) {
	end, err := s.read()
	if err != nil {
		return nil, err
	}
	defer end()
	row, err := s.entityRow(ctx, e, id)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", e.Name, id, err)
	}
	return row, nil
}

func (s *Store) entityRow(ctx context.Context, e *spec.Entity, id string) (map[string]any, error) {
	name, err := tableName(e.Schema, e.Name)
	if err != nil {
		return nil, err
	}
	t, err := s.columns(name, func(text string, args []any, scan func(*sql.Rows) error) error {
		rows, err := s.readDB.QueryContext(ctx, text, args...)
		if err != nil {
			return err
		}
		return eachRow(rows, scan)
	})
	if err != nil {
		return nil, err
	}
	var names, columns []string
	if e.Field(primaryKey) == nil {
		names, columns = []string{primaryKey}, []string{quote(primaryKey)}
	}
	for _, f := range e.Fields {
		if t[strings.ToLower(f.Name)] != "" {
			names = append(names, f.Name)
			columns = append(columns, quote(f.Name))
		}
	}
	values := make([]any, len(names))
	dest := make([]any, len(names))
	for i := range values {
		dest[i] = &values[i]
	}
	_, err = one(ctx, s.readDB, func(row scanner) (struct{}, error) { return struct{}{}, row.Scan(dest...) },
		"SELECT "+strings.Join(columns, ", ")+" FROM jobs."+quote(name)+" WHERE "+quote(primaryKey)+" = ?", keyValue(t, id))
	if err != nil {
		return nil, err
	}
	row := make(map[string]any, len(names))
	for i, field := range names {
		if row[field], err = decode(t[strings.ToLower(field)], values[i]); err != nil {
			return nil, fmt.Errorf("%s: %w", field, err)
		}
	}
	for _, f := range e.Fields {
		if _, ok := row[f.Name]; !ok {
			row[f.Name] = nil
		}
	}
	return row, nil
}
