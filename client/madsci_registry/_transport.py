"""Requests and replies over ZeroMQ; the only zmq of the client.

A Channel is the request side of one connection to a daemon: a pool of REQ sockets, one per request under way. A socket
whose request was not answered (timeout, interrupt, the connection's end) is closed and never used again, so a late
reply cannot reach the wrong caller. IMMEDIATE: nothing is queued for a daemon that is not there; without it, requests
that had timed out while the daemon was down were run by the next daemon (design.md section 5).
"""

from __future__ import annotations

import os
import time
from collections import deque
from pathlib import Path
from typing import Any

import zmq

from madsci_registry.protocol import FRAME_MAX_BYTES

# sun_path of a Unix socket address holds 108 bytes with the closing NUL.
PATH_MAX_BYTES = 107

_NOBLOCK = int(zmq.NOBLOCK)
_RECONNECT_MS = 20
_FIRST_LOOK_MS = 20
"""An answer is awaited for so long in one call, which costs least; only then the end of the connection is looked at."""
_LONGEST_POLL_S = 3600.0

_context: zmq.Context[zmq.Socket[bytes]] | None = None
_graveyard: list[Any] = []


class NoAnswer(Exception):
    """A request got no reply. sent: the daemon may have done it; broken: because the connection ended."""

    def __init__(self, *, sent: bool, broken: bool) -> None:
        super().__init__()
        self.sent = sent
        self.broken = broken


class Reach:
    """An address of a Unix socket that the kernel takes, however long its path is.

    A long path is reached through a procfs link to its open folder; the folder stays open until `close`, because
    libzmq connects again by the same address.
    """

    def __init__(self, path: Path) -> None:
        self._folder: int | None = None
        self.address = str(path)
        if len(os.fsencode(path)) > PATH_MAX_BYTES:
            self._folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self.address = f"/proc/self/fd/{self._folder}/{path.name}"

    def close(self) -> None:
        """Let the folder go. Idempotent."""
        folder, self._folder = self._folder, None
        if folder is not None:
            os.close(folder)


class Channel:
    """REQ sockets to one daemon. Threads share it; `broken_fd` becomes readable when its connection has ended."""

    def __init__(self, socket: Path, broken_fd: int) -> None:
        self._reach = Reach(socket)
        self._broken_fd = broken_fd
        self._idle: deque[zmq.Socket[bytes]] = deque()
        self._closed = False
        self._context = _process_context()

    def exchange(self, frame: bytes, deadline: float) -> bytes:
        """Send a request and return its reply.

        Args:
            frame: the request.
            deadline: monotonic instant.

        Raises:
            NoAnswer: the deadline passed or the connection ended first.
        """
        try:
            socket = self._idle.pop()
        except IndexError:
            socket = self._connect()
        sent = False
        try:
            # The usual case, without asking whether it would block.
            try:
                socket.send(frame, _NOBLOCK)
            except zmq.Again:
                self._await(socket, zmq.POLLOUT, deadline, sent=False)
                socket.send(frame, _NOBLOCK)
            sent = True
            try:
                reply = socket.recv()  # for _FIRST_LOOK_MS
            except zmq.Again:
                self._await(socket, zmq.POLLIN, deadline, sent=True)
                reply = socket.recv(_NOBLOCK)
        except zmq.Again:
            socket.close()
            raise NoAnswer(sent=sent, broken=False) from None
        except BaseException:
            socket.close()
            raise
        self._idle.append(socket)
        if self._closed:
            self.close()
        return reply

    def close(self) -> None:
        """Close the idle sockets; those under way close themselves. Idempotent, callable from any thread."""
        self._closed = True
        while self._idle:
            try:
                self._idle.pop().close()
            except IndexError:
                break
        self._reach.close()

    def _connect(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.REQ)
        try:
            for option, value in (
                (zmq.REQ_RELAXED, 1),
                (zmq.REQ_CORRELATE, 1),
                (zmq.IMMEDIATE, 1),
                (zmq.LINGER, 0),
                (zmq.RECONNECT_IVL, _RECONNECT_MS),
                (zmq.RCVTIMEO, _FIRST_LOOK_MS),
            ):
                socket.setsockopt(option, value)
            socket.setsockopt(zmq.MAXMSGSIZE, FRAME_MAX_BYTES)
            socket.connect(f"ipc://{self._reach.address}")
        except BaseException:
            socket.close()
            raise
        return socket

    def _await(self, socket: zmq.Socket[bytes], event: int, deadline: float, *, sent: bool) -> None:
        while True:
            left_s = min(max(0.0, deadline - time.monotonic()), _LONGEST_POLL_S)
            wanted: list[tuple[Any, int]] = [(socket, event), (self._broken_fd, zmq.POLLIN)]
            ready = [what for what, _ in zmq.zmq_poll(wanted, int(left_s * 1000 + 0.999))]
            if socket in ready:
                return
            if ready:
                raise NoAnswer(sent=sent, broken=True)
            if time.monotonic() >= deadline:
                raise NoAnswer(sent=sent, broken=False)


def _process_context() -> zmq.Context[zmq.Socket[bytes]]:
    global _context
    if _context is None:
        _context = zmq.Context()
    return _context


def forget_parent() -> None:
    """Let a forked child make a context of its own; what it inherited is kept untouched, closing it would hang."""
    global _context
    _graveyard.append(_context)
    _context = None


def bury(thing: object) -> None:
    """Keep zmq objects that a forked child inherited from ever being collected."""
    _graveyard.append(thing)
