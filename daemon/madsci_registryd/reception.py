"""Where lifelines come in: who may, how many, at which pace, and how long one may stay silent. One thread.

Judged here is what the kernel says of a connection, before a word is read. Whose session it becomes is the lifelines'
business.
"""

from __future__ import annotations

import logging
import select
import socket
from collections import Counter
from typing import NamedTuple

from madsci_registry.errors import PermissionDeniedError, QuotaError, RegistryError
from madsci_registryd import holders, messages
from madsci_registryd.admission import Admission
from madsci_registryd.clock import Timers
from madsci_registryd.lifeline import Lifeline, Owner
from madsci_registryd.loop import Loop, Turn
from madsci_registryd.quotas import Quotas
from madsci_registryd.sockets import ListeningPath

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


class Reception:
    """The listener, and all connections that it let in."""

    def __init__(
        self,
        path: ListeningPath,
        loop: Loop,
        timers: Timers,
        quotas: Quotas,
        admission: Admission,
        owner: Owner,
        config: str,
    ) -> None:
        """`owner` is told what is said on the connections; `config` says where the settings are, for refusals."""
        self.path = path
        self.lines: set[Lifeline] = set()
        self._loop = loop
        self._timers = timers
        self._quotas = quotas
        self._admission = admission
        self._owner = owner
        self._config = config
        self._pace = SHARED if admission.is_shared else ALONE
        self._listener: socket.socket | None = None
        self._lines_of: Counter[int] = Counter()
        """How many connections each user has."""
        self._heard: Counter[int] = Counter()
        """How many lines each user has said in this turn of the loop."""

    # listening

    def bind(self) -> None:
        """Listen at the path; again, where its socket file went."""
        self.stop()
        self._listener = self.path.listen(self._admission.modes)
        self._loop.watch(self._listener.fileno(), Turn.LIFELINES, self._accept)

    def stop(self) -> None:
        """Listen no more; the connections stay."""
        if self._listener is not None:
            self._loop.unwatch(self._listener.fileno())
            self._listener.close()
            self._listener = None

    def stop_if_quiet(self) -> bool:
        """Stop listening, then look: True where nobody came in between; else listen on."""
        self._accept(0)
        if self.lines:
            return False
        self.stop()
        self.path.remove()
        return True

    def _accept(self, events: int) -> None:
        assert self._listener is not None
        for _ in range(self._pace.accepts):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # out of descriptors: the connection waits in the backlog
                log.warning("cannot accept a connection: %s", error, extra=messages.CANNOT_ACCEPT())
                self._pause(self._listener)
                return
            sock.setblocking(False)
            self._let_in(sock)

    def _let_in(self, sock: socket.socket) -> None:
        who = holders.credentials_of_peer(sock)
        line = Lifeline(sock, self._loop, self._owner, who.uid)
        self.lines.add(line)
        self._lines_of[who.uid] += 1
        self._loop.watch(sock.fileno(), Turn.LIFELINES, line.ready)
        self._timers.after(HELLO_S, lambda: self._check_hello(line))
        try:
            if not self._admission.admits(who):
                raise self._admission.refusal(who, str(self.path.path), self._config)
            self._quotas.check(who.uid, "connections", self._lines_of[who.uid] - 1)
        except RegistryError as error:
            self.refuse(line, error)

    def _pause(self, listener: socket.socket) -> None:
        def again() -> None:
            if listener is self._listener and not self._loop.is_watched(listener.fileno()):
                self._loop.watch(listener.fileno(), Turn.LIFELINES, self._accept)

        self._loop.unwatch(listener.fileno())
        self._timers.after(ACCEPT_PAUSE_S, again)

    # the connections

    def _check_hello(self, line: Lifeline) -> None:
        """Close a connection that stays silent; one that was not heard yet is not silent."""
        if line.has_spoken or line.is_closed:
            return
        if line.has_unread():
            self._timers.after(HELLO_S, lambda: self._check_hello(line))
        else:
            line.close()

    def is_behind(self) -> bool:
        """Tell whether somebody who connected could not be heard yet: it may be one who resumes."""
        if self._listener is None:
            return False
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        return bool(poll.poll(0)) or any(line.has_unread() for line in self.lines if not line.has_spoken)

    def begin_turn(self) -> None:
        """Everybody may be heard again."""
        self._heard.clear()

    def may_read(self, line: Lifeline) -> bool:
        """Tell whether a connection's user may be heard (again) in this turn."""
        return self._heard[line.uid] < self._pace.lines

    def heard(self, line: Lifeline, lines: int) -> None:
        """Count what took as long as so many lines."""
        self._heard[line.uid] += lines

    def refuse(self, line: Lifeline, error: RegistryError) -> None:
        """Say why, and close. A client of ours says nothing wrong; one that is well comes back and resumes."""
        if not isinstance(error, QuotaError):  # which is logged where it is refused
            is_access = isinstance(error, PermissionDeniedError)
            kind = messages.ACCESS_REFUSED if is_access else messages.LINE_REFUSED
            level = logging.WARNING if is_access else logging.INFO
            extra = kind(code=error.code, uid=line.uid)
            self._quotas.log_once((error.code, line.uid), "refused a line: %s", error, level=level, extra=extra)
        line.refuse(error)

    def gone(self, line: Lifeline) -> None:
        """Forget a connection that has ended."""
        self.lines.discard(line)
        self._lines_of[line.uid] -= 1

    def close(self) -> None:
        """Tell all clients that the daemon stops, and close."""
        self.stop()
        self.path.remove()
        for line in list(self.lines):
            line.send({"op": "closing"})
            line.close()
