"""One connection to a daemon: its lifeline, which is the session, and the channel for requests that belongs to it.

A Connection begins with hello or resume and ends once, for good: all requests under way on it fail at once. What is
written to the lifeline later (cancel, release, bye) is one small send that never blocks and takes no lock, so that it
may come from atexit, `__del__` and signal handlers; where even that finds no room, the connection is ended, and the
next resume tells the daemon the same.
"""

from __future__ import annotations

import math
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from madsci_registry import protocol
from madsci_registry._grants import Key
from madsci_registry._permission import closed_to_you
from madsci_registry._transport import Channel, Reach
from madsci_registry.errors import RegistryTimeoutError, UnavailableError, from_wire

_READ_BYTES = 65536
WELCOME_MAX_BYTES = 64 << 20
"""The daemon's longest line: a welcome that lists 200,000 locks."""

_LOOK_S = 0.5
"""Longest wait for another thread that is just reading."""

Take = Callable[["Connection", dict[str, Any]], None]

_open_sockets: set[socket.socket] = set()


class Absent(Exception):
    """Nobody listens at the lifeline's path."""


class Connection:
    """A lifeline that was welcomed. Threads share it; `fail` ends it."""

    def __init__(self, stream: _Stream, welcome: dict[str, Any], token: str, request_socket: Path) -> None:
        self._stream = stream
        self.session: str = welcome["session"]
        self.token = token
        self.epoch: int = welcome["epoch"]
        self.stamp = {"v": protocol.PROTOCOL_VERSION, "token": token, "epoch": self.epoch}
        """What every request over this connection carries."""
        self.stamp_json = protocol.encode(self.stamp).decode().strip("{}")
        self.said_held = [_key_and_token(lock) for lock in welcome.get("held", [])]
        """What the daemon says this process holds: ((instance, name), fencing_token)."""
        self.said_in_lab = {_key_and_token(lock): lock.get("lab") for lock in welcome.get("held", [])}
        """How that stands in the lab."""
        self.said_renamed: list[dict[str, Any]] = welcome.get("renamed", [])
        """What of that was renamed, or got a higher token, while the connection was down."""
        self.grace_s: float | None = welcome.get("grace_s")
        """How long after the connection's end the locks are still ours; None: as long as this process lives."""
        self.broken = False
        self.broken_at = math.inf
        """Monotonic instant at which the end was noticed."""
        self._reading = threading.RLock()
        self._is_reading = False
        self._broken_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self.channel = Channel(request_socket, self._broken_fd)
        except BaseException:
            os.close(self._broken_fd)
            raise

    def __del__(self) -> None:
        # Only now: threads that still poll it hold a reference.
        if hasattr(self, "channel"):
            os.close(self._broken_fd)

    def fail(self) -> None:
        """End the connection, here and now, and with it all requests under way. Idempotent, from any thread."""
        if not self.broken:
            self.broken_at = time.monotonic()
        self.broken = True
        os.eventfd_write(self._broken_fd, 1)
        self._stream.end()
        self.channel.close()

    def say(self, line: protocol.Cancel | protocol.LifelineRelease | protocol.Bye) -> None:
        """Send a line if that is possible without waiting; the daemon does not answer it."""
        if not self.broken and not self._stream.try_send(protocol.encode(line) + b"\n"):
            self.fail()

    def listen(self, take: Take) -> None:
        """Give `take` what the daemon says, line by line, until the connection ends; then end it here too."""
        while not self.broken:
            self.look(take)
            self._stream.wait()

    def look(self, take: Take) -> None:
        """Give `take` what has come and nobody has read, without waiting for more; any thread may.

        So a process that was frozen knows what happened meanwhile before its listening thread is awake.
        """
        if not self._reading.acquire(timeout=_LOOK_S):
            return  # at interpreter shutdown whoever reads may never go on
        try:
            if self._is_reading:
                return  # a signal handler in the middle of it
            self._is_reading = True
            try:
                for line in self._stream.lines_there():
                    take(self, protocol.decode(line))
            except (OSError, ValueError):
                self.fail()
            except BaseException:  # a signal handler raised in the middle of a line: the resume will tell it again
                self.fail()
                raise
            finally:
                self._is_reading = False
        finally:
            self._reading.release()

    def close(self) -> None:
        """Close the lifeline's descriptor; only for the thread that reads it."""
        self._stream.close()


class _Stream:
    """The socket of a lifeline, line by line."""

    def __init__(self, path: Path, deadline: float) -> None:
        self._buffer = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        _open_sockets.add(self._socket)
        reach = None
        try:
            self._socket.settimeout(_left_s(deadline))
            reach = Reach(path)
            self._socket.connect(reach.address)
        except BaseException:
            self.close()
            raise
        finally:
            if reach is not None:
                reach.close()

    def send(self, data: bytes, deadline: float) -> None:
        self._socket.settimeout(_left_s(deadline))
        self._socket.sendall(data)

    def wait_for_ever(self) -> None:
        # With a timeout set, Python would wait for room in spite of MSG_DONTWAIT.
        self._socket.settimeout(None)

    def try_send(self, data: bytes) -> bool:
        try:
            return self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) == len(data)
        except OSError:
            return False

    def read_line(self, deadline: float) -> bytes | None:
        """Return the next line, None at the end. Raises OSError, ValueError for an endless line."""
        while (line := self._buffered_line()) is None:
            self._socket.settimeout(_left_s(deadline))
            part = self._socket.recv(_READ_BYTES)
            if not part:
                return None
            self._buffer += part
        return line

    def lines_there(self) -> Iterator[bytes]:
        """Yield the lines that have come, without waiting. Raises OSError at the end, ValueError as `read_line`."""
        while True:
            while (line := self._buffered_line()) is not None:
                yield line
            try:
                part = self._socket.recv(_READ_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            if not part:
                raise ConnectionResetError("the daemon went away")
            self._buffer += part

    def _buffered_line(self) -> bytes | None:
        end = self._buffer.find(b"\n")
        if end < 0:
            if len(self._buffer) > WELCOME_MAX_BYTES:
                raise ValueError("a line of the daemon is too long")
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def wait(self) -> None:
        """Wait until something comes, or the end."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.poll()

    def end(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def close(self) -> None:
        _open_sockets.discard(self._socket)
        self._socket.close()


def connect(
    lifeline: Path,
    request_socket: Path,
    opening: protocol.Hello | protocol.Resume,
    deadline: float,
) -> Connection:
    """Connect to a daemon and begin, or go on with, a session.

    Args:
        lifeline: path of NAME.life.
        request_socket: path of NAME.sock.
        opening: what to say first.
        deadline: monotonic instant until which the daemon has to answer.

    Raises:
        Absent: nobody listens there, or who did went away.
        RegistryError: what the daemon refused with; PermissionDeniedError; RegistryTimeoutError: it does not answer.
    """
    try:
        stream = _Stream(lifeline, deadline)
        try:
            with suppress(BrokenPipeError):  # who is refused at once may find that before it has spoken
                stream.send(protocol.encode(opening) + b"\n", deadline)
            welcome = _welcome(stream, deadline)
            stream.wait_for_ever()
            token = opening.token if isinstance(opening, protocol.Resume) else welcome["token"]
            return Connection(stream, welcome, token, request_socket)
        except BaseException:
            stream.close()
            raise
    except (KeyError, TypeError):  # a welcome that lacks something
        raise UnavailableError("what listens there speaks another language: its welcome is none") from None
    except TimeoutError:
        raise RegistryTimeoutError(f"the daemon at {lifeline} does not answer") from None
    except PermissionError:
        raise closed_to_you(lifeline) from None
    except OSError as error:
        raise Absent(error.strerror) from None


def _welcome(stream: _Stream, deadline: float) -> dict[str, Any]:
    try:
        line = stream.read_line(deadline)
        answer = None if line is None else protocol.decode(line)
    except ValueError as error:
        raise UnavailableError(f"what listens there speaks another language: {error}") from None
    if answer is None:
        raise ConnectionResetError("the daemon went away")
    match answer:
        case {"op": "refused", "error": dict(refusal)}:
            raise from_wire(refusal)
        case {"op": "welcome", "session": str(), "epoch": int()}:
            return answer
    raise UnavailableError("what listens there speaks another language: it did not say welcome")


def _key_and_token(lock: dict[str, Any]) -> tuple[Key, int]:
    return Key(lock["instance"], lock["name"]), lock["fencing_token"]


def _left_s(deadline: float) -> float | None:
    # 0 would mean "do not block" to a socket: a deadline that has passed still gets a millisecond.
    left_s = max(0.001, deadline - time.monotonic())
    return None if left_s > 1e6 else left_s


def forget_parent() -> None:
    """Close a forked child's copies of its parent's lifelines, so that it does not keep them open."""
    for inherited in list(_open_sockets):
        inherited.close()
    _open_sockets.clear()
