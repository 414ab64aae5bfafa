"""The verbs that only read, answered at once from committed state. Long answers come in pages of half a frame."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from heapq import nsmallest
from typing import Any, TypeVar

from madsci_registry import protocol as p
from madsci_registry.errors import CompactedError, NotFoundError
from madsci_registryd.clock import Clock, iso
from madsci_registryd.locks import Queues, Session
from madsci_registryd.service import Service
from madsci_registryd.store import Row, Store
from madsci_registryd.views import exported, session_info

PAGE_ROWS = 50
"""Rows a page at most, so that one page holds the loop for a few milliseconds only."""
SCAN_STEPS = 16_384
"""How much is looked at for a page where few match: 1,000 names, fewer for long patterns. A pattern of n characters may
take 255 n steps at each; this many times that are 4 ms at worst, 0.3 ms for patterns that people write."""
CLASSIC_LOCK_TTL_S = 30.0
"""How long a lock in registry.json looks alive: MADSci's LOCK_TTL (classic API, LockManager)."""

T = TypeVar("T")


class Reads:
    """The verbs. Belongs to the thread that owns the database."""

    def __init__(
        self,
        service: Service,
        sessions: Callable[[], Iterable[Session]],
        clock: Clock,
        status: Callable[[], dict[str, Any]],
        metrics: Callable[[], str],
    ) -> None:
        self._service = service
        self._store: Store = service.store
        self._queues: Queues = service.queues
        self._sessions = sessions
        self._clock = clock
        self._status = status
        self._metrics = metrics

    def lookup(self, who: Session, r: p.Lookup) -> dict[str, Any]:
        """Answer the ULID of a name, null where no component has it."""
        return {"id": self._store.id_of(r.name)}

    def get(self, who: Session, r: p.Get) -> dict[str, Any]:
        """Answer all about a name."""
        row = self._store.by_name(r.name)
        if row is None:
            raise self._service.not_found(r.name)
        return {"component": self._service.show(row)}

    def whois(self, who: Session, r: p.Whois) -> dict[str, Any]:
        """Answer all about a ULID."""
        row = self._store.by_id(r.id)
        if row is None:
            raise NotFoundError(f"no component has the id {r.id!r}", id=r.id)
        return {"component": self._service.show(row)}

    def list(self, who: Session, r: p.List) -> dict[str, Any]:
        """Answer a page of components in the order of their names."""
        retired: bool | None = False
        if r.state == "retired":
            retired = True
        elif r.include_retired:
            retired = None if r.state is None else False
        cursor = r.cursor or ""
        end = self._store.name_further_on(cursor, SCAN_STEPS // (16 + len(r.pattern or "")))
        rows = self._store.components(
            cursor=cursor,
            until=end,
            limit=PAGE_ROWS,
            pattern=r.pattern,
            component_type=r.component_type,
            retired=retired,
            held={"held": True, "free": False}.get(r.state or ""),
        )
        page, cut = cut_page(rows, self._service.show)
        return {"components": page, "cursor": rows[len(page) - 1].name if cut else end}

    def history(self, who: Session, r: p.History) -> dict[str, Any]:
        """Answer a page of events, oldest first: all, or those of a name and of the component that has it."""
        if r.name is None:
            events = self._store.events(r.after, PAGE_ROWS)
        else:
            before = self._store.name_row(r.name)
            id = self._store.id_of(r.name) or (before.renamed_id if before else None)
            if before is None:
                raise self._service.not_found(r.name)
            events = self._store.events_of(r.name, id, r.after, PAGE_ROWS)
        page, cut = cut_page(events, lambda event: event)
        return {"events": page, "cursor": page[-1]["revision"] if cut else None}

    @property
    def revision(self) -> int:
        """The revision of the last event."""
        return self._store.revision

    def events_after(self, after: int) -> dict[str, Any] | None:
        """Answer a watch: a page of events, None where there are none yet.

        Raises: CompactedError where some after that revision are gone.
        """
        oldest = self._store.meta("compacted") or 0
        if after < oldest:
            raise CompactedError(f"history is whole after revision {oldest} only", oldest=oldest)
        events = self._store.events(after, PAGE_ROWS)
        if not events:
            return None
        page, _ = cut_page(events, lambda event: event)
        return {"events": page, "revision": page[-1]["revision"]}

    def sessions(self, who: Session, r: p.Sessions) -> dict[str, Any]:
        """Answer a page of sessions in the order of their ids."""
        waiting: dict[str, int] = {}
        for claim in self._queues:
            waiting[claim.owner.session] = waiting.get(claim.owner.session, 0) + 1
        cursor = r.cursor or ""
        rest = nsmallest(PAGE_ROWS, (s for s in self._sessions() if s.id > cursor), key=lambda s: s.id)
        page, cut = cut_page(rest, lambda s: session_info(s, self._store.held_count(s.id), waiting.get(s.id, 0)))
        return {"sessions": page, "cursor": page[-1]["id"] if cut else None}

    def status(self, who: Session, r: p.Status) -> dict[str, Any]:
        """Answer what the daemon is and does."""
        return self._status()

    def metrics(self, who: Session, r: p.Metrics) -> dict[str, Any]:
        """Answer what Prometheus wants to know."""
        return {"text": self._metrics()}

    def export(self, who: Session, r: p.Export) -> dict[str, Any]:
        """Answer a page of the registry in the format of registry.json."""
        wall = self._clock.wall()
        now, expires_at = iso(wall), iso(wall + CLASSIC_LOCK_TTL_S)
        rows = self._store.components(cursor=r.cursor or "", limit=PAGE_ROWS)
        page, cut = cut_page(rows, lambda row: (row.name, self._exported(row, now, expires_at)))
        return {
            "registry": {"version": 1, "created_at": self._store.meta("created_at"), "updated_at": now},
            "entries": dict(page),
            "revision": self._store.identity_revision,
            "cursor": rows[len(page) - 1].name if cut else None,
        }

    def _exported(self, row: Row, now: str, expires_at: str) -> dict[str, Any]:
        others = self._store.other_ids(row.id)
        return exported(self._service.session, self._service.host, row, now, expires_at, others)


def cut_page(rows: list[T], view: Callable[[T], Any]) -> tuple[list[Any], bool]:
    """Turn rows into what is shown until half a frame is full; say whether more may follow."""
    page: list[Any] = []
    size = 0
    for row in rows:
        shown = view(row)
        size += len(json.dumps(shown, ensure_ascii=False).encode())
        if page and size > p.PAGE_BYTES:
            return page, True
        page.append(shown)
    return page, len(rows) >= PAGE_ROWS
