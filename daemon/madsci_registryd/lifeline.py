"""One connection of a lifeline: lines of JSON in, lines of JSON out, never waiting for a peer."""

from __future__ import annotations

import select
import socket
from contextlib import suppress
from typing import Any, Protocol

from madsci_registry import protocol as p
from madsci_registry.errors import InvalidError, RegistryError
from madsci_registryd.locks import Session
from madsci_registryd.loop import READ, WRITE, Loop

READ_BYTES = 1024
"""At once: some 30 lines, each of which may be a write. What is left in the socket wakes the loop again."""
UNREAD_MAX_BYTES = 1 << 20
"""What a client may leave unread before its connection is closed; it resumes and is told what it holds."""


class Owner(Protocol):
    """Who is told what happens on a connection."""

    def may_read(self, line: Lifeline) -> bool:
        """Tell whether its user may be heard (again) in this turn of the loop."""

    def said(self, line: Lifeline, text: bytes) -> None:
        """A whole line came."""

    def refused(self, code: str) -> None:
        """A connection is refused, with that code, and will be closed."""

    def closed(self, line: Lifeline) -> None:
        """The connection has ended, from whichever side."""


class Lifeline:
    """One connection: lines in, lines out."""

    def __init__(self, sock: socket.socket, loop: Loop, owner: Owner, uid: int) -> None:
        self.sock = sock
        self.uid = uid
        self.session: Session | None = None
        self.has_spoken = False
        """A whole line came."""
        self.is_closed = False
        self._loop = loop
        self._owner = owner
        self._in = bytearray()
        self._out = bytearray()

    def ready(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        if events & ~WRITE and not self.is_closed and self._owner.may_read(self):
            self._read()

    def _read(self) -> None:
        try:
            data = self.sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._in += data
        while not self.is_closed and (end := self._in.find(b"\n")) >= 0:
            text = bytes(self._in[:end])
            del self._in[: end + 1]
            self.has_spoken = True
            self._owner.said(self, text)
        if len(self._in) > p.LINE_MAX_BYTES:
            self.refuse(InvalidError("line: too long", field="line"))

    def refuse(self, error: RegistryError) -> None:
        """Say why, and cut the connection."""
        self._owner.refused(error.code)
        self.send({"op": "refused", "error": error.to_wire()})
        self.close()

    def send(self, message: dict[str, Any]) -> None:
        """Send a line; a client that does not read is cut off."""
        if self.is_closed:
            return
        if len(self._out) > UNREAD_MAX_BYTES:
            self.close()
            return
        self._out += p.encode(message) + b"\n"
        self._flush()

    def _flush(self) -> None:
        if self.is_closed:
            return
        with suppress(BlockingIOError):
            try:
                while self._out:
                    del self._out[: self.sock.send(self._out)]
            except BlockingIOError:
                raise
            except OSError:  # whatever the kernel says of one peer's connection, the daemon serves the others
                self._out.clear()
        self._loop.change(self.sock.fileno(), READ | WRITE if self._out else READ)

    def has_unread(self) -> bool:
        """Tell whether it said something that was not read yet."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Cut the connection, for whoever else has it open too. Idempotent."""
        if self.is_closed:
            return
        self.is_closed = True
        self._loop.unwatch(self.sock.fileno())
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        self._owner.closed(self)
