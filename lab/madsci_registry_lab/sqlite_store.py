"""A lab's store in one SQLite file: the contract of store.py, one transaction for each operation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ulid import ULID

from madsci_registry.errors import (
    ConflictError,
    HeldError,
    NoSpaceError,
    NotFoundError,
    RegistryError,
    SessionRequiredError,
    WrongTypeError,
)
from madsci_registry_lab import rules
from madsci_registry_lab import sqlite_rows as rows
from madsci_registry_lab.clock import Clock, SystemClock, iso
from madsci_registry_lab.faults import DISK_FULL, IO_ERROR, Fault
from madsci_registry_lab.leases import Leases
from madsci_registry_lab.sqlite_database import Database
from madsci_registry_lab.sqlite_feed import Journal
from madsci_registry_lab.store import (
    About,
    Applied,
    Change,
    Conflict,
    Entry,
    Event,
    Lock,
    Mark,
    OutOfOrderError,
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
        self._run, self._one = self._db.run, self._db.one
        self._leases = Leases(self._clock)
        self._callbacks: list[Callable[[], None]] = []
        try:
            with self._db.transaction(write=True):
                self._journal = Journal(self._db, self._clock)
                for session in self._sessions("1"):
                    self._leases.hear(session.id, session.lease_s)
        except RegistryError as error:
            self._db.close()
            raise Fault(DISK_FULL if isinstance(error, NoSpaceError) else IO_ERROR, error.message) from error

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
            entry = self._by_name(name) if name is not None else self._by_id(id or "")
            if entry is None:
                raise self._not_found(name, id)
            return entry

    def entries(self, after: str, limit: int, component_type: str | None = None) -> list[Entry]:
        """See LabStore."""
        with self._read():
            where = "n.name > ?1 AND (?3 IS NULL OR n.component_type = ?3) ORDER BY n.name LIMIT ?2"
            return [rows.entry(row) for row in self._run(rows.ENTRY + where, (after, limit, component_type))]

    def resolve(self, host: str, op: str, state: State, session: str | None, want: Want | None) -> Resolved:
        """See LabStore."""
        with self._change():
            entry = self._by_name(state.name)
            if entry is None:
                if self._by_id(state.id) is not None:
                    raise ConflictError(f"{state.id} is another component's", name=state.name, id=state.id)
                self._create(state, host, op)
            elif entry.component_type != state.component_type:
                raise WrongTypeError(
                    f"{state.name!r} is a {entry.component_type}",
                    name=state.name, id=entry.id, component_type=entry.component_type, given=state.component_type,
                )  # fmt: skip
            elif entry.retired:
                later = max(entry.changed_at, state.changed_at)
                self._put(replace(entry, retired=False, changed_at=later, host=host), "revived")
            lock = self._acquire(host, session, state.name, want) if session and want else None
            found = self._by_name(state.name)
            assert found
            made = self._run("SELECT host, op FROM ids WHERE id = ?", (found.id,)).fetchone()
            return Resolved(entry=found, is_new=made == (host, op), lock=lock)

    def apply(self, host: str, epoch: int, after: int | None, upto: int | None, changes: Sequence[Change]) -> Applied:
        """See LabStore."""
        with self._change():
            mark = self._mark(host)
            if after is not None:
                _check_order(mark, epoch, after)
            fresh = [c for c in changes if after is None or mark is None or c.revision > mark.revision]
            changed, unapplied = 0, []
            for change in fresh:
                verdict = self._take_in(change.state, host, sync=after is None)
                changed += verdict.do != "nothing"
                if verdict.reason:
                    there = self._by_name(change.state.name)
                    unapplied.append(Unapplied(change.state, verdict.reason, there.id if there else None))
            if upto is not None:
                mark = Mark(epoch, max(upto, mark.revision) if mark and mark.epoch == epoch else upto)
                self._run("INSERT OR REPLACE INTO marks VALUES (?, ?, ?)", (host, mark.epoch, mark.revision))
            return Applied(mark, changed, len(changes) - len(fresh), tuple(unapplied))

    def mark(self, host: str) -> Mark | None:
        """See LabStore."""
        with self._read():
            return self._mark(host)

    def conflicts(self, *, decided: bool, after: tuple[str, str], limit: int) -> list[Conflict]:
        """See LabStore."""
        with self._read():
            found = self._run(
                """SELECT name, id, reason, host, at, state, decided_at FROM conflicts
                    WHERE (name, id) > (?, ?) AND (? OR decided_at IS NULL) ORDER BY name, id LIMIT ?""",
                (*after, decided, limit),
            ).fetchall()
            return [
                Conflict(
                    name=name,
                    id=id,
                    reason=reason,
                    host=host,
                    at=at,
                    state=State(**json.loads(state)),
                    entry=self._by_name(name),
                    decided_at=decided_at,
                )
                for name, id, reason, host, at, state, decided_at in found
            ]

    def merge(self, host: str, name: str, prefer: str) -> Entry:
        """See LabStore."""
        with self._change():
            entry = self._by_name(name)
            told = [id for (id,) in self._run("SELECT id FROM conflicts WHERE name = ?", (name,))]
            ids = [*dict.fromkeys([*([entry.id] if entry else []), *told])]
            if not told or prefer not in ids:
                raise NotFoundError(f"{prefer} has no part in a conflict of {name!r}", name=name, id=prefer)
            best = self._said_of(name, prefer)
            for home in [self._by_id(id) for id in ids]:
                if home is not None and home.name != name:
                    self._join(home, name)
            if entry is not None and entry.id != prefer:
                self._note_conflict(rows.state_of(entry), entry.host, "two_ids")
            now = self._now()
            self._put(replace(best, name=name, id=prefer, changed_at=now, host=host), "merged")
            self._run("UPDATE conflicts SET decided_at = ? WHERE name = ? AND decided_at IS NULL", (now, name))
            merged = self._by_name(name)
            assert merged
            return merged

    def _said_of(self, name: str, id: str) -> Entry:
        """Return what is known of a ULID that has part in a conflict of `name`: its entry, or what its host said."""
        home = self._by_id(id)
        if home is not None and home.id == id:
            return home
        state, host = self._run("SELECT state, host FROM conflicts WHERE name = ? AND id = ?", (name, id)).fetchone()
        return rows.fresh(State(**json.loads(state)), host)

    def _join(self, home: Entry, name: str) -> None:
        """Let a component lose its name and be the one called `name` from now on."""
        if home.lock is not None:
            raise HeldError(f"{home.name!r} is held by {home.lock.host}: end that first", name=home.name)
        self._add_name(name)
        self._clear_name(home)
        self._run("UPDATE ids SET name = ? WHERE name = ?", (name, home.name))

    def _take_in(self, given: State, host: str, *, sync: bool) -> rules.Verdict:
        """Do what a host's word asks for; return what that was."""
        by_id, by_name = self._by_id(given.id), self._by_name(given.name)
        verdict = rules.judge(given, host, by_id, by_name, sync=sync)
        if verdict.do == "create":
            self._create(given, host, None)
        elif verdict.do in ("alias", "conflict"):
            if verdict.do == "alias":
                self._run("INSERT INTO ids VALUES (?, ?, ?, NULL)", (given.id, given.name, host))
            self._note_conflict(given, host, verdict.reason or "two_ids")
        elif verdict.do in ("update", "rename") and by_id:
            if verdict.do == "rename":
                self._rename(by_id, given.name)
            after = rules.updated(by_id, given, host)
            kind = "renamed" if verdict.do == "rename" else rows.kind_of(by_id, after)
            self._put(after, kind, **({"was": by_id.name} if verdict.do == "rename" else {}))
        elif verdict.do == "split" and by_id:
            self._add_name(given.name)
            self._run("UPDATE ids SET name = ? WHERE id = ?", (given.name, given.id))
            self._put(rows.fresh(given, host), "renamed", was=by_id.name)
        if verdict.do in ("rename", "split"):
            self._run(
                "UPDATE conflicts SET decided_at = ? WHERE id = ? AND decided_at IS NULL", (self._now(), given.id)
            )
        return verdict

    def _create(self, state: State, host: str, op: str | None) -> None:
        self._add_name(state.name)
        self._run("INSERT INTO ids VALUES (?, ?, ?, ?)", (state.id, state.name, host, op))
        self._put(rows.fresh(state, host), "created")

    def _rename(self, entry: Entry, name: str) -> None:
        """Move an entry's ULIDs, and its lock, to a name that has no entry."""
        self._add_name(name)
        self._clear_name(entry)
        self._run("UPDATE ids SET name = ? WHERE name = ?", (name, entry.name))
        if entry.lock is not None:
            last, _ = self._term(name)
            term = rules.moved_term(name, entry.lock, last)
            self._run("UPDATE locks SET name = ?, term = ? WHERE name = ?", (name, term, entry.name))
            self._run("UPDATE names SET term = ?, term_host = ? WHERE name = ?", (term, entry.lock.host, name))
            self._journal.add("moved", name, entry.id, entry.lock.host, was=entry.name, term=term)

    def _put(self, entry: Entry, kind: str, **why: Any) -> None:
        """Write an entry over its name's row, with its event."""
        values = (entry.id, entry.component_type, entry.retired, entry.metadata, entry.created_at, entry.changed_at)
        self._run(
            """UPDATE names SET id = ?, component_type = ?, retired = ?, metadata = ?, created_at = ?, changed_at = ?,
                      host = ? WHERE name = ?""",
            (*values, entry.host, entry.name),
        )
        self._journal.add(kind, entry.name, entry.id, entry.host, **why)

    def _add_name(self, name: str) -> None:
        self._run("INSERT INTO names (name) VALUES (?) ON CONFLICT DO NOTHING", (name,))

    def _clear_name(self, entry: Entry) -> None:
        self._run(
            """UPDATE names SET id = NULL, component_type = NULL, retired = NULL, metadata = NULL, created_at = NULL,
                      changed_at = NULL, host = NULL, moved_id = ? WHERE name = ?""",
            (entry.id, entry.name),
        )

    def _note_conflict(self, given: State, host: str, reason: str) -> None:
        key = given.name, given.id
        found = "SELECT decided_at, state FROM conflicts WHERE name = ? AND id = ? AND reason = ?"
        decided_at, before = self._run(found, (*key, reason)).fetchone() or ("", "{}")
        if reason == "wrong_type" and decided_at and json.loads(before)["component_type"] == given.component_type:
            return  # its host says so with each sync
        state = json.dumps(asdict(given), ensure_ascii=False)
        row = (*key, reason, host, self._now(), state)
        self._run("INSERT OR REPLACE INTO conflicts VALUES (?, ?, ?, ?, ?, ?, NULL)", row)
        if decided_at is not None:  # it is no open one already
            self._journal.add("conflict", *key, host, reason=reason)

    def _by_name(self, name: str) -> Entry | None:
        row = self._run(rows.ENTRY + "n.name = ?", (name,)).fetchone()
        return rows.entry(row) if row else None

    def _by_id(self, id: str) -> Entry | None:
        row = self._run(rows.ENTRY + "n.name = (SELECT name FROM ids WHERE id = ?)", (id,)).fetchone()
        return rows.entry(row) if row else None

    def _not_found(self, name: str | None, id: str | None = None) -> NotFoundError:
        moved = self._one("SELECT i.name FROM names n JOIN ids i ON i.id = n.moved_id WHERE n.name = ?", (name,))
        where = f"; the component that had it is {moved!r} now" if moved else ""
        return NotFoundError(f"the lab knows no {name or id!r}{where}", name=name, id=id, renamed_to=moved)

    def _mark(self, host: str) -> Mark | None:
        row = self._run("SELECT epoch, revision FROM marks WHERE host = ?", (host,)).fetchone()
        return Mark(*row) if row else None

    # hosts and locks

    def register(self, host: str, boot: str, lease_s: float, label: str) -> Session:
        """See LabStore."""
        with self._change():
            self._expire()
            for old in self._sessions("host = ?", host):
                if old.boot != boot:
                    raise ConflictError(
                        f"{host!r} lives already, with boot {old.boot}: a copy of it, or itself before it rebooted",
                        name=host, id=old.id,
                    )  # fmt: skip
                self._end(old, "ended")
            session = Session(
                id=str(ULID()), host=host, boot=boot, lease_s=lease_s, started_at=self._now(), label=label
            )  # fmt: skip
            row = (session.id, host, boot, lease_s, session.started_at, label)
            self._run("INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?)", row)
            self._journal.add("registered", None, None, host, session=session.id)
            self._leases.hear(session.id, lease_s)
        return session

    def keep(self, host: str, session: str, boot: str) -> Session:
        """See LabStore."""
        with self._read():  # in it: what is answered as living is not being ended
            found = self._session(host, session)
            if found.boot != boot:
                raise SessionRequiredError(f"session {session} is of another boot of {found.host!r}")
            self._leases.hear(found.id, found.lease_s)
            return found

    def end(self, host: str, session: str) -> bool:
        """See LabStore."""
        with self._change():
            found = self._sessions("host = ? AND id = ?", host, session)
            for old in found:
                self._end(old, "ended")
            return bool(found)

    def expire(self) -> int:
        """See LabStore."""
        with self._change():
            ended = self._expire()
            self._journal.trim()
            return ended

    def _expire(self) -> int:
        ended = 0
        for id in self._leases.due():
            found = self._sessions("id = ?", id)
            for session in found:
                self._end(session, "expired")
            if not found:  # it ended earlier, and that was committed
                self._leases.forget(id)
            ended += len(found)
        return ended

    def _end(self, session: Session, kind: str) -> None:
        for lock in self._locks("l.session = ?", session.id):
            self._drop(lock, why=kind)
        self._run("DELETE FROM sessions WHERE id = ?", (session.id,))
        self._journal.add(kind, None, None, session.host, session=session.id)

    def sessions(self) -> list[Session]:
        """See LabStore."""
        with self._read():
            return self._sessions("1 ORDER BY host")

    def acquire(self, host: str, session: str, name: str, want: Want) -> Lock:
        """See LabStore."""
        with self._change():
            return self._acquire(host, session, name, want)

    def _acquire(self, host: str, session: str, name: str, want: Want) -> Lock:
        self._expire()
        who, entry = self._session(host, session), self._by_name(name)
        if entry is None:
            raise self._not_found(name)
        term = rules.grant(name, who.id, who.host, entry.lock, self._term(name), want)
        if entry.lock is not None and entry.lock.session == session:
            return entry.lock
        if entry.lock is not None:
            self._drop(entry.lock, why="given away by a store that was set back")
        now = self._now()
        self._run("INSERT INTO locks VALUES (?, ?, ?, ?, ?)", (name, who.id, term, now, json.dumps(want.holder)))
        self._run("UPDATE names SET term = ?, term_host = ? WHERE name = ?", (term, who.host, name))
        self._journal.add("granted", name, entry.id, who.host, term=term, holder=want.holder)
        return Lock(name=name, term=term, host=who.host, session=who.id, since=now, holder=want.holder)

    def release(self, host: str, session: str, name: str, term: int | None) -> bool:
        """See LabStore."""
        with self._change():
            where = "l.name = ?1 AND s.host = ?2 AND s.id = ?3 AND (?4 IS NULL OR l.term = ?4)"
            found = self._locks(where, name, host, session, term)
            for lock in found:
                self._drop(lock)
            return bool(found)

    def locks(self, session: str) -> list[Lock]:
        """See LabStore."""
        with self._read():
            return self._locks("l.session = ? ORDER BY l.name", session)

    def given(self, names: Sequence[str]) -> dict[str, tuple[int, str | None]]:
        """See LabStore."""
        with self._read():
            rows = self._run(
                "SELECT name, term, term_host FROM names WHERE name IN (SELECT value FROM json_each(?))",
                (json.dumps([*names]),),
            )
            return {name: (term, host) for name, term, host in rows}

    def _drop(self, lock: Lock, **why: str) -> None:
        self._run("DELETE FROM locks WHERE name = ?", (lock.name,))
        id = self._one("SELECT id FROM names WHERE name = ?", (lock.name,))
        self._journal.add("released", lock.name, id, lock.host, term=lock.term, **why)

    def _term(self, name: str) -> tuple[int, str | None]:
        row = self._run("SELECT term, term_host FROM names WHERE name = ?", (name,)).fetchone()
        return (row[0], row[1]) if row else (0, None)

    def _locks(self, where: str, *args: Any) -> list[Lock]:
        return [rows.lock(*row) for row in self._run(rows.LOCK + where, args)]

    def _session(self, host: str, id: str) -> Session:
        for session in self._sessions("host = ? AND id = ?", host, id):
            return session
        raise SessionRequiredError(f"{host!r} has no living session {id}: register again")

    def _sessions(self, where: str, *args: Any) -> list[Session]:
        return [rows.session(*row) for row in self._run(rows.SESSION + where, args)]

    # feed

    def changes(self, cursor: str | None, limit: int) -> Page:
        """See LabStore."""
        with self._read():
            return self._journal.changes(cursor, limit)

    def history(self, name: str, after: int, limit: int) -> list[Event]:
        """See LabStore."""
        with self._read():
            return self._journal.history(name, after, limit)

    def _now(self) -> str:
        return iso(self._clock.wall())


def _check_order(mark: Mark | None, epoch: int, after: int) -> None:
    has = f"has revision {mark.revision} of epoch {mark.epoch}" if mark else "has nothing"
    if mark is None and after == 0 or mark is not None and mark.epoch == epoch and after <= mark.revision:
        return
    raise OutOfOrderError(
        f"changes after revision {after} of epoch {epoch} do not follow: the lab {has} of this host",
        epoch=mark.epoch if mark else None,
        revision=mark.revision if mark else None,
    )
