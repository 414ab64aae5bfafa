"""Identity changes on their way to a real lab: in order, nothing dropped, each once in effect, whatever is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forwarding import Forwarding, InnerLab
from helpers import FakeClock
from madsci_registry.errors import InvalidError, LabUnavailableError, PermissionDeniedError
from madsci_registry_lab.store import Change, State
from madsci_registryd import lab_changes
from madsci_registryd.forwarder import PACE_S
from madsci_registryd.identity_history import Told

AT = "2026-01-01T00:00:00.000000Z"


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Forwarding]:
    """A host whose lab is there and has all."""
    with Forwarding(tmp_path) as forwarding:
        forwarding.keepalive()
        yield forwarding


def sent(here: Forwarding, route: str = "/registry/changes") -> list[dict[str, Any]]:
    """Return what was sent to a route of the lab."""
    return [body for asked, body in here.lab.asked if asked == route]


def names_sent(here: Forwarding) -> list[str]:
    """Return the names of all changes that were sent, in order, repeats included."""
    return [change["component"]["name"] for body in sent(here) for change in body["changes"]]


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
    assert names_sent(here) == [f"node {n}" for n in range(50)]
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
    assert len(sent(here)) == 1
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
    assert len(sent(here, "/registry/sync")) == 1, "of the first contact"


def test_lab_that_was_set_back_is_told_again_from_its_mark(here: Forwarding, tmp_path: Path) -> None:
    """A lab that was restored from a backup gets what it has lost, by the next keepalive, though nothing changes."""
    here.make("first")
    here.run()
    mark = here.lab.mark("here")
    assert mark is not None
    ids = {name: here.make(name) for name in ("second", "third")}
    here.run()
    older = InnerLab(tmp_path / "older", FakeClock())
    here.lanes.lab, newer, here.lab = older, here.lab, older
    older.registry.store.apply("here", mark[0], None, mark[1], [])
    here.keepalive()
    here.keepalive()
    assert older.names() == ids
    assert len(sent(here, "/registry/sync")) == 0
    older.close()
    here.lab = newer


def test_lab_that_was_set_back_is_noticed_by_its_refusal(here: Forwarding, tmp_path: Path) -> None:
    """Changes that do not follow on what a restored lab has are answered with its mark, and sent from there."""
    here.make("first")
    here.run()
    mark = here.lab.mark("here")
    assert mark is not None
    here.make("second")
    here.run()
    older = InnerLab(tmp_path / "older", FakeClock())
    here.lanes.lab, newer, here.lab = older, here.lab, older
    older.registry.store.apply("here", mark[0], None, mark[1], [])
    here.make("third")
    here.run()
    here.wait(1)
    assert [*older.names()] == ["second", "third"]
    older.close()
    here.lab = newer


def test_new_lab_gets_all_by_a_sync(here: Forwarding, tmp_path: Path) -> None:
    """A lab that has nothing of a host is told all that there is now: retired names too, none of the past ones."""
    arm, leg = here.make("arm", rack=1), here.make("leg")
    here.rename("arm", "left arm")
    here.retire("leg")
    here.run()
    new = InnerLab(tmp_path / "new", FakeClock())
    here.lanes.lab, before, here.lab = new, here.lab, new
    here.keepalive()
    here.keepalive()
    assert new.names() == {"left arm": arm, "leg": leg}
    assert new.find("leg").retired and json.loads(new.find("left arm").metadata) == {"rack": 1}
    assert sent(here) == []
    here.make("hand")
    here.run()
    assert "hand" in new.names()
    new.close()
    here.lab = before


def test_other_numbering_is_told_all_anew(here: Forwarding) -> None:
    """A registry that was copied numbers its changes anew: it syncs, and goes on from there."""
    here.make("arm")
    here.run()
    here.host.epoch += 1
    asked = len(here.lab.asked)
    here.make("leg")
    here.run()
    assert here.forwarder.revision == 0
    assert len(here.lab.asked) == asked, "nothing is sent until the lab was told of it"
    here.keepalive()
    mark = here.lab.mark("here")
    assert mark is not None and mark[0] == here.host.epoch
    assert [*here.lab.names()] == ["arm", "leg"]
    assert here.forwarder.revision == mark[1]


def test_answer_to_the_last_numbering_is_not_noted_for_the_next(here: Forwarding) -> None:
    """What the lab had of a numbering that has just ended is no word about the next one."""
    here.make("arm")
    here.turn()
    here.lanes.work()
    with here.pair.core.db:
        here.host.epoch += 1
        here.pair.core.store.drop_meta("lab_revision")
    here.turn()
    assert here.pair.core.store.meta("lab_revision") is None


def test_mark_that_is_none_of_our_changes_leads_to_a_sync(here: Forwarding) -> None:
    """A mark that no change of this database has is of another history (it was set back to a backup): all is told."""
    here.make("arm")
    here.run()
    epoch, revision = here.lab.mark("here") or (0, 0)
    here.lab.registry.store.apply("here", epoch, revision, revision + 7, [])
    here.keepalive()
    here.keepalive()
    assert len(sent(here, "/registry/sync")) == 2
    assert here.lab.mark("here") == (epoch, revision + 7), "which never goes back"


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
    states = [change["component"] for body in sent(here) for change in body["changes"]]
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
    assert len(sent(here)) == 1
    assert here.lab.mark("here") == mark
    assert here.forwarder.behind() == 0


def test_change_during_a_sync_is_told_after_it(tmp_path: Path) -> None:
    """What changes while all is being told is told afterwards, as it went: swapped names too."""
    with Forwarding(tmp_path) as here:
        ids = {f"n{n:03}": here.make(f"n{n:03}") for n in range(200)}
        here.forwarder.begin(None)
        for _ in range(4):
            here.turn()  # some names are read
        here.rename("n000", "away")
        here.rename("n199", "n000")
        here.rename("away", "n199")
        here.rename("n150", "z")
        here.rename("z", "n200")
        here.rename("n160", "z")
        late = here.make("a late one")
        here.run()
        expected = ids | {"n000": ids["n199"], "n199": ids["n000"], "a late one": late}
        expected |= {"n200": expected.pop("n150"), "z": expected.pop("n160")}
        assert here.lab.names() == dict(sorted(expected.items()))
        assert here.lab.registry.store.about().conflicts == 0
        assert here.forwarder.behind() == 0


def test_keepalive_during_a_sync_leaves_it_alone(tmp_path: Path) -> None:
    """A sync of many names goes on, though the lab says with each keepalive meanwhile that it has no mark."""
    with Forwarding(tmp_path) as here:
        for n in range(200):
            here.make(f"n{n}", text="x" * 500)
        here.forwarder.begin(None)
        while here.forwarder.behind():
            here.turn()
            if here.lanes.work():
                here.clock.advance(PACE_S)
                here.forwarder.begin(here.lab.mark("here"))
        states = [state["name"] for body in sent(here, "/registry/sync") for state in body["components"]]
        assert len(states) == 200


def test_sync_that_is_interrupted_begins_anew(tmp_path: Path) -> None:
    """A lab that went away in the middle of a sync is told all of it again: it may be another one."""
    with Forwarding(tmp_path) as here:
        made = {f"n{n:04}": here.make(f"n{n:04}", text="x" * 1000) for n in range(200)}
        here.forwarder.begin(None)
        while not here.lanes.waiting:
            here.turn()
        here.lanes.work()
        here.clock.advance(PACE_S)
        while not here.lanes.waiting:
            here.turn()
        here.lanes.fault = "away"
        here.lanes.work()
        new = InnerLab(tmp_path / "new", FakeClock())
        here.lanes.lab, before, here.lab = new, here.lab, new
        here.lanes.fault = ""
        here.keepalive()
        here.wait(1)
        assert new.names() == made
        new.close()
        here.lab = before


def test_mark_of_a_sync_is_a_change_that_is_never_lost(tmp_path: Path) -> None:
    """A sync ends with a revision that outlasts a power loss, which those of locks do not."""
    with Forwarding(tmp_path) as here:
        here.client.resolve("arm").ok()
        here.keepalive()
        last = here.pair.core.store.events(0, 100)
        assert [event["kind"] for event in last] == ["started", "created", "granted"]
        assert here.lab.mark("here") == (1, last[1]["revision"])


def test_sync_whose_last_answer_was_lost_is_not_made_again(tmp_path: Path) -> None:
    """Where the lab has noted the end of a sync, the next keepalive says so, and it is done."""
    with Forwarding(tmp_path) as here:
        here.make("arm")
        here.lanes.fault = "lost"
        here.keepalive()
        here.lanes.fault = ""
        here.keepalive()
        here.wait(1)
        assert len(sent(here, "/registry/sync")) == 1
        assert here.forwarder.behind() == 0


def test_empty_registry_syncs_once(here: Forwarding) -> None:
    """A host without a name has a mark in the lab after the first contact, and asks no more."""
    assert here.lab.mark("here") is not None
    asked = len(here.lab.asked)
    here.keepalive()
    here.wait(100)
    assert len(here.lab.asked) == asked


def test_large_metadata_go_in_several_requests(here: Forwarding) -> None:
    """A request has some 16 KiB, or one change that is larger."""
    here.lanes.fault = "away"
    made = [here.make(f"n{n:02}", text="x" * size) for n, size in enumerate([16_300, *[5_000] * 10, 16_300, 1])]
    here.run()
    here.lanes.fault = ""
    here.keepalive()
    here.wait(1)
    assert [len(body["changes"]) for body in sent(here)] == [1, 3, 3, 3, 1, 1, 1]
    assert all(len(json.dumps(body)) < 1.1 * lab_changes.CHARS_A_REQUEST for body in sent(here))
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
    assert len(sent(here)[-1]["changes"]) == 5, "they go together again"


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
    assert len(sent(here)) == 1
    assert here.forwarder.behind() == 0


def test_answer_from_before_a_new_beginning_does_not_count(here: Forwarding) -> None:
    """What comes of a request that was under way when all began anew is no delivery of what is sent since."""
    here.make("arm")
    here.turn()
    assert here.lanes.waiting
    here.host.epoch += 1
    here.forwarder.begin(None)
    here.lanes.work()
    assert here.forwarder.revision == 0
    here.run()
    assert here.lab.mark("here") == (here.host.epoch, here.forwarder.revision)


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


def test_two_hosts_keep_their_own_marks(tmp_path: Path) -> None:
    """Each host is told of by itself, in order per host."""
    lab = InnerLab(tmp_path, FakeClock())
    with Forwarding(tmp_path, lab, name="a") as a, Forwarding(tmp_path, lab, name="b") as b:
        a.keepalive()
        b.keepalive()
        a.make("arm")
        b.make("leg")
        a.run()
        b.run()
        assert [*lab.names()] == ["arm", "leg"]
        assert lab.mark("a") == (1, a.forwarder.revision)
        assert lab.mark("b") == (1, b.forwarder.revision)
    lab.close()


def test_lab_has_a_later_word_in_a_sync_that_stays(tmp_path: Path) -> None:
    """A sync changes nothing of which the lab has a later word; that is counted, and nothing changes here."""
    with Forwarding(tmp_path) as here:
        id = here.make("arm", n=1)
        later = State(
            id=id, name="arm", component_type="node", metadata='{"n":9}', created_at=AT, changed_at="2999" + AT[4:]
        )
        here.lab.registry.store.apply("there", 1, 0, 1, [Change(1, later)])
        here.keepalive()
        assert here.lab.find("arm").metadata == '{"n":9}'
        assert here.client.get("arm")["metadata"] == {"n": 1}
        assert here.forwarder.objections.counts == {"newer": 1}
        assert here.forwarder.behind() == 0


def test_lab_away_error_class_is_told(here: Forwarding) -> None:
    """`on_away` gets the error that says why."""
    got: list[LabUnavailableError] = []
    here.forwarder._on_away = got.append
    here.lanes.fault = "away"
    here.make("arm")
    here.run()
    assert {error.code for error in got} == {"lab_unavailable"}


# one name, two ULIDs


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Forwarding, Forwarding]]:
    """Two hosts of one lab that have made `arm` apart; the first one was in the lab first."""
    lab = InnerLab(tmp_path, FakeClock())
    with Forwarding(tmp_path, lab, name="a") as a, Forwarding(tmp_path, lab, name="b") as b:
        a.make("arm", by="a")
        b.make("arm", by="b")
        a.keepalive()
        yield a, b
    lab.close()


def test_name_made_on_two_hosts_is_one_component_everywhere(hosts: tuple[Forwarding, Forwarding]) -> None:
    """The lab and both hosts know both ULIDs as one component; the first one in the lab is preferred, and what is
    changed on the second host afterwards reaches the lab."""
    a, b = hosts
    ids = {a.id_of("arm"), b.id_of("arm")}
    preferred = a.id_of("arm")
    b.keepalive()
    assert b.id_of("arm") == preferred
    for id in ids:
        assert b.client.send("whois", id=id).ok()["component"]["name"] == "arm"
        assert a.lab.registry.store.find(id=id).name == "arm"
    b.set("arm", by="b again")
    b.run()
    assert json.loads(a.lab.find("arm").metadata) == {"by": "b again"}
    assert b.forwarder.behind() == 0


def test_holder_of_a_name_with_two_ulids_keeps_its_own(hosts: tuple[Forwarding, Forwarding]) -> None:
    """A running holder is told once, whatever is changed meanwhile; who resolves after it has the lab's ULID."""
    a, b = hosts
    held = b.client.resolve("arm").ok()
    b.keepalive()
    b.set("arm", n=1)
    b.run()
    assert [line["op"] for _, line in b.pair.told] == ["conflict"]
    assert b.id_of("arm") == held["id"] != a.id_of("arm")
    assert b.forwarder.objections.counts["two_ids"] == 2
    b.client.release("arm", held["fencing_token"])
    assert b.client.resolve("arm").ok()["id"] == a.id_of("arm")


def test_decision_of_a_person_reaches_both_hosts_with_their_next_change(hosts: tuple[Forwarding, Forwarding]) -> None:
    """Where a person has decided for the other ULID, a host that says something of the component learns it."""
    a, b = hosts
    first, second = a.id_of("arm"), b.id_of("arm")
    b.keepalive()
    a.lab.registry.store.merge("a", "arm", second)
    for host in (a, b):
        host.set("arm", seen=host.host.name)
        host.run()
        assert host.id_of("arm") == second
        assert host.client.send("whois", id=first).ok()["component"]["id"] == second


def test_conflict_in_a_sync_is_noted_as_one_in_a_change(tmp_path: Path) -> None:
    """A host whose first word to the lab is a sync learns of a name with two ULIDs by it."""
    lab = InnerLab(tmp_path, FakeClock())
    with Forwarding(tmp_path, lab, name="a") as a, Forwarding(tmp_path, lab, name="b") as b:
        a.make("arm")
        b.make("arm")
        a.keepalive()
        b.keepalive()
        assert len(sent(b, "/registry/changes")) == 0
        assert a.id_of("arm") == b.id_of("arm")
    lab.close()


@pytest.mark.parametrize("preferred", ["", "x" * 300, "a\nb", 7, None])
def test_preferred_ulid_that_is_none_changes_nothing(here: Forwarding, preferred: Any) -> None:
    """What a lab says is checked: text that cannot be an id is not taken over."""
    id = here.make("arm")
    here.run()
    post = here.lab.post

    def lie(route: str, body: dict[str, Any], *, within_s: float) -> dict[str, Any]:
        answer = post(route, body, within_s=within_s)
        return answer | {"unapplied": [{"name": "arm", "id": id, "reason": "two_ids", "preferred": preferred}]}

    here.lab.post = lie  # type: ignore[method-assign]
    here.set("arm", n=1)
    here.run()
    assert here.id_of("arm") == id
    assert here.client.get("arm")["preferred_id"] is None
