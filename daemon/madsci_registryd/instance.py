"""Exactly one daemon a database: an flock on NAME.db.lock, taken before anything else and held until the end.

The file also carries notes for whoever comes next: who serves, and that an I/O error ended the last daemon. The page
cache is enough for those: they matter within one boot.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from madsci_registryd.faults import AlreadyServed, os_fault


class InstanceLock:
    """The lock, from `InstanceLock(path)` to `close()` or the end of the process."""

    def __init__(self, path: Path) -> None:
        """Take it. Raises: AlreadyServed where another process has it; StartFault where the file cannot be made."""
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

    def notes(self) -> dict[str, Any]:
        """Return what the last holder noted; nothing where that is unreadable."""
        with suppress(OSError, ValueError):
            notes = json.loads(os.pread(self._fd, 65536, 0))
            if isinstance(notes, dict):
                return notes
        return {}

    def note(self, **notes: Any) -> None:
        """Replace the notes; a full disk keeps the old ones."""
        with suppress(OSError):
            text = json.dumps(notes).encode()
            os.pwrite(self._fd, text, 0)
            os.ftruncate(self._fd, len(text))

    def close(self) -> None:
        os.close(self._fd)
