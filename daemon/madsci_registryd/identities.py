"""What each verb that changes an identity does; and the steps that all changing verbs share.

The rules are those of service.py, which adds the verbs of locks to this class.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from madsci_registry import protocol as p
from madsci_registry.errors import BusyError, ConflictError, InvalidError, NameTakenError, NotFoundError
from madsci_registry.names import check_metadata, check_name
from madsci_registry.registry_json import is_foreign_id
from madsci_registryd.admission import Admission
from madsci_registryd.clock import instant
from madsci_registryd.lab_tier import LabTier
from madsci_registryd.locks import Queues, Session
from madsci_registryd.merging import OTHER_IDS_MAX, other_ids
from madsci_registryd.old_programs import OldPrograms
from madsci_registryd.quotas import Quotas, Usage
from madsci_registryd.store import Lock, Row, Store
from madsci_registryd.transaction import Told, Tx
from madsci_registryd.views import SessionOf, component, held_by

TOKENS_A_TERM = 1 << 20
TERM_LIMIT = 1 << 33
"""Terms and epochs are below it, so that tokens are below 2^53 and survive JSON. As unix seconds: in the year 2242."""


class Identities:
    """The verbs of names and ULIDs. Belongs to the thread that owns the database."""

    def __init__(self, store: Store, queues: Queues, sessions: SessionOf, *, epoch: int, host: str) -> None:
        self.store = store
        self.queues = queues
        self.session = sessions
        self.epoch = epoch
        self.host = host
        self.old_programs = OldPrograms()
        self.admission: Admission
        self.quotas: Quotas
        self.names: Usage
        """How many names each user made."""
        self.lab = LabTier()

    def rename(self, tx: Tx, who: Session, r: p.Rename) -> dict[str, Any]:
        """Give a component another name that nobody has; a held one only by force, its holder keeps it and is told."""
        row = self.store.by_name(r.old)
        if row is None or not self.is_id_of(row, r.id):
            moved = self.store.by_id(r.id)
            if moved is not None and moved.name == r.new:
                return self._unchanged(moved)  # a repeat
        row = self._expect(r.old, r.id)
        if r.new == r.old:
            return self._unchanged(row)
        check_name(r.new, "new")
        taken = self.store.by_name(r.new)
        if taken is not None:
            raise NameTakenError(f"{r.new!r} is known already", name=r.new, id=taken.id)
        if row.old_lock is not None or (row.lock is not None and not r.force):
            raise held_by(self.session, self.host, r.old, row, who, waiting=self.queues.count(r.old))
        if row.lock is not None:
            holder = self.session(row.lock.owner.session)
            if holder is None or holder.uid != who.uid:
                self.need_admin(who, f"rename {r.old!r}, which another user holds")
        if not (self.old_programs.ready(r.old) and self.old_programs.ready(r.new)):
            raise BusyError(f"{r.old!r} and {r.new!r} cannot be kept from old programs just now; try again")
        self.store.rename(row.id, r.old, r.new, tx.now)
        moved = self._get(r.new)
        if row.lock is not None:
            self._carry_lock(tx, row, row.lock, moved)
        self._event(tx, who, "renamed", moved, old=r.old, forced=row.lock is not None)
        tx.durable = True
        tx.freed.append(r.old)
        return {"component": self._component(r.new), "changed": True}

    def _carry_lock(self, tx: Tx, old: Row, lock: Lock, new: Row) -> None:
        token = lock.fencing_token
        if token <= new.last_token:
            token = self._next_token(tx, new.last_token)
        self.store.move_lock_token(new.id, new.name, token)
        line = {
            "op": "renamed",
            "name": old.name,
            "to": new.name,
            "instance": lock.owner.instance,
            "old_token": lock.fencing_token,
            "fencing_token": token,
        }
        tx.told.append(Told(lock.owner.session, line))

    def renamed_away(self, session: str, holds: Sequence[p.Hold]) -> list[dict[str, Any]]:
        """Say of what a resuming session believes to hold what it holds under another name by now, or with a higher
        token."""
        lines = []
        for hold in holds:
            row = self.store.by_name(hold.name)
            lock = row.lock if row else None
            if lock is not None and lock.owner == (session, hold.instance) and lock.first_token is not None:
                if lock.first_token <= hold.fencing_token < lock.fencing_token:
                    line = {"name": hold.name, "to": hold.name, "instance": hold.instance}
                    lines.append(line | {"old_token": hold.fencing_token, "fencing_token": lock.fencing_token})
                continue
            before = self.store.name_row(hold.name)
            moved = self.store.by_id(before.renamed_id) if before and before.renamed_id else None
            if moved is None or moved.lock is None or moved.lock.owner != (session, hold.instance):
                continue
            now = self.store.by_name(hold.name)
            if now is not None and now.lock is not None and now.lock.owner == moved.lock.owner:
                continue  # it holds that name too, or again: the rename is an old story
            line = {"name": hold.name, "to": moved.name, "instance": hold.instance}
            lines.append(line | {"old_token": hold.fencing_token, "fencing_token": moved.lock.fencing_token})
        return lines

    def retire(self, tx: Tx, who: Session, r: p.Retire) -> dict[str, Any]:
        """Take a free name out of use, its ULID kept."""
        row = self._expect(r.name, r.id)
        if row.retired:
            return self._unchanged(row)
        if row.lock is not None or row.old_lock is not None:
            raise held_by(self.session, self.host, r.name, row, who, waiting=self.queues.count(r.name))
        limit = instant(r.unseen_since)
        if r.unseen_since is not None and limit is None:
            raise InvalidError("unseen_since: is no instant", field="unseen_since", reason="is no ISO 8601 instant")
        if limit is not None and row.last_seen >= limit:
            raise ConflictError(f"{r.name!r} was seen at {row.last_seen}", name=r.name, id=row.id)
        last_uid = self.store.last_uid(row.id)
        if last_uid not in (None, who.uid):
            self.need_admin(who, f"retire {r.name!r}, which uid {last_uid} held last")
        self._set_retired(tx, who, row, True)
        return {"component": self._component(r.name), "changed": True}

    def revive(self, tx: Tx, who: Session, r: p.Revive) -> dict[str, Any]:
        """Take a retired name back into use."""
        row = self._expect(r.name, r.id)
        if not row.retired:
            return self._unchanged(row)
        self._set_retired(tx, who, row, False)
        return {"component": self._component(r.name), "changed": True}

    def set_metadata(self, tx: Tx, who: Session, r: p.SetMetadata) -> dict[str, Any]:
        """Replace and drop keys of a component's metadata."""
        row = self._expect(r.name, r.id)
        check_metadata(r.set, "set")
        text = merged(row, r.set, r.unset)
        if text == row.metadata:
            return self._unchanged(row)
        self._set_metadata(tx, who, row, text)
        return {"component": self._component(r.name), "changed": True}

    # imports (the verb is in imports.py)

    def adopt(self, tx: Tx, who: Session | None, name: str, entry: dict[str, Any], **more: Any) -> None:
        """Make a component as an entry of registry.json has it; neither its name nor its id is known here. `who` is
        None where an old program wrote it; the event's `why` says `more`."""
        if who is not None:
            self.names.take(who.uid)
        text = json.dumps(entry.get("metadata") or {}, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        self.store.add_component(
            entry["id"],
            name,
            entry["component_type"],
            tx.now,
            text,
            created_at=instant(entry.get("created_at")),
            last_seen=instant(entry.get("last_seen")),
            workcell_id=entry.get("workcell_id"),
            uid=who.uid if who else None,
        )
        for other in other_ids(entry):
            if self.store.by_id(other) is None:
                self.store.add_other_id(entry["id"], other)
        row = self._get(name)
        why = {"component_type": row.component_type, "metadata": json.loads(text), "imported": True, **more}
        if is_foreign_id(entry):
            why["foreign_id"] = True
        self._event(tx, who, "created", row, **why)
        tx.durable = True

    # two ULIDs of one name

    def conflict(self, tx: Tx, row: Row, preferred: str) -> bool:
        """Take note that the lab has another ULID for a component's name: its holder is told and keeps the one that it
        has; where nobody holds it, that ULID is its own at once (True). A repeat changes nothing; nor does a ULID that
        is another component's here."""
        wanted = None if preferred == row.id else preferred
        if row.preferred_id == wanted or not self._may_be_id_of(row, preferred):
            return False
        self.store.set_preferred(row.id, wanted)
        self._event(tx, None, "conflict", row, preferred=preferred, by="lab")
        tx.durable = True
        if row.lock is None and row.old_lock is None:
            return self.prefer(tx, self._get(row.name))
        if row.lock is not None and preferred != row.id:
            tx.told.append(Told(row.lock.owner.session, _conflict_line(row, row.lock, preferred)))
        return False

    def conflicts_of(self, session: str) -> list[dict[str, Any]]:
        """Return what a session is told of the names that it holds under a ULID that the lab does not prefer."""
        rows = [self._get(name) for name in self.store.preferred_of(session)]
        return [_conflict_line(row, row.lock, row.preferred_id) for row in rows if row.lock and row.preferred_id]

    def prefer(self, tx: Tx, row: Row) -> bool:
        """Give a component the ULID that the lab prefers for it; the one that it had stays known. False: there is none,
        or it is another component's here; nothing changed."""
        new = row.preferred_id
        if new is None or not self._may_be_id_of(row, new):
            return False
        self.store.change_id(row.id, new)
        holder = self.session(row.lock.owner.session) if row.lock else None
        if holder is not None and row.id in holder.shares:
            holder.shares[new] = holder.shares.pop(row.id)
        self._event(tx, None, "preferred", row._replace(id=new), was=row.id, by="lab")
        tx.durable = True
        return True

    def _may_be_id_of(self, row: Row, id: str) -> bool:
        other = self.store.by_id(id)
        if other is None:
            return len(self.store.other_ids(row.id)) < OTHER_IDS_MAX
        return other.id == row.id

    def retire_all_but(self, tx: Tx, who: Session, names: set[str], *, dry_run: bool) -> list[tuple[str, str, str]]:
        """Retire what is in use and not among `names`; a held name is a conflict and stays."""
        report = []
        for row in self.store.components(limit=-1, retired=False):
            if row.name in names:
                continue
            if row.lock is not None or row.old_lock is not None:
                report.append((row.name, "conflict", "not in the file, but held: not retired"))
                continue
            if not dry_run:
                self._set_retired(tx, who, row, True)
            report.append((row.name, "retired", ""))
        return report

    # shared steps

    def need_admin(self, who: Session, what: str) -> None:
        """Let administrators pass; `what` completes "you may not". Raises PermissionDeniedError."""
        if not who.is_admin:
            raise self.admission.admin_refusal(who.uid, what)

    def _set_retired(self, tx: Tx, who: Session, row: Row, retired: bool) -> None:
        self.store.set_retired(row.id, retired, tx.now)
        self._event(tx, who, "retired" if retired else "revived", row)
        tx.durable = True

    def _set_metadata(self, tx: Tx, who: Session, row: Row, text: str) -> None:
        self.store.set_metadata(row.id, text, tx.now)
        self._event(tx, who, "metadata", row, metadata=json.loads(text))
        tx.durable = True

    def known(self, name: str) -> Row:
        """Return the row of a name. Raises: NotFoundError."""
        return self._get(name)

    def check_new(self, name: str) -> None:
        """Refuse what may not be a component's new name. Raises: InvalidError, TooLargeError."""
        check_name(name, "new")

    def _get(self, name: str) -> Row:
        row = self.store.by_name(name)
        if row is None:
            raise self.not_found(name)
        return row

    def _expect(self, name: str, id: str) -> Row:
        row = self._get(name)
        if not self.is_id_of(row, id):
            raise ConflictError(f"{name!r} is {row.id} now, not {id}", name=name, id=row.id)
        return row

    def not_found(self, name: str) -> NotFoundError:
        """Say that no component has this name, and where the one went that had it."""
        before = self.store.name_row(name)
        if before is not None and before.renamed_id is not None:
            message = f"{name!r} was renamed to {before.renamed_to!r}"
            return NotFoundError(message, name=name, renamed_to=before.renamed_to, id=before.renamed_id)
        return NotFoundError(f"no component is called {name!r}", name=name)

    def is_id_of(self, row: Row, id: str) -> bool:
        """Tell whether a ULID is that component's, preferred or not."""
        return id == row.id or id in self.store.other_ids(row.id)

    def show(self, row: Row) -> dict[str, Any]:
        """Return a component as clients see it."""
        others, lab = self.store.other_ids(row.id), self.lab.standing(row)
        return component(self.session, self.host, row, self.queues.count(row.name), other_ids=others, lab=lab)

    def _component(self, name: str) -> dict[str, Any]:
        return self.show(self._get(name))

    def _unchanged(self, row: Row) -> dict[str, Any]:
        return {"component": self._component(row.name), "changed": False}

    def _store_session(self, tx: Tx, who: Session) -> None:
        if not who.stored and who not in tx.stored:
            self.store.add_session(who)
            tx.stored.append(who)

    def _event(self, tx: Tx, who: Session | None, kind: str, row: Row, **why: Any) -> None:
        if who is None:
            self.note(tx, kind, row.name, row.id, **why)
            return
        self.store.add_event(kind, tx.now, name=row.name, id=row.id, uid=who.uid, pid=who.pid, session=who.id, why=why)

    def note(self, tx: Tx, kind: str, name: str | None, id: str | None, **why: Any) -> None:
        """Record what no client did: an old program, by registry.json."""
        self.store.add_event(kind, tx.now, name=name, id=id, why=why)

    def _next_token(self, tx: Tx, last: int, lab_term: int | None = None) -> int:
        term = self.epoch if lab_term is None else lab_term
        token = max(last + 1, term * TOKENS_A_TERM)
        # The next start is above its own epoch, and above what it finds: the first token of any other term has to be
        # found by it, also after a power loss. The later ones of a lab's term need not: another boot gets another one.
        is_later = lab_term is not None and token % TOKENS_A_TERM > 0
        if token // TOKENS_A_TERM != self.epoch and not is_later:
            tx.durable = True
        return token


def _conflict_line(row: Row, lock: Lock, preferred: str) -> dict[str, Any]:
    return {
        "op": "conflict",
        "name": row.name,
        "instance": lock.owner.instance,
        "fencing_token": lock.fencing_token,
        "id": row.id,
        "preferred": preferred,
    }


def merged(row: Row | None, add: dict[str, Any], drop: tuple[str, ...] | list[str]) -> str:
    """Return a component's metadata with keys replaced and dropped, as JSON text; checked if it differs."""
    check_metadata(add)
    old = json.loads(row.metadata) if row else {}
    new = {k: v for k, v in (old | add).items() if k not in drop}
    return row.metadata if row is not None and new == old else check_metadata(new)
