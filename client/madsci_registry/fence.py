"""Fence: refuses who comes with an older fencing token than one that was seen before.

A lock says who may act; it stops nobody who was frozen between looking at its lock and acting. A fence stands in front
of what is acted on, in the driver of a device, say, and does.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from madsci_registry.errors import BusyError, CorruptError, InvalidError, LockLostError

_TOKEN_LIMIT = 2**53
# 16 digits hold every token; one line is far within the 512 bytes that a disk writes whole.
_LINE = "{:016d}\n"
_LINE_BYTES = 17
LOCK_WAIT_S = 5.0
"""How long another process may be at the file: it takes as long as a sync, unless it was stopped in the middle."""


_locks: dict[object, threading.Lock] = {}
"""One for each file, or fence in memory. A forked child makes them anew: a thread of its parent may have had one."""
_open_files: set[int] = set()


def _forget_parent() -> None:
    _locks.clear()
    for fd in _open_files:
        os.close(fd)  # it would keep the lock that a thread of the parent has, for as long as this process lives
    _open_files.clear()


os.register_at_fork(after_in_child=_forget_parent)


@contextmanager
def _only_thread(key: object) -> Iterator[None]:
    lock = _locks.setdefault(key, threading.Lock())
    if not lock.acquire(timeout=LOCK_WAIT_S):
        raise BusyError("another thread is at this fence and does not go on")
    try:
        yield
    finally:
        lock.release()


class Fence:
    """The highest fencing token that was shown for one device (or whatever it stands in front of).

    In memory it covers the process that owns it; with a file, all processes of this host that name the same file, and
    restarts of theirs. Make one fence a device and never share one between devices: tokens of different names cannot be
    compared. A fence knows only tokens that were shown to it, so a new holder shows its own before anything else. The
    token of a lock may grow while it is held (`Registration.fencing_token`): once the higher one was shown, a copy of
    the lower one is refused like another holder's.
    Threads may share it; in a forked child it works on, with a file.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        """Stand in front of something.

        Args:
            path: the file that keeps the highest token, made if it is missing; its folder must exist and be on a local
                disk. None: in memory.
        """
        self._path = None if path is None else Path(path)
        self._highest = 0
        self._key = object() if path is None else os.path.realpath(path)

    def __repr__(self) -> str:
        return f"<Fence {self._path or 'in memory'}>"

    @property
    def highest(self) -> int:
        """The highest token that was let through, 0 before the first. Raises as `check`."""
        if self._path is None:
            return self._highest
        with _only_thread(self._key), _File(self._path) as file:
            return file.read()

    def check(self, fencing_token: int) -> None:
        """Let a token through that is at least as high as every one before; a higher one is on disk on return.

        Args:
            fencing_token: of the grant under which the caller acts, `Registration.fencing_token`.

        Raises:
            LockLostError: a higher one was seen, so that lock is another's by now. InvalidError: it is no token.
            BusyError: another process or thread is at it and does not go on. CorruptError: the file holds no token.
            OSError: the file cannot be read or written; then alone the token may count as seen all the same.
        """
        _check_token(fencing_token)
        with _only_thread(self._key):
            if self._path is None:
                self._highest = _higher(self._highest, fencing_token)
                return
            with _File(self._path) as file:
                seen = file.read()
                if _higher(seen, fencing_token) > seen:
                    file.write(fencing_token, is_first=not seen)


class _File:
    """The file of a fence, locked for one look.

    By an flock on a descriptor of its own, which keeps out threads and other names of the file too; not by a POSIX
    lock, which any close of the file in this process would drop.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> _File:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        _open_files.add(self._fd)
        try:
            self._await_lock()
        except BaseException:
            self._close()
            raise
        return self

    def _close(self) -> None:
        _open_files.discard(self._fd)
        os.close(self._fd)

    def _await_lock(self) -> None:
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise BusyError(f"{self._path} is locked by another process, which may be stopped") from None
                time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)  # by name: a child forked just now may have a copy of the descriptor
        self._close()

    def read(self) -> int:
        line = os.pread(self._fd, _LINE_BYTES + 1, 0)
        if not line:
            return 0
        if len(line) != _LINE_BYTES or not line[:-1].isdigit() or line[-1:] != b"\n":
            raise CorruptError(f"{self._path} does not hold a fencing token", path=str(self._path))
        return int(line)

    def write(self, token: int, *, is_first: bool) -> None:
        try:
            if os.pwrite(self._fd, _LINE.format(token).encode(), 0) != _LINE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        except OSError:
            if is_first:
                os.ftruncate(self._fd, 0)  # a part of a line would be taken for damage
            raise
        os.fsync(self._fd)
        if is_first:
            _sync_folder(self._path.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_token(token: object) -> None:
    if not isinstance(token, int) or isinstance(token, bool) or not 0 < token < _TOKEN_LIMIT:
        reason = f"{token!r} is no fencing token, an integer above 0 and below 2^53"
        raise InvalidError(f"fencing_token: {reason}", field="fencing_token", reason=reason)


def _higher(seen: int, token: int) -> int:
    if token < seen:
        reason = f"{seen} was seen already, so its lock is another's by now"
        raise LockLostError(f"fencing token {token} is refused: {reason}", fencing_token=token, reason=reason)
    return token
