"""Where log messages go: to the journal by its native protocol, where stderr is the journal's, else to stderr.

The journal's native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL) is a datagram of fields. Each value is sent behind
its length, so that none can begin another field; on stderr, as in MESSAGE, whatever is not printable is escaped, and
the lines of a traceback are indented, so that none can look like a line of ours. The ready-made handlers either need a
C compiler or a large binary, or make up a MESSAGE_ID from the text and wait for a journal that does not read: the loop
must not.

What anybody who may connect can cause is logged LINES_A_MINUTE times a minute at most, each kind of message by itself.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

from madsci_registryd import messages
from madsci_registryd.clock import Clock, SystemClock

log = logging.getLogger(__name__)

SOCKET = Path("/run/systemd/journal/socket")
LINES_A_MINUTE = 30
MESSAGE_MAX = 32_000
FACT_MAX = 4096
"""Characters. So a datagram stays below the 208 KiB that a Unix socket takes by default, and needs no memfd."""
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG = 7


class Journal:
    """Sends entries to journald. One thread at a time."""

    def __init__(self, path: Path = SOCKET) -> None:
        self._path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)

    def send(self, entry: list[tuple[str, str]]) -> None:
        """Send an entry, or drop it where the journal does not read.

        Raises: OSError where there is no journal.
        """
        with suppress(BlockingIOError):  # the loop does not wait for it
            self._socket.sendto(packed(entry), self._path)

    def close(self) -> None:
        self._socket.close()


def packed(entry: list[tuple[str, str]]) -> bytes:
    """Return an entry as the native protocol has it, each value behind its length."""
    out = bytearray()
    for field, text in entry:
        value = text.encode("utf-8", "backslashreplace")
        out += field.encode() + b"\n" + struct.pack("<Q", len(value)) + value + b"\n"
    return bytes(out)


class Sparing:
    """Lets each kind of message through LINES_A_MINUTE times a minute. One thread at a time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since = 0.0
        self._counts: dict[str, int] = {}

    def left_out(self, kind: str) -> int | None:
        """Say how many of a kind were left out before this one; None: leave this one out."""
        now = self._clock.monotonic()
        if now - self._since >= 60.0:
            self._since = now
            # What was cut is carried over, to be told with the next one of its kind.
            self._counts = {k: LINES_A_MINUTE - n for k, n in self._counts.items() if n > LINES_A_MINUTE}
        count = self._counts.get(kind, 0)
        self._counts[kind] = max(count, 0) + 1
        if count >= LINES_A_MINUTE:
            return None
        return max(-count, 0)


class Handler(logging.Handler):
    """Writes what is logged, by any thread, to the journal or to a stream."""

    def __init__(self, stream: TextIO, journal: Journal | None, clock: Clock) -> None:
        super().__init__()
        self.registry = ""
        """Which one it is about, once that is known."""
        self.journal = journal
        self._stream = stream
        self._sparing = Sparing(clock)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message. Never raises: what can be written nowhere is lost."""
        try:
            text = self._text(record)
            if text is not None and not self._to_journal(record, text):
                self._stream.write(stderr_lines(record, text))
                self._stream.flush()
        except (OSError, ValueError):  # stderr is closed or full; a log line is no reason to end
            pass

    def _text(self, record: logging.LogRecord) -> str | None:
        text = escaped(record.getMessage())[:MESSAGE_MAX]
        if record.levelno < logging.INFO:
            return text
        rare = getattr(record, "rare", None)
        left_out = self._sparing.left_out(f"{record.name} {record.msg} {rare.name if rare else ''}")
        if left_out is None:
            return None
        return f"{text} (and {left_out} more of these were left out before)" if left_out else text

    def _to_journal(self, record: logging.LogRecord, text: str) -> bool:
        if self.journal is None:
            return False
        try:
            self.journal.send(entry_of(record, text, self.registry))
        except OSError:
            return False
        return True


def entry_of(record: logging.LogRecord, text: str, registry: str) -> list[tuple[str, str]]:
    """Return a message as fields of the journal."""
    entry = [
        ("MESSAGE", "\n".join([text, *traceback_of(record)])[:MESSAGE_MAX]),
        ("PRIORITY", str(next((number for level, number in _PRIORITIES if record.levelno >= level), _DEBUG))),
        ("SYSLOG_IDENTIFIER", "madsci-registryd"),
        ("CODE_MODULE", record.name),
        ("CODE_FUNC", str(record.funcName)),
    ]
    if registry:
        entry.append(("MADSCI_REGISTRY", registry))
    rare = getattr(record, "rare", None)
    if rare is not None:
        entry += [("MESSAGE_ID", rare.id), ("MADSCI_MESSAGE", rare.name)]
        entry += [(f"MADSCI_{key.upper()}", str(value)[:FACT_MAX]) for key, value in _facts(record)]
    return entry


def _facts(record: logging.LogRecord) -> Iterator[tuple[str, object]]:
    yield from ((key, value) for key, value in getattr(record, "facts", {}).items() if value is not None)


def stderr_lines(record: logging.LogRecord, text: str) -> str:
    """Return a message as it stands on stderr: one line, and a traceback's lines indented below it."""
    at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    rare = getattr(record, "rare", None)
    id = f"id={rare.name} " if rare is not None else ""
    head = f"{at}.{int(record.msecs):03d}Z level={record.levelname} pid={record.process} at={record.name} {id}{text}"
    return "\n".join([head, *(f"    {line}" for line in traceback_of(record))]) + "\n"


def traceback_of(record: logging.LogRecord) -> list[str]:
    """List the lines of a message's traceback, without what is not printable."""
    if not record.exc_info or record.exc_info[0] is None:
        return []
    return [escaped(line) for line in "".join(traceback.format_exception(*record.exc_info)).split("\n")[:-1]]


def escaped(text: str) -> str:
    """Return text as one line of printable characters."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_journal(stream: TextIO, named: tuple[int, int] | None) -> bool:
    """Tell whether a stream is the one that the journal named by device and inode (JOURNAL_STREAM)."""
    if named is None:
        return False
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return (found.st_dev, found.st_ino) == named


def set_up(named: tuple[int, int] | None) -> Handler:
    """Have this process log from now on, to the journal where it reads our stderr: `named` is the stream it reads.

    What ends the process by a fault of ours is logged as well.
    """
    is_there = is_journal(sys.stderr, named) and SOCKET.exists()
    handler = Handler(sys.stderr, Journal() if is_there else None, SystemClock())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    sys.excepthook = _log_fault
    return handler


def _log_fault(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    log.critical("a fault of the program ends it", exc_info=(kind, error, trace), extra=messages.FAULT())


def is_in_use() -> bool:
    """Tell whether this process logs to the journal."""
    return any(isinstance(handler, Handler) and handler.journal for handler in logging.getLogger().handlers)
