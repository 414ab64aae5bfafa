"""Which changes the lab is to be told next: requests, built in small pieces, one each turn of the loop.

Pages of changes, or of states in a sync, are read into `_ahead`, and go from there into the request that is being
built, until that is whole.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from madsci_registryd.identity_history import IdentityHistory, Told
from madsci_registryd.store import Store

CHANGES_A_TURN = 20
"""Each takes some 10 us."""
CHANGES_A_REQUEST = 1000
"""As many as the lab takes at once."""
CHARS_A_REQUEST = 16 * 1024
"""Some 50 changes. While a thread encodes a request no other thread runs: 0.1 ms for this much."""


@dataclass
class Request:
    """Changes, or states of a sync, for the lab."""

    told: list[Told] = field(default_factory=list)
    size: int = 0
    upto: int = 0
    """The lab has all up to this revision with it; 0: it does not with this part of a sync."""
    is_whole: bool = False

    def take(self, told: Told, most: int) -> bool:
        """Take one more; False: there is no room. What is too large by itself goes alone."""
        if self.told and (self.size + told.size > CHARS_A_REQUEST or len(self.told) >= most):
            return False
        self.told.append(told)
        self.size += told.size
        self.upto = told.revision
        return True

    def components(self) -> list[dict[str, Any]]:
        """Return states as the lab's routes have them."""
        return [each.component | {"metadata": json.loads(each.component["metadata"])} for each in self.told]

    def changes(self) -> list[dict[str, Any]]:
        """Return changes as the lab's routes have them."""
        pairs = zip(self.told, self.components(), strict=True)
        return [{"revision": each.revision, "component": component} for each, component in pairs]


class Changes:
    """The changes after a revision, or a sync and then those. Belongs to the loop's thread."""

    def __init__(self, store: Store, after: int) -> None:
        self._store = store
        self.history = IdentityHistory(store)
        self.start(after)

    def start(self, after: int) -> None:
        """Begin with the changes after a revision."""
        self._position = after
        """Changes were read up to here."""
        self._cursor: str | None = None
        """States of a sync were read up to this name."""
        self.sync_upto: int | None = None
        """A sync is under way; when it is done, the lab has all up to this revision."""
        self._ahead: deque[Told] = deque()
        self._read_at: int | None = None
        """All was read when this was the store's identity_revision."""
        self._singly = 0
        """So many are to go alone."""
        self.request = Request()

    def start_sync(self) -> None:
        """Begin with all present states."""
        self.start(self.history.last_revision())
        self.sync_upto, self._cursor = self._position, ""

    @property
    def is_idle(self) -> bool:
        """There is nothing to be sent."""
        is_read = self.sync_upto is None and self._read_at == self._store.identity_revision
        return is_read and not self._ahead and not self.request.told and not self.request.is_whole

    def build(self) -> bool:
        """Go on with the request, a page at most; True: it is whole, though maybe with nothing in it."""
        if not self.request.is_whole:
            self.request.is_whole = self._fill()
        return self.request.is_whole

    def _fill(self) -> bool:
        is_all = False if self._ahead else self._read_page()
        while self._ahead:
            if not self.request.take(self._ahead[0], 1 if self._singly else CHANGES_A_REQUEST):
                return True
            self._ahead.popleft()
        if is_all and self.sync_upto is not None:
            self.request.upto = self.sync_upto
        return is_all

    def _read_page(self) -> bool:
        """Read what comes next; True: that is all."""
        present = self._store.identity_revision
        if self.sync_upto is None:
            page = self.history.changes(self._position, CHANGES_A_TURN)
            self._position = page[-1].revision if page else self._position
            is_all = len(page) < CHANGES_A_TURN
        elif self._cursor is None:
            return True
        else:
            page, self._cursor = self.history.states(self._cursor, CHANGES_A_TURN, self.sync_upto)
            is_all = self._cursor is None
        self._ahead += page
        if is_all:
            self._read_at = present
        return is_all

    def done(self) -> None:
        """The lab has taken the request: begin the next one."""
        if self.request.upto == self.sync_upto:
            self.sync_upto = self._read_at = None
        self._singly = max(self._singly - 1, 0)
        self.request = Request()

    def part(self) -> Told | None:
        """Of a request that cannot be read, let each change go alone from now on. One that is alone already is taken
        out of it and returned: the request goes without it."""
        told = self.request.told
        if len(told) == 1:
            return told.pop()
        self._singly = len(told)
        self._ahead.extendleft(reversed(told))
        self.request = Request()
        return None
