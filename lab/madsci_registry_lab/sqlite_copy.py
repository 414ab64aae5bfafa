"""All of a lab's SQLite file read, and written into a new one."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

from madsci_registry.errors import RegistryError
from madsci_registry_lab import sqlite_rows as rows
from madsci_registry_lab.copying import Everything
from madsci_registry_lab.faults import BAD_CONFIGURATION, CANNOT_CREATE, Fault
from madsci_registry_lab.records import ConflictRow, IdRow, NameRow
from madsci_registry_lab.sqlite_database import Database, fault_at_start
from madsci_registry_lab.store import LASTING, State

_NAMES = """SELECT n.name, n.id, n.component_type, n.retired, n.metadata, n.created_at, n.changed_at, n.host,
                   n.moved_id, n.term, n.term_host,
                   (SELECT json_group_array(i.id) FROM ids i WHERE i.name = n.name AND i.id IS NOT n.id)
              FROM names n ORDER BY n.name"""


def read(path: Path) -> Everything:
    """Read all that a file holds. Raises Fault."""
    if not path.exists():
        raise Fault(BAD_CONFIGURATION, f"{path}: there is no such file")
    try:
        with closing(Database(path)) as db, db.transaction(write=True):  # alone with it
            return _everything(db)
    except RegistryError as error:
        raise fault_at_start(error, path) from error


def _everything(db: Database) -> Everything:
    return Everything(
        epoch=db.one("SELECT coalesce(max(epoch), 0) FROM epochs"),
        names=tuple(_name(*row) for row in db.run(_NAMES)),
        ids=tuple(
            (id, IdRow(name=name, host=host, op=op))
            for id, name, host, op in db.run("SELECT id, name, host, op FROM ids ORDER BY id")
        ),
        conflicts=tuple(
            (name, id, ConflictRow(reason=reason, host=host, at=at, state=_state(state), decided_at=decided_at))
            for name, id, reason, host, at, state, decided_at in db.run(
                "SELECT name, id, reason, host, at, state, decided_at FROM conflicts ORDER BY name, id"
            )
        ),
        marks=tuple(db.run("SELECT host, epoch, revision FROM marks ORDER BY host")),
        sessions=tuple(replace(rows.session(*row), locks=0) for row in db.run(rows.SESSION + "1 ORDER BY id")),
        locks=tuple(rows.lock(*row) for row in db.run(rows.LOCK + "1 ORDER BY l.name")),
        events=tuple(rows.event(0, *row[1:]) for row in db.run(rows.EVENT + "1 ORDER BY revision")),
    )


def write(path: Path, given: Everything) -> None:
    """Write all into a file that is new, or empty, in one transaction. Raises Fault."""
    try:
        with closing(Database(path)) as db, db.transaction(write=True):
            for table in ("names", "ids", "conflicts", "marks", "sessions", "events"):
                if db.one(f"SELECT count(*) FROM {table}"):
                    raise Fault(CANNOT_CREATE, f"{path} is not empty: it was left as it is")
            _write(db, given)
            given.check_copy(_everything(db))
    except RegistryError as error:
        raise fault_at_start(error, path) from error


def _write(db: Database, given: Everything) -> None:
    for name in given.names:
        db.run(
            "INSERT INTO names VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL, ?, ?)",
            (name.name, *(_component(name) if name.id is not None else [None] * 7), name.term, name.term_host),
        )
    for id, known in given.ids:
        db.run("INSERT INTO ids VALUES (?, ?, ?, ?)", (id, known.name, known.host, known.op))
    for name in given.names:
        if name.moved_id is not None:
            db.run("UPDATE names SET moved_id = ? WHERE name = ?", (name.moved_id, name.name))
    for called, id, found in given.conflicts:
        state = json.dumps(asdict(found.state), ensure_ascii=False)
        values = (called, id, found.reason, found.host, found.at, state, found.decided_at)
        db.run("INSERT INTO conflicts VALUES (?, ?, ?, ?, ?, ?, ?)", values)
    for mark in given.marks:
        db.run("INSERT INTO marks VALUES (?, ?, ?)", mark)
    for s in given.sessions:
        db.run(
            "INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?)", (s.id, s.host, s.boot, s.lease_s, s.started_at, s.label)
        )
    for lock in given.locks:
        holder = json.dumps(lock.holder, ensure_ascii=False)
        db.run("INSERT INTO locks VALUES (?, ?, ?, ?, ?)", (lock.name, lock.session, lock.term, lock.since, holder))
    for n, event in enumerate(given.events, 1):
        why = json.dumps(event.why, ensure_ascii=False)
        row = (n, event.at, event.kind, event.kind in LASTING, event.name, event.id, event.host, why)
        db.run("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
    # Cursors of the source name its epochs: none of them is known here.
    db.run("INSERT OR REPLACE INTO epochs VALUES (?, ?)", (given.epoch + 1, len(given.events) + 1))


def _name(
    name: str, id: str | None, component_type: str | None, retired: int | None, metadata: str | None,
    created_at: str | None, changed_at: str | None, host: str | None, moved_id: str | None, term: int,
    term_host: str | None, other_ids: str,
) -> NameRow:  # fmt: skip
    if id is None:
        return NameRow(name=name, moved_id=moved_id, term=term, term_host=term_host)
    return NameRow(
        name=name,
        id=id,
        component_type=component_type or "",
        retired=bool(retired),
        metadata=metadata or "{}",
        created_at=created_at or "",
        changed_at=changed_at or "",
        host=host or "",
        other_ids=tuple(sorted(json.loads(other_ids))),
        term=term,
        term_host=term_host,
    )


def _component(row: NameRow) -> list[object]:
    return [row.id, row.component_type, row.retired, row.metadata, row.created_at, row.changed_at, row.host]


def _state(text: str) -> State:
    return State(**json.loads(text))
