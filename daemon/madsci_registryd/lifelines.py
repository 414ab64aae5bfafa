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
from typing import Any

import ulid

from madsci_registry import protocol as p
from madsci_registry.errors import (
    InvalidError,
    PermissionDeniedError,
    RegistryError,
    SessionRequiredError,
)
from madsci_registry.types import Process, Proof
from madsci_registryd import facts, holders, messages
from madsci_registryd.admission import Admission
from madsci_registryd.batch import Write, always
from madsci_registryd.clock import iso
from madsci_registryd.core import Core
from madsci_registryd.handlers import hash_token
from madsci_registryd.lifeline import Lifeline
from madsci_registryd.locks import Presence, Session
from madsci_registryd.loop import Loop, Turn
from madsci_registryd.reception import Reception
from madsci_registryd.sockets import ListeningPath
from madsci_registryd.transaction import Tx

log = logging.getLogger(__name__)

HELLO_LINES = 4
"""A hello takes as long as so many other lines."""


class Lifelines:
    """The connections' sessions, and the pidfds of all sessions. One thread."""

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
        self.loop = loop
        self._clock = core.clock
        self._meters = core.meters
        self._registrar = core.registrar
        self._decode = core.handlers.line
        self._epoch = core.epoch
        self._version = version
        self._admission = core.service.admission
        self._quotas = core.quotas
        self._best_proof = best_proof
        self.reception = Reception(path, loop, core.timers, core.quotas, self._admission, self, config)
        self._of_session: dict[str, Lifeline] = {}
        self._pidfds: dict[str, int] = {}
        self._registrar.tell = self.tell
        self._registrar.at_end.append(self.forget)
        self._registrar.is_dead = self.is_dead
        self._registrar.is_behind = self.reception.is_behind

    def admit(self, admission: Admission) -> None:
        """Judge by other rules who administers, those who are here too."""
        self._admission = self._registrar.service.admission = admission
        for session in self._registrar.sessions.values():
            session.is_admin = session.credentials is not None and admission.is_admin(session.credentials)

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

    def may_read(self, line: Lifeline) -> bool:
        return self.reception.may_read(line)

    def said(self, line: Lifeline, text: bytes) -> None:
        """Do what a line asks; a line that is refused before the hello ends its connection."""
        self.reception.heard(line, 1)
        try:
            message = self._decode(text)
            if isinstance(message, (p.Hello, p.Resume)):
                self.reception.heard(line, HELLO_LINES - 1)
                if line.session is not None:
                    raise InvalidError("op: this connection has a session already", field="op", reason="twice")
                self._begin(line, message)
            elif line.session is None:
                raise SessionRequiredError("say hello or resume first")
            else:
                self._act(line.session, message)
        except RegistryError as error:
            self.reception.refuse(line, error)

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
        session.is_admin = self._admission.is_admin(peer.credentials)
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
                "held": [self._held(n, i, t) for n, i, t in held],
                "renamed": self._registrar.service.renamed_away(session.id, holds),
            }
            | ({"token": token} if token else {})
        )
        for conflict in self._registrar.service.conflicts_of(session.id):
            line.send(conflict)  # it may have been away when it was told

    def _held(self, name: str, instance: str, fencing_token: int) -> dict[str, Any]:
        service = self._registrar.service
        hold = {"name": name, "instance": instance, "fencing_token": fencing_token}
        return hold | {"lab": service.lab.standing(service.known(name)) if service.lab.is_on else None}

    def refused(self, code: str) -> None:
        """Count a connection that is refused."""
        self._meters.lines_refused[code] += 1

    def closed(self, line: Lifeline) -> None:
        """A connection ended: its session may resume, unless its process is dead."""
        self.reception.gone(line)
        session = line.session
        if session is None or self._of_session.get(session.id) is not line:
            return
        del self._of_session[session.id]
        if session.id not in self._registrar.sessions:
            return
        if self.is_dead(session):
            self._registrar.end_session(session, "its process died")
        self._registrar.drop(session)
