"""`verify` and `restore`: what may be done to a registry while no daemon serves it.

A restore is the backup plus whatever the live database and registry.json know beyond it. Identities are never
unlearnt: where the live database is whole, it is the base and the backup adds to it; where it is not, it is put aside
and the backup is the base, to which is added what can still be read elsewhere. Where one name has two ULIDs, both stay
known: the name keeps the ULID of the base, and that is reported; but ULIDs that either side knows as one component stay
one. Fencing tokens only grow: the highest of both counts.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from madsci_registry import registry_json
from madsci_registryd import database, holders, messages, offline
from madsci_registryd.clock import SystemClock, instant, iso
from madsci_registryd.faults import CannotCreate, CorruptDatabase, DiskFull, NotOurDatabase, os_fault
from madsci_registryd.identities import TOKENS_A_TERM
from madsci_registryd.instance import InstanceLock
from madsci_registryd.merging import other_ids
from madsci_registryd.settings import Places, Settings
from madsci_registryd.store import Store

log = logging.getLogger(__name__)

_ROWS = """
    SELECT c.id, c.name, c.component_type, c.retired, c.created_at, c.last_seen, c.metadata, c.workcell_id,
           {changed_at}, n.last_token FROM components c JOIN names n ON n.name = c.name"""
_OTHER_IDS = "SELECT component_id, id FROM other_ids"
_LAB_VERSION = 4
"""The schema that brought `changed_at` and other_ids."""


class Found(NamedTuple):
    """A component that a source of the restore knows."""

    id: str
    name: str
    component_type: str
    retired: int
    created_at: str
    last_seen: str
    metadata: str
    workcell_id: str | None
    changed_at: str
    last_token: int


def verify_database(settings: Settings) -> list[str]:
    """Check a registry's database in full and list what is wrong; empty: it is whole.

    Raises: StartFault where it cannot be opened, or a daemon serves it.
    """
    places = Places(settings)
    if not places.database.exists():
        raise CannotCreate(f"there is no database {places.database}", path=str(places.database))
    with offline.locked(places):
        db = database.open_database(places.database)
        try:
            return database.faults_of(db)
        except database.DatabaseError as error:
            return [str(error)]
        finally:
            db.close()


def restore_backup(settings: Settings, file: Path, token_floor: int = 0) -> list[str]:
    """Restore a backup and return the report, a line for each thing that a person should know.

    Every fencing token that is given afterwards is above `token_floor`, too: for hosts whose clock may be behind the
    backup's, where nothing but a device still knows the highest one. 0 to (2^33 - 2^20) * 2^20.

    Raises: StartFault where the backup is not whole or not ours, a daemon serves the registry, or nothing can be
    written; the database is then as it was.
    """
    places = Places(settings)
    try:
        places.state.mkdir(mode=0o755, exist_ok=True)
    except OSError as error:
        raise os_fault(error, str(places.state)) from error
    with offline.locked(places) as lock:
        return _restore(places, lock, file, token_floor)


def _restore(places: Places, lock: InstanceLock, file: Path, token_floor: int) -> list[str]:
    staged = places.database.with_name(f"{places.database.name}.restore")
    try:
        _stage(file, staged)
        if _is_whole(places.database):
            report, base = _merge(places.database, staged), "the live database"
        else:
            report, base = _replace(places, staged), "the backup"
            report += _adopt_json(places)
            lock.note(pid=None, restored=holders.boot_id())  # holders get time to say what they hold
        if report or token_floor:
            _record(places.database, base, token_floor)
        log.info("restored from %s: %d lines of report", file, len(report), extra=messages.RESTORED(backup=file))
        return report or ["nothing to do: the live database knows all that the backup knows"]
    except database.DiskFullError:
        raise DiskFull(f"no space for the restore in {places.state}", path=str(places.state)) from None
    except OSError as error:
        raise os_fault(error, "restore") from error
    finally:
        for suffix in ("", "-wal", "-shm", "-journal"):
            Path(f"{staged}{suffix}").unlink(missing_ok=True)


def _stage(file: Path, staged: Path) -> None:
    """Copy the backup beside the database, bring it to our schema and check it whole."""
    if not file.is_file():
        raise CannotCreate(f"there is no backup {file}", path=str(file))
    database.check_header(file)
    for suffix in ("", "-wal"):
        Path(f"{staged}{suffix}").unlink(missing_ok=True)
    shutil.copyfile(file, staged)
    staged.chmod(0o600)
    with staged.open("rb+") as copy:
        os.fsync(copy.fileno())
    db = database.open_database(staged)
    try:
        found = database.faults_of(db)
    finally:
        db.close()
    if found:
        raise CorruptDatabase(f"the backup {file} is damaged: {found[0]}", path=str(file))


def _is_whole(path: Path) -> bool:
    if not path.exists() or not path.stat().st_size:
        return False
    try:
        db = database.open_database(path)
    except NotOurDatabase:
        raise  # sound, but not to be replaced
    except CorruptDatabase:
        return False
    try:
        return not database.faults_of(db)
    except database.DatabaseError:
        return False
    finally:
        db.close()


def _replace(places: Places, staged: Path) -> list[str]:
    """Put the damaged database aside and the backup in its place, then add what the damaged one still tells."""
    report = []
    # Sessions and locks of the backup's time are over: who holds something now says so itself.
    db = database.open_database(staged)
    with database.transaction(db):
        db.execute("DELETE FROM locks")
        db.execute("DELETE FROM sessions")
    db.close()
    with staged.open("rb+") as copy:
        os.fsync(copy.fileno())
    aside = None
    if places.database.exists():
        stamp = iso(SystemClock().wall()).replace(":", "").replace(".", "")
        aside = places.database.with_name(f"{places.database.name}.damaged-{stamp}")
        aside.hardlink_to(places.database)  # a second name: at every instant there is a database
        report.append(f"the damaged database was put aside as {aside}")
    with suppress(FileNotFoundError):  # it belongs to the damaged one, and would be read into the backup
        wal = Path(f"{places.database}-wal")
        wal.rename(f"{aside}-wal") if aside else wal.unlink()
    staged.rename(places.database)
    database.sync_folder(places.state)
    report.append("the backup is the database now")
    if aside is not None:
        report += _salvage(places.database, aside)
    return report


def _salvage(path: Path, damaged: Path) -> list[str]:
    """Add what a damaged database still gives. Read only from a copy opened as data, row by row."""
    rows: list[Found] = []
    others: dict[str, list[str]] = {}
    gave_up = []
    try:
        db = database.Connection(str(damaged))
        try:
            _read(db, rows, others)
        finally:
            db.close()
    except (database.DatabaseError, UnicodeDecodeError) as error:
        gave_up = [f"the damaged database gave up ({len(rows)} rows read before: {error})"]
    return [*_add(path, rows, others, "the damaged database"), *gave_up]


def _read(db: database.Connection, rows: list[Found], others: dict[str, list[str]]) -> None:
    """Add to `rows` the components of a database, of whatever schema, and to `others` what other ULIDs they have."""
    has_lab = int(str(db.pragma("user_version"))) >= _LAB_VERSION
    for id, other in db.execute(_OTHER_IDS) if has_lab else ():
        others.setdefault(id, []).append(other)
    changed_at = "c.changed_at" if has_lab else "c.created_at"
    rows.extend(Found(*row) for row in db.execute(_ROWS.format(changed_at=changed_at)))


def _merge(path: Path, staged: Path) -> list[str]:
    db = database.open_database(staged)
    rows: list[Found] = []
    others: dict[str, list[str]] = {}
    _read(db, rows, others)
    tokens = list(db.execute("SELECT name, last_token FROM names"))
    db.close()
    report = _add(path, rows, others, "the backup")
    live = database.open_database(path)
    with database.transaction(live):
        for name, token in tokens:
            live.execute("INSERT INTO names (name) VALUES (?) ON CONFLICT DO NOTHING", (name,))
            live.execute("UPDATE names SET last_token = max(last_token, ?) WHERE name = ?", (token, name))
    live.close()
    return report


def _record(path: Path, base: str, token_floor: int) -> None:
    """Tell watchers, by an event above all that they can have seen, and let the next start begin above the floor."""
    now = SystemClock().wall()
    db = database.open_database(path)
    with database.transaction(db):
        store = Store(db)
        epoch = max(int(store.meta("epoch") or 0), token_floor // TOKENS_A_TERM)
        store.set_meta("epoch", epoch)
        # As a start does it: revisions of the time between the backup and now are behind this one.
        store.raise_revision(max(store.revision + (1 << 20), epoch << 20, int(now) << 20))
        why = {"base": base} | ({"token_floor": token_floor} if token_floor else {})
        store.add_event("restored", iso(now), uid=os.geteuid(), pid=os.getpid(), why=why)
    db.close()


def _adopt_json(places: Places) -> list[str]:
    """Add what registry.json knows beyond the database, or what can be read of it."""
    try:
        document = registry_json.parse(places.registry.read_bytes())
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"{places.registry} could not be read: {error}"]
    rows, others = [], {}
    for name, entry in document.entries.items():
        if registry_json.entry_fault(name, entry):
            continue
        text = json.dumps(entry.get("metadata") or {})
        now = iso(SystemClock().wall())
        made, seen = instant(entry.get("created_at")) or now, instant(entry.get("last_seen")) or now
        found = (entry["id"], name, entry["component_type"], 0, made, seen, text, entry.get("workcell_id"), made, 0)
        rows.append(Found(*found))
        others[entry["id"]] = other_ids(entry)
    unread = [f"{places.registry}: {fault}" for fault in document.faults]
    return _add(places.database, rows, others, str(places.registry)) + unread


def _add(path: Path, rows: list[Found], others: dict[str, list[str]], source: str) -> list[str]:
    """Add what the database at `path` does not know of these components, in one transaction."""
    report = []
    db = database.open_database(path)
    store = Store(db)
    now = iso(SystemClock().wall())
    with database.transaction(db):
        for found in rows:
            if not (registry_json.is_id(found.id) and isinstance(found.name, str)):
                continue
            report += _add_one(store, found, others.get(found.id, ()), source, now)
    db.close()
    return report


def _add_one(store: Store, found: Found, others: Sequence[str], source: str, now: str) -> list[str]:
    """Add a component, or what of its ULIDs is not known, and report that."""
    others = [other for other in others if registry_json.is_id(other)]
    known = store.by_id(found.id)
    same = known or next((row for row in map(store.by_id, others) if row is not None), None)
    report = []
    if same is None:
        report.append(_add_component(store, found, source, now))
    elif known is None:
        store.change_id(same.id, found.id)
        why = {"was": same.id, "by": source}
        store.add_event("preferred", now, name=same.name, id=found.id, uid=os.geteuid(), pid=os.getpid(), why=why)
        report.append(f"{same.name!r} is {found.id} now, as {source} has it; {same.id} stays known as the same one")
    home = store.by_id(found.id)
    assert home is not None
    for other in others:
        if store.by_id(other) is None:
            store.add_other_id(home.id, other)
            report.append(f"{home.name!r} = {home.id} is {other} too, as {source} has it")
    return report


def _add_component(store: Store, found: Found, source: str, now: str) -> str:
    taken = store.by_name(found.name)
    shown = found.name
    if taken is not None:
        shown = f"{found.name} ({found.id})"
        line = f"conflict: {found.name!r} is {taken.id}; {found.id} from {source} is kept as {shown!r}, retired"
    else:
        line = f"added {found.name!r} = {found.id} from {source}"
    retired = bool(found.retired) or taken is not None
    store.add_component(
        found.id, shown, found.component_type, now, found.metadata, created_at=found.created_at,
        last_seen=found.last_seen, changed_at=found.changed_at, retired=retired, workcell_id=found.workcell_id,
    )  # fmt: skip
    store.raise_token(shown, found.last_token)
    metadata = json.loads(found.metadata)
    why = {"from": source, "component_type": found.component_type, "retired": retired, "metadata": metadata}
    store.add_event("restored", now, name=shown, id=found.id, uid=os.geteuid(), pid=os.getpid(), why=why)
    return line
