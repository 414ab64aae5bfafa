"""From older schemas to the present one, forward only.

Rules: `user_version` is the schema's version. A new database gets schema.sql. An older one gets each missing step in
one transaction that also records the version, after a backup beside it. A newer one is refused and left as it is. The
steps together end in exactly schema.sql (a test compares), so schema.sql is changed with the step that leads to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files

import apsw

VERSION = 4
APPLICATION_ID = 0x4D526567
"""'MReg', in the file's header: tells our databases from foreign ones."""


def _old_locks(db: apsw.Connection) -> None:
    """Version 2: the locks of old programs, from registry.json."""
    db.execute(_definition("TABLE old_locks"))


def _uids(db: apsw.Connection) -> None:
    """Version 3: who made and who last held a component, as far as the events still tell."""
    db.execute("ALTER TABLE components ADD COLUMN created_uid INTEGER")
    db.execute("ALTER TABLE components ADD COLUMN last_uid INTEGER")
    db.execute(
        "UPDATE components SET created_uid = (SELECT uid FROM events WHERE id = components.id AND kind = 'created')"
    )
    db.execute(
        """UPDATE components SET last_uid = coalesce(
             (SELECT uid FROM events WHERE id = components.id AND kind = 'granted' ORDER BY revision DESC LIMIT 1),
             created_uid)"""
    )


def _lab(db: apsw.Connection) -> None:
    """Version 4: the lab. An identity changed last as its events say, else when it was made."""
    db.execute(_definition("TABLE other_ids"))
    for column in ("lab_term INTEGER", "first_token INTEGER"):
        db.execute(f"ALTER TABLE locks ADD COLUMN {column}")
    for column in ("changed_at TEXT NOT NULL DEFAULT ''", "preferred_id TEXT"):
        db.execute(f"ALTER TABLE components ADD COLUMN {column}")
    for index in (
        "names_by_renamed_id",
        "components_by_preferred_id",
        "other_ids_by_component",
        "identity_events",
        "identity_events_by_id",
        "retirements_by_id",
    ):
        db.execute(_definition(f"INDEX {index}"))
    db.execute(
        """UPDATE components SET changed_at = coalesce(
             (SELECT at FROM events
               WHERE id = components.id AND kind NOT IN ('granted', 'released', 'ended', 'broken', 'refused')
               ORDER BY revision DESC LIMIT 1),
             created_at)"""
    )


def _definition(what: str) -> str:
    """Return the definition of a table or index as schema.sql has it."""
    start = schema().index(f"CREATE {what} ")
    return schema()[start : schema().index(";", start)]


STEPS: dict[int, Callable[[apsw.Connection], None]] = {2: _old_locks, 3: _uids, 4: _lab}
"""Step n leads from version n-1 to n. Version 1 is the first."""


def schema() -> str:
    """Return the text of schema.sql."""
    return files("madsci_registryd").joinpath("schema.sql").read_text(encoding="utf-8")


@contextmanager
def transaction(db: apsw.Connection) -> Iterator[None]:
    """All of it or nothing. Not `with db:`: where SQLite has rolled back by itself, as on a full disk, that hides the
    reason behind its own failure to roll back."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def create(db: apsw.Connection) -> None:
    """Make the present schema in an empty database, in one transaction."""
    with transaction(db):
        db.execute(schema())
        db.pragma("application_id", APPLICATION_ID)
        db.pragma("user_version", VERSION)


def migrate(db: apsw.Connection, backup: Callable[[int], None]) -> int:
    """Bring an older database to VERSION and return the version that it had; calls `backup` with that one first."""
    found = int(str(db.pragma("user_version")))
    if found < VERSION:
        backup(found)
        with transaction(db):
            for version in range(found + 1, VERSION + 1):
                STEPS[version](db)
            db.pragma("user_version", VERSION)
        db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    return found
