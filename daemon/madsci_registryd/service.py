"""What each verb that changes something does: one method a verb, one step of a transaction.

Rules
- A verb checks everything before it writes, and raises a RegistryError where it refuses: then it changed nothing.
- It writes through the store and notes in the Tx what others must be told; it sends nothing and changes no queue.
- Every change appends its event in the same transaction.
- An identity is never deleted and an id never moves to another component; a name's tokens only grow.
- A repeat is a no-op: writes name what they expect (id, fencing_token), `is_new` compares the creating request.

Theory of operation
Truth is in the database, read inside the transaction. Who waits is in the queues, which stand still during a
transaction; claims that the transaction adds are in `tx.waiting`. Fencing tokens are `epoch * 2^20 + n`: the first
token of a name in an epoch is above all that an earlier epoch gave, and where n overflows the name runs ahead of the
epoch by itself, which is why that one grant is made durable.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

from madsci_registry import protocol as p
from madsci_registry.errors import (
    BusyError,
    InvalidError,
    RegistryError,
    RegistryTimeoutError,
    WaitingError,
    WrongTypeError,
)
from madsci_registry.names import check_metadata, check_name
from madsci_registryd.clock import instant
from madsci_registryd.identities import TOKENS_A_TERM, merged
from madsci_registryd.lab_rulings import LabRulings
from madsci_registryd.locks import Claim, Identity, Owner, Queues, Session, Verdict, decide, next_claim
from madsci_registryd.quotas import Usage
from madsci_registryd.store import Lock, Row, Store
from madsci_registryd.transaction import Told, Tx
from madsci_registryd.views import held_by, new_holder


class Parked:
    """The answer of a request that waits: there is none yet."""


PARKED = Parked()
Reply = dict[str, Any] | Parked


class Service(LabRulings):
    """The verbs of locks, on top of those of identities. Belongs to the thread that owns the database."""

    def __init__(
        self,
        store: Store,
        queues: Queues,
        sessions: Callable[[str], Session | None],
        new_id: Callable[[], str],
        *,
        epoch: int,
        host: str,
    ) -> None:
        super().__init__(store, queues, sessions, epoch=epoch, host=host)
        self.no_grants_before = 0.0
        """Monotonic; after an I/O error or a restore holders get time to say what they hold."""
        self.why_no_grants = ""
        self.locks: Usage
        """How many locks each user has."""
        self.waiting: Usage
        """How many requests of each user wait for a name."""
        self._new_id = new_id

    # resolve

    def resolve(self, tx: Tx, who: Session, r: p.Resolve) -> Reply:
        """Answer the ULID of a name, made if new, with its lock if wanted."""
        if r.seq in who.withdrawn:
            raise RegistryTimeoutError("the request was withdrawn before it was run; nothing changed")
        row = self.check(r)
        if row is None:
            self._check_with_lab(r)
        if not r.acquire_lock:
            return self._identity(tx, who, r, row)[1]
        owner = Owner(who.id, r.instance)
        claim = self.queues.find(who.id, r.seq) or next((c for c in tx.waiting if c.key == (who.id, r.seq)), None)
        if claim is not None and (claim.name, claim.owner) != (r.name, owner):
            raise InvalidError("seq: belongs to another request that waits", field="seq", reason="used already")
        holder = row.lock.owner if row and row.lock else None
        if claim is not None:
            return self._renew(tx, who, r, claim, row)
        ahead = len(self._claims(tx, r.name))
        may_wait = r.wait_s > 0 or r.renew
        verdict = decide(holder, owner, ahead=ahead, may_wait=may_wait)
        if verdict is Verdict.GRANT:
            verdict = self._now_or_later(tx, r.name, row, may_wait=may_wait)
        if verdict is Verdict.HELD:
            raise self._held(r.name, row, who, waiting=ahead)
        if verdict is not Verdict.QUEUE:
            return self._take(tx, who, r, row)
        self.waiting.take(who.uid)
        tx.waiting.append(Claim(r.name, owner, r.seq, r, tx.monotonic + r.wait_s))
        return PARKED

    def _now_or_later(self, tx: Tx, name: str, row: Row | None, *, may_wait: bool) -> Verdict:
        """Judge a name that no client holds: it may not be anybody's yet, or an old program's."""
        if tx.monotonic < self.no_grants_before:
            if not may_wait:
                raise BusyError(f"{self.why_no_grants}: holders have 10 s to come back; try again")
            return Verdict.QUEUE
        if (row is None or row.old_lock is None) and not self.lab.ready(name):
            return self._later_by_lab(name, may_wait=may_wait)
        if self.old_programs.ready(name):
            return Verdict.GRANT
        self.old_programs.want(name)
        if not may_wait and (row is None or row.old_lock is None):
            raise BusyError(f"{name!r} cannot be kept from old programs just now; try again")
        return Verdict.QUEUE if may_wait else Verdict.HELD

    def _held(self, name: str, row: Row | None, who: Session, **facts: Any) -> RegistryError:
        """Say who holds a name; where nobody does here, by what the lab said."""
        said = self.lab.refusal(name) if row is None or (row.lock is None and row.old_lock is None) else None
        return said or held_by(self.session, self.host, name, row, who, **facts)

    def _renew(self, tx: Tx, who: Session, r: p.Resolve, claim: Claim, row: Row | None) -> Reply:
        """Keep a waiter's place for another request of its chain."""
        claim.request, claim.answer_at = r, tx.monotonic + r.wait_s
        lock = row.lock if row else None
        if lock is not None and lock.owner == claim.owner:
            tx.settled.append((claim, self._take(tx, who, r, row)))
        elif lock is None:
            tx.freed.append(r.name)  # it may have been passed over while nobody could tell it
        return PARKED

    def resolve_many(self, tx: Tx, who: Session, r: p.ResolveMany) -> Reply:
        """Resolve each item by itself, without waiting; one refusal spoils only its own item."""
        results = []
        for item in r.items:
            try:
                results.append({"ok": self.resolve(tx, who, self.single(r, item))})
            except RegistryError as error:
                results.append({"error": error.to_wire()})
        return {"results": results}

    def single(self, r: p.ResolveMany, item: p.ResolveItem) -> p.Resolve:
        """Return the resolve that an item of many stands for."""
        return p.Resolve(
            token="",
            epoch=r.epoch,
            seq=r.seq,
            name=item.name,
            component_type=item.component_type,
            instance=r.instance,
            metadata=item.metadata,
            acquire_lock=r.acquire_lock,
        )

    def check(self, r: p.Resolve) -> Row | None:
        """Return what is known of the name. Raises: RegistryError: it cannot be resolved so; nothing changed."""
        row = self.store.by_name(r.name)
        if row is None:
            check_name(r.name)
        elif row.component_type != r.component_type:
            raise WrongTypeError(
                f"{r.name!r} is a {row.component_type}, not a {r.component_type}",
                name=r.name,
                id=row.id,
                component_type=row.component_type,
                given=r.component_type,
            )
        if r.metadata is not None:
            merged(row, r.metadata, ())
        return row

    def _take(self, tx: Tx, who: Session, r: p.Resolve, row: Row | None) -> dict[str, Any]:
        """Answer with the identity and with its lock, granted here unless the owner has it."""
        if row is None or row.lock is None:
            self.locks.take(who.uid)
        row, answer = self._identity(tx, who, r, row)
        if row.lock is not None:
            lock = row.lock
            who.share(row.id, lock.seq, r.seq)
        else:
            lock = self._grant(tx, who, row, r)
        answer["fencing_token"], answer["acquired_at"] = lock.fencing_token, lock.acquired_at
        answer["lab"] = self.lab.standing(row._replace(lock=lock))
        return answer

    def _grant(self, tx: Tx, who: Session, row: Row, r: p.Resolve) -> Lock:
        term = self.lab.term(row.name)
        token = self._next_token(tx, row.last_token, term)
        owner = Owner(who.id, r.instance)
        self._store_session(tx, who)
        self.store.add_lock(row, owner, token, tx.now, r.seq, who.uid, term)
        self.lab.granted(row.name, term)
        self._event(tx, who, "granted", row, fencing_token=token)
        tx.granted.append(who)
        return Lock(owner, token, tx.now, r.seq, term)

    def _identity(self, tx: Tx, who: Session, r: p.Resolve, row: Row | None) -> tuple[Row, dict[str, Any]]:
        """Make, revive or merge as needed and return the component and the answer without its lock."""
        source, lab = "local", None
        if row is None:
            lab = self.lab.known(r.name)
            row, source = self._create(tx, who, r)
        else:
            row = self._preferred(tx, who, r, row)
            if row.retired:
                self._set_retired(tx, who, row, False)
            text = merged(row, r.metadata, ()) if r.metadata is not None else row.metadata
            if text != row.metadata:
                self._set_metadata(tx, who, row, text)
            if not r.acquire_lock:
                self.store.set_last_seen(row.id, tx.now)
        is_new = row.created_by == (who.id, r.seq)
        return row, {
            "id": row.id,
            "name": row.name,
            "component_type": row.component_type,
            "is_new": is_new,
            "source": source,
            "lab": lab,
            "fencing_token": None,
            "acquired_at": None,
            "warnings": self._warnings(row) if is_new else [],
        }

    def _preferred(self, tx: Tx, who: Session, r: p.Resolve, row: Row) -> Row:
        """Let a component have the ULID that the lab prefers, unless somebody else goes by the present one."""
        is_others = row.old_lock is not None or (row.lock is not None and row.lock.owner != (who.id, r.instance))
        if row.preferred_id is None or is_others or not self.prefer(tx, row):
            return row
        return self._get(row.name)

    def _create(self, tx: Tx, who: Session, r: p.Resolve) -> tuple[Row, Literal["local", "lab"]]:
        """Make a component: with the ULID that registry.json shows, or the lab has, or a new one."""
        self.names.take(who.uid)
        found = self.lab.found(r.name)
        id = self.old_programs.id_for(r.name) or self.lab.id_for(r.name) or self._new_id()
        is_labs = found is not None and found.id == id and not found.is_new
        text = check_metadata((found.metadata if found and is_labs else {}) | (r.metadata or {}))
        self._store_session(tx, who)
        made_by = (None, None) if is_labs else (who.id, r.seq)
        created_at = (instant(found.created_at) if found and is_labs else None) or tx.now
        self.store.add_component(
            id, r.name, r.component_type, tx.now, text, created_by=made_by, created_at=created_at, uid=who.uid
        )
        row = self._get(r.name)
        why = {"component_type": r.component_type, "metadata": json.loads(text)} | ({"from": "lab"} if is_labs else {})
        self._event(tx, who, "created", row, **why)
        tx.durable = True
        return row, "lab" if is_labs else "local"

    def _warnings(self, row: Row) -> list[str]:
        before = self.store.name_row(row.name)
        if before is None or before.renamed_id is None:
            return []
        return [
            f"{row.name!r} was once the name of {before.renamed_id}, which is called {before.renamed_to!r} now: "
            f"{row.id} is a new component"
        ]

    def _claims(self, tx: Tx, name: str) -> tuple[Claim, ...]:
        return self.queues.of_name(name) + tuple(c for c in tx.waiting if c.name == name)

    # waiting: what the loop asks when time has passed or a name is free

    def hand_over(self, tx: Tx, name: str, may_hear: Callable[[Claim], bool]) -> None:
        """Give a name that may be free to the first of its queue who can be told, with all claims of that owner."""
        row = self.store.by_name(name)
        settled = {claim.key for claim, _ in tx.settled}
        claims = tuple(c for c in self._claims(tx, name) if c.key not in settled)
        if row is not None and row.lock is not None:
            self.old_programs.want(name)  # its holder has it already, if not ready
            return
        if tx.monotonic < self.no_grants_before:
            return
        claim = next_claim(claims, may_hear)
        if claim is None:
            return
        if not self.lab.ready(name):
            self.lab.want(name)
            return
        if not self.old_programs.ready(name):
            self.old_programs.want(name)
            return
        for same in (c for c in claims if c.owner == claim.owner):
            self._settle(tx, same)

    def _settle(self, tx: Tx, claim: Claim) -> None:
        who = self.session(claim.owner.session)
        assert who is not None
        try:
            tx.settled.append((claim, self._take(tx, who, claim.request, self.check(claim.request))))
        except RegistryError as error:  # the world changed while it waited: another type, a full metadata
            tx.settled.append((claim, error))
            tx.freed.append(claim.name)

    def overdue(self, claim: Claim, now: float) -> RegistryError | None:
        """Answer a claim whose request has waited long enough: None while it has not, else waiting or held."""
        r: p.Resolve = claim.request
        if now < claim.answer_at:
            return None
        place = self.queues.place(claim)
        if r.renew:
            return WaitingError(f"{claim.name!r} is held; place {place}", name=claim.name, place=place)
        who = self.session(claim.owner.session)
        assert who is not None
        row = self.store.by_name(claim.name)
        return self._held(claim.name, row, who, place=place, waiting=self.queues.count(claim.name))

    # ends of locks

    def release(self, tx: Tx, who: Session, r: p.Release) -> Reply:
        """End the lock with that token of that instance; anything else changes nothing. A token that has grown since is
        the lock's too."""
        row = self.store.by_name(r.name)
        mine = Owner(who.id, r.instance)
        if row is None or row.lock is None or row.lock.owner != mine or not row.lock.has_token(r.fencing_token):
            return {"released": False}
        self._end_lock(tx, who, row, "released")
        return {"released": True}

    def release_all(self, tx: Tx, who: Session, r: p.ReleaseAll) -> Reply:
        """End all locks of an instance."""
        return {"released": self.release_instance(tx, who, r.instance)}

    def release_instance(self, tx: Tx, who: Session, instance: str) -> list[str]:
        names = [name for name, owner, _ in self.store.locks_of(who.id) if owner == instance]
        for name in names:
            self._end_lock(tx, who, self._get(name), "released")
        return names

    def cancel(self, tx: Tx, who: Session, seq: int) -> None:
        """End exactly the locks that request `seq` was granted, unless another request was answered with the same
        lock and stands (its waiter is taken out by the caller)."""
        names = self.store.locked_by_seq(who.id, seq)
        rows = [self._get(name) for name in names] + [self.store.by_id(id) for id in who.shared_by(seq)]
        for row in {row.id: row for row in rows if row is not None}.values():
            if row.lock is not None and row.lock.owner.session == who.id and who.is_last(row.id, seq):
                self._end_lock(tx, who, row, "released", cancelled=True)

    def break_lock(self, tx: Tx, who: Session, r: p.BreakLock) -> Reply:
        """End the lock with that token, whoever has it, and tell the holder."""
        row = self._get(r.name)
        self.need_admin(who, f"break the lock of {r.name!r}")
        if row.lock is None or not row.lock.has_token(r.fencing_token):
            return {"broken": False}
        holder = new_holder(self.session, self.host, row.lock)
        line = {
            "op": "lost",
            "name": row.name,
            "instance": row.lock.owner.instance,
            "fencing_token": row.lock.fencing_token,
            "reason": r.reason or "broken by an operator",
            "by": {"uid": who.uid, "pid": who.pid},
        }
        tx.told.append(Told(row.lock.owner.session, line))
        self._end_lock(tx, who, row, "broken", reason=r.reason, holder=holder.to_json())
        tx.durable = True  # a broken lock must not come back with a power loss of the record
        return {"broken": True}

    def end_session(self, tx: Tx, who: Session, why: str) -> None:
        """End all that a session holds, and its row."""
        for name, _, _ in self.store.locks_of(who.id):
            self._end_lock(tx, who, self._get(name), "ended", reason=why)
        if who.stored or who in tx.stored:
            self.store.drop_session(who.id)
        tx.ended.append(who)

    def identify(self, tx: Tx, who: Session, identity: Identity) -> None:
        """Note by what a session's process is known: this daemon may see it from another PID namespace."""
        who.identity = identity
        if who.stored:
            self.store.set_identity(who.id, identity)

    def reassert(self, tx: Tx, who: Session, holds: list[p.Hold]) -> None:
        """Take back what a holder says it held before an I/O error, where the database does not contradict."""
        for hold in holds:
            row = self.store.by_name(hold.name)
            if row is None or row.retired or row.lock is not None or hold.fencing_token <= row.last_token:
                continue
            if hold.fencing_token >= self.epoch * TOKENS_A_TERM:
                continue  # no earlier daemon can have given that one
            self._store_session(tx, who)
            self.store.add_lock(row, Owner(who.id, hold.instance), hold.fencing_token, tx.now, 0, who.uid)
            self.lab.granted(hold.name, None)
            self._event(tx, who, "granted", row, fencing_token=hold.fencing_token, reasserted=True)
            self.old_programs.want(hold.name)
