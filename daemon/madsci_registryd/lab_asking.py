"""Asks the lab what a request needs, before the request is run.

The answer is remembered under the name; then the request is run, finds the name ready, or learns from `refusal` why it
is not. So the rules of locks know nothing of HTTP. A client that waits for a name that another host holds has it asked
for again each second. Where the lab has to hear a change of this host first (a rename above all), it is asked again
when it has.

An answer that cannot be used is none for its request; it does not make the lab one that is away. Nor does one that came
too late while others came.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ulid

from madsci_registry import protocol as p
from madsci_registry.errors import (
    BusyError,
    ConflictError,
    HeldError,
    InternalError,
    LabUnavailableError,
    NotFoundError,
    PermissionDeniedError,
    RegistryError,
    SessionRequiredError,
    WrongTypeError,
)
from madsci_registry.names import is_ulid
from madsci_registryd import lab_answers as a
from madsci_registryd.core import Core
from madsci_registryd.lab_gateway import Gateway
from madsci_registryd.lab_lanes import Send
from madsci_registryd.lab_link import Link
from madsci_registryd.lab_tier import Ask, Found
from madsci_registryd.locks import Claim, Session
from madsci_registryd.store import Row
from madsci_registryd.tenure import Has, Tenure
from madsci_registryd.tenures import Tenures


class Asking(Tenures):
    """Belongs to the loop's thread."""

    conflict: Callable[[str, str, str], None] = staticmethod(lambda name, id, preferred: None)
    """Told that the lab has another ULID for a name that is known here."""

    def __init__(self, core: Core, link: Link, send: Send, *, require: bool) -> None:
        super().__init__(core, link, send, require=require)
        self._ahead: set[Tenure] = set()
        """Of those that somebody waits for, the ones of which the lab has to hear a change first."""

    # before a request

    def for_resolve(self, who: Session, r: p.Resolve) -> list[Ask]:
        if self._link.is_away or r.renew and self._queues.find(who.id, r.seq) is not None:
            return []
        row = self._service.check(r)
        if row is not None and (not r.acquire_lock or row.lock is not None or row.old_lock is not None):
            return []
        if r.acquire_lock and (self.ready(r.name) or self._queues.count(r.name)):
            return []
        return [Ask(r.name, r.component_type, r.metadata, r.acquire_lock, who)]

    def for_many(self, who: Session, r: p.ResolveMany) -> list[Ask]:
        asks = []
        for item in r.items:
            try:
                asks += self.for_resolve(who, self._service.single(r, item))
            except RegistryError:
                continue  # it is answered with the others
        return asks

    def prepare(self, asks: list[Ask], then: Callable[[], None]) -> None:
        waiting = {ask.name for ask in asks}
        over: list[bool] = []

        def answered(name: str) -> None:
            waiting.discard(name)
            if not waiting and not over:
                over.append(True)
                then()

        for ask in {ask.name: ask for ask in asks}.values():
            self._ask(ask, lambda name=ask.name: answered(name))  # type: ignore[misc]
        if not over:
            asked_at = self._clock.monotonic()
            self._timers.after(self._link.within_s, lambda: None if over else self._give_up({*waiting}, asked_at))

    def _give_up(self, names: set[str], asked_at: float) -> None:
        """A request has waited long enough: the lab is away, or so slow that it might be."""
        late = LabUnavailableError(f"no answer within {self._link.within_s:g} s")
        waiting = [self._tenure(name) for name in names]
        if self._link.heard_at <= asked_at and not all(self._is_ahead(tenure) for tenure in waiting):
            self._link.failed(late)  # and everybody goes on
            return
        for tenure in waiting:
            text = f"the lab has not heard yet what became of {tenure.name!r} here; try again"
            self._note(tenure, BusyError(text) if self._is_ahead(tenure) else late)
            self._serve(tenure)

    def _ask(self, ask: Ask, then: Callable[[], None]) -> None:
        tenure = self._tenure(ask.name)
        tenure.waiting.append((ask, then))
        self._watch(tenure)
        self._go_on(tenure)

    def _is_ahead(self, tenure: Tenure) -> bool:
        """Tell whether the lab has to hear something of this host before it can be asked."""
        return tenure in self._ahead or any(moved.told_as == tenure.name for moved in self._moved)

    def _go_on(self, tenure: Tenure) -> None:
        """Ask the lab what somebody waits for, or let them go on where that is needless, or the lab is away."""
        if tenure.is_asking or not tenure.waiting:
            return
        row = self._store.by_name(tenure.name)
        is_held = row is not None and row.lock is not None
        if self._link.is_away or is_held or self.term(tenure.name) is not None:
            self._serve(tenure)
        elif self._link.is_up and self._link.session is not None and not self._is_ahead(tenure):
            asks = [ask for ask, _ in tenure.waiting]
            self._resolve(tenure, next((ask for ask in asks if ask.lock), asks[0]))

    def heard_changes(self) -> None:
        """The lab may have heard what it had not: ask it again."""
        ahead, self._ahead = self._ahead, set()
        for tenure in ahead:
            self._go_on(tenure)

    def _serve(self, tenure: Tenure, *, lock: bool | None = None) -> None:
        """Let those go on who wait for an answer; with `lock`, those only who want a lock, or who want none."""
        waiting, tenure.waiting = tenure.waiting, []
        for ask, then in waiting:
            if lock in (None, ask.lock):
                then()
            else:
                tenure.waiting.append((ask, then))
        self._go_on(tenure)

    # the question and its answer

    def _resolve(self, tenure: Tenure, ask: Ask) -> None:
        """Get or make the component in the lab, and its lock with it."""
        name, who, now = tenure.name, self._who(), self._clock.monotonic
        until = now() + self._link.within_s
        row = self._store.by_name(name)
        spent = tenure.term if tenure.has is Has.IT and ask.lock else None
        tenure.is_asking, tenure.has = True, Has.NOTHING if spent is not None else tenure.has
        body = self._body(tenure, ask, row)
        # An id of an old file comes to the lab by the changes of this host alone.
        is_foreign = row is not None and not is_ulid(row.id)
        locks = who | {"locks": [{"name": name, **body.get("lock", {})}]}

        def call(gateway: Gateway) -> a.Resolved | a.Locked:
            if now() >= until:
                raise a.UselessAnswerError("it took too long until it could be asked")
            if spent is not None:  # its numbers are used up: a higher term is needed
                gateway.post("/registry/release", who | {"locks": {name: spent}}, within_s=until - now())
            if is_foreign:
                return a.read(a.Locked, gateway.post("/registry/lock", locks, within_s=until - now()))
            return a.read(a.Resolved, gateway.post("/registry/resolve", body, within_s=until - now()))

        self._send("ask", call, lambda result: self._answered(tenure, ask, who["session"], result))

    def _body(self, tenure: Tenure, ask: Ask, row: Row | None) -> dict[str, Any]:
        if row is None and self.id_for(tenure.name) is None:
            tenure.proposed_id = self._service.old_programs.id_for(tenure.name) or str(ulid.ULID())
        body: dict[str, Any] = {
            "host": self._link.host.name,
            "op": str(ulid.ULID()),
            "name": tenure.name,
            "component_type": ask.component_type,
            "id": row.id if row else self.id_for(tenure.name),
        }
        if row is None and ask.metadata:
            body["metadata"] = ask.metadata
        if ask.lock:
            body |= {"session": self._link.session, "lock": self._wish(tenure.name, ask.who)}
        return body

    def _answered(self, tenure: Tenure, ask: Ask, session: str, result: a.Resolved | a.Locked | RegistryError) -> None:
        tenure.is_asking = False
        if isinstance(result, (LabUnavailableError, InternalError, PermissionDeniedError)):
            self._note(tenure, LabUnavailableError(result.message))
            self._link.failed(result)
            self._serve(tenure)
            return
        self._link.heard()
        if isinstance(result, SessionRequiredError):
            if session == self._link.session:
                self._link.end_session()
            self._go_on(tenure)  # with the next session, if it is there already
            return
        concerns = None if ask.lock else False
        if isinstance(result, NotFoundError):
            self._ahead.add(tenure)
        elif isinstance(result, a.HeldInLabError):  # and its ULID was not said: who wants no lock is not answered
            concerns = True
            self._note(tenure, self._told(tenure.name, result))
        elif isinstance(result, RegistryError):
            self._note(tenure, self._told(tenure.name, result))
        elif isinstance(result, a.Locked):
            self._take_one(tenure, session, result)
        else:
            self._take_in(tenure, session, result)
        if tenure not in self._ahead:
            self._serve(tenure, lock=concerns)

    def _take_in(self, tenure: Tenure, session: str, said: a.Resolved) -> None:
        entry, name = said.entry, tenure.name
        row, there, before = self._store.by_name(name), self._store.by_id(entry.id), self._store.name_row(name)
        is_mine = said.lock is not None and said.lock.name == name and session == self._link.session
        if entry.name != name:
            self._note(tenure, a.UselessAnswerError("the lab answered for another name"))
            return
        if row is None and there is not None:
            if before is not None and before.renamed_id == there.id:  # and the lab has not heard of that
                self._ahead.add(tenure)
            text = f"{name!r} is in the lab the name of {entry.id}, which is called {there.name!r} here"
            self._note(tenure, ConflictError(text, name=name, id=entry.id))
            if is_mine and said.lock:
                self._release(name, said.lock.term)
            return
        self._note(tenure, Found(entry.id, entry.component_type, entry.metadata, entry.created_at, said.is_new))
        if row is not None and (row.id != entry.id or row.preferred_id is not None):
            self.conflict(name, row.id, entry.id)
        if is_mine and said.lock:
            self._take(tenure, said.lock.term)

    def _take_one(self, tenure: Tenure, session: str, said: a.Locked) -> None:
        for lock in said.locks:
            if lock.name != tenure.name:
                continue
            if isinstance(lock, a.Refused):
                error = a.refusal_of(lock.error) or LabUnavailableError("the lab said no without a reason")
                if isinstance(error, NotFoundError):
                    self._ahead.add(tenure)
                self._note(tenure, self._told(tenure.name, error))
            elif session == self._link.session:
                self._take(tenure, lock.term)

    def _told(self, name: str, error: RegistryError) -> RegistryError:
        """Return a refusal of the lab as a client is told it."""
        row = self._store.by_name(name)
        id = row.id if row else None
        if isinstance(error, a.HeldInLabError):
            hint = ""
            if name.endswith("Manager") and "manager" in (row.component_type if row else "manager"):
                hint = "; managers without a name are called after their class: give each one a name of its own"
            waiting = self._queues.count(name)
            return HeldError(f"{name!r}: {error.message}{hint}", name=name, id=id, holder=error.holder, waiting=waiting)
        if isinstance(error, WrongTypeError):
            facts = {"id": error.id, "component_type": error.component_type, "given": error.given}
            return WrongTypeError(f"in the lab, {error.message}", name=name, **facts)
        if isinstance(error, ConflictError):
            return ConflictError(f"the lab says no to {name!r}: {error.message}", name=name, id=id)
        return error

    # who waits

    def want(self, name: str) -> None:
        if name not in self._wanted:
            self._wanted.add(name)
            if not isinstance(self._answer(name), RegistryError):  # else it was asked just now
                self._timers.after(0, lambda: self._poll(name))

    def _poll(self, name: str) -> None:
        """Ask for a name that clients of this host wait for."""
        claims, row, tenure = self._queues.of_name(name), self._store.by_name(name), self._tenure(name)
        self._watch(tenure)
        if not claims or (row is not None and row.lock is not None):
            self._wanted.discard(name)  # when it is free again it is wanted again
        elif self.ready(name):
            self._make_ready(claims[0])
        elif not tenure.is_asking and not tenure.waiting and not self._link.is_away:
            who, r = self._service.session(claims[0].owner.session), claims[0].request
            ask = Ask(name, r.component_type, r.metadata, True, who)
            self._ask(ask, lambda: self._make_ready(claims[0]))

    def _make_ready(self, claim: Claim) -> None:
        """Let the loop look again whether a name may be given, once old programs see it too."""
        name, who = claim.name, self._service.session(claim.owner.session)
        if not self.ready(name) or who is None:
            return
        self._wanted.discard(name)

        def seen(refusal: RegistryError | None) -> None:
            if refusal is not None:
                self._wanted.add(name)  # and tried again
            self._registrar.reconsider(name)

        old = self._service.old_programs
        try:
            old.prepare(old.for_resolve(who, claim.request) if self._store.id_of(name) is None else [], seen)
        except RegistryError:
            self._registrar.reconsider(name)  # it is refused anyway
