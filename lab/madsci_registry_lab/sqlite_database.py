"""The SQLite file of a lab: opened, checked and set up, and its transactions. The only apsw of the lab.

One connection for all threads, under one lock, and the file locked exclusively: a second lab on it does not start. A
commit is synced (`synchronous=FULL`) before its answer. A full disk is a definite no. After any other error of the disk
nobody knows what was written: nothing more is answered until a new start has read the file again.

What a lab that was killed has committed last is in FILE-wal beside it. If FILE is then set back to a backup, and the
other one stays, SQLite reads both as one file, which is neither. So after such an end the whole file is checked first.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import apsw

from madsci_registry.errors import NoSpaceError, RegistryError, UnavailableError
from madsci_registry_lab.faults import BAD_CONFIGURATION, CANNOT_CREATE, DAMAGED, DISK_FULL, IN_USE, IO_ERROR, Fault

log = logging.getLogger(__name__)

APPLICATION_ID = 0x4D4C6162
"""'MLab', in the file's header: tells our databases from foreign ones."""
VERSION = 1
"""Of the schema: a newer one is refused and left as it is."""
OLDEST_SQLITE = 3051003
"""3.51.3: an older one can lose a commit when the WAL is reset (sqlite.org, "WAL reset bug")."""
_DISK_ERRORS = (apsw.IOError, apsw.CorruptError, apsw.NotADBError, apsw.ReadOnlyError, apsw.CantOpenError)


class Database:
    """An open file. Thread-safe: each use is a `transaction`."""

    def __init__(self, path: Path) -> None:
        """Open the file, made new where there is none.

        Raises:
            Fault: with the status that says why; an existing file was not changed.
        """
        if apsw.SQLITE_VERSION_NUMBER < OLDEST_SQLITE:
            raise Fault(BAD_CONFIGURATION, f"SQLite {apsw.sqlite_lib_version()} is too old")
        self.path = path
        self._wal = path.with_name(f"{path.name}-wal")
        self._pid = os.getpid()
        self.broken = ""
        """What the disk said when it failed; empty: all is well."""
        self._guard = threading.RLock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE)
            try:
                self._set_up()
            except BaseException:
                self._db.close()
                raise
            path.chmod(0o600)
            with suppress(FileNotFoundError):
                self._wal.chmod(0o600)
        except OSError as error:
            raise Fault(CANNOT_CREATE, f"{error.filename}: {error.strerror}") from None
        except apsw.Error as error:
            raise _fault(error, path) from None

    def _set_up(self) -> None:
        db, was_killed = self._db, self._wal.exists() and self._wal.stat().st_size > 0
        db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, was_killed)  # whoever is refused leaves both files as they are
        db.set_busy_timeout(0)  # nobody else may have it open: waiting would only hide that
        db.pragma("locking_mode", "exclusive")
        empty = db.execute("SELECT count(*) FROM sqlite_schema").fetchone() == (0,)
        found = db.pragma("application_id"), db.pragma("user_version")
        if not empty and found[0] != APPLICATION_ID:
            raise Fault(DAMAGED, f"{self.path} belongs to another program; it was left as it is")
        if not empty and found[1] != VERSION:
            raise Fault(
                DAMAGED, f"{self.path} has schema {found[1]}, this program knows {VERSION}: it was left as it is"
            )
        if was_killed:
            for said in (*db.execute("PRAGMA integrity_check(1)"), *db.execute("PRAGMA foreign_key_check")):
                if said != ("ok",):
                    raise apsw.CorruptError(said[0])
            db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, False)
        for name, value in (
            ("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1), ("trusted_schema", 0),
            ("cell_size_check", 1), ("temp_store", 2),
        ):  # fmt: skip
            db.pragma(name, value)
            if str(db.pragma(name)).lower() != str(value):
                raise Fault(BAD_CONFIGURATION, f"SQLite has {name}={db.pragma(name)}, {value} is needed")
        db.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, 1)
        if empty:
            with db:
                db.execute(files("madsci_registry_lab").joinpath("schema.sql").read_text(encoding="utf-8"))
                db.pragma("application_id", APPLICATION_ID)
                db.pragma("user_version", VERSION)

    def run(self, sql: str, args: Any = ()) -> Any:
        """Run a statement; return a cursor of its rows. Inside a transaction only."""
        return self._db.execute(sql, args)

    def one(self, sql: str, args: tuple[Any, ...] = ()) -> Any:
        """Return the only column of the first row, None where there is no row."""
        row = self.run(sql, args).fetchone()
        return row[0] if row else None

    @contextmanager
    def transaction(self, *, write: bool) -> Iterator[None]:
        """Do what is inside as one transaction, alone; it is durable when this returns, or undone when it raises.

        Raises:
            NoSpaceError: the disk is full; nothing changed.
            UnavailableError: the disk failed, now or before; whether anything changed is known to the next start. Or
                this is a forked child, which has the file open and none of its locks.
        """
        if os.getpid() != self._pid:
            raise UnavailableError(f"the lab's store is open in process {self._pid}: a lab is one process")
        with self._guard:
            if self.broken:
                raise UnavailableError(f"the lab's store has failed: {self.broken}", path=str(self.path))
            try:
                self._db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                try:
                    yield
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
            except apsw.FullError:
                raise NoSpaceError(f"no space left for {self.path}", path=str(self.path)) from None
            except _DISK_ERRORS as error:
                self.broken = f"{type(error).__name__}: {error}"
                log.critical("the lab's store has failed and answers nothing more: %s: %s", self.path, self.broken)
                raise UnavailableError(f"the lab's store has failed: {self.broken}", path=str(self.path)) from error

    def close(self) -> None:
        """Close the file. Nothing may be done with it any more."""
        if os.getpid() != self._pid:
            return
        with self._guard, suppress(apsw.Error):
            self.broken = self.broken or "it is closed"
            self._db.close()


def fault_at_start(error: RegistryError, path: Path) -> Fault:
    """Return why a file that could be opened cannot be used."""
    if isinstance(error, NoSpaceError):
        return Fault(DISK_FULL, error.message)
    if isinstance(error.__cause__, (apsw.NotADBError, apsw.CorruptError)):
        return _fault(error.__cause__, path)
    return Fault(IO_ERROR, error.message)


def _fault(error: apsw.Error, path: Path) -> Fault:
    if isinstance(error, apsw.BusyError):
        return Fault(IN_USE, f"{path} is open in another program; one lab registry serves it, with one process")
    if isinstance(error, apsw.FullError):
        return Fault(DISK_FULL, f"no space left for {path}")
    if isinstance(error, (apsw.NotADBError, apsw.CorruptError)):
        wal = f"{path}-wal"
        hint = f"; if it is a backup, {wal} is not its own: remove that, and start again" if Path(wal).exists() else ""
        return Fault(DAMAGED, f"{path} is damaged, or no database of ours{hint}: {error}")
    return Fault(CANNOT_CREATE, f"{path} cannot be opened for writing: {error}")
