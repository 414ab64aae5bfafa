-- The registry of a lab in SQLite: the only definition of its tables. SQLite 3.51.3 or later, WAL, one connection that
-- holds the file exclusively. Instants are UTC, ISO 8601 with microseconds; they label, but for `changed_at` in a sync.

CREATE TABLE meta (
    key   TEXT PRIMARY KEY,   -- compacted: up to this revision, events of locks and hosts may have been trimmed
    value ANY NOT NULL
) STRICT, WITHOUT ROWID;

-- Each start of the lab. A cursor names its epoch: one of a store that was set back since is recognised by it.
CREATE TABLE epochs (
    epoch          INTEGER PRIMARY KEY,    -- at least unix seconds, above all before
    first_revision INTEGER NOT NULL        -- of the first event that it may have written
) STRICT;

-- Every name that was ever used. Rows are never deleted: a term must grow over all lives of a name.
CREATE TABLE names (
    name           TEXT PRIMARY KEY,
    id             TEXT UNIQUE REFERENCES ids (id) DEFERRABLE INITIALLY DEFERRED, -- preferred ULID, NULL: no component
    component_type TEXT CHECK (component_type IN ('node', 'module', 'manager', 'experiment', 'workcell')),
    retired        INTEGER CHECK (retired IN (0, 1)),
    metadata       TEXT CHECK (json_valid(metadata)),
    created_at     TEXT,
    changed_at     TEXT,                   -- of the last change, by the word of the host that made it
    host           TEXT,                   -- which host said the last change
    moved_id       TEXT REFERENCES ids (id), -- the component that had this name last, where it has left it
    term           INTEGER NOT NULL DEFAULT 0, -- the highest ever given for the name
    term_host      TEXT,                   -- and the host that it was given to
    CHECK ((id IS NULL) = (component_type IS NULL))
) STRICT, WITHOUT ROWID;

-- Every ULID that was ever told: which component it is. Rows are never deleted.
CREATE TABLE ids (
    id   TEXT PRIMARY KEY,
    name TEXT NOT NULL REFERENCES names (name), -- the component's present name
    host TEXT NOT NULL,                    -- who told of it first
    op   TEXT                              -- the request of that host that made it: a repeat is answered is_new as well
) STRICT, WITHOUT ROWID;
CREATE INDEX ids_by_name ON ids (name);

-- Hosts that keep their locks alive. When each was heard last is in memory: each lease begins anew with a start.
CREATE TABLE sessions (
    id         TEXT PRIMARY KEY,
    host       TEXT NOT NULL UNIQUE,
    boot       TEXT NOT NULL,
    lease_s    REAL NOT NULL,
    started_at TEXT NOT NULL,
    label      TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE locks (
    name    TEXT PRIMARY KEY REFERENCES names (name),
    session TEXT NOT NULL REFERENCES sessions (id),
    term    INTEGER NOT NULL,
    since   TEXT NOT NULL,
    holder  TEXT NOT NULL CHECK (json_valid(holder)) -- who on that host, as it says
) STRICT, WITHOUT ROWID;
CREATE INDEX locks_by_session ON locks (session);

-- How far each host's changes are in.
CREATE TABLE marks (
    host     TEXT PRIMARY KEY,
    epoch    INTEGER NOT NULL,
    revision INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- What hosts said that contradicts an entry. Kept for ever, as the record of what was decided.
CREATE TABLE conflicts (
    name       TEXT NOT NULL,
    id         TEXT NOT NULL,
    reason     TEXT NOT NULL CHECK (reason IN ('two_ids', 'name_taken', 'held', 'wrong_type')),
    host       TEXT NOT NULL,
    at         TEXT NOT NULL,
    state      TEXT NOT NULL CHECK (json_valid(state)), -- what the host said, whole
    decided_at TEXT,
    PRIMARY KEY (name, id)
) STRICT, WITHOUT ROWID;
CREATE INDEX conflicts_by_id ON conflicts (id);

-- Every change, written in the transaction that makes it: the feed, and history.
CREATE TABLE events (
    revision INTEGER PRIMARY KEY,
    at       TEXT NOT NULL,
    kind     TEXT NOT NULL,
    lasting  INTEGER NOT NULL CHECK (lasting IN (0, 1)), -- 1: of an identity, kept for ever
    name     TEXT,
    id       TEXT,
    host     TEXT,
    why      TEXT NOT NULL CHECK (json_valid(why))
) STRICT;
CREATE INDEX events_by_name ON events (name, revision);
CREATE INDEX events_by_id ON events (id, revision);
CREATE INDEX events_passing ON events (revision) WHERE lasting = 0;
