-- The registry of one host: the only full definition of its tables. Migrations end in exactly this schema (a test
-- compares them). SQLite 3.51.3 or later, WAL, one connection that holds the file exclusively; outsiders use the daemon.
-- Instants are UTC, ISO 8601 with microseconds ('2026-11-23T23:35:15.123456Z'), which sorts as text; they label, they
-- decide nothing.

CREATE TABLE meta (
    key   TEXT PRIMARY KEY,  -- epoch: number of this start, grows durably at each one, at least unix seconds
                             -- created_at: when this registry was made
                             -- compacted: up to this revision, lock events may have been trimmed
                             -- exported: up to this revision, identities are as registry.json has them
    value ANY NOT NULL
) STRICT, WITHOUT ROWID;

-- Every name that was ever used. Rows are never deleted: a fencing token must grow over all lives of a name.
CREATE TABLE names (
    name       TEXT PRIMARY KEY,
    last_token INTEGER NOT NULL DEFAULT 0,         -- highest fencing token ever given for the name; 0: none yet
    renamed_id TEXT REFERENCES components (id)     -- component that had this name until it was renamed away
        DEFERRABLE INITIALLY DEFERRED
) STRICT, WITHOUT ROWID;

-- Every identity that was ever answered. Rows are never deleted, ids never change or move.
CREATE TABLE components (
    id              TEXT PRIMARY KEY,              -- ULID
    name            TEXT NOT NULL UNIQUE REFERENCES names (name),
    component_type  TEXT NOT NULL
        CHECK (component_type IN ('node', 'module', 'manager', 'experiment', 'workcell')),
    retired         INTEGER NOT NULL DEFAULT 0 CHECK (retired IN (0, 1)),
    created_at      TEXT NOT NULL,
    last_seen       TEXT NOT NULL,                 -- last resolve, or end of the last lock
    metadata        TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(metadata)),
    workcell_id     TEXT,                          -- carried for registry.json, not used
    created_session TEXT,                          -- session and sequence of the request that made it: a repeat of
    created_seq     INTEGER,                       -- that request is answered is_new as well
    created_uid     INTEGER,                       -- who made it, NULL: before version 3, or an old program
    last_uid        INTEGER                        -- who made or held it last, as far as that is known
) STRICT, WITHOUT ROWID;

-- Client processes that have written something. A row goes when its session ends; what is here at a start is detached.
CREATE TABLE sessions (
    id            TEXT PRIMARY KEY,                -- public id (ULID)
    token_hash    BLOB NOT NULL UNIQUE,            -- SHA-256 of the secret token
    uid           INTEGER NOT NULL,                -- what follows is the kernel's word at hello
    gid           INTEGER NOT NULL,
    pid           INTEGER,                         -- NULL: not visible from the daemon's PID namespace
    start_time    INTEGER,                         -- clock ticks after boot, /proc/PID/stat field 22
    pidfd_inode   INTEGER,                         -- unique in a boot, NULL where the kernel has no pidfs (before 6.9)
    boot_id       TEXT NOT NULL,
    pid_namespace INTEGER NOT NULL,                -- the daemon's own: a record of another one proves nothing. Told by
                                                   -- its init's pidfd inode, below zero by its inode and init's start
    client        TEXT NOT NULL,                   -- what the client said of itself
    started_at    TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- Who holds what now. At most one row a component: one holder.
CREATE TABLE locks (
    id            TEXT PRIMARY KEY REFERENCES components (id),
    session_id    TEXT NOT NULL REFERENCES sessions (id),
    instance      TEXT NOT NULL,                   -- which client object of that process
    fencing_token INTEGER NOT NULL,
    acquired_at   TEXT NOT NULL,
    seq           INTEGER NOT NULL                 -- the request that was granted it: cancel frees exactly that
) STRICT, WITHOUT ROWID;
CREATE INDEX locks_by_session ON locks (session_id);

-- Which names old programs hold, as they wrote it into registry.json; kept here so that a torn file frees none. A row
-- goes when the lock was given back or was not renewed in time.
CREATE TABLE old_locks (
    id              TEXT PRIMARY KEY REFERENCES components (id),
    holder_pid      INTEGER NOT NULL,              -- what follows is the old program's own word
    holder_host     TEXT NOT NULL,
    holder_instance TEXT NOT NULL,
    acquired_at     TEXT NOT NULL,
    heartbeat_at    TEXT NOT NULL,
    expires_at      TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- Every change, written in the transaction that makes it. Identity events stay for ever, lock events (granted,
-- released, ended, broken) and refused ones for 30 days or a million rows.
CREATE TABLE events (
    revision INTEGER PRIMARY KEY,                  -- grows, never repeats, also over power loss: starts leave gaps
    at       TEXT NOT NULL,
    kind     TEXT NOT NULL,
    name     TEXT,
    id       TEXT,
    uid      INTEGER,                              -- who did it, by the kernel's word
    pid      INTEGER,
    session  TEXT,
    why      TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(why))
) STRICT;
CREATE INDEX events_by_name ON events (name, revision);
CREATE INDEX events_by_id ON events (id, revision);
