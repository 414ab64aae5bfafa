"""Where the lab did not take over what this host said of a component: what of that is noted here, what is only told.

The lab changes nothing here but this: that another ULID is preferred for a name that has one. Everything else that it
does not take over is for people to look at (`registryctl lab conflicts`), and stays here as it is.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from typing import Annotated, Any

from pydantic import Field

from madsci_registry.errors import NoSpaceError
from madsci_registryd import messages
from madsci_registryd.batch import Write
from madsci_registryd.core import Core
from madsci_registryd.lab_answers import Answer, Id, Mark
from madsci_registryd.registrar import RETRY_S
from madsci_registryd.transaction import Tx

log = logging.getLogger(__name__)

NOTED_A_TURN = 20
"""Each takes some 100 us."""
LOGGED_MAX = 10_000
"""Of so many components it is remembered that they were told of."""
TWO_IDS = "two_ids"

_Shown = Annotated[str, Field(max_length=2000)]
"""A name as the lab shows it; one that breaks its rules may be long and full of escapes."""


class Unapplied(Answer):
    """A state of this host that the lab did not take over as it was."""

    name: _Shown
    id: _Shown
    reason: Annotated[str, Field(max_length=100)]
    """two_ids, name_taken, held, wrong_type, newer, invalid."""
    preferred: Id | None = None
    """The ULID that the name has there."""
    why: _Shown = ""


class Applied(Answer):
    """What became of changes."""

    mark: Mark | None
    unapplied: Annotated[list[Unapplied], Field(max_length=2000)]


class Objections:
    """What the lab did not take over. Belongs to the loop's thread."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._new: deque[Unapplied] = deque()
        self._is_timed = False
        self._logged: dict[tuple[str, str], None] = {}
        self.counts: Counter[str] = Counter()
        """How many there were, by reason."""

    def take(self, unapplied: list[Unapplied]) -> None:
        """Note and tell them, some with each turn."""
        self._new += unapplied
        self._go_on_soon()

    def refuse(self, name: str, id: str, reason: str, why: str) -> None:
        """Count what the lab does not take over, and log it once for each component."""
        self.counts[reason] += 1
        if (id, reason) in self._logged:
            return
        self._logged[id, reason] = None
        if len(self._logged) > LOGGED_MAX:
            del self._logged[next(iter(self._logged))]
        text, extra = "the lab did not take over what is known of %r (%s) here: %s%s", messages.LAB_CHANGE_REFUSED
        log.warning(text, name, id, reason, f": {why}" if why else "", extra=extra(name=name, id=id, reason=reason))

    def _go_on_soon(self) -> None:
        if self._new and not self._is_timed:
            self._is_timed = True
            self._core.timers.after(0, self._go_on)

    def _go_on(self) -> None:
        self._is_timed = False
        for _ in range(min(len(self._new), NOTED_A_TURN)):
            each = self._new.popleft()
            if each.reason == TWO_IDS and each.preferred is not None:
                self.counts[TWO_IDS] += 1
                note_conflict(self._core, each.name, each.id, each.preferred)
            else:
                self.refuse(each.name, each.id, each.reason, each.why)
        self._go_on_soon()


def note_conflict(core: Core, name: str, id: str, preferred: str) -> None:
    """Take note, with the next batch, that the lab has the ULID `preferred` for the component that has this name and
    ULID here: another one, or this one again. A repeat is nothing."""
    service = core.service
    wanted = None if preferred == id else preferred
    present = service.store.by_name(name)
    if present is None or present.id != id or present.preferred_id == wanted:
        return

    def do(tx: Tx) -> bool | None:
        row = service.store.by_name(name)
        if row is None or row.id != id:
            return None  # it has changed meanwhile
        service.conflict(tx, row, preferred)
        after = service.known(name)
        return None if wanted is None else wanted in (after.id, after.preferred_id)

    def done(result: Any) -> None:
        if isinstance(result, NoSpaceError):
            core.timers.after(RETRY_S, lambda: note_conflict(core, name, id, preferred))
        elif result is True:
            text, extra = "%r is %s here and %s in the lab, whose ULID is preferred", messages.LAB_CONFLICT
            log.warning(text, name, id, preferred, extra=extra(name=name, id=id, preferred=preferred))
        elif result is False:
            text, extra = (
                "%r is %s here and %s in the lab, which is another component here",
                messages.LAB_CHANGE_REFUSED,
            )
            log.warning(text, name, id, preferred, extra=extra(name=name, id=id, reason=TWO_IDS))

    core.registrar.submit(Write(do, done))
