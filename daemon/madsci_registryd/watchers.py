"""Requests that wait for changes, answered as soon as there are any: a few a turn, so that many hold up nobody."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from madsci_registry import protocol as p
from madsci_registry.errors import RegistryError
from madsci_registryd.clock import Clock, Timers
from madsci_registryd.locks import Session
from madsci_registryd.quotas import Quotas
from madsci_registryd.reads import Reads

LOOKS_A_TURN = 50
"""Each reads a page of events at most: about 2 ms for all."""


@dataclass(eq=False)
class Watcher:
    """One request."""

    who: Session
    request: p.Watch
    answer: Callable[[dict[str, Any]], None]
    until: float
    """Monotonic instant of an empty answer."""
    looked_at: int
    """There was nothing for it up to this revision."""

    @property
    def key(self) -> tuple[str, int]:
        return self.who.id, self.request.seq


class Watchers:
    """All of them. Belongs to the daemon's loop."""

    def __init__(self, reads: Reads, quotas: Quotas, clock: Clock, timers: Timers) -> None:
        self._reads = reads
        self._quotas = quotas
        self._clock = clock
        self._timers = timers
        self._waiting: dict[tuple[str, int], Watcher] = {}
        self._of_uid: Counter[int] = Counter()
        self._due: dict[tuple[str, int], None] = {}
        """Those who are to be looked at, in order."""
        self._is_timed = False

    def add(self, who: Session, r: p.Watch, answer: Callable[[dict[str, Any]], None]) -> None:
        """Answer the events after a revision at once if there are any, else later. Raises QuotaError."""
        looked_at = self._reads.revision
        found = self._reads.events_after(r.after)
        if found is not None or r.wait_s == 0:
            answer({"ok": found or {"events": [], "revision": r.after}})
            return
        present = self._waiting.get((who.id, r.seq))
        if present is not None:  # a repeat: its time goes on
            present.request, present.answer = r, answer
            return
        self._quotas.check(who.uid, "requests", self._of_uid[who.uid])
        watcher = Watcher(who, r, answer, self._clock.monotonic() + r.wait_s, looked_at)
        self._waiting[watcher.key] = watcher
        self._of_uid[who.uid] += 1
        self._timers.after(r.wait_s, lambda: self._over(watcher))

    def cancel(self, who: Session, seq: int) -> None:
        """Forget a request, unanswered."""
        watcher = self._waiting.get((who.id, seq))
        if watcher is not None:
            self._remove(watcher)

    def forget(self, who: Session) -> None:
        """Forget all requests of a session."""
        for watcher in [w for w in self._waiting.values() if w.who is who]:
            self._remove(watcher)

    def _remove(self, watcher: Watcher) -> None:
        del self._waiting[watcher.key]
        self._of_uid[watcher.who.uid] -= 1

    def look(self) -> None:
        """Something changed: answer those for whom there is something; of many some now, the others later."""
        revision = self._reads.revision
        self._due |= {key: None for key, w in self._waiting.items() if w.looked_at < revision}
        self._answer_some()

    def _over(self, watcher: Watcher) -> None:
        if self._waiting.get(watcher.key) is watcher:
            self._due[watcher.key] = None
            self._go_on_soon()

    def _go_on_soon(self) -> None:
        if self._due and not self._is_timed:
            self._is_timed = True
            self._timers.after(0, self._go_on)

    def _go_on(self) -> None:
        self._is_timed = False
        self._answer_some()

    def _answer_some(self) -> None:
        for key in list(islice(self._due, LOOKS_A_TURN)):
            del self._due[key]
            watcher = self._waiting.get(key)
            reply = self._reply(watcher) if watcher is not None else None
            if watcher is not None and reply is not None:
                self._remove(watcher)
                watcher.answer(reply)
        self._go_on_soon()

    def _reply(self, watcher: Watcher) -> dict[str, Any] | None:
        watcher.looked_at = self._reads.revision
        after = watcher.request.after
        try:
            found = self._reads.events_after(after)
        except RegistryError as error:  # what it waited for was trimmed meanwhile
            return {"error": error.to_wire()}
        is_over = watcher.until <= self._clock.monotonic()
        return {"ok": found or {"events": [], "revision": after}} if found or is_over else None

    def close(self, error: dict[str, Any]) -> None:
        """Answer all with an error: the daemon stops."""
        for watcher in self._waiting.values():
            watcher.answer({"error": error})
        self._waiting.clear()
