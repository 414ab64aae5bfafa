"""Follows what people have decided in the lab of names with several ULIDs.

A decision may be for a ULID that this host does not prefer, while nothing else makes it ask the lab about that name. So
it asks for the conflicts: when the lab comes back, now and then, and after a decision that was made here.
"""

from __future__ import annotations

from madsci_registry.errors import RegistryError
from madsci_registryd import lab_answers as a
from madsci_registryd.core import Core
from madsci_registryd.lab_conflicts import note_conflict
from madsci_registryd.lab_gateway import Gateway
from madsci_registryd.lab_lanes import Send

LOOK_S = 60.0
WITHIN_S = 10.0
PAGES_MAX = 50
"""Of 200 conflicts each: no lab that people look after has so many."""


class Decisions:
    """Belongs to the loop's thread."""

    def __init__(self, core: Core, send: Send) -> None:
        self._core = core
        self._send = send
        self._is_asking = False
        self._not_before = 0.0

    def look(self, *, now: bool = False) -> None:
        """Ask the lab, if it was not asked lately, or `now`. To be called while it is there."""
        clock = self._core.clock
        if not self._is_asking and (now or clock.monotonic() >= self._not_before):
            self._not_before = clock.monotonic() + LOOK_S
            self._ask(None, PAGES_MAX)

    def lost(self) -> None:
        """The lab is away: it is asked as soon as it is back."""
        self._not_before = 0.0

    def _ask(self, after: list[str] | None, pages: int) -> None:
        self._is_asking = True
        body = {"decided": True} | ({"after": after} if after else {})

        def call(gateway: Gateway) -> a.Conflicts:
            return a.read(a.Conflicts, gateway.post("/registry/conflicts", body, within_s=WITHIN_S))

        def done(result: a.Conflicts | RegistryError) -> None:
            self._is_asking = False
            if isinstance(result, RegistryError):
                return  # the next look is soon enough
            for conflict in result.conflicts:
                self._follow(conflict)
            if result.after is not None and pages > 1:
                self._ask(result.after, pages - 1)

        self._send("tell", call, done)

    def _follow(self, conflict: a.Conflict) -> None:
        entry, row = conflict.entry, self._core.store.by_name(conflict.name)
        if entry is None or entry.name != conflict.name or row is None:
            return
        is_another = entry.id != row.id and row.id in entry.other_ids
        if is_another or (entry.id == row.id and row.preferred_id is not None):
            note_conflict(self._core, row.name, row.id, entry.id)
