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
from collections.abc import Callable
from functools import partial
from typing import Any

import zmq
from pydantic_core import to_json

from madsci_registry.errors import InternalError, RegistryError, SessionRequiredError, TooLargeError
from madsci_registry.protocol import FRAME_MAX_BYTES
from madsci_registryd import messages
from madsci_registryd.admission import Admission
from madsci_registryd.clock import Clock
from madsci_registryd.fairness import FairQueue
from madsci_registryd.locks import Session
from madsci_registryd.quotas import Quotas
from madsci_registryd.sockets import ListeningPath

log = logging.getLogger(__name__)

Handle = Callable[[bytes, Callable[[dict[str, Any]], None]], None]
"""Does a request, and calls its second argument with the answer, now or later."""

FRAMES_A_TURN = 256
"""So many requests share a commit at most: about 20 ms of work, so that a death is not kept waiting longer."""
FAIR_FRAMES_A_TURN = 20
READING_S = 0.0005
TURN_S = 0.0015
"""Where users take turns: so long requests are read, then so long or so many are done, before deaths and new
ones are looked at again. So many changes take 1 ms in their batch."""
FRAME_OF_A_USER_BYTES = 64 * 1024
"""Of a user who is no administrator, where several may come: larger ones take the others' time."""
TURN_BYTES = 64 * 1024
"""And requests of so many bytes: a kilobyte of metadata takes some 30 us."""
STRANGER = -1
"""All who send requests that no session sent: they share one turn."""
STRANGERS_REQUESTS = 16
STRANGERS_BYTES = 4096
FRAMES_A_MESSAGE = 4
_POLLIN, _EVENTS, _RCVMORE, _NOBLOCK = int(zmq.POLLIN), int(zmq.EVENTS), int(zmq.RCVMORE), int(zmq.NOBLOCK)
_SEND_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
HANDSHAKE_MS = 2000
RECEIVE_QUEUE = 2
SEND_QUEUE = 4
"""Messages of one connection that libzmq keeps, of a megabyte each at most; a REQ has one at a time."""


class Server:
    """The ROUTER. One thread."""

    def __init__(self, path: ListeningPath, admission: Admission, quotas: Quotas, clock: Clock) -> None:
        self._path = path
        self._modes = admission.modes
        self._is_shared = admission.is_shared
        self._quotas = quotas
        self._clock = clock
        self.is_busy: Callable[[int], bool] = lambda uid: False
        """Tells of a user who may come that its next request should wait for others that are under way."""
        self.session_of: Callable[[bytes], Session | None] = lambda body: None
        """Tells which session sent a request, None where none did."""
        self._queue: FairQueue[list[bytes]] = FairQueue()
        """What was read and is not done yet: only where several users may come, and take turns."""
        self._is_skipping = False
        """In the middle of a message of too many frames."""
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
            (zmq.RCVHWM, RECEIVE_QUEUE),
            (zmq.ROUTER_MANDATORY, 1),
        ):
            self._router.setsockopt(option, value)
        for uid in admission.uids or ():
            # Who would be refused at the hello is cut off at once: it cannot use up our descriptors either.
            self._router.setsockopt(zmq.IPC_FILTER_UID, uid)

    @property
    def fd(self) -> int:
        return int(self._router.getsockopt(zmq.FD))

    def bind(self) -> None:
        """Listen at the path; again, where its socket file went: connections that are up stay up."""
        self._router.setsockopt(zmq.USE_FD, self._path.listen(self._modes).detach())  # libzmq closes it
        self._router.bind(f"ipc://{self._path.address()}")
        self._is_known_empty = False

    @property
    def path(self) -> ListeningPath:
        return self._path

    def has_input(self) -> bool:
        """Tell whether a request can be read at once."""
        return self._next_user() is not None or self._can_read()

    def _next_user(self) -> int | None:
        return self._queue.next_user(lambda user: not self.is_busy(user))

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
        until, left_bytes = self._clock.monotonic() + TURN_S, TURN_BYTES
        for _ in range(FAIR_FRAMES_A_TURN):
            user = self._next_user()
            if user is None:
                return
            frames, size_bytes = self._queue.take(user)
            handle(frames[-1], partial(self._answer, frames))
            left_bytes -= size_bytes
            if left_bytes <= 0 or self._clock.monotonic() >= until:
                return

    def _enqueue(self, frames: list[bytes]) -> None:
        body = frames[-1]
        who = self.session_of(body)
        user = STRANGER if who is None else who.uid
        try:
            if who is None:
                if self._queue.waiting(user) >= STRANGERS_REQUESTS or len(body) > STRANGERS_BYTES:
                    raise SessionRequiredError("no session has this token: say hello or resume first")
            else:
                if len(body) > FRAME_OF_A_USER_BYTES and not who.is_admin:
                    raise TooLargeError(
                        f"frame: {len(body)} bytes, at most {FRAME_OF_A_USER_BYTES} here", field="frame"
                    )
                self._quotas.check(user, "requests", self._queue.waiting(user))
                self._quotas.check(user, "bytes", self._queue.bytes_of(user))
        except RegistryError as error:
            self._answer(frames, {"error": error.to_wire()})
        else:
            self._queue.put(user, frames, len(body))

    def _next(self, *, first: bool) -> list[bytes] | None:
        """Read a request, None where there is none, an empty one where it is nonsense."""
        if self._is_known_empty or not (first or self._can_read()):  # the first is just tried: mostly it is there
            return None
        try:
            frames = self._skip() if self._is_skipping else self._receive()
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
            if len(frames) > FRAMES_A_MESSAGE:
                self._is_skipping = True
                return self._skip()
        return frames

    def _skip(self) -> list[bytes]:
        """Read a message that has too many frames on, some of them now, the rest in the next turns."""
        for _ in range(FRAMES_A_TURN):
            if not self._router.getsockopt(_RCVMORE):
                self._is_skipping = False
                return []
            self._router.recv(_NOBLOCK)
        return []

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
        self._router.close()
        self._context.term()
