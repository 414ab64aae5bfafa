"""registry.json on the disk: its lock, its reading and its writing. What is in it, and when, is decided elsewhere.

The folder is opened once; all that is done is done by names in that folder, never through a path. A file that others
may have put there is not trusted: no link is followed, nothing waits for a FIFO, and what is not a regular file of the
registry's owner is left alone (a FileFault that lasts). A second hard link of the file does no harm: writing makes a
new file, and the other name keeps the old content. Owner, group and mode are kept over a write; ACLs and other
extended attributes are not.

The lock is the one that old programs take: flock (LOCK_EX) on NAME.json.lock, which is never removed here. Some
versions of their library remove it, so who got the lock looks whether it is still the file of that name.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from madsci_registryd.clock import Clock, SystemClock, iso

READ_MAX_BYTES = 256 << 20
"""The quota of names, each with the largest metadata that is common, is a quarter of it."""
_POLL_S = 0.002
_POLL_MAX_S = 0.02
"""Old programs ask every 50 ms: who asks more often comes in between."""
_CHUNK_BYTES = 1 << 20

_OPEN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# What may be otherwise in a moment: no space, a disk that failed once, too many files or locks.
_PASSING = {
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOLCK, errno.EINTR,
    errno.EAGAIN, errno.EBUSY,
}  # fmt: skip

_T = TypeVar("_T")


class FileFault(Exception):
    """The file cannot be used as it is; the text is for people, and the file is as it was."""

    def __init__(self, message: str, *, lasting: bool = True) -> None:
        super().__init__(message)
        self.lasting = lasting
        """True: it stays so until somebody mends it; False: a retry may help."""


class LockTimeout(Exception):
    """Somebody else had the file's lock all the time."""


class Stamp(NamedTuple):
    """Tells whether the file is the one that it was."""

    inode: int
    mtime_ns: int
    ctime_ns: int
    size: int


class FileOwner(NamedTuple):
    """Whose the file is."""

    uid: int
    gid: int
    mode: int
    """Permission bits."""


class RegistryFile:
    """NAME.json in its folder, from `RegistryFile(path)` to `close()`; used by one thread at a time."""

    def __init__(self, path: Path, clock: Clock | None = None) -> None:
        """Open the folder of `path`, which has no symbolic link in it any more.

        Raises: FileFault: it is not there, or may not be used.
        """
        self.path = path
        self._name = path.name
        self._lock_name = f"{path.name}.lock"
        self._clock = clock or SystemClock()
        self._folder = self._try(lambda: os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | _OPEN), path.parent)

    def close(self) -> None:
        """Close the folder."""
        os.close(self._folder)

    # the lock

    @contextmanager
    def locked(self, within_s: float) -> Iterator[None]:
        """Hold the file's lock, the one that old programs take; polled, since they may hold it for any time.

        Raises:
            LockTimeout: it was somebody else's for `within_s` seconds. FileFault: the lock file cannot be used.
        """
        fd = self._lock(within_s)
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)  # for a forked child's copy of the descriptor as well
            os.close(fd)

    def _lock(self, within_s: float) -> int:
        deadline, pause_s = self._clock.monotonic() + within_s, _POLL_S
        while True:
            fd = self._open_lock()
            if fd is not None:
                try:
                    if self._flock(fd):
                        return fd
                except BaseException:
                    os.close(fd)
                    raise
                os.close(fd)
            if self._clock.monotonic() >= deadline:
                raise LockTimeout(f"{self._shown(self._lock_name)} was locked by another process for {within_s:g} s")
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _POLL_MAX_S)

    def _open_lock(self) -> int | None:
        """Open the lock file, made where there is none; None: it has just come or gone."""
        # Not O_CREAT where it exists: in a sticky folder the kernel refuses that for another user's file.
        try:
            fd = self._try(lambda: self._open(self._lock_name, os.O_RDWR), self._lock_name, but=FileNotFoundError)
        except FileNotFoundError:
            return self._make_lock()
        try:
            self._repair_lock(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _make_lock(self) -> int | None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        with suppress(FileExistsError):
            fd = self._try(lambda: self._open(self._lock_name, flags, 0o600), self._lock_name, but=FileExistsError)
            self._share_lock(fd)
            return fd
        return None

    def _flock(self, fd: int) -> bool:
        """Take the lock without waiting; False: somebody has it, or it is no longer the file of that name."""
        try:
            self._try(lambda: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB), self._lock_name, but=BlockingIOError)
        except BlockingIOError:
            return False
        ours, named = os.fstat(fd), self._lstat(self._lock_name)
        return named is not None and (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino)

    def _repair_lock(self, fd: int) -> None:
        """Check an existing lock file, and widen it where it is ours and narrower than the folder."""
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise FileFault(f"{self._shown(self._lock_name)} is {_kind(found)}, not a lock file: remove it")
        me = os.geteuid()
        if found.st_nlink == 1 and (me == 0 or found.st_uid == me):
            self._share_lock(fd)

    def _share_lock(self, fd: int) -> None:
        """Let everybody use the lock file who may use the folder, and nobody else."""
        folder, found = os.fstat(self._folder), os.fstat(fd)
        granted = folder.st_mode & 0o066
        wanted = stat.S_IMODE(found.st_mode) | 0o600 | granted | (granted & 0o022) << 1  # to lock is to open for both
        with suppress(OSError):  # where it fails, the lock is ours all the same
            if os.geteuid() == 0 and found.st_uid == 0 != folder.st_uid:
                os.fchown(fd, folder.st_uid, folder.st_gid)
            elif folder.st_mode & stat.S_IWGRP and found.st_gid != folder.st_gid:
                os.fchown(fd, -1, folder.st_gid)
        with suppress(OSError):
            if stat.S_IMODE(found.st_mode) != wanted:
                os.fchmod(fd, wanted)

    # the file

    def stamp(self) -> Stamp | None:
        """Return what tells whether the file has changed; None: there is none.

        Raises: FileFault: it is no regular file, or a stranger's.
        """
        found = self._lstat(self._name)
        if found is None:
            return None
        self._check(found)
        return _stamp(found)

    def read(
        self, limit_bytes: int = READ_MAX_BYTES, *, settled: bool = False
    ) -> tuple[bytes, Stamp, FileOwner] | None:
        """Return the file's content, its stamp from just before, and its owner; None: there is none.

        Raises: FileFault: it is no regular file, a stranger's, longer than `limit_bytes`, or cannot be read; with
            `settled`, for who has not the file's lock, also where it changed meanwhile.
        """
        if self.stamp() is None:
            return None
        fd = self._try(lambda: self._open(self._name, os.O_RDONLY), self._name)
        try:
            found = os.fstat(fd)  # of what was opened: it may be another one by now
            self._check(found)
            is_short = found.st_size <= limit_bytes
            content = self._try(lambda: _read(fd, limit_bytes + 1), self._name) if is_short else b""
            if settled and _stamp(os.fstat(fd)) != _stamp(found):
                raise FileFault(f"{self.path} changed while it was read", lasting=False)
        finally:
            os.close(fd)
        if not is_short or len(content) > limit_bytes:
            raise FileFault(f"{self.path} has more than {limit_bytes} bytes: it is not read")
        return content, _stamp(found), _owner(found)

    def write(self, parts: Iterable[bytes]) -> Stamp:
        """Put a new file in the old one's place, durably; at every instant there is the one or the other, whole.

        Raises: FileFault: nothing changed (but where a disk fails only in the very last sync, the new file is there).
        """
        present = self._lstat(self._name)
        if present is not None:
            self._check(present)
        owner = self._owner_of_a_new_file() if present is None else _owner(present)
        temporary = f"{self._name}.{os.urandom(6).hex()}.tmp"
        made = self._write_new(temporary, parts, owner)
        try:
            self._try(lambda: self._rename(temporary, self._name), self._name)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=self._folder)
            raise
        self._try(lambda: os.fsync(self._folder), self.path.parent)
        named = self._lstat(self._name)  # the rename itself has changed its ctime
        if named is None or _stamp(named)._replace(ctime_ns=0) != _stamp(made)._replace(ctime_ns=0):
            return _stamp(made)  # somebody was quick: the next look will tell
        return _stamp(named)

    def put_aside(self, content: bytes) -> str:
        """Keep what the file had under a name that says since when it is broken, and return that; overwrites nothing.

        A copy: without the file itself, until a write replaces it, an old program would begin an empty registry.

        Raises: FileFault: there is no room, or the folder may not be written.
        """
        dated = f"{self._name}.broken-{iso(self._clock.wall())[:19].replace(':', '')}Z"
        present = self._lstat(self._name)
        owner = self._owner_of_a_new_file() if present is None else _owner(present)
        for number in itertools.count(1):
            aside = dated if number == 1 else f"{dated}-{number}"
            with suppress(FileExistsError):
                self._write_new(aside, (content,), owner, but=FileExistsError)
                break
        self._try(lambda: os.fsync(self._folder), self.path.parent)
        return aside

    def sweep(self) -> int:
        """Remove what a write that was killed has left, and return how many files that were."""
        pattern = re.compile(rf"{re.escape(self._name)}\.[0-9a-f]{{12}}\.tmp")
        ours = {os.geteuid(), os.fstat(self._folder).st_uid} if os.geteuid() == 0 else {os.geteuid()}
        removed = 0
        for name in self._try(self._names, self.path.parent):
            if not pattern.fullmatch(name):
                continue
            with suppress(OSError):
                found = os.stat(name, dir_fd=self._folder, follow_symlinks=False)
                if stat.S_ISREG(found.st_mode) and found.st_uid in ours:
                    os.unlink(name, dir_fd=self._folder)
                    removed += 1
        return removed

    # steps

    def _names(self) -> list[str]:
        with os.scandir(self._folder) as listing:  # reading on may fail as well as beginning
            return [entry.name for entry in listing]

    def _write_new(
        self, name: str, parts: Iterable[bytes], owner: FileOwner, *, but: type[OSError] | tuple[()] = ()
    ) -> os.stat_result:
        """Make a file of a name that nobody has, whole and synced or not at all."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        fd = self._try(lambda: self._open(name, flags, 0o600), self._name, but=but)
        try:
            try:
                self._give(fd, owner)
                return self._try(lambda: _write_all(fd, parts), self._name)
            finally:
                os.close(fd)
        except BaseException:
            with suppress(OSError):
                os.unlink(name, dir_fd=self._folder)
            raise

    def _check(self, found: os.stat_result) -> None:
        if not stat.S_ISREG(found.st_mode):
            raise FileFault(f"{self.path} is {_kind(found)}, not a file: it is left alone")
        if found.st_uid not in (os.geteuid(), os.fstat(self._folder).st_uid):
            raise FileFault(f"{self.path} belongs to uid {found.st_uid}, not to the folder's owner: it is left alone")

    def _owner_of_a_new_file(self) -> FileOwner:
        folder = os.fstat(self._folder)
        allowed = 0o664 if folder.st_mode & stat.S_IWGRP else 0o644
        mode = 0o600 | folder.st_mode & allowed
        if os.geteuid() == 0:
            return FileOwner(folder.st_uid, folder.st_gid, mode)
        return FileOwner(os.geteuid(), -1, mode)  # the group comes by itself: ours, or that of a setgid folder

    def _give(self, fd: int, owner: FileOwner) -> None:
        made = os.fstat(fd)
        try:
            if made.st_uid != owner.uid:
                os.fchown(fd, owner.uid, -1)
            if owner.gid not in (-1, made.st_gid):
                os.fchown(fd, -1, owner.gid)
        except PermissionError:
            raise FileFault(
                f"{self.path} belongs to uid {owner.uid}, gid {owner.gid}: uid {os.geteuid()} cannot keep the owner"
            ) from None
        self._try(lambda: os.fchmod(fd, owner.mode), self._name)

    def _open(self, name: str, flags: int, mode: int = 0) -> int:
        return os.open(name, flags | _OPEN, mode, dir_fd=self._folder)

    def _rename(self, name: str, to: str) -> None:
        os.rename(name, to, src_dir_fd=self._folder, dst_dir_fd=self._folder)

    def _lstat(self, name: str) -> os.stat_result | None:
        look = lambda: os.stat(name, dir_fd=self._folder, follow_symlinks=False)
        with suppress(FileNotFoundError):
            return self._try(look, name, but=FileNotFoundError)
        return None

    def _try(self, call: Callable[[], _T], what: str | Path, *, but: type[OSError] | tuple[()] = ()) -> _T:
        """Call, and turn what the system refuses into a FileFault, but for what the caller looks for."""
        try:
            return call()
        except but:
            if not self.is_gone:
                raise
            raise FileFault(f"{self.path.parent} is gone") from None
        except OSError as error:
            shown = what if isinstance(what, Path) else self._shown(what)
            if error.errno == errno.ELOOP:
                raise FileFault(f"{shown} is a symbolic link: it is not followed, remove it") from error
            if error.errno in (errno.ENXIO, errno.EISDIR):
                raise FileFault(f"{shown} is no regular file: it is left alone, remove it") from error
            raise FileFault(f"{shown}: {error.strerror}", lasting=error.errno not in _PASSING) from error

    @property
    def is_gone(self) -> bool:
        """Somebody has removed the folder. Safe in every thread."""
        return os.fstat(self._folder).st_nlink == 0

    def _shown(self, name: str) -> Path:
        return self.path.with_name(name)


def _stamp(found: os.stat_result) -> Stamp:
    return Stamp(found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)


def _owner(found: os.stat_result) -> FileOwner:
    return FileOwner(found.st_uid, found.st_gid, found.st_mode & 0o777)


def _kind(found: os.stat_result) -> str:
    kinds = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFDIR: "a folder",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(found.st_mode), "a device")


def _read(fd: int, limit_bytes: int) -> bytes:
    content = bytearray()
    while len(content) < limit_bytes:
        piece = os.read(fd, min(_CHUNK_BYTES, limit_bytes - len(content)))
        if not piece:
            break
        content += piece
    return bytes(content)


def _write_all(fd: int, parts: Iterable[bytes]) -> os.stat_result:
    """Write, sync and stamp an own file."""
    gathered = bytearray()
    for part in parts:
        gathered += part
        if len(gathered) >= _CHUNK_BYTES:
            _write(fd, gathered)
            gathered.clear()
    _write(fd, gathered)
    # The kernel's time stands still for some milliseconds. A time that it never gave lets a stamp tell our content
    # from what an old program writes in place, of the same length, in the same tick.
    written = os.fstat(fd)
    os.utime(fd, ns=(written.st_atime_ns, written.st_mtime_ns - int.from_bytes(os.urandom(2), "big")))
    os.fsync(fd)
    return os.fstat(fd)


def _write(fd: int, content: bytearray) -> None:
    with memoryview(content) as rest:
        done = 0
        while done < len(rest):
            done += os.write(fd, rest[done:])
