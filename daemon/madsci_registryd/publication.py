"""What of a request must be in registry.json before it is answered: names with their ULIDs, and claims on them.

A ULID that is new is made here, since the file shows it before the database has it; from then on it is that name's,
whatever becomes of the request.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

import ulid

from madsci_registry import protocol as p
from madsci_registry.errors import BusyError, RegistryError
from madsci_registryd import fragments
from madsci_registryd.clock import iso
from madsci_registryd.core import Core
from madsci_registryd.export import Want
from madsci_registryd.fragments import Identity
from madsci_registryd.intake import Intake
from madsci_registryd.locks import Session
from madsci_registryd.old_programs import OldPrograms
from madsci_registryd.store import Row

BUSY_S = 2.0
"""How long a request waits for the file lock."""


class Minted(NamedTuple):
    """A component that the file may show already, though the database has it not yet."""

    id: str
    component_type: str
    created_at: str
    metadata: dict[str, Any]

    def entry(self) -> dict[str, Any]:
        return {**self._asdict(), "last_seen": self.created_at}


class Publication(OldPrograms, ABC):
    """Which names the file has, and what requests want in it. The bridge brings it there."""

    def __init__(self, core: Core, intake: Intake) -> None:
        self._store = core.store
        self._service = core.service
        self._timers = core.timers
        self._clock = core.clock
        self._intake = intake
        self.is_off = False
        """The file cannot be had, and no waiting helps: names are given without it."""
        self.claimed: set[str] = set()
        self.minted: dict[str, Minted] = {}
        self._leftovers: dict[str, str] = {}
        """New names of renames, which the file shows before they are done, and their ULIDs: some are refused."""
        self.shown: set[str] = set()
        """Minted names that the file has."""

    @abstractmethod
    def is_asked(self, name: str) -> bool:
        """Tell whether a request still waits for the file to have the name."""

    @abstractmethod
    def repair(self, name: str, id: str | None) -> None:
        """Let the file have of a name what the database has, also where that is nothing, and of the component that the
        file has or had under it."""

    def ready(self, name: str) -> bool:
        return name in self.claimed or self.is_off

    def id_for(self, name: str) -> str | None:
        minted = self.minted.get(name)
        return minted.id if minted else None

    def for_resolve(self, who: Session, r: p.Resolve) -> list[Want]:
        if self.is_off:
            return []
        is_known = self._store.id_of(r.name) is not None
        is_ready = not r.acquire_lock or r.name in self.claimed or self._service.queues.find(who.id, r.seq) is not None
        if is_known and is_ready:
            return []
        self._intake.hurry(r.name)
        row = self._service.check(r)
        if row is None and r.name in self._leftovers:
            self.repair(r.name, self._leftovers.pop(r.name))
        if row is None and self._service.lab.refusal(r.name) is not None:
            return []  # it is refused, or made when the lab gives it
        if row is not None:
            return [Want(r.name, self._identity_of(row), lock=True)]
        return [self._want_new(r.name, r.component_type, r.metadata or {}, lock=r.acquire_lock)]

    def for_many(self, who: Session, r: p.ResolveMany) -> list[Want]:
        wants = []
        for item in r.items:
            try:
                wants += self.for_resolve(who, self._service.single(r, item))
            except RegistryError:
                continue  # it is answered with the others
        return wants

    def for_rename(self, who: Session, r: p.Rename) -> list[Want]:
        self._intake.hurry_all()
        row = self._store.by_name(r.old)
        if self.is_off or row is None or r.old == r.new or self._store.id_of(r.new) is not None:
            return []  # it is answered at once
        if not self._service.is_id_of(row, r.id):
            return []  # so is this
        if row.old_lock is not None or (row.lock is not None and not r.force):
            return []  # refused, and the file need not know
        self._service.check_new(r.new)
        if r.new in self.minted:
            raise BusyError(f"{r.new!r} is just being made by somebody else; try again")
        self._leftovers[r.new] = row.id
        self._timers.after(2 * BUSY_S, lambda: self._clear_leftover(r.new))
        identity = self._identity_of(row)
        # The old name too, though it may be claimed now: the claim could be given back meanwhile.
        return [Want(name, identity, lock=True) for name in (r.old, r.new)]

    def _clear_leftover(self, name: str) -> None:
        if name in self._leftovers:
            self.repair(name, self._leftovers.pop(name))

    def for_import(self, entries: Iterable[tuple[str, dict[str, Any]]]) -> list[Want]:
        if self.is_off:
            return []
        self._intake.hurry_all()
        new = [
            (name, entry)
            for name, entry in entries
            if self._store.id_of(name) is None and self._store.by_id(entry["id"]) is None
        ]
        for name, entry in new:
            if name in self.minted and self.minted[name].id != entry["id"]:
                raise BusyError(f"{name!r} is just being made by somebody else; try again")
        for name, entry in new:
            if name not in self.minted:
                metadata = entry.get("metadata") or {}
                self._mint(name, Minted(entry["id"], entry["component_type"], self._now(), metadata))
        return [Want(name, fragments.of_entry(entry), lock=False) for name, entry in new]

    def _want_new(self, name: str, component_type: str, metadata: dict[str, Any], *, lock: bool) -> Want:
        if name not in self.minted:
            id = self._service.lab.id_for(name) or str(ulid.ULID())
            self._mint(name, Minted(id, component_type, self._now(), metadata))
        return Want(name, fragments.of_entry(self.minted[name].entry()), lock)

    def _mint(self, name: str, minted: Minted) -> None:
        self.minted[name] = minted
        self._timers.after(2 * BUSY_S, lambda: self._settle_minted(name))

    def _settle_minted(self, name: str) -> None:
        """What the file has shown stays, though nobody came for it in the end."""
        minted = self.minted.get(name)
        if minted is None:
            return
        if self.is_asked(name):
            self._timers.after(BUSY_S, lambda: self._settle_minted(name))
        elif name in self.shown:
            self._intake.adopt(name, minted.entry())
        else:
            del self.minted[name]

    def _identity_of(self, row: Row) -> Identity:
        return fragments.of_row(row, self._store.other_ids(row.id))

    def _now(self) -> str:
        return iso(self._clock.wall())
