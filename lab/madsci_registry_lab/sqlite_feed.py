"""The events of a lab's SQLite file: written with each change, read as feed and history, and where a cursor leads.

A cursor is `epoch.revision`. Each start of the lab is an epoch and notes its first revision. So a cursor is good if the
file knows its epoch, and that epoch has come as far: after a restore of an older backup, either is not so.
"""

from __future__ import annotations

import json
import random
from typing import Any

from madsci_registry.errors import CompactedError, InvalidError
from madsci_registry_lab import sqlite_rows as rows
from madsci_registry_lab.clock import Clock, iso
from madsci_registry_lab.sqlite_database import Database
from madsci_registry_lab.store import LASTING, Event, Page

KEPT_EVENTS = 1_000_000
"""Events of locks and hosts that are older than so many revisions are trimmed, as the daemon does."""
TRIM_EVENTS = 1000
"""At most so many at a time."""


class Journal:
    """Events and cursors. Every method belongs inside a transaction of the database."""

    def __init__(self, db: Database, clock: Clock) -> None:
        """Begin a new epoch."""
        self._run, self._one, self._clock = db.run, db.one, clock
        self.revision = self._last()
        """Of the last event written, or tried: a rollback leaves a gap. Readers ask the file: what was not committed is
        never in a cursor."""
        last, now = int(self._one("SELECT coalesce(max(epoch), 0) FROM epochs")), int(clock.wall())
        # Where no clock tells it, a store that was set back shall not come to an epoch that it had.
        self.epoch = now if now > last else last + random.randint(1, 100)
        self._run("INSERT INTO epochs VALUES (?, ?)", (self.epoch, self.revision + 1))

    def add(self, kind: str, name: str | None, id: str | None, host: str | None, **why: Any) -> None:
        """Write an event."""
        self.revision += 1
        text = json.dumps(why, ensure_ascii=False)
        row = (self.revision, iso(self._clock.wall()), kind, kind in LASTING, name, id, host, text)
        self._run("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    def cursor(self, revision: int | None = None) -> str:
        """Return the cursor behind a revision; None: behind all."""
        return f"{self.epoch}.{self._last() if revision is None else revision}"

    def changes(self, cursor: str | None, limit: int) -> Page:
        """See LabStore."""
        if cursor is None:
            return Page((), self.cursor())
        events = self._events("revision > ? ORDER BY revision LIMIT ?", self._revision_of(cursor), limit)
        return Page(tuple(events), self.cursor(events[-1].revision if events else None))

    def history(self, name: str, after: int, limit: int) -> list[Event]:
        """See LabStore."""
        where = """revision IN (SELECT revision FROM events WHERE name = ?1 AND revision > ?2
                                UNION SELECT e.revision FROM ids i JOIN events e ON e.id = i.id
                                 WHERE i.name = ?1 AND e.revision > ?2) ORDER BY revision LIMIT ?3"""
        return self._events(where, name, after, limit)

    def trim(self) -> None:
        """Delete some of the events that need not be kept any more, and note up to where."""
        before = self.revision - KEPT_EVENTS
        if before <= 0:
            return
        oldest = "SELECT revision FROM events WHERE lasting = 0 AND revision <= ? ORDER BY revision LIMIT ?"
        last = self._one(f"SELECT max(revision) FROM ({oldest})", (before, TRIM_EVENTS))
        if last is not None:
            self._run("DELETE FROM events WHERE lasting = 0 AND revision <= ?", (last,))
            self._run("INSERT OR REPLACE INTO meta VALUES ('compacted', ?)", (last,))

    def _last(self) -> int:
        return int(self._one("SELECT coalesce(max(revision), 0) FROM events"))

    def _revision_of(self, cursor: str) -> int:
        """Return a cursor's revision, if all that came after it is here."""
        epoch, _, revision = cursor.partition(".")
        if not (cursor.isascii() and len(cursor) < 40 and epoch.isdecimal() and revision.isdecimal()):
            raise InvalidError("cursor: is none of a lab", field="cursor", reason="is none of a lab")
        if int(epoch) > self.epoch:  # may not even fit a column
            raise _compacted(0)
        first = self._one("SELECT first_revision FROM epochs WHERE epoch = ?", (int(epoch),))
        following = self._one("SELECT min(first_revision) FROM epochs WHERE epoch > ?", (int(epoch),))
        end = self._last() if following is None else following - 1
        oldest: int = self._one("SELECT coalesce(max(value), 0) FROM meta WHERE key = 'compacted'")
        if first is None or not oldest <= int(revision) <= end:
            raise _compacted(oldest)
        return int(revision)

    def _events(self, where: str, *args: Any) -> list[Event]:
        return [rows.event(*row) for row in self._run(rows.EVENT + where, args)]


def _compacted(oldest: int) -> CompactedError:
    return CompactedError("what came after that cursor is not known (any more): list the entries", oldest=oldest)
