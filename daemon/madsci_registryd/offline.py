"""What `verify`, `restore` and `rollback` share: nobody serves meanwhile, and root leaves the files to who serves then.

The daemon's user may write in the folder and so may put anything there under any name. So nothing is given away but
plain files of root's with one name, each looked at through the descriptor that it is given away by.
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from madsci_registryd.instance import InstanceLock
from madsci_registryd.settings import Places

_MADE = ("", "-wal", "-shm", ".lock", ".damaged-*", ".before-v*")
"""What stands behind the database's name."""


@contextmanager
def locked(places: Places) -> Iterator[InstanceLock]:
    """Hold the registry's lock. At the end no database may be open any more: what root has made then goes to the owner
    that the database had, or where there was none to the state folder's.

    Raises: StartFault where a daemon serves the registry, or the lock cannot be had.
    """
    with ExitStack() as stack:
        if os.geteuid() == 0:
            stack.callback(_give, places, _owner(places.database) or _owner(places.state))
        lock = InstanceLock(places.lock, places.lock_beside)
        try:
            yield lock
        finally:
            stack.close()  # before anybody can start
            lock.close()


def _owner(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_uid, found.st_gid


def _give(places: Places, owner: tuple[int, int] | None) -> None:
    if owner is None or owner[0] == 0:
        return
    base = glob.escape(places.database.name)
    made = [path for ending in _MADE for path in places.state.glob(f"{base}{ending}")]
    for path in [*made, *([places.lock_beside] if places.lock_beside else [])]:
        with suppress(OSError):
            _give_file(path, *owner)


def _give_file(path: Path, uid: int, gid: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode) and found.st_uid == 0 and found.st_nlink == 1:
            os.fchown(fd, uid, gid)
    finally:
        os.close(fd)
