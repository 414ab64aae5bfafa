"""The daemon without its sockets, put together: database, rules, verbs, batch. What tests drive with a fake clock."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ulid

from madsci_registryd.admission import Admission
from madsci_registryd.backups import Backups
from madsci_registryd.batch import Batch
from madsci_registryd.clock import Clock, Timers, iso
from madsci_registryd.database import Connection, transaction
from madsci_registryd.faults import CorruptDatabase
from madsci_registryd.handlers import Handlers
from madsci_registryd.identities import TERM_LIMIT, TOKENS_A_TERM
from madsci_registryd.imports import Imports
from madsci_registryd.locks import Queues, Session
from madsci_registryd.meters import Meters
from madsci_registryd.quotas import Limits, Quotas, Usage
from madsci_registryd.reads import Reads
from madsci_registryd.registrar import Registrar
from madsci_registryd.service import Service
from madsci_registryd.store import Store
from madsci_registryd.transaction import Tx
from madsci_registryd.watchers import Watchers


class Core:
    """One start of the daemon over an open database. One thread."""

    def __init__(
        self,
        db: Connection,
        database: Path,
        clock: Clock,
        *,
        host: str,
        status: Callable[[], dict[str, Any]],
        metrics: Callable[[], str] = str,
        epoch_floor: int = 0,
        admission: Admission | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.db = db
        self.clock = clock
        self.timers = Timers(clock)
        self.store = Store(db)
        self.queues = Queues()
        self.registrar = Registrar(clock, self.timers, self.queues)
        self.epoch = self._next_epoch(epoch_floor)
        sessions = self.registrar.sessions
        self.service = Service(
            self.store, self.queues, sessions.get, lambda: str(ulid.ULID()), epoch=self.epoch, host=host
        )
        self.quotas = Quotas(limits or Limits(), clock)
        self._open_quotas(admission or Admission("owner", frozenset(), os.geteuid(), os.getegid()))
        reads = Reads(self.service, sessions.values, clock, status, metrics)
        self.meters = Meters()
        self.registrar.watchers = Watchers(reads, self.quotas, clock, self.timers)
        batch = Batch(db, self.service, clock, self._is_dead, str(database), self.meters)
        self.registrar.open(self.service, reads, batch)
        self.backups = Backups(db, database)
        self.registrar.at_end.append(self.backups.end)
        self.handlers = Handlers(self.registrar, Imports(self.registrar), self.backups, self.epoch, self.meters)

    def _open_quotas(self, admission: Admission) -> None:
        service, quotas, clock = self.service, self.quotas, self.clock
        service.admission, service.quotas = admission, quotas
        service.names = Usage("names", quotas, clock, self.store.names_of_uid)
        service.locks = Usage("locks", quotas, clock, self.store.locks_of_uid)
        service.waiting = Usage("requests", quotas, clock, self._waiting_of_uid)

    def _waiting_of_uid(self, uid: int) -> int:
        sessions = self.registrar.sessions
        return sum(sessions[claim.owner.session].uid == uid for claim in self.queues if claim.owner.session in sessions)

    def _is_dead(self, session: Session) -> bool:
        return self.registrar.is_dead(session)

    def _next_epoch(self, floor: int) -> int:
        """Return a number above every epoch and term that an earlier start can have used; `floor` is one that did.

        Raises: CorruptDatabase where there is none left.
        """
        stored = max(int(self.store.meta("epoch") or 0), floor)
        wall_s = int(self.clock.wall())
        epoch = max(stored + 1, wall_s, self.store.highest_token() // TOKENS_A_TERM + 1)
        if epoch >= TERM_LIMIT:
            far = "the host's clock" if epoch == wall_s else "what the database and its lock file know"
            raise CorruptDatabase(
                f"the epoch of this start would be {epoch}, by {far}: it has to be below {TERM_LIMIT}, for fencing "
                f"tokens to stay below 2^53; set the clock right, or restore a backup that is older than the mistake"
            )
        return epoch

    def begin(self, version: str, judge: Callable[[Tx, Session], None]) -> None:
        """Run the start transaction: durable, so that no token or revision is ever given twice.

        `judge` ends each session that an earlier start left, or adds it to the registrar.
        """
        now = iso(self.clock.wall())
        # A power loss may have taken revisions that were given but not synced; the WAL holds far fewer than 2^20.
        self.store.raise_revision(max(self.store.revision + (1 << 20), self.epoch << 20))
        with transaction(self.db):
            self.store.set_meta("epoch", self.epoch)
            if self.store.meta("created_at") is None:
                self.store.set_meta("created_at", now)
            self.store.add_event("started", now, uid=os.geteuid(), pid=os.getpid(), why={"version": version})
            tx = Tx(now, self.clock.monotonic())
            for session in self.store.sessions():
                judge(tx, session)

    def close(self) -> None:
        """Close the database; locks stay in it for the next start."""
        self.backups.close()
        self.db.close()
