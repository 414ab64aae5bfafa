"""What a hostile review broke once: clients that speak out of turn, in one batch, twice, or too much."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from madsci_registry import errors
from madsci_registry.protocol import FRAME_MAX_BYTES, GRACE_S, RESUME_S, Hold
from madsci_registryd.clock import instant
from pair import Pair


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path / "registry.db")
    yield pair
    pair.close()


def test_resolve_in_the_batch_that_ends_its_session_is_refused(pair: Pair) -> None:
    """A request that is decided together with the end of its session is granted nothing."""
    a, b = pair.session("a"), pair.session("b")
    pair.core.registrar.end_session(a.record, "it said bye")
    asked = a.resolve("arm", turn=False)
    waits = a.resolve("leg", wait_s=5.0, turn=False)
    pair.core.registrar.commit()
    assert (asked.code, waits.code) == ("session_required", "session_required")
    assert b.send("lookup", name="arm").ok() == {"id": None}
    assert len(pair.core.queues) == 0
    assert b.resolve("arm").code == "ok"


def test_same_waiting_request_twice_in_a_batch_waits_once(pair: Pair) -> None:
    """A frame that comes twice stands in the queue once; another request under its number is refused."""
    a, b = pair.session("a"), pair.session("b")
    a.resolve("arm")
    b.resolve("arm", wait_s=5.0, seq=7, turn=False)
    b.resolve("arm", wait_s=5.0, seq=7, turn=False)
    other = b.resolve("leg", wait_s=5.0, seq=7, turn=False)
    pair.core.registrar.commit()
    assert pair.core.queues.count("arm") == 1
    error = other.error()
    assert isinstance(error, errors.InvalidError)
    assert error.field == "seq"


def test_cancel_of_one_of_two_requests_with_one_lock_leaves_it(pair: Pair) -> None:
    """A lock that two requests of an owner were answered with ends by cancel only when both are withdrawn."""
    a, b = pair.session("a"), pair.session("b")
    a.resolve("arm")
    one, two = b.resolve("arm", wait_s=9.0, seq=1), b.resolve("arm", wait_s=9.0, seq=2)
    a.ended()
    assert (one.code, two.code) == ("ok", "ok")
    pair.core.registrar.cancel(b.record, 1)
    pair.turn()
    assert b.get("arm")["locked"]
    pair.core.registrar.cancel(b.record, 2)
    pair.turn()
    assert not b.get("arm")["locked"]


def test_release_on_a_full_disk_is_done_when_there_is_space(pair: Pair) -> None:
    """A release or cancel that nobody waits for is not forgotten on a full disk."""
    a = pair.session("a")
    token = a.resolve("arm").ok()["fencing_token"]
    a.resolve("leg", seq=500)
    pair.core.db.pragma("max_page_count", pair.core.db.pragma("page_count"))
    while a.resolve("fill", metadata={f"k{pair.core.store.revision}": "x" * 900}, acquire_lock=False).code == "ok":
        pass
    n = 0
    while a.resolve(f"n{n}", metadata={"x": "y" * 3000}, acquire_lock=False).code == "ok":
        n += 1
    service = pair.core.service
    pair.core.registrar.insist(lambda tx: service.release_instance(tx, a.record, "i"))
    pair.core.registrar.cancel(a.record, 500)
    pair.turn()
    pair.core.db.pragma("max_page_count", 1 << 30)
    pair.wait(1.0)
    assert not a.get("arm")["locked"]
    assert not a.get("leg")["locked"]
    assert a.resolve("arm").ok()["fencing_token"] > token


def test_renamed_away_tells_no_old_stories(pair: Pair) -> None:
    """A resuming holder is told of a rename only for what it holds under the new name alone."""
    a = pair.session("a")
    answer = a.resolve("arm").ok()
    hold = Hold(name="arm", instance="i", fencing_token=answer["fencing_token"])
    service = pair.core.service
    a.send("rename", old="arm", new="hand", id=answer["id"], force=True).ok()
    assert [line["to"] for line in service.renamed_away("a", [hold])] == ["hand"]
    a.resolve("arm").ok()  # a new component of the old name: it holds both
    assert service.renamed_away("a", [hold]) == []
    b = pair.session("b")
    back = b.resolve("eye").ok()
    for old, new in (("eye", "ear"), ("ear", "eye")):
        b.send("rename", old=old, new=new, id=back["id"], force=True).ok()
    assert service.renamed_away("b", [Hold(name="eye", instance="i", fencing_token=back["fencing_token"])]) == []


def test_import_report_of_long_names_fits_a_frame(pair: Pair) -> None:
    """However long the names and reasons, a page of the report fits a frame and every entry is reported."""
    a = pair.session("a")
    entries: list[Any] = [['"' * 200 + str(n), {"id": "no"}] for n in range(2000)] + [["x" * 100_000, {}]]
    page = a.send("import", upload="u", entries=entries[:1000]).ok()
    reply = a.send("import", upload="u", entries=entries[1000:], last=True)
    lines: list[Any] = []
    while True:
        assert len(json.dumps(reply.reply)) < FRAME_MAX_BYTES
        page = reply.ok()
        lines += page["report"]
        if page["cursor"] is None:
            break
        reply = a.send("import", upload="u", report_from=page["cursor"])
    assert len(lines) == 2001
    assert {outcome for _, outcome, _ in lines} == {"invalid"}


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "0099-01-01T00:00:00Z", 5])
def test_instant_out_of_range_is_none(text: Any) -> None:
    """A date that cannot be told in UTC, or would not sort as text, is none; it breaks nothing."""
    assert instant(text) is None


def test_cursor_of_another_backup_is_a_conflict(pair: Pair) -> None:
    """A second backup in a session ends the first, which is told so and never goes on in the other's data."""
    a = pair.session("a")
    first = a.send("backup").ok()["cursor"]
    second = a.send("backup").ok()["cursor"]
    assert a.send("backup", cursor=first).code == "conflict"
    assert a.send("backup", cursor=second).code == "ok"


def test_session_is_not_ended_while_its_client_may_wait_to_be_heard(pair: Pair) -> None:
    """Where the daemon is behind with those who connected, who lost its connection may be among them: its locks stay
    until the daemon has caught up, and GRACE_S at most."""
    a, b = pair.session("a"), pair.session("b")
    a.resolve("arm")
    pair.core.registrar.is_behind = lambda: True
    a.drop()
    pair.wait(RESUME_S + 1.0)
    assert b.resolve("arm").code == "held"
    a.resume()
    a.drop()
    pair.wait(GRACE_S - 0.1)
    assert b.resolve("arm").code == "held"
    pair.wait(0.3)
    assert b.resolve("arm").code == "ok"
    pair.core.registrar.is_behind = lambda: False
    b.drop()
    pair.wait(RESUME_S)
    assert pair.session("c").resolve("arm").code == "ok"
