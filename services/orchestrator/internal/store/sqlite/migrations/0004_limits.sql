-- What is limited over all orchestrators, by key: the limit as it was asked for last, and until when every take is refused.
CREATE TABLE jobs.tb_limit (
    key            TEXT NOT NULL PRIMARY KEY CHECK (key <> ''),
    window_seconds REAL,
    max_attempts   INTEGER,
    max_cost       REAL,
    closed_until   TEXT,
    closed_reason  TEXT,
    updated_at     TEXT NOT NULL
) WITHOUT ROWID;

-- One attempt at one limit. It counts until `until`, which is set when the attempt has ended. A row of no job
-- stands for several that have ended.
CREATE TABLE jobs.tb_limit_slot (
    id             TEXT    NOT NULL CHECK (id <> ''),
    key            TEXT    NOT NULL,
    job_id         TEXT,
    attempts       INTEGER NOT NULL DEFAULT 1,
    window_seconds REAL    NOT NULL,
    cost           REAL    NOT NULL DEFAULT 0,
    taken_at       TEXT    NOT NULL,
    ended_at       TEXT,
    until          TEXT    NOT NULL,
    PRIMARY KEY (id, key)
) WITHOUT ROWID;

CREATE INDEX jobs.ix_limit_slot_key ON tb_limit_slot (key, until);
CREATE INDEX jobs.ix_limit_slot_job ON tb_limit_slot (job_id) WHERE ended_at IS NULL;

-- One row a limit: what counts at it now.
CREATE VIEW jobs.v_limit_usage AS
SELECT l.key, l.window_seconds, l.max_attempts, coalesce(sum(s.attempts), 0) AS attempts,
       coalesce(sum(s.attempts) FILTER (WHERE s.ended_at IS NULL), 0) AS in_flight,
       l.max_cost AS max_cost_usd, coalesce(sum(s.cost), 0.0) AS cost_usd, coalesce(sum(s.cost) FILTER (WHERE s.ended_at IS NULL), 0.0) AS reserved_usd,
       CASE WHEN l.closed_until > strftime('%Y-%m-%d %H:%M:%f', 'now') || '000' THEN l.closed_until END AS closed_until,
       CASE WHEN l.closed_until > strftime('%Y-%m-%d %H:%M:%f', 'now') || '000' THEN l.closed_reason END AS closed_reason
FROM tb_limit l LEFT JOIN tb_limit_slot s ON s.key = l.key AND s.until > strftime('%Y-%m-%d %H:%M:%f', 'now') || '000'
GROUP BY l.key;
