"""The lab's own routes, under /registry: names stand in bodies. One function each; the store decides."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from itertools import pairwise
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, HTTPException, Query, Request

from madsci_registry.errors import InvalidError, RegistryError
from madsci_registry.names import check_metadata
from madsci_registry_lab import bodies as b
from madsci_registry_lab import views
from madsci_registry_lab.feed import Feed
from madsci_registry_lab.gate import sender
from madsci_registry_lab.store import Change, LabStore, Lock, State

PAGE_BYTES = 512 * 1024
"""An answer of our own client's lab has at most 1 MiB."""
_Value = TypeVar("_Value")
LEASE_S = 15.0
"""How long a host may be silent before its locks are another's; it sends each third of it."""


def add_routes(router: APIRouter, store: LabStore, feed: Feed, now: Callable[[], str]) -> None:
    """Add the routes of identities, locks, hosts and changes to a router."""
    _identities(router, store, now)
    _conflicts(router, store)
    _hosts(router, store)
    _locks(router, store)
    _changes(router, store, feed)


def _identities(router: APIRouter, store: LabStore, now: Callable[[], str]) -> None:
    @router.post("/resolve")
    def resolve(request: Request, body: b.Resolve) -> dict[str, Any]:
        """Get a component or make it, and lock its name, in one step."""
        if body.lock is not None and body.session is None:
            raise InvalidError("session: a lock needs one", field="session", reason="a lock needs one")
        at = now()
        state = State(
            id=body.id,
            name=body.name,
            component_type=body.component_type,
            metadata=check_metadata(body.metadata),
            created_at=at,
            changed_at=at,
        )
        want = body.lock.want() if body.lock else None
        done = store.resolve(sender(request, body.host), body.op, state, body.session, want)
        return {"entry": views.entry(done.entry), "is_new": done.is_new, "lock": done.lock and views.lock(done.lock)}

    @router.post("/lookup")
    def lookup(body: b.Lookup) -> dict[str, Any]:
        """Find a component by its name, or by any ULID that it ever had."""
        if (body.name is None) == (body.id is None):
            raise InvalidError("name: give either a name or an id", field="name", reason="give either a name or an id")
        return views.entry(store.find(name=body.name, id=body.id))

    @router.post("/list")
    def list_entries(body: b.List) -> dict[str, Any]:
        """List entries in the order of their names, page by page; `cursor` is where the feed goes on from here."""
        cursor = store.about().cursor
        found = store.entries(body.after, body.limit, body.component_type)
        page, more = _page([(e, views.entry(e)) for e in found], body.limit)
        return {"entries": [view for _, view in page], "after": page[-1][0].name if more else None, "cursor": cursor}

    @router.post("/history")
    def history(body: b.History) -> dict[str, Any]:
        """Tell the changes of a name and of its component, under whatever name."""
        found = store.history(body.name, body.after, body.limit)
        page, more = _page([(e, views.event(e)) for e in found], body.limit)
        return {"events": [view for _, view in page], "after": page[-1][0].revision if more else None}


def _conflicts(router: APIRouter, store: LabStore) -> None:
    @router.post("/conflicts")
    def conflicts(body: b.Conflicts) -> dict[str, Any]:
        """List conflicts with what both sides say."""
        found = store.conflicts(decided=body.decided, after=(body.after[0], body.after[1]), limit=body.limit)
        page, more = _page([(c, views.conflict(c)) for c in found], body.limit)
        after = [page[-1][0].name, page[-1][0].id] if more else None
        return {"conflicts": [view for _, view in page], "after": after}

    @router.post("/merge")
    def merge(request: Request, body: b.Merge) -> dict[str, Any]:
        """Decide a conflict: which ULID the name has; the others stay known as the same component."""
        return views.entry(store.merge(sender(request, body.host), body.name, body.prefer))


def _page(found: list[tuple[_Value, Any]], limit: int) -> tuple[list[tuple[_Value, Any]], bool]:
    """Return values with their views as far as they fit an answer, at least one, and whether there may be more."""
    total = 0
    for n, (_, view) in enumerate(found):
        total += len(json.dumps(view))
        if total > PAGE_BYTES and n > 0:
            return found[:n], True
    return found, len(found) == limit


def _hosts(router: APIRouter, store: LabStore) -> None:
    @router.post("/hosts/register")
    def register(request: Request, body: b.Register) -> dict[str, Any]:
        """Begin a session; an earlier one of the host ends, with its locks."""
        begun = store.register(sender(request, body.host), body.boot, LEASE_S, body.label)
        about = store.about()
        terms = {"lease_s": begun.lease_s, "keepalive_s": begun.lease_s / 3}
        return {"session": begun.id, **terms, "epoch": about.epoch, "cursor": about.cursor, **_mark(store, body.host)}

    @router.post("/hosts/keepalive")
    def keepalive(request: Request, body: b.Keepalive) -> dict[str, Any]:
        """Keep a session, and compare what its host holds with what it has here."""
        kept = store.keep(sender(request, body.host), body.session, body.boot)
        return {"lease_s": kept.lease_s, **_compare(store, kept.host, kept.id, body.holds), **_mark(store, kept.host)}

    @router.post("/hosts/bye")
    def bye(request: Request, body: b.Goodbye) -> dict[str, Any]:
        """End a session, with all its locks."""
        return {"ended": store.end(sender(request, body.host), body.session)}

    @router.get("/hosts")
    def hosts() -> dict[str, Any]:
        """List the hosts that are heard."""
        return {"hosts": [views.session(s) for s in store.sessions()]}


def _mark(store: LabStore, host: str) -> dict[str, Any]:
    mark = store.mark(host)
    return {"mark": asdict(mark) if mark else None}


def _compare(store: LabStore, host: str, session: str, holds: dict[str, int]) -> dict[str, Any]:
    """Say of each lock that the host states: held as stated (not mentioned); given away (lost); neither (missing, to be
    taken again). And which it has here with that term without stating it: taken by a request whose answer it did not
    get, moved by a rename, or released by it just now."""
    here = {lock.name: lock.term for lock in store.locks(session)}
    differing = [name for name, term in holds.items() if here.get(name) != term]
    given = store.given(differing)
    lost, missing = [], []
    for name in differing:
        term, last_host = given.get(name, (0, None))
        if term > holds[name] and last_host != host:
            lost.append({"name": name, "term": term, "host": last_host})
        elif name not in here:
            missing.append(name)
    unstated = {name: term for name, term in here.items() if holds.get(name) != term}
    return {"lost": lost, "missing": missing, "unstated": unstated}


def _locks(router: APIRouter, store: LabStore) -> None:
    @router.post("/lock")
    def lock(request: Request, body: b.Locks) -> dict[str, Any]:
        """Lock several names of the lab; each has a lock or an error of its own."""
        wants = [(wish.name, wish.want()) for wish in body.locks]
        done = store.acquire(sender(request, body.host), body.session, wants)
        return {"locks": [_lock_or_error(name, lock) for (name, _), lock in zip(wants, done, strict=True)]}

    @router.post("/release")
    def release(request: Request, body: b.Release) -> dict[str, Any]:
        """Give back locks, each by its term; one that is not so any more stays as it is."""
        return {"released": store.release(sender(request, body.host), body.session, body.locks)}


def _lock_or_error(name: str, lock: Lock | RegistryError) -> dict[str, Any]:
    return {"name": name, "error": lock.to_wire()} if isinstance(lock, RegistryError) else views.lock(lock)


def _changes(router: APIRouter, store: LabStore, feed: Feed) -> None:
    @router.post("/changes")
    def apply(request: Request, body: b.Changes) -> dict[str, Any]:
        """Take in identity changes of a host, in order, each once in effect."""
        revisions = [body.after, *(c.revision for c in body.changes)]
        if any(a >= z for a, z in pairwise(revisions)) or revisions[-1] > body.upto:
            raise InvalidError("changes: do not grow from after to upto", field="changes", reason="do not grow")
        fit, unfit = _sort([(c.revision, c.component) for c in body.changes])
        done = store.apply(sender(request, body.host), body.epoch, body.after, body.upto, fit)
        return _with_invalid(views.applied(done), unfit)

    @router.post("/sync")
    def sync(request: Request, body: b.Sync) -> dict[str, Any]:
        """Take in all that a host has, in pieces; where the lab has a later word, that stays."""
        fit, unfit = _sort([(0, component) for component in body.components])
        done = store.apply(sender(request, body.host), body.epoch, None, body.upto, fit)
        return _with_invalid(views.applied(done), unfit)

    @router.get("/changes")
    async def changes(
        request: Request,
        cursor: Annotated[str | None, Query(max_length=40)] = None,
        limit: Annotated[int, Query(ge=1, le=b.PAGE_MAX)] = 200,
        wait_s: Annotated[float, Query(ge=0, le=b.WAIT_MAX_S)] = 0.0,
    ) -> dict[str, Any]:
        """Tell all changes after a cursor, waiting for some where there are none; without one, from now on."""
        found = await feed.changes(cursor, limit, wait_s, _gone(request))
        fitting, _ = _page([(e, views.event(e)) for e in found.events], limit)
        return views.page(found.first(len(fitting)) if len(fitting) < len(found.events) else found)


async def _gone(request: Request) -> None:
    """Return when the client has closed its connection, or has sent too much."""
    with suppress(HTTPException):
        while (await request.receive())["type"] != "http.disconnect":
            pass


def _sort(components: list[tuple[int, b.Component]]) -> tuple[list[Change], list[dict[str, Any]]]:
    """Return the changes that may be taken in, and what the others break: those must not stop the ones after them."""
    fit: list[Change] = []
    unfit: list[dict[str, Any]] = []
    for revision, component in components:
        try:
            fit.append(Change(revision, component.state()))
        except RegistryError as error:
            said = {"name": _shown(component.name), "id": _shown(component.id)}
            unfit.append({**said, "reason": "invalid", "why": error.message})
    return fit, unfit


def _shown(text: str) -> str:
    """Return what may not even be text, as text of a bearable length."""
    return text.encode("utf-8", "backslashreplace").decode()[: b.TEXT_MAX_BYTES]


def _with_invalid(answer: dict[str, Any], unfit: list[dict[str, Any]]) -> dict[str, Any]:
    return {**answer, "unapplied": [*answer["unapplied"], *unfit]}
