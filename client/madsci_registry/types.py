"""The values that the registry answers with: immutable, picklable, safe to share between threads."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from madsci_registry.classic_types import LocalRegistry as LocalRegistry
    from madsci_registry.classic_types import RegistryEntry as RegistryEntry
    from madsci_registry.classic_types import RegistryLock as RegistryLock
    from madsci_registry.classic_types import RegistryResolveResult as RegistryResolveResult

ComponentType = Literal["node", "module", "manager", "experiment", "workcell"]
COMPONENT_TYPES: tuple[str, ...] = get_args(ComponentType)

State = Literal["held", "free", "retired"]
"""held: locked by a living holder; free: anyone may take it; retired: kept for its ULID, resolving revives it."""

Proof = Literal["pidfd", "pid", "connection"]
"""How surely a holder is known to live: by a pidfd of it, by its pid and start time, by its connection alone."""


LockState = Literal["held", "suspended", "lost", "released"]
"""How a lock stands for who took it. suspended: its daemon is not there, and the lock is still ours; lost and released
are for ever."""

LabState = Literal["none", "confirmed", "unconfirmed"]
"""How a lock stands in the lab, for who took it. none: no lab has a say in it; confirmed: no other host of the lab has
the name; unconfirmed: the lab is away, so another host may have it too."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """A client process by the kernel's word; nothing of it is what the client said. None: not visible to the daemon.

    All but pid, uid, gid and proof were read when the session began or resumed, and are for people.
    """

    pid: int | None
    """Process id in the daemon's PID namespace."""
    uid: int
    gid: int
    proof: Proof
    user: str | None = None
    """The uid's name in the daemon's /etc/passwd."""
    comm: str | None = None
    command_line: str | None = None
    """Its arguments, at most 500 characters. A process can overwrite these and `comm`."""
    executable: str | None = None
    process_started_at: str | None = None
    """When the process began (UTC, ISO 8601)."""
    container: str | None = None
    """The container's id, from the cgroup."""
    unit: str | None = None
    """The innermost systemd unit, from the cgroup; None in a container."""
    end_command: str | None = None
    """The command that ends it and so frees what it holds: docker stop, systemctl stop, kill."""

    @property
    def label(self) -> str:
        """Name it in a few words: pid, program, user, and where it runs."""
        who = f"pid {self.pid}" if self.pid else "a process whose pid is not visible"
        facts = [self.comm, f"uid {self.uid}{f' {self.user}' if self.user else ''}"]
        if self.container:
            facts.append(f"container {self.container[:12]}")
        elif self.unit:
            facts.append(self.unit)
        return f"{who} ({', '.join(filter(None, facts))})"


@dataclass(frozen=True, kw_only=True)
class Holder(Process):
    """Who holds a name: the process, and which lock of it."""

    host: str
    session: str
    since: str
    """When the lock was granted (UTC, ISO 8601)."""
    instance: str
    """Which RegistryClient (or LockManager) of that process, as the client says."""
    client: str = ""
    """What the client says of itself: program and version. Shown, never trusted."""

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Holder:
        return cls(**{k: v for k, v in wire.items() if k in cls.__dataclass_fields__})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class OldLock:
    """The lock of an old program, as it wrote it into registry.json: its own word, good until `expires_at`."""

    holder_pid: int
    holder_host: str
    holder_instance: str
    acquired_at: str
    heartbeat_at: str
    expires_at: str

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> OldLock:
        return cls(**{k: v for k, v in wire.items() if k in cls.__dataclass_fields__})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def label(self) -> str:
        """Name the program in a few words."""
        return f"an old program (pid {self.holder_pid} on {self.holder_host}, by registry.json)"


@dataclass(frozen=True)
class Component:
    """A name with its ULID, as the registry knows it at one instant."""

    name: str
    id: str
    """The ULID: 26 characters, for ever the same for this component."""
    component_type: ComponentType
    state: State
    locked: bool
    fencing_token: int | None
    """The token of the present lock, None where nobody holds the name."""
    created_at: str
    last_seen: str
    """When it was last resolved or its lock ended (UTC, ISO 8601)."""
    metadata: dict[str, Any] = field(default_factory=dict)
    holder: Holder | None = None
    waiting: int = 0
    """How many processes wait for the name."""
    workcell_id: str | None = None
    """What registry.json said of its workcell; carried along, not used."""
    old_lock: OldLock | None = None
    """An old program holds it, by registry.json; then `holder` and `fencing_token` are None."""
    lab: Literal["confirmed", "unconfirmed"] | None = None
    """How its lock stands in the lab; None: it is not locked, or the daemon has no lab."""
    other_ids: list[str] = field(default_factory=list)
    """ULIDs that are the same component: it was made on two hosts while they were apart."""
    preferred_id: str | None = None
    """The ULID that the lab prefers for it, which its next resolve gives; None: the one that it has."""

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Component:
        known = {k: v for k, v in wire.items() if k in cls.__dataclass_fields__}
        if known.get("holder"):
            known["holder"] = Holder.from_wire(known["holder"])
        if known.get("old_lock"):
            known["old_lock"] = OldLock.from_wire(known["old_lock"])
        return cls(**known)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Event:
    """One change of the registry, as history tells it."""

    revision: int
    """Grows with every change of this registry, never repeats, below 2^53."""
    at: str
    kind: str
    """created, renamed, retired, revived, metadata, preferred, conflict, granted, released, ended, broken, started,
    restored or refused."""
    name: str | None
    id: str | None
    uid: int | None
    pid: int | None
    session: str | None
    why: dict[str, Any] = field(default_factory=dict)
    """What else there is to say: the old name of a rename, the token of a grant, the operator's reason."""

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Event:
        return cls(**{k: v for k, v in wire.items() if k in cls.__dataclass_fields__})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class SessionInfo(Process):
    """One client process that the daemon serves, or waits for after a restart."""

    id: str
    started_at: str
    """When the session began (UTC, ISO 8601)."""
    attached: bool
    """False: its connection is down and the daemon waits for it to resume."""
    held: int
    """How many names it holds."""
    waiting: int
    protocol_version: int | None = None
    """What the client speaks; None for one that an earlier daemon left and that has not resumed."""
    client: str = ""
    """What the client says of itself: program and version. Shown, never trusted."""

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> SessionInfo:
        return cls(**{k: v for k, v in wire.items() if k in cls.__dataclass_fields__})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ImportReport:
    """What an import did, entry by entry; never silent."""

    dry_run: bool
    entries: list[ImportedEntry]

    def count(self, outcome: str) -> int:
        """Say how many entries had that outcome."""
        return sum(e.outcome == outcome for e in self.entries)


@dataclass(frozen=True)
class ImportedEntry:
    """The fate of one entry of an import: added, same, conflict, invalid, or retired (by `replace`)."""

    name: str
    outcome: Literal["added", "same", "conflict", "invalid", "retired"]
    reason: str = ""


if not TYPE_CHECKING:  # where it would pass for every misspelt name

    def __getattr__(name: str) -> object:
        # Models of the classic API: a client that does not use them must not wait for pydantic.
        if name in ("LocalRegistry", "RegistryEntry", "RegistryLock", "RegistryResolveResult"):
            from madsci_registry import classic_types

            return getattr(classic_types, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
