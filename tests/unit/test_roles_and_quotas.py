"""What only administrators may do, and how much one user may have: real handlers and SQLite, a clock to turn."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import FakeClock
from madsci_registry.errors import PermissionDeniedError, QuotaError
from madsci_registryd.quotas import Limits, Quotas, Usage
from pair import Client, Pair


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path / "registry.db")
    yield pair
    pair.close()


def user(pair: Pair, name: str, uid: int) -> Client:
    return pair.session(name, uid, is_admin=False)


def limit(pair: Pair, **limits: int) -> None:
    pair.core.quotas.limits = Limits()._replace(**limits)


def entry(number: int) -> dict[str, object]:
    return {"id": f"01M8{number:022d}", "component_type": "node", "created_at": "2026-01-01T00:00:00Z"}


# roles


def test_everyone_who_is_let_in_reads_resolves_and_holds(pair: Pair) -> None:
    """A user that is no administrator resolves, holds, reads, renames and retires what is its own."""
    a = user(pair, "a", 1000)
    token = a.resolve("arm").ok()["fencing_token"]
    assert a.release("arm", token)
    id = a.get("arm")["id"]
    assert a.send("rename", old="arm", new="leg", id=id, force=False).ok()["changed"]
    assert a.send("retire", name="leg", id=id).ok()["changed"]
    assert a.send("list").ok()["components"] == []


def test_breaking_a_lock_takes_an_administrator(pair: Pair) -> None:
    """A user that is no administrator breaks no lock, not even its own; the message says who may."""
    a, b = user(pair, "a", 1000), user(pair, "b", 1001)
    token = a.resolve("arm").ok()["fencing_token"]
    for who in (a, b):
        asked = who.send("break_lock", name="arm", fencing_token=token, reason="")
        assert isinstance(asked.error(), PermissionDeniedError)
        assert "admin_group" in str(asked.error())
    assert a.get("arm")["state"] == "held"
    assert pair.session("root", 0).send("break_lock", name="arm", fencing_token=token, reason="").ok()["broken"]


def test_held_name_of_another_user_is_renamed_by_administrators_only(pair: Pair) -> None:
    """By force a user renames what a session of its own holds; what another user holds takes an administrator."""
    a, same, b = user(pair, "a", 1000), user(pair, "same", 1000), user(pair, "b", 1001)
    id = a.resolve("arm").ok()["id"]
    assert b.send("rename", old="arm", new="leg", id=id, force=True).code == "permission_denied"
    assert same.send("rename", old="arm", new="leg", id=id, force=True).ok()["changed"]
    assert pair.session("root", 0).send("rename", old="leg", new="foot", id=id, force=True).ok()["changed"]


def test_name_last_held_by_another_user_is_retired_by_administrators_only(pair: Pair) -> None:
    """Who made or held a name last retires it; another user does not, an administrator does."""
    a, b = user(pair, "a", 1000), user(pair, "b", 1001)
    made = a.resolve("arm", acquire_lock=False).ok()
    assert b.send("retire", name="arm", id=made["id"]).code == "permission_denied"
    b.release("arm", b.resolve("arm").ok()["fencing_token"])
    assert a.send("retire", name="arm", id=made["id"]).code == "permission_denied"
    assert b.send("retire", name="arm", id=made["id"]).ok()["changed"]


def test_last_holder_is_the_one_that_a_hand_over_gave_the_name(pair: Pair) -> None:
    """Where a lock passes from one user to another within one transaction, the second one held the name last."""
    a, b = user(pair, "a", 1000), user(pair, "b", 1001)
    granted = a.resolve("arm").ok()
    waits = b.resolve("arm", wait_s=5.0)
    a.release("arm", granted["fencing_token"])
    b.release("arm", waits.ok()["fencing_token"])
    assert a.send("retire", name="arm", id=granted["id"]).code == "permission_denied"
    assert b.send("retire", name="arm", id=granted["id"]).code == "ok"


def test_imports_that_retire_or_are_large_take_an_administrator(pair: Pair) -> None:
    """A user imports up to 200 entries by merging; `replace` and more take an administrator."""
    a = user(pair, "a", 1000)
    few = [(f"n{i}", entry(i)) for i in range(3)]
    assert a.send("import", upload="u", entries=few, last=True).code == "ok"
    assert a.send("import", upload="v", entries=few, last=True, mode="replace").code == "permission_denied"
    assert a.send("import", upload="v", entries=few, last=True, mode="replace", dry_run=True).code == "ok"
    for n in range(2):
        piece = [(f"m{n}.{i}", entry(1000 + 100 * n + i)) for i in range(100)]
        assert a.send("import", upload="w", entries=piece, last=False).code == "ok"
    assert a.send("import", upload="w", entries=few, last=False).code == "permission_denied"
    root = pair.session("root", 0)
    assert root.send("import", upload="x", entries=few, last=True, mode="replace").code == "ok"


def test_backup_takes_an_administrator(pair: Pair) -> None:
    """A backup holds what all users hold, and two at once are all there may be: it takes an administrator."""
    assert user(pair, "a", 1000).send("backup").code == "permission_denied"


def test_who_did_it_is_in_the_history(pair: Pair) -> None:
    """Each event says by the kernel's word which user made it."""
    a = user(pair, "a", 1000)
    token = a.resolve("arm").ok()["fencing_token"]
    pair.session("root", 0).send("break_lock", name="arm", fencing_token=token, reason="stuck")
    events = a.send("history", name="arm").ok()["events"]
    assert [(event["kind"], event["uid"]) for event in events] == [("created", 1000), ("granted", 1000), ("broken", 0)]


# quotas


def test_names_of_one_user_are_limited(pair: Pair) -> None:
    """A user that has made as many names as it may makes no more, by whatever verb; what it has goes on, and so do
    other users."""
    limit(pair, names=2)
    a, b = user(pair, "a", 1000), user(pair, "b", 1001)
    assert [a.resolve(f"n{i}", acquire_lock=False).code for i in range(3)] == ["ok", "ok", "quota"]
    error = a.resolve("n3").error()
    assert isinstance(error, QuotaError) and (error.what, error.limit) == ("names", 2)
    assert a.send("import", upload="u", entries=[("n4", entry(1))], last=True).code == "quota"
    assert a.resolve("n0").code == "ok"
    assert b.resolve("n2").code == "ok"
    assert b.send("lookup", name="n3").ok() == {"id": None}


def test_names_of_one_user_are_counted_over_a_restart(pair: Pair) -> None:
    """How many names a user made is known to the next daemon too."""
    limit(pair, names=2)
    a = user(pair, "a", 1000)
    assert [a.resolve(f"n{i}").code for i in range(2)] == ["ok", "ok"]
    pair.restart()
    limit(pair, names=2)
    assert user(pair, "again", 1000).resolve("n2").code == "quota"


def test_locks_of_one_user_are_limited_and_given_again_when_released(pair: Pair) -> None:
    """A user that holds as many names as it may gets no other, not by waiting either; after a release, a second later
    at most, it does."""
    limit(pair, locks=2)
    a, b = user(pair, "a", 1000), user(pair, "b", 1001)
    tokens = {name: a.resolve(name).ok()["fencing_token"] for name in ("x", "y")}
    assert a.resolve("z").code == "quota"
    assert b.send("lookup", name="z").ok() == {"id": None}  # nothing was made
    held = b.resolve("z").ok()["fencing_token"]
    waits = a.resolve("z", wait_s=5.0)
    b.release("z", held)
    assert waits.code == "quota"
    assert b.resolve("z").code == "ok"
    a.release("x", tokens["x"])
    pair.wait(1.0)
    assert a.resolve("v").code == "ok"


def test_waiting_requests_of_one_user_are_limited(pair: Pair) -> None:
    """A user may have so many requests waiting; one more is refused, and another user's is not."""
    limit(pair, requests=2)
    a, b, holder = user(pair, "a", 1000), user(pair, "b", 1001), user(pair, "h", 1002)
    holder.resolve("arm")
    assert [a.resolve("arm", wait_s=5.0).code for _ in range(3)] == [None, None, "quota"]
    assert b.resolve("arm", wait_s=5.0).code is None
    assert [a.send("watch", after=1 << 52, wait_s=5.0).code for _ in range(3)] == [None, None, "quota"]


def test_pieces_of_imports_of_one_user_are_limited(pair: Pair) -> None:
    """All unfinished imports of a user's processes together keep so many bytes at most."""
    limit(pair, bytes=1000)
    a, same, b = user(pair, "a", 1000), user(pair, "same", 1000), user(pair, "b", 1001)
    piece = [(f"n{i}", entry(i)) for i in range(20)]
    assert a.send("import", upload="u", entries=piece, last=False).code == "ok"
    assert same.send("import", upload="u", entries=piece, last=False).code == "quota"
    assert b.send("import", upload="u", entries=piece, last=False).code == "ok"
    assert a.send("import", upload="u", entries=[], last=True).code == "quota"


@pytest.mark.parametrize(("limit", "counted_more"), [(2, True), (1000, False)])
def test_usage_is_counted_anew_before_a_refusal_and_where_that_is_dear_once_a_second(
    limit: int, counted_more: bool
) -> None:
    """Nobody is refused by a count that is more than a second old; and where there is much to count, nobody makes the
    daemon count more often."""
    clock, counts = FakeClock(), []
    quotas = Quotas(Limits()._replace(locks=limit), clock)

    def count(uid: int) -> int:
        counts.append(uid)
        return limit

    usage = Usage("locks", quotas, clock, count)
    for _ in range(10):
        with pytest.raises(QuotaError):
            usage.take(5)
    assert (len(counts) > 1) is counted_more
    clock.advance(1.0)
    before = len(counts)
    with pytest.raises(QuotaError):
        usage.take(5)
    assert len(counts) == before + 1


def test_refusals_are_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    """A thousand refusals of one user for one reason are one line in the log, and one more a minute later."""
    clock = FakeClock()
    quotas = Quotas(Limits()._replace(names=0), clock)

    def refuse(uid: int) -> None:
        with pytest.raises(QuotaError):
            quotas.check(uid, "names", 0)

    with caplog.at_level(logging.WARNING):
        for _ in range(1000):
            refuse(1000)
        refuse(1001)
        assert len(caplog.records) == 2
        clock.advance(60.0)
        refuse(1000)
    assert len(caplog.records) == 3
    assert quotas.refused["names"] == 1002
