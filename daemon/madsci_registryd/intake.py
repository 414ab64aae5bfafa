"""What old programs wrote into registry.json, into the database: one step of the next batch for each change."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from madsci_registry.errors import NoSpaceError, RegistryError
from madsci_registry.types import OldLock
from madsci_registryd import adoption
from madsci_registryd.batch import Write
from madsci_registryd.clock import iso
from madsci_registryd.core import Core
from madsci_registryd.merging import Entry, Merge, Refusal
from madsci_registryd.registrar import RETRY_S

log = logging.getLogger(__name__)

WRITERS_KEPT = 20
NAMES_LOGGED = 20
ADOPTED_A_TURN = 100
"""Taking in a name takes some 30 us; the other clients come in between."""


class Intake:
    """Belongs to the loop's thread."""

    def __init__(self, core: Core) -> None:
        self._service = core.service
        self._registrar = core.registrar
        self._timers = core.timers
        self._clock = core.clock
        self._until: dict[str, float] = {}
        """Names that old programs hold, and until when if that is not renewed."""
        self.arriving: dict[str, tuple[Entry, OldLock | None]] = {}
        """Names of the file that are still to be taken in, where they are many."""
        self.refused = 0
        self.writers: dict[tuple[str, int, str], str] = {}
        """Old programs by host, pid and instance, and when they were last seen to write."""
        self.repair: Callable[[str], None] = lambda name: None
        """Called with a name of which the file says what the database refused."""

    def merge(self, merge: Merge, until: dict[str, float], *, at_once: bool) -> None:
        """Take in what a pass found; `at_once`: all of many new names, before anybody is served."""
        names = list(merge.adopted)
        rest = [] if at_once else names[ADOPTED_A_TURN:]
        late = set(rest)
        for name in names:
            if name not in late:
                self.adopt(name, merge.adopted[name])
        for old, new in merge.renamed.items():
            self.take_in(new, partial(adoption.rename, old=old, new=new))
        for name, change in merge.updated.items():
            self.take_in(name, partial(adoption.update, name=name, change=change))
        for name, lock in merge.locks.items():
            if name in self.arriving:
                self.arriving[name] = self.arriving[name][0], lock
            elif name not in late:
                self.take_in(name, partial(adoption.lock, name=name, held=lock))
            self._note_old(name, lock, until.get(name, 0.0))
        if rest:
            self.arriving |= {name: (merge.adopted[name], merge.locks.get(name)) for name in rest}
            self._timers.after(0, lambda: self._take_rest(rest))
        for refusal in merge.refused:
            log.warning("registry.json: refused a change of %r (%s): %s", refusal.name, refusal.what, refusal.detail)
            self.refuse(refusal)
        if names:
            names.sort()
            more = f" and {len(names) - NAMES_LOGGED} more" if len(names) > NAMES_LOGGED else ""
            log.info("registry.json: took in %d names: %s%s", len(names), ", ".join(names[:NAMES_LOGGED]), more)

    def _take_rest(self, names: list[str]) -> None:
        for name in names[:ADOPTED_A_TURN]:
            self.hurry(name)
        if len(names) > ADOPTED_A_TURN:
            self._timers.after(0, lambda: self._take_rest(names[ADOPTED_A_TURN:]))

    def hurry(self, name: str) -> None:
        """Take in one of many names with the next batch: its turn has come, or somebody asks for it."""
        arriving = self.arriving.pop(name, None)
        if arriving is not None:
            entry, lock = arriving
            self.adopt(name, entry)
            self.take_in(name, partial(adoption.lock, name=name, held=lock))

    def take_in(self, name: str | None, step: Callable[..., None]) -> None:
        """Make a change of an old program in the next batch; on a full disk again and again."""

        def done(result: Any) -> None:
            if isinstance(result, NoSpaceError):
                self._timers.after(RETRY_S, lambda: self.take_in(name, step))
            elif isinstance(result, RegistryError) and name is not None:
                self.refused += 1
                log.warning("registry.json: refused a change of %r: %s", name, result)
                self.repair(name)

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
        self.take_in(name, partial(adoption.adopt, name=name, entry=entry))

    def refuse(self, refusal: Refusal) -> None:
        """Record something that is not taken in."""
        self.refused += 1
        self.note_writer(refusal.writer)
        self.take_in(None, partial(adoption.refuse, refusal=refusal))
