-- Execution types that were disabled or enabled by hand; one without a row is enabled.
CREATE TABLE jobs.tb_execution_type (
    name       TEXT    NOT NULL PRIMARY KEY CHECK (name <> ''),
    enabled    INTEGER NOT NULL CHECK (enabled IN (0, 1)),
    changed_at TEXT    NOT NULL
);

-- What has ended is deleted in the order of its end.
CREATE INDEX jobs.ix_workflow_run_completed ON tb_workflow_run (completed_at) WHERE completed_at IS NOT NULL;
