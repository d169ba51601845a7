-- Tables of runs, their jobs and steps. Times are UTC text as SQLite's own functions write
-- them, 'YYYY-MM-DD HH:MM:SS.ffffff', so that they sort and compare with datetime('now').
-- The file is attached as jobs.

CREATE TABLE jobs.tb_workflow_run (
    id               TEXT    NOT NULL PRIMARY KEY CHECK (id <> ''),
    entity           TEXT,
    action           TEXT,
    entity_schema    TEXT,
    entity_id        TEXT,
    status           TEXT    NOT NULL DEFAULT 'pending'
                     CHECK (status IN ('pending', 'running', 'completed', 'failed', 'cancelled')),
    owner            TEXT    NOT NULL DEFAULT '',
    epoch            INTEGER NOT NULL DEFAULT 0,
    retries          INTEGER NOT NULL DEFAULT 0,
    sequence         INTEGER NOT NULL DEFAULT 0,
    cancel_requested INTEGER NOT NULL DEFAULT 0 CHECK (cancel_requested IN (0, 1)),
    cancel_reason    TEXT,
    snapshot         TEXT,
    idempotency_key  TEXT,
    correlation_id   TEXT,
    tenant_id        TEXT,
    triggered_by     TEXT,
    error_code       TEXT,
    error_message    TEXT,
    error_retryable  INTEGER,
    error_attempts   INTEGER,
    created_at       TEXT    NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now') || '000'),
    started_at       TEXT,
    completed_at     TEXT,
    updated_at       TEXT    NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now') || '000'),
    -- The wide columns come last: what is before them is read without their pages.
    output_data      TEXT    CHECK (output_data IS NULL OR json_valid(output_data)),
    entity_row       TEXT    CHECK (entity_row IS NULL OR json_valid(entity_row)),
    input_data       TEXT    CHECK (input_data IS NULL OR json_valid(input_data))
);

CREATE UNIQUE INDEX jobs.ux_workflow_run_idempotency_key
    ON tb_workflow_run (coalesce(tenant_id, ''), idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX jobs.ix_workflow_run_active ON tb_workflow_run (id, owner) WHERE status IN ('pending', 'running');

CREATE TABLE jobs.tb_job_run (
    id               TEXT    NOT NULL PRIMARY KEY CHECK (id <> ''),
    identifier       TEXT    NOT NULL UNIQUE,
    idempotency_key  TEXT,
    run_id           TEXT    REFERENCES tb_workflow_run (id) ON DELETE CASCADE,
    step_path        TEXT,
    generation       INTEGER NOT NULL DEFAULT 0,
    service_name     TEXT    NOT NULL,
    operation        TEXT    NOT NULL,
    execution_type   TEXT    NOT NULL DEFAULT 'http',
    status           TEXT    NOT NULL DEFAULT 'pending'
                     CHECK (status IN ('pending', 'running', 'completed', 'failed', 'cancelled')),
    attempts         INTEGER NOT NULL DEFAULT 0,
    max_attempts     INTEGER NOT NULL DEFAULT 1,
    next_attempt_at  TEXT,
    timeout_seconds  REAL,
    duration_seconds REAL,
    sequence         INTEGER NOT NULL DEFAULT 0,
    error_code       TEXT,
    error_message    TEXT,
    error_retryable  INTEGER,
    error_attempts   INTEGER,
    tenant_id        TEXT,
    triggered_by     TEXT,
    correlation_id   TEXT,
    entity_type      TEXT,
    entity_pk        TEXT,
    created_at       TEXT    NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now') || '000'),
    started_at       TEXT,
    completed_at     TEXT,
    updated_at       TEXT    NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now') || '000'),
    resource_usage   TEXT    CHECK (resource_usage IS NULL OR json_valid(resource_usage)),
    security_context TEXT    CHECK (security_context IS NULL OR json_valid(security_context)),
    runner_config    TEXT    CHECK (runner_config IS NULL OR json_valid(runner_config)),
    output_data      TEXT    CHECK (output_data IS NULL OR json_valid(output_data)),
    input_data       TEXT    CHECK (input_data IS NULL OR json_valid(input_data))
);

CREATE INDEX jobs.ix_job_run_run ON tb_job_run (run_id, created_at, id);
CREATE INDEX jobs.ix_job_run_created ON tb_job_run (created_at);
CREATE INDEX jobs.ix_job_run_active ON tb_job_run (execution_type) WHERE status IN ('pending', 'running');
CREATE INDEX jobs.ix_job_run_error ON tb_job_run (error_code) WHERE error_code IS NOT NULL;

CREATE TABLE jobs.tb_workflow_step (
    run_id          TEXT    NOT NULL REFERENCES tb_workflow_run (id) ON DELETE CASCADE,
    step_path       TEXT    NOT NULL,
    generation      INTEGER NOT NULL DEFAULT 0,
    kind            TEXT    NOT NULL,
    status          TEXT    NOT NULL DEFAULT 'pending'
                    CHECK (status IN ('pending', 'running', 'completed', 'failed', 'cancelled')),
    name            TEXT,
    until           TEXT,
    sequence        INTEGER NOT NULL DEFAULT 0,
    error_code      TEXT,
    error_message   TEXT,
    error_retryable INTEGER,
    error_attempts  INTEGER,
    started_at      TEXT,
    completed_at    TEXT,
    data            TEXT    CHECK (data IS NULL OR json_valid(data)),
    PRIMARY KEY (run_id, step_path, generation)
) WITHOUT ROWID;

CREATE TABLE jobs.tb_workflow_signal (
    id         INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    run_id     TEXT    NOT NULL REFERENCES tb_workflow_run (id) ON DELETE CASCADE,
    name       TEXT    NOT NULL,
    taken_by   TEXT,
    created_at TEXT    NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now') || '000'),
    payload    TEXT    CHECK (payload IS NULL OR json_valid(payload))
);

CREATE INDEX jobs.ix_workflow_signal_run ON tb_workflow_signal (run_id, id);

CREATE TABLE jobs.tb_job_log (
    run_id     TEXT    NOT NULL REFERENCES tb_workflow_run (id) ON DELETE CASCADE,
    sequence   INTEGER NOT NULL,
    job_id     TEXT    NOT NULL,
    step_path  TEXT    NOT NULL,
    attempt    INTEGER NOT NULL,
    line       INTEGER NOT NULL,
    stream     TEXT    NOT NULL,
    text       TEXT    NOT NULL,
    created_at TEXT    NOT NULL,
    PRIMARY KEY (run_id, sequence)
) WITHOUT ROWID;

-- How many lines of a run are kept, so that the bound costs no count(*) a write.
CREATE TABLE jobs.tb_job_log_count (
    run_id TEXT    NOT NULL PRIMARY KEY REFERENCES tb_workflow_run (id) ON DELETE CASCADE,
    lines  INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE jobs.tb_snapshot (
    digest     TEXT NOT NULL PRIMARY KEY CHECK (digest <> ''),
    created_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now') || '000'),
    content    BLOB NOT NULL
);

-- One row: the snapshot in force.
CREATE TABLE jobs.tb_registry (
    id         INTEGER NOT NULL PRIMARY KEY CHECK (id = 1),
    digest     TEXT    NOT NULL REFERENCES tb_snapshot (digest),
    applied_at TEXT    NOT NULL
);

-- States move one way, whoever writes. A replaced row counts as a changed one.

CREATE TRIGGER jobs.tr_workflow_run_status BEFORE UPDATE OF status, retries ON tb_workflow_run
WHEN (NEW.status <> OLD.status AND NOT (
        (OLD.status = 'pending' AND NEW.status IN ('running', 'completed', 'failed', 'cancelled'))
        OR (OLD.status = 'running' AND NEW.status IN ('completed', 'failed', 'cancelled'))
        OR (OLD.status IN ('failed', 'cancelled') AND NEW.status = 'running' AND NEW.retries = OLD.retries + 1)))
    OR (NEW.retries <> OLD.retries AND NOT (
        OLD.status IN ('failed', 'cancelled') AND NEW.status = 'running' AND NEW.retries = OLD.retries + 1))
BEGIN
    SELECT raise(ABORT, 'state: a run moves from pending to running to completed, failed or cancelled; a retry sets a failed or cancelled run to running and raises retries by one');
END;

CREATE TRIGGER jobs.tr_workflow_run_replace BEFORE INSERT ON tb_workflow_run
WHEN EXISTS (SELECT 1 FROM tb_workflow_run WHERE id = NEW.id)
BEGIN
    SELECT raise(ABORT, 'exists: there is a run with this id');
END;

CREATE TRIGGER jobs.tr_job_run_status BEFORE UPDATE OF status ON tb_job_run
WHEN NEW.status <> OLD.status AND NOT (
        (OLD.status = 'pending' AND NEW.status IN ('running', 'completed', 'failed', 'cancelled'))
        OR (OLD.status = 'running' AND NEW.status IN ('completed', 'failed', 'cancelled')))
BEGIN
    SELECT raise(ABORT, 'state: a job moves from pending to running to completed, failed or cancelled');
END;

CREATE TRIGGER jobs.tr_job_run_replace BEFORE INSERT ON tb_job_run
WHEN EXISTS (SELECT 1 FROM tb_job_run WHERE id = NEW.id)
BEGIN
    SELECT raise(ABORT, 'exists: there is a job with this id');
END;

CREATE TRIGGER jobs.tr_workflow_step_status BEFORE UPDATE OF status ON tb_workflow_step
WHEN NEW.status <> OLD.status AND NOT (
        (OLD.status = 'pending' AND NEW.status IN ('running', 'completed', 'failed', 'cancelled'))
        OR (OLD.status = 'running' AND NEW.status IN ('completed', 'failed', 'cancelled')))
BEGIN
    SELECT raise(ABORT, 'state: a step moves from pending to running to completed, failed or cancelled');
END;
