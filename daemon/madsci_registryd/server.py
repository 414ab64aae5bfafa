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

from madsci_registry.errors import InternalError
from madsci_registry.protocol import FRAME_MAX_BYTES
from madsci_registryd.sockets import ListeningPath

log = logging.getLogger(__name__)

FRAMES_A_TURN = 256
"""So many requests share a commit at most: about 20 ms of work, so that a death is not kept waiting longer."""
_POLLIN, _EVENTS, _RCVMORE, _NOBLOCK = int(zmq.POLLIN), int(zmq.EVENTS), int(zmq.RCVMORE), int(zmq.NOBLOCK)
_SEND_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
HANDSHAKE_MS = 2000
SEND_QUEUE = 64
"""Answers for one peer that does not read; a REQ has one at a time."""


class Server:
    """The ROUTER. One thread."""

    def __init__(self, path: ListeningPath) -> None:
        self._path = path
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

    @property
    def fd(self) -> int:
        return int(self._router.getsockopt(zmq.FD))

    def bind(self) -> None:
        """Listen at the path; again, where its socket file went: connections that are up stay up."""
        self._router.setsockopt(zmq.USE_FD, self._path.listen().detach())  # libzmq closes it
        self._router.bind(f"ipc://{self._path.address()}")
        self._is_known_empty = False

    @property
    def path(self) -> ListeningPath:
        return self._path

    def has_input(self) -> bool:
        """Tell whether a request can be read at once."""
        if self._is_known_empty:
            return False
        if int(self._router.getsockopt(_EVENTS)) & _POLLIN:
            return True
        self._is_known_empty = True
        return False

    def wake(self, events: int) -> None:
        """The descriptor says that there may be something to read."""
        self._is_known_empty = False

    def drain(self, handle: Callable[[bytes, Callable[[dict[str, Any]], None]], None]) -> None:
        """Give the requests that are there to `handle(body, answer)`, a bounded number of them."""
        for n in range(FRAMES_A_TURN):
            if self._is_known_empty or (n and not self.has_input()):  # the first is just tried: mostly it is there
                return
            try:
                frames = self._receive()
            except zmq.Again:
                self._is_known_empty = True
                return
            if 3 <= len(frames) <= 4 and frames[-2] == b"":
                handle(frames[-1], partial(self._answer, frames))
            else:
                log.debug("dropped a message of %d frames", len(frames))

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
            log.error("an answer of %d bytes does not fit a frame", len(body))
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
