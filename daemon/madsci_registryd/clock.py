"""Time comes in here, so that tests can turn it. Wall time labels; only monotonic time decides."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, Protocol

_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"


class Clock(Protocol):
    """What the daemon asks of time."""

    def monotonic(self) -> float:
        """Seconds that never go back; only differences mean something."""

    def wall(self) -> float:
        """Seconds since 1970 (UTC); may jump."""


class SystemClock:
    """The host's clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


def iso(seconds: float) -> str:
    """Return a wall-clock instant as the registry writes it: UTC, ISO 8601, microseconds, 'Z'."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime(_FORMAT)


def instant(text: Any) -> str | None:
    """Return an ISO 8601 instant as the registry writes it, None where `text` is none."""
    if not isinstance(text, str):
        return None
    try:
        when = datetime.fromisoformat(text.replace("Z", "+00:00"))
        if when.tzinfo is None:
            when = when.replace(tzinfo=timezone.utc)
        when = when.astimezone(timezone.utc)
    except (ValueError, OverflowError):
        return None
    return when.strftime(_FORMAT) if when.year >= 1000 else None  # below that, text would not sort as time


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

    def run_due(self) -> float | None:
        """Run what is due and return the seconds until the next, None where there is none."""
        while self._heap:
            wait_s = self._heap[0][0] - self._clock.monotonic()
            if wait_s > 0:
                return wait_s
            heapq.heappop(self._heap)[2]()
        return None
