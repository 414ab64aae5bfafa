"""What one transaction has done so far, to be told to the world after its commit and forgotten without one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from madsci_registryd.locks import Claim, Session


@dataclass(frozen=True)
class Told:
    """A line for a session's lifeline: a lock lost, or carried to another name."""

    session: str
    line: dict[str, Any]


@dataclass
class Tx:
    """One transaction: its instant, and lists of what changed. Nothing in it has happened until the commit."""

    now: str
    monotonic: float
    durable: bool = False
    """Something in it must survive power loss: commit with synchronous=FULL."""
    freed: list[str] = field(default_factory=list)
    """Names that lost their lock and may go to the next."""
    lock_ends: list[tuple[str, str]] = field(default_factory=list)
    """How locks ended: the kind of event, and why."""
    granted: list[Session] = field(default_factory=list)
    waiting: list[Claim] = field(default_factory=list)
    """New claims, for the queues."""
    settled: list[tuple[Claim, Any]] = field(default_factory=list)
    """Claims that are answered, and how (a reply or a RegistryError)."""
    told: list[Told] = field(default_factory=list)
    stored: list[Session] = field(default_factory=list)
    """Sessions whose row is new."""
    ended: list[Session] = field(default_factory=list)

    def _lists(self) -> tuple[list[Any], ...]:
        return self.freed, self.lock_ends, self.granted, self.waiting, self.settled, self.told, self.stored, self.ended

    def mark(self) -> tuple[Any, ...]:
        """Note where we are, for `back_to`. (`durable` stays once set: one sync too many harms nobody.)"""
        return tuple(len(entries) for entries in self._lists())

    def back_to(self, mark: tuple[Any, ...]) -> None:
        """Forget what was added since `mark`."""
        for entries, length in zip(self._lists(), mark, strict=True):
            del entries[length:]
