package ddl

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/specql/mesh/pkg/spec"
)

// checks adds the checks of an entity's values, and takes away those that it no longer has.
func (g *generator) checks(e *spec.Entity) {
	for _, f := range e.Fields {
		for _, c := range g.fieldChecks(f) {
			if c.expression == "" {
				g.add(Statement{Kind: KindTable, Entity: e, Note: c.note, Done: "true"})
				continue
			}
			g.constraint(KindTable, e, g.constraintName(e, "ck", f.Name, c.rule), "CHECK ("+c.expression+")", "check_violation")
		}
	}
	names := g.constraints[e]
	list := make([]string, 0, len(names))
	for _, n := range names {
		list = append(list, literal(n))
	}
	others := "c.conrelid = to_regclass(" + literal(TableName(e)) + ") AND c.contype IN ('c', 'f') AND c.conname <> ALL (ARRAY[" +
		strings.Join(list, ", ") + "]::text[]) AND obj_description(c.oid, 'pg_constraint') LIKE " + literal(mark+"%")
	body := `DECLARE
  name text;
BEGIN
  FOR name IN SELECT c.conname FROM pg_catalog.pg_constraint c WHERE ` + others + `
  LOOP
    EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I', ` + literal(TableName(e)) + `, name);
  END LOOP;
END`
	g.add(Statement{
		Kind: KindTable, Entity: e, SQL: "DO " + dollar(body), Note: "Checks and foreign keys of earlier times.",
		Done: "NOT EXISTS (SELECT FROM pg_catalog.pg_constraint c WHERE " + others + ")",
	})
}

// constraintName names a constraint and notes that the table has it.
func (g *generator) constraintName(e *spec.Entity, kind, field, rule string) string {
	parts := []string{kind + "_" + e.Name, field}
	if rule != "" {
		parts = append(parts, rule)
	}
	name := shorten(strings.Join(parts, "__"))
	g.constraints[e] = append(g.constraints[e], name)
	return name
}

// constraint adds a constraint where it is not there with the same definition. The comment
// keeps the definition's digest, for PostgreSQL writes definitions in its own way. Rows that
// break it are left alone with a warning, so that they can still be changed otherwise.
func (g *generator) constraint(kind Kind, e *spec.Entity, name, definition, violation string) {
	table, note := TableName(e), literal(mark+digest(definition))
	there := "FROM pg_catalog.pg_constraint c WHERE c.conrelid = to_regclass(" + literal(table) + ") AND c.conname = " + literal(name)
	same := "obj_description(c.oid, 'pg_constraint') IS NOT DISTINCT FROM " + note
	body := `BEGIN
  IF EXISTS (SELECT ` + there + ` AND ` + same + `) THEN
    RETURN;
  END IF;
  ALTER TABLE ` + table + ` DROP CONSTRAINT IF EXISTS ` + quote(name) + `;
  BEGIN
    ALTER TABLE ` + table + ` ADD CONSTRAINT ` + quote(name) + ` ` + definition + `;
    COMMENT ON CONSTRAINT ` + quote(name) + ` ON ` + table + ` IS ` + note + `;
  EXCEPTION WHEN ` + violation + ` THEN
    RAISE WARNING '% has rows that break %, which is left out: mend them and run this again', ` + literal(table) + `, ` + literal(name) + `;
  END;
END`
	g.add(Statement{Kind: kind, Entity: e, SQL: "DO " + dollar(body), Done: "EXISTS (SELECT " + there + " AND " + same + ")"})
}

// check is one rule of a field. Without an expression, note says why.
type check struct{ rule, expression, note string }

// fieldChecks are the rules of a field beyond its column's type. All of them hold for null.
func (g *generator) fieldChecks(f *spec.Field) []check {
	var out []check
	column := quote(f.Name)
	switch f.Type {
	case "object", "array":
		out = append(out, check{rule: "type", expression: "jsonb_typeof(" + column + "::jsonb) = '" + f.Type + "'"})
	case "number", "decimal":
		// NaN and the infinities are no JSON; what is left of them after a subtraction is not 0.
		out = append(out, check{rule: "type", expression: column + " - " + column + " = 0"})
	case "date":
		out = append(out, check{rule: "type", expression: column + " BETWEEN '0001-01-01' AND '9999-12-31'"})
	case "timestamp":
		out = append(out, check{rule: "type", expression: column + " >= '0001-01-01 00:00:00+00' AND " + column + " < '10000-01-01 00:00:00+00'"})
	}
	v := f.Validation
	if v == nil {
		return out
	}
	if len(v.Enum) > 0 {
		out = append(out, g.enum(f))
	}
	if v.Pattern != "" {
		if expression, err := Pattern(v.Pattern); err != nil {
			out = append(out, check{note: fmt.Sprintf("The pattern of %s is checked by the mesh alone: %v.", f.Name, err)})
		} else {
			out = append(out, check{rule: "pattern", expression: column + " ~ " + literal(expression)})
		}
	}
	if v.Min != nil {
		out = append(out, check{rule: "min", expression: bound(f, ">=", *v.Min)})
	}
	if v.Max != nil {
		out = append(out, check{rule: "max", expression: bound(f, "<=", *v.Max)})
	}
	return out
}

func (g *generator) enum(f *spec.Field) check {
	values := make([]string, 0, len(f.Validation.Enum))
	for i, v := range f.Validation.Enum {
		text, err := constant(f, v)
		if err != nil {
			g.errorf(f.Position, fmt.Sprintf("fields.%s.validation.enum[%d]", f.Name, i), "", "the value %v", err)
			continue
		}
		values = append(values, text)
	}
	column := quote(f.Name)
	if ColumnType(f) == "jsonb" {
		column += "::jsonb"
	}
	return check{rule: "enum", expression: column + " IN (" + strings.Join(values, ", ") + ")"}
}

// exactBound is where a float64 begins to skip whole numbers.
const exactBound = 1 << 53

// bound compares as spec does: decimals exactly, other numbers as a float64.
func bound(f *spec.Field, operator string, limit float64) string {
	column := quote(f.Name)
	text, err := float(limit)
	if err != nil {
		// No number of JSON is beyond infinity, and none is on this side of NaN.
		text = "'" + strconv.FormatFloat(limit, 'g', -1, 64) + "'::double precision"
		column += "::double precision"
	} else if f.Type == "integer" && math.Abs(limit) >= exactBound {
		column += "::double precision"
	}
	return column + " " + operator + " " + text
}
