"""Requests that wait for changes: all are answered, and many of them hold up nobody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from madsci_registryd.watchers import LOOKS_A_TURN
from pair import Asked, Client, Pair


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path / "registry.db")
    yield pair
    pair.close()


def watch(who: Client, count: int) -> list[Asked]:
    now = who.send("watch", after=0).ok()["revision"]
    asked = [who.send("watch", after=now, wait_s=5.0) for _ in range(count)]
    assert not any(a.reply for a in asked)
    return asked


def test_many_watchers_are_answered_a_few_a_turn_each_once(pair: Pair) -> None:
    """A change is told to all who wait for one, in turns of a bounded size, first come first."""
    asked = watch(pair.session("a"), 3 * LOOKS_A_TURN)
    pair.session("b").resolve("arm")
    for turn in range(1, 4):
        assert [a.code for a in asked] == ["ok"] * turn * LOOKS_A_TURN + [None] * (3 - turn) * LOOKS_A_TURN
        pair.turn()
    assert all([e["kind"] for e in a.ok()["events"]] == ["created", "granted"] for a in asked)


def test_watchers_whose_time_is_over_are_answered_empty(pair: Pair) -> None:
    """Where nothing happens each is answered with no events when its time is over, also where they are many."""
    asked = watch(pair.session("a"), 2 * LOOKS_A_TURN)
    pair.wait(5.0)
    assert all(a.ok()["events"] == [] for a in asked)


def test_watchers_of_an_ended_session_and_cancelled_ones_are_forgotten(pair: Pair) -> None:
    """Who withdraws a watch, or goes, is not answered, and its place in the quota is free again."""
    a, b = pair.session("a"), pair.session("b")
    pair.core.quotas.limits = pair.core.quotas.limits._replace(requests=2)
    now = a.send("watch", after=0).ok()["revision"]
    first = a.send("watch", seq=100, after=now, wait_s=5.0)
    second = b.send("watch", after=now, wait_s=5.0)
    assert a.send("watch", after=now, wait_s=5.0).code == "quota"
    pair.core.registrar.cancel(a.record, 100)
    b.ended()
    again = a.send("watch", after=now, wait_s=5.0)
    pair.session("c").resolve("arm")
    assert (first.reply, second.reply, again.code) == (None, None, "ok")


def test_watcher_whose_events_were_trimmed_meanwhile_is_told(pair: Pair) -> None:
    """What a watcher waits for may be trimmed before it is looked at: it is answered `compacted`, not left out."""
    a = pair.session("a")
    asked = watch(a, LOOKS_A_TURN + 1)
    pair.session("b").resolve("arm")
    last = asked[-1]
    assert last.reply is None
    pair.core.store.set_meta("compacted", pair.core.store.revision)
    pair.turn()
    assert last.code == "compacted"


def test_requests_that_are_repeated_leave_nothing_behind(pair: Pair) -> None:
    """A watch or a waiting resolve that is sent a thousand times under one number is one request to the daemon: it has
    one place, one timer and one answer."""
    holder, a = pair.session("h"), pair.session("a")
    holder.resolve("arm")
    now = a.send("watch", after=0).ok()["revision"]
    timers = pair.core.timers
    before = len(timers._heap)
    watches = [a.send("watch", seq=100, after=now, wait_s=5.0) for _ in range(1000)]
    waits = [a.resolve("arm", seq=101, wait_s=5.0, renew=True) for _ in range(1000)]
    assert len(timers._heap) <= before + 4
    pair.session("b").resolve("leg")
    assert [asked.code for asked in watches if asked.reply] == ["ok"]
    pair.wait(5.0)
    assert [asked.code for asked in waits if asked.reply] == ["waiting"]
