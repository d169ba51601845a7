-- Alerts: how they stand, what changed, and who evaluates them.
CREATE TABLE jobs.tb_alert (
    name         TEXT NOT NULL PRIMARY KEY CHECK (name <> ''),
    state        TEXT NOT NULL CHECK (state IN ('inactive', 'pending', 'firing', 'resolved')),
    since        TEXT NOT NULL,
    held_since   TEXT,
    evaluated_at TEXT NOT NULL,
    figures      TEXT NOT NULL DEFAULT '{}',
    detail       TEXT NOT NULL DEFAULT ''
);

-- notify_status is empty where nobody is to be told, then pending, started or failed.
CREATE TABLE jobs.tb_alert_event (
    id            TEXT NOT NULL PRIMARY KEY,
    alert         TEXT NOT NULL,
    old_state     TEXT NOT NULL,
    new_state     TEXT NOT NULL,
    occurred_at   TEXT NOT NULL,
    figures       TEXT NOT NULL DEFAULT '{}',
    notify_status TEXT NOT NULL DEFAULT '',
    notify_input  TEXT,
    notify_run_id TEXT NOT NULL DEFAULT '',
    notify_error  TEXT NOT NULL DEFAULT ''
);
CREATE INDEX jobs.ix_alert_event_alert ON tb_alert_event (alert, occurred_at DESC);
CREATE INDEX jobs.ix_alert_event_notify ON tb_alert_event (occurred_at) WHERE notify_status = 'pending';

CREATE TABLE jobs.tb_alert_lease (
    id         INTEGER NOT NULL PRIMARY KEY CHECK (id = 1),
    owner      TEXT    NOT NULL,
    expires_at TEXT    NOT NULL
);
