"""The stores that a lab can have, each for the one suite of tests in unit/test_lab_store*.py."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from etcd_stores import EtcdStores
from helpers import FakeClock
from madsci_registry.errors import RegistryError
from madsci_registry_lab.sqlite_store import SqliteStore
from madsci_registry_lab.store import Applied, Change, LabStore, Lock, Session, State, Want

LEASE_S = 15.0
ULIDS = [f"01M86NDR2BZN87TH2B3SP1N0{n:02}" for n in range(100)]


class SqliteStores:
    """One SQLite file in a folder, opened and closed again. A context manager."""

    def __init__(self, folder: Path, clock: FakeClock) -> None:
        self._path = folder / "lab.db"
        self._clock = clock
        self._open = ExitStack()

    def __enter__(self) -> SqliteStores:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> LabStore:
        """Open what is there, as a start of the lab does."""
        store = SqliteStore(self._path, self._clock)
        self._open.callback(store.close)
        return store

    def close(self) -> None:
        """Close it, as an end of the lab does."""
        self._open.close()

    def back_up(self) -> None:
        """Keep a copy of what is there; it must be closed."""
        shutil.copy(self._path, self._path.with_suffix(".backup"))

    def restore(self) -> None:
        """Set it back to that copy; it must be closed."""
        shutil.copy(self._path.with_suffix(".backup"), self._path)


class Stores(Protocol):
    """What tests need of each kind of store. A context manager; EtcdStores skips the test where there is no etcd."""

    def __enter__(self) -> Stores: ...

    def __exit__(self, *_: object) -> None: ...

    def open(self) -> LabStore: ...

    def close(self) -> None: ...

    def back_up(self) -> None: ...

    def restore(self) -> None: ...


STORES: dict[str, Callable[[Path, FakeClock], Stores]] = {"sqlite": SqliteStores, "etcd": EtcdStores}


def state(name: str, n: int, *, at: int = 0, **more: object) -> State:
    """Return a word about a component with the n-th ULID, changed at that second."""
    when = f"2026-09-21T10:00:{at:02}.000000Z"
    given = {"component_type": "node", "created_at": when, "changed_at": when, **more}
    return State(id=ULIDS[n], name=name, **given)  # type: ignore[arg-type] # the caller's fields


class Host:
    """A host of a lab: its session, and what it does with the store."""

    def __init__(self, store: LabStore, name: str, boot: str = "boot-1") -> None:
        self.store = store
        self.name = name
        self.boot = boot
        self.session: Session = store.register(name, boot, LEASE_S, f"daemon on {name}")
        self.ops = 0

    def resolve(self, name: str, n: int) -> str:
        """Get or create a component; return its ULID."""
        self.ops += 1
        return self.store.resolve(self.name, str(self.ops), state(name, n), None, None).entry.id

    def lock(self, name: str, proposal: int = 0, term: int | None = None) -> Lock:
        (lock,) = self.store.acquire(self.name, self.session.id, [(name, Want(proposal=proposal, term=term))])
        if isinstance(lock, RegistryError):
            raise lock
        return lock

    def keep(self) -> Session:
        return self.store.keep(self.name, self.session.id, self.boot)

    def release(self, name: str, term: int | None) -> bool:
        return bool(self.store.release(self.name, self.session.id, {name: term}))


def batch(store: LabStore, host: str, after: int, *states: State, epoch: int = 1) -> Applied:
    """Send states as the changes that follow on revision `after`."""
    changes = [Change(after + n, s) for n, s in enumerate(states, 1)]
    return store.apply(host, epoch, after, after + len(states), changes)


def sync(store: LabStore, host: str, *states: State, upto: int | None = 100) -> Applied:
    """Send all that a host has."""
    return store.apply(host, 1, None, upto, [Change(0, s) for s in states])


def kinds(store: LabStore, cursor: str) -> list[tuple[str, str | None]]:
    """Return kind and name of all changes after a cursor."""
    return [(e.kind, e.name) for e in store.changes(cursor, 1000).events]


def pass_time(store: LabStore, clock: FakeClock, seconds: float, *, living: tuple[Host, ...] = ()) -> int:
    """Let time pass, looking each second as the lab does; return how many sessions ended."""
    ended = 0
    for _ in range(int(seconds)):
        clock.advance(1)
        for host in living:
            host.keep()
        ended += store.expire()
    return ended
