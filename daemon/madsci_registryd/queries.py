"""Named SQL: every statement that the store runs, and nothing else. The tables are explained in schema.sql."""

_COMPONENT = """
    SELECT c.id, c.name, c.component_type, c.retired, c.created_at, c.last_seen, c.metadata,
           c.created_session, c.created_seq, n.last_token, c.workcell_id,
           l.session_id, l.instance, l.fencing_token, l.acquired_at, l.seq,
           o.holder_pid, o.holder_host, o.holder_instance, o.acquired_at, o.heartbeat_at, o.expires_at
      FROM components c JOIN names n ON n.name = c.name LEFT JOIN locks l ON l.id = c.id
           LEFT JOIN old_locks o ON o.id = c.id
"""
COMPONENT_BY_NAME = _COMPONENT + " WHERE c.name = ?"
COMPONENT_BY_ID = _COMPONENT + " WHERE c.id = ?"
LIST = (
    _COMPONENT
    + """
     WHERE c.name > :cursor AND c.name <= :until
       AND (:pattern IS NULL OR c.name GLOB :pattern)
       AND (:component_type IS NULL OR c.component_type = :component_type)
       AND (:retired IS NULL OR c.retired = :retired)
       AND (:held IS NULL OR (l.id IS NOT NULL OR o.id IS NOT NULL) = :held)
     ORDER BY c.name LIMIT :limit"""
)
NAME_FURTHER_ON = "SELECT name FROM components WHERE name > ? ORDER BY name LIMIT 1 OFFSET ?"
ID_BY_NAME = "SELECT id FROM components WHERE name = ?"
NAME_ROW = """
    SELECT n.last_token, n.renamed_id, c.name FROM names n LEFT JOIN components c ON c.id = n.renamed_id
     WHERE n.name = ?"""
ADD_NAME = "INSERT INTO names (name) VALUES (?) ON CONFLICT DO NOTHING"
ADD_COMPONENT = """
    INSERT INTO components (id, name, component_type, retired, created_at, last_seen, metadata, workcell_id,
                            created_session, created_seq, created_uid, last_uid)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?11)"""
SET_METADATA = "UPDATE components SET metadata = ? WHERE id = ?"
SET_WORKCELL = "UPDATE components SET workcell_id = ? WHERE id = ?"
SET_RETIRED = "UPDATE components SET retired = ? WHERE id = ?"
SET_LAST_SEEN = "UPDATE components SET last_seen = ? WHERE id = ?"
SET_LAST_HOLDER = "UPDATE components SET last_seen = ?, last_uid = ? WHERE id = ?"
LAST_UID = "SELECT last_uid FROM components WHERE id = ?"
NAMES_OF_UID = "SELECT count(*) FROM components WHERE created_uid = ?"
SET_NAME = "UPDATE components SET name = ? WHERE id = ?"
SET_RENAMED = "UPDATE names SET renamed_id = ? WHERE name = ?"
RAISE_TOKEN = "UPDATE names SET last_token = max(last_token, ?) WHERE name = ?"

ADD_LOCK = "INSERT INTO locks (id, session_id, instance, fencing_token, acquired_at, seq) VALUES (?, ?, ?, ?, ?, ?)"
SET_LOCK_TOKEN = "UPDATE locks SET fencing_token = ? WHERE id = ?"
DROP_LOCK = "DELETE FROM locks WHERE id = ?"
LOCKS_OF_SESSION = """
    SELECT c.name, l.instance, l.fencing_token FROM locks l JOIN components c ON c.id = l.id
     WHERE l.session_id = ? ORDER BY c.name"""
LOCKED_NAME_BY_SEQ = """
    SELECT c.name FROM locks l JOIN components c ON c.id = l.id WHERE l.session_id = ? AND l.seq = ?"""
LOCKED_NAMES = "SELECT c.name FROM locks l JOIN components c ON c.id = l.id ORDER BY c.name"
LOCKS_OF_UID = "SELECT count(*) FROM locks WHERE session_id IN (SELECT id FROM sessions WHERE uid = ?)"

ADD_OLD_LOCK = """
    INSERT INTO old_locks (id, holder_pid, holder_host, holder_instance, acquired_at, heartbeat_at, expires_at)
    VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET
        holder_pid = excluded.holder_pid, holder_host = excluded.holder_host,
        holder_instance = excluded.holder_instance, acquired_at = excluded.acquired_at,
        heartbeat_at = excluded.heartbeat_at, expires_at = excluded.expires_at"""
DROP_OLD_LOCK = "DELETE FROM old_locks WHERE id = ?"

SESSIONS = """
    SELECT id, token_hash, uid, gid, pid, start_time, pidfd_inode, boot_id, pid_namespace, client, started_at
      FROM sessions"""
ADD_SESSION = """
    INSERT INTO sessions (id, token_hash, uid, gid, pid, start_time, pidfd_inode, boot_id, pid_namespace, client,
                          started_at)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"""
SET_IDENTITY = """
    UPDATE sessions SET pid = ?, start_time = ?, pidfd_inode = ?, boot_id = ?, pid_namespace = ? WHERE id = ?"""
DROP_SESSION = "DELETE FROM sessions WHERE id = ?"

ADD_EVENT = """
    INSERT INTO events (revision, at, kind, name, id, uid, pid, session, why) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"""
_EVENT = "SELECT revision, at, kind, name, id, uid, pid, session, why FROM events"
EVENTS = _EVENT + " WHERE revision > ? ORDER BY revision LIMIT ?"
EVENTS_OF = (
    _EVENT
    + """
     WHERE revision IN (
        SELECT revision FROM events WHERE name = :name AND revision > :after
         UNION
        SELECT revision FROM events WHERE id = :id AND revision > :after
         ORDER BY revision LIMIT :limit)
     ORDER BY revision"""
)
"""Both indexes give revisions in order, so they are merged only as far as the limit."""
CHANGED_AFTER = """
    SELECT DISTINCT id FROM events
     WHERE revision > ? AND id IS NOT NULL AND kind NOT IN ('granted', 'released', 'ended', 'broken', 'refused')"""
LAST_REVISION = "SELECT coalesce(max(revision), 0) FROM events"
COUNT_EVENTS = "SELECT count(*) FROM events"
OLDEST_EVENTS = "SELECT revision, at FROM events WHERE revision > ? ORDER BY revision LIMIT ?"
TRIM_LOCK_EVENTS = """
    DELETE FROM events
     WHERE revision > ? AND revision <= ? AND kind IN ('granted', 'released', 'ended', 'broken', 'refused')"""

GET_META = "SELECT value FROM meta WHERE key = ?"
SET_META = "INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
HIGHEST_TOKEN = "SELECT coalesce(max(last_token), 0) FROM names"
KEEP_COUNTS = """
    CREATE TEMP TABLE counts (names, retired, held);
    INSERT INTO counts SELECT
        (SELECT count(*) FROM main.components WHERE retired = 0),
        (SELECT count(*) FROM main.components WHERE retired = 1),
        (SELECT count(*) FROM main.locks) + (SELECT count(*) FROM main.old_locks);
    CREATE TEMP TRIGGER count_made AFTER INSERT ON main.components BEGIN
        UPDATE counts SET names = names + 1 - new.retired, retired = retired + new.retired;
    END;
    CREATE TEMP TRIGGER count_retired AFTER UPDATE OF retired ON main.components BEGIN
        UPDATE counts SET names = names + old.retired - new.retired, retired = retired + new.retired - old.retired;
    END;
    CREATE TEMP TABLE session_counts (session_id PRIMARY KEY, held) WITHOUT ROWID;
    INSERT INTO session_counts SELECT session_id, count(*) FROM main.locks GROUP BY session_id;
    CREATE TEMP TRIGGER count_locked AFTER INSERT ON main.locks BEGIN
        UPDATE counts SET held = held + 1;
        INSERT INTO session_counts VALUES (new.session_id, 1) ON CONFLICT DO UPDATE SET held = held + 1;
    END;
    CREATE TEMP TRIGGER count_freed AFTER DELETE ON main.locks BEGIN
        UPDATE counts SET held = held - 1;
        UPDATE session_counts SET held = held - 1 WHERE session_id = old.session_id;
        DELETE FROM session_counts WHERE session_id = old.session_id AND held = 0;
    END;
    CREATE TEMP TRIGGER count_locked_old AFTER INSERT ON main.old_locks BEGIN UPDATE counts SET held = held + 1; END;
    CREATE TEMP TRIGGER count_freed_old AFTER DELETE ON main.old_locks BEGIN UPDATE counts SET held = held - 1; END"""
"""In this connection's own memory, and rolled back with what they count."""
COUNTS = "SELECT names, retired, held FROM counts"
HELD_BY_SESSION = "SELECT held FROM session_counts WHERE session_id = ?"
