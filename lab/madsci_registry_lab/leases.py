"""Which sessions have been silent for too long, by this process's monotonic clock. Pure but for the clock given to it.

A session is heard at the instant at which its store has *answered* it. So a lease is never shorter for the host, which
counts from when it sent, than it is here. After a start, and after this process stood still (a paused virtual machine,
a slow disk), keepalives may have been sent that nobody read: then every lease begins anew.
"""

from __future__ import annotations

from madsci_registry_lab.clock import Clock

STALL_S = 5.0
"""Whoever looks each second and did not for so long has stood still. A third of the lease, as hosts send keepalives."""


class Leases:
    """When each session was heard last. Not thread-safe: its store uses it inside transactions."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heard: dict[str, tuple[float, float]] = {}
        self._looked_at = clock.monotonic()

    def hear(self, session: str, lease_s: float) -> None:
        """Begin the lease of a session, or begin it anew."""
        self._heard[session] = self._clock.monotonic(), lease_s

    def forget(self, session: str) -> None:
        self._heard.pop(session, None)

    def due(self) -> list[str]:
        """List the sessions whose lease is over, those silent for longest first. To be called about once a second."""
        now = self._clock.monotonic()
        stalled, self._looked_at = now - self._looked_at > STALL_S, now
        if stalled:
            self._heard = {session: (now, lease_s) for session, (_, lease_s) in self._heard.items()}
        over = [(at, session) for session, (at, lease_s) in self._heard.items() if now - at >= lease_s]
        return [session for _, session in sorted(over)]
