"""What hosts say of components, taken in by a transaction on etcd. What is to be done is decided in rules.py."""

from __future__ import annotations

from dataclasses import replace

from madsci_registry.errors import HeldError, NotFoundError
from madsci_registry_lab import etcd_rows as rows
from madsci_registry_lab import rules
from madsci_registry_lab.etcd_locks import Locks
from madsci_registry_lab.etcd_names import Names
from madsci_registry_lab.etcd_rows import dumps, loads
from madsci_registry_lab.etcd_transaction import Transaction
from madsci_registry_lab.records import ConflictRow, IdRow, NameRow
from madsci_registry_lab.store import Change, Entry, Reason, Resolved, State, Want


class Identities:
    """Components as one transaction sees and leaves them."""

    def __init__(self, tx: Transaction) -> None:
        self._tx = tx
        self.names = Names(tx)
        self.locks = Locks(tx, self.names)

    def entry(self, row: NameRow) -> Entry:
        """Return a name's entry, with its lock."""
        return row.entry(self.locks.of_name(row.name))

    def resolve(self, host: str, op: str, state: State, session: str | None, want: Want | None) -> Resolved:
        """See LabStore."""
        names = self.names
        locking = (rows.session_key(session), rows.lock_key(state.name), rows.META) if session and want else ()
        self._tx.fetch(f"n/{state.name}", f"v/{state.name}", rows.id_key(state.id), *locking)
        row = names.taken(state.name)
        is_known = row is None and names.id_row(state.id) is not None
        after = rules.resolved(state, host, row.entry(None) if row else None, is_known=is_known)
        if row is None:
            self._create(state, host, op)
        elif after is not None:
            self._put(after, "revived")
        lock = self.locks.acquire(host, session, state.name, want) if session and want else None
        entry = self.entry(names.row(state.name))
        made = names.id_row(entry.id)
        return Resolved(entry=entry, is_new=made is not None and (made.host, made.op) == (host, op), lock=lock)

    def prefetch(self, changes: list[Change]) -> None:
        """Read what most of these changes need, in a few requests."""
        given = [change.state for change in changes]
        wanted = [key for s in given for key in (rows.id_key(s.id), f"n/{s.name}")]
        self._tx.fetch(*wanted)
        self._tx.fetch(*(f"v/{s.name}" for s in given if self._tx.peek(f"n/{s.name}") is None))
        known = [text for s in given if (text := self._tx.peek(rows.id_key(s.id)))]
        self._tx.fetch(*(f"n/{loads(IdRow, text).name}" for text in known))

    def take_in(self, given: State, host: str, *, sync: bool) -> rules.Verdict:
        """Do what a host's word asks for; return what that was."""
        home, there = self.names.of_id(given.id), self.names.taken(given.name)
        by_id = (self.entry(home) if home.name != given.name else home.entry(None)) if home else None
        verdict = rules.judge(given, host, by_id, there.entry(None) if there else None, sync=sync)
        given = rules.as_of(given, self._tx.now)
        if verdict.do == "create":
            self._create(given, host, None)
        elif verdict.do in ("alias", "conflict"):
            if verdict.do == "alias" and there:
                self.names.put_id(given.id, IdRow(name=given.name, host=host))
                self.names.put(replace(there, other_ids=(*there.other_ids, given.id)))
            assert verdict.reason and verdict.reason != "newer"
            self._note_conflict(given, host, verdict.reason)
        elif verdict.do == "update" and by_id:
            after = rules.updated(by_id, given, host)
            self._put(after, rules.kind_of(by_id, after))
        elif verdict.do == "rename" and home:
            self._rename(home, given, host)
        elif verdict.do == "split" and home:
            self._split(home, given, host)
        return verdict

    def merge(self, host: str, name: str, prefer: str) -> Entry:
        """See LabStore."""
        row = self.names.row(name)
        told = [*self._tx.under(rows.conflict_key(name, ""))]
        ids = [*dict.fromkeys([*([row.id] if row.id else []), *told])]
        self._tx.trust(*(rows.id_key(id) for id in row.ids))  # they change with the name's row alone
        if not told or prefer not in ids:
            raise NotFoundError(f"{prefer} has no part in a conflict of {name!r}", name=name, id=prefer)
        best = self._said_of(name, prefer)
        homes = {home.name: home for home in map(self.names.of_id, ids) if home is not None and home.name != name}
        for home in homes.values():
            self._join(home, name)
        if row.id is not None and row.id != prefer:
            self._note_conflict(rules.state_of(row.entry(None)), row.host, "two_ids")
        self._prefer(name, prefer)
        self._put(replace(best, name=name, id=prefer, changed_at=self._tx.now, host=host), "merged")
        for id in self._tx.under(rows.conflict_key(name, "")):
            self._decide(name, id)
        return self.entry(self.names.row(name))

    def _said_of(self, name: str, id: str) -> Entry:
        """Return what is known of a ULID that has part in a conflict of `name`: its entry, or what its host said."""
        home = self.names.of_id(id)
        if home is not None and home.id == id:
            return home.entry(None)
        said = self._conflict(name, id)
        assert said
        return rules.fresh(said.state, said.host)

    def _join(self, home: NameRow, name: str) -> None:
        """Let a component lose its name, and be the one called `name` from now on."""
        lock = self.locks.of_name(home.name)
        if lock is not None:
            raise HeldError(f"{home.name!r} is held by {lock.host}: end that first", name=home.name)
        to = self.names.row(name)
        moved = home.ids if to.id is not None else home.other_ids
        if to.id is None:  # nobody has the name: this component takes it whole
            to = to.saying(replace(home.entry(None), name=name))
        self.names.put(replace(to, other_ids=(*to.other_ids, *moved)))
        self._leave(home, name)

    def _leave(self, home: NameRow, name: str) -> None:
        """Vacate a name; its component's ULIDs, and what is undecided about them, are under another one from now on."""
        for id, found in self._undecided(home.name, "two_ids"):
            self._forget(home.name, id)
            self._record(name, id, found)
        self.names.put(self.names.row(home.name).vacated())
        self._tx.trust(*(rows.id_key(id) for id in home.ids))  # they change with the name's row alone
        for id in home.ids:
            known = self.names.id_row(id)
            assert known
            self.names.put_id(id, replace(known, name=name))

    def _prefer(self, name: str, id: str) -> None:
        """Make a ULID of a component its preferred one."""
        row = self.names.row(name)
        others = tuple(other for other in row.ids if other != id)
        self.names.put(replace(row, id=id, other_ids=others))
        if self.names.id_row(id) is None:
            self.names.put_id(id, IdRow(name=name, host=row.host))

    def _create(self, state: State, host: str, op: str | None) -> None:
        self.names.put_id(state.id, IdRow(name=state.name, host=host, op=op))
        self._put(rules.fresh(state, host), "created")

    def _rename(self, home: NameRow, given: State, host: str) -> None:
        """Move a component, its ULIDs and its lock to a name that has none. Who waits for the old one gets it."""
        entry = replace(home.entry(None), name=given.name)
        self.names.put(replace(self.names.row(given.name).saying(entry), other_ids=home.other_ids))
        self.locks.move(home, given.name)
        self._leave(home, given.name)
        self._put(rules.updated(entry, given, host), "renamed", was=home.name)
        self._settle(given.id)
        for _, found in self._undecided(home.name, "name_taken"):
            if not self._tx.is_full:  # else it stays a conflict, until its host says it again
                self.take_in(found.state, found.host, sync=True)

    def _split(self, home: NameRow, given: State, host: str) -> None:
        """Let a ULID that is not preferred leave for a name of its own."""
        self.names.put(replace(home, other_ids=tuple(id for id in home.other_ids if id != given.id)))
        known = self.names.id_row(given.id)
        assert known
        self.names.put_id(given.id, replace(known, name=given.name))
        self._put(rules.fresh(given, host), "renamed", was=home.name)
        self._settle(given.id)

    def _put(self, entry: Entry, kind: str, **why: object) -> None:
        """Write an entry over its name's row, with its event."""
        self.names.put(self.names.row(entry.name).saying(entry))
        self.names.tell(kind, entry.name, entry.id, entry.host, **why)

    def _conflict(self, name: str, id: str) -> ConflictRow | None:
        text = self._tx.under(rows.conflict_key(name, "")).get(id)
        return loads(ConflictRow, text) if text else None

    def _note_conflict(self, given: State, host: str, reason: Reason) -> None:
        before = self._conflict(given.name, given.id)
        if before is not None and before.reason != reason:
            before = None
        decided = before is not None and before.decided_at is not None
        if reason == "wrong_type" and before and decided and before.state.component_type == given.component_type:
            return  # its host says so with each sync
        row = ConflictRow(reason=reason, host=host, at=self._tx.now, state=given)
        self._record(given.name, given.id, row)
        if before is None or decided:  # it is no open one already
            self.names.tell("conflict", given.name, given.id, host, reason=reason)

    def _undecided(self, name: str, reason: Reason) -> list[tuple[str, ConflictRow]]:
        """Return the undecided conflicts of that kind under a name, by ULID."""
        found = [(id, loads(ConflictRow, text)) for id, text in self._tx.under(rows.conflict_key(name, "")).items()]
        return [(id, row) for id, row in found if row.reason == reason and row.decided_at is None]

    def _record(self, name: str, id: str, row: ConflictRow) -> None:
        """Write a conflict that nobody has decided."""
        self._tx.put(rows.conflict_key(name, id), dumps(row))
        for key in rows.open_keys(name, id):
            self._tx.put(key, "")

    def _forget(self, name: str, id: str) -> None:
        for key in (rows.conflict_key(name, id), *rows.open_keys(name, id)):
            self._tx.delete(key)

    def _settle(self, id: str) -> None:
        """End the conflicts of a ULID, which has a name of its own now."""
        for name in self._tx.under(f"q/{id}\0"):
            self._decide(name, id)

    def _decide(self, name: str, id: str) -> None:
        """Note that a conflict is decided."""
        found = self._conflict(name, id)
        if found is not None and found.decided_at is None:
            self._tx.put(rows.conflict_key(name, id), dumps(replace(found, decided_at=self._tx.now)))
            for key in rows.open_keys(name, id):
                self._tx.delete(key)
