"""Brings this host's identity changes to the lab: all of them, in order, at least once; there each counts once.

Rules
1. What is sent is committed and on disk. The lab notes with it up to which revision it has all (its *mark* of this
   host), and we note the same after its answer. Where they differ, the lab's word counts: changes are sent again; where
   the mark is none of ours (a new lab, a registry that was copied or set back), all states are.
2. One request is under way at a time. Changes go in the order of their revisions, each with what it left of its
   component. What the lab does not take over stops nothing that comes after it.
3. A sync sends all present states, then come the changes since it began.
4. A request is small, and built in small pieces, one each turn of the loop: other clients come in between.
5. Nothing is sent while the lab is away. Who finds it back calls `begin` with its mark.

Theory of operation
A request that failed stays, and is sent again; when all is begun anew, what comes of an earlier one does not count.
Each keepalive is answered with the lab's mark, too: so a lab that was set back is found though there is no change.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from madsci_registry.errors import InvalidError, LabUnavailableError, RegistryError, TooLargeError
from madsci_registryd import lab_answers as a
from madsci_registryd.backoff import Backoff
from madsci_registryd.core import Core
from madsci_registryd.lab_changes import Changes
from madsci_registryd.lab_conflicts import Applied, Objections
from madsci_registryd.lab_gateway import Gateway
from madsci_registryd.lab_lanes import Send

WITHIN_S = 10.0
"""How long the lab may take for a request."""
LONGEST_WAIT_S = 30.0
PACE_S = 0.01
"""Between two requests: lookups of this host's clients come in between. With it 2,000 changes a second are delivered,
and the p99 of lookups is 1 ms longer meanwhile; without it 7,000 a second, and 2 ms (the lab on another CPU)."""
COUNTED_MAX = 10_000
"""Counting so many changes takes 2 ms."""

Mark = tuple[int, int]
"""Epoch and revision up to which the lab has all changes."""


class Numbering(Protocol):
    """Who this host is to the lab, and which numbering its revisions are of."""

    @property
    def name(self) -> str: ...

    @property
    def epoch(self) -> int: ...


class Forwarder:
    """Belongs to the loop's thread."""

    def __init__(
        self, core: Core, send: Send, host: Numbering, *, on_away: Callable[[LabUnavailableError], None]
    ) -> None:
        """`on_away` is told when the lab does not answer."""
        self._store = core.store
        self._timers = core.timers
        self._clock = core.clock
        self._insist = core.registrar.insist
        self._send = send
        self._host = host
        self._on_away = on_away
        self._backoff = Backoff(LONGEST_WAIT_S)
        self._numbering = self._present_numbering()
        self._delivered = int(core.store.meta("lab_revision") or 0)
        self._changes = Changes(core.store, self._delivered)
        self._history = self._changes.history
        self._is_paused = True
        self._is_sending = False
        self._attempt = 0
        """Grows when all is begun anew."""
        self._not_before = 0.0
        """Monotonic; after a failure."""
        self._has_moved = False
        """The lab has answered a request since the last `begin`."""
        self._counted = (-1, -1), 0
        """How much there was behind, and for which revisions that was counted."""
        self.error = ""
        """Why the lab does not take changes though it is there; empty: it does."""
        self.objections = Objections(core)
        self.delivered: list[Callable[[int], None]] = []
        """Called with the revision up to which the lab has all, each time that it is told so."""

    @property
    def revision(self) -> int:
        """Up to which revision the lab has all changes; 0: it has to be told all."""
        return self._delivered if self._numbering == self._present_numbering() else 0

    def behind(self) -> int:
        """Return how many changes the lab has not; COUNTED_MAX: so many or more."""
        counted_at = self.revision, self._store.identity_revision
        if self._counted[0] != counted_at:
            self._counted = counted_at, self._history.count(counted_at[0], COUNTED_MAX)
        return self._counted[1]

    def _present_numbering(self) -> tuple[str, int]:
        return self._host.name, self._host.epoch

    # the lab comes and goes

    def begin(self, mark: Mark | None) -> None:
        """Begin, or go on: the lab is there, and has all changes up to `mark`, None: none. For each answer of the lab
        that says so."""
        self._is_paused = False
        has_moved, self._has_moved = self._has_moved, False
        is_syncing = self._changes.sync_upto is not None
        self._soon()
        if self._numbering != self._present_numbering():
            self._numbering, self._delivered = self._present_numbering(), 0
            self._go_on_from(mark)
        elif self._is_sending or mark == (self._numbering[1], self._delivered):
            pass
        elif is_syncing and not self._is_ours(mark):
            pass  # it is not done yet
        elif has_moved and not is_syncing:
            pass  # the lab may have said so before it had what it has answered since
        else:
            self._go_on_from(mark)

    def _is_ours(self, mark: Mark | None) -> bool:
        """Tell whether a mark is a point of our own history. It always is a revision that we never lose."""
        return mark is not None and mark[0] == self._numbering[1] and self._history.has(mark[1])

    def pause(self) -> None:
        """The lab is away. A sync begins anew with it: the lab may be another one when it is back."""
        self._is_paused = True
        if self._changes.sync_upto is not None:
            self._attempt += 1
            self._changes.start_sync()

    def wake(self) -> None:
        """Try now, whatever failed before."""
        self._not_before = 0.0
        self._soon()

    def _go_on_from(self, mark: Mark | None) -> None:
        """Send what the lab has not, by its own word."""
        self._attempt += 1
        self._note(mark[1] if mark is not None and self._is_ours(mark) else 0)
        if self._delivered:
            self._changes.start(self._delivered)
        else:
            self._changes.start_sync()
        self._soon()

    def _note(self, revision: int) -> None:
        if revision == self._delivered:
            return
        self._delivered, numbering = revision, self._numbering

        def do(tx: object) -> None:
            if numbering == self._present_numbering():
                self._store.set_meta("lab_revision", revision)

        self._insist(do)

    def _soon(self, delay_s: float = 0.0) -> None:
        self._timers.after(delay_s, lambda: None)  # there will be a turn of the loop

    # what is sent

    def pump(self) -> None:
        """Go on a little. For every turn of the loop; costs nothing where there is nothing to send."""
        if self._is_paused or self._is_sending or self._changes.is_idle:
            return
        if self._clock.monotonic() < self._not_before:
            return
        if self._numbering != self._present_numbering():
            self._is_paused = True  # until the lab knows that
        elif not self._changes.build():
            self._soon()
        elif self._changes.request.told or self._changes.request.upto or self._changes.sync_upto is not None:
            self._send_request()
        else:
            self._changes.done()

    def _send_request(self) -> None:
        request, upto = self._changes.request, self._changes.request.upto
        who: dict[str, Any] = {"host": self._numbering[0], "epoch": self._numbering[1]}
        is_sync, after = self._changes.sync_upto is not None, self._delivered

        def call(gateway: Gateway) -> Applied:
            if is_sync:
                route, body = "/registry/sync", {"components": request.components(), **({"upto": upto} if upto else {})}
            else:
                route, body = "/registry/changes", {"changes": request.changes(), "after": after, "upto": upto}
            return a.read(Applied, gateway.post(route, who | body, within_s=WITHIN_S))

        self._is_sending = True
        self._send("tell", call, partial(self._answered, self._attempt, upto))

    def _answered(self, attempt: int, upto: int, result: Applied | RegistryError) -> None:
        self._is_sending = False
        if attempt != self._attempt:
            self._soon()
        elif isinstance(result, Applied):
            self._applied(upto, result)
        elif isinstance(result, a.OutOfOrderError):
            self._fail()  # a lab that says so again and again is not asked without pause
            self._go_on_from(result.lab_mark)
        elif isinstance(result, (InvalidError, TooLargeError)) and self._changes.request.told:
            self._find_out(result)
        else:
            self._fail()
            if isinstance(result, LabUnavailableError):
                self._on_away(result)
            else:
                self.error = result.message

    def _applied(self, upto: int, applied: Applied) -> None:
        mark = applied.mark
        if upto and (mark is None or mark.epoch != self._numbering[1] or mark.revision < upto):
            self.error = "the lab did not take note of what it was told"
            self._fail()
            return
        self.error = ""
        self._backoff.reset()
        self._has_moved = True
        self._changes.done()
        self.objections.take(applied.unapplied)
        if upto:
            self._note(upto)
            for each in self.delivered:
                each(upto)
        self._not_before = self._clock.monotonic() + PACE_S
        self._soon(PACE_S)

    def _find_out(self, error: RegistryError) -> None:
        """The lab cannot read a request: go on without what it is that it cannot read."""
        bad = self._changes.part()
        if bad is None:
            self._soon()
        else:
            self.objections.refuse(bad.component["name"], bad.component["id"], error.code, error.message)
            self._send_request()

    def _fail(self) -> None:
        wait_s = self._backoff.next_s()
        self._not_before = self._clock.monotonic() + wait_s
        self._soon(wait_s)
