"""Ends the sessions of silent hosts, clears away what is left of ended ones, and trims old events. One a replica.

Each replica looks at every session for itself, and remembers when its own clock had the answer in which the session's
revision was new. Only what was still so is ended (compare-and-delete): a replica that was paused, or is late, harms
nobody. After a call that failed or was slow every lease begins anew, as keepalives may not have come through either:
also where etcd is full, and reads alone are answered. (Then each look tries a write, until one is taken.)
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from madsci_registry.errors import NoSpaceError, RegistryError, UnavailableError
from madsci_registry_lab import etcd_rows as rows
from madsci_registry_lab.clock import Clock
from madsci_registry_lab.etcd_gateway import EtcdGateway
from madsci_registry_lab.etcd_identities import Identities
from madsci_registry_lab.etcd_rows import loads
from madsci_registry_lab.etcd_transaction import Runner, Transaction
from madsci_registry_lab.etcd_wire import Delete, Kv, Put, Range, Txn, after
from madsci_registry_lab.leases import Leases
from madsci_registry_lab.store import Lock, Session

SLOW_S = 1.0
"""A look that took longer says nothing about who was silent."""
SWEEP = 25
"""Locks that are cleared away in one transaction."""
KEPT_EVENTS = 1_000_000
"""Transactions with events of locks and hosts, beyond which the oldest are trimmed, as with SQLite."""
TRIM = 50
"""So many at a time, once a minute and until there are no more."""
TRIM_EACH_S = 60.0


class Reaper:
    """What one replica knows of sessions. Thread-safe."""

    def __init__(self, gateway: EtcdGateway, runner: Runner, clock: Clock) -> None:
        self._gateway, self._runner, self._clock = gateway, runner, clock
        self._prefix = gateway.access.prefix
        self._leases = Leases(clock)
        self._guard = threading.Lock()
        self._changed: dict[str, int] = {}
        """By session: the revision in which it was kept last."""
        self._revision, self._steps_back, self._is_replaced = 0, 0, False
        self._is_full = False
        """A write was refused, and none has been taken since."""
        self._trimmed_at = clock.monotonic()

    @property
    def is_set_back(self) -> bool:
        """A backup was restored under this program: nobody answered a look but another cluster, or the store was older
        than it had been, at two looks in a row. (Once may be a stale read, as etcd before 3.4.42 can answer one when a
        member was paused.)"""
        return self._steps_back > 1 or self._is_replaced

    def hear(self, session: str, lease_s: float, revision: int) -> None:
        """Note that a session was kept in this revision; its lease begins now, after the answer."""
        with self._guard:
            if revision > self._changed.get(session, 0):
                self._changed[session] = revision
                self._leases.hear(session, lease_s)

    def look(self) -> None:
        """Look at all sessions, and clear away what is left of ended ones.

        Raises:
            UnavailableError: every lease has begun anew.
        """
        with self._hoping():
            self._look()

    def _look(self) -> None:
        if self._is_full:
            self._gateway.txn(Txn(then=(Put(self._prefix + rows.PROBE, ""),)))
            self._is_full = False
            self._begin_anew()
        begun = self._clock.monotonic()
        try:
            living, gone = self._gateway.txn(Txn(then=(self._all("s/"), self._all("d/")))).found
        except UnavailableError:
            self._is_replaced = self._gateway.is_replaced
            raise
        self._is_replaced = False
        if self._clock.monotonic() - begun > SLOW_S:
            self._begin_anew()
        self._steps_back = self._steps_back + 1 if living.revision < self._revision else 0
        self._revision = max(self._revision, living.revision)
        for kv in living.kvs:
            self.hear(_tail(kv), loads(Session, kv.value).lease_s, kv.changed)
        for kv in gone.kvs:
            self.clear(_tail(kv), kv.value)
        with self._guard:
            for id in self._changed.keys() - {_tail(kv) for kv in living.kvs}:
                if self._changed[id] <= living.revision:  # it has ended, and did not begin just now
                    self._forget(id)

    def end_due(self) -> int:
        """End the sessions whose lease is over, if they are still as they were seen last; return how many. Their locks
        are free then; what is left of them, a look clears away.

        Raises:
            UnavailableError, NoSpaceError: every lease has begun anew.
        """
        with self._guard:
            due = self._leases.due()
        with self._hoping():
            return sum(self._end(id) for id in due)

    def expire(self) -> int:
        """See LabStore."""
        self.look()
        ended = self.end_due()
        if ended:
            self.look()  # it clears away
        if self._clock.monotonic() - self._trimmed_at > TRIM_EACH_S:
            self._trimmed_at = self._clock.monotonic()
            self._trim()
        return ended

    def clear(self, session: str, kind: str, most: int | None = None) -> None:
        """Clear away the locks of a session that has ended, some in each transaction; beyond `most`, a look does."""
        start, cleared = rows.owned_key(session, ""), 0
        while most is None or cleared < most:
            found = self._gateway.range(Range(self._prefix + start, after(self._prefix + start), limit=SWEEP)).kvs
            if not found:
                self._gateway.txn(Txn(then=(Delete(f"{self._prefix}d/{session}"),)))
                break
            cleared += len(found)
            names = [kv.key.removeprefix(self._prefix + start) for kv in found]
            self._runner.run(lambda tx, names=names: _clear(tx, session, names, kind))  # type: ignore[misc] # bound

    def _end(self, id: str) -> bool:
        """End a session, if it is still as it was seen last; else it has ended, or its lease begins anew."""
        with self._guard:
            seen = self._changed.get(id)

        def operation(tx: Transaction) -> tuple[int, Session | None]:
            changed, locks = tx.pin(rows.session_key(id)), Identities(tx).locks
            session = locks.session(id)
            if session is not None and changed == seen:
                locks.end(session, "expired")
            return changed, session

        changed, session = self._runner.run(operation)
        ended = session is not None and changed == seen
        with self._guard:
            if session is None or ended:
                self._forget(id)
            else:
                self._changed[id] = changed
                self._leases.hear(id, session.lease_s)
        return ended

    @contextmanager
    def _hoping(self) -> Iterator[None]:
        """Let every lease begin anew where etcd does not do what is asked inside."""
        try:
            yield
        except RegistryError as error:
            self._is_full = self._is_full or isinstance(error, NoSpaceError)
            self._begin_anew()
            raise

    def _begin_anew(self) -> None:
        """Forget all sessions: the lease of each begins when it is seen next."""
        with self._guard:
            for id in [*self._changed]:
                self._forget(id)

    def _forget(self, id: str) -> None:
        self._changed.pop(id, None)
        self._leases.forget(id)

    def _trim(self) -> None:
        """Delete the oldest events of locks and hosts beyond those that are kept."""
        extra = self._gateway.range(Range(f"{self._prefix}x/", after(f"{self._prefix}x/"), count_only=True)).count
        extra -= KEPT_EVENTS
        while extra > 0:
            oldest = self._gateway.range(
                Range(f"{self._prefix}x/", after(f"{self._prefix}x/"), limit=min(extra, TRIM))
            ).kvs
            # What names them goes last: whoever is killed in between leaves nothing that nobody finds.
            keys = [self._prefix + key for kv in oldest for key in json.loads(kv.value)] + [kv.key for kv in oldest]
            for n in range(0, len(keys), TRIM * 2):
                self._gateway.txn(Txn(then=tuple(Delete(key) for key in keys[n : n + TRIM * 2])))
            extra -= max(len(oldest), 1)

    def _all(self, kind: str) -> Range:
        return Range(self._prefix + kind, after(self._prefix + kind))


def _clear(tx: Transaction, session: str, names: Sequence[str], kind: str) -> None:
    locks = Identities(tx).locks
    tx.fetch(*(key for name in names for key in (rows.lock_key(name), f"n/{name}")))
    for name in names:
        text = tx.get(rows.lock_key(name))
        if text is not None and loads(Lock, text).session == session:
            locks.drop(loads(Lock, text), why=kind)
        else:
            tx.delete(rows.owned_key(session, name))


def _tail(kv: Kv) -> str:
    return kv.key.rpartition("/")[2]
