"""Names, ULIDs and conflicts in a lab's SQLite file: what hosts say of components, taken in as rules.py decides."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

from madsci_registry.errors import HeldError, NotFoundError
from madsci_registry_lab import rules
from madsci_registry_lab import sqlite_rows as rows
from madsci_registry_lab.clock import Clock, iso
from madsci_registry_lab.sqlite_database import Database
from madsci_registry_lab.sqlite_feed import Journal
from madsci_registry_lab.store import Conflict, Entry, State


class Components:
    """The components of a lab. Every method belongs inside a transaction of the database."""

    def __init__(self, db: Database, journal: Journal, clock: Clock) -> None:
        self._run, self._one, self._journal, self._clock = db.run, db.one, journal, clock

    def by_name(self, name: str) -> Entry | None:
        """Return the entry of a name."""
        row = self._run(rows.ENTRY + "n.name = ?", (name,)).fetchone()
        return rows.entry(row) if row else None

    def by_id(self, id: str) -> Entry | None:
        """Return the entry to which a ULID belongs, preferred or not."""
        row = self._run(rows.ENTRY + "n.name = (SELECT name FROM ids WHERE id = ?)", (id,)).fetchone()
        return rows.entry(row) if row else None

    def absent(self, name: str | None, id: str | None = None) -> NotFoundError:
        """Return the error that says that there is no such component, and where a renamed name went."""
        moved = self._one("SELECT i.name FROM names n JOIN ids i ON i.id = n.moved_id WHERE n.name = ?", (name,))
        where = f"; the component that had it is {moved!r} now" if moved else ""
        shown = name if name is not None else id
        return NotFoundError(f"the lab knows no {shown!r}{where}", name=name, id=id, renamed_to=moved)

    def page(self, after: str, limit: int, component_type: str | None) -> list[Entry]:
        """See LabStore.entries."""
        where = "n.name > ?1 AND (?3 IS NULL OR n.component_type = ?3) ORDER BY n.name LIMIT ?2"
        return [rows.entry(row) for row in self._run(rows.ENTRY + where, (after, limit, component_type))]

    def ensure(self, host: str, op: str, state: State) -> None:
        """Make the component of a new name, or see to it that what there is is no other and not retired."""
        entry = self.by_name(state.name)
        is_known = entry is None and self.by_id(state.id) is not None
        after = rules.resolved(state, host, entry, is_known=is_known)
        if entry is None:
            self._create(state, host, op)
        elif after is not None:
            self._put(after, "revived")

    def was_made_by(self, id: str, host: str, op: str) -> bool:
        """Tell whether that request of that host made a component."""
        return bool(self._run("SELECT host, op FROM ids WHERE id = ?", (id,)).fetchone() == (host, op))

    def take_in(self, given: State, host: str, *, sync: bool) -> rules.Verdict:
        """Do what a host's word asks for; return what that was."""
        by_id, by_name = self.by_id(given.id), self.by_name(given.name)
        verdict, given = rules.judge(given, host, by_id, by_name, sync=sync), rules.as_of(given, self._now())
        if verdict.do == "create":
            self._create(given, host, None)
        elif verdict.do in ("alias", "conflict"):
            if verdict.do == "alias":
                self._run("INSERT INTO ids VALUES (?, ?, ?, NULL)", (given.id, given.name, host))
            self._note_conflict(given, host, verdict.reason or "two_ids")
        elif verdict.do == "update" and by_id:
            after = rules.updated(by_id, given, host)
            self._put(after, rules.kind_of(by_id, after))
        elif verdict.do == "rename" and by_id:
            self._rename(by_id, given, host)
        elif verdict.do == "split" and by_id:
            self._add_name(given.name)
            self._run("UPDATE ids SET name = ? WHERE id = ?", (given.name, given.id))
            self._put(rules.fresh(given, host), "renamed", was=by_id.name)
            self._settle(given.id)
        return verdict

    def _create(self, state: State, host: str, op: str | None) -> None:
        self._add_name(state.name)
        self._run("INSERT INTO ids VALUES (?, ?, ?, ?)", (state.id, state.name, host, op))
        self._put(rules.fresh(state, host), "created")

    def _rename(self, entry: Entry, given: State, host: str) -> None:
        """Move an entry, its ULIDs and its lock to a name that has no entry. Who waits for the old one gets it."""
        self._move(entry, given.name)
        if entry.lock is not None:
            last: int = self._one("SELECT term FROM names WHERE name = ?", (given.name,))
            term = rules.moved_term(given.name, entry.lock, last)
            self._run("UPDATE locks SET name = ?, term = ? WHERE name = ?", (given.name, term, entry.name))
            self._run("UPDATE names SET term = ?, term_host = ? WHERE name = ?", (term, entry.lock.host, given.name))
            self._journal.add("moved", given.name, entry.id, entry.lock.host, was=entry.name, term=term)
        self._put(rules.updated(entry, given, host), "renamed", was=entry.name)
        self._settle(given.id)
        wanted = "SELECT state, host FROM conflicts WHERE name = ? AND reason = 'name_taken' AND decided_at IS NULL"
        for text, other in self._run(wanted, (entry.name,)).fetchall():
            self.take_in(State(**json.loads(text)), other, sync=True)

    def _move(self, entry: Entry, name: str) -> None:
        """Let a component, with what is still undecided about it, be the one called `name` from now on."""
        self._add_name(name)
        self._run(
            """UPDATE names SET id = NULL, component_type = NULL, retired = NULL, metadata = NULL, created_at = NULL,
                      changed_at = NULL, host = NULL, moved_id = ? WHERE name = ?""",
            (entry.id, entry.name),
        )
        self._run("UPDATE ids SET name = ? WHERE name = ?", (name, entry.name))
        undecided = "name = ? AND reason = 'two_ids' AND decided_at IS NULL"
        self._run(f"UPDATE OR REPLACE conflicts SET name = ? WHERE {undecided}", (name, entry.name))

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

    # conflicts

    def conflicts(self, *, decided: bool, after: tuple[str, str], limit: int) -> list[Conflict]:
        """See LabStore."""
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
                entry=self.by_name(name),
                decided_at=decided_at,
            )
            for name, id, reason, host, at, state, decided_at in found
        ]

    def merge(self, host: str, name: str, prefer: str) -> None:
        """See LabStore."""
        entry = self.by_name(name)
        told = [id for (id,) in self._run("SELECT id FROM conflicts WHERE name = ?", (name,))]
        ids = [*dict.fromkeys([*([entry.id] if entry else []), *told])]
        if not told or prefer not in ids:
            raise NotFoundError(f"{prefer} has no part in a conflict of {name!r}", name=name, id=prefer)
        best = self._said_of(name, prefer)
        for home in [self.by_id(id) for id in ids]:
            if home is not None and home.name != name:
                self._join(home, name)
        if entry is not None and entry.id != prefer:
            self._note_conflict(rules.state_of(entry), entry.host, "two_ids")
        self._put(replace(best, name=name, id=prefer, changed_at=self._now(), host=host), "merged")
        self._run("UPDATE conflicts SET decided_at = ? WHERE name = ? AND decided_at IS NULL", (self._now(), name))

    def _said_of(self, name: str, id: str) -> Entry:
        """Return what is known of a ULID that has part in a conflict of `name`: its entry, or what its host said."""
        home = self.by_id(id)
        if home is not None and home.id == id:
            return home
        state, host = self._run("SELECT state, host FROM conflicts WHERE name = ? AND id = ?", (name, id)).fetchone()
        return rules.fresh(State(**json.loads(state)), host)

    def _join(self, home: Entry, name: str) -> None:
        """Let a component lose its name, and be the one called `name` from now on."""
        if home.lock is not None:
            raise HeldError(f"{home.name!r} is held by {home.lock.host}: end that first", name=home.name)
        self._move(home, name)

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

    def _settle(self, id: str) -> None:
        """End the conflicts of a ULID, which has a name of its own now."""
        self._run("UPDATE conflicts SET decided_at = ? WHERE id = ? AND decided_at IS NULL", (self._now(), id))

    def _now(self) -> str:
        return iso(self._clock.wall())
