package ddl

import (
	"fmt"
	"slices"
	"strings"

	"github.com/specql/mesh/pkg/spec"
)

// Functions gives a function for each action:
//
//	<schema>.<action>(id <type of the key> DEFAULT NULL, input jsonb DEFAULT '{}', idempotency_key text DEFAULT NULL) RETURNS uuid
//
// It notes a run in jobs.tb_workflow_run, in the caller's transaction, and returns the run's
// id. Orchestrators find the run after the commit; a rollback leaves nothing. Actions of one
// name in one schema are all named <entity>_<action>. The functions need the tables of the
// mesh, when they are called, and run with the rights of the caller.
func Functions(entities []*spec.Entity) ([]Statement, spec.Problems) {
	g := newGenerator(entities)
	actions := map[string]int{}
	for _, e := range g.entities {
		for _, a := range e.Actions {
			actions[e.Schema+"."+shorten(a.Name)]++
		}
	}
	taken := map[string]string{}
	var signatures []string
	for _, e := range g.entities {
		for _, a := range e.Actions {
			name := shorten(a.Name)
			var notes []string
			if actions[e.Schema+"."+name] > 1 {
				notes = append(notes, fmt.Sprintf("Several entities of the schema %s have an action %s.", e.Schema, a.Name))
				name = shorten(e.Name + "_" + a.Name)
			} else if name != a.Name {
				notes = append(notes, fmt.Sprintf("The action %s: a name in SQL may have %d bytes.", a.Name, maxName))
			}
			path := "actions." + clip(a.Name)
			if strings.ContainsRune(a.Name, 0) || a.Name == "" {
				g.errorf(a.Position, path, "rename the action", "%q cannot be the name of a function", clip(a.Name))
				continue
			}
			key := e.Schema + "." + name
			if other := taken[key]; other != "" {
				g.errorf(a.Position, path, "rename one of the two", "the function %s would be that of %s too", name, other)
				continue
			}
			taken[key] = "the action " + a.Name + " of " + e.Name
			signatures = append(signatures, g.function(e, a, name, notes))
		}
	}
	g.dropOverloads(signatures)
	g.problems.Sort()
	return g.statements, g.problems
}

// newRunID makes a UUID of version 7: ids of runs grow with time, and pages of runs are cut by them.
const newRunID = `encode(set_bit(set_bit(overlay(uuid_send(gen_random_uuid())
    PLACING substring(int8send((extract(epoch FROM clock_timestamp()) * 1000)::bigint) FROM 3) FROM 1 FOR 6), 52, 1), 53, 1), 'hex')::uuid`

// by is in the comment of every function made here.
const by = ", made by specql generate-schema "

// function adds the function of an action, notes in a comment what it was made of, and
// returns a row that tells its schema, name and parameters.
func (g *generator) function(e *spec.Entity, a *spec.Action, name string, notes []string) string {
	full := quote(e.Schema) + "." + quote(name)
	keyType := ColumnType(keyField(e))
	signature := full + "(" + keyType + ", jsonb, text)"
	// The parameters are read by position, so that no name of a column can mean something else.
	body := `DECLARE
  a_key constant text := nullif($3, '');
  a_run uuid := ` + newRunID + `;
BEGIN
  IF jsonb_typeof($2) <> 'object' THEN
    RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = ` + literal("the input of "+a.Name+" must be a JSON object, and is of type ") + ` || jsonb_typeof($2);
  END IF;
  -- A second round is for a first run with the key that was deleted meanwhile.
  FOR i IN 1 .. 10 LOOP
    INSERT INTO jobs.tb_workflow_run (id, entity, action, entity_schema, entity_id, input_data, status, idempotency_key, triggered_by)
    VALUES (a_run, ` + literal(e.Name) + `, ` + literal(a.Name) + `, ` + literal(e.Schema) + `, $1::text, coalesce($2, '{}'), 'pending', a_key,
            coalesce(nullif(current_setting('role'), 'none'), session_user))
    ON CONFLICT DO NOTHING;
    IF FOUND THEN
      RETURN a_run;
    END IF;
    SELECT r.id INTO a_run FROM jobs.tb_workflow_run r WHERE coalesce(r.tenant_id, '') = '' AND r.idempotency_key = a_key;
    IF FOUND THEN
      RETURN a_run;
    END IF;
    a_run := gen_random_uuid();
  END LOOP;
  RAISE EXCEPTION USING ERRCODE = 'serialization_failure', MESSAGE = 'the run was not made: runs with its idempotency key come and go';
END`
	create := "CREATE OR REPLACE FUNCTION " + full + "(id " + keyType + " DEFAULT NULL, input jsonb DEFAULT '{}', idempotency_key text DEFAULT NULL)\n" +
		"RETURNS uuid LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS " + dollar(body)
	comment := "Starts the action " + a.Name + " of " + e.Name + " after the commit and returns the id of its run" + by + "(" + mark + digest(create) + ")"
	done := "EXISTS (SELECT FROM pg_catalog.pg_proc p WHERE p.oid = to_regprocedure(" + literal(signature) +
		") AND obj_description(p.oid, 'pg_proc') = " + literal(comment) + ")"
	g.add(Statement{Kind: KindFunction, Entity: e, SQL: create, Done: done, Notes: notes})
	g.add(Statement{Kind: KindFunction, Entity: e, SQL: "COMMENT ON FUNCTION " + signature + " IS " + literal(comment), Done: done})
	return "(" + literal(e.Schema) + ", " + literal(name) + ", " + literal("id "+keyType+", input jsonb, idempotency_key text") + ")"
}

// dropOverloads drops functions of the same names with other parameters: those that were made
// when a key had another type. A call could mean either.
func (g *generator) dropOverloads(signatures []string) {
	if len(signatures) == 0 {
		return
	}
	others := `SELECT p.oid::regprocedure
    FROM (VALUES
      ` + strings.Join(signatures, ",\n      ") + `
    ) AS f (schema, name, parameters)
    JOIN pg_catalog.pg_namespace n ON n.nspname = f.schema
    JOIN pg_catalog.pg_proc p ON p.pronamespace = n.oid AND p.proname = f.name
    WHERE pg_get_function_identity_arguments(p.oid) <> f.parameters AND obj_description(p.oid, 'pg_proc') LIKE ` + literal("%"+by+"%")
	body := `DECLARE
  other regprocedure;
BEGIN
  FOR other IN
    ` + others + `
  LOOP
    EXECUTE format('DROP FUNCTION %s', other);
  END LOOP;
END`
	g.add(Statement{Kind: KindFunction, SQL: "DO " + dollar(body), Done: "NOT EXISTS (" + others + ")", Notes: []string{"Functions for keys of another type."}})
}

// Grants are comments that tell what a role needs in order to call the functions of entities.
func Grants(entities []*spec.Entity) string {
	names := []string{"jobs"}
	for _, e := range entities {
		if len(e.Actions) > 0 && isName(e.Schema) {
			names = append(names, quote(e.Schema))
		}
	}
	slices.Sort(names[1:])
	return `-- Whoever calls these functions needs no more than this (here the role web):
--   GRANT USAGE ON SCHEMA ` + strings.Join(slices.Compact(names), ", ") + ` TO web;
--   GRANT INSERT ON jobs.tb_workflow_run TO web;
--   GRANT SELECT (id, tenant_id, idempotency_key) ON jobs.tb_workflow_run TO web;
-- Every role may call a new function. To say who may:
--   REVOKE EXECUTE ON FUNCTION … FROM PUBLIC; GRANT EXECUTE ON FUNCTION … TO web;
`
}
