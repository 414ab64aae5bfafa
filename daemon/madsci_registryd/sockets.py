"""Listening Unix sockets: made by us or passed by the service manager, never by libzmq (whose bind unlinks whatever
stands at a path)."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from madsci_registryd.admission import Modes
from madsci_registryd.faults import AlreadyServed, CannotCreate, os_fault

BACKLOG = 4096
"""libzmq's own 100 refused 299 of 400 connects at once."""
PATH_MAX_BYTES = 107
"""What sun_path holds (unix(7)), without its final NUL."""


class ListeningPath:
    """A path at which the daemon listens, and the socket file there: its own, or `given` by the service manager."""

    def __init__(self, path: Path, given: socket.socket | None = None, *, owns_folder: bool = False) -> None:
        """`owns_folder`: it is there for the sockets, so its mode is ours to set; else only that of a new one."""
        self.path = path
        self._owns_folder = owns_folder
        self._given = given
        self._folder = -1
        self._file: tuple[int, int] | None = None
        self._is_own = given is None

    def address(self) -> str:
        """Return an address that fits into a socket address: the path, or one through procfs to its open folder."""
        if len(os.fsencode(self.path)) <= PATH_MAX_BYTES:
            return str(self.path)
        if self._folder >= 0:
            os.close(self._folder)
        self._folder = os.open(self.path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._folder}/{self.path.name}"

    def listen(self, modes: Modes) -> socket.socket:
        """Return a socket that listens at the path, usable by whom `modes` lets in and nobody else, at no time.

        Raises: AlreadyServed where a living daemon listens there, CannotCreate where something else stands there,
            NoPermission where it cannot be given the modes.
        """
        given, self._given = self._given, None
        if given is not None and self._identity() is not None:
            self._file = self._identity()
            self.give(modes)
            return given
        if given is not None:
            given.close()  # its file was removed: nobody can connect to it
        self._is_own = True
        self._owns_folder |= make_folder(self.path.parent)
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
        self.give(modes)
        return sock

    def give(self, modes: Modes) -> None:
        """Let in whom `modes` says; a folder or socket that is another user's keeps what that one gave it.

        Raises: NoPermission where the group is none that we may give it to.
        """
        places = [(self.path, modes.socket)]
        if self._owns_folder:
            places.insert(0, (self.path.parent, modes.folder))
        for path, mode in places:
            try:
                found = os.lstat(path)
                if found.st_uid != os.geteuid():
                    continue
                if modes.group is not None and found.st_gid != modes.group:
                    os.chown(path, -1, modes.group, follow_symlinks=False)
                if stat.S_IMODE(found.st_mode) != mode:
                    path.chmod(mode)
            except OSError as error:
                raise os_fault(error, f"{path} cannot be given to group {modes.group}, mode {mode:o}") from error

    def is_ours(self) -> bool:
        """Tell whether the socket file that we made is still there."""
        return self._file is not None and self._identity() == self._file

    def remove(self) -> None:
        """Remove our socket file, if it is still there; the service manager's stays, and it goes on listening."""
        if self.is_ours() and self._is_own:
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


def make_folder(folder: Path) -> bool:
    """Make the sockets' folder, closed to strangers, where there is none; True: it was made."""
    try:
        folder.mkdir(mode=0o700)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        hint = " (systemd-tmpfiles --create makes it)" if folder.parent == Path("/run") else ""
        raise CannotCreate(f"{folder} cannot be made: {error.strerror}{hint}", path=str(folder)) from error
