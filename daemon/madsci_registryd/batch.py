"""Group commit: the writes of one turn in one transaction, each behind its own savepoint, answered after the commit.

Rules
- A refused write undoes only itself; a write that breaks undoes itself and is answered `internal`.
- After an error `in_transaction` decides: where SQLite rolled the whole transaction back, nobody in it is told yes.
- A full disk is a definite no. Any other storage error leaves the outcome unknown: StorageFault, nobody is answered.
- Names that became free go to who waits for them, in the same transaction.
- Nobody dead is granted anything: who was granted is looked at just before the commit (and, by the loop, after it).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from madsci_registry.errors import InternalError, NoSpaceError, RegistryError
from madsci_registryd import messages
from madsci_registryd.clock import Clock, iso
from madsci_registryd.database import DISK_ERRORS, Connection, DatabaseError, DiskFullError, set_synchronous
from madsci_registryd.faults import StorageFault
from madsci_registryd.locks import Claim, Presence, Session
from madsci_registryd.meters import Meters
from madsci_registryd.service import Service
from madsci_registryd.transaction import Told, Tx

log = logging.getLogger(__name__)


def always() -> bool:
    """A write that changes locks only is `light=always`."""
    return True


@dataclass
class Write:
    """A step of a transaction and what to do with its result, or with the error that refused it."""

    do: Callable[[Tx], Any]
    done: Callable[[Any], None]
    light: Callable[[], bool] = lambda: False
    """It probably changes locks only, so that its commit need not be synced; if wrong, the batch is run again."""


class Batch:
    """Runs writes. Belongs to the thread that owns the database."""

    def __init__(
        self,
        db: Connection,
        service: Service,
        clock: Clock,
        is_dead: Callable[[Session], bool],
        path: str,
        meters: Meters,
    ) -> None:
        self._db = db
        self._service = service
        self._clock = clock
        self._is_dead = is_dead
        self._path = path
        self._meters = meters
        self._full = True
        self.tell: Callable[[Told], None] = lambda told: None
        """Called with what sessions are to be told, after the commit."""

    def run(self, writes: list[Write]) -> Tx | None:
        """Apply and commit the writes, then tell each its result; None where nothing was committed.

        Raises: StorageFault after which nothing may be answered any more.
        """
        durable = not all(w.light() for w in writes)
        try:
            tx, results = self._apply(writes, durable)
            if tx.durable and not durable:
                self._rollback()
                tx, results = self._apply(writes, durable=True)
            before = self._clock.monotonic()
            self._db.execute("COMMIT")
            took_s = self._clock.monotonic() - before
        except DiskFullError:
            self._rollback()
            full = NoSpaceError(f"no space left for {self._path}; reads go on", path=self._path)
            log.warning("%s", full, extra=messages.DISK_FULL())
            self._meters.disk_full += 1
            for write in writes:
                write.done(full)
            return None
        except DatabaseError as error:
            raise StorageFault(f"{type(error).__name__}: {error}") from error
        self._meters.committed(tx, len(writes), took_s, synced=self._full)
        for session in tx.stored:
            session.stored = True
        for session in tx.ended:
            session.presence = Presence.ENDED
        for told in tx.told:  # before the answers: a token that has grown is known before somebody is answered with it
            self.tell(told)
        for write, result in zip(writes, results, strict=True):
            write.done(result)
        return tx

    def _apply(self, writes: list[Write], durable: bool) -> tuple[Tx, list[Any]]:
        if durable is not self._full:
            set_synchronous(self._db, full=durable)
            self._full = durable
        self._db.execute("BEGIN IMMEDIATE")
        tx = Tx(iso(self._clock.wall()), self._clock.monotonic())
        results = [self._step(tx, write) for write in writes]
        self._hand_over(tx)
        return tx, results

    def _step(self, tx: Tx, write: Write) -> Any:
        mark = tx.mark()
        self._db.execute("SAVEPOINT step")
        try:
            result = write.do(tx)
        except RegistryError as error:
            result = error
        except DISK_ERRORS:
            raise
        except Exception:  # the outer loop of a step: a fault of ours spoils only its own request
            log.exception("a write broke", extra=messages.FAULT())
            result = InternalError("the daemon has a fault; it was logged, and nothing changed")
        if isinstance(result, RegistryError):
            if not self._db.in_transaction:
                raise StorageFault("SQLite rolled the transaction back by itself")
            self._db.execute("ROLLBACK TO step")
            tx.back_to(mark)
        self._db.execute("RELEASE step")
        return result

    def _hand_over(self, tx: Tx) -> None:
        """Give freed names to who waits, until nobody who was granted one is dead."""
        while True:
            while tx.freed:
                self._service.hand_over(tx, tx.freed.pop(0), lambda claim: self._may_hear(tx, claim))
            dead = next((s for s in tx.granted if s not in tx.ended and self._is_dead(s)), None)
            if dead is None:
                return
            self._service.end_session(tx, dead, "its process died")
            tx.settled = [(c, r) for c, r in tx.settled if c.owner.session != dead.id]
            tx.waiting = [c for c in tx.waiting if c.owner.session != dead.id]

    def _may_hear(self, tx: Tx, claim: Claim) -> bool:
        session = self._service.session(claim.owner.session)
        if session is None or session in tx.ended:
            return False
        return session.presence is Presence.ATTACHED and not self._is_dead(session)

    def _rollback(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
