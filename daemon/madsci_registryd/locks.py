"""Who may take a name, who is next, and when a lock ends. Pure: no socket, no SQL, no clock; time is an argument.

Rules
1. A lock belongs to an owner: one instance of one session. The owner asking again has the same lock.
2. A name is granted when nobody holds it and nobody is ahead in its queue. First come, first served.
3. Nobody is granted a name while they cannot hear of it: a waiter whose session is detached keeps its place, for
   RENEW_S, but the name goes to the first who is there.
4. A session ends when its process is dead; RESUME_S after its lifeline ended while the daemon was up; GRACE_S after a
   restart of the daemon if its process cannot be proven alive, or if it holds nothing. A process proven alive keeps
   what it holds over a restart for as long as it lives. Nothing else ends a session but its own bye.
5. A lock ends with its session, by its owner's release, or by an operator.

Theory of operation
A claim is one request for a lock that cannot be answered at once. It waits as long as it is in its name's queue, and
leaves it once: granted (the grant is committed), refused (it cannot be granted any more), or withdrawn (its client
gave up, died, or did not renew in time). What is outside, registry.json and the lab, is asked before: a name is *ready*
there, for all clients of this host, or nobody is granted it yet.

The database says who holds what. This module's queues say who waits; they are changed after a commit only.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from madsci_registry.protocol import GRACE_S, RENEW_S, RESUME_S
from madsci_registry.types import Process
from madsci_registryd.admission import Credentials

SHARES_KEPT = 100
"""So many requests that share a lock are remembered; beyond that no cancel ends it, only its owner's release."""
NEVER = -1
"""A request that no cancel names."""


class Owner(NamedTuple):
    """Whose a lock is: an instance (one RegistryClient) of a session (one process)."""

    session: str
    instance: str


class Verdict(Enum):
    """What a request for a lock gets."""

    GRANT = "grant"
    SAME = "same"  # the owner has it already
    QUEUE = "queue"
    HELD = "held"


def decide(holder: Owner | None, asker: Owner, *, ahead: int, may_wait: bool) -> Verdict:
    """Judge a request for a lock: `ahead` claims of others stand before it; `may_wait`: it would rather wait."""
    if holder == asker:
        return Verdict.SAME
    if holder is None and ahead == 0:
        return Verdict.GRANT
    return Verdict.QUEUE if may_wait else Verdict.HELD


@dataclass(eq=False)
class Claim:
    """A request for the lock of `name` that is not answered yet, known by (session, seq)."""

    name: str
    owner: Owner
    seq: int
    request: Any
    """What to do when its turn comes; opaque here."""
    answer_at: float = math.inf
    """Monotonic instant by which its present request wants an answer."""
    looked_at_next: float = math.inf
    """When it is looked at whether it is to be answered; inf: no timer is set."""

    @property
    def key(self) -> tuple[str, int]:
        return self.owner.session, self.seq


class Queues:
    """All claims, name by name in the order of their arrival."""

    def __init__(self) -> None:
        self._by_name: dict[str, deque[Claim]] = {}
        self._by_key: dict[tuple[str, int], Claim] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[Claim]:
        return iter(list(self._by_key.values()))

    def of_name(self, name: str) -> tuple[Claim, ...]:
        """List the claims of a name, first come first."""
        return tuple(self._by_name.get(name, ()))

    def count(self, name: str) -> int:
        return len(self._by_name.get(name, ()))

    def find(self, session: str, seq: int) -> Claim | None:
        return self._by_key.get((session, seq))

    def of_session(self, session: str) -> list[Claim]:
        return [c for c in self._by_key.values() if c.owner.session == session]

    def add(self, claim: Claim) -> None:
        """Put a claim at the end of its name's queue."""
        assert claim.key not in self._by_key
        self._by_name.setdefault(claim.name, deque()).append(claim)
        self._by_key[claim.key] = claim

    def remove(self, claim: Claim) -> None:
        """Take a claim out, wherever it stands; one that is gone already is no fault."""
        if self._by_key.get(claim.key) is not claim:
            return
        del self._by_key[claim.key]
        queue = self._by_name[claim.name]
        queue.remove(claim)
        if not queue:
            del self._by_name[claim.name]

    def place(self, claim: Claim) -> int:
        """Say at which place a claim stands, 1 is next."""
        return self.of_name(claim.name).index(claim) + 1


def next_claim(claims: tuple[Claim, ...], may_hear: Callable[[Claim], bool]) -> Claim | None:
    """Choose who gets a free name: the first who can be told."""
    return next((c for c in claims if may_hear(c)), None)


class Identity(NamedTuple):
    """What tells a process from every other, over restarts of the daemon. None: not visible to the daemon."""

    pid: int | None
    start_time: int | None
    """Clock ticks after boot."""
    pidfd_inode: int | None
    """Unique in this boot; None on kernels without pidfs (before 6.9)."""
    boot_id: str
    pid_namespace: int
    """The daemon's own, in which `pid` counts: a record of another one proves nothing."""


class Presence(Enum):
    """How a session stands to the daemon."""

    ATTACHED = "attached"  # its lifeline is up
    DROPPED = "dropped"  # its lifeline ended while this daemon was up
    DETACHED = "detached"  # left by an earlier daemon, not resumed yet
    ENDED = "ended"


@dataclass(eq=False)
class Session:
    """One client process: who the kernel says it is, and how it stands. Changed by the daemon's loop only."""

    id: str
    token_hash: bytes
    process: Process
    identity: Identity
    started_at: str
    client: str = ""
    """What it says of itself."""
    protocol_version: int | None = None
    presence: Presence = Presence.ATTACHED
    since: float = 0.0
    """Monotonic instant of the last change of presence."""
    holds_nothing: bool = False
    """It was left by an earlier daemon without a lock: there is nothing to keep it for."""
    credentials: Credentials | None = None
    """What the kernel said at the last hello or resume."""
    is_admin: bool = False
    """It may do what takes something from others."""
    stored: bool = False
    """It has a row in the database, committed."""
    withdrawn: deque[int] = field(default_factory=lambda: deque(maxlen=1000))
    """The last requests that it cancelled: a cancel can overtake the request that it withdraws."""
    uploads: dict[str, Any] = field(default_factory=dict)
    """Imports and backups under way, by their name."""

    shares: dict[str, set[int]] = field(default_factory=dict)
    """Component id to the requests that were answered with one and the same lock of it, where that are several."""

    @property
    def uid(self) -> int:
        return self.process.uid

    @property
    def pid(self) -> int | None:
        return self.process.pid

    def share(self, id: str, granted_by: int, seq: int) -> None:
        """Note that request `seq` was answered with the lock that `granted_by` was granted."""
        if seq != granted_by:
            requests = self.shares.setdefault(id, {granted_by})
            if len(requests) < SHARES_KEPT:
                requests.add(seq)
            else:
                requests.add(NEVER)

    def shared_by(self, seq: int) -> list[str]:
        """List the components whose lock request `seq` shares with others."""
        return [id for id, requests in self.shares.items() if seq in requests]

    def is_last(self, id: str, seq: int) -> bool:
        """Take `seq` out of those who share a lock and tell whether nobody is left."""
        requests = self.shares.get(id)
        if requests is None:
            return True
        requests.discard(seq)
        return not requests

    def ends_at(self) -> float:
        """Say when (monotonic) the session ends if nothing happens; infinity for never. Rule 4."""
        if self.presence is Presence.DROPPED:
            return self.since + RESUME_S
        if self.presence is Presence.DETACHED and (self.process.proof == "connection" or self.holds_nothing):
            return self.since + GRACE_S
        return math.inf


def claim_expires_at(claim: Claim) -> float:
    """Say when a waiter that is not heard of again loses its place."""
    return claim.answer_at + RENEW_S
