"""What old programs changed, as steps of a transaction: each is checked against the database once more.

A step that the database contradicts raises a RegistryError and changes nothing; the file is put right after it.
"""

from __future__ import annotations

import json
from typing import Any

from madsci_registry.errors import ConflictError, NameTakenError
from madsci_registry.types import OldLock
from madsci_registryd.identities import merged
from madsci_registryd.merging import Entry, Refusal, Update
from madsci_registryd.service import Service
from madsci_registryd.transaction import Tx

SOURCE = {"source": "registry.json"}


def adopt(service: Service, tx: Tx, name: str, entry: Entry) -> None:
    """Make the component of a name that is new there."""
    row = service.store.by_name(name)
    if row is not None:
        if not service.is_id_of(row, entry["id"]):
            raise ConflictError(f"{name!r} is {row.id}, not {entry['id']}", name=name, id=row.id)
        return
    other = service.store.by_id(entry["id"])
    if other is not None:
        raise ConflictError(f"{entry['id']} is {other.name!r}, not {name!r}", name=other.name, id=other.id)
    service.adopt(tx, None, name, entry, **SOURCE)


def rename(service: Service, tx: Tx, old: str, new: str) -> None:
    """Give a component the name that it has there."""
    row = service.store.by_name(old)
    if row is None or row.lock is not None:
        raise ConflictError(f"{old!r} is held by a new program, or gone: it is not renamed to {new!r}", name=old)
    taken = service.store.by_name(new)
    if taken is not None:
        raise NameTakenError(f"{new!r} is known already", name=new, id=taken.id)
    service.store.rename(row.id, old, new, tx.now)
    service.note(tx, "renamed", new, row.id, old=old, **SOURCE)
    tx.freed.append(old)
    tx.durable = True


def update(service: Service, tx: Tx, name: str, change: Update) -> None:
    """Change metadata, last_seen and workcell as an old program did."""
    row = service.known(name)
    text = merged(row, change.set, change.unset)
    if text != row.metadata:
        service.store.set_metadata(row.id, text, tx.now)
        why = {"set": change.set, "unset": change.unset, "metadata": json.loads(text), **SOURCE}
        service.note(tx, "metadata", name, row.id, **why)
        tx.durable = True
    if change.workcell_id is not None and change.workcell_id != row.workcell_id:
        service.store.set_workcell(row.id, change.workcell_id)
        tx.durable = True
    if change.last_seen is not None and change.last_seen > row.last_seen:
        service.store.set_last_seen(row.id, change.last_seen)


def lock(service: Service, tx: Tx, name: str, held: OldLock | None) -> None:
    """Note which old program holds a name now; None: none, and who waits for it may have it."""
    row = service.store.by_name(name)
    if row is None or row.old_lock == held:
        return
    service.store.set_old_lock(row.id, held)
    if held is not None and row.retired:
        service.store.set_retired(row.id, False, tx.now)
        service.note(tx, "revived", name, row.id, **SOURCE)
        tx.durable = True
    if held is None:
        tx.freed.append(name)


def refuse(service: Service, tx: Tx, refusal: Refusal) -> None:
    """Record what is not taken in, and who wrote it as far as that is known."""
    row = service.store.by_name(refusal.name) if refusal.name else None
    why: dict[str, Any] = {"what": refusal.what, "detail": refusal.detail, **SOURCE}
    if refusal.writer is not None:
        why["writer"] = refusal.writer.to_json()
    service.note(tx, "refused", refusal.name or None, row.id if row else None, **why)
