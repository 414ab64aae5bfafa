"""Named SQL: every statement that the store runs, and nothing else. The tables are explained in schema.sql."""

_COMPONENT = """
    SELECT c.id, c.name, c.component_type, c.retired, c.created_at, c.last_seen, c.metadata,
           c.created_session, c.created_seq, n.last_token, c.workcell_id,
           l.session_id, l.instance, l.fencing_token, l.acquired_at, l.seq,
           o.holder_pid, o.holder_host, o.holder_instance, o.acquired_at, o.heartbeat_at, o.expires_at,
           c.changed_at, c.preferred_id, l.lab_term, l.first_token
      FROM components c JOIN names n ON n.name = c.name LEFT JOIN locks l ON l.id = c.id
           LEFT JOIN old_locks o ON o.id = c.id
"""
COMPONENT_BY_NAME = _COMPONENT + " WHERE c.name = ?"
COMPONENT_BY_ID = _COMPONENT + " WHERE c.id = ?"
COMPONENT_BY_OTHER_ID = _COMPONENT + " WHERE c.id = (SELECT component_id FROM other_ids WHERE id = ?)"
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
                            changed_at, created_session, created_seq, created_uid, last_uid)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?12)"""
SET_METADATA = "UPDATE components SET metadata = ?, changed_at = ? WHERE id = ?"
SET_WORKCELL = "UPDATE components SET workcell_id = ? WHERE id = ?"
SET_RETIRED = "UPDATE components SET retired = ?, changed_at = ? WHERE id = ?"
SET_LAST_SEEN = "UPDATE components SET last_seen = ? WHERE id = ?"
SET_LAST_HOLDER = "UPDATE components SET last_seen = ?, last_uid = ? WHERE id = ?"
LAST_UID = "SELECT last_uid FROM components WHERE id = ?"
NAMES_OF_UID = "SELECT count(*) FROM components WHERE created_uid = ?"
SET_NAME = "UPDATE components SET name = ?, changed_at = ?, preferred_id = NULL WHERE id = ?"
SET_RENAMED = "UPDATE names SET renamed_id = ? WHERE name = ?"
RAISE_TOKEN = "UPDATE names SET last_token = max(last_token, ?) WHERE name = ?"

OTHER_IDS = "SELECT id FROM other_ids WHERE component_id = ? ORDER BY id"
ALL_OTHER_IDS = "SELECT component_id, id FROM other_ids ORDER BY id"
ADD_OTHER_ID = "INSERT INTO other_ids (id, component_id) VALUES (?, ?)"
PREFERRED_OF_SESSION = """
    SELECT c.name FROM components c JOIN locks l ON l.id = c.id
     WHERE c.preferred_id IS NOT NULL AND l.session_id = ? ORDER BY c.name"""
PREFERRED_COUNT = "SELECT count(*) FROM components WHERE preferred_id IS NOT NULL"
SET_PREFERRED = "UPDATE components SET preferred_id = ? WHERE id = ?"
CHANGE_ID = """
    PRAGMA defer_foreign_keys = ON;
    UPDATE components SET id = :new, preferred_id = NULL WHERE id = :old;
    UPDATE locks SET id = :new WHERE id = :old;
    UPDATE old_locks SET id = :new WHERE id = :old;
    UPDATE names SET renamed_id = :new WHERE renamed_id = :old;
    UPDATE other_ids SET component_id = :new WHERE component_id = :old;
    DELETE FROM other_ids WHERE id = :new;
    INSERT INTO other_ids (id, component_id) VALUES (:old, :new);
    PRAGMA defer_foreign_keys = OFF"""
"""All that refers to a component refers to it by its id."""

ADD_LOCK = """
    INSERT INTO locks (id, session_id, instance, fencing_token, acquired_at, seq, lab_term)
    VALUES (?, ?, ?, ?, ?, ?, ?)"""
CONFIRM_LOCK = """
    UPDATE locks SET first_token = iif(fencing_token < :token, coalesce(first_token, fencing_token), first_token),
                     fencing_token = max(fencing_token, :token), lab_term = :lab_term
     WHERE id = :id"""
LAB_LOCKS = """
    SELECT c.name, c.id, l.fencing_token, l.lab_term FROM locks l JOIN components c ON c.id = l.id ORDER BY c.name"""
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
_EVENTS_OF = """
    SELECT revision FROM events WHERE name = ?1 AND revision > ?2
     UNION {of_ids}
     ORDER BY revision LIMIT ?3"""
_OF_ID = "SELECT revision FROM events WHERE id = ?{n} AND revision > ?2"


def events_of(ids: int) -> str:
    """Events of a name and of so many ULIDs. The indexes give revisions in order, so they are merged only as far as
    the limit."""
    of_ids = " UNION ".join(_OF_ID.format(n=n) for n in range(4, 4 + ids))
    return f"{_EVENT} WHERE revision IN ({_EVENTS_OF.format(of_ids=of_ids)}) ORDER BY revision"


_IDENTITY = "kind NOT IN ('granted', 'released', 'ended', 'broken', 'refused')"
"""Word for word as the indexes of these events have it, else SQLite does not use them."""
CHANGED_AFTER = f"""
    SELECT DISTINCT id FROM events INDEXED BY identity_events WHERE revision > ? AND id IS NOT NULL AND {_IDENTITY}"""
LAST_REVISION = "SELECT coalesce(max(revision), 0) FROM events"

_FOR_LAB = f"{_IDENTITY} AND kind IN ('created', 'restored', 'renamed', 'retired', 'revived', 'metadata')"
IDENTITY_EVENTS = f"""
    SELECT revision, at, kind, name, id, why -> '$.metadata' FROM events INDEXED BY identity_events
     WHERE revision > ? AND id IS NOT NULL AND {_FOR_LAB} ORDER BY revision LIMIT ?"""
COUNT_IDENTITY_EVENTS = f"""
    SELECT count(*) FROM (
        SELECT 1 FROM events INDEXED BY identity_events WHERE revision > ? AND id IS NOT NULL AND {_FOR_LAB} LIMIT ?)"""
LAST_IDENTITY_REVISION = f"SELECT coalesce(max(revision), 0) FROM events WHERE {_IDENTITY}"
IS_IDENTITY_REVISION = f"SELECT 1 FROM events WHERE revision = ? AND {_IDENTITY}"
HAS_CHANGED_AFTER = f"""
    SELECT 1 FROM events INDEXED BY identity_events_by_id WHERE id = ? AND revision > ? AND {_FOR_LAB}"""
METADATA_AT = f"""
    SELECT revision, why -> '$.metadata' FROM events INDEXED BY identity_events_by_id
     WHERE id = ? AND revision <= ? AND {_IDENTITY} AND kind IN ('created', 'restored', 'metadata')
     ORDER BY revision DESC LIMIT 1"""
_RETIREMENT = "SELECT revision, kind = 'retired' FROM events WHERE id = ? AND kind IN ('retired', 'revived')"
RETIRED_BEFORE = _RETIREMENT + " AND revision <= ? ORDER BY revision DESC LIMIT 1"
RETIRED_AFTER = _RETIREMENT + " AND revision > ? ORDER BY revision LIMIT 1"

COUNT_EVENTS = "SELECT count(*) FROM events"
OLDEST_EVENTS = "SELECT revision, at FROM events WHERE revision > ? ORDER BY revision LIMIT ?"
TRIM_LOCK_EVENTS = """
    DELETE FROM events
     WHERE revision > ? AND revision <= ? AND kind IN ('granted', 'released', 'ended', 'broken', 'refused')"""

GET_META = "SELECT value FROM meta WHERE key = ?"
LOCK_COUNT = "SELECT count(*) FROM locks"
DROP_META = "DELETE FROM meta WHERE key = ?"
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
