"""Hosts' sessions and their locks in a lab's SQLite file. Which sessions are overdue, leases.py says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ulid import ULID

from madsci_registry.errors import ConflictError, RegistryError, SessionRequiredError
from madsci_registry_lab import rules
from madsci_registry_lab import sqlite_rows as rows
from madsci_registry_lab.clock import Clock, iso
from madsci_registry_lab.leases import Leases
from madsci_registry_lab.sqlite_components import Components
from madsci_registry_lab.sqlite_database import Database
from madsci_registry_lab.sqlite_feed import Journal
from madsci_registry_lab.store import PROPOSAL_LIMIT, Lock, Session, Want


class Locks:
    """The sessions and locks of a lab. Every method belongs inside a transaction of the database."""

    def __init__(self, db: Database, journal: Journal, clock: Clock, components: Components) -> None:
        """Begin the lease of each session anew."""
        self._run, self._one, self._journal, self._clock = db.run, db.one, journal, clock
        self._components = components
        self._leases = Leases(clock)
        for session in self.sessions():
            self._leases.hear(session.id, session.lease_s)

    def sessions(self) -> list[Session]:
        """See LabStore."""
        return self._sessions("1 ORDER BY host")

    def register(self, host: str, boot: str, lease_s: float, label: str) -> Session:
        """See LabStore."""
        self.expire()
        for old in self._sessions("host = ?", host):
            if old.boot != boot:
                raise ConflictError(
                    f"{host!r} lives already, with boot {old.boot}: a copy of it, or itself before it rebooted",
                    name=host, id=old.id,
                )  # fmt: skip
            self._end(old, "ended")
        now = self._now()
        session = Session(id=str(ULID()), host=host, boot=boot, lease_s=lease_s, started_at=now, label=label)
        self._run("INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?)", (session.id, host, boot, lease_s, now, label))
        self._journal.add("registered", None, None, host)
        self._leases.hear(session.id, lease_s)
        return session

    def keep(self, host: str, session: str, boot: str) -> Session:
        """See LabStore."""
        found = self.session(host, session)
        if found.boot != boot:
            raise SessionRequiredError(f"session {session} is of another boot of {found.host!r}")
        self._leases.hear(found.id, found.lease_s)
        return found

    def end(self, host: str, session: str) -> bool:
        """See LabStore."""
        found = self._sessions("host = ? AND id = ?", host, session)
        for old in found:
            self._end(old, "ended")
        return bool(found)

    def expire(self) -> int:
        """See LabStore."""
        ended = 0
        for id in self._leases.due():
            found = self._sessions("id = ?", id)
            for session in found:
                self._end(session, "expired")
            if not found:  # it ended earlier, and that was committed
                self._leases.forget(id)
            ended += len(found)
        return ended

    def acquire(self, host: str, session: str, wants: Sequence[tuple[str, Want]]) -> list[Lock | RegistryError]:
        """See LabStore."""
        self.expire()
        try:
            who = self.session(host, session)
        except SessionRequiredError as error:
            return [error] * len(wants)
        done: list[Lock | RegistryError] = []
        for name, want in wants:
            try:
                done.append(self.acquire_one(who, name, want))
            except RegistryError as error:  # raised before anything is written
                done.append(error)
        return done

    def acquire_one(self, who: Session, name: str, want: Want) -> Lock:
        """Lock a name, once `expire` has been done. Raises what LabStore.acquire returns, with nothing changed."""
        entry = self._components.by_name(name)
        if entry is None:
            raise self._components.absent(name)
        # What a backup that the store was set back to does not know of was given before this start.
        want = replace(want, proposal=max(want.proposal, min(self._journal.epoch, PROPOSAL_LIMIT)))
        term = rules.grant(name, who.id, who.host, entry.lock, self._term(name), want)
        if entry.lock is not None and entry.lock.session == who.id:
            return entry.lock
        if entry.lock is not None:
            self._drop(entry.lock, why="given away by a store that was set back")
        now = self._now()
        self._run("INSERT INTO locks VALUES (?, ?, ?, ?, ?)", (name, who.id, term, now, json.dumps(want.holder)))
        self._run("UPDATE names SET term = ?, term_host = ? WHERE name = ?", (term, who.host, name))
        self._journal.add("granted", name, entry.id, who.host, term=term, holder=want.holder)
        return Lock(name=name, term=term, host=who.host, session=who.id, since=now, holder=want.holder)

    def release(self, host: str, session: str, terms: Mapping[str, int | None]) -> list[str]:
        """See LabStore."""
        where = "l.name = ?1 AND s.host = ?2 AND s.id = ?3 AND (?4 IS NULL OR l.term = ?4)"
        found = [lock for name, term in terms.items() for lock in self._locks(where, name, host, session, term)]
        for lock in found:
            self._drop(lock)
        return [lock.name for lock in found]

    def of(self, session: str) -> list[Lock]:
        """See LabStore.locks."""
        return self._locks("l.session = ? ORDER BY l.name", session)

    def given(self, names: Sequence[str]) -> dict[str, tuple[int, str | None]]:
        """See LabStore."""
        found = self._run(
            "SELECT name, term, term_host FROM names WHERE name IN (SELECT value FROM json_each(?))",
            (json.dumps([*names]),),
        )
        return {name: (term, host) for name, term, host in found}

    def _end(self, session: Session, kind: str) -> None:
        for lock in self._locks("l.session = ?", session.id):
            self._drop(lock, why=kind)
        self._run("DELETE FROM sessions WHERE id = ?", (session.id,))
        self._journal.add(kind, None, None, session.host)

    def _drop(self, lock: Lock, **why: str) -> None:
        self._run("DELETE FROM locks WHERE name = ?", (lock.name,))
        id = self._one("SELECT id FROM names WHERE name = ?", (lock.name,))
        self._journal.add("released", lock.name, id, lock.host, term=lock.term, **why)

    def _term(self, name: str) -> tuple[int, str | None]:
        row = self._run("SELECT term, term_host FROM names WHERE name = ?", (name,)).fetchone()
        return (row[0], row[1]) if row else (0, None)

    def _locks(self, where: str, *args: Any) -> list[Lock]:
        return [rows.lock(*row) for row in self._run(rows.LOCK + where, args)]

    def session(self, host: str, id: str) -> Session:
        """Return a living session. Raises SessionRequiredError."""
        for session in self._sessions("host = ? AND id = ?", host, id):
            return session
        raise SessionRequiredError(f"{host!r} has no living session {id}: register again")

    def _sessions(self, where: str, *args: Any) -> list[Session]:
        return [rows.session(*row) for row in self._run(rows.SESSION + where, args)]

    def _now(self) -> str:
        return iso(self._clock.wall())
