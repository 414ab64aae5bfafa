"""What registry.json held just before it was torn: a copy, taken as soon as somebody has written it.

An old program empties the file, then writes it. One that is killed in between leaves nothing of what others wrote since
our last look. So the kernel tells a thread when somebody who wrote the file closes it (inotify), and that copies it
then: without the file's lock, since old programs wait for that, and unparsed. A pass that finds the file torn takes in
what the copy has and we do not know. Where there is no inotify, there is no copy, and all else is the same.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from madsci_registryd import messages
from madsci_registryd.registry_file import FileFault, RegistryFile

COPY_MAX_BYTES = 16 << 20
"""Some 50,000 names. A larger file takes an old program many seconds to write, and is looked at in between."""

IN_CLOSE_WRITE = 0x8
IN_MOVED_TO = 0x80
IN_Q_OVERFLOW = 0x4000
IN_IGNORED = 0x8000

_EVENT = struct.Struct("iIII")
_libc = ctypes.CDLL(None, use_errno=True)

log = logging.getLogger(__name__)


class FileWatch:
    """The last whole content of a registry.json that no pass has read, kept by a thread from `start()` to `stop()`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._copy: bytes | None = None
        self._mutex = threading.Lock()
        self._file: RegistryFile | None = None
        """With what follows, while it is watched."""
        self._fd = self._watch = -1
        self._thread: threading.Thread
        self._fault: str | None = None

    @property
    def is_on(self) -> bool:
        """A thread watches the folder, which is there."""
        return self._file is not None and not self._file.is_gone and self._thread.is_alive()

    def start(self) -> None:
        """Watch the folder, if it is not watched already; where that cannot be, nothing happens."""
        if self.is_on:
            return
        self.stop()
        try:
            file = RegistryFile(self.path)
            try:
                self._fd, self._watch = watch_folder(self.path.parent, IN_CLOSE_WRITE | IN_MOVED_TO)
            except OSError:
                file.close()
                raise
        except (FileFault, OSError) as error:
            if str(error) != self._fault:
                log.info("registry.json is looked at four times a second, but not watched: %s", error)
            self._fault = str(error)
            return
        self._file, self._fault = file, None
        self._thread = threading.Thread(target=self._run, args=(file,), name="registry.json watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watching and forget the copy. Idempotent."""
        if self._file is not None:
            _libc.inotify_rm_watch(self._fd, self._watch)  # the last event tells the thread
            self._thread.join()
            os.close(self._fd)
            self._file.close()
            self._file = None
        self.forget()

    def copy(self) -> bytes | None:
        """Return what the file held when it was whole last, if that was after the last `forget()`."""
        with self._mutex:
            return self._copy

    def forget(self) -> None:
        """A pass knows the file as it is; called while it has the file's lock, so nobody can have written since."""
        with self._mutex:
            self._copy = None

    def take(self, file: RegistryFile) -> None:
        """Copy the file; where it is torn, too large, or changes meanwhile, an earlier copy stays."""
        with self._mutex, suppress(FileFault):
            read = file.read(COPY_MAX_BYTES, settled=True)
            if read is not None and _seems_whole(read[0]):
                self._copy = read[0]

    def _run(self, file: RegistryFile) -> None:
        name = os.fsencode(self.path.name)
        try:
            self.take(file)
            while True:
                events = list(read_events(self._fd))
                if any(what == name or mask & IN_Q_OVERFLOW for mask, what in events):
                    self.take(file)
                if any(mask & IN_IGNORED for mask, _ in events):
                    return
        except Exception:  # the outer loop of the thread: the next look starts another one
            log.exception("the watching of registry.json broke", extra=messages.FAULT())


def watch_folder(folder: Path, mask: int) -> tuple[int, int]:
    """Return a descriptor of inotify, and the watch on a folder. Raises: OSError."""
    fd = _checked(_libc.inotify_init1(os.O_CLOEXEC))
    try:
        return fd, _checked(_libc.inotify_add_watch(fd, os.fsencode(folder), mask))
    except OSError:
        os.close(fd)
        raise


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"inotify: {os.strerror(ctypes.get_errno())}")
    return result


def read_events(fd: int) -> Iterator[tuple[int, bytes]]:
    """Wait for events, and yield what happened and the name in the folder to which it did."""
    events, at = os.read(fd, 1 << 16), 0
    while at < len(events):
        _, mask, _, length = _EVENT.unpack_from(events, at)
        at += _EVENT.size
        yield mask, events[at : at + length].rstrip(b"\0")
        at += length


def _seems_whole(content: bytes) -> bool:
    """Tell by its end whether a file is whole; in one with a member a line only the last brace begins a line."""
    end = content[-64:].rstrip()
    return end.endswith(b"\n}" if content.startswith(b"{\n") else b"}")
