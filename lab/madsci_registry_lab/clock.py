"""Time comes in here, so that tests can turn it. Wall time labels; monotonic time alone ends a lease."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from typing import Protocol

_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"


class Clock(Protocol):
    """What the lab asks of time."""

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
