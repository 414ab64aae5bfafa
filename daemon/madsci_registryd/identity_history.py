"""What changes made of components, as the lab is told of it: whole states, each as one change left it.

Not as they are now: where two components have swapped their names, the later states sent alone would contradict what
the lab has. An event has its name and ULID of that time; the rest is what the nearest events say, else the present.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from madsci_registryd import queries as q
from madsci_registryd.store import Row, Store


class Told(NamedTuple):
    """A component as the lab is told of it."""

    component: dict[str, Any]
    """As the lab's routes have it, but for `metadata`: JSON text."""
    revision: int
    """Of the change that left it so; 0: it is so now."""

    @property
    def size(self) -> int:
        """About how many characters it has as JSON."""
        return len(self.component["metadata"]) + len(self.component["name"]) + 300


class IdentityHistory:
    """Reads events and components. Belongs to the thread that owns the database; sees what is committed."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._run = store.db.execute

    def changes(self, after: int, limit: int) -> list[Told]:
        """Return what the first `limit` changes after a revision made of their components."""
        found = []
        for revision, at, kind, name, id, metadata in self._run(q.IDENTITY_EVENTS, (after, limit)):
            row = self._store.by_id(id)
            assert row is not None, "components are never deleted"
            ids = [row.id, *self._store.other_ids(row.id)]
            state = {
                "id": id,
                "name": name,
                "retired": kind == "retired" or (kind != "revived" and self._was_retired(row, ids, revision)),
                "metadata": metadata or self._metadata_at(row, ids, revision),
                "changed_at": at,
            }
            found.append(Told(_component(row) | state, revision))
        return found

    def states(self, cursor: str, limit: int, upto: int) -> tuple[list[Told], str | None]:
        """Return the present states of up to `limit` components, those after `cursor` in the order of their names, one
        for each of their ULIDs, the preferred one first; and where it goes on, None: nowhere. Without those that have
        changed after revision `upto`: their changes tell all of them."""
        rows = self._store.components(cursor=cursor, limit=limit)
        found = []
        for row in rows:
            ids = [row.id, *self._store.other_ids(row.id)]
            if not any(self._run(q.HAS_CHANGED_AFTER, (id, upto)).fetchone() for id in ids):
                found += [Told(_component(row) | {"id": id}, 0) for id in ids]
        return found, rows[-1].name if len(rows) == limit else None

    def count(self, after: int, most: int) -> int:
        """Return how many changes there are after a revision, `most` where there are more."""
        return int(self._one(q.COUNT_IDENTITY_EVENTS, (after, most)))

    def last_revision(self) -> int:
        """Return the revision of the last event that is no lock's: it survives a power loss, and is never trimmed."""
        return int(self._one(q.LAST_IDENTITY_REVISION))

    def has(self, revision: int) -> bool:
        """Tell whether there is such an event: not where the registry was set back to a backup, or is another one."""
        return bool(self._one(q.IS_IDENTITY_REVISION, (revision,)))

    def _one(self, sql: str, args: tuple[Any, ...] = ()) -> Any:
        row = self._run(sql, args).fetchone()
        return row[0] if row else None

    def _was_retired(self, row: Row, ids: list[str], revision: int) -> bool:
        before = [found for id in ids for found in self._run(q.RETIRED_BEFORE, (id, revision))]
        if before:
            return bool(max(before)[1])
        after = [found for id in ids for found in self._run(q.RETIRED_AFTER, (id, revision))]
        return not min(after)[1] if after else row.retired

    def _metadata_at(self, row: Row, ids: list[str], revision: int) -> str:
        found = [found for id in ids for found in self._run(q.METADATA_AT, (id, revision))]
        return str(max(found)[1] or row.metadata) if found else row.metadata


def _component(row: Row) -> dict[str, Any]:
    return {
        "id": row.id,
        "name": row.name,
        "component_type": row.component_type,
        "retired": row.retired,
        "metadata": row.metadata,
        "created_at": row.created_at,
        "changed_at": row.changed_at,
        "last_seen": row.last_seen,
    }
