"""Lifelines: who a client is by the kernel's word, its session, and the moment at which its process dies.

Rules
- uid, gid, pid and pidfd come from the socket, never from the client. The secret token proves that a resuming client
  is the one that said hello, and only together with the same uid and the same process.
- A session has at most one lifeline; a second one by the same process replaces the first.
- The death of the process ends the session at once, whoever else (a forked child) has the connection open; the end of
  the connection alone lets it wait for a resume.
"""

from __future__ import annotations

import logging
import os
import secrets
import select
import socket
from collections import Counter
from typing import Any, NamedTuple

import ulid

from madsci_registry import protocol as p
from madsci_registry.errors import (
    InvalidError,
    PermissionDeniedError,
    QuotaError,
    RegistryError,
    SessionRequiredError,
)
from madsci_registry.types import Process, Proof
from madsci_registryd import facts, holders, messages
from madsci_registryd.admission import Admission, Credentials
from madsci_registryd.batch import Write, always
from madsci_registryd.clock import iso
from madsci_registryd.core import Core
from madsci_registryd.handlers import hash_token
from madsci_registryd.lifeline import Lifeline
from madsci_registryd.locks import Presence, Session
from madsci_registryd.loop import Loop, Turn
from madsci_registryd.quotas import Quotas
from madsci_registryd.sockets import ListeningPath
from madsci_registryd.transaction import Tx

log = logging.getLogger(__name__)

HELLO_S = 2.0
"""How long a new connection may stay silent."""
ACCEPT_PAUSE_S = 0.1


class Pace(NamedTuple):
    """How much is heard in one turn of the loop; the rest waits for the next."""

    accepts: int
    lines: int
    """Of one user."""


ALONE = Pace(64, 400)
SHARED = Pace(16, 20)
"""Where several users may come: 2 ms for each of them, if every line is a write."""
HELLO_LINES = 4
"""A hello takes as long as so many other lines."""


class Lifelines:
    """The listener, the connections, and the pidfds of all sessions. One thread."""

    def __init__(
        self,
        path: ListeningPath,
        loop: Loop,
        core: Core,
        *,
        version: str,
        config: str,
        best_proof: Proof,
    ) -> None:
        self.path = path
        self.loop = loop
        self._timers = core.timers
        self._clock = core.clock
        self._meters = core.meters
        self._registrar = core.registrar
        self._decode = core.handlers.line
        self._epoch = core.epoch
        self._version = version
        self.admission = core.service.admission
        self._config = config
        self._pace = SHARED if self.admission.is_shared else ALONE
        self._quotas: Quotas = core.quotas
        self._best_proof = best_proof
        self._listener: socket.socket | None = None
        self._lines: set[Lifeline] = set()
        self._heard: Counter[int] = Counter()
        """How many lines each user has said in this turn of the loop."""
        self._lines_of: Counter[int] = Counter()
        """How many connections each user has."""
        self._of_session: dict[str, Lifeline] = {}
        self._pidfds: dict[str, int] = {}
        self._registrar.tell = self.tell
        self._registrar.at_end.append(self.forget)
        self._registrar.is_dead = self.is_dead
        self._registrar.is_behind = self.is_behind

    # listening

    def bind(self) -> None:
        """Listen at the path; again, where its socket file went."""
        self._stop_listening()
        self._listener = self.path.listen(self.admission.modes)
        self.loop.watch(self._listener.fileno(), Turn.LIFELINES, self._accept)

    def admit(self, admission: Admission) -> None:
        """Judge by other rules who administers, those who are here too."""
        self.admission = self._registrar.service.admission = admission
        for session in self._registrar.sessions.values():
            session.is_admin = session.credentials is not None and admission.is_admin(session.credentials)

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self.loop.unwatch(self._listener.fileno())
            self._listener.close()
            self._listener = None

    def _accept(self, events: int) -> None:
        assert self._listener is not None
        for _ in range(self._pace.accepts):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # out of descriptors: the connection waits in the backlog
                log.warning("cannot accept a connection: %s", error, extra=messages.CANNOT_ACCEPT())
                self._pause_listening(self._listener)
                return
            sock.setblocking(False)
            self._begin_line(sock)

    def _begin_line(self, sock: socket.socket) -> None:
        who = holders.credentials_of_peer(sock)
        uid = who.uid
        line = Lifeline(sock, self.loop, self, uid)
        self._lines.add(line)
        self._lines_of[uid] += 1
        self.loop.watch(sock.fileno(), Turn.LIFELINES, line.ready)
        self._timers.after(HELLO_S, lambda: self._check_hello(line))
        try:
            self._admit(who)
            self._quotas.check(uid, "connections", self._lines_of[uid] - 1)
        except RegistryError as error:
            self._log_refusal(line, error)
            line.refuse(error)

    def _check_hello(self, line: Lifeline) -> None:
        """Close a connection that stays silent; one that was not heard yet is not silent."""
        if line.has_spoken or line.is_closed:
            return
        if line.has_unread():
            self._timers.after(HELLO_S, lambda: self._check_hello(line))
        else:
            line.close()

    def _pause_listening(self, listener: socket.socket) -> None:
        def again() -> None:
            if listener is self._listener and not self.loop.is_watched(listener.fileno()):
                self.loop.watch(listener.fileno(), Turn.LIFELINES, self._accept)

        self.loop.unwatch(listener.fileno())
        self._timers.after(ACCEPT_PAUSE_S, again)

    def is_behind(self) -> bool:
        """Tell whether somebody who connected could not be heard yet: it may be one who resumes."""
        if self._listener is None:
            return False
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        return bool(poll.poll(0)) or any(line.has_unread() for line in self._lines if not line.has_spoken)

    @property
    def is_quiet(self) -> bool:
        """True: no connection is up."""
        return not self._lines

    def close(self) -> None:
        """Tell all clients that the daemon stops, and close."""
        self._stop_listening()
        self.path.remove()
        for line in list(self._lines):
            line.send({"op": "closing"})
            line.close()

    def stop_if_quiet(self) -> bool:
        """Stop listening, then look: True where nobody came in between; else listen on."""
        self._accept(0)
        if not self.is_quiet:
            return False
        self._stop_listening()
        self.path.remove()
        return True

    # sessions

    def watch_process(self, session: Session, pidfd: int) -> None:
        """End a session when the process of `pidfd` (now ours) dies."""
        old = self._pidfds.pop(session.id, None)
        if old is not None:
            self.loop.unwatch(old)
            os.close(old)
        self._pidfds[session.id] = pidfd
        self.loop.watch(pidfd, Turn.DEATHS, lambda events: self._died(session, pidfd))

    def _died(self, session: Session, pidfd: int) -> None:
        self.loop.unwatch(pidfd)  # it stays readable for ever
        self._registrar.end_session(session, "its process died")

    def is_dead(self, session: Session) -> bool:
        pidfd = self._pidfds.get(session.id)
        return pidfd is not None and holders.is_dead(pidfd)

    def tell(self, session: str, message: dict[str, Any]) -> None:
        """Send a line to a session; one that is not attached learns at its resume what it holds."""
        line = self._of_session.get(session)
        if line is not None:
            line.send(message)

    def forget(self, session: Session) -> None:
        """Close the connection and the pidfd of a session that has ended."""
        line = self._of_session.get(session.id)
        if line is not None:
            line.close()
        pidfd = self._pidfds.pop(session.id, None)
        if pidfd is not None:
            self.loop.unwatch(pidfd)
            os.close(pidfd)

    # what clients say

    def begin_turn(self) -> None:
        """Everybody may be heard again."""
        self._heard.clear()

    def may_read(self, line: Lifeline) -> bool:
        return self._heard[line.uid] < self._pace.lines

    def said(self, line: Lifeline, text: bytes) -> None:
        """Do what a line asks; a line that is refused before the hello ends its connection."""
        self._heard[line.uid] += 1
        try:
            message = self._decode(text)
            if isinstance(message, (p.Hello, p.Resume)):
                self._heard[line.uid] += HELLO_LINES - 1
                if line.session is not None:
                    raise InvalidError("op: this connection has a session already", field="op", reason="twice")
                self._begin(line, message)
            elif line.session is None:
                raise SessionRequiredError("say hello or resume first")
            else:
                self._act(line.session, message)
        except RegistryError as error:
            self._log_refusal(line, error)
            line.refuse(error)  # a client of ours says nothing wrong; one that is well comes back and resumes

    def _log_refusal(self, line: Lifeline, error: RegistryError) -> None:
        if isinstance(error, QuotaError):
            return  # is logged where it is refused
        is_access = isinstance(error, PermissionDeniedError)
        kind, level = (messages.ACCESS_REFUSED, logging.WARNING) if is_access else (messages.LINE_REFUSED, logging.INFO)
        extra = kind(code=error.code, uid=line.uid)
        self._quotas.log_once((error.code, line.uid), "refused a line: %s", error, level=level, extra=extra)

    def _act(self, session: Session, message: Any) -> None:
        if isinstance(message, p.Cancel):
            self._registrar.cancel(session, message.seq)
        elif isinstance(message, p.Bye):
            self._registrar.end_session(session, "it said bye")
        elif isinstance(message, p.LifelineRelease):
            self._release(session, message)

    def _release(self, session: Session, message: p.LifelineRelease) -> None:
        service = self._registrar.service
        if message.name is None:
            self._registrar.insist(lambda tx: service.release_instance(tx, session, message.instance))
        else:
            request = p.Release(
                token="",
                epoch=0,
                seq=0,
                name=message.name,
                instance=message.instance,
                fencing_token=message.fencing_token or 0,
            )
            self._registrar.insist(lambda tx: service.release(tx, session, request))

    def _begin(self, line: Lifeline, message: p.Hello | p.Resume) -> None:
        try:
            peer = holders.peer_of(line.sock, self._best_proof)
        except OSError as error:
            if not isinstance(error, ProcessLookupError):
                log.warning("cannot see who connected: %s", error, extra=messages.PEER_UNSEEN())
            line.close()
            return
        try:
            self._admit(peer.credentials)
            session = self._resumed(peer, message) if isinstance(message, p.Resume) else None
            if session is None:
                self._check_quota(peer)
                token = message.token if isinstance(message, p.Resume) else secrets.token_hex(32)
                session = self._new_session(peer, token)
                self._registrar.add_session(session)
        except BaseException:
            if peer.pidfd is not None:
                os.close(peer.pidfd)
            raise
        if isinstance(message, p.Hello):
            self._attach(line, session, peer, message, token=token)
        elif not session.stored or session.identity != peer.identity or self._is_after_error():
            self._resume_anew(line, session, peer, message)
        else:
            self._attach(line, session, peer, message)

    def _admit(self, who: Credentials) -> None:
        if not self.admission.admits(who):
            raise self.admission.refusal(who, str(self.path.path), self._config)

    def _check_quota(self, peer: holders.Peer) -> None:
        count = sum(s.uid == peer.uid for s in self._registrar.sessions.values())
        self._quotas.check(peer.uid, "sessions", count)

    def _is_after_error(self) -> bool:
        return self._clock.monotonic() < self._registrar.service.no_grants_before

    def _resumed(self, peer: holders.Peer, message: p.Resume) -> Session | None:
        """Find the session that is resumed; None where a holder may re-assert what an I/O error took."""
        session = self._registrar.by_token(hash_token(message.token))
        if session is None:
            if message.holds and self._is_after_error():
                return None
            raise SessionRequiredError("the session is over: what it held may be another's now; say hello")
        # Where that cannot be told, the secret token has to do.
        is_same = holders.is_same(peer.identity, session.identity)
        if is_same is False or (peer.uid != session.uid and not is_same):  # a process may have changed its uid
            raise PermissionDeniedError("the session belongs to another process", uid=peer.uid)
        return session

    def _new_session(self, peer: holders.Peer, token: str) -> Session:
        return Session(
            id=str(ulid.ULID()),
            token_hash=hash_token(token),
            process=Process(pid=peer.pid, uid=peer.uid, gid=peer.gid, proof=peer.proof),
            identity=peer.identity,
            started_at=iso(self._clock.wall()),
        )

    def _resume_anew(self, line: Lifeline, session: Session, peer: holders.Peer, message: p.Resume) -> None:
        """Attach once it is written what its process is known by now, and what it takes back after an I/O error."""
        service = self._registrar.service

        def do(tx: Tx) -> None:
            service.identify(tx, session, peer.identity)
            if self._is_after_error():
                service.reassert(tx, session, message.holds)

        self._registrar.submit(Write(do, lambda result: self._attach(line, session, peer, message), light=always))

    def _attach(
        self,
        line: Lifeline,
        session: Session,
        peer: holders.Peer,
        message: p.Hello | p.Resume,
        *,
        token: str | None = None,
    ) -> None:
        if session.presence is Presence.ENDED:
            if peer.pidfd is not None:
                os.close(peer.pidfd)
            line.close()
            return
        session.process = facts.process_of(peer)
        session.credentials = peer.credentials
        session.is_admin = self.admission.is_admin(peer.credentials)
        if peer.pidfd is not None:
            self.watch_process(session, peer.pidfd)
        if line.is_closed or line.session is not None:  # it went, or began another session, while it was written
            line.close()
            if session.id not in self._of_session:
                self._registrar.drop(session)
            return
        earlier = self._of_session.pop(session.id, None)
        if earlier is not None:
            earlier.session = None
            earlier.close()
        session.client, session.protocol_version = message.client, message.v
        line.session = session
        self._of_session[session.id] = line
        self._registrar.attach(session)
        held = self._registrar.service.store.locks_of(session.id)
        holds = message.holds if isinstance(message, p.Resume) else []
        is_provable = holders.may_find(session.identity, peer.proof)
        line.send(
            {
                "op": "welcome",
                "v": p.PROTOCOL_VERSION,
                "session": session.id,
                "epoch": self._epoch,
                "daemon": self._version,
                "proof": peer.proof,
                "grace_s": None if is_provable else p.GRACE_S,
                "held": [{"name": n, "instance": i, "fencing_token": t} for n, i, t in held],
                "renamed": self._registrar.service.renamed_away(session.id, holds),
            }
            | ({"token": token} if token else {})
        )

    def refused(self, code: str) -> None:
        """Count a connection that is refused."""
        self._meters.lines_refused[code] += 1

    def closed(self, line: Lifeline) -> None:
        """A connection ended: its session may resume, unless its process is dead."""
        self._lines.discard(line)
        self._lines_of[line.uid] -= 1
        session = line.session
        if session is None or self._of_session.get(session.id) is not line:
            return
        del self._of_session[session.id]
        if session.id not in self._registrar.sessions:
            return
        if self.is_dead(session):
            self._registrar.end_session(session, "its process died")
        self._registrar.drop(session)
