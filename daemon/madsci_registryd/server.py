"""The ZeroMQ side: frames in, frames out. The only module of the daemon that imports zmq.

A request is [routing id, (correlation id,) empty, body]; its answer goes back behind the same envelope, whenever it
is ready: that is why this is a ROUTER. What a frame means is the handlers' business, whose it is the token says: a
routing id proves nothing and is only echoed.

The ROUTER's descriptor in the epoll is edge-triggered: any call into the socket may use up the edge, so `has_input`
is asked before every wait.
"""

from __future__ import annotations

import ctypes
import logging
import os
import socket
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import zmq
from pydantic_core import to_json

from madsci_registry.errors import BusyError, InternalError, RegistryError
from madsci_registry.protocol import FRAME_MAX_BYTES
from madsci_registryd import messages
from madsci_registryd.admission import Admission
from madsci_registryd.clock import Clock
from madsci_registryd.fairness import FairQueue
from madsci_registryd.quotas import Quotas
from madsci_registryd.sockets import ListeningPath

log = logging.getLogger(__name__)

Handle = Callable[[bytes, Callable[[dict[str, Any]], None]], "int | None"]
"""Does a request, calls its second argument with the answer, now or later, and says whose it was."""

FRAMES_A_TURN = 256
"""So many requests share a commit at most: about 20 ms of work, so that a death is not kept waiting longer."""
FAIR_FRAMES_A_TURN = 20
READING_S = 0.0005
TURN_S = 0.0015
"""Where users take turns: so long requests are read, then so long or so many are done, before deaths and new
ones are looked at again. So many changes take 1 ms in their batch."""
STRANGERS_REQUESTS = 4
STRANGERS_BYTES = 128 << 20
"""What is kept of a connection before it is known whose it is, and while so much waits in all."""
_POLLIN, _EVENTS, _RCVMORE, _NOBLOCK = int(zmq.POLLIN), int(zmq.EVENTS), int(zmq.RCVMORE), int(zmq.NOBLOCK)
_SEND_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
HANDSHAKE_MS = 2000
SEND_QUEUE = 64
"""Answers for one peer that does not read; a REQ has one at a time."""


class Server:
    """The ROUTER. One thread."""

    def __init__(self, path: ListeningPath, admission: Admission, quotas: Quotas, clock: Clock) -> None:
        self._path = path
        self._admission = admission
        self._listening: socket.socket | None = None
        self._quotas = quotas
        self._clock = clock
        self.is_busy: Callable[[int], bool] = lambda uid: False
        """Tells of a user who may come that its next request should wait for others that are under way."""
        self._queue: FairQueue[list[bytes]] = FairQueue()
        """What was read and is not done yet: only where several users may come, and take turns."""
        self._is_known_empty = False
        # libzmq takes its first routing id from rand(), which is the same at every start unless seeded; a peer that
        # chooses the next automatic id for itself aborts the process.
        ctypes.CDLL(None).srand(int.from_bytes(os.urandom(4), "little"))
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 1 << 16)
        self._router = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 200),  # the last answers of a shutdown get this long
            (zmq.MAXMSGSIZE, FRAME_MAX_BYTES),
            (zmq.HANDSHAKE_IVL, HANDSHAKE_MS),
            (zmq.SNDHWM, SEND_QUEUE),
            (zmq.RCVHWM, SEND_QUEUE),
            (zmq.ROUTER_MANDATORY, 1),
        ):
            self._router.setsockopt(option, value)
        self._let_in(admission)

    @property
    def fd(self) -> int:
        return int(self._router.getsockopt(zmq.FD))

    def bind(self) -> None:
        """Listen at the path; again, where its socket file went: connections that are up stay up."""
        before, self._listening = self._listening, self._path.listen(self._admission.modes)
        if before is not None:
            before.close()
        self._listen()

    def _listen(self) -> None:
        assert self._listening is not None
        self._router.setsockopt(zmq.USE_FD, os.dup(self._listening.fileno()))  # libzmq closes its copy
        self._router.bind(f"ipc://{self._path.address()}")
        self._endpoint = bytes(self._router.getsockopt(zmq.LAST_ENDPOINT))
        self._is_known_empty = False

    def admit(self, admission: Admission) -> None:
        """Let in more users from now on; fewer only after a restart, but the hello refuses them at once. Who connects
        meanwhile waits in the socket's backlog."""
        self._let_in(admission)
        self._path.give(admission.modes)
        self._router.unbind(self._endpoint)
        self._listen()

    def _let_in(self, admission: Admission) -> None:
        """Who would be refused at the hello is cut off at once: it cannot use up our descriptors either."""
        self._admission = admission
        self._is_shared = admission.uids is None or len(admission.allow_uids) > 0
        for uid in admission.uids or ():
            self._router.setsockopt(zmq.IPC_FILTER_UID, uid)

    @property
    def path(self) -> ListeningPath:
        return self._path

    def has_input(self) -> bool:
        """Tell whether a request can be read at once."""
        return self._next_user() is not None or self._can_read()

    def _next_user(self) -> Hashable | None:
        return self._queue.next_user(lambda user: not (isinstance(user, int) and self.is_busy(user)))

    def _can_read(self) -> bool:
        if self._is_known_empty:
            return False
        if int(self._router.getsockopt(_EVENTS)) & _POLLIN:
            return True
        self._is_known_empty = True
        return False

    def wake(self, events: int) -> None:
        """The descriptor says that there may be something to read."""
        self._is_known_empty = False

    def drain(self, handle: Handle) -> None:
        """Give the requests that are there to `handle(body, answer)`, a bounded number of them."""
        if self._is_shared:
            self._drain_fairly(handle)
            return
        for n in range(FRAMES_A_TURN):
            frames = self._next(first=not n)
            if frames is None:
                return
            if frames:
                handle(frames[-1], partial(self._answer, frames))

    def _drain_fairly(self, handle: Handle) -> None:
        until = self._clock.monotonic() + READING_S
        is_first = True
        while is_first or self._clock.monotonic() < until:
            frames = self._next(first=is_first)
            is_first = False
            if frames is None:
                break
            if frames:
                self._enqueue(frames)
        until = self._clock.monotonic() + TURN_S
        for _ in range(FAIR_FRAMES_A_TURN):
            user = self._next_user()
            if user is None:
                return
            frames = self._queue.take(user)
            uid = handle(frames[-1], partial(self._answer, frames))
            if uid is not None:
                self._queue.know(frames[0], uid)
            if self._clock.monotonic() >= until:
                return

    def _enqueue(self, frames: list[bytes]) -> None:
        queue, user = self._queue, self._queue.user_of(frames[0])
        try:
            if isinstance(user, int):
                self._quotas.check(user, "requests", queue.waiting(user))
                self._quotas.check(user, "bytes", queue.bytes_of(user))
            elif queue.waiting(user) >= STRANGERS_REQUESTS or queue.size_bytes > STRANGERS_BYTES:
                raise BusyError("too many requests wait; try again")
        except RegistryError as error:
            self._answer(frames, {"error": error.to_wire()})
        else:
            queue.put(user, frames, len(frames[-1]))

    def _next(self, *, first: bool) -> list[bytes] | None:
        """Read a request, None where there is none, an empty one where it is nonsense."""
        if self._is_known_empty or not (first or self._can_read()):  # the first is just tried: mostly it is there
            return None
        try:
            frames = self._receive()
        except zmq.Again:
            self._is_known_empty = True
            return None
        if 3 <= len(frames) <= 4 and frames[-2] == b"":
            return frames
        log.debug("dropped a message of %d frames", len(frames))
        return []

    def _receive(self) -> list[bytes]:
        # As recv_multipart does, but flags are plain ints: arithmetic on zmq's enums costs 10 us a message.
        recv, more = self._router.recv, self._router.getsockopt
        frames = [recv(_NOBLOCK), recv(_NOBLOCK)]  # a ROUTER's first frame is never the last
        while more(_RCVMORE):
            frames.append(recv(_NOBLOCK))
        return frames

    def _answer(self, frames: list[bytes], reply: dict[str, Any]) -> None:
        body = to_json(reply)
        if len(body) > FRAME_MAX_BYTES:
            log.error("an answer of %d bytes does not fit a frame", len(body), extra=messages.ANSWER_TOO_LARGE())
            body = to_json({"error": InternalError("the answer is too large for a frame").to_wire()})
        frames[-1] = body
        self._is_known_empty = False  # sending may use up the edge
        try:
            for frame in frames[:-1]:
                self._router.send(frame, _SEND_MORE)
            self._router.send(body, _NOBLOCK)
        except zmq.ZMQError as error:
            log.debug("an answer found nobody: %s", error)  # the asker is gone, or does not read

    def close(self) -> None:
        """Send what is still to be sent, for a moment at most, and close."""
        self._path.remove()
        if self._listening is not None:
            self._listening.close()
        self._router.close()
        self._context.term()
