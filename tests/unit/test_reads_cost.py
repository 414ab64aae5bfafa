"""What reads cost in a large registry: one page holds the loop for a bounded number of SQLite's steps, whoever asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from madsci_registry.types import OldLock
from pair import Client, Pair

NAMES = 20_000
LOCKS = 10_000
EVENTS = 20_000
PAGE_STEPS = 60_000
"""Some 50 rows with what is looked up for each, or 1,000 rows passed over; a scan of all takes several times more."""
AT = "2026-01-01T00:00:00.000000Z"
OLD_LOCK = OldLock(
    holder_pid=1, holder_host="h", holder_instance="i", acquired_at=AT, heartbeat_at=AT, expires_at=AT
)  # fmt: skip


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A registry of many names, one of which has many events under this name and some under the one before, and of a
    session with many locks."""
    pair = Pair(tmp_path_factory.mktemp("large") / "registry.db")
    pair.session("holder").resolve("z")
    db = pair.core.db
    with db:
        names = [(f"n{n:05}",) for n in range(NAMES)]
        db.executemany("INSERT INTO names (name) VALUES (?)", names)
        columns = "(id, name, component_type, created_at, last_seen)"
        components = [(f"u{name}", name, AT, AT) for (name,) in names]
        db.executemany(f"INSERT INTO components {columns} VALUES (?, ?, 'node', ?, ?)", components)
        columns = "(id, session_id, instance, fencing_token, acquired_at, seq)"
        locks = [(f"un{n:05}",) for n in range(NAMES - LOCKS, NAMES)]
        db.executemany(f"INSERT INTO locks {columns} VALUES (?, 'holder', 'i', 1, '', 1)", locks)
        columns = "(revision, at, kind, name, id)"
        events = [(n, AT, "granted", "old" if n <= 100 else "n00007", "un00007") for n in range(1, EVENTS + 1)]
        db.executemany(f"INSERT INTO events {columns} VALUES (?, ?, ?, ?, ?)", events)
    yield pair
    pair.close()


@pytest.fixture
def client(large: Pair) -> Client:
    return large.session(f"s{len(large.core.registrar.sessions)}")


def steps(pair: Pair, do: Callable[[], object]) -> int:
    """Return how many steps SQLite took, to the next hundred."""
    taken = 0

    def count() -> bool:
        nonlocal taken
        taken += 100
        return False

    pair.core.db.set_progress_handler(count, 100)
    try:
        do()
    finally:
        pair.core.db.set_progress_handler(None)
    return taken


def pages(client: Client, op: str, key: str, **fields: Any) -> list[list[Any]]:
    """Return all pages."""
    found: list[list[Any]] = []
    cursor: Any = None
    while True:
        page = client.send(op, **fields | ({} if cursor is None else {key: cursor})).ok()
        found.append(page["components" if op == "list" else "events"])
        cursor = page["cursor"]
        if cursor is None:
            return found


@pytest.mark.parametrize(
    ("op", "fields"),
    [
        ("history", {"name": "n00007"}),
        ("history", {"name": "n00007", "after": EVENTS // 2}),
        ("history", {"name": "n00007", "after": (1 << 53) - 1}),
        ("list", {"pattern": "zzz*"}),
        ("list", {"pattern": "*[0-9]" * 100 + "z"}),
        ("list", {"state": "held"}),
        ("list", {"state": "retired"}),
        ("list", {"component_type": "workcell"}),
        ("list", {}),
        ("export", {}),
        ("sessions", {}),
    ],
    ids=str,
)
def test_page_of_a_read_takes_a_bounded_number_of_steps(
    large: Pair, client: Client, op: str, fields: dict[str, Any]
) -> None:
    """A page of any read costs what a page costs, however much it has to pass over to find what matches."""
    client.send("sessions")  # from now on locks are counted as they come and go
    assert steps(large, lambda: client.send(op, **fields).ok()) <= PAGE_STEPS


def test_long_pattern_is_tried_on_few_names_a_page(client: Client) -> None:
    """A pattern that costs much at each name is tried on so many fewer names before others have their turn."""
    far = [client.send("list", pattern=pattern).ok()["cursor"] for pattern in ("zzz*", "[0-9]" * 800)]
    assert far == ["n00818", "n00003"]


def test_status_counts_nothing_anew(large: Pair) -> None:
    """How many names there are, retired and held, is known without looking at them."""
    large.core.store.counts()
    assert steps(large, large.core.store.counts) <= 100


def test_pages_of_a_list_have_all_that_matches_and_may_be_empty(client: Client) -> None:
    """Matches that lie far apart all come, in order and once, with pages between that have none and a cursor."""
    found = pages(client, "list", "cursor", pattern="n0[26]399")
    assert [c["name"] for page in found for c in page] == [f"n{n:05}" for n in range(NAMES) if n in (2399, 6399)]
    assert [] in found[:-1]
    whole = pages(client, "list", "cursor")
    assert [c["name"] for page in whole for c in page] == [*(f"n{n:05}" for n in range(NAMES)), "z"]


def test_history_of_a_renamed_component_has_each_event_once(client: Client) -> None:
    """What names the component and what names its name come merged, in order, page by page."""
    found = [event["revision"] for page in pages(client, "history", "after", name="n00007", after=0) for event in page]
    assert found == list(range(1, EVENTS + 1))
    assert [e["name"] for e in client.send("history", name="n00007").ok()["events"][:1]] == ["old"]


def test_counts_follow_what_happens(tmp_path: Path) -> None:
    """What is kept of names in use, retired and held, and of the locks of each session, is what counting would find:
    after every change, a refused one, and one that was rolled back."""
    pair = Pair(tmp_path / "registry.db")
    a, b = pair.session("a"), pair.session("b")
    store, db = pair.core.store, pair.core.db
    a.resolve("before")

    def check(names: int, retired: int, held: int, of_a: int, of_b: int) -> None:
        assert store.counts() == (names, retired, held)
        assert (store.held_count("a"), store.held_count("b")) == (of_a, of_b)

    check(1, 0, 1, 1, 0)
    arm = b.resolve("arm").ok()
    check(2, 0, 2, 1, 1)
    assert b.send("rename", old="before", new="leg", id=a.get("before")["id"]).code == "held"
    assert b.resolve("before").code == "held"
    check(2, 0, 2, 1, 1)
    b.release("arm", arm["fencing_token"])
    check(2, 0, 1, 1, 0)
    id = a.get("arm")["id"]
    for _ in range(2):
        a.send("retire", name="arm", id=id)
        check(1, 1, 1, 1, 0)
    db.execute("BEGIN")
    store.set_retired(id, False, AT)
    store.set_old_lock(id, OLD_LOCK)
    store.add_component("u", "new", "node", AT, "{}")
    check(3, 0, 2, 1, 0)
    db.execute("ROLLBACK")
    check(1, 1, 1, 1, 0)
    with db:
        for _ in range(2):
            store.set_old_lock(id, OLD_LOCK)
    check(1, 1, 2, 1, 0)
    with db:
        store.set_old_lock(id, None)
    a.ended()
    check(1, 1, 0, 0, 0)
    pair.close()
