"""What changes made of components, read back from events: exact, whatever came after, and cheap."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from madsci_registryd import database
from madsci_registryd import queries as q
from madsci_registryd.identity_history import IdentityHistory
from madsci_registryd.locks import Owner
from madsci_registryd.store import Store
from pair import Pair

ONE, TWO = "01M86NDR2BZN87TH2B3SP1N001", "01M86NDR2BZN87TH2B3SP1N002"
AT = "2026-01-01T00:00:00.000000Z"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(database.open_database(tmp_path / "registry.db"))
    store.add_component(ONE, "arm", "node", AT, '{"n":9}')
    yield store
    store.db.close()


def told(store: Store, after: int = 0) -> list[tuple[str, str, bool, Any]]:
    """Return id, name, retired and metadata of each change."""
    states = [each.component for each in IdentityHistory(store).changes(after, 100)]
    return [(s["id"], s["name"], s["retired"], json.loads(s["metadata"])) for s in states]


def test_metadata_of_old_events_are_the_present_ones(store: Store) -> None:
    """Where earlier versions noted only what was set, the present metadata are told, until a change that says all."""
    store.add_event("created", AT, name="arm", id=ONE, why={"metadata": {"n": 1}})
    store.add_event("metadata", AT, name="arm", id=ONE, why={"set": {"n": 2}, "unset": []})
    store.add_event("renamed", AT, name="arm", id=ONE, why={"old": "leg"})
    store.add_event("metadata", AT, name="arm", id=ONE, why={"metadata": {"n": 3}})
    assert [metadata for *_, metadata in told(store)] == [{"n": 1}, {"n": 9}, {"n": 9}, {"n": 3}]


def test_events_from_before_a_change_of_ulid_have_the_ulid_of_their_time(store: Store) -> None:
    """The lab learns both ULIDs, and what was known under the first one goes on under the second."""
    store.add_event("created", AT, name="arm", id=ONE, why={"metadata": {"n": 1}})
    store.add_event("retired", AT, name="arm", id=ONE)
    store.change_id(ONE, TWO)
    store.add_event("preferred", AT, name="arm", id=TWO, why={"was": ONE})
    store.rename(TWO, "arm", "leg", AT)
    store.add_event("renamed", AT, name="leg", id=TWO, why={"old": "arm"})
    assert told(store) == [
        (ONE, "arm", False, {"n": 1}),
        (ONE, "arm", True, {"n": 1}),
        (TWO, "leg", True, {"n": 1}),
    ]


def test_retirement_under_an_earlier_ulid_is_followed_by_what_came_under_the_next(store: Store) -> None:
    """The last word before a change counts, under whichever ULID it was said."""
    store.add_event("retired", AT, name="arm", id=TWO)
    store.change_id(ONE, TWO)
    store.add_event("revived", AT, name="arm", id=ONE)
    store.add_event("renamed", AT, name="arm", id=ONE)
    store.add_event("retired", AT, name="arm", id=TWO)
    store.add_event("renamed", AT, name="arm", id=ONE)
    assert [retired for _, _, retired, _ in told(store)] == [True, False, False, True, True]


@pytest.mark.parametrize(("later", "was_retired"), [("revived", True), ("retired", False), (None, True)])
def test_retirement_before_any_event_of_it_is_told_by_the_next_one(
    store: Store, later: str | None, was_retired: bool
) -> None:
    """What a restore brought in retired has no event of that: the next one, or the present, says what it was."""
    store.set_retired(ONE, True, AT)
    store.add_event("renamed", AT, name="arm", id=ONE)
    if later:
        store.add_event(later, AT, name="arm", id=ONE)
    assert told(store)[0][2] is was_retired


def test_sync_tells_one_state_for_each_ulid_the_preferred_one_first(store: Store) -> None:
    """All ULIDs of a component are told, so that a new lab knows them as one."""
    store.change_id(ONE, TWO)
    states, cursor = IdentityHistory(store).states("", 10, 0)
    assert [each.component["id"] for each in states] == [TWO, ONE]
    assert {each.component["name"] for each in states} == {"arm"}
    assert cursor is None


def test_marks_are_events_that_are_never_lost(store: Store) -> None:
    """A mark is the revision of an event that is no lock's: others are trimmed, and may be lost with the power."""
    store.add_event("started", AT)
    store.add_event("granted", AT, name="arm", id=ONE)
    history = IdentityHistory(store)
    assert history.last_revision() == 1
    assert [history.has(revision) for revision in (0, 1, 2, 3)] == [False, True, False, False]


def test_statements_use_the_indexes_of_identity_events(store: Store) -> None:
    """A million events of locks are not looked at."""
    for sql, args, index in (
        (q.IDENTITY_EVENTS, (0, 1), "identity_events"),
        (q.COUNT_IDENTITY_EVENTS, (0, 1), "identity_events"),
        (q.CHANGED_AFTER, (0,), "identity_events"),
        (q.LAST_IDENTITY_REVISION, (), "identity_events"),
        (q.HAS_CHANGED_AFTER, ("", 0), "identity_events_by_id"),
        (q.METADATA_AT, ("", 0), "identity_events_by_id"),
        (q.RETIRED_BEFORE, ("", 0), "retirements_by_id"),
        (q.RETIRED_AFTER, ("", 0), "retirements_by_id"),
        (q.PREFERRED_COUNT, (), "components_by_preferred_id"),
        (q.OTHER_IDS, ("",), "other_ids_by_component"),
    ):
        plan = " ".join(str(row[3]) for row in store.db.execute(f"EXPLAIN QUERY PLAN {sql}", args))
        assert f"INDEX {index} " in f"{plan} ", plan
        assert "TEMP B-TREE FOR ORDER BY" not in plan


# locks, as the lab sees them


def test_confirmed_lock_has_the_labs_term_and_its_first_token(tmp_path: Path) -> None:
    """A confirmation raises a token, never lowers it; with which one the lock was granted stays known."""
    pair = Pair(tmp_path / "registry.db")
    a = pair.session("a")
    grant = a.resolve("arm").ok()
    token, store = grant["fencing_token"], pair.core.store

    def lock() -> tuple[int, int | None, int | None]:
        row = store.by_name("arm")
        assert row is not None and row.lock is not None
        return row.lock.fencing_token, row.lock.first_token, row.lock.lab_term

    with pair.core.db:
        store.confirm_lock(grant["id"], "arm", token, 7)
        assert lock() == (token, None, 7)
        store.confirm_lock(grant["id"], "arm", token + 5, 8)
        assert lock() == (token + 5, token, 8)
        store.confirm_lock(grant["id"], "arm", token + 9, 9)
        assert lock() == (token + 9, token, 9)
        store.confirm_lock(grant["id"], "arm", token, 9)
        assert lock() == (token + 9, token, 9)
    assert store.lab_locks() == [("arm", grant["id"], token + 9, 9)]
    name = store.name_row("arm")
    assert name is not None and name.last_token == token + 9
    store.is_lab_followed = True
    with pair.core.db:
        store.drop_lock(grant["id"], AT)
        row = store.by_name("arm")
        assert row is not None
        store.add_lock(row, Owner("a", "i"), token + 10, AT, 1, 1000, lab_term=3)
    assert store.freed == {grant["id"]}
    assert lock() == (token + 10, None, 3)
    pair.close()


def test_every_change_of_an_identity_keeps_when_it_was(tmp_path: Path) -> None:
    """`changed_at` moves with what the lab is told of, and with nothing else."""
    pair = Pair(tmp_path / "registry.db")
    a = pair.session("a")
    id = a.resolve("arm", acquire_lock=False).ok()["id"]

    def changed_at(name: str = "arm") -> str:
        row = pair.core.store.by_name(name)
        assert row is not None
        return row.changed_at

    at = changed_at()
    for verb, name, fields in (
        ("set_metadata", "arm", {"name": "arm", "set": {"x": 1}}),
        ("retire", "arm", {"name": "arm"}),
        ("revive", "arm", {"name": "arm"}),
        ("rename", "leg", {"old": "arm", "new": "leg"}),
    ):
        pair.wait(1.0)
        a.send(verb, id=id, **fields).ok()
        assert changed_at(name) > at
        at = changed_at(name)
    pair.wait(1.0)
    a.release("leg", a.resolve("leg").ok()["fencing_token"])
    a.resolve("leg", acquire_lock=False).ok()
    assert changed_at("leg") == at
    pair.close()
