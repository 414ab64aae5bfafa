"""Sessions and locks in a transaction on etcd.

A lock is held if its key and its session's key exist: so a session ends, with all its locks, by one key, whatever their
number. What is left of such locks is cleared away afterwards, or by who takes one; their releases are told then, once.
"""

from __future__ import annotations

from dataclasses import replace

from ulid import ULID

from madsci_registry.errors import ConflictError, SessionRequiredError
from madsci_registry_lab import etcd_rows as rows
from madsci_registry_lab import rules
from madsci_registry_lab.etcd_names import Names
from madsci_registry_lab.etcd_rows import dumps, loads
from madsci_registry_lab.etcd_transaction import Transaction
from madsci_registry_lab.records import NameRow
from madsci_registry_lab.store import PROPOSAL_LIMIT, Lock, Session, Want


class Locks:
    """Sessions and locks as one transaction sees and leaves them."""

    def __init__(self, tx: Transaction, names: Names) -> None:
        self._tx, self._names = tx, names

    def session(self, id: str) -> Session | None:
        """Return a session that lives."""
        text = self._tx.get(rows.session_key(id))
        return loads(Session, text) if text else None

    def of_host(self, host: str) -> Session | None:
        """Return the session of a host that lives."""
        id = self._tx.get(rows.host_key(host))
        return self.session(id) if id else None

    def of_name(self, name: str) -> Lock | None:
        """Return the lock on a name that is held; what is left of one whose session has ended is cleared away."""
        text = self._tx.get(rows.lock_key(name))
        if text is None:
            return None
        lock = loads(Lock, text)
        if self.session(lock.session) is None:
            self.drop(lock, why="its session has ended")
            return None
        return lock

    def begin(self, host: str, boot: str, lease_s: float, label: str) -> tuple[Session, Session | None]:
        """Begin a session; return it, and the one of the host that ended for it."""
        old = self.of_host(host)
        if old is not None and old.boot != boot:
            raise ConflictError(
                f"{host!r} lives already, with boot {old.boot}: a copy of it, or itself before it rebooted",
                name=host, id=old.id,
            )  # fmt: skip
        if old is not None:
            self.end(old, "ended")
        session = Session(
            id=str(ULID()), host=host, boot=boot, lease_s=lease_s, started_at=self._tx.now, label=label
        )  # fmt: skip
        self._tx.put(rows.session_key(session.id), dumps(session))
        self._tx.put(rows.host_key(host), session.id)
        self._tx.tell("registered", None, None, host)
        return session, old

    def end(self, session: Session, kind: str) -> None:
        """End a session; its locks are held no more, and are to be cleared away."""
        self._tx.delete(rows.session_key(session.id))
        self._tx.delete(rows.host_key(session.host))
        self._tx.put(f"d/{session.id}", kind)
        self._tx.tell(kind, None, None, session.host)

    def living(self, host: str, id: str) -> Session:
        """Return a host's session. Raises SessionRequiredError."""
        session = self.session(id)
        if session is None or session.host != host:
            raise SessionRequiredError(f"{host!r} has no living session {id}: register again")
        return session

    def acquire(self, host: str, session: str, name: str, want: Want) -> Lock:
        """Lock a name. Raises: as LabStore.acquire tells."""
        who, row = self.living(host, session), self._names.taken(name)
        if row is None:
            raise self._names.absent(name)
        held = self.of_name(name)
        # What a backup that the store was set back to does not know of was given before this start.
        above = max(want.proposal, min(self._names.epoch(), PROPOSAL_LIMIT))
        term = rules.grant(
            row.name, who.id, who.host, held, (row.term, row.term_host), replace(want, proposal=above)
        )  # fmt: skip
        if held is not None and held.session == session:
            return held
        if held is not None:
            self.drop(held, why="given away by a store that was set back")
        lock = Lock(
            name=row.name, term=term, host=host, session=session, since=self._tx.now, holder=want.holder
        )  # fmt: skip
        self._write(lock)
        self._names.put(replace(self._names.row(row.name), term=term, term_host=host))
        self._names.tell("granted", row.name, row.id, host, term=term, holder=want.holder)
        return lock

    def move(self, row: NameRow, name: str) -> None:
        """Let the lock of a name go on under the name to which its component goes."""
        lock = self.of_name(row.name)
        if lock is None:
            return
        to = self._names.row(name)
        term = rules.moved_term(name, lock, to.term)
        self._erase(lock)
        self._write(replace(lock, name=name, term=term))
        self._names.put(replace(to, term=term, term_host=lock.host))
        self._names.tell("moved", name, row.id, lock.host, was=row.name, term=term)

    def drop(self, lock: Lock, **why: str) -> None:
        """End a lock."""
        self._erase(lock)
        row = self._names.row(lock.name)
        self._names.tell("released", lock.name, row.id or row.moved_id, lock.host, term=lock.term, **why)

    def _write(self, lock: Lock) -> None:
        self._tx.put(rows.lock_key(lock.name), dumps(lock))
        self._tx.put(rows.owned_key(lock.session, lock.name), dumps(lock))

    def _erase(self, lock: Lock) -> None:
        self._tx.delete(rows.lock_key(lock.name))
        self._tx.delete(rows.owned_key(lock.session, lock.name))
