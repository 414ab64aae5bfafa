"""What every store of a lab promises of its feed and history: over each of them, with a clock to turn."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers import FakeClock, until
from lab_stores import Host, Stores, batch, kinds, state
from madsci_registry.errors import (
    CompactedError,
    InvalidError,
    RegistryError,
)
from madsci_registry_lab.store import (
    Event,
    LabStore,
)

# feed and history


def test_feed_tells_every_change_once_in_order(store: LabStore) -> None:
    """A reader that goes on from cursor to cursor sees every change once, in order, while others write."""
    cursor = start = store.changes(None, 1).cursor
    seen: list[Event] = []
    over = threading.Event()

    def write(n: int) -> None:
        for k in range(25):
            store.resolve(f"host-{n}", str(k), state(f"name-{n}-{k}", n * 25 + k), None, None)

    def read() -> None:
        nonlocal cursor
        while True:
            last = over.is_set()
            page = store.changes(cursor, 7)
            seen.extend(page.events)
            cursor = page.cursor
            if last and not page.events:
                return

    with ThreadPoolExecutor(5) as pool:
        reader = pool.submit(read)
        [*pool.map(write, range(4))]
        over.set()
        reader.result(60)
    assert len({e.name for e in seen}) == len(seen) == 100
    cursor = start
    again: list[Event] = []
    while (page := store.changes(cursor, 7)).events:
        again += page.events
        cursor = page.cursor
    assert again == seen
    assert [e.revision for e in seen] == sorted(e.revision for e in seen)


def test_cursor_goes_on_after_a_restart(stores: Stores) -> None:
    """A cursor from before a restart goes on after it, without a gap."""
    store = stores.open()
    store.resolve("a", "1", state("arm", 1), None, None)
    cursor = store.changes(None, 1).cursor
    store.resolve("a", "2", state("leg", 2), None, None)
    stores.close()
    store = stores.open()
    store.resolve("a", "3", state("eye", 3), None, None)
    assert kinds(store, cursor) == [("created", "leg"), ("created", "eye")]


def test_cursor_of_a_store_that_was_set_back_is_refused(stores: Stores, clock: FakeClock) -> None:
    """A cursor that is newer than a restored backup is refused, however far the store has gone on; one from before the
    backup goes on."""
    store = stores.open()
    store.resolve("a", "1", state("arm", 1), None, None)
    old = store.changes(None, 1).cursor
    stores.close()
    stores.back_up()
    clock.advance(60)
    store = stores.open()
    restarted = store.changes(None, 1).cursor
    store.resolve("a", "2", state("leg", 2), None, None)
    newer = store.changes(None, 1).cursor
    stores.close()
    stores.restore()
    clock.advance(60)
    store = stores.open()
    for n in range(5):
        store.resolve("b", str(n), state(f"name-{n}", 10 + n), None, None)
    for cursor in (newer, restarted):
        with pytest.raises(CompactedError):
            store.changes(cursor, 10)
    assert len(kinds(store, old)) == 5


@pytest.mark.parametrize("cursor", ["", "x", "1", "1.", ".1", "1.2.3", "-1.0", "1.-1", "\u0661.\u0662"])
def test_what_is_no_cursor_is_invalid(store: LabStore, cursor: str) -> None:
    """Text that no lab gave as a cursor is refused as such."""
    with pytest.raises(InvalidError):
        store.changes(cursor, 1)


def test_cursor_of_the_future_is_refused(store: LabStore) -> None:
    """A cursor beyond the last change is of another store."""
    epoch = store.about().epoch
    for cursor in (f"{epoch}.1", f"{epoch + 1}.0", "0.0"):
        with pytest.raises(CompactedError):
            store.changes(cursor, 1)


def test_change_calls_back_and_reading_does_not(store: LabStore) -> None:
    """Whoever wants to hear of changes is called for each, not for what is read or refused."""
    calls: list[int] = []
    store.on_change(lambda: calls.append(1))
    store.resolve("a", "1", state("arm", 1), None, None)
    until(lambda: len(calls) == 1)
    store.resolve("a", "1", state("arm", 1), None, None)
    store.find(name="arm")
    store.expire()
    with pytest.raises(RegistryError):
        store.find(name="leg")
    assert len(calls) == 1


def test_history_follows_the_component_over_its_names(store: LabStore) -> None:
    """History tells all of a name and its component: earlier names, other ULIDs, locks; page by page."""
    host = Host(store, "a")
    batch(store, "a", 0, state("arm", 1), state("leg", 1), state("leg", 1, retired=True), state("leg", 1))
    batch(store, "b", 0, state("leg", 2))
    host.release("leg", host.lock("leg").term)
    told = ["created", "renamed", "retired", "revived", "conflict", "granted", "released"]
    found = store.history("leg", 0, 100)
    assert [e.kind for e in found] == told
    assert found[1].why == {"was": "arm"}
    first = store.history("leg", 0, 3)
    assert [*first, *store.history("leg", first[-1].revision, 100)] == found


def test_acknowledged_changes_survive_a_restart(stores: Stores) -> None:
    """Entries, other ULIDs, conflicts, marks and terms are the same after a restart."""
    store = stores.open()
    host = Host(store, "a")
    batch(store, "a", 0, state("arm", 1), state("leg", 2, metadata='{"a":[1,2]}'))
    batch(store, "b", 0, state("arm", 3))
    host.lock("arm", proposal=41)

    def all_of(store: LabStore) -> tuple[object, ...]:
        conflicts = store.conflicts(decided=True, after=("", ""), limit=9)
        return store.entries("", 9), conflicts, store.mark("a"), store.mark("b"), store.sessions()

    before = all_of(store)
    stores.close()
    assert all_of(stores.open()) == before
