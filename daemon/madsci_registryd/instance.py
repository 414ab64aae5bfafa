"""Exactly one daemon a registry: an flock on NAME.db.lock, taken before anything else and held until the end.

A daemon that keeps its database elsewhere takes the one beside registry.json as well, where that can be had: two of
them would take each other's claims in that file for their own.

The file also carries notes for whoever comes next: who serves, and whether holders need time to say what they hold,
as an I/O error ended the last daemon (`io_error`) or a backup is the database now (`restored`): the value is the id of
the boot. The page cache is enough for those: they matter within one boot. Whatever else stands in the file keeps nobody
from a start.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from madsci_registryd import messages
from madsci_registryd.faults import AlreadyServed, StartFault, os_fault
from madsci_registryd.identities import TERM_LIMIT

log = logging.getLogger(__name__)


class InstanceLock:
    """The lock, from `InstanceLock(path)` to `close()` or the end of the process."""

    def __init__(self, path: Path, beside: Path | None = None) -> None:
        """Take it, and the one at `beside`. Raises: AlreadyServed where another process has one of them; StartFault
        where the file of the first cannot be made."""
        self._beside: InstanceLock | None = None
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise os_fault(error, str(path)) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            served = self.notes().get("pid")
            os.close(self._fd)
            raise AlreadyServed(f"pid {served or '?'} serves this registry already", path=str(path)) from None
        if beside is not None:
            self._take_beside(beside)

    def _take_beside(self, path: Path) -> None:
        """A folder that cannot hold a database may not hold a lock either (read-only, a network file system)."""
        try:
            self._beside = InstanceLock(path)
        except AlreadyServed:
            os.close(self._fd)
            raise
        except (StartFault, OSError) as error:
            text = "whether another daemon serves this registry from elsewhere cannot be told: %s"
            log.warning(text, error, extra=messages.SERVED_ELSEWHERE_UNKNOWN())

    def notes(self) -> dict[str, Any]:
        """Return what the last holder noted; nothing where that is unreadable."""
        with suppress(OSError, ValueError, RecursionError):
            notes = json.loads(os.pread(self._fd, 65536, 0))
            if isinstance(notes, dict):
                return notes
        return {}

    def noted_epoch(self) -> int:
        """Return the epoch of the last daemon as it noted it: that of its database may be gone with it. 0: none, or
        something that cannot be one."""
        epoch = self.notes().get("epoch")
        return epoch if type(epoch) is int and 0 < epoch < TERM_LIMIT else 0

    def note(self, **notes: Any) -> None:
        """Replace the notes, but for the epoch where none is given; a full disk keeps the old ones."""
        with suppress(OSError):
            notes.setdefault("epoch", self.noted_epoch())
            text = json.dumps(notes).encode()
            os.pwrite(self._fd, text, 0)
            os.ftruncate(self._fd, len(text))
        if self._beside is not None:
            self._beside.note(pid=notes.get("pid"))

    def close(self) -> None:
        if self._beside is not None:
            self._beside.close()
        os.close(self._fd)
