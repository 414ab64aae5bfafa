"""A lab's store in one SQLite file: the contract of store.py, one transaction for each operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from madsci_registry.errors import RegistryError
from madsci_registry_lab import rules
from madsci_registry_lab.clock import Clock, SystemClock
from madsci_registry_lab.sqlite_components import Components
from madsci_registry_lab.sqlite_database import Database, fault_at_start
from madsci_registry_lab.sqlite_feed import Journal
from madsci_registry_lab.sqlite_locks import Locks
from madsci_registry_lab.store import (
    About,
    Applied,
    Change,
    Conflict,
    Entry,
    Event,
    Lock,
    Mark,
    Page,
    Resolved,
    Session,
    State,
    Unapplied,
    Want,
)


class SqliteStore:
    """The store behind one lab registry process. Thread-safe."""

    def __init__(self, path: Path, clock: Clock | None = None) -> None:
        """Open the file and begin a new epoch; each session's lease begins anew.

        Raises:
            Fault: see Database.
        """
        self._clock = clock or SystemClock()
        self._db = Database(path)
        self._run = self._db.run
        self._callbacks: list[Callable[[], None]] = []
        try:
            with self._db.transaction(write=True):
                self._journal = Journal(self._db, self._clock)
                self._components = Components(self._db, self._journal, self._clock)
                self._locks = Locks(self._db, self._journal, self._clock, self._components)
        except RegistryError as error:
            self._db.close()
            raise fault_at_start(error, path) from error

    @property
    def broken(self) -> str:
        """What the disk said when it failed; empty: all is well."""
        return self._db.broken

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Make a transaction that may change something; whoever waits for changes hears of it afterwards."""
        with self._db.transaction(write=True):
            before = self._journal.revision
            yield
            changed = self._journal.revision != before
        if changed:
            for callback in self._callbacks:
                callback()

    def _read(self) -> Any:
        return self._db.transaction(write=False)

    def on_change(self, callback: Callable[[], None]) -> None:
        """See LabStore."""
        self._callbacks.append(callback)

    def close(self) -> None:
        """See LabStore."""
        self._db.close()

    def about(self) -> About:
        """See LabStore."""
        with self._read():
            names, locks, sessions, conflicts = self._run(
                """SELECT (SELECT count(*) FROM names WHERE id IS NOT NULL), (SELECT count(*) FROM locks),
                          (SELECT count(*) FROM sessions), (SELECT count(*) FROM conflicts WHERE decided_at IS NULL)"""
            ).fetchone() or (0, 0, 0, 0)
            return About(
                epoch=self._journal.epoch,
                cursor=self._journal.cursor(),
                names=names,
                locks=locks,
                sessions=sessions,
                conflicts=conflicts,
            )

    # identities

    def find(self, *, name: str | None = None, id: str | None = None) -> Entry:
        """See LabStore."""
        with self._read():
            entry = self._components.by_name(name) if name is not None else self._components.by_id(id or "")
            if entry is None:
                raise self._components.absent(name, id)
            return entry

    def entries(self, after: str, limit: int, component_type: str | None = None) -> list[Entry]:
        """See LabStore."""
        with self._read():
            return self._components.page(after, limit, component_type)

    def resolve(self, host: str, op: str, state: State, session: str | None, want: Want | None) -> Resolved:
        """See LabStore."""
        with self._change():
            self._locks.expire()
            who = self._locks.session(host, session) if session and want else None
            self._components.ensure(host, op, state)
            lock = self._locks.acquire_one(who, state.name, want) if who and want else None
            entry = self._components.by_name(state.name)
            assert entry
            return Resolved(entry=entry, is_new=self._components.was_made_by(entry.id, host, op), lock=lock)

    def apply(self, host: str, epoch: int, after: int | None, upto: int | None, changes: Sequence[Change]) -> Applied:
        """See LabStore."""
        with self._change():
            mark = self._mark(host)
            if after is not None:
                rules.check_order(mark, epoch, after)
            fresh = [c for c in changes if after is None or mark is None or c.revision > mark.revision]
            changed, unapplied = 0, []
            for change in fresh:
                verdict = self._components.take_in(change.state, host, sync=after is None)
                changed += verdict.do != "nothing"
                if verdict.reason:
                    there = self._components.by_name(change.state.name)
                    unapplied.append(Unapplied(change.state, verdict.reason, there.id if there else None))
            if upto is not None:
                mark = Mark(epoch, max(upto, mark.revision) if mark and mark.epoch == epoch else upto)
                self._run("INSERT OR REPLACE INTO marks VALUES (?, ?, ?)", (host, mark.epoch, mark.revision))
            return Applied(mark, changed, len(changes) - len(fresh), tuple(unapplied))

    def mark(self, host: str) -> Mark | None:
        """See LabStore."""
        with self._read():
            return self._mark(host)

    def _mark(self, host: str) -> Mark | None:
        row = self._run("SELECT epoch, revision FROM marks WHERE host = ?", (host,)).fetchone()
        return Mark(*row) if row else None

    def conflicts(self, *, decided: bool, after: tuple[str, str], limit: int) -> list[Conflict]:
        """See LabStore."""
        with self._read():
            return self._components.conflicts(decided=decided, after=after, limit=limit)

    def merge(self, host: str, name: str, prefer: str) -> Entry:
        """See LabStore."""
        with self._change():
            self._components.merge(host, name, prefer)
            merged = self._components.by_name(name)
            assert merged
            return merged

    # hosts and locks

    def register(self, host: str, boot: str, lease_s: float, label: str) -> Session:
        """See LabStore."""
        with self._change():
            return self._locks.register(host, boot, lease_s, label)

    def keep(self, host: str, session: str, boot: str) -> Session:
        """See LabStore."""
        with self._read():  # in it: what is answered as living is not being ended
            return self._locks.keep(host, session, boot)

    def end(self, host: str, session: str) -> bool:
        """See LabStore."""
        with self._change():
            return self._locks.end(host, session)

    def expire(self) -> int:
        """See LabStore."""
        with self._change():
            ended = self._locks.expire()
            self._journal.trim()
            return ended

    def sessions(self) -> list[Session]:
        """See LabStore."""
        with self._read():
            return self._locks.sessions()

    def acquire(self, host: str, session: str, wants: Sequence[tuple[str, Want]]) -> list[Lock | RegistryError]:
        """See LabStore."""
        with self._change():
            return self._locks.acquire(host, session, wants)

    def release(self, host: str, session: str, terms: Mapping[str, int | None]) -> list[str]:
        """See LabStore."""
        with self._change():
            return self._locks.release(host, session, terms)

    def locks(self, session: str) -> list[Lock]:
        """See LabStore."""
        with self._read():
            return self._locks.of(session)

    def given(self, names: Sequence[str]) -> dict[str, tuple[int, str | None]]:
        """See LabStore."""
        with self._read():
            return self._locks.given(names)

    # feed

    def changes(self, cursor: str | None, limit: int) -> Page:
        """See LabStore."""
        with self._read():
            return self._journal.changes(cursor, limit)

    def history(self, name: str, after: int, limit: int) -> list[Event]:
        """See LabStore."""
        with self._read():
            return self._journal.history(name, after, limit)
