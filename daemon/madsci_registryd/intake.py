"""What old programs wrote into registry.json, into the database: one step of the next batch for each change."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any

from madsci_registry.errors import NoSpaceError, RegistryError
from madsci_registry.names import NAME_MAX_BYTES
from madsci_registry.types import OldLock
from madsci_registryd import adoption, messages
from madsci_registryd.batch import Write
from madsci_registryd.clock import iso
from madsci_registryd.core import Core
from madsci_registryd.merging import Entry, Merge, Refusal
from madsci_registryd.registrar import RETRY_S
from madsci_registryd.service import Service
from madsci_registryd.transaction import Tx

log = logging.getLogger(__name__)

WRITERS_KEPT = 20
NAMES_LOGGED = 20
NAMES_A_TURN = 100
"""Taking in a name takes some 30 us; the other clients come in between."""
DETAIL_MAX = 500
REFUSALS_KEPT = 20
"""Of one kind and pass: an old program that empties a large file says one thing, not ten thousand."""

Step = Callable[[Service, Tx], None]


class Intake:
    """Belongs to the loop's thread."""

    def __init__(self, core: Core) -> None:
        self._service = core.service
        self._registrar = core.registrar
        self._timers = core.timers
        self._clock = core.clock
        self._until: dict[str, float] = {}
        """Names that old programs hold, and until when if that is not renewed."""
        self._arriving: dict[str, list[tuple[Step, str | None]]] = {}
        """What is still to be taken in, in the order in which it came, by name."""
        self._is_timed = False
        self.refused = 0
        self.writers: dict[tuple[str, int, str], str] = {}
        """Old programs by host, pid and instance, and when they were last seen to write."""
        self.repair: Callable[[str, str | None], None] = lambda name, id: None
        """Called with a name, and the ULID that it has there if it is new, of which the database refused something."""

    def merge(self, merge: Merge, until: dict[str, float], *, at_once: bool) -> None:
        """Take in what a pass found, name by name, some with each turn; `at_once`: all with the next batch."""
        for name, entry in merge.adopted.items():
            self._arrive(name, partial(adoption.adopt, name=name, entry=entry), entry["id"])
        for old, new in merge.renamed.items():
            self.hurry(old)
            row = self._service.store.by_name(old)
            self.take_in(new, partial(adoption.rename, old=old, new=new), row.id if row else None)
        for name, change in merge.updated.items():
            self._arrive(name, partial(adoption.update, name=name, change=change))
        for name, lock in merge.locks.items():
            self._arrive(name, partial(adoption.lock, name=name, held=lock))
            self._note_old(name, lock, until.get(name, 0.0))
        if at_once:
            self.hurry_all()
        self._take_some()
        self._refuse(merge.refused)
        if merge.adopted:
            log.info("registry.json: took in %s", _listed(merge.adopted), extra=messages.OLD_NAMES_TAKEN_IN())

    def _arrive(self, name: str, step: Step, id: str | None = None) -> None:
        self._arriving.setdefault(name, []).append((step, id))

    def _take_some(self) -> None:
        for name in list(islice(self._arriving, NAMES_A_TURN)):
            self.hurry(name)
        if self._arriving and not self._is_timed:
            self._is_timed = True
            self._timers.after(0, self._go_on)

    def _go_on(self) -> None:
        self._is_timed = False
        self._take_some()

    def hurry(self, name: str) -> None:
        """Take in what is known of a name with the next batch: its turn has come, or somebody asks for it."""
        for step, id in self._arriving.pop(name, ()):
            self.take_in(name, step, id)

    def hurry_all(self) -> None:
        """Take in all with the next batch, for who asks for what cannot be told by a name."""
        for name in list(self._arriving):
            self.hurry(name)

    def _refuse(self, refusals: list[Refusal]) -> None:
        """Record what is not taken in; of many of a kind the first ones, and how many more there were."""
        by_kind: dict[str, list[Refusal]] = {}
        for refusal in refusals:
            by_kind.setdefault(refusal.what, []).append(refusal)
        for what, all_of_it in by_kind.items():
            for refusal in all_of_it[:REFUSALS_KEPT]:
                self.refuse(refusal)
            more = len(all_of_it) - REFUSALS_KEPT
            if more > 0:
                self.refuse(Refusal(what, "", f"and {more} more, the last of {all_of_it[-1].name[:80]!r}"))
                self.refused += more - 1

    def take_in(self, name: str | None, step: Step, id: str | None = None) -> None:
        """Make a change of an old program in the next batch; on a full disk again and again."""

        def done(result: Any) -> None:
            if isinstance(result, NoSpaceError):
                self._timers.after(RETRY_S, lambda: self.take_in(name, step, id))
            elif isinstance(result, RegistryError) and name is not None:
                self.refused += 1
                extra = messages.OLD_CHANGE_REFUSED(name=name)
                log.warning("registry.json: refused a change of %r: %s", name, result, extra=extra)
                self.repair(name, id)

        self._registrar.submit(Write(lambda tx: step(self._service, tx), done))

    def _note_old(self, name: str, lock: OldLock | None, until: float) -> None:
        if lock is None:
            self._until.pop(name, None)
            return
        self.note_writer(lock)
        self.watch(name, until)

    def watch(self, name: str, until: float) -> None:
        self._until[name] = until
        self._timers.after(until - self._clock.monotonic(), lambda: self._expire(name))

    def _expire(self, name: str) -> None:
        """An old program has not renewed its lock in time: the name is free."""
        if self._until.get(name, math.inf) <= self._clock.monotonic():
            del self._until[name]
            self.take_in(name, partial(adoption.lock, name=name, held=None))

    def note_writer(self, lock: OldLock | None) -> None:
        if lock is None:
            return
        key = lock.holder_host, lock.holder_pid, lock.holder_instance
        self.writers.pop(key, None)
        self.writers[key] = iso(self._clock.wall())
        if len(self.writers) > WRITERS_KEPT:
            del self.writers[next(iter(self.writers))]

    def adopt(self, name: str, entry: Entry) -> None:
        """Take in a name that the file has, and the database has not."""
        self.take_in(name, partial(adoption.adopt, name=name, entry=entry), entry["id"])

    def refuse(self, refusal: Refusal) -> None:
        """Record something that is not taken in."""
        refusal = refusal._replace(name=refusal.name[:NAME_MAX_BYTES], detail=refusal.detail[:DETAIL_MAX])
        what = refusal.name, refusal.what, refusal.detail
        extra = messages.OLD_CHANGE_REFUSED(name=refusal.name)
        log.warning("registry.json: refused a change of %r (%s): %s", *what, extra=extra)
        self.refused += 1
        self.note_writer(refusal.writer)
        self.take_in(None, partial(adoption.refuse, refusal=refusal))


def _listed(names: Iterable[str]) -> str:
    first = sorted(names)
    more = f" and {len(first) - NAMES_LOGGED} more" if len(first) > NAMES_LOGGED else ""
    return f"{len(first)} names: {', '.join(first[:NAMES_LOGGED])}{more}"
