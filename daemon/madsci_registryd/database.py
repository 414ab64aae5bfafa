"""Opening the database: what is refused, and the settings that every promise rests on, each read back.

One connection, one thread, the file locked exclusively: an outside reader would keep the WAL from being checkpointed
(seen: it grew to 324 MB). This process must not open the live files by any other means: closing such a descriptor
drops SQLite's POSIX locks. What is looked at by plain reads is looked at before SQLite opens the file.
"""

from __future__ import annotations

import logging
import os
import struct
from contextlib import suppress
from pathlib import Path

import apsw

from madsci_registryd import messages, migrations
from madsci_registryd.faults import (
    BadConfiguration,
    CannotCreate,
    CorruptDatabase,
    DiskFull,
    NoPermission,
    NotOurDatabase,
    StartFault,
)
from madsci_registryd.migrations import transaction as transaction  # noqa: PLC0414 - one place for who uses databases

log = logging.getLogger(__name__)

Connection = apsw.Connection
DatabaseError = apsw.Error
DiskFullError = apsw.FullError
DISK_ERRORS = (apsw.FullError, apsw.IOError, apsw.CorruptError, apsw.NotADBError, apsw.ReadOnlyError)
"""What the disk may answer in the middle of a transaction; anything else is a fault of ours."""

OLDEST_SQLITE = 3051003
"""3.51.3: an older one can lose a commit when the WAL is reset (sqlite.org, "WAL reset bug")."""


def open_database(path: Path) -> apsw.Connection:
    """Open the registry's database, made new where there is none, checked, migrated and set up.

    Raises:
        StartFault: of the class that says why; an existing file was not changed.
    """
    if apsw.SQLITE_VERSION_NUMBER < OLDEST_SQLITE:
        raise BadConfiguration(f"SQLite {apsw.sqlite_lib_version()} is too old")
    check_header(path)
    try:
        db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE)
        with suppress(OSError):
            path.chmod(0o600)
        try:
            _set_up(db)
            _ensure_schema(db, path)
        except BaseException:
            db.close()
            raise
    except apsw.Error as error:
        raise start_fault(error, path) from error
    return db


def check_header(path: Path) -> None:
    """Refuse a file that is not ours or newer, by its header. Call it before SQLite opens the file only."""
    try:
        with path.open("rb") as file:
            header = file.read(108)
    except FileNotFoundError:
        return
    except IsADirectoryError:
        raise CannotCreate(f"{path} is a folder, the database cannot be there", path=str(path)) from None
    except PermissionError:
        raise NoPermission(f"{path} may not be read by uid {os.geteuid()}", path=str(path)) from None
    if not header:
        return
    if len(header) < 108 or not header.startswith(b"SQLite format 3\0"):
        raise CorruptDatabase(f"{path} is no SQLite database; it was left as it is", path=str(path))
    user_version, application_id = struct.unpack(">I", header[60:64])[0], struct.unpack(">I", header[68:72])[0]
    pages, cells = struct.unpack(">I", header[28:32])[0], struct.unpack(">H", header[103:105])[0]
    if application_id == 0 and user_version == 0 and (pages <= 1 and not cells or Path(f"{path}-wal").exists()):
        return  # a first start that was cut off; _ensure_schema looks whether anything is in it
    if application_id != migrations.APPLICATION_ID:
        raise NotOurDatabase(f"{path} belongs to another program; it was left as it is", path=str(path))
    _check_version(user_version, path)


def _set_up(db: apsw.Connection) -> None:
    db.set_busy_timeout(0)  # nobody else may have it open: waiting would only hide that
    pragmas = (
        ("locking_mode", "exclusive"),
        ("journal_mode", "wal"),
        ("foreign_keys", 1),
        ("trusted_schema", 0),
        ("cell_size_check", 1),
        ("temp_store", 2),
        ("wal_autocheckpoint", 1000),  # 4 MB: bounds the WAL and what a power loss can cost of locks
    )
    for name, value in pragmas:
        db.pragma(name, value)
        found = db.pragma(name)
        if str(found).lower() != str(value):
            raise BadConfiguration(f"SQLite has {name}={found}, {value} is needed")
    db.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, 1)
    db.config(apsw.SQLITE_DBCONFIG_DQS_DDL, 0)
    # A plan does not depend on the values bound: otherwise this build (STAT4) prepares a join anew at every call,
    # 12 us instead of 3.
    db.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)
    db.config(apsw.SQLITE_DBCONFIG_DQS_DML, 0)
    set_synchronous(db, full=True)


def set_synchronous(db: apsw.Connection, *, full: bool) -> None:
    """FULL: a commit is on disk when it returns. NORMAL: it survives this process, not a power loss."""
    wanted = 2 if full else 1
    db.pragma("synchronous", wanted)
    if db.pragma("synchronous") != wanted:
        raise BadConfiguration(f"SQLite does not take synchronous={wanted}")


def sqlite_version() -> str:
    """Return the version of the SQLite that is linked in."""
    return apsw.sqlite_lib_version()


def _ensure_schema(db: apsw.Connection, path: Path) -> None:
    if db.pragma("application_id") == 0 and db.pragma("user_version") == 0:
        if db.execute("SELECT count(*) FROM sqlite_schema").fetchone() != (0,):
            raise NotOurDatabase(f"{path} belongs to another program; it was left as it is", path=str(path))
        migrations.create(db)
        sync_folder(path.parent)
    _check_version(int(str(db.pragma("user_version"))), path)
    before = migrations.migrate(db, lambda version: copy_to(db, _before(path)))
    if before < migrations.VERSION:
        text, extra = "%s: schema %d is %d now; as it was: %s", messages.SCHEMA_MIGRATED(before=before)
        log.warning(text, path, before, migrations.VERSION, _before(path), extra=extra)


def _before(path: Path) -> Path:
    return path.with_name(f"{path.name}.before-v{migrations.VERSION}")


def _check_version(found: int, path: Path) -> None:
    if found > migrations.VERSION:
        raise NotOurDatabase(
            f"{path} has schema {found}, this program knows {migrations.VERSION}: it was written by a newer "
            f"madsci-registryd. Install that one again; or, to go back, move {path} and its -wal away and "
            f"madsci-registryd restore {path}.before-v{found}",
            path=str(path),
        )


def copy_to(db: apsw.Connection, path: Path) -> None:
    """Write a consistent copy of the database to a new file; part of one does not stay."""
    _remove_copy(path)
    copy = apsw.Connection(str(path))
    try:
        with copy.backup("main", db, "main") as backup:
            backup.step(-1)
    except BaseException:
        copy.close()
        _remove_copy(path)
        raise
    copy.close()


def _remove_copy(path: Path) -> None:
    for suffix in ("", "-journal"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def faults_of(db: apsw.Connection) -> list[str]:
    """List what the full integrity check and our own rules find wrong, at most 100 lines; empty: it is whole."""
    found = [str(text) for (text,) in db.execute("PRAGMA integrity_check(50)") if text != "ok"]
    found += [f"row without its partner: {row}" for row in db.execute("PRAGMA foreign_key_check")]
    for table, rule, sql in (
        ("locks", "token above the name's last", "SELECT c.name FROM locks l JOIN components c ON c.id = l.id"
         " JOIN names n ON n.name = c.name WHERE l.fencing_token > n.last_token"),
        ("locks", "retired name held", "SELECT c.name FROM locks l JOIN components c ON c.id = l.id"
         " WHERE c.retired = 1"),
    ):  # fmt: skip
        found += [f"{table}: {rule}: {name!r}" for (name,) in db.execute(sql)]
    return found[:100]


def sync_folder(folder: Path) -> None:
    """Make new names in a folder survive power loss."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def start_fault(error: apsw.Error, path: Path) -> StartFault:
    """Say what an SQLite error at start means to a person."""
    where = str(path)
    if isinstance(error, (apsw.NotADBError, apsw.CorruptError)):
        return CorruptDatabase(f"{path} is damaged ({error}): madsci-registryd restore BACKUP", path=where)
    if isinstance(error, apsw.FullError):
        return DiskFull(f"no space left for {path}", path=where)
    if isinstance(error, (apsw.ReadOnlyError, apsw.CantOpenError, apsw.PermissionsError)):
        if path.exists() and os.access(path, os.R_OK) and not os.access(path, os.W_OK):
            return NoPermission(f"{path} is read-only for uid {os.geteuid()}", path=where)
        return CannotCreate(f"{path} cannot be opened for writing: {error}", path=where)
    if isinstance(error, apsw.BusyError):
        return NotOurDatabase(f"{path} is open in another program; close that and start again", path=where)
    return StartFault(f"{path} cannot be opened: {error}", path=where)
