"""Rows to values and back; no policy. Used by the one thread that owns the connection, inside its transactions."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import apsw

from madsci_registry.types import OldLock, Process
from madsci_registryd import queries as q
from madsci_registryd.locks import Identity, Owner, Presence, Session

LOCK_EVENTS = frozenset({"granted", "released", "ended", "broken", "refused"})
"""Kept for a while only; none of them changes an identity."""
HISTORY_IDS = 101
"""Of so many ULIDs of a component the events are looked for: as many as it can have."""


class Lock(NamedTuple):
    """A lock as the database has it."""

    owner: Owner
    fencing_token: int
    acquired_at: str
    seq: int
    lab_term: int | None = None
    """The lab's term that it was confirmed with."""
    first_token: int | None = None
    """The token that it was granted with, where a confirmation has raised it since."""

    def has_token(self, token: int) -> bool:
        """Tell whether it has, or had, this token."""
        first = self.fencing_token if self.first_token is None else self.first_token
        return first <= token <= self.fencing_token


class Row(NamedTuple):
    """A component with its lock."""

    id: str
    name: str
    component_type: str
    retired: bool
    created_at: str
    last_seen: str
    metadata: str
    created_by: tuple[str | None, int | None]
    last_token: int
    workcell_id: str | None
    lock: Lock | None
    old_lock: OldLock | None
    """An old program holds it, by registry.json."""
    changed_at: str = ""
    """When it was made, renamed, retired, revived, or its metadata changed."""
    preferred_id: str | None = None
    """The ULID that the lab has for its name, and that it takes over when it may."""


class NameRow(NamedTuple):
    """A name's history: its highest token and the component that left it by rename, with that one's present name."""

    last_token: int
    renamed_id: str | None
    renamed_to: str | None


class Store:
    """The tables, as methods. One transaction at a time, begun and ended by the caller."""

    def __init__(self, db: apsw.Connection) -> None:
        self.db = db
        self._run = db.execute
        self._revision: int = self._one(q.LAST_REVISION)
        self.identity_revision = self._revision
        """Moves with changes of identities, not with those of locks."""
        self.touched: set[str] = set()
        """Ids of components whose identity changed, for who exports it; a change that was rolled back may be in it."""
        self.seen: set[str] = set()
        """The same for locks and `last_seen`."""
        self.is_lab_followed = False
        """Whether somebody takes what stands in `freed` and `renames`."""
        self.freed: set[str] = set()
        """Ids of components whose lock was dropped, for who holds them in the lab; likewise."""
        self.renames: list[tuple[str, str]] = []
        """Old and new names, in their order; likewise."""
        self._count: int | None = None
        """How many events there are, counted at the first trim."""
        self._keeps_counts = False

    def _one(self, sql: str, args: tuple[Any, ...] = ()) -> Any:
        """Return the only column of the first row, None where there is no row."""
        row = self._run(sql, args).fetchone()
        return row[0] if row else None

    # components and names

    def by_name(self, name: str) -> Row | None:
        row = self._run(q.COMPONENT_BY_NAME, (name,)).fetchone()
        return _row(row) if row else None

    def by_id(self, id: str) -> Row | None:
        """Return the component that has a ULID, or had it before the lab preferred another one."""
        found = self._run(q.COMPONENT_BY_ID, (id,)).fetchone()
        row = found or self._run(q.COMPONENT_BY_OTHER_ID, (id,)).fetchone()
        return _row(row) if row else None

    def other_ids(self, id: str) -> list[str]:
        """List the ULIDs that are the component `id` as well."""
        return [other for (other,) in self._run(q.OTHER_IDS, (id,))]

    def all_other_ids(self) -> dict[str, list[str]]:
        """Return the same for all components that have any."""
        found: dict[str, list[str]] = {}
        for id, other in self._run(q.ALL_OTHER_IDS):
            found.setdefault(id, []).append(other)
        return found

    def add_other_id(self, id: str, other: str) -> None:
        """Know a ULID that is no component's as the component `id`."""
        self._run(q.ADD_OTHER_ID, (other, id))
        self.touched.add(id)

    def id_of(self, name: str) -> str | None:
        id: str | None = self._one(q.ID_BY_NAME, (name,))
        return id

    def components(
        self,
        *,
        cursor: str = "",
        until: str | None = None,
        limit: int,
        pattern: str | None = None,
        component_type: str | None = None,
        retired: bool | None = None,
        held: bool | None = None,
    ) -> list[Row]:
        """Return up to `limit` components in the order of their names, those after `cursor` up to and with `until`."""
        given = {
            "cursor": cursor,
            "until": b"" if until is None else until,  # to SQLite every blob is above every text
            "limit": limit,
            "pattern": pattern,
            "component_type": component_type,
            "retired": retired,
            "held": held,
        }
        return [_row(r) for r in self._run(q.LIST, given)]

    def name_further_on(self, cursor: str, count: int) -> str | None:
        """Return the name that is the `count`th after `cursor`, None where there are fewer."""
        name: str | None = self._one(q.NAME_FURTHER_ON, (cursor, count - 1))
        return name

    def name_row(self, name: str) -> NameRow | None:
        row = self._run(q.NAME_ROW, (name,)).fetchone()
        return NameRow(*row) if row else None

    def add_component(
        self,
        id: str,
        name: str,
        component_type: str,
        now: str,
        metadata: str,
        *,
        created_by: tuple[str | None, int | None] = (None, None),
        created_at: str | None = None,
        last_seen: str | None = None,
        changed_at: str | None = None,
        retired: bool = False,
        workcell_id: str | None = None,
        uid: int | None = None,
    ) -> None:
        self._run(q.ADD_NAME, (name,))
        row = (id, name, component_type, retired, created_at or now, last_seen or now, metadata, workcell_id)
        self._run(q.ADD_COMPONENT, (*row, changed_at or now, *created_by, uid))
        self.touched.add(id)

    def set_metadata(self, id: str, metadata: str, now: str) -> None:
        self._run(q.SET_METADATA, (metadata, now, id))
        self.touched.add(id)

    def set_workcell(self, id: str, workcell_id: str) -> None:
        self._run(q.SET_WORKCELL, (workcell_id, id))
        self.touched.add(id)

    def set_retired(self, id: str, retired: bool, now: str) -> None:
        self._run(q.SET_RETIRED, (retired, now, id))
        self.touched.add(id)

    def set_last_seen(self, id: str, now: str) -> None:
        self._run(q.SET_LAST_SEEN, (now, id))
        self.seen.add(id)

    def rename(self, id: str, old: str, new: str, now: str) -> None:
        """Move a component to a name that no component has; the old name remembers where it went."""
        self._run(q.ADD_NAME, (new,))
        self._run(q.SET_NAME, (new, now, id))
        self._run(q.SET_RENAMED, (id, old))
        self.touched.add(id)
        if self.is_lab_followed:
            self.renames.append((old, new))

    def set_preferred(self, id: str, preferred: str | None) -> None:
        """Note which ULID the lab has for the component `id`; None: that one."""
        self._run(q.SET_PREFERRED, (preferred, id))
        self.touched.add(id)

    def preferred_of(self, session: str) -> list[str]:
        """List the names that a session holds and for which the lab prefers another ULID."""
        return [name for (name,) in self._run(q.PREFERRED_OF_SESSION, (session,))]

    def preferred_count(self) -> int:
        """Return for how many components the lab prefers another ULID."""
        return int(self._one(q.PREFERRED_COUNT))

    def change_id(self, old: str, new: str) -> None:
        """Give a component a ULID that is no other component's; the one that it had stays known as the same one."""
        self._run(q.CHANGE_ID, {"old": old, "new": new})
        self.touched |= {old, new}

    # locks

    def add_lock(
        self, row: Row, owner: Owner, token: int, now: str, seq: int, uid: int, lab_term: int | None = None
    ) -> None:
        self._run(q.ADD_LOCK, (row.id, owner.session, owner.instance, token, now, seq, lab_term))
        self._run(q.RAISE_TOKEN, (token, row.name))
        self._run(q.SET_LAST_HOLDER, (now, uid, row.id))
        self.seen.add(row.id)

    def move_lock_token(self, id: str, name: str, token: int) -> None:
        """Give the lock of component `id`, now called `name`, this token."""
        self._run(q.SET_LOCK_TOKEN, (token, id))
        self._run(q.RAISE_TOKEN, (token, name))

    def confirm_lock(self, id: str, name: str, token: int, lab_term: int) -> None:
        """Note that the lab has confirmed the lock of component `id`, called `name`; its token grows to this one."""
        self._run(q.CONFIRM_LOCK, {"token": token, "lab_term": lab_term, "id": id})
        self._run(q.RAISE_TOKEN, (token, name))

    def raise_token(self, name: str, token: int) -> None:
        """Let the next fencing token of a name be above this one."""
        self._run(q.RAISE_TOKEN, (token, name))

    def drop_lock(self, id: str, now: str) -> None:
        self._run(q.DROP_LOCK, (id,))
        self._run(q.SET_LAST_SEEN, (now, id))
        self.seen.add(id)
        if self.is_lab_followed:
            self.freed.add(id)

    def lab_locks(self) -> list[tuple[str, str, int, int | None]]:
        """List (name, id, fencing_token, lab_term) of all that new programs hold."""
        return [(n, i, t, term) for n, i, t, term in self._run(q.LAB_LOCKS)]

    def lock_count(self) -> int:
        """Return how many names new programs hold."""
        return int(self._one(q.LOCK_COUNT))

    def locked_names(self) -> list[str]:
        return [name for (name,) in self._run(q.LOCKED_NAMES)]

    def set_old_lock(self, id: str, lock: OldLock | None) -> None:
        """Note which old program holds a component; None: none does any more."""
        if lock is None:
            self._run(q.DROP_OLD_LOCK, (id,))
        else:
            self._run(q.ADD_OLD_LOCK, (id, *vars(lock).values()))

    def locks_of(self, session: str) -> list[tuple[str, str, int]]:
        """List (name, instance, fencing_token) of what a session holds."""
        return [(n, i, t) for n, i, t in self._run(q.LOCKS_OF_SESSION, (session,))]

    def locked_by_seq(self, session: str, seq: int) -> list[str]:
        """List the names that request `seq` of a session was granted and still holds."""
        return [name for (name,) in self._run(q.LOCKED_NAME_BY_SEQ, (session, seq))]

    def last_uid(self, id: str) -> int | None:
        """Return who made or held a component last; None: nobody knows."""
        uid: int | None = self._one(q.LAST_UID, (id,))
        return uid

    def names_of_uid(self, uid: int) -> int:
        return int(self._one(q.NAMES_OF_UID, (uid,)))

    def locks_of_uid(self, uid: int) -> int:
        return int(self._one(q.LOCKS_OF_UID, (uid,)))

    def held_count(self, session: str) -> int:
        self._keep_counts()
        return self._one(q.HELD_BY_SESSION, (session,)) or 0

    # sessions

    def add_session(self, s: Session) -> None:
        row = (s.id, s.token_hash, s.process.uid, s.process.gid, *s.identity, s.client, s.started_at)
        self._run(q.ADD_SESSION, row)

    def set_identity(self, id: str, identity: Identity) -> None:
        self._run(q.SET_IDENTITY, (*identity, id))

    def drop_session(self, id: str) -> None:
        self._run(q.DROP_SESSION, (id,))

    def sessions(self) -> list[Session]:
        """Return the sessions that an earlier daemon left: detached, nothing known of their processes yet."""
        return [
            Session(
                id=id,
                token_hash=token_hash,
                process=Process(pid=identity[0], uid=uid, gid=gid, proof="connection"),
                identity=Identity(*identity),
                client=client,
                started_at=started_at,
                presence=Presence.DETACHED,
                stored=True,
            )
            for id, token_hash, uid, gid, *identity, client, started_at in self._run(q.SESSIONS)
        ]

    # events

    @property
    def revision(self) -> int:
        """The revision of the last event written (or tried: a rollback leaves a gap)."""
        return self._revision

    def add_event(
        self,
        kind: str,
        now: str,
        *,
        name: str | None = None,
        id: str | None = None,
        uid: int | None = None,
        pid: int | None = None,
        session: str | None = None,
        why: dict[str, Any] | None = None,
    ) -> None:
        self._revision += 1
        if kind not in LOCK_EVENTS:
            self.identity_revision = self._revision
        if self._count is not None:
            self._count += 1
        text = json.dumps(why, ensure_ascii=False) if why else "{}"
        self._run(q.ADD_EVENT, (self._revision, now, kind, name, id, uid, pid, session, text))

    def raise_revision(self, revision: int) -> None:
        """Let the next event's revision be above `revision`."""
        self._revision = max(self._revision, revision)

    def events(self, after: int, limit: int) -> list[dict[str, Any]]:
        return [_event(r) for r in self._run(q.EVENTS, (after, limit))]

    def events_of(self, name: str, id: str | None, after: int, limit: int) -> list[dict[str, Any]]:
        """Return events that name the name, or the component (under whatever name and ULID)."""
        ids = [id, *self.other_ids(id)][:HISTORY_IDS] if id is not None else [None]
        return [_event(r) for r in self._run(q.events_of(len(ids)), (name, after, limit, *ids))]

    def changed_after(self, revision: int) -> set[str]:
        """Return the ids of components whose identity changed after `revision`."""
        return {id for (id,) in self._run(q.CHANGED_AFTER, (revision,))}

    def trim_lock_events(self, before: str, keep: int, limit: int) -> bool:
        """Look at the next `limit` events from where the last trim ended: delete the lock events among them that are
        older than `before`, or too many where there are more than `keep` events; True: there is more to do."""
        if self._count is None:
            self._count = int(self._one(q.COUNT_EVENTS))
        start = self.meta("compacted") or 0
        oldest = list(self._run(q.OLDEST_EVENTS, (start, limit)))
        surplus = max(self._count - keep, 0)
        passed = [revision for n, (revision, at) in enumerate(oldest) if at < before or n < surplus]
        if not passed:
            return False
        self._run(q.TRIM_LOCK_EVENTS, (start, passed[-1]))
        self._count -= self.db.changes()
        self.set_meta("compacted", passed[-1])
        return len(passed) == limit

    # the rest

    def meta(self, key: str) -> Any:
        return self._one(q.GET_META, (key,))

    def set_meta(self, key: str, value: int | str) -> None:
        self._run(q.SET_META, (key, value))

    def drop_meta(self, key: str) -> None:
        self._run(q.DROP_META, (key,))

    def highest_token(self) -> int:
        token: int = self._one(q.HIGHEST_TOKEN)
        return token

    def counts(self) -> tuple[int, int, int]:
        """Return how many names are in use, retired, and locked."""
        self._keep_counts()
        names, retired, held = self._run(q.COUNTS).fetchone() or (0, 0, 0)
        return names, retired, held

    def _keep_counts(self) -> None:
        """Count all that there is, once: 200,000 names take 30 ms. From then on triggers do. Not in a transaction,
        which could be rolled back."""
        if not self._keeps_counts:
            self._run(q.KEEP_COUNTS)
            self._keeps_counts = True


_OLD_LOCK = tuple(OldLock.__dataclass_fields__)


def _row(r: Any) -> Row:
    lock = Lock(Owner(r[11], r[12]), r[13], r[14], r[15], *r[24:26]) if r[11] is not None else None
    old = OldLock(**dict(zip(_OLD_LOCK, r[16:22], strict=True))) if r[16] is not None else None
    return Row(r[0], r[1], r[2], bool(r[3]), r[4], r[5], r[6], (r[7], r[8]), r[9], r[10], lock, old, r[22], r[23])


def _event(r: Any) -> dict[str, Any]:
    keys = ("revision", "at", "kind", "name", "id", "uid", "pid", "session")
    return {**dict(zip(keys, r[:8], strict=True)), "why": json.loads(r[8])}
