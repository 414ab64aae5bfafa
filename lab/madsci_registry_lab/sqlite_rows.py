"""Rows of the lab's SQLite file as the values of store.py, and the SELECTs that they come from."""

from __future__ import annotations

import json
from typing import Any

from madsci_registry_lab.store import Entry, Event, Lock, Session

ENTRY = """
    SELECT n.name, n.id, n.component_type, n.retired, n.metadata, n.created_at, n.changed_at, n.host, n.term,
           (SELECT json_group_array(i.id) FROM ids i WHERE i.name = n.name AND i.id != n.id),
           l.term, s.host, s.id, l.since, l.holder
      FROM names n LEFT JOIN locks l ON l.name = n.name LEFT JOIN sessions s ON s.id = l.session
     WHERE n.id IS NOT NULL AND """
LOCK = "SELECT l.name, l.term, s.host, s.id, l.since, l.holder FROM locks l JOIN sessions s ON s.id = l.session WHERE "
SESSION = """
    SELECT id, host, boot, lease_s, started_at, label, (SELECT count(*) FROM locks WHERE session = sessions.id)
      FROM sessions WHERE """
EVENT = "SELECT revision, at, kind, name, id, host, why FROM events WHERE "


def lock(name: str, term: int, host: str, session: str, since: str, holder: str) -> Lock:
    """Make a lock of a row of LOCK."""
    return Lock(name=name, term=term, host=host, session=session, since=since, holder=json.loads(holder))


def event(
    revision: int, at: str, kind: str, name: str | None, id: str | None, host: str | None, why: str
) -> Event:  # fmt: skip
    """Make an event of a row of EVENT."""
    return Event(revision, at, kind, name, id, host, json.loads(why))


def entry(row: Any) -> Entry:
    """Make an entry of a row of ENTRY."""
    return Entry(
        name=row[0],
        id=row[1],
        component_type=row[2],
        retired=bool(row[3]),
        metadata=row[4],
        created_at=row[5],
        changed_at=row[6],
        host=row[7],
        term=row[8],
        other_ids=tuple(json.loads(row[9])),
        lock=lock(row[0], *row[10:]) if row[10] is not None else None,
    )


def session(id: str, host: str, boot: str, lease_s: float, started_at: str, label: str, locks: int) -> Session:
    """Make a session of a row of SESSION."""
    return Session(id=id, host=host, boot=boot, lease_s=lease_s, started_at=started_at, label=label, locks=locks)
