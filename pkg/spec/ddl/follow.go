package ddl

import (
	"fmt"
	"strings"

	"github.com/specql/mesh/pkg/spec"
)

// constraint is a check or a foreign key of a table.
type constraint struct {
	entity           *spec.Entity
	name, definition string
}

// constrain names a constraint and notes that the table has it.
func (g *generator) constrain(e *spec.Entity, kind, field, rule, definition string) constraint {
	parts := []string{kind + "_" + e.Name, field}
	if rule != "" {
		parts = append(parts, rule)
	}
	c := constraint{e, shorten(strings.Join(parts, "__")), definition}
	g.constraints = append(g.constraints, c)
	return c
}

// follow adds the statement that makes tables which were there before what the entities say:
// what is required, defaults, checks and foreign keys. It is one statement, as what has to be
// done is found by one query. A constraint's comment keeps the digest of its definition, for
// PostgreSQL writes definitions in its own way; that of the primary key keeps the defaults'.
//
// Rows that break a rule are left alone with a warning and the rule left out, so that the
// rows can still be changed otherwise; run again later, the statement adds it. What is
// required and what are the defaults is left alone in tables that someone else made.
func (g *generator) follow() {
	var tables, columns, constraints []string
	for _, e := range g.entities {
		tables = append(tables, fmt.Sprintf("(%s, %s, %s)", literal(TableName(e)), literal(keyField(e).Name), literal(keyName(e))))
		fields := e.Fields
		if e.PrimaryKey() == nil {
			fields = append([]*spec.Field{keyField(e)}, fields...)
		}
		for _, f := range fields {
			value := "NULL"
			if text := g.defaultOf(e, f); text != "" {
				value = literal(text)
			}
			columns = append(columns, fmt.Sprintf("(%s, %s, %s, %t, %s)", literal(TableName(e)), literal(f.Name), literal(ColumnType(f)), f.Required || isKey(f), value))
		}
	}
	for _, c := range g.constraints {
		constraints = append(constraints, fmt.Sprintf("(%s, %s, %s)", literal(TableName(c.entity)), literal(c.name), literal(c.definition)))
	}
	if len(tables) == 0 {
		return
	}
	if len(constraints) == 0 {
		constraints = []string{"(NULL, NULL, NULL)"}
	}
	rows := func(list []string) string { return "VALUES\n    " + strings.Join(list, ",\n    ") }
	work := strings.NewReplacer("{{tables}}", rows(tables), "{{columns}}", rows(columns), "{{constraints}}", rows(constraints), "{{mark}}", literal(mark)).Replace(followQuery)
	body := `DECLARE
  w record;
BEGIN
  FOR w IN
` + work + `
  ORDER BY turn, statement
  LOOP
    IF w.refusal IS NOT NULL THEN
      RAISE EXCEPTION USING ERRCODE = 'datatype_mismatch', MESSAGE = w.refusal;
    END IF;
    BEGIN
      EXECUTE w.statement;
    EXCEPTION WHEN check_violation OR foreign_key_violation OR not_null_violation THEN
      RAISE WARNING '%, so that this was left out: %; mend the rows and run this again', SQLERRM, w.statement;
    END;
  END LOOP;
END`
	g.add(Statement{
		Kind: KindConstraint, SQL: "DO " + dollar(body), Done: "NOT EXISTS (" + work + ")",
		Notes: append([]string{"Foreign keys, and what tables that were there before still lack."}, g.openReferences...),
	})
}

// followQuery finds what has to be done, in turn. kinds are the types that a column made by
// someone else may have for the values of one type; enumerations and domains are let through.
const followQuery = `WITH kinds (type, fits) AS (VALUES
    ('text', '{text,character varying,character}'::text[]),
    ('bigint', '{bigint,integer,smallint,numeric}'),
    ('double precision', '{double precision,real,numeric}'),
    ('numeric', '{numeric}'),
    ('boolean', '{boolean}'),
    ('jsonb', '{jsonb,json}'),
    ('uuid', '{uuid}'),
    ('date', '{date}'),
    ('timestamp with time zone', '{timestamp with time zone,timestamp without time zone}')
  ), tables (name, key, key_name) AS ({{tables}}
  ), columns (tab, name, type, required, value) AS ({{columns}}
  ), constraints (tab, name, definition) AS ({{constraints}}
  ), own AS (
    SELECT t.name AS tab, p.oid, p.conname, {{mark}} || md5(d.defaults) AS note, d.defaults
    FROM tables t
    JOIN pg_catalog.pg_constraint p ON p.conrelid = to_regclass(t.name) AND p.contype = 'p' AND p.conname = t.key_name
    JOIN (SELECT tab, string_agg(format('ALTER COLUMN %I %s', name, coalesce('SET DEFAULT ' || value, 'DROP DEFAULT')), ', ' ORDER BY name) AS defaults
          FROM columns c WHERE value IS NOT NULL OR NOT EXISTS (SELECT FROM tables WHERE tables.name = c.tab AND key = c.name) GROUP BY tab) d ON d.tab = t.name
  ), there AS (
    SELECT c.*, a.attnotnull, format_type(a.atttypid, a.atttypmod) AS has,
           y.typtype IN ('e', 'd') OR format_type(a.atttypid, NULL) = ANY (k.fits) AS fit
    FROM columns c
    JOIN kinds k ON k.type = c.type
    JOIN pg_catalog.pg_attribute a ON a.attrelid = to_regclass(c.tab) AND a.attname = c.name AND NOT a.attisdropped
    JOIN pg_catalog.pg_type y ON y.oid = a.atttypid
  ), present AS (
    SELECT t.name AS tab, p.conname, p.contype, obj_description(p.oid, 'pg_constraint') AS note
    FROM tables t JOIN pg_catalog.pg_constraint p ON p.conrelid = to_regclass(t.name) AND p.contype IN ('c', 'f')
  )
  SELECT 0 AS turn, NULL AS statement, format('%s has no column %s, which tells its rows apart: add it', name, key) AS refusal
  FROM tables t WHERE NOT EXISTS (SELECT FROM there WHERE there.tab = t.name AND there.name = t.key)
  UNION ALL
  SELECT 0, NULL, format('column %s of %s is %s and has to be %s: a column''s type is not changed; give the field another name, or change the column', name, tab, has, type)
  FROM there WHERE NOT fit
  UNION ALL
  SELECT 1, format('ALTER TABLE %s ALTER COLUMN %I SET NOT NULL', tab, name), NULL FROM there WHERE required AND NOT attnotnull
  UNION ALL
  SELECT 1, format('ALTER TABLE %s ALTER COLUMN %I DROP NOT NULL', tab, name), NULL FROM there JOIN own USING (tab) WHERE attnotnull AND NOT required
  UNION ALL
  SELECT 2, format('ALTER TABLE %s %s; COMMENT ON CONSTRAINT %3$I ON %1$s IS %4$L', tab, defaults, conname, note), NULL
  FROM own WHERE obj_description(oid, 'pg_constraint') IS DISTINCT FROM note
  UNION ALL
  SELECT 3, format('ALTER TABLE %s DROP CONSTRAINT %I', tab, conname), NULL
  FROM present p LEFT JOIN constraints c USING (tab)
  GROUP BY tab, conname, note
  HAVING CASE WHEN coalesce(bool_or(c.name = conname), false) THEN note IS DISTINCT FROM {{mark}} || md5(max(definition) FILTER (WHERE c.name = conname))
              ELSE note LIKE {{mark}} || '%' END
  UNION ALL
  SELECT CASE WHEN c.definition LIKE 'FOREIGN KEY%' THEN 5 ELSE 4 END,
         format('ALTER TABLE %s ADD CONSTRAINT %I %s; COMMENT ON CONSTRAINT %2$I ON %1$s IS %4$L', c.tab, c.name, c.definition, {{mark}} || md5(c.definition)), NULL
  FROM constraints c
  WHERE c.tab IS NOT NULL AND NOT EXISTS (SELECT FROM present p WHERE p.tab = c.tab AND p.conname = c.name AND p.note = {{mark}} || md5(c.definition))`
