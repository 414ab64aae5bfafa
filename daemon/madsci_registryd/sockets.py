"""Listening Unix sockets: made by us, never by libzmq (whose bind unlinks whatever stands at a path)."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from madsci_registryd.faults import AlreadyServed, CannotCreate

BACKLOG = 4096
"""libzmq's own 100 refused 299 of 400 connects at once."""
PATH_MAX_BYTES = 107
"""What sun_path holds (unix(7)), without its final NUL."""


class ListeningPath:
    """A path at which the daemon listens, and the socket file that it made there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = -1
        self._file: tuple[int, int] | None = None

    def address(self) -> str:
        """Return an address that fits into a socket address: the path, or one through procfs to its open folder."""
        if len(os.fsencode(self.path)) <= PATH_MAX_BYTES:
            return str(self.path)
        if self._folder >= 0:
            os.close(self._folder)
        self._folder = os.open(self.path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._folder}/{self.path.name}"

    def listen(self) -> socket.socket:
        """Return a socket that listens at the path, usable by the owner only (mode 0600).

        Raises: AlreadyServed where a living daemon listens there, CannotCreate where something else stands there.
        """
        make_folder(self.path.parent)
        address = self.address()
        self._clear(address)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        before = os.umask(0o177)
        try:
            sock.bind(address)
        except OSError as error:
            sock.close()
            raise CannotCreate(f"{self.path} cannot be made: {error.strerror}", path=str(self.path)) from error
        finally:
            os.umask(before)
        sock.listen(BACKLOG)
        self._file = self._identity()
        return sock

    def is_ours(self) -> bool:
        """Tell whether the socket file that we made is still there."""
        return self._file is not None and self._identity() == self._file

    def remove(self) -> None:
        """Remove our socket file, if it is still there."""
        if self.is_ours():
            with suppress(OSError):
                self.path.unlink()
        self._file = None
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = os.lstat(self.path)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _clear(self, address: str) -> None:
        try:
            mode = os.lstat(self.path).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise CannotCreate(f"{self.path} exists and is no socket; remove it", path=str(self.path))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(address)
            except OSError:
                self.path.unlink(missing_ok=True)
                return
        raise AlreadyServed(f"a daemon of another registry listens at {self.path}", path=str(self.path))


def make_folder(folder: Path) -> None:
    """Make the sockets' folder, closed to strangers, where there is none."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise CannotCreate(f"{folder} cannot be made: {error.strerror}", path=str(folder)) from error
