"""Time comes in here, so that tests can turn it. Wall time labels; only monotonic time decides."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Protocol

from madsci_registry.registry_json import instant as instant  # noqa: PLC0414 - all of time comes from here

_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"


class Clock(Protocol):
    """What the daemon asks of time."""

    def monotonic(self) -> float:
        """Seconds that never go back; only differences mean something."""

    def wall(self) -> float:
        """Seconds since 1970 (UTC); may jump."""

    def boottime(self) -> float:
        """Seconds that never go back, those in which the machine slept too."""


class SystemClock:
    """The host's clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()

    def boottime(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)


def iso(seconds: float) -> str:
    """Return a wall-clock instant as the registry writes it: UTC, ISO 8601, microseconds, 'Z'."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime(_FORMAT)


class Timers:
    """Callbacks at monotonic instants. Nothing is cancelled: a callback looks whether it is still wanted."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def after(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call `callback` once, `delay_s` seconds from now."""
        heapq.heappush(self._heap, (self._clock.monotonic() + delay_s, next(self._count), callback))

    def every(self, period_s: float, callback: Callable[[], None]) -> None:
        """Call `callback` again and again."""

        def again() -> None:
            callback()
            self.after(period_s, again)

        self.after(period_s, again)

    def run_due(self) -> None:
        """Run what is due now; what that asks for without delay comes in the next turn."""
        now, due = self._clock.monotonic(), []
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap)[2])
        for callback in due:
            callback()

    def next_s(self) -> float | None:
        """Return the seconds until the next is due, None where there is none."""
        return max(self._heap[0][0] - self._clock.monotonic(), 0.0) if self._heap else None
