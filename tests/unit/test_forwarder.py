"""Identity changes on their way to a real lab: in order, nothing dropped, each once in effect, whatever is lost."""

from __future__ import annotations

import json
from typing import Any

import pytest

from forwarding import Forwarding
from madsci_registry.errors import InvalidError, LabUnavailableError, PermissionDeniedError
from madsci_registryd import lab_changes
from madsci_registryd.forwarder import PACE_S
from madsci_registryd.identity_history import Told

AT = "2026-01-01T00:00:00.000000Z"


def test_change_is_in_the_lab_after_it_was_answered(here: Forwarding) -> None:
    """What a client changes is in the lab, with all that it is: made, renamed, its metadata, retired, revived."""
    id = here.make("arm", rack=1)
    here.run()
    assert here.lab.find("arm").id == id
    assert json.loads(here.lab.find("arm").metadata) == {"rack": 1}
    here.set("arm", rack=2)
    here.rename("arm", "left arm")
    here.retire("left arm")
    here.run()
    entry = here.lab.find("left arm")
    assert (entry.id, entry.retired, json.loads(entry.metadata)) == (id, True, {"rack": 2})
    here.make("left arm")
    here.run()
    assert not here.lab.find("left arm").retired
    assert here.lab.kinds("left arm") == ["created", "metadata", "renamed", "retired", "revived"]
    assert here.forwarder.behind() == 0


def test_change_while_the_lab_is_away_is_delivered_when_it_is_back_in_order(here: Forwarding) -> None:
    """Changes wait for a lab that is away, are counted, and come to it in their order."""
    here.lanes.fault = "away"
    for n in range(50):
        here.make(f"node {n}")
        here.run()
    assert here.away == ["the lab is away"]
    assert here.forwarder.behind() == 50
    here.wait(3600)
    assert here.away == ["the lab is away"], "nothing is sent to a lab that is away"
    here.lanes.fault = ""
    here.keepalive()
    here.wait(1)
    assert here.names_sent() == [f"node {n}" for n in range(50)]
    assert here.forwarder.behind() == 0
    assert here.forwarder.revision == here.lab.mark("here")[1]  # type: ignore[index]


def test_lost_answer_is_asked_for_again_and_counts_once(here: Forwarding) -> None:
    """A request whose answer was lost is sent again; the lab has each change once."""
    here.lanes.fault = "lost"
    id = here.make("arm")
    here.set("arm", rack=2)
    here.run()
    assert here.forwarder.behind() == 2
    here.lanes.fault = ""
    here.keepalive()
    here.set("arm", rack=1)
    here.wait(1)
    assert here.lab.kinds("arm") == ["created", "metadata", "metadata"]
    assert here.lab.find("arm").id == id
    assert here.forwarder.behind() == 0


def test_restart_between_sending_and_noting_sends_nothing_that_the_lab_has(here: Forwarding) -> None:
    """A daemon that is killed after the lab has taken changes, and before that was noted, learns it from the lab."""
    here.make("arm")
    here.lanes.fault = "lost"
    here.run()
    before = here.lab.mark("here")
    here.restart()
    here.lanes.fault = ""
    assert here.forwarder.behind() == 1
    here.keepalive()
    assert here.forwarder.behind() == 0
    assert here.lab.mark("here") == before
    assert len(here.sent()) == 1
    assert here.pair.core.store.meta("lab_revision") == before[1]  # type: ignore[index]


def test_restart_while_the_lab_is_away_drops_nothing(here: Forwarding) -> None:
    """Changes that the lab has not outlast the daemon."""
    here.lanes.fault = "away"
    id = here.make("arm")
    here.run()
    here.restart()
    here.lanes.fault = ""
    here.keepalive()
    assert here.lab.find("arm").id == id
    assert len(here.sent("/registry/sync")) == 1, "of the first contact"


def test_swapped_names_come_to_the_lab_as_they_went(here: Forwarding) -> None:
    """Two components that have swapped their names have swapped them in the lab, without a conflict."""
    one, two = here.make("one"), here.make("two")
    here.run()
    here.lanes.fault = "away"
    here.rename("one", "away")
    here.rename("two", "one")
    here.rename("away", "two")
    here.run()
    here.lanes.fault = ""
    here.keepalive()
    here.wait(1)
    assert here.lab.names() == {"one": two, "two": one}
    assert here.lab.registry.store.about().conflicts == 0


def test_change_says_what_it_left_not_what_is_now(here: Forwarding) -> None:
    """Each change goes with the metadata and the retirement of its own time."""
    here.lanes.fault = "away"
    here.make("arm", n=1)
    here.clock.advance(1)
    here.rename("arm", "b")
    here.clock.advance(1)
    here.set("b", n=2)
    here.retire("b")
    here.rename("b", "c")
    here.client.send("revive", name="c", id=here.id_of("c")).ok()
    here.set("c", n=3)
    here.run()
    here.lanes.fault = ""
    here.keepalive()
    here.wait(1)
    states = [change["component"] for body in here.sent() for change in body["changes"]]
    assert [(s["name"], s["metadata"]["n"], s["retired"]) for s in states] == [
        ("arm", 1, False),
        ("b", 1, False),
        ("b", 2, False),
        ("b", 2, True),
        ("c", 2, True),
        ("c", 2, False),
        ("c", 3, False),
    ]
    assert states[0]["changed_at"] < states[1]["changed_at"] < states[2]["changed_at"]


def test_lock_events_are_not_told(here: Forwarding) -> None:
    """Locks come and go without a request to the lab about changes, and are no part of its mark."""
    here.make("arm")
    here.run()
    mark = here.lab.mark("here")
    for _ in range(30):
        here.client.release("arm", here.client.resolve("arm").ok()["fencing_token"])
        here.run()
    assert len(here.sent()) == 1
    assert here.lab.mark("here") == mark
    assert here.forwarder.behind() == 0


def test_large_metadata_go_in_several_requests(here: Forwarding) -> None:
    """A request has some 16 KiB, or one change that is larger."""
    here.lanes.fault = "away"
    made = [here.make(f"n{n:02}", text="x" * size) for n, size in enumerate([16_300, *[5_000] * 10, 16_300, 1])]
    here.run()
    here.lanes.fault = ""
    here.keepalive()
    here.wait(1)
    assert [len(body["changes"]) for body in here.sent()] == [1, 3, 3, 3, 1, 1, 1]
    assert all(len(json.dumps(body)) < 1.1 * lab_changes.CHARS_A_REQUEST for body in here.sent())
    assert [*here.lab.names().values()] == made


def test_loop_is_held_for_some_changes_a_turn_only(here: Forwarding, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long backlog is read a page a turn."""
    here.forwarder.pause()
    for n in range(300):
        here.make(f"n{n}")
    pages: list[int] = []
    read = here.forwarder._history.changes

    def reading(after: int, limit: int) -> list[Told]:
        pages.append(limit)
        return read(after, limit)

    monkeypatch.setattr(here.forwarder._history, "changes", reading)
    here.forwarder.begin(here.lab.mark("here"))
    turns = 0
    while here.forwarder.behind():
        here.turn()
        if here.lanes.work():
            here.clock.advance(PACE_S)
        turns += 1
        assert len(pages) <= turns
    assert turns >= 300 / lab_changes.CHANGES_A_TURN
    assert set(pages) == {lab_changes.CHANGES_A_TURN}


def test_change_that_the_lab_cannot_read_holds_up_none_after_it(here: Forwarding) -> None:
    """A state that the lab refuses with its whole request is found, told and left out; all others are delivered."""
    here.lanes.fault = "away"
    for n in range(10):
        here.make(f"n{n}")
    here.run()
    here.lanes.fault = ""
    post = here.lab.post

    def choosy(route: str, body: dict[str, Any], *, within_s: float) -> dict[str, Any]:
        if any(change["component"]["name"] == "n4" for change in body.get("changes", ())):
            raise InvalidError("changes.4: is not to be read", field="changes.4", reason="is not to be read")
        return post(route, body, within_s=within_s)

    here.lab.post = choosy  # type: ignore[method-assign]
    here.keepalive()
    here.wait(1)
    assert [*here.lab.names()] == [f"n{n}" for n in range(10) if n != 4]
    assert here.forwarder.behind() == 0
    assert here.forwarder.objections.counts == {"invalid": 1}
    here.forwarder.pause()
    for n in range(5):
        here.make(f"after it {n}")
    here.keepalive()
    assert f"after it {n}" in here.lab.names()
    assert len(here.sent()[-1]["changes"]) == 5, "they go together again"


def test_last_change_that_the_lab_cannot_read_is_not_sent_for_ever(here: Forwarding) -> None:
    """Nothing is behind when the one change left is one that the lab cannot read, though it does not take that at
    once."""
    post = here.lab.post
    passed: list[str] = []

    def choosy(route: str, body: dict[str, Any], *, within_s: float) -> dict[str, Any]:
        passed.append(route)
        if body["changes"]:
            raise InvalidError("changes.0: is not to be read", field="changes.0", reason="is not to be read")
        if len(passed) < 3:
            raise PermissionDeniedError("not now")
        return post(route, body, within_s=within_s)

    here.lab.post = choosy  # type: ignore[method-assign]
    here.make("n")
    here.run()
    here.wait(1)
    assert here.forwarder.behind() == 0
    assert len(passed) == 3


def test_refused_host_is_shown_and_tries_again(here: Forwarding) -> None:
    """An error that is none of the changes' own stands in `error`, is tried again at growing intervals, and goes."""
    post = here.lab.post
    tried: list[float] = []

    def refuse(route: str, body: dict[str, Any], *, within_s: float) -> dict[str, Any]:
        tried.append(here.clock.monotonic())
        raise PermissionDeniedError("this token is that of another host")

    here.lab.post = refuse  # type: ignore[method-assign]
    here.make("arm")
    here.run()
    for _ in range(3000):
        here.wait(0.1)
    assert here.forwarder.error == "this token is that of another host"
    assert here.away == []
    assert 10 < len(tried) < 60
    here.lab.post = post  # type: ignore[method-assign]
    here.wait(30)
    assert here.forwarder.error == ""
    assert here.forwarder.behind() == 0
    here.lab.post = refuse  # type: ignore[method-assign]
    before = len(tried)
    here.make("leg")
    for _ in range(17):
        here.wait(0.1)
    assert len(tried) - before >= 3, "the waits are short again"


def test_wake_tries_at_once(here: Forwarding) -> None:
    """Whoever asks for it has the next try now."""
    post = here.lab.post

    def refuse(route: str, body: dict[str, Any], *, within_s: float) -> dict[str, Any]:
        raise PermissionDeniedError("not yet")

    here.lab.post = refuse  # type: ignore[method-assign]
    here.make("arm")
    here.run()
    here.lab.post = post  # type: ignore[method-assign]
    here.forwarder._not_before = here.clock.monotonic() + 30
    here.run()
    assert here.forwarder.behind() == 1
    here.forwarder.wake()
    here.run()
    assert here.forwarder.behind() == 0


def test_lab_that_takes_no_note_is_not_believed(here: Forwarding) -> None:
    """An answer without our mark, or with an earlier one, is no delivery."""

    def forgetful(route: str, body: dict[str, Any], *, within_s: float) -> dict[str, Any]:
        return {"mark": {"epoch": 1, "revision": 1}, "unapplied": []}

    here.lab.post = forgetful  # type: ignore[method-assign]
    here.make("arm")
    here.run()
    assert here.forwarder.behind() == 1
    assert here.forwarder.error


@pytest.mark.parametrize(
    "answer", [{}, {"mark": {"epoch": -1, "revision": 0}, "unapplied": []}, {"mark": None, "unapplied": [{"name": 1}]}]
)
def test_answer_that_is_none_is_as_no_answer(here: Forwarding, answer: dict[str, Any]) -> None:
    """What is not an answer to changes counts as a lab that is away; nothing is dropped."""
    post = here.lab.post
    here.lab.post = lambda route, body, within_s: answer  # type: ignore[method-assign, misc]
    here.make("arm")
    here.run()
    assert len(here.away) == 1
    here.lab.post = post  # type: ignore[method-assign]
    here.keepalive()
    here.wait(1)
    assert "arm" in here.lab.names()


def test_stale_mark_of_a_keepalive_sends_nothing_twice(here: Forwarding) -> None:
    """A keepalive that was answered before the lab had the last changes does not have them sent again."""
    stale = here.lab.mark("here")
    here.make("arm")
    here.run()
    here.forwarder.begin(stale)
    here.run()
    assert len(here.sent()) == 1
    assert here.forwarder.behind() == 0


def test_delivery_is_told(here: Forwarding) -> None:
    """Who asked for it hears up to which revision the lab has all."""
    told: list[int] = []
    here.forwarder.delivered.append(told.append)
    here.make("arm")
    here.run()
    assert told == [here.forwarder.revision] == [(here.lab.mark("here") or (0, 0))[1]]


def test_restored_name_is_told_to_the_lab(here: Forwarding) -> None:
    """What a restore has added is told as what a client made."""
    store = here.pair.core.store
    with here.pair.core.db:
        store.add_component("01M86NDR2BZN87TH2B3SP1N001", "old", "module", AT, '{"a":1}', retired=True)
        store.add_event("restored", AT, name="old", id="01M86NDR2BZN87TH2B3SP1N001", why={"from": "a backup"})
        store.add_event("restored", AT)
    here.run()
    entry = here.lab.find("old")
    assert (entry.component_type, entry.retired, entry.metadata) == ("module", True, '{"a":1}')
    assert here.forwarder.behind() == 0


def test_lab_away_error_class_is_told(here: Forwarding) -> None:
    """`on_away` gets the error that says why."""
    got: list[LabUnavailableError] = []
    here.forwarder._on_away = got.append
    here.lanes.fault = "away"
    here.make("arm")
    here.run()
    assert {error.code for error in got} == {"lab_unavailable"}
