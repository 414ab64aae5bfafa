"""A lab's store on etcd: the contract of store.py, any number of replicas on one cluster.

Each operation is one transaction on what it read (etcd_transaction.py), so replicas need not know of each other. What
stands under which key is in etcd_rows.py; what is decided, in rules.py.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from madsci_registry.errors import NoSpaceError, RegistryError, SessionRequiredError
from madsci_registry_lab import etcd_batches, etcd_epochs, etcd_pages
from madsci_registry_lab import etcd_rows as rows
from madsci_registry_lab.clock import Clock, SystemClock
from madsci_registry_lab.etcd_access import EtcdAccess
from madsci_registry_lab.etcd_feed import EtcdFeed
from madsci_registry_lab.etcd_gateway import TOTAL_S, EtcdGateway
from madsci_registry_lab.etcd_identities import Identities
from madsci_registry_lab.etcd_reaper import Reaper
from madsci_registry_lab.etcd_transaction import Runner, Transaction
from madsci_registry_lab.etcd_wire import Compare, Put, Range, Txn, after
from madsci_registry_lab.faults import DISK_FULL, IO_ERROR, Fault
from madsci_registry_lab.store import (
    About,
    Applied,
    Change,
    Conflict,
    Entry,
    Event,
    Lock,
    Mark,
    Page,
    Resolved,
    Session,
    State,
    Want,
)

log = logging.getLogger(__name__)

CLEARED_MAX = 100
"""Locks of an ended session that are cleared away before its host is answered: nobody waits for ten thousand."""
SESSIONS_MAX = 1000
"""Sessions whose hosts are remembered here, so that a keepalive is one request."""
_Result = TypeVar("_Result")


class EtcdStore:
    """One replica's store. Thread-safe."""

    def __init__(self, access: EtcdAccess, clock: Clock | None = None, *, total_s: float = TOTAL_S) -> None:
        """Begin a new epoch; each session's lease begins anew here.

        Raises:
            Fault: etcd does not answer, is full, or has a newer format.
        """
        clock = clock or SystemClock()
        self._gateway = EtcdGateway(access, total_s=total_s)
        self._prefix = access.prefix
        self._runner = Runner(self._gateway, clock, total_s)
        self._reaper = Reaper(self._gateway, self._runner, clock)
        self._feed = EtcdFeed(self._gateway, self._call_back)
        self._callbacks: list[Callable[[], None]] = []
        self._sessions: dict[str, Session] = {}
        self._guard = threading.Lock()
        try:
            begun = etcd_epochs.begin(self._gateway, self._runner, clock)
            self._feed.start()
            self._runner.revision = begun
            self._feed.now()
            self._reaper.look()
        except RegistryError as error:
            self.close()
            raise Fault(DISK_FULL if isinstance(error, NoSpaceError) else IO_ERROR, error.message) from error
        except BaseException:
            self.close()
            raise

    @property
    def broken(self) -> str:
        """Why it needs a new start; empty: it does not, whatever etcd answers now."""
        return "etcd was set back to a backup: cursors and terms need a new epoch" if self._reaper.is_set_back else ""

    def on_change(self, callback: Callable[[], None]) -> None:
        """See LabStore."""
        self._callbacks.append(callback)

    def _call_back(self) -> None:
        for callback in self._callbacks:
            callback()

    def close(self) -> None:
        """See LabStore."""
        self._feed.end()
        self._gateway.close()
        self._feed.join()

    def about(self) -> About:
        """See LabStore."""
        counts = self._gateway.txn(
            Txn(then=tuple(Range(self._prefix + k, after(self._prefix + k), count_only=True) for k in _COUNTED))
        ).found
        names, locks, sessions, conflicts = (found.count for found in counts)
        return About(
            epoch=self._feed.epoch,
            cursor=self._feed.now(),
            names=names,
            locks=locks,
            sessions=sessions,
            conflicts=conflicts,
        )

    def _change(self, operation: Callable[[Identities], _Result]) -> _Result:
        return self._runner.run(lambda tx: operation(Identities(tx)))

    def _read(self, operation: Callable[[Transaction], _Result]) -> _Result:
        return self._runner.read(operation)

    # identities

    def find(self, *, name: str | None = None, id: str | None = None) -> Entry:
        """See LabStore."""

        def operation(tx: Transaction) -> Entry:
            lab = Identities(tx)
            if name is not None:
                tx.fetch(f"n/{name}", f"v/{name}", rows.lock_key(name))
            row = lab.names.taken(name) if name is not None else lab.names.of_id(id or "")
            if row is None:
                raise lab.names.absent(name, id)
            return lab.entry(row)

        return self._read(operation)

    def entries(self, after: str, limit: int, component_type: str | None = None) -> list[Entry]:
        """See LabStore."""
        return etcd_pages.entries(self._gateway, after, limit, component_type)

    def resolve(self, host: str, op: str, state: State, session: str | None, want: Want | None) -> Resolved:
        """See LabStore."""
        self._reaper.end_due()
        return self._change(lambda lab: lab.resolve(host, op, state, session, want))

    def apply(self, host: str, epoch: int, after: int | None, upto: int | None, changes: Sequence[Change]) -> Applied:
        """See LabStore. Each transaction takes in some of the changes and moves the mark behind them."""
        return etcd_batches.take_in(self._runner, host, epoch, after, upto, changes)

    def mark(self, host: str) -> Mark | None:
        """See LabStore."""
        text = self._read(lambda tx: tx.get(rows.mark_key(host)))
        return Mark(*json.loads(text)) if text else None

    def conflicts(self, *, decided: bool, after: tuple[str, str], limit: int) -> list[Conflict]:
        """See LabStore."""
        return etcd_pages.conflicts(self._gateway, self._read, decided=decided, after=after, limit=limit)

    def merge(self, host: str, name: str, prefer: str) -> Entry:
        """See LabStore."""
        return self._change(lambda lab: lab.merge(host, name, prefer))

    # hosts and locks

    def register(self, host: str, boot: str, lease_s: float, label: str) -> Session:
        """See LabStore."""
        self._reaper.end_due()
        (session, old), revision = self._runner.run_at(
            lambda tx: Identities(tx).locks.begin(host, boot, lease_s, label)
        )  # fmt: skip
        self._reaper.hear(session.id, lease_s, revision)
        self._remember(session)
        if old is not None:
            self._reaper.clear(old.id, "ended", CLEARED_MAX)
        return session

    def keep(self, host: str, session: str, boot: str) -> Session:
        """See LabStore. One request: the session's value stays, and its revision is new."""
        known = self._sessions.get(session) or self._read(lambda tx: Identities(tx).locks.living(host, session))
        key, owned = self._prefix + rows.session_key(session), self._prefix + rows.owned_key(session, "")
        if known.host == host and known.boot == boot:
            kept = self._gateway.txn(
                Txn(
                    compares=(Compare(key, "CREATE", 0, "GREATER"),),
                    then=(Put(key, None), Range(owned, after(owned), count_only=True)),
                )
            )
            if kept.succeeded:
                self._reaper.hear(session, known.lease_s, kept.revision)
                return self._remember(known, locks=kept.found[0].count)
            with self._guard:
                self._sessions.pop(session, None)
        raise SessionRequiredError(f"{host!r} with boot {boot} has no living session {session}: register again")

    def _remember(self, session: Session, locks: int = 0) -> Session:
        with self._guard:
            while len(self._sessions) >= SESSIONS_MAX:
                self._sessions.pop(next(iter(self._sessions)))
            self._sessions[session.id] = session
        return Session(**{**vars(session), "locks": locks})

    def end(self, host: str, session: str) -> bool:
        """See LabStore."""

        def operation(lab: Identities) -> bool:
            found = lab.locks.session(session)
            if found is None or found.host != host:
                return False
            lab.locks.end(found, "ended")
            return True

        ended = self._change(operation)
        if ended:
            self._reaper.clear(session, "ended", CLEARED_MAX)
        return ended

    def expire(self) -> int:
        """See LabStore."""
        return self._reaper.expire()

    def sessions(self) -> list[Session]:
        """See LabStore."""
        return etcd_pages.sessions(self._gateway)

    def acquire(self, host: str, session: str, wants: Sequence[tuple[str, Want]]) -> list[Lock | RegistryError]:
        """See LabStore. Each transaction takes some of them."""
        self._reaper.end_due()
        return etcd_batches.acquire(self._runner, host, session, wants)

    def release(self, host: str, session: str, terms: Mapping[str, int | None]) -> list[str]:
        """See LabStore. Each transaction gives back some of them."""
        return etcd_batches.release(self._runner, host, session, [*terms.items()])

    def locks(self, session: str) -> list[Lock]:
        """See LabStore."""
        return etcd_pages.locks(self._gateway, session)

    def given(self, names: Sequence[str]) -> dict[str, tuple[int, str | None]]:
        """See LabStore."""
        return self._read(lambda tx: etcd_pages.given(tx, names))

    # feed

    def changes(self, cursor: str | None, limit: int) -> Page:
        """See LabStore."""
        return self._feed.changes(cursor, limit, self._runner.revision)

    def history(self, name: str, after: int, limit: int) -> list[Event]:
        """See LabStore."""
        return etcd_pages.history(self._gateway, self._read, name, after, limit)


_COUNTED = ("n/", "l/", "s/", "u/")
