"""What a lab keeps of a name, a ULID and a conflict, whatever its store: beyond what store.py tells of them. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from madsci_registry_lab.store import Conflict, Entry, Lock, Reason, State


@dataclass(frozen=True, kw_only=True)
class NameRow:
    """A name, with its component where it has one (`id` is not None)."""

    name: str
    id: str | None = None
    component_type: str = ""
    retired: bool = False
    metadata: str = "{}"
    created_at: str = ""
    changed_at: str = ""
    host: str = ""
    other_ids: tuple[str, ...] = ()
    term: int = 0
    term_host: str | None = None
    moved_id: str | None = None
    """The component that had this name last, where it has left it."""
    told: tuple[str, ...] = ()
    """Every ULID that has history under this name."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Every ULID of the component, the preferred one first."""
        return () if self.id is None else (self.id, *self.other_ids)

    def entry(self, lock: Lock | None) -> Entry:
        """Return the entry of a name that has a component."""
        assert self.id is not None
        return Entry(
            name=self.name,
            id=self.id,
            component_type=self.component_type,
            retired=self.retired,
            metadata=self.metadata,
            created_at=self.created_at,
            changed_at=self.changed_at,
            host=self.host,
            term=self.term,
            other_ids=tuple(sorted(self.other_ids)),
            lock=lock,
        )

    def saying(self, entry: Entry) -> NameRow:
        """Return this name with that component; terms, other ULIDs and history stay."""
        return replace(
            self,
            id=entry.id,
            component_type=entry.component_type,
            retired=entry.retired,
            metadata=entry.metadata,
            created_at=entry.created_at,
            changed_at=entry.changed_at,
            host=entry.host,
        )

    def vacated(self) -> NameRow:
        """Return this name as its component leaves it."""
        return NameRow(
            name=self.name, term=self.term, term_host=self.term_host, moved_id=self.id, told=self.told
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class IdRow:
    """A ULID: whose it is, and who told of it first."""

    name: str
    """The component's present name."""
    host: str
    op: str | None = None
    """The request of that host that made it."""


@dataclass(frozen=True, kw_only=True)
class ConflictRow:
    """What a host said that contradicts an entry."""

    reason: Reason
    host: str
    at: str
    state: State
    decided_at: str | None = None

    def conflict(self, name: str, id: str, entry: Entry | None) -> Conflict:
        return Conflict(
            name=name, id=id, reason=self.reason, host=self.host, at=self.at, state=self.state, entry=entry,
            decided_at=self.decided_at,
        )  # fmt: skip
