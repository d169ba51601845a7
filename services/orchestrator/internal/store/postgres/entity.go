package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/specql/mesh/pkg/fault"
	"github.com/specql/mesh/pkg/spec"
	"github.com/specql/mesh/pkg/spec/ddl"
	"github.com/specql/mesh/services/orchestrator/internal/store"
)

// primaryKey is the column that tells the rows of an entity apart.
const primaryKey = "id"

// table is what the store knows of an entity's table.
type table struct {
	// columns are the types by name, as PostgreSQL writes them.
	columns map[string]string
	// names are the columns by their name in lower case.
	names map[string]string
}

// identifier is what the store takes as a name of a schema, an entity or a field.
var identifier = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,62}$`)

func quote(name string) string { return pgx.Identifier{name}.Sanitize() }

// tableName is the quoted name of an entity's table.
func tableName(schema, entity string) (string, error) {
	for _, name := range []string{schema, entity} {
		if !identifier.MatchString(name) {
			return "", fmt.Errorf("%q is not a name: want letters, digits and _, a letter first, at most 63", name)
		}
	}
	if schema == "jobs" || strings.HasPrefix(schema, "pg_") || schema == "information_schema" {
		return "", fmt.Errorf("the schema %s holds no entities", schema)
	}
	return quote(schema) + "." + quote(entity), nil
}

// entityLock is the advisory lock under which tables of entities are made.
const entityLock = 7271450120552

// EnsureEntities implements [store.Store]. What package ddl says is run in one transaction; a role that may not
// change tables passes where nothing is to be changed.
func (s *Store) EnsureEntities(ctx context.Context, entities []*spec.Entity) error {
	wanted, problems := ddl.Tables(entities, ddl.Options{OpenReferences: true})
	err := problems.Err()
	for _, e := range entities {
		for _, x := range e.Indexes {
			if strings.ContainsAny(x.Where, ";\x00") || strings.Contains(x.Where, "--") || strings.Contains(x.Where, "/*") {
				err = errors.Join(err, fmt.Errorf("entity %s: the where of the index on %s must be one condition, without ; and comments",
					e.Name, strings.Join(x.Fields, ", ")))
			}
		}
	}
	if err != nil {
		return fmt.Errorf("make tables of entities: %w", err)
	}
	if len(wanted) == 0 {
		return nil
	}
	defer s.forgetTables()
	err = s.with(ctx, func(ctx context.Context, c *pgx.Conn) error {
		return pgx.BeginFunc(ctx, c, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, "SELECT pg_advisory_xact_lock($1)", int64(entityLock)); err != nil {
				return err
			}
			for _, w := range wanted {
				if w.SQL == "" {
					continue
				}
				if err := ensure(ctx, tx, w); err != nil {
					if w.Entity != nil {
						return fmt.Errorf("entity %s: %w", w.Entity.Name, err)
					}
					return err
				}
			}
			return nil
		})
	})
	if err != nil {
		return fmt.Errorf("make tables of entities: %w", err)
	}
	return nil
}

// ensure runs a statement that is not done yet.
func ensure(ctx context.Context, tx pgx.Tx, w ddl.Statement) error {
	if w.Done != "" {
		var done bool
		if err := tx.QueryRow(ctx, "SELECT coalesce(("+w.Done+"), false)", pgx.QueryExecModeSimpleProtocol).Scan(&done); err != nil {
			return err
		}
		if done {
			return nil
		}
	}
	_, err := tx.Exec(ctx, w.SQL, pgx.QueryExecModeSimpleProtocol)
	return err
}

func (s *Store) forgetTables() {
	s.mu.Lock()
	clear(s.tables)
	s.mu.Unlock()
}

// columns returns the columns of an entity's table, remembered after the first time; ErrNotFound.
func (s *Store) columns(ctx context.Context, q querier, schema, entity string) (string, *table, error) {
	name, err := tableName(schema, entity)
	if err != nil {
		return "", nil, invalid(err)
	}
	s.mu.RLock()
	t, ok := s.tables[name]
	s.mu.RUnlock()
	if ok {
		return name, t, nil
	}
	type columnType struct{ Name, Kind string }
	found, err := query(ctx, q, pgx.RowToStructByPos[columnType], `SELECT a.attname::text, format_type(a.atttypid, a.atttypmod)
		FROM pg_attribute a JOIN pg_class k ON k.oid = a.attrelid JOIN pg_namespace n ON n.oid = k.relnamespace
		WHERE n.nspname = $1 AND k.relname = $2 AND k.relkind IN ('r', 'p', 'v', 'f') AND a.attnum > 0 AND NOT a.attisdropped`, schema, entity)
	if err != nil {
		return "", nil, err
	}
	if len(found) == 0 {
		return "", nil, invalidf("table %s: %w", name, store.ErrNotFound)
	}
	t = &table{columns: map[string]string{}, names: map[string]string{}}
	for _, c := range found {
		t.columns[c.Name] = c.Kind
		t.names[strings.ToLower(c.Name)] = c.Name
	}
	s.mu.Lock()
	s.tables[name] = t
	s.mu.Unlock()
	return name, t, nil
}

// column finds a column by a field's name.
func (t *table) column(field string) (name, kind string, ok bool) {
	if kind, ok = t.columns[field]; ok {
		return field, kind, true
	}
	if name, ok = t.names[strings.ToLower(field)]; ok {
		return name, t.columns[name], true
	}
	return "", "", false
}

// key is the condition on the primary key, with its value as parameter n.
func (t *table) key(n int) string {
	return fmt.Sprintf("%s = $%d::text::%s", quote(primaryKey), n, t.columns[primaryKey])
}

// rowValues gives the quoted columns of a row's values, what stands for each in a statement, and the parameters.
func (t *table) rowValues(row *store.EntityRow, without string) (columns, places []string, args []any, err error) {
	// In the order of the names, so that equal sets of columns share a statement.
	for _, field := range slices.Sorted(maps.Keys(row.Values)) {
		if strings.EqualFold(field, without) {
			continue
		}
		name, kind, ok := t.column(field)
		if !ok {
			return nil, nil, nil, invalid(fault.New(fault.Validation, "%s has no field %q", row.Entity, field))
		}
		v, err := encode(kind, row.Values[field])
		if err != nil {
			return nil, nil, nil, invalid(fault.New(fault.Validation, "%s.%s: %v", row.Entity, field, err))
		}
		columns = append(columns, quote(name))
		places = append(places, fmt.Sprintf("$%d::text::%s", len(args)+1, kind))
		args = append(args, v)
	}
	return columns, places, args, nil
}

// queueEntity adds the statements of a record's entity rows.
func (s *Store) queueEntity(ctx context.Context, c querier, b *pgx.Batch, r *store.Record, rowIDs map[*store.Record]string) error {
	if row := r.InsertRow; row != nil {
		name, t, err := s.columns(ctx, c, row.Schema, row.Entity)
		if err != nil {
			return err
		}
		without := ""
		if row.ID != "" {
			without = primaryKey
		}
		columns, places, args, err := t.rowValues(row, without)
		if err != nil {
			return err
		}
		if row.ID != "" {
			columns = append(columns, quote(primaryKey))
			places = append(places, fmt.Sprintf("$%d::text::%s", len(args)+1, t.columns[primaryKey]))
			args = append(args, row.ID)
		}
		statement := "INSERT INTO " + name
		if len(columns) == 0 {
			statement += " DEFAULT VALUES"
		} else {
			statement += " (" + strings.Join(columns, ", ") + ") VALUES (" + strings.Join(places, ", ") + ")"
		}
		if row.ID != "" {
			b.Queue(statement, args...)
		} else {
			// The key that the database gives becomes the run's.
			args = append(args, uuidValue(r.RunID))
			b.Queue(fmt.Sprintf(`WITH made AS (%s RETURNING %s::text AS id),
				noted AS (UPDATE jobs.tb_workflow_run r SET entity_id = made.id FROM made WHERE r.id = $%d AND r.entity_id IS NULL)
				SELECT id FROM made`, statement, quote(primaryKey), len(args)), args...).
				QueryRow(func(found pgx.Row) error {
					var id string
					err := found.Scan(&id)
					rowIDs[r] = id
					return err
				})
		}
	}
	if row := r.UpdateRow; row != nil {
		name, t, err := s.columns(ctx, c, row.Schema, row.Entity)
		if err != nil {
			return err
		}
		columns, places, args, err := t.rowValues(row, "")
		if err != nil || len(columns) == 0 {
			return err
		}
		set := make([]string, len(columns))
		for i := range columns {
			set[i] = columns[i] + " = " + places[i]
		}
		if t.columns[primaryKey] == "uuid" && !isUUID(row.ID) {
			return invalidf("%s %s: %w", row.Entity, row.ID, store.ErrNotFound)
		}
		args = append(args, row.ID)
		b.Queue(fmt.Sprintf(`WITH changed AS (UPDATE %s SET %s WHERE %s RETURNING 1) SELECT jobs.fn_expect(count(*), 1, 'row') FROM changed`,
			name, strings.Join(set, ", "), t.key(len(args))), args...)
	}
	return nil
}

// EntityRow implements [store.Store]. A field without a value is nil.
func (s *Store) EntityRow(ctx context.Context, e *spec.Entity, id string) (row map[string]any, err error) {
	err = s.with(ctx, func(ctx context.Context, c *pgx.Conn) error {
		row, err = s.entityRow(ctx, c, e, id)
		return err
	})
	if r, ok := errors.AsType[*recordError](err); ok {
		err = r.err
	}
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", e.Name, id, err)
	}
	return row, nil
}

func (s *Store) entityRow(ctx context.Context, c *pgx.Conn, e *spec.Entity, id string) (map[string]any, error) {
	name, t, err := s.columns(ctx, c, e.Schema, e.Name)
	if err != nil {
		return nil, err
	}
	if t.columns[primaryKey] == "" {
		return nil, fmt.Errorf("table %s has no column %s", name, primaryKey)
	}
	if t.columns[primaryKey] == "uuid" && !isUUID(id) {
		return nil, store.ErrNotFound
	}
	var fields, kinds, columns []string
	add := func(field string) {
		if column, kind, ok := t.column(field); ok {
			fields = append(fields, field)
			kinds = append(kinds, kind)
			columns = append(columns, readColumn(column, kind))
		}
	}
	if e.Field(primaryKey) == nil {
		add(primaryKey)
	}
	for _, f := range e.Fields {
		add(f.Name)
	}
	values, err := one(ctx, c, func(r pgx.CollectableRow) ([]*string, error) {
		values := make([]*string, len(fields))
		dest := make([]any, len(fields))
		for i := range values {
			dest[i] = &values[i]
		}
		return values, r.Scan(dest...)
	}, "SELECT "+strings.Join(columns, ", ")+" FROM "+name+" WHERE "+t.key(1), id)
	if err != nil {
		if pg, ok := ofServer(err); ok && pg.Code[:2] == "22" { // no value of the key's type, so no row's key
			return nil, store.ErrNotFound
		}
		return nil, err
	}
	row := make(map[string]any, len(e.Fields)+1)
	for _, f := range e.Fields {
		row[f.Name] = nil
	}
	for i, field := range fields {
		if values[i] == nil {
			row[field] = nil
			continue
		}
		if row[field], err = decode(kinds[i], *values[i]); err != nil {
			return nil, fmt.Errorf("%s: %w", field, err)
		}
	}
	return row, nil
}

// readColumn reads a column as text that says all there is to it.
func readColumn(column, kind string) string {
	if kind == "timestamp with time zone" {
		return "to_char(" + quote(column) + " AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')"
	}
	return quote(column) + "::text"
}

// encode turns a JSON-like value into the text that a column of a type reads; nil for null.
func encode(kind string, v any) (*string, error) {
	if v == nil {
		return nil, nil
	}
	switch base(kind) {
	case "jsonb", "json":
		b, err := json.Marshal(v)
		if err != nil {
			return nil, err
		}
		return new(string(b)), nil
	case "bigint", "integer", "smallint":
		return encodeInteger(v)
	case "double precision", "real":
		if _, ok := v.(string); ok {
			return nil, errors.New("want a number, have a string")
		}
		return encodeNumber(v)
	case "numeric":
		if s, ok := v.(string); ok {
			return &s, nil
		}
		return encodeNumber(v)
	case "boolean":
		b, ok := v.(bool)
		if !ok {
			return nil, fmt.Errorf("want true or false, have %T", v)
		}
		return new(strconv.FormatBool(b)), nil
	case "timestamp with time zone", "timestamp without time zone":
		if t, ok := v.(time.Time); ok {
			return new(t.UTC().Format(time.RFC3339Nano)), nil
		}
	}
	s, ok := v.(string)
	if !ok {
		return nil, fmt.Errorf("want a string, have %T", v)
	}
	return &s, nil
}

// base is a type without its bounds: numeric for numeric(10,2).
func base(kind string) string {
	name, rest, bounded := strings.Cut(kind, "(")
	if _, after, ok := strings.Cut(rest, ")"); bounded && ok {
		return strings.TrimSpace(name + after)
	}
	return kind
}

func encodeInteger(v any) (*string, error) {
	switch v := v.(type) {
	case int:
		return new(strconv.Itoa(v)), nil
	case int64:
		return new(strconv.FormatInt(v, 10)), nil
	case json.Number:
		if i, err := v.Int64(); err == nil {
			return new(strconv.FormatInt(i, 10)), nil
		}
		f, err := v.Float64()
		if err != nil {
			return nil, err
		}
		return encodeInteger(f)
	case float64:
		// Beyond these bounds a float64 is no int64.
		if v != math.Trunc(v) || v < -(1<<63) || v >= 1<<63 {
			return nil, errors.New("not a whole number of 64 bits")
		}
		return new(strconv.FormatInt(int64(v), 10)), nil
	case string: // a primary key may come as text
		i, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			return nil, errors.New("want a whole number, have a string")
		}
		return new(strconv.FormatInt(i, 10)), nil
	}
	return nil, fmt.Errorf("want a whole number, have %T", v)
}

func encodeNumber(v any) (*string, error) {
	switch v := v.(type) {
	case int:
		return new(strconv.Itoa(v)), nil
	case int64:
		return new(strconv.FormatInt(v, 10)), nil
	case json.Number:
		return new(v.String()), nil
	case float64:
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return nil, errors.New("want a number that JSON has")
		}
		return new(strconv.FormatFloat(v, 'g', -1, 64)), nil
	}
	return nil, fmt.Errorf("want a number, have %T", v)
}

// decode is the reverse of encode: whole numbers are int64, others float64, decimals the text that they were written as.
func decode(kind, text string) (any, error) {
	switch base(kind) {
	case "jsonb", "json":
		var v any
		err := json.Unmarshal([]byte(text), &v)
		return v, err
	case "bigint", "integer", "smallint":
		return strconv.ParseInt(text, 10, 64)
	case "double precision", "real":
		f, err := strconv.ParseFloat(text, 64)
		if err == nil && (math.IsNaN(f) || math.IsInf(f, 0)) {
			err = fmt.Errorf("is %s, which JSON does not have", text)
		}
		return f, err
	case "boolean":
		return text == "t" || text == "true", nil
	case "timestamp with time zone":
		t, err := time.Parse(time.RFC3339Nano, text)
		if err != nil { // infinity, or before Christ
			return text, nil
		}
		return t.Format(time.RFC3339Nano), nil
	case "character":
		return strings.TrimRight(text, " "), nil
	}
	return text, nil
}
