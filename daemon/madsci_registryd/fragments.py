"""registry.json as text, piece by piece: the whole file is never built from objects.

An entry is its identity (everything but the lock, made when that changes) and its lock. All is ASCII, as MADSci writes
it, so that no locale can misread it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from madsci_registry.registry_json import CLAIM_INSTANCE, FORMAT_VERSION
from madsci_registry.types import OldLock
from madsci_registryd.merging import other_ids as other_ids_of
from madsci_registryd.store import Row

CLAIM_EXPIRES_AT = "2999-12-31T23:59:59Z"
"""Far beyond any step of a clock: a claim ends when it is taken back, never by time (datetime can add a time zone)."""
ENTRIES_A_PART = 500
"""So many are joined at once: some 200 KiB, a fraction of a millisecond in which no other thread runs."""

_KEYS = ("id", "component_type", "created_at", "last_seen", "metadata", "workcell_id")


class Identity(NamedTuple):
    """What the file says of a name, but for its lock."""

    id: str
    text: bytes
    """Members of the entry's object, without braces."""


def of_row(row: Row, other_ids: Sequence[str]) -> Identity:
    """Return the identity of a component as the database has it."""
    values = (row.id, row.component_type, row.created_at, row.last_seen, json.loads(row.metadata), row.workcell_id)
    return Identity(row.id, _members(dict(zip(_KEYS, values, strict=True)) | _others(other_ids)))


def of_entry(entry: Mapping[str, Any]) -> Identity:
    """Return the identity of an entry of registry.json."""
    known = {key: entry.get(key) for key in _KEYS}
    for key in ("created_at", "last_seen"):
        if known[key] is None:
            del known[key]
    others = _others(other_ids_of(entry))
    return Identity(entry["id"], _members(known | {"metadata": entry.get("metadata") or {}} | others))


def _others(ids: Sequence[str]) -> dict[str, Any]:
    """Return the member that old programs do not know: ULIDs that are the same component, where there are any."""
    return {"other_ids": [*ids]} if ids else {}


def _members(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry)[1:-1].encode()


def of_lock(lock: OldLock | None) -> bytes:
    """Return an entry's lock."""
    return json.dumps(vars(lock)).encode() if lock else b"null"


def claim(pid: int, host: str, epoch: int, now: str) -> bytes:
    """Return our claim on a name: to an old program, a lock that somebody else has."""
    lock = {
        "holder_pid": pid,
        "holder_host": host,
        "holder_instance": f"{CLAIM_INSTANCE} {epoch}",
        "acquired_at": now,
        "heartbeat_at": now,
        "expires_at": CLAIM_EXPIRES_AT,
    }
    return json.dumps(lock).encode()


def document(created_at: str, updated_at: str, entries: Iterator[tuple[str, bytes, bytes]]) -> Iterator[bytes]:
    """Yield the file, an entry a line, from (name, members of its identity, lock)."""
    head = json.dumps({"version": FORMAT_VERSION, "created_at": created_at, "updated_at": updated_at})
    yield head[:-1].encode() + b', "entries": {'
    part: list[bytes] = []
    first = True
    for name, members, lock in entries:
        part.append(b'%s\n%s: {%s, "lock": %s}' % (b"" if first else b",", json.dumps(name).encode(), members, lock))
        first = False
        if len(part) == ENTRIES_A_PART:
            yield b"".join(part)
            part = []
    yield b"".join(part) + b"\n}}\n"
