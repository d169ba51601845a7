-- SpecQL's tables, triggers and views, in the schema jobs. PostgreSQL 14 or later.
--
--     psql -v ON_ERROR_STOP=1 -d DATABASE -f 001_multi_execution.sql
--     specql migrate-schema --database URL                            (the same statements)
--
-- The file may run as often as one likes: what is there stays. It makes an empty database ready, and it
-- upgrades one of any earlier version, as well as an HTTP-only jobs.tb_job_run, in place: every row stays, and
-- others may write to the tables meanwhile. So this is the whole schema, and there is no second file. Each statement is a transaction of its own, so that no lock is held for longer than one of
-- them. It needs the right to create in the database, or an existing schema jobs that the role owns.

SET client_min_messages = warning;

DO $$
DECLARE
    c record;
BEGIN
    IF current_setting('server_version_num')::int < 140000 THEN
        RAISE EXCEPTION 'PostgreSQL % is too old: use 14 or later', current_setting('server_version');
    END IF;
    -- A value cannot be added to a type and used in one transaction, and the type may be others' too.
    FOR c IN SELECT a.atttypid::regtype AS type, w.state FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid AND t.typtype = 'e'
        CROSS JOIN unnest('{pending,running,completed,failed,cancelled}'::text[]) AS w (state)
        WHERE a.attrelid = to_regclass('jobs.tb_job_run') AND a.attname = 'status'
          AND NOT EXISTS (SELECT FROM pg_enum e WHERE e.enumtypid = t.oid AND e.enumlabel = w.state)
    LOOP
        RAISE EXCEPTION 'jobs.tb_job_run.status is of the type %, which has no value %; nothing was changed', c.type, quote_literal(c.state)
            USING HINT = format('ALTER TYPE %s ADD VALUE %L; and then run this again', c.type, c.state);
    END LOOP;
    IF to_regnamespace('jobs') IS NULL THEN
        CREATE SCHEMA jobs;
    END IF;
END
$$;

-- pr_patiently runs a statement that needs a strong lock on a table in use. While it waits for the lock
-- everybody else waits behind it: so it waits shortly, gives way, and tries again.
CREATE OR REPLACE PROCEDURE jobs.pr_patiently(statement text) LANGUAGE plpgsql AS $$
BEGIN
    FOR i IN 1..1000 LOOP
        BEGIN
            SET LOCAL lock_timeout = '200ms';
            EXECUTE statement;
            RETURN;
        EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
            IF i = 1000 THEN
                RAISE;
            END IF;
        END;
        PERFORM pg_sleep(0.1 + 0.2 * random());
    END LOOP;
END
$$;

-- ---------------------------------------------------------------- tables

-- A row a run of a workflow. A client that inserts (id, entity, action, input_data, …) with the status
-- pending and no owner starts it, once its transaction has committed.
CREATE TABLE IF NOT EXISTS jobs.tb_workflow_run (
    id               uuid        NOT NULL DEFAULT gen_random_uuid() PRIMARY KEY,
    entity           text,
    action           text,
    entity_schema    text,
    entity_id        text,
    status           text        NOT NULL DEFAULT 'pending'
                     CONSTRAINT ck_workflow_run_status CHECK (status IN ('pending', 'running', 'completed', 'failed', 'cancelled')),
    owner            text        NOT NULL DEFAULT '',
    epoch            bigint      NOT NULL DEFAULT 0,
    retries          integer     NOT NULL DEFAULT 0,
    sequence         bigint      NOT NULL DEFAULT 0,
    cancel_requested boolean     NOT NULL DEFAULT false,
    cancel_reason    text,
    snapshot         text,
    idempotency_key  text,
    correlation_id   text,
    tenant_id        text,
    triggered_by     text,
    traceparent      text,
    error_code       text,
    error_message    text,
    error_retryable  boolean,
    error_attempts   integer,
    created_at       timestamptz NOT NULL DEFAULT now(),
    started_at       timestamptz,
    completed_at     timestamptz,
    updated_at       timestamptz NOT NULL DEFAULT now(),
    output_data      jsonb,
    entity_row       jsonb,
    input_data       jsonb
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05);

-- The span of W3C Trace Context that a run belongs to: a client may set it, and whoever walks the run goes on with the trace.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'jobs.tb_workflow_run'::regclass AND attname = 'traceparent' AND NOT attisdropped) THEN
        CALL jobs.pr_patiently('ALTER TABLE jobs.tb_workflow_run ADD COLUMN IF NOT EXISTS traceparent text');
    END IF;
END
$$;

CREATE UNIQUE INDEX IF NOT EXISTS ux_workflow_run_idempotency_key
    ON jobs.tb_workflow_run (coalesce(tenant_id, ''), idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX IF NOT EXISTS ix_workflow_run_active
    ON jobs.tb_workflow_run (owner, id) WHERE status IN ('pending', 'running');
CREATE INDEX IF NOT EXISTS ix_workflow_run_entity
    ON jobs.tb_workflow_run (entity, id) WHERE entity IS NOT NULL;
CREATE INDEX IF NOT EXISTS ix_workflow_run_tenant
    ON jobs.tb_workflow_run (tenant_id, id) WHERE tenant_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS ix_workflow_run_completed
    ON jobs.tb_workflow_run (completed_at) WHERE completed_at IS NOT NULL;

-- A row a call. A client that inserts service_name, operation and input_data has the call made, once its
-- transaction has committed. What changes when a call ends is in no index, so that its end writes none where its page has room:
-- pages are half filled at first, since a row doubles with what the call gave.
CREATE TABLE IF NOT EXISTS jobs.tb_job_run (
    id               uuid             NOT NULL DEFAULT gen_random_uuid() PRIMARY KEY,
    identifier       text             NOT NULL DEFAULT gen_random_uuid()::text UNIQUE,
    idempotency_key  text,
    run_id           uuid,
    step_path        text,
    generation       integer          NOT NULL DEFAULT 0,
    service_name     text             NOT NULL,
    operation        text             NOT NULL,
    execution_type   text             NOT NULL DEFAULT 'http',
    status           text             NOT NULL DEFAULT 'pending'
                     CONSTRAINT ck_job_run_status CHECK (status IN ('pending', 'running', 'completed', 'failed', 'cancelled')),
    attempts         integer          NOT NULL DEFAULT 0,
    max_attempts     integer,
    next_attempt_at  timestamptz,
    timeout_seconds  double precision,
    duration_seconds double precision,
    sequence         bigint           NOT NULL DEFAULT 0,
    by_sql           boolean          DEFAULT true,
    error_code       text,
    error_message    text,
    error_retryable  boolean,
    error_attempts   integer,
    tenant_id        uuid,
    triggered_by     uuid,
    correlation_id   text,
    entity_type      text,
    entity_pk        text,
    created_at       timestamptz      NOT NULL DEFAULT now(),
    started_at       timestamptz,
    completed_at     timestamptz,
    updated_at       timestamptz      NOT NULL DEFAULT now(),
    resource_usage   jsonb,
    security_context jsonb,
    runner_config    jsonb,
    output_data      jsonb,
    input_data       jsonb
) WITH (fillfactor = 50, autovacuum_vacuum_insert_scale_factor = 0.05);

-- The old table: what it lacks is added without touching a row, what it forbids is allowed. One statement
-- for all of it, since each would need the lock anew.
DO $$
DECLARE
    t      regclass := 'jobs.tb_job_run';
    parts  text[] := '{}';
    c      record;
    unique_keys boolean;
BEGIN
    -- Keys that were unique stay so, the old rows among them. Old rows whose keys nobody kept apart are left
    -- out of the new index: by_sql is null there.
    SELECT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = t AND i.indisunique AND i.indexprs IS NULL
        AND (i.indpred IS NULL OR pg_get_expr(i.indpred, i.indrelid) = '(idempotency_key IS NOT NULL)')
        AND i.indkey::int2[] <@ (SELECT array_agg(a.attnum) FROM pg_attribute a WHERE a.attrelid = t AND a.attname IN ('idempotency_key', 'tenant_id'))
        AND (SELECT a.attnum FROM pg_attribute a WHERE a.attrelid = t AND a.attname = 'idempotency_key') = ANY (i.indkey::int2[]))
    INTO unique_keys;

    FOR c IN SELECT * FROM (VALUES
        ('identifier', 'text DEFAULT gen_random_uuid()::text'), ('idempotency_key', 'text'), ('input_data', 'jsonb'), ('output_data', 'jsonb'),
        ('error_message', 'text'), ('attempts', 'integer NOT NULL DEFAULT 0'), ('max_attempts', 'integer'), ('timeout_seconds', 'double precision'),
        ('tenant_id', 'uuid'), ('triggered_by', 'uuid'), ('correlation_id', 'text'), ('entity_type', 'text'), ('entity_pk', 'text'),
        ('created_at', 'timestamptz NOT NULL DEFAULT now()'), ('started_at', 'timestamptz'), ('completed_at', 'timestamptz'),
        ('updated_at', 'timestamptz NOT NULL DEFAULT now()'),
        ('run_id', 'uuid'), ('step_path', 'text'), ('generation', 'integer NOT NULL DEFAULT 0'),
        ('execution_type', 'text NOT NULL DEFAULT ''http'''), ('next_attempt_at', 'timestamptz'), ('duration_seconds', 'double precision'),
        ('sequence', 'bigint NOT NULL DEFAULT 0'), ('by_sql', CASE WHEN unique_keys THEN 'boolean DEFAULT true' ELSE 'boolean' END),
        ('error_code', 'text'), ('error_retryable', 'boolean'), ('error_attempts', 'integer'),
        ('resource_usage', 'jsonb'), ('security_context', 'jsonb'), ('runner_config', 'jsonb')) AS wanted (name, definition)
        WHERE NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = t AND a.attname = wanted.name AND NOT a.attisdropped)
    LOOP
        parts := parts || format('ADD COLUMN %I %s', c.name, c.definition);
        IF c.name = 'by_sql' THEN
            parts := parts || 'ALTER COLUMN by_sql SET DEFAULT true'::text;
        END IF;
    END LOOP;

    FOR c IN SELECT a.attname AS name, a.attnotnull AS required, a.atthasdef AS has_default, format_type(a.atttypid, a.atttypmod) AS type,
                    a.atttypid = 'varchar'::regtype OR a.atttypid = 'bpchar'::regtype AS bounded
        FROM pg_attribute a WHERE a.attrelid = t AND a.attnum > 0 AND NOT a.attisdropped
    LOOP
        IF c.required AND c.name = ANY ('{idempotency_key,input_data,output_data,error_message,max_attempts,timeout_seconds,
            tenant_id,triggered_by,correlation_id,entity_type,entity_pk,started_at,completed_at}')
        THEN
            parts := parts || format('ALTER COLUMN %I DROP NOT NULL', c.name);
        END IF;
        IF NOT c.has_default THEN
            parts := parts || CASE c.name
                WHEN 'id' THEN CASE WHEN c.type = 'uuid' THEN array['ALTER COLUMN id SET DEFAULT gen_random_uuid()'] ELSE '{}' END
                WHEN 'identifier' THEN array['ALTER COLUMN identifier SET DEFAULT gen_random_uuid()::text']
                WHEN 'status' THEN array['ALTER COLUMN status SET DEFAULT ''pending''']
                WHEN 'attempts' THEN array['ALTER COLUMN attempts SET DEFAULT 0']
                WHEN 'created_at' THEN array['ALTER COLUMN created_at SET DEFAULT now()']
                WHEN 'updated_at' THEN array['ALTER COLUMN updated_at SET DEFAULT now()']
                ELSE '{}'::text[] END;
        END IF;
        -- A bounded text becomes an unbounded one without a rewrite: identifiers are longer than they were.
        IF c.bounded AND c.name = ANY ('{identifier,idempotency_key,service_name,operation,execution_type,error_message,error_code,status,
            correlation_id,entity_type,entity_pk,step_path}')
        THEN
            IF EXISTS (SELECT FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
                WHERE d.classid = 'pg_rewrite'::regclass AND d.refobjid = t AND a.attname = c.name
                  AND r.ev_class NOT IN (SELECT oid FROM pg_class WHERE relnamespace = 'jobs'::regnamespace AND relname ~ '^v_'))
            THEN
                RAISE WARNING 'jobs.tb_job_run.% stays %: a view uses it. Drop the view, run this again, and create the view anew', c.name, c.type;
            ELSE
                parts := parts || format('ALTER COLUMN %I TYPE text', c.name);
            END IF;
        END IF;
    END LOOP;

    -- A rule on the status that does not know all five states gives way to one that does. Old rows keep what they have.
    FOR c IN SELECT conname AS name FROM pg_constraint
        WHERE conrelid = t AND contype = 'c' AND conname <> 'ck_job_run_status'
          AND conkey = array[(SELECT attnum FROM pg_attribute WHERE attrelid = t AND attname = 'status')]
          AND NOT (pg_get_constraintdef(oid) LIKE ALL (array['%''pending''%', '%''running''%', '%''completed''%', '%''failed''%', '%''cancelled''%']))
    LOOP
        parts := parts || format('DROP CONSTRAINT %I', c.name);
    END LOOP;
    IF NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = t AND contype = 'c'
        AND pg_get_constraintdef(oid) LIKE ALL (array['%status%', '%''pending''%', '%''running''%', '%''completed''%', '%''failed''%', '%''cancelled''%']))
    THEN
        parts := parts || 'ADD CONSTRAINT ck_job_run_status CHECK (status IN (''pending'', ''running'', ''completed'', ''failed'', ''cancelled'')) NOT VALID'::text;
    END IF;

    IF cardinality(parts) > 0 THEN
        CALL jobs.pr_patiently('ALTER TABLE jobs.tb_job_run ' || array_to_string(parts, ', '));
    END IF;
    IF NOT EXISTS (SELECT FROM pg_class WHERE oid = t AND reloptions::text LIKE '%fillfactor%') THEN
        CALL jobs.pr_patiently('ALTER TABLE jobs.tb_job_run SET (fillfactor = 50, autovacuum_vacuum_insert_scale_factor = 0.05)');
    END IF;
END
$$;

-- An index that could not be finished is made anew.
DO $$
DECLARE
    c record;
BEGIN
    FOR c IN SELECT i.indexrelid::regclass AS name FROM pg_index i JOIN pg_class k ON k.oid = i.indexrelid
        WHERE i.indrelid = 'jobs.tb_job_run'::regclass AND NOT i.indisvalid
          AND k.relname IN ('ix_job_run_run', 'ix_job_run_created', 'ix_job_run_loose', 'ix_job_run_error', 'ux_job_run_idempotency_key')
    LOOP
        CALL jobs.pr_patiently(format('DROP INDEX %s', c.name));
    END LOOP;
END
$$;

CREATE INDEX CONCURRENTLY IF NOT EXISTS ix_job_run_run ON jobs.tb_job_run (run_id) WHERE run_id IS NOT NULL;
CREATE INDEX CONCURRENTLY IF NOT EXISTS ix_job_run_created ON jobs.tb_job_run USING brin (created_at) WITH (pages_per_range = 32, autosummarize = on);
CREATE INDEX CONCURRENTLY IF NOT EXISTS ix_job_run_loose ON jobs.tb_job_run (created_at) WHERE run_id IS NULL;
CREATE INDEX CONCURRENTLY IF NOT EXISTS ix_job_run_error ON jobs.tb_job_run (error_code) WHERE error_code IS NOT NULL;

-- One call for each key that a client gave: the engine's own rows repeat the keys of what they retry.
CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS ux_job_run_idempotency_key
    ON jobs.tb_job_run (coalesce(tenant_id::text, ''), idempotency_key) WHERE by_sql AND idempotency_key IS NOT NULL;

-- The old rule, which the engine's repeats would break, now that the new one holds.
DO $$
DECLARE
    t regclass := 'jobs.tb_job_run';
    c record;
BEGIN
    FOR c IN SELECT i.indexrelid::regclass AS index_name, k.conname AS constraint_name
        FROM pg_index i LEFT JOIN pg_constraint k ON k.conindid = i.indexrelid AND k.conrelid = t
        WHERE i.indrelid = t AND i.indisunique AND NOT i.indisprimary AND i.indexprs IS NULL
          AND (i.indpred IS NULL OR pg_get_expr(i.indpred, i.indrelid) = '(idempotency_key IS NOT NULL)')
          AND (SELECT a.attnum FROM pg_attribute a WHERE a.attrelid = t AND a.attname = 'idempotency_key') = ANY (i.indkey::int2[])
          AND i.indkey::int2[] <@ (SELECT array_agg(a.attnum) FROM pg_attribute a WHERE a.attrelid = t AND a.attname IN ('idempotency_key', 'tenant_id'))
    LOOP
        IF c.constraint_name IS NOT NULL THEN
            CALL jobs.pr_patiently(format('ALTER TABLE jobs.tb_job_run DROP CONSTRAINT %I', c.constraint_name));
        ELSE
            CALL jobs.pr_patiently(format('DROP INDEX %s', c.index_name));
        END IF;
    END LOOP;
END
$$;

-- Pending calls that clients inserted. owner is the orchestrator that takes one up.
DO $$
BEGIN
    IF to_regclass('jobs.tb_job_queue') IS NULL THEN
        CALL jobs.pr_patiently($sql$
            CREATE TABLE jobs.tb_job_queue (
                job_id uuid   NOT NULL PRIMARY KEY REFERENCES jobs.tb_job_run (id) ON DELETE CASCADE,
                seq    bigint NOT NULL GENERATED ALWAYS AS IDENTITY,
                owner  text   NOT NULL DEFAULT ''
            ) WITH (autovacuum_vacuum_scale_factor = 0.02)$sql$);
    END IF;
END
$$;
CREATE INDEX IF NOT EXISTS ix_job_queue_owner ON jobs.tb_job_queue (owner, seq);

-- Steps other than calls, which have to be remembered.
CREATE TABLE IF NOT EXISTS jobs.tb_workflow_step (
    run_id          uuid        NOT NULL,
    step_path       text        NOT NULL,
    generation      integer     NOT NULL DEFAULT 0,
    kind            text        NOT NULL,
    status          text        NOT NULL DEFAULT 'pending'
                    CONSTRAINT ck_workflow_step_status CHECK (status IN ('pending', 'running', 'completed', 'failed', 'cancelled')),
    name            text,
    until           timestamptz,
    sequence        bigint      NOT NULL DEFAULT 0,
    error_code      text,
    error_message   text,
    error_retryable boolean,
    error_attempts  integer,
    started_at      timestamptz,
    completed_at    timestamptz,
    data            jsonb,
    PRIMARY KEY (run_id, step_path, generation)
) WITH (fillfactor = 80);

CREATE TABLE IF NOT EXISTS jobs.tb_workflow_signal (
    id         bigint      NOT NULL GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    run_id     uuid        NOT NULL,
    name       text        NOT NULL,
    taken_by   text,
    created_at timestamptz NOT NULL DEFAULT now(),
    payload    jsonb
);
CREATE INDEX IF NOT EXISTS ix_workflow_signal_run ON jobs.tb_workflow_signal (run_id, id);

CREATE TABLE IF NOT EXISTS jobs.tb_job_log (
    run_id     uuid        NOT NULL,
    sequence   bigint      NOT NULL,
    job_id     text        NOT NULL,
    step_path  text        NOT NULL,
    attempt    integer     NOT NULL,
    line       bigint      NOT NULL,
    stream     text        NOT NULL,
    text       text        NOT NULL,
    created_at timestamptz NOT NULL,
    PRIMARY KEY (run_id, sequence)
);

-- How many lines of a run are kept, so that the bound costs no count(*) a write.
CREATE TABLE IF NOT EXISTS jobs.tb_job_log_count (
    run_id uuid   NOT NULL PRIMARY KEY,
    lines  bigint NOT NULL
) WITH (fillfactor = 50);

-- Registry and workflows as they were when a run began, by digest.
CREATE TABLE IF NOT EXISTS jobs.tb_snapshot (
    digest     text        NOT NULL PRIMARY KEY CHECK (digest <> ''),
    created_at timestamptz NOT NULL DEFAULT now(),
    content    bytea       NOT NULL
);

-- One row: the snapshot in force.
CREATE TABLE IF NOT EXISTS jobs.tb_registry (
    id         integer     NOT NULL PRIMARY KEY CHECK (id = 1),
    digest     text        NOT NULL REFERENCES jobs.tb_snapshot (digest),
    applied_at timestamptz NOT NULL
);

-- Execution types that were disabled or enabled by hand; one without a row is enabled.
CREATE TABLE IF NOT EXISTS jobs.tb_execution_type (
    name       text        NOT NULL PRIMARY KEY CHECK (name <> ''),
    enabled    boolean     NOT NULL,
    changed_at timestamptz NOT NULL DEFAULT now()
);

-- How alerts stand, what changed, and who evaluates them.
CREATE TABLE IF NOT EXISTS jobs.tb_alert (
    name         text        NOT NULL PRIMARY KEY CHECK (name <> ''),
    state        text        NOT NULL CHECK (state IN ('inactive', 'pending', 'firing', 'resolved')),
    since        timestamptz NOT NULL,
    held_since   timestamptz,
    evaluated_at timestamptz NOT NULL,
    figures      jsonb       NOT NULL DEFAULT '{}',
    detail       text        NOT NULL DEFAULT ''
);

-- notify_status is empty where nobody is to be told, then pending, started or failed.
CREATE TABLE IF NOT EXISTS jobs.tb_alert_event (
    id            uuid        NOT NULL PRIMARY KEY,
    alert         text        NOT NULL,
    old_state     text        NOT NULL,
    new_state     text        NOT NULL,
    occurred_at   timestamptz NOT NULL,
    figures       jsonb       NOT NULL DEFAULT '{}',
    notify_status text        NOT NULL DEFAULT '',
    notify_input  jsonb,
    notify_run_id text        NOT NULL DEFAULT '',
    notify_error  text        NOT NULL DEFAULT ''
);
CREATE INDEX IF NOT EXISTS ix_alert_event_alert ON jobs.tb_alert_event (alert, occurred_at DESC);
CREATE INDEX IF NOT EXISTS ix_alert_event_notify ON jobs.tb_alert_event (occurred_at) WHERE notify_status = 'pending';

CREATE TABLE IF NOT EXISTS jobs.tb_alert_lease (
    id         integer     NOT NULL PRIMARY KEY CHECK (id = 1),
    owner      text        NOT NULL,
    expires_at timestamptz NOT NULL
);

-- Orchestrators that live, or have not been seen to be dead. One that was has buried_at, and begins nothing
-- until it registers again.
CREATE TABLE IF NOT EXISTS jobs.tb_orchestrator (
    id         text        NOT NULL PRIMARY KEY CHECK (id <> ''),
    beat       bigint      NOT NULL DEFAULT 0,
    started_at timestamptz NOT NULL DEFAULT now(),
    seen_at    timestamptz NOT NULL DEFAULT now(),
    buried_at  timestamptz
) WITH (fillfactor = 50);
ALTER TABLE jobs.tb_orchestrator ADD COLUMN IF NOT EXISTS buried_at timestamptz;

-- What is limited over all orchestrators, by key: the limit as it was asked for last, and until when every take is
-- refused. Who takes a slot holds the row of each of its limits, in the order of the keys.
CREATE TABLE IF NOT EXISTS jobs.tb_limit (
    key            text             NOT NULL PRIMARY KEY CHECK (key <> ''),
    window_seconds double precision,
    max_attempts   bigint,
    max_cost       double precision,
    closed_until   timestamptz,
    closed_reason  text,
    updated_at     timestamptz      NOT NULL DEFAULT now()
) WITH (fillfactor = 50);

-- One attempt at one limit. It counts until `until`, which is set when the attempt has ended. A row of no job
-- stands for several that have ended.
CREATE TABLE IF NOT EXISTS jobs.tb_limit_slot (
    id             uuid             NOT NULL,
    key            text             NOT NULL,
    job_id         uuid,
    attempts       bigint           NOT NULL DEFAULT 1,
    window_seconds double precision NOT NULL,
    cost           double precision NOT NULL DEFAULT 0,
    taken_at       timestamptz      NOT NULL,
    ended_at       timestamptz,
    until          timestamptz      NOT NULL DEFAULT 'infinity',
    PRIMARY KEY (id, key)
);

CREATE INDEX IF NOT EXISTS ix_limit_slot_key ON jobs.tb_limit_slot (key, until);
CREATE INDEX IF NOT EXISTS ix_limit_slot_job ON jobs.tb_limit_slot (job_id) WHERE ended_at IS NULL;

CREATE TABLE IF NOT EXISTS jobs.tb_schema_version (
    version    integer     NOT NULL PRIMARY KEY,
    name       text        NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now(),
    oldest     integer
);
ALTER TABLE jobs.tb_schema_version ADD COLUMN IF NOT EXISTS oldest integer;

-- ---------------------------------------------------------------- who sees to what

-- An orchestrator has looked at what it writes, and says so by a setting: 'yes' of bounds, 'all' where it has seen to the states and
-- the sums of jobs too. It is believed of a session with an orchestrator's rights; not in a function that runs with its owner's
-- rights, whose caller sets what it likes, nor in a trigger, which does more than the orchestrator knows of. The conditions of
-- triggers are read anew for each statement, a function's text is not. Its words are those of pg_catalog: in a client's search
-- path, = may be the client's.
CREATE OR REPLACE FUNCTION jobs.fn_left_to_triggers(what text) RETURNS boolean LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN coalesce(pg_catalog.current_setting('specql.checked', true), '') OPERATOR(pg_catalog.<>) 'all'
            AND (what OPERATOR(pg_catalog.=) 'all' OR coalesce(pg_catalog.current_setting('specql.checked', true), '') OPERATOR(pg_catalog.<>) 'yes')
        OR pg_catalog.pg_trigger_depth() OPERATOR(pg_catalog.>) 0 OR current_user OPERATOR(pg_catalog.<>) session_user
        OR NOT pg_catalog.has_table_privilege('jobs.tb_orchestrator'::pg_catalog.regclass, 'INSERT');
END
$$;
-- Whoever writes to the tables comes by here.
GRANT EXECUTE ON FUNCTION jobs.fn_left_to_triggers(text) TO PUBLIC;

-- ---------------------------------------------------------------- states move one way, whoever writes

CREATE OR REPLACE FUNCTION jobs.fn_refuse_state() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION USING ERRCODE = 'SQ001', MESSAGE = TG_ARGV[0];
END
$$;

-- Only what looks wrong is looked at more closely: a condition is read anew for each statement, a function's text is not.
-- It has a search path of its own: in a client's, = may be the client's.
CREATE OR REPLACE FUNCTION jobs.fn_check_run_status() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF OLD.status IN ('failed', 'cancelled') AND NEW.status = 'running' AND NEW.retries = OLD.retries + 1 THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION USING ERRCODE = 'SQ001',
        MESSAGE = 'a run moves from pending to running to completed, failed or cancelled; a retry sets a failed or cancelled run to running and raises retries by one';
END
$$;

-- The conditions of a trigger are read anew for each statement, so that each trigger looks at statements alone that set what it is
-- about: most of an orchestrator's set the sequence and nothing else.
CREATE OR REPLACE TRIGGER tr_workflow_run_status BEFORE UPDATE OF status, retries ON jobs.tb_workflow_run FOR EACH ROW
WHEN (NEW.retries <> OLD.retries
    OR (NEW.status <> OLD.status AND OLD.status <> 'pending' AND (OLD.status <> 'running' OR NEW.status = 'pending')))
EXECUTE FUNCTION jobs.fn_check_run_status();

CREATE OR REPLACE TRIGGER tr_workflow_run_owner BEFORE UPDATE OF id, epoch, owner ON jobs.tb_workflow_run FOR EACH ROW
WHEN (NEW.id <> OLD.id OR NEW.epoch < OLD.epoch
    OR (NEW.owner <> OLD.owner AND NEW.owner <> '' AND NEW.epoch <= OLD.epoch))
EXECUTE FUNCTION jobs.fn_refuse_state('the epoch and the sequence of a run only grow, and a new owner comes with a higher epoch');

CREATE OR REPLACE FUNCTION jobs.fn_check_run_sequence() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NEW.sequence < OLD.sequence THEN
        RAISE EXCEPTION USING ERRCODE = 'SQ001', MESSAGE = 'the epoch and the sequence of a run only grow, and a new owner comes with a higher epoch';
    END IF;
    RAISE EXCEPTION USING ERRCODE = 'check_violation', SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME,
        MESSAGE = 'new row for relation "tb_workflow_run" violates check constraint "ck_workflow_run_sequence"',
        DETAIL = 'sequence is at most 9007199254740992, and updated_at between the years 1 and 9999';
END
$$;

CREATE OR REPLACE TRIGGER tr_workflow_run_sequence BEFORE UPDATE OF sequence, updated_at ON jobs.tb_workflow_run FOR EACH ROW
WHEN (NEW.sequence < OLD.sequence OR NEW.sequence > 9007199254740992 OR NEW.updated_at < timestamptz '0001-01-01 00:00:00+00'
    OR NEW.updated_at > timestamptz '9999-12-31 00:00:00+00')
EXECUTE FUNCTION jobs.fn_check_run_sequence();

CREATE OR REPLACE TRIGGER tr_workflow_step_status BEFORE UPDATE ON jobs.tb_workflow_step FOR EACH ROW
WHEN (NEW.status <> OLD.status AND OLD.status <> 'pending' AND (OLD.status <> 'running' OR NEW.status = 'pending'))
EXECUTE FUNCTION jobs.fn_refuse_state('a step moves from pending to running to completed, failed or cancelled');

-- What a statement of the engine changes has to be all that it meant to change: else nothing is.
CREATE OR REPLACE FUNCTION jobs.fn_expect(have bigint, want bigint, what text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF have <> want THEN
        RAISE EXCEPTION USING ERRCODE = 'SQ002', MESSAGE = format('%s: %s of %s', what, have, want);
    END IF;
END
$$;

-- fn_limits closes keys and decides takes, in their order; what it gives is what store.TakeResult says. A take is granted a
-- slot at each of its limits, or none at all. takes: [{id, job, limits: [{key, window, attempts, max_cost, cost}]}],
-- closures: [{key, seconds, reason}]. fold is how many rows of one key are counted before they are put together.
CREATE OR REPLACE FUNCTION jobs.fn_limits(takes jsonb, closures jsonb, fold bigint, tolerance double precision)
RETURNS TABLE (granted boolean, refused integer, closed boolean, wait double precision, used bigint, in_flight bigint, cost double precision, reserved double precision, free bigint)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    keys text[];
    -- What counts at each key, by its place in keys.
    n bigint[];
    flying bigint[];
    spent double precision[];
    held double precision[];
    next_until timestamptz[];
    shut timestamptz[];
    -- When it all happens: read once the keys are held, so that nobody's later slot is from before.
    t timestamptz;
    take jsonb;
    l jsonb;
    i integer;
    k integer;
    max_n bigint;
    max_c double precision;
    one double precision;
    full_ boolean;
    s record;
BEGIN
    SELECT array_agg(x.key ORDER BY x.key COLLATE "C") INTO keys FROM (
        SELECT e -> 'limits' -> g.i ->> 'key' AS key FROM jsonb_array_elements(takes) e, generate_series(0, jsonb_array_length(e -> 'limits') - 1) AS g (i)
        UNION SELECT e ->> 'key' FROM jsonb_array_elements(closures) e) AS x;
    -- A key that was long not used may be forgotten just now.
    LOOP
        SELECT count(*) INTO k FROM (SELECT FROM jobs.tb_limit WHERE key = ANY (keys) ORDER BY key COLLATE "C" FOR UPDATE) AS x;
        EXIT WHEN k = cardinality(keys);
        INSERT INTO jobs.tb_limit (key) SELECT x.key FROM unnest(keys) AS x (key) ORDER BY x.key COLLATE "C" ON CONFLICT DO NOTHING;
    END LOOP;
    t := clock_timestamp();
    UPDATE jobs.tb_limit m SET closed_until = c.until, closed_reason = c.reason, updated_at = t
    FROM (SELECT DISTINCT ON (e ->> 'key') e ->> 'key' AS key, t + make_interval(secs => (e ->> 'seconds')::double precision) AS until, e ->> 'reason' AS reason
          FROM jsonb_array_elements(closures) e ORDER BY e ->> 'key', (e ->> 'seconds')::double precision DESC) AS c
    WHERE m.key = c.key AND coalesce(m.closed_until < c.until, true);
    IF jsonb_array_length(takes) = 0 THEN
        RETURN;
    END IF;
    -- What the limits are is kept for people to see.
    UPDATE jobs.tb_limit m SET window_seconds = c.w, max_attempts = c.a, max_cost = c.c, updated_at = t
    FROM (SELECT DISTINCT ON (x ->> 'key') x ->> 'key' AS key, (x ->> 'window')::double precision AS w,
              nullif((x ->> 'attempts')::bigint, 0) AS a, nullif((x ->> 'max_cost')::double precision, 0) AS c
          FROM jsonb_array_elements(takes) WITH ORDINALITY AS e (v, at), jsonb_array_elements(e.v -> 'limits') AS x ORDER BY x ->> 'key', e.at DESC) AS c
    WHERE m.key = c.key AND (m.window_seconds, m.max_attempts, m.max_cost) IS DISTINCT FROM (c.w, c.a, c.c);
    FOR k IN 1 .. cardinality(keys) LOOP
        SELECT count(*) AS rows, coalesce(sum(attempts), 0) AS n, coalesce(sum(attempts) FILTER (WHERE ended_at IS NULL), 0) AS flying,
            coalesce(sum(cost), 0) AS spent, coalesce(sum(cost) FILTER (WHERE ended_at IS NULL), 0) AS held, min(until) FILTER (WHERE ended_at IS NOT NULL) AS next
        INTO s FROM jobs.tb_limit_slot WHERE key = keys[k] AND until > t;
        n[k] := s.n; flying[k] := s.flying; spent[k] := s.spent; held[k] := s.held; next_until[k] := s.next;
        shut[k] := (SELECT closed_until FROM jobs.tb_limit WHERE key = keys[k]);
        IF s.rows > fold THEN
            WITH gone AS (DELETE FROM jobs.tb_limit_slot WHERE key = keys[k] AND ended_at IS NOT NULL RETURNING attempts, window_seconds, cost, until)
            INSERT INTO jobs.tb_limit_slot (id, key, attempts, window_seconds, cost, taken_at, ended_at, until)
            SELECT gen_random_uuid(), keys[k], sum(g.attempts), max(g.window_seconds), sum(g.cost), t, t, max(g.until)
            FROM gone g WHERE g.until > t GROUP BY floor(extract(epoch FROM g.until) / greatest(g.window_seconds / 60, 0.000001));
        END IF;
    END LOOP;
    FOR take IN SELECT e.v FROM jsonb_array_elements(takes) WITH ORDINALITY AS e (v, at) ORDER BY e.at LOOP
        granted := true; refused := 0; closed := false; wait := 0; used := 0; in_flight := 0; cost := 0; reserved := 0; free := 1099511627776;
        -- The slot may be there already: the answer that gave it was lost.
        IF EXISTS (SELECT FROM jobs.tb_limit_slot WHERE id = (take ->> 'id')::uuid) THEN
            free := 0;
            RETURN NEXT;
            CONTINUE;
        END IF;
        FOR i IN 0 .. jsonb_array_length(take -> 'limits') - 1 LOOP
            l := take -> 'limits' -> i;
            k := array_position(keys, l ->> 'key');
            max_n := (l ->> 'attempts')::bigint; max_c := (l ->> 'max_cost')::double precision; one := (l ->> 'cost')::double precision;
            full_ := max_n > 0 AND n[k] + 1 > max_n OR max_c > 0 AND spent[k] + one > max_c + tolerance;
            IF full_ OR shut[k] > t THEN
                granted := false; refused := i; closed := coalesce(shut[k] > t, false);
                wait := greatest(0, extract(epoch FROM shut[k] - t), CASE WHEN full_ THEN extract(epoch FROM next_until[k] - t) END);
                used := n[k]; in_flight := flying[k]; cost := spent[k]; reserved := held[k]; free := 0;
                EXIT;
            END IF;
        END LOOP;
        IF granted THEN
            FOR i IN 0 .. jsonb_array_length(take -> 'limits') - 1 LOOP
                l := take -> 'limits' -> i;
                k := array_position(keys, l ->> 'key');
                max_n := (l ->> 'attempts')::bigint; max_c := (l ->> 'max_cost')::double precision; one := (l ->> 'cost')::double precision;
                n[k] := n[k] + 1; flying[k] := flying[k] + 1; spent[k] := spent[k] + one; held[k] := held[k] + one;
                INSERT INTO jobs.tb_limit_slot (id, key, job_id, window_seconds, cost, taken_at)
                VALUES ((take ->> 'id')::uuid, keys[k], (take ->> 'job')::uuid, (l ->> 'window')::double precision, one, t) ON CONFLICT DO NOTHING;
                IF i = 0 THEN
                    used := n[k]; in_flight := flying[k]; cost := spent[k]; reserved := held[k];
                END IF;
                IF max_n > 0 THEN
                    free := least(free, max_n - n[k]);
                END IF;
                -- Less than it was, so that it is no more than a bigint holds.
                IF max_c > 0 AND one * free > max_c + tolerance - spent[k] THEN
                    free := greatest(0, floor((max_c + tolerance - spent[k]) / one))::bigint;
                END IF;
            END LOOP;
        END IF;
        RETURN NEXT;
    END LOOP;
END
$$;

-- An old table's json holds what jsonb does not, such as \u0000: null then.
CREATE OR REPLACE FUNCTION jobs.fn_jsonb(j json) RETURNS jsonb LANGUAGE plpgsql STABLE STRICT AS $$
BEGIN
    RETURN j::jsonb;
EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
    RETURN NULL;
END
$$;

-- ---------------------------------------------------------------- the front door

-- The functions of triggers run with the rights of the owner of the schema: whoever may insert into a table
-- needs no rights on what stands behind it. So they see to it that it is their own table that calls them; the end of
-- this file takes the right to attach them to another one away.
CREATE OR REPLACE FUNCTION jobs.fn_enqueue_job() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_TABLE_SCHEMA <> 'jobs' OR TG_TABLE_NAME <> 'tb_job_run' THEN
        RAISE EXCEPTION USING ERRCODE = '42501', MESSAGE = 'this is the trigger of jobs.tb_job_run alone';
    END IF;
    INSERT INTO jobs.tb_job_queue (job_id) VALUES (NEW.id) ON CONFLICT DO NOTHING;
    PERFORM pg_notify('specql_work', '');
    RETURN NULL;
END
$$;

CALL jobs.pr_patiently($sql$
CREATE OR REPLACE TRIGGER tr_job_run_enqueue AFTER INSERT ON jobs.tb_job_run FOR EACH ROW
WHEN (NEW.status = 'pending' AND NEW.run_id IS NULL)
EXECUTE FUNCTION jobs.fn_enqueue_job()
$sql$);

CREATE OR REPLACE FUNCTION jobs.fn_notify_work() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_TABLE_SCHEMA <> 'jobs' OR TG_TABLE_NAME <> 'tb_workflow_run' THEN
        RAISE EXCEPTION USING ERRCODE = '42501', MESSAGE = 'this is the trigger of jobs.tb_workflow_run alone';
    END IF;
    PERFORM pg_notify('specql_work', '');
    RETURN NULL;
END
$$;

CREATE OR REPLACE TRIGGER tr_workflow_run_notify AFTER INSERT ON jobs.tb_workflow_run FOR EACH ROW
WHEN (NEW.status = 'pending' AND NEW.owner = '')
EXECUTE FUNCTION jobs.fn_notify_work();

-- What belongs to a run goes with it: one statement for all runs of a DELETE, where foreign keys would take one each.
CREATE OR REPLACE FUNCTION jobs.fn_delete_with_run() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
BEGIN
    IF TG_TABLE_SCHEMA <> 'jobs' OR TG_TABLE_NAME <> 'tb_workflow_run' THEN
        RAISE EXCEPTION USING ERRCODE = '42501', MESSAGE = 'this is the trigger of jobs.tb_workflow_run alone';
    END IF;
    DELETE FROM jobs.tb_job_run d USING old_rows o WHERE d.run_id = o.id;
    DELETE FROM jobs.tb_job_log d USING old_rows o WHERE d.run_id = o.id;
    DELETE FROM jobs.tb_job_log_count d USING old_rows o WHERE d.run_id = o.id;
    DELETE FROM jobs.tb_workflow_step d USING old_rows o WHERE d.run_id = o.id;
    DELETE FROM jobs.tb_workflow_signal d USING old_rows o WHERE d.run_id = o.id;
    RETURN NULL;
END
$$;

CREATE OR REPLACE TRIGGER tr_workflow_run_delete AFTER DELETE ON jobs.tb_workflow_run
REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION jobs.fn_delete_with_run();

-- ---------------------------------------------------------------- statistics

-- What the views say of jobs that have ended comes from here, since a scan of all jobs would take too long.
-- Every statement that changes tb_job_run adds rows with what it changes in the sums, but for those of an orchestrator that
-- adds them itself and says so by a setting; jobs.fn_stat_compact puts rows together. Running jobs of a run are left out: they are few, and found through their run.
-- slots and slot_jobs are a histogram of durations, see fn_stat_slot.
CREATE TABLE IF NOT EXISTS jobs.tb_job_stat (
    created_at      timestamptz,
    ended_at        timestamptz,
    execution_type  text,
    service_name    text,
    operation       text,
    runner          text,
    status          text,
    jobs            bigint,
    tried_jobs      bigint,
    attempts        bigint,
    timed_jobs      bigint,
    duration        double precision,
    max_duration    double precision,
    slots           smallint[],
    slot_jobs       bigint[],
    waited_jobs     bigint,
    wait            double precision,
    measured_jobs   bigint,
    cpu_jobs        bigint,
    cpu             double precision,
    percent_jobs    bigint,
    percent         double precision,
    memory_jobs     bigint,
    memory          double precision,
    peak_jobs       bigint,
    peak            double precision,
    max_peak        double precision,
    disk_read       double precision,
    disk_write      double precision,
    network_rx      double precision,
    network_tx      double precision,
    span_jobs       bigint,
    span            double precision,
    oom_jobs        bigint,
    priced_jobs     bigint,
    cost            double precision,
    max_cost        double precision,
    billed          double precision,
    priced_first_at timestamptz,
    priced_last_at  timestamptz,
    last_created_at timestamptz,
    last_ended_at   timestamptz
);

-- fn_number is a number in a JSON object; null where there is none, or something else.
CREATE OR REPLACE FUNCTION jobs.fn_number(object jsonb, key text) RETURNS double precision LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE jsonb_typeof(object -> key) WHEN 'number' THEN (object ->> key)::double precision END
$$;

-- fn_finite is a time; null where it is infinite, with which nothing can be counted.
CREATE OR REPLACE FUNCTION jobs.fn_finite(at timestamptz) RETURNS timestamptz LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN isfinite(at) THEN at END
$$;

-- fn_stat_time is the minute of a recent time, the hour of one some days ago, else the day.
CREATE OR REPLACE FUNCTION jobs.fn_stat_time(at timestamptz) RETURNS timestamptz LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT date_bin(CASE WHEN at > now() - interval '2 hours' THEN interval '1 minute' WHEN at > now() - interval '2 days' THEN interval '1 hour'
        ELSE interval '1 day' END, at, timestamptz '2000-01-01 00:00:00+00')
$$;

-- Durations from a microsecond on are counted in slots that are 2 % apart: the middle of a slot is at most
-- 1 % from every duration in it.
CREATE OR REPLACE FUNCTION jobs.fn_stat_slot(seconds double precision) RETURNS smallint LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT floor(ln(least(greatest(seconds, 1e-6), 1e12) * 1e6) / ln(1.02::double precision))::smallint
$$;
CREATE OR REPLACE FUNCTION jobs.fn_stat_seconds(slot smallint) RETURNS double precision LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT 1e-6 * power(1.02::double precision, slot + 0.5)
$$;

-- Three functions of triggers and two that put the sums together, from one text.
DO $do$
DECLARE
    keys text := 'created_at, ended_at, execution_type, service_name, operation, runner, status';
    -- How each sum follows from a row j with the sign j.sign; m is what the maxima look at: added rows.
    sums text[][] := array[
        ['jobs', 'sum(sign)'],
        ['tried_jobs', 'sum(sign) FILTER (WHERE attempts > 0)'],
        ['attempts', 'sum(sign * attempts) FILTER (WHERE attempts > 0)'],
        ['timed_jobs', 'sum(sign) FILTER (WHERE duration IS NOT NULL)'],
        ['duration', 'sum(sign * duration)'],
        ['max_duration', 'max(duration)'],
        ['waited_jobs', 'sum(sign) FILTER (WHERE wait IS NOT NULL)'],
        ['wait', 'sum(sign * wait)'],
        ['measured_jobs', 'sum(sign) FILTER (WHERE usage IS NOT NULL)'],
        ['cpu_jobs', 'sum(sign) FILTER (WHERE cpu IS NOT NULL)'],
        ['cpu', 'sum(sign * cpu)'],
        ['percent_jobs', 'sum(sign) FILTER (WHERE percent IS NOT NULL)'],
        ['percent', 'sum(sign * percent)'],
        ['memory_jobs', 'sum(sign) FILTER (WHERE memory IS NOT NULL)'],
        ['memory', 'sum(sign * memory)'],
        ['peak_jobs', 'sum(sign) FILTER (WHERE peak IS NOT NULL)'],
        ['peak', 'sum(sign * peak)'],
        ['max_peak', 'max(peak)'],
        ['disk_read', 'sum(sign * jobs.fn_number(usage, ''disk_read_mb''))'],
        ['disk_write', 'sum(sign * jobs.fn_number(usage, ''disk_write_mb''))'],
        ['network_rx', 'sum(sign * jobs.fn_number(usage, ''network_rx_mb''))'],
        ['network_tx', 'sum(sign * jobs.fn_number(usage, ''network_tx_mb''))'],
        ['span_jobs', 'sum(sign) FILTER (WHERE span IS NOT NULL)'],
        ['span', 'sum(sign * span)'],
        ['oom_jobs', 'sum(sign) FILTER (WHERE usage -> ''oom_killed'' = ''true'')'],
        ['priced_jobs', 'sum(sign) FILTER (WHERE cost IS NOT NULL)'],
        ['cost', 'sum(sign * cost)'],
        ['max_cost', 'max(cost)'],
        ['billed', 'sum(sign * jobs.fn_number(usage, ''billed_duration_ms'')) FILTER (WHERE cost IS NOT NULL)'],
        ['priced_first_at', 'min(born_at) FILTER (WHERE cost IS NOT NULL)'],
        ['priced_last_at', 'max(born_at) FILTER (WHERE cost IS NOT NULL)'],
        ['last_created_at', 'max(born_at)'],
        ['last_ended_at', 'max(died_at)']];
    names   text := '';
    inner_  text := '';
    outer_  text := '';
    single  text := '';
    c       text[];
    f       text;
    figures text;
    changes text;
    change  text;
    few     text;
BEGIN
    FOREACH c SLICE 1 IN ARRAY sums LOOP
        f := CASE WHEN c[1] ~ '^(max_|priced_last|last_)' THEN 'max' WHEN c[1] = 'priced_first_at' THEN 'min' ELSE 'sum' END;
        names := names || ', ' || c[1];
        inner_ := inner_ || ', ' || c[2] || ' AS ' || c[1];
        outer_ := outer_ || format(', %s(%I)', f, c[1]);
        single := single || ', ' || regexp_replace(regexp_replace(c[2], '^(sum|min|max)\((.*)\) FILTER \(WHERE (.*)\)$', 'CASE WHEN \3 THEN \2 END'), '^(sum|min|max)\((.*)\)$', '\2');
    END LOOP;
    -- OFFSET 0: each figure is worked out once, however many sums it is in.
    figures := '(SELECT sign, attempts, born_at, died_at, usage, duration, jobs.fn_stat_slot(duration) AS slot,
                    jobs.fn_stat_time(born_at) AS created_at, jobs.fn_stat_time(died_at) AS ended_at,
                    execution_type, service_name, operation, runner, status, wait,
                    jobs.fn_number(usage, ''cpu_seconds'') AS cpu, jobs.fn_number(usage, ''cpu_usage_percent'') AS percent,
                    jobs.fn_number(usage, ''memory_mb'') AS memory, jobs.fn_number(usage, ''peak_memory_mb'') AS peak,
                    jobs.fn_number(usage, ''duration_seconds'') AS span, jobs.fn_number(usage, ''cost_usd'') AS cost
                FROM (SELECT sign, attempts, jobs.fn_finite(created_at::timestamptz) AS born_at,
                        CASE WHEN status IN (''completed'', ''failed'', ''cancelled'') THEN jobs.fn_finite(coalesce(completed_at, updated_at)::timestamptz) END AS died_at,
                        resource_usage AS usage, coalesce(duration_seconds, extract(epoch FROM jobs.fn_finite(completed_at::timestamptz)
                            - jobs.fn_finite(started_at::timestamptz))::double precision) AS duration,
                        extract(epoch FROM jobs.fn_finite(started_at::timestamptz) - jobs.fn_finite(created_at::timestamptz))::double precision AS wait,
                        execution_type, service_name, operation, security_context ->> ''runner'' AS runner, status::text AS status
                    FROM %s AS rows
                    WHERE run_id IS NULL OR status IN (''completed'', ''failed'', ''cancelled'')) AS row_figures OFFSET 0) AS figures';
    -- Grouped by slot first, so that the histogram is small however many rows there are.
    changes := 'INSERT INTO jobs.tb_job_stat (' || keys || names || ', slots, slot_jobs)
        SELECT ' || keys || outer_ || ', array_agg(slot) FILTER (WHERE slot IS NOT NULL), array_agg(timed_jobs) FILTER (WHERE slot IS NOT NULL)
        FROM (SELECT ' || keys || ', slot' || inner_ || '
            FROM ' || figures || '
            GROUP BY ' || keys || ', slot) AS by_slot
        GROUP BY ' || keys;
    -- A row of its own for each: to begin sums takes longer than all else where there is one.
    change := 'INSERT INTO jobs.tb_job_stat (' || keys || names || ', slots, slot_jobs)
        SELECT ' || keys || single || ', CASE WHEN duration IS NOT NULL THEN array[slot] END, CASE WHEN duration IS NOT NULL THEN array[sign::bigint] END
        FROM ' || figures;

    -- A histogram with a slot for each of a few rows.
    few := 'INSERT INTO jobs.tb_job_stat (' || keys || names || ', slots, slot_jobs)
        SELECT ' || keys || inner_ || ', array_agg(slot) FILTER (WHERE duration IS NOT NULL), array_agg(sign::bigint) FILTER (WHERE duration IS NOT NULL)
        FROM ' || figures || '
        GROUP BY ' || keys;

    f := 'CREATE OR REPLACE FUNCTION jobs.%s() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $f$
        BEGIN
            IF TG_TABLE_SCHEMA <> ''jobs'' OR TG_TABLE_NAME <> ''tb_job_run'' THEN
                RAISE EXCEPTION USING ERRCODE = ''42501'', MESSAGE = ''this is the trigger of jobs.tb_job_run alone'';
            END IF;
            %s;
            RETURN NULL;
        END $f$';
    -- What the engine inserts has not ended: a look costs a tenth of the sums.
    EXECUTE format(f, 'fn_stat_insert', 'IF NOT EXISTS (SELECT FROM new_rows WHERE run_id IS NULL OR status IN (''completed'', ''failed'', ''cancelled'')) THEN
                RETURN NULL;
            END IF;
            ' || format(changes, '(SELECT 1 AS sign, * FROM new_rows)'));
    -- Nor was what an orchestrator changes counted before.
    EXECUTE format(f, 'fn_stat_update', 'IF NOT EXISTS (SELECT FROM old_rows WHERE run_id IS NULL OR status IN (''completed'', ''failed'', ''cancelled'')) AND NOT EXISTS (SELECT FROM new_rows OFFSET 1000) THEN
                IF NOT EXISTS (SELECT FROM new_rows OFFSET 1) THEN
                    ' || format(change, '(SELECT 1 AS sign, * FROM new_rows)') || ';
                ELSE
                    ' || format(few, '(SELECT 1 AS sign, * FROM new_rows)') || ';
                END IF;
                RETURN NULL;
            END IF;
            ' || format(changes, '(SELECT 1 AS sign, * FROM new_rows UNION ALL SELECT -1, * FROM old_rows)'));
    EXECUTE format(f, 'fn_stat_delete', format(changes, '(SELECT -1 AS sign, * FROM old_rows)'));

    -- Counts every job anew. It sees jobs and sums as they were at one moment, and takes that moment's sums away:
    -- what others add meanwhile stays. For after what went past the triggers, such as a restored table.
    EXECUTE 'CREATE OR REPLACE FUNCTION jobs.fn_stat_recount() RETURNS void LANGUAGE plpgsql AS $f$
        BEGIN
            PERFORM pg_advisory_xact_lock(7271450120551);
            WITH gone AS (DELETE FROM jobs.tb_job_stat) ' || format(changes, '(SELECT 1 AS sign, * FROM jobs.tb_job_run)') || ';
        END $f$';

    -- Puts rows together, and times that have become old into longer spans. One at a time; false where another is at it.
    EXECUTE 'CREATE OR REPLACE FUNCTION jobs.fn_stat_compact() RETURNS boolean LANGUAGE plpgsql AS $f$
        BEGIN
            IF NOT pg_try_advisory_xact_lock(7271450120551) THEN
                RETURN false;
            END IF;
            WITH gone AS (DELETE FROM jobs.tb_job_stat RETURNING *),
            spans AS (SELECT ' || replace(replace(keys, 'created_at', 'jobs.fn_stat_time(created_at) AS created_at'), 'ended_at', 'jobs.fn_stat_time(ended_at) AS ended_at')
                || names || ' FROM gone),
            histogram AS (SELECT execution_type, slot, sum(n) AS n FROM gone, unnest(slots, slot_jobs) AS u (slot, n) GROUP BY execution_type, slot)
            INSERT INTO jobs.tb_job_stat (' || keys || names || ', slots, slot_jobs)
            SELECT ' || keys || outer_ || ', NULL::smallint[], NULL::bigint[] FROM spans GROUP BY ' || keys || ' HAVING sum(jobs) <> 0
            UNION ALL
            SELECT NULL, NULL, execution_type, NULL, NULL, NULL, NULL' || repeat(', NULL', array_length(sums, 1)) || ', array_agg(slot), array_agg(n)
            FROM histogram WHERE n <> 0 GROUP BY execution_type;
            RETURN true;
        END $f$';
END
$do$;

-- Counting begins with the triggers. What was there before is counted once, after them.
CALL jobs.pr_patiently($sql$
CREATE OR REPLACE TRIGGER tr_job_run_stat_insert AFTER INSERT ON jobs.tb_job_run
REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT
WHEN (jobs.fn_left_to_triggers('all'))
EXECUTE FUNCTION jobs.fn_stat_insert()
$sql$);
CALL jobs.pr_patiently($sql$
CREATE OR REPLACE TRIGGER tr_job_run_stat_update AFTER UPDATE ON jobs.tb_job_run
REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT
WHEN (jobs.fn_left_to_triggers('all'))
EXECUTE FUNCTION jobs.fn_stat_update()
$sql$);
CALL jobs.pr_patiently($sql$
CREATE OR REPLACE TRIGGER tr_job_run_stat_delete AFTER DELETE ON jobs.tb_job_run
REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION jobs.fn_stat_delete()
$sql$);

CREATE OR REPLACE FUNCTION jobs.fn_stat_truncate() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_TABLE_SCHEMA <> 'jobs' OR TG_TABLE_NAME <> 'tb_job_run' THEN
        RAISE EXCEPTION USING ERRCODE = '42501', MESSAGE = 'this is the trigger of jobs.tb_job_run alone';
    END IF;
    DELETE FROM jobs.tb_job_stat;
    RETURN NULL;
END
$$;
CALL jobs.pr_patiently($sql$
CREATE OR REPLACE TRIGGER tr_job_run_stat_truncate AFTER TRUNCATE ON jobs.tb_job_run
FOR EACH STATEMENT EXECUTE FUNCTION jobs.fn_stat_truncate()
$sql$);

-- ---------------------------------------------------------------- the six views
-- Columns keep their names and meanings on every database. Here, percentiles are within 1 %, and 'the last hour' begins with a minute,
-- 'the last day' with an hour.

-- Two functions look where an index leads. They are functions for the sake of their settings: a planner without
-- statistics would scan every job, and compile what takes milliseconds. OFFSET 0 has jobs looked up by run.

-- fn_may_read fails for a role that may read none of the views that the two functions are for: they read with the rights of
-- the schema's owner, so that the right to read a view is enough. The role is the one that SET ROLE has set, else the one that logged in.
CREATE OR REPLACE FUNCTION jobs.fn_may_read() RETURNS boolean LANGUAGE plpgsql STABLE AS $$
DECLARE
    caller name := coalesce(nullif(current_setting('role'), 'none'), session_user);
BEGIN
    IF EXISTS (SELECT FROM pg_catalog.pg_class k JOIN pg_catalog.pg_namespace n ON n.oid = k.relnamespace
        WHERE n.nspname = 'jobs' AND k.relname IN ('v_job_queue_health', 'v_execution_performance_by_type', 'v_runner_failure_patterns')
          AND has_any_column_privilege(caller, k.oid, 'SELECT'))
    THEN
        RETURN true;
    END IF;
    RAISE EXCEPTION USING ERRCODE = '42501', MESSAGE = format('%s may not read the views of the schema jobs', caller),
        HINT = format('GRANT SELECT ON jobs.v_job_queue_health, jobs.v_execution_performance_by_type, jobs.v_runner_failure_patterns TO %I', caller);
END
$$;

-- Jobs that have not ended: those of runs that have not, and those that clients inserted.
CREATE OR REPLACE FUNCTION jobs.fn_active_jobs() RETURNS TABLE (
    id uuid, run_id uuid, execution_type text, status text, created_at timestamptz, started_at timestamptz,
    next_attempt_at timestamptz, timeout_seconds double precision, max_attempts integer)
LANGUAGE sql STABLE ROWS 100 SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $$
    SELECT j.id, j.run_id, j.execution_type, j.status::text, jobs.fn_finite(j.created_at::timestamptz), jobs.fn_finite(j.started_at::timestamptz),
           j.next_attempt_at, j.timeout_seconds::double precision, j.max_attempts::integer
    FROM jobs.tb_workflow_run r CROSS JOIN LATERAL (SELECT * FROM jobs.tb_job_run o WHERE o.run_id = r.id OFFSET 0) j
    WHERE r.status IN ('pending', 'running') AND j.status IN ('pending', 'running') AND (SELECT jobs.fn_may_read())
    UNION ALL
    SELECT j.id, j.run_id, j.execution_type, j.status::text, jobs.fn_finite(j.created_at::timestamptz), jobs.fn_finite(j.started_at::timestamptz),
           j.next_attempt_at, j.timeout_seconds::double precision, j.max_attempts::integer
    FROM jobs.tb_job_queue q JOIN jobs.tb_job_run j ON j.id = q.job_id
    WHERE j.run_id IS NULL AND j.status IN ('pending', 'running') AND (SELECT jobs.fn_may_read())
$$;

CREATE OR REPLACE FUNCTION jobs.fn_failures() RETURNS TABLE (
    execution_type text, service_name text, operation text, error_code text, failures bigint, affected_runs bigint,
    avg_attempts double precision, first_seen_at timestamptz, last_seen_at timestamptz, last_error_message text)
LANGUAGE sql STABLE ROWS 100 SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET jit = off AS $$
    SELECT f.execution_type, f.service_name, f.operation, f.error_code, f.failures, f.affected_runs, f.avg_attempts,
           f.first_seen_at, f.last_seen_at, (SELECT j.error_message FROM jobs.tb_job_run j WHERE j.id = f.last_id)
    FROM (SELECT j.execution_type, j.service_name, j.operation, j.error_code,
              count(*) AS failures,
              count(DISTINCT j.run_id) AS affected_runs,
              avg(j.attempts)::double precision AS avg_attempts,
              min(coalesce(j.completed_at, j.updated_at))::timestamptz AS first_seen_at,
              max(coalesce(j.completed_at, j.updated_at))::timestamptz AS last_seen_at,
              (array_agg(j.id ORDER BY coalesce(j.completed_at, j.updated_at) DESC, j.id DESC))[1] AS last_id
          FROM jobs.tb_job_run j
          WHERE j.status = 'failed' AND j.error_code IS NOT NULL AND (SELECT jobs.fn_may_read())
          GROUP BY j.execution_type, j.service_name, j.operation, j.error_code) f
$$;

-- One row an execution type. success_rate is over ended jobs, 0 to 1; percentiles are by
-- nearest rank over the durations of ended jobs.
CREATE OR REPLACE VIEW jobs.v_execution_performance_by_type AS
WITH slots AS (
    SELECT execution_type, slot, sum(n) AS n
    FROM jobs.tb_job_stat, unnest(slots, slot_jobs) AS u (slot, n)
    GROUP BY execution_type, slot
), ranked AS (
    SELECT execution_type, slot, sum(n) OVER (PARTITION BY execution_type ORDER BY slot) AS upto, sum(n) OVER (PARTITION BY execution_type) AS n
    FROM slots WHERE n > 0
), percentiles AS (
    SELECT execution_type,
           jobs.fn_stat_seconds(min(slot) FILTER (WHERE upto >= n * 0.50)) AS p50,
           jobs.fn_stat_seconds(min(slot) FILTER (WHERE upto >= n * 0.95)) AS p95,
           jobs.fn_stat_seconds(min(slot) FILTER (WHERE upto >= n * 0.99)) AS p99
    FROM ranked
    GROUP BY execution_type
), active AS (
    SELECT execution_type, count(*) AS jobs, max(created_at) AS last_created_at
    FROM jobs.fn_active_jobs()
    WHERE run_id IS NOT NULL
    GROUP BY execution_type
), ended AS (
    SELECT execution_type,
           coalesce(sum(jobs), 0) AS jobs,
           coalesce(sum(jobs) FILTER (WHERE status = 'completed'), 0) AS completed,
           coalesce(sum(jobs) FILTER (WHERE status = 'failed'), 0) AS failed,
           coalesce(sum(jobs) FILTER (WHERE status = 'cancelled'), 0) AS cancelled,
           coalesce(sum(jobs) FILTER (WHERE status IN ('pending', 'running')), 0) AS loose,
           sum(duration) / nullif(sum(timed_jobs), 0) AS avg_duration, max(max_duration) AS max_duration,
           sum(attempts) AS attempts, sum(tried_jobs) AS tried_jobs, max(last_created_at) AS last_created_at
    FROM jobs.tb_job_stat
    GROUP BY execution_type
)
SELECT execution_type,
       (coalesce(e.jobs, 0) + coalesce(a.jobs, 0))::bigint AS total_jobs,
       coalesce(e.completed, 0)::bigint AS completed, coalesce(e.failed, 0)::bigint AS failed, coalesce(e.cancelled, 0)::bigint AS cancelled,
       (coalesce(e.loose, 0) + coalesce(a.jobs, 0))::bigint AS active,
       (e.completed / nullif(e.completed + e.failed + e.cancelled, 0))::double precision AS success_rate,
       e.avg_duration AS avg_duration_seconds, least(p.p50, e.max_duration) AS p50_duration_seconds, least(p.p95, e.max_duration) AS p95_duration_seconds,
       least(p.p99, e.max_duration) AS p99_duration_seconds, e.max_duration AS max_duration_seconds,
       (e.attempts / nullif(e.tried_jobs, 0))::double precision AS avg_attempts,
       greatest(e.last_created_at, a.last_created_at) AS last_job_at
FROM ended e FULL JOIN active a USING (execution_type) LEFT JOIN percentiles p USING (execution_type)
WHERE coalesce(e.jobs, 0) + coalesce(a.jobs, 0) > 0
ORDER BY execution_type;

-- One row a runner and execution type. Only jobs with measured figures count; a figure that
-- no job measured is null.
CREATE OR REPLACE VIEW jobs.v_resource_usage_by_runner AS
SELECT execution_type, runner,
       sum(measured_jobs)::bigint AS measured_jobs,
       sum(cpu) / nullif(sum(cpu_jobs), 0)::double precision AS avg_cpu_seconds,
       sum(cpu) AS total_cpu_seconds,
       sum(percent) / nullif(sum(percent_jobs), 0)::double precision AS avg_cpu_usage_percent,
       sum(memory) / nullif(sum(memory_jobs), 0)::double precision AS avg_memory_mb,
       sum(peak) / nullif(sum(peak_jobs), 0)::double precision AS avg_peak_memory_mb,
       max(max_peak) AS max_peak_memory_mb,
       sum(disk_read) AS total_disk_read_mb,
       sum(disk_write) AS total_disk_write_mb,
       sum(network_rx) AS total_network_rx_mb,
       sum(network_tx) AS total_network_tx_mb,
       sum(span) / nullif(sum(span_jobs), 0)::double precision AS avg_duration_seconds,
       coalesce(sum(oom_jobs), 0)::bigint AS oom_killed_jobs,
       max(last_ended_at) AS last_job_at
FROM jobs.tb_job_stat
WHERE measured_jobs IS NOT NULL
GROUP BY execution_type, runner
HAVING sum(measured_jobs) > 0
ORDER BY execution_type, runner;

-- One row a way of failing: operation and error code. failure_rate is over the ended jobs of
-- the operation; last_error_message is the newest.
CREATE OR REPLACE VIEW jobs.v_runner_failure_patterns AS
WITH ended AS (
    SELECT execution_type, service_name, operation, sum(jobs) AS n
    FROM jobs.tb_job_stat
    WHERE status IN ('completed', 'failed', 'cancelled')
    GROUP BY execution_type, service_name, operation
)
SELECT f.execution_type, f.service_name, f.operation, f.error_code, f.failures, f.affected_runs,
       (f.failures / nullif(e.n, 0))::double precision AS failure_rate,
       f.avg_attempts, f.first_seen_at, f.last_seen_at, f.last_error_message
FROM jobs.fn_failures() f LEFT JOIN ended e
  ON e.execution_type = f.execution_type AND e.service_name = f.service_name AND e.operation = f.operation
ORDER BY f.failures DESC, f.last_seen_at DESC;

-- One row an execution type. waiting_for_retry are running jobs between two attempts; overdue
-- are running jobs past all the time that their attempts may take.
CREATE OR REPLACE VIEW jobs.v_job_queue_health AS
WITH active AS (
    SELECT execution_type,
           count(*) FILTER (WHERE status = 'pending') AS pending,
           count(*) FILTER (WHERE status = 'running') AS running,
           count(*) FILTER (WHERE next_attempt_at > now()) AS waiting_for_retry,
           count(*) FILTER (WHERE status = 'running' AND timeout_seconds > 0
               AND extract(epoch FROM now() - started_at) > timeout_seconds * greatest(max_attempts, 1)) AS overdue,
           max(extract(epoch FROM now() - created_at)) FILTER (WHERE status = 'pending')::double precision AS oldest_pending_seconds,
           max(extract(epoch FROM now() - started_at)) FILTER (WHERE status = 'running')::double precision AS longest_running_seconds
    FROM jobs.fn_active_jobs()
    GROUP BY execution_type
), strays AS (
    -- Running jobs of no run: nobody of this system runs them.
    SELECT execution_type, sum(jobs) AS running
    FROM jobs.tb_job_stat
    WHERE status = 'running'
    GROUP BY execution_type
), ended AS (
    SELECT execution_type,
           sum(jobs) FILTER (WHERE status = 'completed' AND ended_at >= date_trunc('minute', now() - interval '1 hour')) AS completed,
           sum(jobs) FILTER (WHERE status = 'failed' AND ended_at >= date_trunc('minute', now() - interval '1 hour')) AS failed,
           sum(wait) FILTER (WHERE created_at >= date_trunc('minute', now() - interval '1 hour')) AS wait,
           sum(waited_jobs) FILTER (WHERE created_at >= date_trunc('minute', now() - interval '1 hour')) AS waited_jobs
    FROM jobs.tb_job_stat
    GROUP BY execution_type
)
SELECT execution_type,
       coalesce(a.pending, 0) AS pending, (coalesce(a.running, 0) + coalesce(s.running, 0))::bigint AS running,
       coalesce(a.waiting_for_retry, 0) AS waiting_for_retry, coalesce(a.overdue, 0) AS overdue,
       a.oldest_pending_seconds, a.longest_running_seconds,
       coalesce(e.completed, 0)::bigint AS completed_last_hour, coalesce(e.failed, 0)::bigint AS failed_last_hour,
       e.wait / nullif(e.waited_jobs, 0)::double precision AS avg_wait_seconds_last_hour
FROM ended e FULL JOIN active a USING (execution_type) LEFT JOIN strays s USING (execution_type)
WHERE execution_type IS NOT NULL
ORDER BY execution_type;

-- One row a service with a price: only jobs whose cost is known count.
CREATE OR REPLACE VIEW jobs.v_cost_by_service AS
SELECT service_name, execution_type,
       sum(priced_jobs)::bigint AS priced_jobs,
       sum(cost) AS total_cost_usd,
       sum(cost) / nullif(sum(priced_jobs), 0)::double precision AS avg_cost_usd,
       max(max_cost) AS max_cost_usd,
       sum(billed) AS billed_duration_ms,
       coalesce(sum(cost) FILTER (WHERE created_at >= date_trunc('minute', now() - interval '1 hour')), 0) AS cost_usd_last_hour,
       coalesce(sum(cost) FILTER (WHERE created_at >= date_trunc('hour', now() - interval '1 day')), 0) AS cost_usd_last_day,
       min(priced_first_at) AS first_job_at,
       max(priced_last_at) AS last_job_at
FROM jobs.tb_job_stat
WHERE priced_jobs IS NOT NULL
GROUP BY service_name, execution_type
HAVING sum(priced_jobs) > 0
ORDER BY total_cost_usd DESC, service_name;

-- One row a limit: what counts at it now.
CREATE OR REPLACE VIEW jobs.v_limit_usage AS
SELECT l.key, l.window_seconds, l.max_attempts, coalesce(sum(s.attempts), 0)::bigint AS attempts,
       coalesce(sum(s.attempts) FILTER (WHERE s.ended_at IS NULL), 0)::bigint AS in_flight,
       l.max_cost AS max_cost_usd, coalesce(sum(s.cost), 0) AS cost_usd, coalesce(sum(s.cost) FILTER (WHERE s.ended_at IS NULL), 0) AS reserved_usd,
       CASE WHEN l.closed_until > now() THEN l.closed_until END AS closed_until,
       CASE WHEN l.closed_until > now() THEN l.closed_reason END AS closed_reason
FROM jobs.tb_limit l LEFT JOIN jobs.tb_limit_slot s ON s.key = l.key AND s.until > now()
GROUP BY l.key;

-- One row a check that denied; a violation without recorded checks has one row too.
CREATE OR REPLACE VIEW jobs.v_security_violations AS
SELECT j.id AS job_id, j.run_id, j.step_path, j.service_name, j.operation, j.execution_type,
       c.value ->> 'rule' AS rule,
       c.value ->> 'subject' AS attempted,
       coalesce(c.value ->> 'detail', j.error_message) AS detail,
       j.security_context ->> 'policy_digest' AS policy_digest,
       j.security_context ->> 'runner' AS runner,
       coalesce(j.security_context ->> 'subject', j.triggered_by::text, r.triggered_by) AS subject,
       coalesce(j.tenant_id::text, r.tenant_id) AS tenant_id,
       coalesce(j.completed_at, j.updated_at) AS occurred_at
FROM jobs.tb_job_run j
LEFT JOIN jobs.tb_workflow_run r ON r.id = j.run_id
LEFT JOIN LATERAL jsonb_array_elements(CASE jsonb_typeof(j.security_context -> 'checks') WHEN 'array' THEN j.security_context -> 'checks' END) AS c (value)
    ON c.value -> 'allowed' IS DISTINCT FROM 'true'
WHERE j.error_code = 'POLICY_VIOLATION'
ORDER BY occurred_at DESC, j.id;

-- One row a check that denied, of every job that a policy ended or waits for: violations and used up budgets, which have
-- a row without recorded checks too, and limits and rates of a policy. rule_source is the rule's place in the registry, allowed_by
-- the changes of policies that together would allow it.
CREATE OR REPLACE VIEW jobs.v_denials AS
SELECT j.id AS job_id, j.run_id, j.step_path, j.service_name, j.operation, j.execution_type, j.status, j.error_code,
       c.value ->> 'rule' AS rule,
       c.value ->> 'rule_source' AS rule_source,
       c.value ->> 'subject' AS attempted,
       coalesce(c.value ->> 'detail', j.error_message) AS detail,
       c.value -> 'allowed_by' AS allowed_by,
       j.security_context ->> 'policy_digest' AS policy_digest,
       j.security_context ->> 'runner' AS runner,
       coalesce(j.security_context ->> 'subject', j.triggered_by::text, r.triggered_by) AS subject,
       coalesce(j.tenant_id::text, r.tenant_id) AS tenant_id,
       coalesce(j.completed_at, j.updated_at) AS occurred_at
FROM jobs.tb_job_run j
LEFT JOIN jobs.tb_workflow_run r ON r.id = j.run_id
LEFT JOIN LATERAL jsonb_array_elements(CASE jsonb_typeof(j.security_context -> 'checks') WHEN 'array' THEN j.security_context -> 'checks' END) AS c (value)
    ON c.value -> 'allowed' IS DISTINCT FROM 'true'
WHERE j.error_code IN ('POLICY_VIOLATION', 'BUDGET_EXCEEDED') OR j.error_code IN ('RATE_LIMITED', 'RESOURCE_EXCEEDED') AND c.value IS NOT NULL
ORDER BY occurred_at DESC, j.id;

-- ---------------------------------------------------------------- what was there before

-- Failures of old get the code that later ones have, pending rows are queued, and everything is counted: once, and
-- again where the version before this one was another.
DO $$
BEGIN
    IF EXISTS (SELECT FROM jobs.tb_schema_version WHERE version = 1) THEN
        RETURN;
    END IF;
    UPDATE jobs.tb_job_run SET error_code = 'INTERNAL' WHERE status = 'failed' AND error_code IS NULL;
END
$$;

-- fn_enqueue_pending queues the pending jobs of no run that are not in the queue, such as those that were there before
-- or that were restored past the triggers, and returns how many there were.
CREATE OR REPLACE FUNCTION jobs.fn_enqueue_pending() RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    n bigint;
BEGIN
    INSERT INTO jobs.tb_job_queue (job_id)
    SELECT j.id FROM jobs.tb_job_run j WHERE j.status = 'pending' AND j.run_id IS NULL
      AND NOT EXISTS (SELECT FROM jobs.tb_job_queue q WHERE q.job_id = j.id) ORDER BY j.created_at, j.id
    ON CONFLICT DO NOTHING;
    GET DIAGNOSTICS n = ROW_COUNT;
    IF n > 0 THEN
        PERFORM pg_notify('specql_work', '');
    END IF;
    RETURN n;
END
$$;

DO $$
BEGIN
    PERFORM jobs.fn_enqueue_pending();
END
$$;

-- What nobody can work with is refused to everybody, and what only an orchestrator writes is refused to whoever has not an
-- orchestrator's rights: else the right to insert would be the right to end a step of a run of somebody else. Rows that are
-- there already are not looked at. Constraints of the table would be read anew for each statement, some thirty of them. The functions have a search path of their own: in a client's,
-- <= may be the client's.
DO $do$
DECLARE
    c       record;
    -- The table, what is an orchestrator's to set and how that is told, and what else is seen to.
    tables  text[][] := array[
        ['tb_workflow_run', 'NEW.status <> ''pending'' OR NEW.owner <> '''' OR NEW.epoch <> 0 OR NEW.retries <> 0 OR NEW.sequence <> 0
                OR NEW.snapshot IS NOT NULL OR NEW.entity_row IS NOT NULL',
            'a client inserts pending runs: status, owner, epoch, retries, sequence, snapshot and entity_row are for orchestrators to set', ''],
        ['tb_job_run', 'NEW.run_id IS NOT NULL OR NEW.step_path IS NOT NULL OR NEW.generation <> 0 OR NEW.sequence <> 0 OR NEW.by_sql IS FALSE',
            'a client inserts jobs of no run: run_id, step_path, generation, sequence and by_sql are for orchestrators to set', '
            -- A failure has a code, so that failures are found without a scan.
            IF NEW.status = ''failed'' AND NEW.error_code IS NULL THEN
                NEW.error_code := ''INTERNAL'';
            END IF;
            -- An old table may have more states than five: nothing moves to them.
            IF TG_OP = ''UPDATE'' AND NEW.status <> OLD.status
                AND (OLD.status NOT IN (''pending'', ''running'') OR NEW.status NOT IN (''running'', ''completed'', ''failed'', ''cancelled''))
            THEN
                RAISE EXCEPTION USING ERRCODE = ''SQ001'', MESSAGE = ''a job moves from pending to running to completed, failed or cancelled'';
            END IF;']];
    t       text[];
    rules   text;
    checks  text;
BEGIN
    FOREACH t SLICE 1 IN ARRAY tables LOOP
        rules := 'true';
        checks := '';
        FOR c IN
            SELECT 'ck_' || substr(t[1], 4) || '_' || a.attname AS name, a.attname AS attribute,
                CASE WHEN a.atttypid IN ('timestamptz'::regtype, 'timestamp'::regtype)
                        THEN format('NEW.%I BETWEEN %L AND %L', a.attname, '0001-01-01 00:00:00+00', '9999-12-31 00:00:00+00')
                    WHEN a.attname IN ('epoch', 'sequence') THEN format('NEW.%I BETWEEN 0 AND 9007199254740992', a.attname)
                    WHEN a.attname IN ('attempts', 'max_attempts', 'generation', 'retries', 'error_attempts')
                        THEN format('NEW.%I BETWEEN 0 AND 1000000', a.attname)
                    WHEN a.attname IN ('service_name', 'operation', 'execution_type', 'entity', 'action', 'entity_schema', 'owner')
                        THEN format('octet_length(NEW.%I) <= 1000', a.attname)
                    ELSE format('octet_length(NEW.%I) <= 10000', a.attname) END AS rule
            FROM pg_attribute a WHERE a.attrelid = ('jobs.' || t[1])::regclass AND a.attnum > 0 AND NOT a.attisdropped
              AND (a.atttypid IN ('timestamptz'::regtype, 'timestamp'::regtype) AND a.attname IN ('created_at', 'started_at', 'completed_at', 'updated_at', 'next_attempt_at')
                  OR a.attname IN ('epoch', 'sequence', 'attempts', 'max_attempts', 'generation', 'retries', 'error_attempts')
                  OR a.atttypid IN ('text'::regtype, 'varchar'::regtype) AND a.attname IN ('service_name', 'operation', 'execution_type', 'entity', 'action',
                      'entity_schema', 'owner', 'entity_id', 'correlation_id', 'entity_type', 'entity_pk', 'triggered_by', 'tenant_id', 'traceparent', 'snapshot', 'error_code'))
            ORDER BY a.attname
        LOOP
            rules := rules || ' AND ' || c.rule;
            checks := checks || format('
            IF NOT (%s) THEN
                RAISE EXCEPTION USING ERRCODE = ''check_violation'', SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME, COLUMN = %L, CONSTRAINT = %L,
                    MESSAGE = ''new row for relation "'' || TG_TABLE_NAME || ''" violates check constraint "%s"'', DETAIL = %L;
            END IF;', c.rule, c.attribute, c.name, c.name, replace(c.rule, 'NEW.', ''));
        END LOOP;
        EXECUTE format('CREATE OR REPLACE FUNCTION jobs.%I() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $f$
        BEGIN
            IF TG_OP = ''INSERT'' AND (%s) AND NOT has_table_privilege(''jobs.tb_orchestrator''::regclass, ''INSERT'') THEN
                RAISE EXCEPTION USING ERRCODE = ''42501'', MESSAGE = %L;
            END IF;%s
            IF (%s) IS NOT FALSE THEN
                RETURN NEW;
            END IF;%s
            RETURN NEW;
        END $f$', 'fn_check_' || substr(t[1], 4), t[2], t[3], t[4], rules, checks);
    END LOOP;
END
$do$;

CALL jobs.pr_patiently($sql$
CREATE OR REPLACE TRIGGER tr_workflow_run_check BEFORE INSERT OR UPDATE OF entity, action, entity_schema, entity_id, owner, epoch, retries, snapshot,
    correlation_id, tenant_id, triggered_by, traceparent, error_code, error_attempts, created_at, started_at, completed_at ON jobs.tb_workflow_run FOR EACH ROW
WHEN (jobs.fn_left_to_triggers('yes'))
EXECUTE FUNCTION jobs.fn_check_workflow_run()
$sql$);

CALL jobs.pr_patiently($sql$
CREATE OR REPLACE TRIGGER tr_job_run_check BEFORE INSERT OR UPDATE ON jobs.tb_job_run FOR EACH ROW
WHEN (jobs.fn_left_to_triggers('all'))
EXECUTE FUNCTION jobs.fn_check_job_run()
$sql$);

-- What these rules were before, now that they hold: constraints of the tables, and triggers. Each table is let go before the next.
DO $$
DECLARE
    c record;
    t text;
BEGIN
    FOREACH t IN ARRAY array['tb_workflow_run', 'tb_job_run'] LOOP
        FOR c IN
            SELECT string_agg(format('DROP CONSTRAINT %I', k.conname), ', ') AS gone
            FROM pg_constraint k JOIN pg_attribute a ON a.attrelid = k.conrelid AND k.conkey = array[a.attnum]
            WHERE k.conrelid = ('jobs.' || t)::regclass AND k.contype = 'c' AND NOT k.convalidated
              AND k.conname = 'ck_' || substr(t, 4) || '_' || a.attname AND a.attname <> 'status'
            HAVING count(*) > 0
        LOOP
            CALL jobs.pr_patiently(format('ALTER TABLE jobs.%I %s', t, c.gone));
        END LOOP;
        COMMIT;
    END LOOP;
    FOR c IN SELECT tgname AS name, tgrelid::regclass AS on_table FROM pg_trigger
        WHERE (tgrelid, tgname) IN (('jobs.tb_workflow_run'::regclass, 'tr_workflow_run_insert'), ('jobs.tb_job_run'::regclass, 'tr_job_run_insert'),
            ('jobs.tb_job_run'::regclass, 'tr_job_run_status'), ('jobs.tb_job_run'::regclass, 'tr_job_run_error_code'))
    LOOP
        CALL jobs.pr_patiently(format('DROP TRIGGER %I ON %s', c.name, c.on_table));
        COMMIT;
    END LOOP;
END
$$;
DROP FUNCTION IF EXISTS jobs.fn_refuse_insert();
DROP FUNCTION IF EXISTS jobs.fn_job_error_code();

-- Whoever may call a function that runs with its owner's rights may also make it a trigger of a table of his own.
DO $$
DECLARE
    c record;
BEGIN
    FOR c IN SELECT p.oid::regprocedure AS name FROM pg_proc p
        WHERE p.pronamespace = 'jobs'::regnamespace AND p.prosecdef AND p.prorettype = 'trigger'::regtype AND p.proname ~ '^fn_'
          AND has_function_privilege('public', p.oid, 'EXECUTE')
    LOOP
        EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', c.name);
    END LOOP;
END
$$;

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM jobs.tb_schema_version WHERE version = 1) THEN
        PERFORM jobs.fn_stat_recount();
    END IF;
END
$$;

-- The lowest version that a program has to know to work with what this file makes. It is raised by a change that older
-- programs cannot live with, and by no other: so they go on while the schema is upgraded, and can be gone back to.
ALTER TABLE jobs.tb_schema_version ALTER COLUMN oldest SET DEFAULT 4;

-- The versions that a database now has: every change to this file is one more. This statement is the last.
INSERT INTO jobs.tb_schema_version (version, name) VALUES
    (1, '001_multi_execution'),
    (2, '002_limits'),
    (3, '003_alerts'),
    (4, '004_denials'),
    (5, '005_traceparent'),
    (6, '006_limits'),
    (7, '007_checks'),
    (8, '008_triggers'),
    (9, '009_sums')
ON CONFLICT DO NOTHING;
