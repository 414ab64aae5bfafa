"""How much of the daemon one user may have, so that one user's fault or flood is that user's alone.

What is refused is told to who asked (`quota`, with what and how much), and once a minute to the log.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from madsci_registry.errors import QuotaError
from madsci_registryd import messages
from madsci_registryd.clock import Clock

log = logging.getLogger(__name__)

LOG_EVERY_S = 60.0
RECOUNT_S = 1.0
CHEAP_COUNT = 100
"""So few are counted each time."""


class Limits(NamedTuple):
    """What one user may have at most."""

    connections: int = 4096
    sessions: int = 4096
    names: int = 200_000
    locks: int = 200_000
    requests: int = 4096
    """Unanswered ones: waiting for a name, for a change, for their turn."""
    bytes: int = 64 << 20
    """Of requests that wait for their turn; and of pieces of imports."""


class Quotas:
    """The limits, and the one place that refuses by them. Belongs to the daemon's loop."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self.limits = limits
        self._clock = clock
        self._logged: dict[Hashable, float] = {}
        self.refused: Counter[str] = Counter()
        """How often, by what was too much."""

    def check(self, uid: int, what: str, count: float) -> None:
        """Let a user have one more of `what` (a field of Limits), who has `count`. Raises QuotaError."""
        limit: int = getattr(self.limits, what)
        if count < limit:
            return
        self.refused[what] += 1
        extra = messages.QUOTA_REFUSED(uid=uid, what=what, limit=limit)
        self.log_once((what, uid), "uid %d has %d %s already: more are refused", uid, limit, what, extra=extra)
        raise QuotaError(f"uid {uid} has {limit} {what} already, and may have no more", limit=limit, what=what)

    def log_once(
        self, key: Hashable, text: str, *args: object, extra: dict[str, Any], level: int = logging.WARNING
    ) -> None:
        """Log, but of one thing (`key`) once a minute at most."""
        now = self._clock.monotonic()
        if now - self._logged.get(key, -LOG_EVERY_S) < LOG_EVERY_S:
            return
        if len(self._logged) > 10_000:
            self._logged.clear()
        self._logged[key] = now
        log.log(level, text, *args, extra=extra)


class Usage:
    """How much of something in the database each user has: an upper bound, for what comes is seen and what goes is not.

    It is counted anew before anybody is refused, where the limit is large at most once a second for each user: a user
    at the limit costs others little, and may be refused up to a second too long.
    """

    def __init__(self, what: str, quotas: Quotas, clock: Clock, count: Callable[[int], int]) -> None:
        self._what = what
        self._quotas = quotas
        self._clock = clock
        self._count = count
        self._bounds: dict[int, int] = {}
        self._counted_at: dict[int, float] = {}

    def take(self, uid: int) -> None:
        """Let a user have one more. Raises QuotaError."""
        bound = self._bounds.get(uid)
        if bound is None or (bound >= getattr(self._quotas.limits, self._what) and self._may_count(uid)):
            bound = self._count(uid)
            self._counted_at[uid] = self._clock.monotonic()
        self._bounds[uid] = bound
        self._quotas.check(uid, self._what, bound)
        self._bounds[uid] = bound + 1

    def _may_count(self, uid: int) -> bool:
        is_cheap = getattr(self._quotas.limits, self._what) <= CHEAP_COUNT
        return is_cheap or self._clock.monotonic() - self._counted_at[uid] >= RECOUNT_S
