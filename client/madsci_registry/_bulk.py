"""What does not fit one frame: export, import, backup, the lab's conflicts, piece by piece."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from madsci_registry import protocol
from madsci_registry._ask import Ask, Moved, Start
from madsci_registry._session import Session
from madsci_registry.errors import BusyError, InternalError
from madsci_registry.types import ImportedEntry, ImportReport

PIECE_ITEMS = 100
"""Items of one resolve_many: its transaction holds up other clients for some milliseconds."""
EXPORT_TRIES = 10
CONNECTION_TRIES = 3
"""An import or a backup belongs to one connection; so often it begins anew where that ends."""
COPY_PAUSE_S = 0.005
"""Between two requests while the daemon copies its database a few pages at a time."""


def pieces(items: list[Any]) -> Iterator[list[Any]]:
    """Cut items into pieces that fit a frame each, of at most 100 items."""
    piece: list[Any] = []
    size_bytes = 0
    for item in items:
        item_bytes = len(protocol.encode({"": item}))
        if piece and (size_bytes + item_bytes > protocol.PAGE_BYTES or len(piece) >= PIECE_ITEMS):
            yield piece
            piece, size_bytes = [], 0
        piece.append(item)
        size_bytes += item_bytes
    if piece:
        yield piece


def export(session: Session, read: Callable[[dict[str, Any]], Ask]) -> dict[str, Any]:
    """Read the whole registry at one revision."""
    for _ in range(EXPORT_TRIES):
        whole = _export_once(session, read)
        if whole is not None:
            return whole
    raise BusyError(f"the registry changed {EXPORT_TRIES} times while it was being read; try again")


def conflicts(
    session: Session, read: Callable[[dict[str, Any]], Ask], name: str | None, decided: bool
) -> list[dict[str, Any]]:
    """Read the lab's conflicts, all or those of one name, in the order of their names."""
    found: list[dict[str, Any]] = []
    after = None if name is None else [name, ""]
    while True:
        page = session.ask(read({"op": "lab_conflicts", "decided": decided, "after": after}))
        found += [c for c in page["conflicts"] if name is None or c["name"] == name]
        after = page["after"]
        if after is None or (name is not None and after[0] != name):
            return found


def _export_once(session: Session, read: Callable[[dict[str, Any]], Ask]) -> dict[str, Any] | None:
    page = session.ask(read({"op": "export"}))
    revision, whole, entries = page["revision"], dict(page["registry"]), dict(page["entries"])
    while page["cursor"] is not None:
        page = session.ask(read({"op": "export", "cursor": page["cursor"]}))
        if page["revision"] != revision:
            return None
        entries |= page["entries"]
    return {**whole, "entries": entries}


def import_entries(
    session: Session, pairs: list[tuple[str, Any]], mode: str, dry_run: bool, *, timeout_s: float, start: Start
) -> ImportReport:
    """Upload the pairs, have them applied with the last piece, and gather the report."""
    cut = list(pieces([list(pair) for pair in pairs])) or [[]]
    for _ in range(CONNECTION_TRIES):
        connection = session.connection(time.monotonic() + timeout_s, start)
        upload = {"op": "import", "upload": os.urandom(16).hex()}
        last = {"entries": cut[-1], "last": True, "mode": mode, "dry_run": dry_run}
        try:
            for piece in cut[:-1]:
                session.ask(Ask(upload | {"entries": piece}, timeout_s, only=connection))
            page = session.ask(Ask(upload | last, timeout_s, only=connection, is_write=True))
            lines = page["report"]
            while page["cursor"] is not None:
                page = session.ask(Ask(upload | {"report_from": page["cursor"]}, timeout_s, only=connection))
                lines += page["report"]
        except Moved:
            continue  # a daemon that was restarted knows no pieces: part of an import must not pass for the whole
        return ImportReport(dry_run=dry_run, entries=[ImportedEntry(*line) for line in lines])
    raise BusyError(f"the connection was lost {CONNECTION_TRIES} times during the import; try again")


def backup(session: Session, path: Path, read: Callable[[dict[str, Any]], Ask]) -> int:
    """Copy the database into a private file beside `path` and put it there when it is whole."""
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}")
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            size_bytes = _receive(session, file, read)
            os.fsync(file)
        finally:
            os.close(file)
        temporary.rename(path)
    except BaseException:
        temporary.unlink()
        raise
    _sync_folder(path.parent)
    return size_bytes


def _receive(session: Session, file: int, read: Callable[[dict[str, Any]], Ask]) -> int:
    for _ in range(CONNECTION_TRIES):
        first = read({"op": "backup"})
        connection = session.connection(first.deadline, first.start)
        try:
            return _receive_over(session, file, read, connection)
        except Moved:
            os.ftruncate(file, 0)
    raise BusyError(f"the connection was lost {CONNECTION_TRIES} times during the backup; try again")


def _receive_over(session: Session, file: int, read: Callable[[dict[str, Any]], Ask], connection: Any) -> int:
    size_bytes, cursor = 0, None
    while True:
        ask = read({"op": "backup", "cursor": cursor})
        ask.only = connection
        reply = session.ask(ask)
        data = base64.b64decode(reply["data"])
        os.pwrite(file, data, size_bytes)
        size_bytes += len(data)
        cursor = reply["cursor"]
        if cursor is None:
            if size_bytes != reply["total_bytes"]:
                raise InternalError(f"{size_bytes} bytes came of a backup of {reply['total_bytes']}")
            return size_bytes
        if not data:
            time.sleep(COPY_PAUSE_S)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
