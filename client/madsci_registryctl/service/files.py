"""Writes and removes the files of a service: each whole or not at all, and never what a person has changed.

For the system, root works in folders that are root's: no link is followed on the way, so that nobody who may write
somewhere below can turn the path elsewhere. A user's own folders may be links, as dotfiles often are.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from madsci_registry.errors import BusyError
from madsci_registryctl.service.units import is_as_written

MODE = 0o644
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

Outcome = Literal["written", "replaced", "unchanged", "kept", "removed", "absent"]
"""kept: it was not written by us, or a person has changed it since."""


@dataclass(frozen=True)
class File:
    """A file of a service."""

    path: Path
    text: str
    """As it is written, the mark of `units` on top."""

    @property
    def shipped(self) -> str:
        """The text without the mark: what a person has who copied the file by hand."""
        return self.text.partition("\n")[2]


@dataclass(frozen=True)
class Disk:
    """Where files are written, and how folders on the way are entered."""

    root: Path = Path("/")
    """The top of the tree; another one than / in tests."""
    follows_links: bool = False
    """True: for a user's own folders."""

    @contextmanager
    def locked(self, folder: Path) -> Iterator[None]:
        """Keep other installations of the same kind out; the folder is made where it is missing.

        Raises:
            BusyError: another one is at it. OSError.
        """
        with self._opened(folder, make=True) as place:
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(f"another registryctl service is at work in {folder}") from None
            yield

    def _outcome(self, file: File) -> Outcome:
        """Say what `write` would do with a file, without doing it. Raises OSError."""
        found = self._read(file.path)
        if found is None:
            return "written"
        content, mode, uid = found
        if not is_as_written(content) and content != file.shipped.encode():
            return "kept"
        is_same = content == file.text.encode() and (mode, uid) == (MODE, os.geteuid())
        return "unchanged" if is_same else "replaced"

    def write(self, files: Sequence[File]) -> Iterator[tuple[Path, Outcome]]:
        """Write what is missing or older, and yield each file with what became of it.

        Nothing is in place before all of it is on the disk: a disk that fills up leaves everything as it was.

        Raises:
            OSError: what has not been yielded is as it was.
        """
        with ExitStack() as stack:
            staged = [(file, self._stage(stack, file)) for file in files]
            for file, (outcome, folder) in staged:
                if folder is not None:
                    os.replace(_new(file.path), file.path.name, src_dir_fd=folder, dst_dir_fd=folder)
                    os.fsync(folder)
                yield file.path, outcome

    def _stage(self, stack: ExitStack, file: File) -> tuple[Outcome, int | None]:
        outcome = self._outcome(file)
        if outcome not in ("written", "replaced"):
            return outcome, None
        with _named(file.path):
            folder = stack.enter_context(self._opened(file.path.parent, make=True))
            stack.callback(_remove_quietly, _new(file.path), folder)
            _write_new(_new(file.path), file.text, folder)
        return outcome, folder

    def remove(self, path: Path) -> Outcome:
        """Remove a file that is as it was written, and its folder if that is our own and empty then.

        Raises: OSError.
        """
        found = self._read(path)
        if found is None:
            return "absent"
        if not is_as_written(found[0]):
            return "kept"
        with _named(path), self._opened(path.parent) as folder:
            os.unlink(path.name, dir_fd=folder)
            os.fsync(folder)
        if path.parent.name == "madsci" or (path.parent.name.endswith(".d") and "@" in path.parent.name):
            with suppress(OSError), self._opened(path.parent.parent) as above:
                os.rmdir(path.parent.name, dir_fd=above)
        return "removed"

    def exists(self, path: Path) -> bool:
        """Tell whether there is anything at a path. Raises OSError."""
        return self._read(path) is not None

    def text(self, path: Path) -> str:
        """Return the text of a file; empty where there is no plain file. Raises OSError."""
        found = self._read(path)
        return "" if found is None else found[0].decode("utf-8", "replace")

    def discard(self, path: Path) -> None:
        """Remove a file, whatever is in it. Raises OSError."""
        with _named(path), self._opened(path.parent) as folder:
            os.unlink(path.name, dir_fd=folder)

    def check_writable(self, folder: Path) -> None:
        """Raise OSError where nothing can be removed from a folder: before anything was changed, that is."""
        with self._opened(folder) as place:
            if not os.access(".", os.W_OK, dir_fd=place, effective_ids=True):
                is_read_only = os.fstatvfs(place).f_flag & os.ST_RDONLY
                number = errno.EROFS if is_read_only else errno.EACCES
                raise OSError(number, os.strerror(number), str(folder))

    def names(self, folder: Path) -> list[str]:
        """List what is in a folder, sorted; nothing where there is no such folder. Raises OSError."""
        try:
            with self._opened(folder) as place:
                return sorted(os.listdir(place))  # noqa: PTH208  (it is a descriptor)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _read(self, path: Path) -> tuple[bytes, int, int] | None:
        """Return content, mode and owner; None: there is nothing. What is no plain file has no content of ours."""
        with _named(path), ExitStack() as stack:
            try:
                folder = stack.enter_context(self._opened(path.parent))
                handle = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError as error:
                if error.errno == errno.ELOOP and _is_link(path.name, folder):
                    return b"", 0, -1
                raise
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                os.close(handle)
                return b"", 0, -1
            with os.fdopen(handle, "rb") as stream:
                content = stream.read()
        return content, stat.S_IMODE(found.st_mode), found.st_uid

    @contextmanager
    def _opened(self, folder: Path, *, make: bool = False) -> Iterator[int]:
        """Open a folder step by step. Raises OSError, with the path of the step that failed."""
        step = os.open(self.root, _DIRECTORY)
        try:
            done = self.root
            for part in folder.relative_to("/").parts:
                done /= part
                with _named(done):
                    inner = _enter(part, step, make=make, follows_links=self.follows_links)
                os.close(step)
                step = inner
            yield step
        finally:
            os.close(step)


def _enter(name: str, above: int, *, make: bool, follows_links: bool) -> int:
    made = False
    if make:
        with suppress(FileExistsError):
            os.mkdir(name, 0o755, dir_fd=above)
            made = True
    try:
        inner = os.open(name, _DIRECTORY | (0 if follows_links else os.O_NOFOLLOW), dir_fd=above)
    except NotADirectoryError as error:
        if not follows_links and _is_link(name, above):
            error.strerror = "is a link, which is not followed for the system: put a folder in its place"
        raise
    if made and not follows_links:
        os.fchmod(inner, 0o755)  # whatever root's umask: daemon and clients have to look in
    return inner


def _is_link(name: str, folder: int) -> bool:
    return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)


def _new(path: Path) -> str:
    # systemd reads no file of such a name, neither as a unit nor in a folder of drop-ins.
    return f".{path.name}.new"


def _write_new(name: str, text: str, folder: int) -> None:
    with suppress(FileNotFoundError):  # one that a killed run left
        os.unlink(name, dir_fd=folder)
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    with os.fdopen(handle, "wb") as stream:
        stream.write(text.encode())
        stream.flush()
        os.fchmod(handle, MODE)
        os.fchown(handle, os.geteuid(), os.getegid())  # in a folder with the setgid bit it would have another group
        os.fsync(handle)


def _remove_quietly(name: str, folder: int) -> None:
    with suppress(OSError):
        os.unlink(name, dir_fd=folder)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Give an OSError the whole path: with a folder's descriptor the kernel was told the last part alone."""
    try:
        yield
    except OSError as error:
        if not os.fsdecode(error.filename or "").startswith("/"):
            error.filename = str(path)
        raise
