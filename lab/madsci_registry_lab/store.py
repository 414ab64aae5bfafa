"""The contract of a lab's store: values, errors, and what each operation promises whatever is behind it.

Rules that every store keeps (tests/unit/test_lab_store*.py are run over each of them)
- What was answered is durable. An operation changes all that it says or nothing; `apply` alone may end after some of
  its changes where the store does not answer any more: sent again, each counts once.
- A name has one component at a time; of those who make one at once, exactly one wins, and the others are told its ULID.
  Who repeats its own request (`op`) is answered as the first time.
- A *host* owns locks, through a *session* that it keeps alive. A lock is held as long as its row and its session exist.
  Sessions end by `end`, by a newer one of the same host, or silent for longer than their lease (`expire`).
- The *term* of a name only grows, over all hosts, sessions, restarts and renames: a lock that goes to another session
  has max(the name's last term, the host's proposal, the epoch) + 1. Only a host that goes on with the very term that it
  was given last keeps it. The *epoch* grows with each start and is no lower than the seconds since 1970: so what a
  store gives after it was set back (restored from a backup) is above what it had given before, and forgotten.
- Each change has a revision, in the order of its effect, and is in the feed; `cursor` is where the feed goes on, as
  `epoch.revision`. A store that was set back knows no cursor that is newer than it.

Stores are synchronous and thread-safe. Besides what is named, any operation raises UnavailableError (the store does not
answer; a change may have happened, and may be repeated) and NoSpaceError (nothing changed).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from madsci_registry.errors import ConflictError, HeldError, LockLostError, RegistryError

TERM_LIMIT = 1 << 33
"""A fencing token is term x 2^20 + n and stays below 2^53."""
PROPOSAL_LIMIT = TERM_LIMIT - (1 << 20)
"""Whatever a host proposes leaves room for a million hand-overs."""

LASTING = frozenset({"created", "renamed", "retired", "revived", "metadata", "conflict", "merged"})
"""Events of identities: kept for ever. Those of locks and hosts are trimmed in time."""

Reason = Literal["two_ids", "name_taken", "held", "wrong_type"]
"""two_ids: the name has another ULID here; name_taken: a rename to a name that another component has; held: a rename of
a name that another host holds; wrong_type: the component has another type here."""


@dataclass(frozen=True, kw_only=True)
class State:
    """A component as a host has it. Instants are the host's words (UTC, ISO 8601)."""

    id: str
    name: str
    component_type: str
    retired: bool = False
    metadata: str = "{}"
    """JSON text, checked."""
    created_at: str
    changed_at: str
    """When its identity changed last: of two hosts that are synced, the later word stands. An instant that has not come
    yet counts as now."""
    last_seen: str | None = None


@dataclass(frozen=True, kw_only=True)
class Lock:
    """A lock on a name, of a host."""

    name: str
    term: int
    host: str
    session: str
    since: str
    holder: dict[str, Any] = field(default_factory=dict)
    """Who on that host, as it says: for people."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A name with its component, as the lab knows it."""

    name: str
    id: str
    component_type: str
    retired: bool
    metadata: str
    created_at: str
    changed_at: str
    host: str
    """Who said the last change of it."""
    term: int
    """The highest term ever given for the name; 0: none yet."""
    other_ids: tuple[str, ...] = ()
    """ULIDs of the same component that are not preferred."""
    lock: Lock | None = None


@dataclass(frozen=True, kw_only=True)
class Session:
    """A host that keeps its locks alive, as long as it is heard each `lease_s`."""

    id: str
    host: str
    boot: str
    """Which run of the host: a copy of its files elsewhere has another."""
    lease_s: float
    started_at: str
    label: str = ""
    """What the host says of itself."""
    locks: int = 0


@dataclass(frozen=True, kw_only=True)
class Want:
    """A lock that a session asks for."""

    proposal: int = 0
    """The host's own term: below PROPOSAL_LIMIT."""
    term: int | None = None
    """The term that it was given for this name and that its holders still have; None: nobody holds it there."""
    holder: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """What get-or-create answers."""

    entry: Entry
    is_new: bool
    """This very request, or an earlier try of it, made the component."""
    lock: Lock | None


@dataclass(frozen=True)
class Mark:
    """How far the lab has a host's changes: up to this revision of this numbering."""

    epoch: int
    revision: int


@dataclass(frozen=True)
class Change:
    """A component as one change of a host left it; revisions grow."""

    revision: int
    state: State


@dataclass(frozen=True)
class Unapplied:
    """A state that the lab did not take over as it was."""

    state: State
    reason: Reason | Literal["newer"]
    """newer: by its `changed_at`, the lab has a later word (sync alone)."""
    preferred: str | None
    """The ULID that the name has in the lab."""


@dataclass(frozen=True)
class Applied:
    """What became of a batch or sync."""

    mark: Mark | None
    changed: int
    """How many changed something."""
    repeated: int
    """How many had been applied before."""
    unapplied: tuple[Unapplied, ...]


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """One name, two words about it. `id` is the ULID that is not preferred."""

    name: str
    id: str
    reason: Reason
    host: str
    at: str
    state: State
    """What that host said: the evidence."""
    entry: Entry | None
    """What the lab has under the name; None: nothing."""
    decided_at: str | None


@dataclass(frozen=True)
class Event:
    """One change of the lab."""

    revision: int
    at: str
    kind: str
    """created, renamed, retired, revived, metadata, conflict, merged; granted, released, moved; registered, ended,
    expired (a host)."""
    name: str | None
    id: str | None
    host: str | None
    why: dict[str, Any]


@dataclass(frozen=True)
class Page:
    """A piece of the feed; `cursor` is where the next one begins."""

    events: tuple[Event, ...]
    cursor: str

    def first(self, count: int) -> Page:
        """Return the piece that has the first events alone; `count` is 1 at least."""
        epoch = self.cursor.partition(".")[0]
        return Page(self.events[:count], f"{epoch}.{self.events[count - 1].revision}")


@dataclass(frozen=True, kw_only=True)
class About:
    """How a store is."""

    epoch: int
    """Grows with each start."""
    cursor: str
    names: int
    locks: int
    sessions: int
    conflicts: int
    """Those that nobody has decided yet."""


class HeldInLabError(HeldError):
    """Another host holds the name."""

    host: str | None = None
    term: int | None = None
    since: str | None = None
    lab_holder: dict[str, Any] | None = None


class GivenAwayError(LockLostError):
    """The term that the host goes on with is not the last: another host had, or has, the name after it."""

    host: str | None = None
    term: int | None = None


class OutOfOrderError(ConflictError):
    """The changes do not follow on what the lab has of this host; `epoch` and `revision` are that, None: nothing."""

    epoch: int | None = None
    revision: int | None = None


class LabStore(Protocol):
    """What the lab's routes need of a store."""

    @property
    def broken(self) -> str:
        """Why it answers nothing good any more until a new start of the lab; empty: that is not so."""

    def about(self) -> About:
        """Say how it is; for health and metrics."""

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call back, in any thread, soon after each change of the feed. It must not block."""

    def close(self) -> None:
        """Let go of everything; sessions and locks stay for the next start."""

    # identities

    def find(self, *, name: str | None = None, id: str | None = None) -> Entry:
        """Return the entry of a name, or of a ULID, preferred or not.

        Raises:
            NotFoundError: with where a renamed name went.
        """

    def entries(self, after: str, limit: int, component_type: str | None = None) -> list[Entry]:
        """Return up to `limit` entries in the order of their names (as bytes), those after `after`."""

    def resolve(self, host: str, op: str, state: State, session: str | None, want: Want | None) -> Resolved:
        """Return the component of `state.name`, made with that ULID if the name is new, revived if it is retired; with
        `want`, locked too. `op` names the request among those of `host`, for a repeat.

        Raises (nothing changed):
            HeldInLabError, GivenAwayError, SessionRequiredError: as `acquire`.
            WrongTypeError: the name has another component_type.
            ConflictError: the name is new and the ULID another component's.
        """

    def apply(self, host: str, epoch: int, after: int | None, upto: int | None, changes: Sequence[Change]) -> Applied:
        """Take in what a host says of its components, in order, each revision of an epoch once in effect.

        Args:
            host: whose words these are.
            epoch: which numbering of the host's revisions.
            after: the changes follow on this revision; None: a sync, states without order, of which one is left out
                where the lab has a later word by `changed_at`.
            upto: the mark afterwards; None: it stays (a sync that goes on). A mark never goes back within an epoch.
            changes: at most some hundred, revisions growing.

        Raises:
            OutOfOrderError: another epoch than the mark's, or `after` is beyond the mark; nothing changed.
        """

    def mark(self, host: str) -> Mark | None:
        """Return how far the lab has a host's changes; None: nothing yet."""

    def conflicts(self, *, decided: bool, after: tuple[str, str], limit: int) -> list[Conflict]:
        """Return conflicts in the order of (name, id), those after `after`: undecided ones, or all."""

    def merge(self, host: str, name: str, prefer: str) -> Entry:
        """Decide a conflict: `prefer` is the ULID of the name, the others stay known as the same component.

        Raises (nothing changed):
            NotFoundError: the name has no conflict, or `prefer` no part in it.
            HeldError: a component that would lose its name is held under it.
        """

    # hosts and locks

    def register(self, host: str, boot: str, lease_s: float, label: str) -> Session:
        """Begin a session; an earlier one of the host ends, with its locks.

        Raises:
            ConflictError: a session of this host with another `boot` is alive (a copy of it runs elsewhere, or it has
                rebooted within its lease); nothing changed.
        """

    def keep(self, host: str, session: str, boot: str) -> Session:
        """Begin the lease of a session anew.

        Raises:
            SessionRequiredError: it has ended, or is another host's or boot's.
        """

    def end(self, host: str, session: str) -> bool:
        """End a session with all its locks; False: it had ended."""

    def expire(self) -> int:
        """End the sessions that were silent for longer than their lease; return how many. About once a second."""

    def sessions(self) -> list[Session]:
        """Return the living sessions."""

    def acquire(self, host: str, session: str, wants: Sequence[tuple[str, Want]]) -> list[Lock | RegistryError]:
        """Lock names that have entries; return for each its lock, or why not. A lock that the session has already is
        answered as it is.

        The errors are:
            HeldInLabError: another session holds it.
            GivenAwayError: the host goes on with a term after which there was another.
            NotFoundError: the name has no entry.
            SessionRequiredError: the session has ended.
            ConflictError: the name has had all its terms.
        """

    def release(self, host: str, session: str, terms: Mapping[str, int | None]) -> list[str]:
        """Give back locks by their terms (None: whatever it is); return the names of those that this session had."""

    def locks(self, session: str) -> list[Lock]:
        """Return what a session holds."""

    def given(self, names: Sequence[str]) -> dict[str, tuple[int, str | None]]:
        """Return for each known name the last term, and the host that it was given to."""

    # feed

    def changes(self, cursor: str | None, limit: int) -> Page:
        """Return the changes after a cursor, in order, without a gap; None: from now on.

        Raises:
            CompactedError: the store does not have them any more, or was set back; begin with `entries`.
            InvalidError: it is no cursor.
        """

    def history(self, name: str, after: int, limit: int) -> list[Event]:
        """Return the changes of a name and of its component under whatever name, those after revision `after`."""
