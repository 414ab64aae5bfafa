"""What clients see of rows, locks and sessions: the objects of docs/protocol.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from madsci_registry.errors import HeldError
from madsci_registry.types import Holder, SessionInfo
from madsci_registryd.locks import Presence, Session
from madsci_registryd.store import Lock, Row

SessionOf = Callable[[str], Session | None]


def new_holder(session_of: SessionOf, host: str, lock: Lock) -> Holder:
    """Say who has a lock, by what the kernel told of the session's process."""
    s = session_of(lock.owner.session)
    assert s is not None, "a lock has a session as long as it lives"
    return Holder(
        **vars(s.process),
        host=host,
        session=s.id,
        since=lock.acquired_at,
        instance=lock.owner.instance,
        client=s.client,
    )


def component(
    session_of: SessionOf, host: str, row: Row, waiting: int, *, other_ids: list[str], lab: str | None
) -> dict[str, Any]:
    """Return a component as the protocol has it."""
    lock = row.lock
    return {
        "name": row.name,
        "id": row.id,
        "component_type": row.component_type,
        "state": "retired" if row.retired else "held" if lock or row.old_lock else "free",
        "locked": lock is not None or row.old_lock is not None,
        "fencing_token": lock.fencing_token if lock else None,
        "created_at": row.created_at,
        "last_seen": row.last_seen,
        "metadata": json.loads(row.metadata),
        "holder": new_holder(session_of, host, lock).to_json() if lock else None,
        "waiting": waiting,
        "workcell_id": row.workcell_id,
        "old_lock": row.old_lock.to_json() if row.old_lock else None,
        "lab": lab,
        "other_ids": other_ids,
        "preferred_id": row.preferred_id,
    }


def session_info(s: Session, held: int, waiting: int) -> dict[str, Any]:
    """Return a session as the protocol has it."""
    return SessionInfo(
        **vars(s.process),
        id=s.id,
        started_at=s.started_at,
        attached=s.presence is Presence.ATTACHED,
        held=held,
        waiting=waiting,
        protocol_version=s.protocol_version,
        client=s.client,
    ).to_json()


def held_by(session_of: SessionOf, host: str, name: str, row: Row | None, who: Session, **facts: Any) -> HeldError:
    """Make the error that says who holds a name."""
    if row is not None and row.lock is None and row.old_lock is not None:
        message = f"{name!r} is held by {row.old_lock.label} until {row.old_lock.expires_at} at least"
        return HeldError(message, name=name, id=row.id, old_lock=row.old_lock, **facts)
    if row is None or row.lock is None:
        message = f"{name!r} goes to somebody who waits for it"
        return HeldError(message, name=name, id=row.id if row else None, **facts)
    holder = new_holder(session_of, host, row.lock)
    is_me = holder.session == who.id
    by = "another instance in this process" if is_me else holder.label
    message = f"{name!r} is held by {by} on {host} since {holder.since}"
    if holder.end_command and not is_me:
        message += f"; `{holder.end_command}` would end it"
    return HeldError(message, name=name, id=row.id, holder=holder, is_me=is_me, **facts)


def exported(
    session_of: SessionOf, host: str, row: Row, now: str, expires_at: str, other_ids: list[str]
) -> dict[str, Any]:
    """Return a component as registry.json has it; a lock looks alive until `expires_at`."""
    lock = row.old_lock.to_json() if row.old_lock else None
    if row.lock:
        holder = new_holder(session_of, host, row.lock)
        lock = {
            "holder_pid": holder.pid or 0,
            "holder_host": host,
            "holder_instance": row.lock.owner.instance,
            "acquired_at": row.lock.acquired_at,
            "heartbeat_at": now,
            "expires_at": expires_at,
        }
    return {
        "id": row.id,
        "component_type": row.component_type,
        "created_at": row.created_at,
        "last_seen": row.last_seen,
        "metadata": json.loads(row.metadata),
        "lock": lock,
        "workcell_id": row.workcell_id,
        **({"other_ids": other_ids} if other_ids else {}),
    }
