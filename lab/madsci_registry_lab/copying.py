"""Moves a lab from one store to another (`madsci-registry-lab copy`), while no lab registry serves either of them.

All goes along: names with their terms, ULIDs with the requests that made them, conflicts, how far each host's changes
are in, history in its order, sessions and locks. Terms go on above, as the epoch does. Revisions are the new store's
own, so a cursor of the old one is `compacted` there, and hosts list. What was written is read again and compared, and
the copy is a lab only then: one that was killed, or differs, serves nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from madsci_registry_lab.etcd_access import NO_FILES, EtcdFiles, parse
from madsci_registry_lab.faults import BAD_CONFIGURATION, DAMAGED, Fault
from madsci_registry_lab.records import ConflictRow, IdRow, NameRow
from madsci_registry_lab.store import Event, Lock, Session


@dataclass(frozen=True, kw_only=True)
class Everything:
    """All that a lab keeps, in an order that is the same for every store. It is held in memory: some 500 bytes for each
    event and entry."""

    epoch: int
    """The last one."""
    names: tuple[NameRow, ...]
    """By name; without `told`, which is in the events."""
    ids: tuple[tuple[str, IdRow], ...]
    conflicts: tuple[tuple[str, str, ConflictRow], ...]
    """By name and ULID."""
    marks: tuple[tuple[str, int, int], ...]
    """Host, epoch, revision."""
    sessions: tuple[Session, ...]
    locks: tuple[Lock, ...]
    """By name."""
    events: tuple[Event, ...]
    """In their order; the revisions are 0."""

    def counts(self) -> dict[str, int]:
        """Say how many there are of each."""
        return {f.name: len(getattr(self, f.name)) for f in fields(self) if f.name != "epoch"}

    def check_copy(self, found: Everything) -> None:
        """Raise Fault if what was found in a copy of this is not the same."""
        for part, count in self.counts().items():
            if getattr(found, part) != getattr(self, part):
                raise Fault(DAMAGED, f"{part} of the copy are not those of the source ({count} there)")


def copy(source: str, target: str, files: EtcdFiles = NO_FILES) -> dict[str, int]:
    """Copy a lab into an empty store; return how many there are of each.

    Raises:
        Fault: a store cannot be opened or is served; the target is not empty; what it has then is not the same. The
            source is never changed. An unfinished copy serves no lab, and is begun anew by the next one.
    """
    if source == target:
        raise Fault(BAD_CONFIGURATION, "copy: both stores are the same")
    read, write = _store(source, files)[0], _store(target, files)[1]
    given = read()
    write(given)
    return given.counts()


_Read = Callable[[], Everything]
_Write = Callable[[Everything], None]


def _store(url: str, files: EtcdFiles) -> tuple[_Read, _Write]:
    kind, _, rest = url.partition(":")
    if kind == "sqlite" and rest:
        from madsci_registry_lab import sqlite_copy

        path = Path(rest)
        return lambda: sqlite_copy.read(path), lambda given: sqlite_copy.write(path, given)
    from madsci_registry_lab import etcd_copy

    access = parse(url, files)
    return lambda: etcd_copy.read(access), lambda given: etcd_copy.write(access, given)
