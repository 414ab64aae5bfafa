"""Joins the service with those who want answers: sessions, requests that wait, watchers, and the turn's batch.

It knows no socket: an answer is a callback, a lifeline is `tell`. Memory changes after a commit only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from madsci_registry import protocol as p
from madsci_registry.errors import NoSpaceError, RegistryError, SessionRequiredError, UnavailableError
from madsci_registryd import messages
from madsci_registryd.batch import Batch, Write, always
from madsci_registryd.clock import Clock, Timers
from madsci_registryd.locks import Claim, Presence, Queues, Session, claim_expires_at
from madsci_registryd.reads import Reads
from madsci_registryd.service import PARKED, Service
from madsci_registryd.transaction import Told, Tx
from madsci_registryd.watchers import Watchers

log = logging.getLogger(__name__)

Answer = Callable[[dict[str, Any]], None]
"""Takes {"ok": ...} or {"error": ...}; called once, or never where the asker is gone."""

BEHIND_S = 0.2
RETRY_S = 1.0
"""How long after a full disk a death is written again."""


class Registrar:
    """The daemon without its sockets. One thread."""

    def __init__(self, clock: Clock, timers: Timers, queues: Queues) -> None:
        self._clock = clock
        self._timers = timers
        self.queues = queues
        self.sessions: dict[str, Session] = {}
        self._by_token: dict[bytes, Session] = {}
        self._writes: list[Write] = []
        self._parked: dict[tuple[str, int], Answer] = {}
        self.watchers: Watchers
        self.tell: Callable[[str, dict[str, Any]], None] = lambda session, line: None
        self.at_end: list[Callable[[Session], None]] = []
        """Called when a session has ended: what others keep for it goes."""
        self.is_dead: Callable[[Session], bool] = lambda session: False
        self.is_behind: Callable[[], bool] = lambda: False
        """Tells whether clients have connected that could not be heard yet."""

    def open(self, service: Service, reads: Reads, batch: Batch) -> None:
        """Connect the parts that need each other."""
        self.service = service
        self.reads = reads
        self._batch = batch
        batch.tell = self._told

    def _told(self, told: Told) -> None:
        self.tell(told.session, told.line)
        if told.line["op"] == "lost":
            _log_broken(told.line)

    # sessions

    def add_session(self, session: Session) -> None:
        """Know a session: a new one, or one that an earlier daemon left."""
        self.sessions[session.id] = session
        self._by_token[session.token_hash] = session
        if session.presence is not Presence.ATTACHED:
            self._watch_end(session)

    def by_token(self, token_hash: bytes) -> Session | None:
        return self._by_token.get(token_hash)

    def attach(self, session: Session) -> None:
        """Its lifeline is up (again)."""
        session.presence, session.since = Presence.ATTACHED, self._clock.monotonic()
        for name in {claim.name for claim in self.queues.of_session(session.id)}:
            self.reconsider(name)

    def drop(self, session: Session) -> None:
        """Its lifeline ended: what it had asked is not answered any more; it has a while to resume."""
        if session.presence is not Presence.ATTACHED:
            return
        now = self._clock.monotonic()
        session.presence, session.since = Presence.DROPPED, now
        for claim in self.queues.of_session(session.id):
            self._parked.pop(claim.key, None)
            claim.answer_at = now
            self._timers.after(p.RENEW_S, lambda claim=claim: self._expire(claim))  # type: ignore[misc]
        self._watch_end(session)

    def _watch_end(self, session: Session) -> None:
        ends_at = session.ends_at()
        if ends_at == math.inf:
            return

        def check() -> None:
            now = self._clock.monotonic()
            if session.ends_at() > now:
                return
            if self.is_behind() and now - session.since < p.GRACE_S:  # it may be among those who were not heard yet
                self._timers.after(BEHIND_S, check)
                return
            self.end_session(session, "its connection ended and it did not resume")

        self._timers.after(ends_at - self._clock.monotonic(), check)

    def end_session(self, session: Session, why: str) -> None:
        """End a session and all that it holds; on a full disk again and again until it is written."""

        def done(result: Any) -> None:
            if isinstance(result, NoSpaceError):
                self._timers.after(RETRY_S, lambda: self.end_session(session, why))
                return
            if self.sessions.pop(session.id, None) is None:
                return
            self._by_token.pop(session.token_hash, None)
            for claim in self.queues.of_session(session.id):
                self.drop_claim(claim)
            self.watchers.forget(session)
            for forget in self.at_end:
                forget(session)

        def do(tx: Tx) -> None:
            if session not in tx.ended and session.presence is not Presence.ENDED:
                self.service.end_session(tx, session, why)

        self.submit(Write(do, done, light=always))

    # requests

    def submit(self, write: Write) -> None:
        """Let a write be part of the next batch."""
        self._writes.append(write)

    def insist(self, do: Callable[[Tx], Any]) -> None:
        """Let a change of locks that nobody waits for be part of the next batch; on a full disk again and again."""

        def done(result: Any) -> None:
            if isinstance(result, NoSpaceError):
                self._timers.after(RETRY_S, lambda: self.insist(do))
            elif isinstance(result, RegistryError):
                log.warning("not done: %s", result, extra=messages.LINE_REFUSED(code=result.code))

        self.submit(Write(do, done, light=always))

    def write(
        self, who: Session, request: Any, verb: Callable[..., Any], answer: Answer, light: Callable[[], bool]
    ) -> None:
        """Run a verb of the service in the next batch and answer after its commit."""

        def done(result: Any) -> None:
            if result is PARKED:
                self._parked[who.id, request.seq] = answer
                claim = self.queues.find(who.id, request.seq)
                if claim is not None:  # a renewal; a new claim is timed when it is queued
                    self._time(claim)
            else:
                answer(outcome(result))

        def do(tx: Tx) -> Any:
            if who in tx.ended or who.presence is Presence.ENDED:
                raise SessionRequiredError("the session has ended")
            return verb(tx, who, request)

        self.submit(Write(do, done, light))

    def cancel(self, who: Session, seq: int) -> None:
        """Withdraw a request: its waiter goes, or what it was granted ends."""
        who.withdrawn.append(seq)
        claim = self.queues.find(who.id, seq)
        if claim is not None:
            self.drop_claim(claim)
        self.watchers.cancel(who, seq)
        self.insist(lambda tx: self.service.cancel(tx, who, seq))

    def commit(self) -> None:
        """Run the turn's batch, if any, and all that follows from it."""
        while self._writes:
            writes, self._writes = self._writes, []
            tx = self._batch.run(writes)
            if tx is not None:
                self._after(tx)

    def _after(self, tx: Tx) -> None:
        for claim in tx.waiting:
            self._enqueue(claim)
        for claim, result in tx.settled:
            self.queues.remove(claim)
            self._answer(claim, outcome(result))
        for session in tx.ended:
            if session.id in self.sessions:  # found dead just before the commit
                self.end_session(session, "its process died")
        for session in tx.granted:
            if session.presence is not Presence.ENDED and self.is_dead(session):
                self.end_session(session, "its process died")
        self.watchers.look()

    def _enqueue(self, claim: Claim) -> None:
        if claim.owner.session not in self.sessions:
            return
        self.queues.add(claim)
        self._time(claim)

    def _time(self, claim: Claim) -> None:
        """Look at a claim when its present request wants an answer."""
        if claim.answer_at < claim.looked_at_next:  # else the look that is due before will see to the next
            claim.looked_at_next = claim.answer_at
            self._timers.after(claim.answer_at - self._clock.monotonic(), lambda: self._overdue(claim))

    def _overdue(self, claim: Claim) -> None:
        claim.looked_at_next = math.inf
        if self.queues.find(*claim.key) is not claim:
            return
        error = self.service.overdue(claim, self._clock.monotonic())
        if error is None:
            self._time(claim)  # it was renewed
            return
        self._answer(claim, {"error": error.to_wire()})
        if error.code == "waiting":
            self._timers.after(p.RENEW_S, lambda: self._expire(claim))
        else:
            self.drop_claim(claim)

    def _expire(self, claim: Claim) -> None:
        if self.queues.find(*claim.key) is claim and self._clock.monotonic() >= claim_expires_at(claim):
            self.drop_claim(claim)

    def drop_claim(self, claim: Claim) -> None:
        """Take a claim out unanswered; the name may be the next one's now."""
        self.queues.remove(claim)
        self._parked.pop(claim.key, None)
        self.reconsider(claim.name)

    def reconsider(self, name: str) -> None:
        """Let the next batch look whether a name is free for who waits for it."""
        if self.queues.count(name):
            self.insist(lambda tx: tx.freed.append(name))

    def _answer(self, claim: Claim, reply: dict[str, Any]) -> None:
        answer = self._parked.pop(claim.key, None)
        if answer is not None:
            answer(reply)

    def close(self) -> None:
        """Tell all who wait that the daemon stops; they ask the next one."""
        error = UnavailableError("the daemon stops; ask the next one").to_wire()
        for answer in self._parked.values():
            answer({"error": error})
        self._parked.clear()
        self.watchers.close(error)


def _log_broken(line: dict[str, Any]) -> None:
    by = line["by"]
    if "host" in by:
        extra = messages.LOST_TO_LAB(name=line["name"], fencing_token=line["fencing_token"], **by)
        log.warning("the lock of %r is lost: %s", line["name"], line["reason"], extra=extra)
        return
    extra = messages.LOCK_BROKEN(name=line["name"], fencing_token=line["fencing_token"], **by)
    what = line["name"], by["uid"], by["pid"], line["reason"]
    log.warning("the lock of %r was broken by uid %s (pid %s): %s", *what, extra=extra)


def outcome(result: Any) -> dict[str, Any]:
    """Turn what a verb returned or refused into a reply."""
    return {"error": result.to_wire()} if isinstance(result, RegistryError) else {"ok": result}
