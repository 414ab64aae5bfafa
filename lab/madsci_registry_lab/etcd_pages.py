"""What is read from etcd by pages: entries, conflicts, sessions, locks, history."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from madsci_registry_lab import etcd_rows as rows
from madsci_registry_lab.etcd_gateway import EtcdGateway
from madsci_registry_lab.etcd_identities import Identities
from madsci_registry_lab.etcd_names import Names
from madsci_registry_lab.etcd_rows import loads
from madsci_registry_lab.etcd_transaction import Transaction
from madsci_registry_lab.etcd_wire import Kv, Range, Txn, after
from madsci_registry_lab.records import ConflictRow, NameRow
from madsci_registry_lab.store import Conflict, Entry, Event, Lock, Session

PAGE = 500
"""Keys that are read in one request."""
_Result = TypeVar("_Result")
Read = Callable[[Callable[[Transaction], _Result]], _Result]


def entries(gateway: EtcdGateway, since: str, limit: int, component_type: str | None) -> list[Entry]:
    """Return entries in the order of their names, those after `since`."""
    prefix, found = gateway.access.prefix, list[Entry]()
    while len(found) < limit:
        most = min(PAGE, limit - len(found))
        page = gateway.range(Range(f"{prefix}n/{since}\0", after(f"{prefix}n/"), limit=most))
        if not page.kvs:
            break
        names = [loads(NameRow, kv.value) for kv in page.kvs]
        held = _held(gateway, names[0].name, names[-1].name, page.revision)
        found += [row.entry(held.get(row.name)) for row in names if component_type in (None, row.component_type)]
        since = names[-1].name
    return found


def _held(gateway: EtcdGateway, first: str, last: str, revision: int) -> dict[str, Lock]:
    """Return the locks on a span of names, as they were in that revision."""
    prefix = gateway.access.prefix
    locks, living = gateway.txn(
        Txn(
            then=(
                Range(prefix + rows.lock_key(first), prefix + rows.lock_key(last) + "\0", revision=revision),
                Range(f"{prefix}s/", after(f"{prefix}s/"), revision=revision, keys_only=True),
            )
        )
    ).found
    sessions = {kv.key.removeprefix(f"{prefix}s/") for kv in living.kvs}
    held = [loads(Lock, kv.value) for kv in locks.kvs]
    return {lock.name: lock for lock in held if lock.session in sessions}


def sessions(gateway: EtcdGateway) -> list[Session]:
    """Return the living sessions, by host."""
    prefix = gateway.access.prefix
    living = gateway.range(Range(f"{prefix}s/", after(f"{prefix}s/")))
    found = [loads(Session, kv.value) for kv in living.kvs]
    counted: list[Session] = []
    for n in range(0, len(found), rows.EVENTS_MAX):
        part = found[n : n + rows.EVENTS_MAX]
        starts = [prefix + rows.owned_key(session.id, "") for session in part]
        counts = gateway.txn(
            Txn(then=tuple(Range(s, after(s), count_only=True, revision=living.revision) for s in starts))
        ).found
        counted += [replace(session, locks=count.count) for session, count in zip(part, counts, strict=True)]
    return sorted(counted, key=lambda session: session.host)


def locks(gateway: EtcdGateway, session: str) -> list[Lock]:
    """Return what a session holds, by name; nothing where it has ended."""
    prefix = gateway.access.prefix
    start = prefix + rows.owned_key(session, "")
    end, revision, found = after(start), 0, list[Lock]()
    while True:
        living, page = gateway.txn(
            Txn(
                then=(
                    Range(prefix + rows.session_key(session), keys_only=True, revision=revision),
                    Range(start, end, limit=PAGE, revision=revision),
                )
            )
        ).found
        if not living.kvs:
            return []
        found += [loads(Lock, kv.value) for kv in page.kvs]
        if len(page.kvs) < PAGE:
            return found
        revision, start = revision or page.revision, page.kvs[-1].key + "\0"


def given(tx: Transaction, names: Sequence[str]) -> dict[str, tuple[int, str | None]]:
    """Return the last term of each name that is known, and the host that it was given to."""
    known = Names(tx)
    known.fetch(*names)
    found = {name: known.row(name) for name in names}
    return {name: (row.term, row.term_host) for name, row in found.items() if row != NameRow(name=name)}


def conflicts(
    gateway: EtcdGateway, read: Read[list[Conflict]], *, decided: bool, after: tuple[str, str], limit: int
) -> list[Conflict]:
    """Return conflicts in the order of (name, id), those after `after`: undecided ones, or all."""
    kind = "c/" if decided else "u/"
    prefix = gateway.access.prefix + kind
    page = gateway.range(
        Range(f"{prefix}{after[0]}\0{after[1]}\0", prefix[:-1] + "0", limit=limit, keys_only=True)
    )  # fmt: skip
    keys = [tuple(kv.key.removeprefix(prefix).split("\0")) for kv in page.kvs]

    def operation(tx: Transaction) -> list[Conflict]:
        lab, found = Identities(tx), list[Conflict]()
        tx.fetch(*(rows.conflict_key(name, id) for name, id in keys))
        tx.fetch(*(key for name, _ in keys for key in (f"n/{name}", rows.lock_key(name))))
        for name, id in keys:
            text = tx.get(rows.conflict_key(name, id))
            row = lab.names.taken(name)
            if text is not None:
                found.append(loads(ConflictRow, text).conflict(name, id, lab.entry(row) if row else None))
        return found

    return read(operation)


def history(gateway: EtcdGateway, read: Read[NameRow], name: str, since: int, limit: int) -> list[Event]:
    """Return the changes of a name and of its component under whatever name, those after the revision `since`."""
    row, found = read(lambda tx: Names(tx).row(name)), list[Event]()
    for id in dict.fromkeys((*row.ids, *row.told)):
        for kv in _told(gateway, id, since, limit):
            event = rows.event_of(kv.key, kv.created, kv.value)
            if event.revision > since and (event.name == name or id in row.ids):
                found.append(event)
    return sorted(found, key=lambda event: event.revision)[:limit]


def _told(gateway: EtcdGateway, id: str, since: int, limit: int) -> tuple[Kv, ...]:
    """Return the events of a ULID in the order of their revisions, of which the last one may be cut."""
    start = f"{gateway.access.prefix}h/{id}\0"
    created = max(since // rows.EVENTS_MAX, 1)
    return gateway.range(
        Range(start, after(start), limit=limit + rows.EVENTS_MAX, created_from=created)
    ).kvs  # fmt: skip
