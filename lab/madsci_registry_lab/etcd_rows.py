"""A lab's keys in etcd and their values, which are JSON. All under one prefix, which only the transaction knows.

    meta                 {format, epoch}: of this layout, and the last epoch (etcd_epochs.py)
    e/EPOCH              a start of a lab registry; its create_revision is where the epoch begins
    n/NAME               a name that has a component: NameRow
    v/NAME               a name that had one: its terms, and where the component went (NameRow without id)
    i/ULID               every ULID that was ever told: IdRow
    s/SESSION            a living session: Session, never changed; each keepalive makes its mod_revision new
    b/HOST               the session of a host, as long as it lives
    l/NAME               a lock: held if its session lives too
    o/SESSION<0>NAME     the same lock, by session
    d/SESSION            a session that has ended and whose locks are still to be cleared away: why it ended
    m/HOST               how far a host's changes are in: [epoch, revision]
    c/NAME<0>ULID        a conflict: ConflictRow
    u/NAME<0>ULID        it is undecided; q/ULID<0>NAME as well
    h/ULID<0>OP.NNN      history: an event of a component (h/<0>OP.NNN: of a host), put in the transaction of its change
    x/OP                 which of the events of a transaction are of locks and hosts: they are trimmed in time
    last                 the last transaction that wrote an event
    probe                empty: written to see whether etcd takes writes again

Names stand in keys as they are, in UTF-8: so keys are in the order of names.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any, TypeVar

from madsci_registry_lab.records import ConflictRow, IdRow, NameRow
from madsci_registry_lab.store import Event, Lock, Session, State

EVENTS_MAX = 128
"""In one transaction, by etcd's default of operations in one."""
LAST = "last"
META = "meta"
PROBE = "probe"


_Row = TypeVar("_Row", NameRow, IdRow, ConflictRow, Session, Lock)


def dumps(row: Any) -> str:
    """Return a value as it stands in etcd. What is as by default is left out."""
    if isinstance(row, (NameRow, IdRow, ConflictRow, Session, Lock)):
        given = asdict(row)
        row = {f.name: given[f.name] for f in fields(row) if f.default != given[f.name]}
    return json.dumps(row, ensure_ascii=False, separators=(",", ":"))


def loads(cls: type[_Row], text: str) -> _Row:
    """Read a value."""
    given = json.loads(text)
    for name in ("other_ids", "told"):
        if name in given:
            given[name] = tuple(given[name])
    if isinstance(given.get("state"), dict):
        given["state"] = State(**given["state"])
    return cls(**given)


def event_text(event: Event) -> str:
    """Return an event as it stands in etcd, without its revision, which is its key's."""
    return dumps([event.at, event.kind, event.name, event.id, event.host, event.why])


def event_of(key: str, revision: int, text: str) -> Event:
    """Read an event; several of one transaction share its revision."""
    at, kind, name, id, host, why = json.loads(text)
    return Event(event_revision(key, revision), at, kind, name, id, host, why)


def event_revision(key: str, revision: int) -> int:
    """Return the revision of an event among all, by its key and etcd's revision."""
    return revision * EVENTS_MAX + int(key[-3:])


def event_key(id: str | None, op: str, n: int) -> str:
    """Return the key of an event: by ULID, as history is asked for."""
    return f"h/{id or ''}\0{op}.{n:03}"


def name_key(row: NameRow) -> str:
    """Return the key of a name, which depends on whether it has a component."""
    return f"{'v' if row.id is None else 'n'}/{row.name}"


def lock_key(name: str) -> str:
    """Return the key of the lock on a name."""
    return f"l/{name}"


def owned_key(session: str, name: str) -> str:
    """Return the key of the same lock among its session's."""
    return f"o/{session}\0{name}"


def session_key(session: str) -> str:
    """Return the key of a session."""
    return f"s/{session}"


def host_key(host: str) -> str:
    """Return the key that has a host's session."""
    return f"b/{host}"


def mark_key(host: str) -> str:
    """Return the key of a host's mark."""
    return f"m/{host}"


def id_key(id: str) -> str:
    """Return the key of a ULID."""
    return f"i/{id}"


def conflict_key(name: str, id: str) -> str:
    """Return the key of a conflict."""
    return f"c/{name}\0{id}"


def open_keys(name: str, id: str) -> tuple[str, str]:
    """Return the keys that say that a conflict is undecided."""
    return f"u/{name}\0{id}", f"q/{id}\0{name}"
