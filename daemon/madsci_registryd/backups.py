"""Backups while serving: SQLite's backup API copies a few pages a request into a private file, which is then sent.

The copy is consistent: what the daemon commits meanwhile, on the same connection, SQLite puts into the copy too. The
daemon writes no file of the caller's; the caller does, with its own rights.
"""

from __future__ import annotations

import base64
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from madsci_registry import protocol as p
from madsci_registry.errors import BusyError, ConflictError, InvalidError, NoSpaceError
from madsci_registryd.database import Connection, DiskFullError
from madsci_registryd.locks import Session

STEP_PAGES = 256
"""1 MiB a request: holds the loop for about a millisecond."""
CHUNK_BYTES = 512 * 1024
"""A page of data: two thirds of a frame as base64."""
SPAN = 1 << 40
"""A cursor is number * SPAN + offset, below 2^53: one backup's cursor means nothing to another."""
COPIES = 2
"""Backups under way at once."""


class Copy:
    """One backup: a private file that has no name any more and goes with this object."""

    def __init__(self, db: Connection, path: Path, number: int) -> None:
        self.number = number
        path.unlink(missing_ok=True)
        self._copy = Connection(str(path))
        try:
            self._copy.pragma("journal_mode", "off")
            self._copy.pragma("synchronous", 0)
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._backup: Any = self._copy.backup("main", db, "main")
        finally:
            path.unlink(missing_ok=True)
        self.total_bytes = 0

    def step(self) -> bool:
        """Copy some more pages; True: the copy is whole."""
        if self._backup is None:
            return True
        self._backup.step(STEP_PAGES)
        if not self._backup.done:
            return False
        self._backup.finish()
        self._backup = None
        self.total_bytes = os.fstat(self._file).st_size
        return True

    def chunk(self, start: int) -> bytes:
        return os.pread(self._file, CHUNK_BYTES, start)

    def close(self) -> None:
        """Give the copy up. Idempotent."""
        if self._backup is not None:
            self._backup.close(True)
            self._backup = None
        if self._file >= 0:
            self._copy.close(True)
            os.close(self._file)
            self._file = -1


class Backups:
    """The `backup` verb. Belongs to the thread that owns the database."""

    def __init__(self, db: Connection, database: Path) -> None:
        self._db = db
        self._database = database
        self._copies: dict[str, Copy] = {}
        self._number = 0
        sweep(database)

    def backup(self, who: Session, r: p.Backup) -> dict[str, Any]:
        """Begin a backup, copy some more of it, or send what `cursor` names."""
        try:
            if r.cursor is None:
                self.end(who)
                if len(self._copies) >= COPIES:
                    raise BusyError(f"{COPIES} backups are under way already")
                path = self._database.with_name(f"{self._database.name}.copy-{who.id}")
                self._number = self._number % 8191 + 1
                self._copies[who.id] = Copy(self._db, path, self._number)
            copy = self._copies.get(who.id)
            if r.cursor is not None and copy is not None and r.cursor // SPAN != copy.number:
                raise ConflictError("this session began another backup meanwhile; one at a time")
            if copy is None:
                raise InvalidError("cursor: no backup is under way in this session", field="cursor", reason="unknown")
            if not copy.step():
                return {"cursor": copy.number * SPAN, "data": "", "total_bytes": 0}
        except DiskFullError:
            self.end(who)
            raise NoSpaceError("no space for the copy", path=str(self._database.parent)) from None
        return self._send(who, copy, r.cursor)

    def _send(self, who: Session, copy: Copy, cursor: int | None) -> dict[str, Any]:
        if cursor is None:
            return {"cursor": copy.number * SPAN, "data": "", "total_bytes": copy.total_bytes}
        data = copy.chunk(cursor % SPAN)
        end = cursor % SPAN + len(data)
        total = copy.total_bytes
        if end >= total:
            self.end(who)
        return {
            "cursor": copy.number * SPAN + end if end < total else None,
            "data": base64.b64encode(data).decode(),
            "total_bytes": total,
        }

    def end(self, who: Session) -> None:
        """Forget a session's backup, if it has one."""
        copy = self._copies.pop(who.id, None)
        if copy is not None:
            copy.close()

    def close(self) -> None:
        for copy in self._copies.values():
            copy.close()
        self._copies.clear()


def sweep(database: Path) -> None:
    """Remove what a killed daemon left of its copies."""
    for path in database.parent.glob(f"{database.name}.copy-*"):
        with suppress(OSError):
            path.unlink()
